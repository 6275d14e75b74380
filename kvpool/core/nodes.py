"""What the master is told by its operator, and what it knows of each node."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from kvpool.core.index import ROWS_PER_SLICE
from kvpool.core.keytable import Rows
from kvpool.core.messages import BlockRun
from kvpool.core.removals import REMOVALS_MAX, Why
from kvpool.model import KEY_BYTES, NodeAddress

FORGET_DEAD_S = 600.0
"""A node that has been dead for so long is not shown any more."""


@dataclass(frozen=True, slots=True)
class MasterLimits:
    """The operator's settings; times in seconds, shares of a node's (or backend's) capacity."""

    eviction_high_watermark_ratio: float = 0.99
    eviction_ratio: float = 0.01
    lease_ttl_s: float = 10.0
    client_ttl_s: float = 10.0
    storage_high_watermark_ratio: float = 0.95
    storage_eviction_ratio: float = 0.05
    blocks_max: int = 1 << 24
    removals_max: int = REMOVALS_MAX


@dataclass(slots=True)
class Node:
    """What the master knows of one node."""

    address: NodeAddress
    epoch: int
    capacity_bytes: int = 0
    used_bytes: int = 0
    session: int | None = None
    last_seen: float = 0.0
    incarnation: int = 0  # 0: none yet
    sequence: int = 0  # newest delta applied
    applying: bool = False  # ... and not all of it is in the index yet
    heard_sequence: int = 0  # newest delta the node says it has sent
    awaiting: bool = True  # for an inventory
    asked_at: float = 0.0
    pending: int = 0  # incarnation that the running inventory fills
    pending_sequence: int = 0
    next_chunk: int = 0
    state: str = "warming"
    superseded: set[int] = field(default_factory=set)  # epochs of processes that this one replaced
    evict_sent: int = 0
    evict_done: int = 0
    evict_at: float = -1e9
    victims_at: float = -1e9
    victims_stale: bool = True
    listed: Rows = field(default_factory=lambda: np.empty(0, np.int64))
    job: bool = False  # a search for victims is under way


@dataclass(frozen=True, slots=True)
class Retired:
    """An incarnation that is over, with its rows still to be swept: whose it was, why and when it ended."""

    node: Node
    why: Why
    at: float


# ---- runs of blocks ----------------------------------------------------------------------------------


def slices_of(runs: tuple[BlockRun, ...]) -> Iterator[BlockRun]:
    """Cut runs into pieces of at most one slice."""
    step = ROWS_PER_SLICE * KEY_BYTES
    for run in runs:
        if len(run.keys) <= step:
            yield run
        else:
            for start in range(0, len(run.keys), step):
                yield replace(run, keys=run.keys[start : start + step])


def bounded(runs: Iterator[BlockRun]) -> Iterator[tuple[BlockRun, ...]]:
    """Group runs into messages of a few thousand blocks."""
    batch: list[BlockRun] = []
    blocks = 0
    for run in runs:
        batch.append(run)
        blocks += len(run)
        if blocks >= 4 * ROWS_PER_SLICE:
            yield tuple(batch)
            batch, blocks = [], 0
    if batch:
        yield tuple(batch)
