"""What a node and the master say to each other, as plain data.

The wire form is in ``proto/kvpool/v1/node.proto``; ``kvpool/rpc/convert.py`` translates. Both state
machines speak only these, so that the simulation can carry them over a network of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvpool.model import DIGEST_BYTES, KEY_BYTES, Backend, Namespace, NodeAddress


@dataclass(frozen=True, slots=True)
class BlockRun:
    """Blocks of one namespace that share shards and size, in order. ``keys`` has 16 bytes a block.

    ``commanded`` is about removed ones: the master had asked for it; otherwise room was made for a put, or a
    file was found to be missing or broken. ``backend``: the storage backend that has them as files; empty: memory.
    """

    namespace: bytes
    shards: int
    shard_bytes: int
    keys: bytes
    commanded: bool = False
    backend: bytes = b""

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.keys) // KEY_BYTES


def runs_of_files(backend: bytes, files: Iterable[tuple[bytes, int]]) -> tuple[BlockRun, ...]:
    """Return files, each a namespace with a key and a shard, as runs of one shard, without sizes."""
    keys: dict[tuple[bytes, int], list[bytes]] = {}
    for block_key, shard in files:
        keys.setdefault((block_key[:DIGEST_BYTES], shard), []).append(block_key[DIGEST_BYTES:])
    return tuple(BlockRun(n, 1 << shard, 0, b"".join(some), backend=backend) for (n, shard), some in keys.items())


# ---- node to master --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of a session. ``kept_by``: the master whose Ack was the last one, with its ``generation``."""

    address: NodeAddress
    epoch: int
    capacity_bytes: int
    used_bytes: int
    sequence: int
    master_epoch: int = 0
    namespaces: tuple[Namespace, ...] = ()
    backends: tuple[Backend, ...] = ()
    kept_by: int = 0
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Inventory:
    """One chunk of a snapshot of everything the node holds at ``sequence``; chunks count from 0."""

    sequence: int
    chunk: int
    last: bool
    added: tuple[BlockRun, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """What changed since delta ``sequence - 1``. Within one delta, removed comes before added."""

    sequence: int
    added: tuple[BlockRun, ...]
    removed: tuple[BlockRun, ...]
    used_bytes: int
    evictions_done: int = 0
    namespaces: tuple[Namespace, ...] = ()


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Still here; ``sequence`` is the newest delta sent, so that a lost last one is noticed."""

    used_bytes: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Probed:
    """Answer to Probe: a byte a key, with the bits ``BEING_WRITTEN`` (some shard) and ``COMMITTED`` (some shard)."""

    id: int
    states: bytes


BEING_WRITTEN, COMMITTED = 1, 2

@dataclass(frozen=True, slots=True)
class Storage:
    """The node's backends, whenever the state of one has changed."""

    backends: tuple[Backend, ...]


@dataclass(frozen=True, slots=True)
class Scanned:
    """A piece of what a Scan has found: ``files`` looked at so far, of about ``files_expected`` (0: not known)."""

    backend: bytes
    last: bool
    files: int = 0
    files_expected: int = 0
    added: tuple[BlockRun, ...] = ()
    namespaces: tuple[Namespace, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class FilesRemoved:
    """A RemoveFiles is carried out, or a LookForFiles: ``gone`` was not there."""

    id: int
    gone: tuple[BlockRun, ...] = ()


NodeMessage = Hello | Inventory | Delta | Heartbeat | Probed | Storage | Scanned | FilesRemoved


# ---- master to node --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Welcome:
    """Answer to Hello: resume after a delta, or send the inventory."""

    master_epoch: int
    resume_after: int
    inventory: bool


@dataclass(frozen=True, slots=True)
class Victims:
    """Replaces the node's victim list: coldest first, free to take."""

    blocks: tuple[BlockRun, ...]


@dataclass(frozen=True, slots=True)
class Evict:
    """Drop these now, except what is pinned or being written; confirm ``id`` in a delta."""

    id: int
    blocks: tuple[BlockRun, ...]


@dataclass(frozen=True, slots=True)
class Superseded:
    """Another process has said Hello with this node id; the older one exits."""


@dataclass(frozen=True, slots=True)
class SendInventory:
    """A delta is missing: send everything again."""


@dataclass(frozen=True, slots=True)
class Ack:
    """Deltas up to ``sequence`` are applied and may be forgotten.

    ``generation``: the catalog's that has what they say of files; 1 where there is no catalog.
    """

    sequence: int
    generation: int = 1


@dataclass(frozen=True, slots=True)
class Probe:
    """Asks what the node knows of these blocks (16 bytes a key), reported or not."""

    id: int
    namespace: bytes
    keys: bytes


@dataclass(frozen=True, slots=True)
class RemoveFiles:
    """These are no hits any more: remove their files (runs of one shard each), and say FilesRemoved."""

    id: int
    backend: bytes
    blocks: tuple[BlockRun, ...]


@dataclass(frozen=True, slots=True)
class LookForFiles:
    """Somebody may have removed these files: see whether they are there, and say FilesRemoved."""

    id: int
    backend: bytes
    blocks: tuple[BlockRun, ...]


@dataclass(frozen=True, slots=True)
class Scan:
    """The catalog does not know all of this backend: say what it holds."""

    backend: bytes


@dataclass(frozen=True, slots=True)
class StorageLimits:
    """The backends that are full: write nothing more into them. Replaces what was said before."""

    full: frozenset[bytes]


@dataclass(frozen=True, slots=True)
class Keep:
    """Blocks that an operator has pinned hard are never evicted from memory, until released."""

    keep: tuple[BlockRun, ...] = ()
    release: tuple[BlockRun, ...] = ()


MasterMessage = (
    Welcome | Victims | Evict | Superseded | SendInventory | Ack | Probe | RemoveFiles | LookForFiles | Scan
    | StorageLimits | Keep
)  # fmt: skip
