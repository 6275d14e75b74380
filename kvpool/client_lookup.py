"""Lookups of hybrid models' KV cache groups, at the master and, while that is away, at this host's node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvpool.client_master import MasterFrame
from kvpool.client_node import LocalNode
from kvpool.client_results import Lookup, Run
from kvpool.errors import InvalidArgumentError
from kvpool.model import KEY_BYTES, Namespace, NodeAddress
from kvpool.rpc.v1 import master_pb2

LOCAL_LOOKUP_S = 0.008
"""Of a lookup that the master did not answer, for one group at the node of this host."""


@dataclass(frozen=True, slots=True)
class Also:
    """Another KV cache group of a prompt: a prefix counts only if its last ``last_blocks`` blocks are there too.

    0 stands for all blocks.
    """

    namespace: Namespace
    last_blocks: int = 0


def lookup_frame(digest: bytes, also: Sequence[Also], known_prefix: int, *, lease: bool) -> MasterFrame:
    """Return the question for the master; raise InvalidArgumentError for a length that cannot be."""
    request = master_pb2.LookupRequest(namespace=digest, known_prefix=known_prefix, lease=lease)
    if also:
        request.groups.add(namespace=digest)
    for group in also:
        if not 0 <= group.last_blocks < 1 << 32:
            raise InvalidArgumentError("also.last_blocks", f"must be from 0 to 2**32 - 1, not {group.last_blocks}")
        rule = master_pb2.LookupRequest.LAST_N if group.last_blocks else master_pb2.LookupRequest.FULL
        request.groups.add(namespace=group.namespace.digest, rule=rule, last_n=group.last_blocks)
    return MasterFrame(lookup=request)


def lookup_at_node(
    node: LocalNode, namespace: Namespace, also: Sequence[Also], keys: bytes, known_prefix: int, why: str
) -> Lookup:
    """Return what this host's node holds whole, with ``why`` as the reason. Raises KVPoolError."""
    end = known_prefix + node.local_prefix(namespace, keys[known_prefix * KEY_BYTES :], LOCAL_LOOKUP_S)
    for group in also:
        first = max(known_prefix, end - group.last_blocks) if group.last_blocks else known_prefix
        wanted = keys[first * KEY_BYTES : end * KEY_BYTES]
        if wanted and node.local_prefix(group.namespace, wanted, LOCAL_LOOKUP_S) < end - first:
            end = known_prefix  # a shorter prefix may do, but the master will soon be there to find it
    address = NodeAddress(node.node_id, socket_path=node.path)
    run = Run(end - known_prefix, [(address, "dram", tuple(range(namespace.shards)), b"")])
    return Lookup(end, why, known_prefix=known_prefix, runs=[run] if run.blocks else [])
