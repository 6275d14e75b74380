"""What a node and the master say to each other, as plain data.

The wire form is in ``proto/kvpool/v1/node.proto``; ``kvpool/rpc/convert.py`` translates. Both state
machines speak only these, so that the simulation can carry them over a network of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvpool.model import KEY_BYTES, Namespace, NodeAddress


@dataclass(frozen=True, slots=True)
class BlockRun:
    """Blocks of one namespace that share shards and size, in order. ``keys`` has 16 bytes a block.

    ``commanded`` is about removed ones: the master had asked for it; otherwise room was made for a put.
    """

    namespace: bytes
    shards: int
    shard_bytes: int
    keys: bytes
    commanded: bool = False

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.keys) // KEY_BYTES


# ---- node to master --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of a session."""

    address: NodeAddress
    epoch: int
    capacity_bytes: int
    used_bytes: int
    sequence: int
    master_epoch: int = 0
    namespaces: tuple[Namespace, ...] = ()


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

NodeMessage = Hello | Inventory | Delta | Heartbeat | Probed


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
    """Deltas up to ``sequence`` are applied and may be forgotten."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Probe:
    """Asks what the node knows of these blocks (16 bytes a key), reported or not."""

    id: int
    namespace: bytes
    keys: bytes


MasterMessage = Welcome | Victims | Evict | Superseded | SendInventory | Ack | Probe
