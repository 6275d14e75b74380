"""What the client's calls return."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvpool.model import NodeAddress, mask_shards
from kvpool.rpc import convert
from kvpool.rpc.v1 import master_pb2


@dataclass(slots=True)
class Run:
    """Consecutive blocks that lie at the same places: (address, tier, shards) of each owner."""

    blocks: int
    owners: list[tuple[NodeAddress, str, tuple[int, ...]]]


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

    ``reasons`` counts why others are not: not_stored, not_here, owner_lost, corrupt, wrong_size, ...;
    ``tiers`` counts where blocks came from: local, remote.
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
                (nodes[o.node], o.tier, tuple(mask_shards(convert.mask_from_bytes(o.shards)))) for o in run.owners
            ]
            runs.append(Run(run.blocks, owners))
    reason = convert.REASON_OF[reply.reason].value
    return Lookup(reply.prefix, reason, reply.detail, reply.lease, known_prefix, runs)
