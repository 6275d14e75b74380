"""The nouns of a segment: a slot, the block it belongs to, and what a put or a get holds of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from kvpool.core.allocator import UNIT_BYTES, round_up
from kvpool.core.messages import BlockRun
from kvpool.errors import AllPinnedError, InvalidArgumentError, NoRoomError, TooLargeError
from kvpool.model import (
    CHECKSUM_BYTES,
    DIGEST_BYTES,
    KEY_BYTES,
    NODE_ITEMS_MAX,
    SHARD_BYTES_MAX,
    SHARDS_MAX,
    Namespace,
)

HEADER_FIXED_BYTES: Final = 96
"""Of a slot's header, before the checksums."""

FILE_PAGE_BYTES: Final = 4096
"""Files are accounted in multiples of this."""

STORED: Final = -1
"""Reserve's answer for an item that is already here."""

BEING_WRITTEN: Final = -2
"""Reserve's answer for an item that somebody has reserved and not committed yet."""

NO_ROOM: Final = -3
"""Reserve's answer for an item that found no room while others of the call were served."""

COUNTERS: Final = (
    "committed_slots",
    "evictions",  # blocks, for whatever reason
    "evicted_bytes",
    "victim_hits",  # of the evictions: taken from the master's list
    "commanded_evictions",  # of the evictions: asked for by the master
    "window_evictions",  # times that neighbours had to go because sizes differ
    "window_scans",  # of those: times that the whole segment was searched
    "all_pinned",
    "too_large",
    "quarantined",
)
"""What a segment counts."""


def header_bytes(layers: int) -> int:
    """Return the bytes before a slot's payload: fixed part and one checksum a layer, whole units."""
    return round_up(HEADER_FIXED_BYTES + CHECKSUM_BYTES * layers, UNIT_BYTES)


def file_bytes(shard_bytes: int, layers: int) -> int:
    """Return what a shard's file takes of a storage backend, by the pool's account: whole pages."""
    return round_up(header_bytes(layers) + round_up(shard_bytes, UNIT_BYTES), FILE_PAGE_BYTES)


class Block:
    """All that this node holds of one block: its shards go together when it is evicted."""

    __slots__ = ("busy", "bytes", "committed", "kept", "key", "newer", "older", "shards", "stamp")

    def __init__(self, key: bytes) -> None:
        self.key = key  # namespace digest + block key
        self.shards: dict[int, Slot] = {}
        self.committed = 0  # bit mask of shards
        self.busy = 0  # pins and reserved slots, and one while it is kept
        self.kept = False  # an operator has pinned it
        self.bytes = 0
        self.stamp = 0  # of the last commit or pin, counted in such events
        self.newer: Block | None = None  # its neighbours in the order of eviction
        self.older: Block | None = None


class Slot:
    """One shard's place in the segment. ``offset`` is its payload's, ``start`` its header's."""

    __slots__ = (
        "block",
        "checksums",
        "entry",
        "extent_bytes",
        "filed",
        "generation",
        "layers",
        "offset",
        "partial",
        "pins",
        "shard",
        "shard_bytes",
        "start",
        "transfer",
    )

    def __init__(
        self, block: Block, shard: int, start: int, offset: int, extent_bytes: int,
        shard_bytes: int, layers: int, generation: int,
    ) -> None:  # fmt: skip
        self.block = block
        self.shard = shard
        self.start = start
        self.offset = offset
        self.extent_bytes = extent_bytes
        self.shard_bytes = shard_bytes
        self.layers = layers
        self.generation = generation
        self.checksums: bytes | None = None
        self.partial = b""  # checksums of the layers that are written already, while a transfer writes the others
        self.transfer = 0  # who names it may read those layers
        self.pins = 0
        self.entry = -1  # in the slot table
        self.filed = False  # is in a file, or about to be

    def __repr__(self) -> str:
        state = "reserved" if self.checksums is None else f"{self.pins} pins"
        return f"<Slot {self.key.hex()[:8]}/{self.shard} at {self.offset}, {self.shard_bytes} bytes, {state}>"

    @property
    def namespace(self) -> bytes:
        """The namespace's digest."""
        return self.block.key[:DIGEST_BYTES]

    @property
    def key(self) -> bytes:
        """The block's key within its namespace."""
        return self.block.key[DIGEST_BYTES:]

    @property
    def reserved(self) -> bool:
        """Still being written: to be read by nobody but those of the same transfer, as far as it is ``ready``."""
        return self.checksums is None

    def ready(self, transfer: int) -> int:
        """Return how many leading layers may be read by who names this transfer (0: by others)."""
        if self.checksums is not None:
            return self.layers
        return len(self.partial) // CHECKSUM_BYTES if transfer and transfer == self.transfer else 0


class Reservation:
    """What a put may write: ``slots`` are the items that were given room; ``id`` is 0 if none was.

    Who names its ``transfer`` may read a slot's layers before the commit; 0: nobody may.
    """

    __slots__ = ("id", "offsets", "owner", "slots", "transfer")

    def __init__(
        self, reservation_id: int, owner: int, offsets: list[int], slots: list[Slot], transfer: int = 0
    ) -> None:
        self.id = reservation_id
        self.owner = owner
        self.offsets = offsets
        self.slots = slots
        self.transfer = transfer


class Pin:
    """Slots protected for a reader, one entry an item, None where nothing is stored."""

    __slots__ = ("id", "slots")

    def __init__(self, pin_id: int, slots: list[Slot | None]) -> None:
        self.id = pin_id
        self.slots = slots


class Owner:
    """What a connection holds, and loses when it ends."""

    __slots__ = ("pins", "reservations")

    def __init__(self) -> None:
        self.pins: dict[int, list[Slot]] = {}
        self.reservations: dict[int, Reservation] = {}


def check_items(namespace: bytes, shards: Sequence[int], keys: bytes, most: int = NODE_ITEMS_MAX) -> None:
    """Raise InvalidArgumentError unless the items of a call (keys x shards) can be meant."""
    if len(namespace) != DIGEST_BYTES:
        raise InvalidArgumentError("namespace", f"must be {DIGEST_BYTES} bytes, not {len(namespace)}")
    if len(keys) % KEY_BYTES:
        raise InvalidArgumentError("keys", f"must be a multiple of {KEY_BYTES} bytes, not {len(keys)}")
    if not shards or len(set(shards)) != len(shards) or min(shards) < 0 or max(shards) >= SHARDS_MAX:
        raise InvalidArgumentError("shards", f"must be different numbers from 0 to {SHARDS_MAX - 1}, at least one")
    if len(keys) // KEY_BYTES * len(shards) > most:
        raise InvalidArgumentError("keys", f"at most {most} items (keys x shards) a call")


def check_shape(namespace: Namespace, shards: Sequence[int], shard_bytes: int, layers: int) -> None:
    """Raise InvalidArgumentError unless a slot of this namespace can look like that."""
    if max(shards) >= namespace.shards:
        raise InvalidArgumentError("shards", f"this namespace has shards 0 to {namespace.shards - 1}")
    if not 1 <= shard_bytes <= SHARD_BYTES_MAX:
        raise InvalidArgumentError("shard_bytes", f"must be from 1 to {SHARD_BYTES_MAX}, not {shard_bytes}")
    if layers != namespace.shard_layers:
        raise InvalidArgumentError("layers", f"a shard of this namespace has {namespace.shard_layers}, not {layers}")
    if shard_bytes % layers:
        raise InvalidArgumentError("layers", f"must divide shard_bytes ({shard_bytes}), {layers} does not")


def no_room(size: int, capacity_bytes: int) -> NoRoomError:
    """Return why a slot of ``size`` bytes found no room."""
    if size > capacity_bytes:
        return TooLargeError(f"a slot of {size} bytes is larger than the segment ({capacity_bytes} bytes)")
    return AllPinnedError(f"no {size} bytes in one piece: what is left is pinned or being written")


def block_keys(run: BlockRun) -> list[bytes]:
    """Return a run's blocks as namespace digest + key."""
    return [run.namespace + run.keys[at : at + KEY_BYTES] for at in range(0, len(run.keys), KEY_BYTES)]


def group_runs(slots: Iterable[tuple[bytes, int, int]], *, commanded: bool = False) -> tuple[BlockRun, ...]:
    """Return (block key, shard, shard_bytes) of slots as runs: one for each namespace, set of shards and size.

    The order is kept within each run.
    """
    masks: dict[tuple[bytes, int], int] = {}
    for key, shard, shard_bytes in slots:
        item = (key, shard_bytes)
        masks[item] = masks.get(item, 0) | 1 << shard
    groups: dict[tuple[bytes, int, int], list[bytes]] = {}
    for (key, shard_bytes), mask in masks.items():
        groups.setdefault((key[:DIGEST_BYTES], mask, shard_bytes), []).append(key[DIGEST_BYTES:])
    return tuple(
        BlockRun(namespace, mask, shard_bytes, b"".join(keys), commanded)
        for (namespace, mask, shard_bytes), keys in groups.items()
    )
