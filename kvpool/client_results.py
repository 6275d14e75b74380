"""What the client's calls return."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvpool.client_health import BreakerOpenError
from kvpool.errors import KVPoolError, OverloadedError, UnavailableError
from kvpool.model import NodeAddress, Reason, mask_shards
from kvpool.rpc import convert
from kvpool.rpc.v1 import master_pb2


@dataclass(slots=True)
class Run:
    """Consecutive blocks that lie at the same places: (address, tier, shards, backend) of each owner.

    Of tier "fs" is a storage backend (its id), and the address is that of some node which serves it; else
    the backend is empty.
    """

    blocks: int
    owners: list[tuple[NodeAddress, str, tuple[int, ...], bytes]]


@dataclass(slots=True)
class Lookup:
    """The longest prefix (in blocks, ``known_prefix`` included) that the pool holds whole, and where.

    ``reason`` says why it ends there: complete, not_stored, not_whole, owner_suspect, warming,
    namespace_unknown, namespace_mismatch (``detail`` names the fields), master_unreachable (this host's
    node alone was asked), breaker_open (the same, the master having failed several times in a row), no_pool (neither
    the master nor a node of this host answers).
    ``lease``: 0, or a token to ``renew`` and to ``release``.
    """

    prefix: int
    reason: str
    detail: str = ""
    lease: int = 0
    known_prefix: int = 0
    runs: list[Run] = field(default_factory=list)


@dataclass(slots=True)
class PutResult:
    """How many blocks were stored, existed already (or are being written by another), and failed, with reasons."""

    stored: int = 0
    existed: int = 0
    failed: int = 0
    errors: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class GetResult:
    """What is in the buffers now: ``prefix`` leading blocks without a gap, ``ok`` for each block.

    ``reasons`` counts why others are not: not_stored, not_here, owner_lost, corrupt, wrong_size, file_missing,
    file_corrupt, storage_down, storage_timeout, no_room (in the memory of the node that reads files), ...;
    ``tiers`` counts where blocks came from: local, remote (the memory of nodes), fs.
    """

    prefix: int
    ok: list[bool]
    reasons: dict[str, int]
    tiers: dict[str, int]


def lookup_from_proto(reply: master_pb2.LookupResponse, known_prefix: int) -> Lookup:
    """Return the master's answer in the client's words."""
    runs = []
    if reply.runs:
        nodes = [convert.address_from_proto(node) for node in reply.nodes]
        for run in reply.runs:
            owners = [
                (nodes[o.node], o.tier, tuple(mask_shards(convert.mask_from_bytes(o.shards))), o.backend)
                for o in run.owners
            ]
            runs.append(Run(run.blocks, owners))
    reason = convert.REASON_OF[reply.reason].value
    return Lookup(reply.prefix, reason, reply.detail, reply.lease, known_prefix, runs)


def reason_of_error(exc: KVPoolError) -> str:
    """Return what a failed call is called among the reasons of a result."""
    if isinstance(exc, BreakerOpenError):
        return Reason.BREAKER_OPEN.value
    if isinstance(exc, OverloadedError):
        return "overloaded"
    return "unavailable" if isinstance(exc, UnavailableError) else "refused"
