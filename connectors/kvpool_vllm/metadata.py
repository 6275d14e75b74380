"""What travels between the connector's scheduler side and its workers, once a step.

Plain data without vLLM or torch, so that both sides can be tested alone; ``connector.py`` registers
the classes under vLLM's abstract ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvpool.client import Lookup
    from kvpool.model import Namespace, NodeAddress


@dataclass(frozen=True, slots=True)
class Part:
    """The blocks of one KV cache group in a job."""

    namespace: Namespace
    """With every job, because the scheduler learns it only when the engine has set its hash seed."""
    keys: bytes
    """16 bytes a block."""
    block_ids: list[int]
    lookup: Lookup | None = None
    """The scheduler's answer for a chain that begins with these keys, so that a worker need not ask again."""
    group: int = 0
    """The group's number in the engine."""


@dataclass(frozen=True, slots=True)
class LoadJob:
    """Fill the blocks of all parts; reported under the request's id."""

    request_id: str
    parts: list[Part]
    sync: bool = False
    """Needed by this step's forward; else the request waits for the report."""
    whole: bool = False
    """Of no use unless all of it arrives: a window without its first blocks, a group without the others."""
    transfer: int = 0
    """Another engine stores these blocks now, or has stored them, in this transfer."""
    nodes: tuple[NodeAddress | None, ...] = ()
    """Where it does, by shard."""

    @property
    def blocks(self) -> int:
        """How many blocks are to be filled, over all parts."""
        return sum(len(part.block_ids) for part in self.parts)


@dataclass(frozen=True, slots=True)
class SaveJob:
    """Store the blocks of all parts; the engine keeps them until every rank reports the job."""

    job_id: int
    parts: list[Part]
    transfer: int = 0
    """Another engine waits for these blocks, in this transfer."""
    computing: bool = False
    """Some are computed in the very step that brings this job."""

    @property
    def blocks(self) -> int:
        """How many blocks are to be stored, over all parts."""
        return sum(len(part.block_ids) for part in self.parts)


@dataclass(slots=True)
class StepMeta:
    """Scheduler to worker: this step's new work."""

    loads: list[LoadJob] = field(default_factory=list)
    saves: list[SaveJob] = field(default_factory=list)
    wait_s: float = 0.0
    """No token is computed in this step: the worker waits so long for a transfer instead of spinning."""


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """How a rank holds the KV of one group."""

    layers: int
    layer_block_bytes: int
    layout: str


@dataclass(frozen=True, slots=True)
class RankFacts:
    """What only a worker knows, sent to the scheduler in its first report; equal on all ranks of an engine."""

    groups: tuple[GroupFacts, ...]
    isa: str


@dataclass(frozen=True, slots=True)
class LoadSeen:
    """How a rank's load went."""

    seconds: float
    """From its first byte asked for to its last received: not the time that it waited for other loads."""
    tiers: dict[str, int]
    """Blocks by where they came from."""


@dataclass(slots=True)
class WorkerMeta:
    """Worker to scheduler: transfers that ended since the last step."""

    saved: dict[int, int] = field(default_factory=dict)
    """Save job to the number of ranks that are done with it."""
    loaded: dict[str, int] = field(default_factory=dict)
    """Request to its leading blocks that arrived: the least of the ranks seen so far."""
    unsaved: set[int] = field(default_factory=set)
    """Save jobs of which some block was not stored on some rank."""
    facts: frozenset[RankFacts] = frozenset()
    """In each rank's first report. No handshake: that of MultiConnector hands one connector's to all others."""

    seen: dict[str, LoadSeen] = field(default_factory=dict)
    """Request to how its load went on the slowest rank."""
    unusable: dict[int, frozenset[str]] = field(default_factory=dict)
    """Rank (a random number) to the nodes that it leaves alone, where that has changed."""
    nodes: dict[int, NodeAddress] = field(default_factory=dict)
    """Shard to the node that it is stored in, where that has changed."""

    def aggregate(self, other: WorkerMeta) -> WorkerMeta:
        """Return both ranks' reports as one."""
        saved = dict(self.saved)
        for job_id, ranks in other.saved.items():
            saved[job_id] = saved.get(job_id, 0) + ranks
        loaded = dict(self.loaded)
        for request_id, blocks in other.loaded.items():
            loaded[request_id] = min(blocks, loaded.get(request_id, blocks))
        seen = self.seen | other.seen
        seen |= {name: mine for name, mine in self.seen.items() if mine.seconds > seen[name].seconds}
        return WorkerMeta(
            saved,
            loaded,
            self.unsaved | other.unsaved,
            self.facts | other.facts,
            seen,
            self.unusable | other.unusable,
            self.nodes | other.nodes,
        )
