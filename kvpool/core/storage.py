"""One storage backend as the master knows it."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvpool.core.messages import BlockRun
from kvpool.model import DIGEST_BYTES, KEY_BYTES, Backend

BATCH_FILES = 256
"""Files that a node is asked about at a time."""


@dataclass(slots=True)
class Batch:
    """A RemoveFiles, or a LookForFiles, that was sent and is not confirmed."""

    id: int
    blocks: tuple[BlockRun, ...]
    sent_to: str
    sent_at: float
    again: bool = False  # of files that were not removed in time before
    alone: bool = True  # nobody else can be removing one of these, too


@dataclass(frozen=True, slots=True)
class Doubt:
    """A file that is said to be there, by ``node_id``, and may have been removed; ``look``: who is to see."""

    node_id: str
    shard_bytes: int
    look: int = 0


@dataclass(slots=True)
class StorageBackend:
    """One backend. ``servers``: how each node that has it sees it, by node id."""

    id: bytes
    incarnation: int
    url: str = ""
    capacity_bytes: int = 0
    complete: bool = False  # a scan of it has ended, once: what it holds is in the catalog
    servers: dict[str, Backend] = field(default_factory=dict)
    full: bool = False
    live: bool = False
    job: bool = False  # an eviction is under way
    relieve_at: float = float("-inf")
    turn: int = 0
    scanner: str = ""  # the node that scans it
    scan_heard: float = 0.0
    scanned_files: int = 0
    scan_expected: int = 0
    scan_not_before: float = float("-inf")
    scan_wanted: bool = True
    told: dict[bytes, str | None] = field(default_factory=dict)  # while the catalog is read: file -> who said that it
    # is there, None that it is gone
    # Files that are to be removed, or may have been; see ``file_removals``.
    doomed: dict[bytes, tuple[int, int]] = field(default_factory=dict)  # file -> (batch, or 0; bytes)
    removing_bytes: int = 0
    waiting: deque[BlockRun] = field(default_factory=deque)  # doomed, in no batch yet
    failed: deque[tuple[BlockRun, str]] = field(default_factory=deque)  # next batches, and who did not do them
    batch_files: int = BATCH_FILES
    batches: OrderedDict[int, Batch] = field(default_factory=OrderedDict)
    lately: dict[bytes, float] = field(default_factory=dict)  # file -> until when a removal of it may be carried out
    again: dict[bytes, tuple[str, int]] = field(default_factory=dict)  # doomed, and there: who says so, shard_bytes
    doubtful: dict[bytes, Doubt] = field(default_factory=dict)
    looks: dict[int, Batch] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For people."""
        return self.url or self.id.hex()


def names(run: BlockRun) -> list[bytes]:
    """Name each file of a run of one shard: namespace, shard, key."""
    head = run.namespace + bytes([run.shards.bit_length() - 1])
    return [head + run.keys[at : at + KEY_BYTES] for at in range(0, len(run.keys), KEY_BYTES)]


def file_of(name: bytes) -> tuple[bytes, int]:
    """Return what such a name is of: namespace with key, and shard."""
    return name[:DIGEST_BYTES] + name[-KEY_BYTES:], name[DIGEST_BYTES]


def named(run: BlockRun, some: Iterable[bytes]) -> BlockRun:
    """Return some files of a run."""
    keys = b"".join(name[-KEY_BYTES:] for name in some)
    return BlockRun(run.namespace, run.shards, run.shard_bytes, keys, backend=run.backend)
