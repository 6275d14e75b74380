"""The node's state machine: which slot of the segment holds which shard, and who may touch it.

Pure: offsets and decisions only, no bytes. A slot is reserved by a connection, written, committed, and
from then on found by key; a pin protects it while somebody reads. While a transfer writes a slot, those who
name the same transfer may pin it too, and read the layers that are written. Room is made by dropping whole blocks,
coldest first, never one that is pinned or being written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Final

from kvpool.core import messages
from kvpool.core.addresses import ByAddress
from kvpool.core.allocator import UNIT_BYTES, ExtentAllocator, round_up
from kvpool.core.invariants import check_segment
from kvpool.core.messages import BlockRun
from kvpool.core.order import BlockOrder
from kvpool.core.slot_table import UNLISTED, SlotTable
from kvpool.core.slots import (
    BEING_WRITTEN,
    COUNTERS,
    NO_ROOM,
    STORED,
    Block,
    Owner,
    Pin,
    Reservation,
    Slot,
    block_keys,
    check_items,
    check_shape,
    group_runs,
    header_bytes,
    no_room,
)
from kvpool.core.window import WindowSearch
from kvpool.errors import (
    InvalidArgumentError,
    OverloadedError,
    TooLargeError,
    UnknownIdError,
    UnknownNamespaceError,
)
from kvpool.model import (
    CHECKSUM_BYTES,
    KEY_BYTES,
    KEYS_PER_CALL_MAX,
    RESERVE_ITEMS_MAX,
    SHARDS_MAX,
    Namespace,
)

__all__ = ["BEING_WRITTEN", "NO_ROOM", "STORED", "Pin", "Reservation", "SegmentState", "Slot", "header_bytes"]

NAMESPACES_MAX: Final = 4096
"""As many as a master knows: each report of a node names all of its own."""

# Around how many of the coldest blocks an eviction looks for a cheap window.
_CANDIDATES_MAX: Final = 8

LOCAL_PREFIX_KEYS_MAX: Final = 8192
"""Keys that a question about a prefix is answered for: a shorter one is right too, and the loop has others to serve."""


class SegmentState:
    """Slots, pins, reservations and the eviction order of one node's segment.

    Items of a call are key-major: all shards of the first key, then of the second. ``owner`` is a
    connection's number. A call that raises has changed nothing. Slot and Block objects are recycled: a
    slot means what it says only while it is reserved or pinned, or until the next call.
    """

    def __init__(self, capacity_bytes: int) -> None:
        """Take a segment of ``capacity_bytes`` (rounded down to whole units)."""
        self._allocator = ExtentAllocator(capacity_bytes)
        self.capacity_bytes = self._allocator.capacity_bytes
        self.payload_bytes = 0  # committed
        self.pinned = 0  # slots
        self.reserved = 0  # slots
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.table: SlotTable | None = None  # where local clients find slots by themselves
        self._namespaces: dict[bytes, Namespace] = {}
        self._blocks = BlockOrder()
        self._slot_at = ByAddress[Slot](self.capacity_bytes)
        self._owners: dict[int, Owner] = {}
        self._quarantine: dict[int, list[Slot]] = {}
        self._victims: list[bytes] = []
        self._victims_next = 0
        self._victims_stamp = 0
        self._clock = 0
        self._last_id = 0
        self._generation = 0
        self._busy_bytes = 0  # of all blocks that may not be evicted
        self._keep: set[bytes] = set()  # what operators have pinned, here or not
        self._kept: dict[Block, None] = {}  # what of it is here, and within the bound
        self._kept_bytes = 0
        self._infeasible_bytes = self.capacity_bytes + 1  # known to find no room until a pin or write ends
        self._orphans: set[Slot] = set()  # given up by their writers, and pinned still
        self.arrived: Callable[[Sequence[Slot]], None] = lambda _: None
        """Told of slots that were committed, or have more layers; must not change the segment."""
        self._added: dict[Slot, None] = {}
        self._removed: list[tuple[bytes, int, int]] = []  # key, shard, shard_bytes
        self._commanded: list[tuple[bytes, int, int]] = []  # removed too, because the master said so

    def __repr__(self) -> str:
        return (
            f"<SegmentState {self.used_bytes}/{self.capacity_bytes} used, {len(self._blocks)} blocks, "
            f"{self.reserved} reserved, {self.pinned} pinned>"
        )

    def __len__(self) -> int:
        """Return the number of blocks, those being written included."""
        return len(self._blocks)

    @property
    def used_bytes(self) -> int:
        """Bytes of all slots, headers and rounding included."""
        return self._allocator.used_bytes

    @property
    def namespaces(self) -> tuple[Namespace, ...]:
        """Every registered namespace, oldest first."""
        return tuple(self._namespaces.values())

    def namespace(self, digest: bytes) -> Namespace | None:
        """Return the namespace with this digest, None if it was never registered."""
        return self._namespaces.get(digest)

    @property
    def has_changes(self) -> bool:
        """Whether ``take_changes`` would return anything."""
        return bool(self._added or self._removed or self._commanded)

    def register(self, namespace: Namespace) -> bytes:
        """Make a namespace known, so that its blocks can be stored; return its digest. Raises OverloadedError."""
        digest = namespace.digest
        if len(self._namespaces) >= NAMESPACES_MAX and digest not in self._namespaces:
            raise OverloadedError(f"this node knows {NAMESPACES_MAX} namespaces already")
        self._namespaces.setdefault(digest, namespace)
        return digest

    # ---- put -----------------------------------------------------------------------------------------

    def reserve(
        self, owner: int, namespace: bytes, shards: Sequence[int], keys: bytes, shard_bytes: int, layers: int,
        transfer: int = 0,
    ) -> Reservation:  # fmt: skip
        """Find room for every item that is not here yet, evicting what it takes.

        Who names the same ``transfer`` may read before the commit; 0: nobody may. An offset below 0 is STORED,
        BEING_WRITTEN or NO_ROOM. Raises TooLargeError or AllPinnedError if no item could be reserved or found,
        UnknownNamespaceError, InvalidArgumentError.
        """
        check_items(namespace, shards, keys, RESERVE_ITEMS_MAX)
        if (known := self._namespaces.get(namespace)) is None:
            raise UnknownNamespaceError(f"namespace {namespace.hex()} was never registered on this node")
        check_shape(known, shards, shard_bytes, layers)
        header = header_bytes(layers)
        size = header + round_up(shard_bytes, UNIT_BYTES)
        blocks = self._blocks
        get, allocate = blocks.get, self._allocator.allocate
        offsets: list[int] = []
        slots: list[Slot] = []
        generation = self._generation
        full = size > self.capacity_bytes
        holes = not full  # whether a hole may be large enough
        for at in range(0, len(keys), KEY_BYTES):
            key = namespace + keys[at : at + KEY_BYTES]
            block = get(key)
            for shard in shards:
                if block is not None and shard in block.shards:
                    offsets.append(self._found(block, shard))
                    continue
                start = allocate(size) if holes else None
                slot = None
                if start is None and not full:
                    holes = False
                    slot = self._recycle(key, shard, size) if block is None else None
                    if slot is None:
                        start = self._make_room(size, block)
                        full, holes = start is None, start is not None
                generation += 1
                if slot is not None:
                    block = slot.block
                    slot.offset = slot.start + header
                    slot.shard_bytes = shard_bytes
                    slot.layers = layers
                    slot.generation = generation
                elif start is not None:
                    if block is None:
                        block = Block(key)
                        blocks.add(block)
                    slot = Slot(block, shard, start, start + header, size, shard_bytes, layers, generation)
                    self._insert(slot)
                else:
                    offsets.append(NO_ROOM)
                    continue
                slots.append(slot)
                offsets.append(slot.offset)
        self._generation = generation
        if full:
            error = no_room(size, self.capacity_bytes)
            self.counters["too_large" if isinstance(error, TooLargeError) else "all_pinned"] += 1
            if all(offset == NO_ROOM for offset in offsets):
                raise error
        if not slots:
            return Reservation(0, owner, offsets, slots)
        self.reserved += len(slots)
        self._last_id = reservation_id = self._last_id + 1
        reservation = Reservation(reservation_id, owner, offsets, slots, transfer)
        for slot in slots if transfer else ():
            slot.transfer = transfer
        self._owner(owner).reservations[reservation_id] = reservation
        return reservation

    def reservation(self, owner: int, reservation_id: int) -> Reservation:
        """Return a reservation that this owner still holds. Raises UnknownIdError."""
        held = self._owners.get(owner)
        found = held.reservations.get(reservation_id) if held is not None else None
        if found is None:
            raise UnknownIdError(f"reservation {reservation_id} is not held by this connection")
        return found

    def progress(self, owner: int, reservation_id: int, layers: int, checksums: bytes) -> list[Slot]:
        """Note that layers below ``layers`` of every slot of a transfer's reservation are written; return the slots.

        ``checksums``: of each slot's layers that were not written before. Raises UnknownIdError or
        InvalidArgumentError, nothing changed.
        """
        held = self.reservation(owner, reservation_id)
        first = held.slots[0]
        done = len(first.partial) // CHECKSUM_BYTES
        if not held.transfer:
            raise InvalidArgumentError("reservation", f"{reservation_id} names no transfer: nobody may read its layers")
        if not done < layers <= first.layers:
            raise InvalidArgumentError("layers", f"must be from {done + 1} to {first.layers}, not {layers}")
        step = (layers - done) * CHECKSUM_BYTES
        if len(checksums) != step * len(held.slots):
            raise InvalidArgumentError(
                "checksums", f"must be {step * len(held.slots)} bytes (8 an item and new layer), not {len(checksums)}"
            )
        for at, slot in enumerate(held.slots):
            slot.partial += checksums[at * step : at * step + step]
        self.arrived(held.slots)
        return held.slots

    def commit(self, owner: int, reservation_id: int, checksums: bytes, keep: bytes | None = None) -> list[Slot]:
        """Make a reservation's slots visible and return them, in order, for their headers to be written.

        ``checksums``: ``layers`` of each slot of the reservation in order; ``keep``: one byte a slot,
        0 frees it instead. Raises UnknownIdError or InvalidArgumentError, nothing changed.
        """
        held = self.reservation(owner, reservation_id)
        slots = held.slots
        step = slots[0].layers * CHECKSUM_BYTES
        if len(checksums) != step * len(slots):
            raise InvalidArgumentError(
                "checksums", f"must be {step * len(slots)} bytes (8 an item and layer), not {len(checksums)}"
            )
        if keep and (len(keep) != len(slots) or keep.strip(b"\x00\x01")):
            raise InvalidArgumentError("keep", f"must be empty or {len(slots)} bytes of 0 or 1")
        if held.transfer:
            if not all(checksums.startswith(slot.partial, at * step) for at, slot in enumerate(slots)):
                raise InvalidArgumentError("checksums", "must be those that were given while layers were written")
            for slot in slots:
                slot.transfer, slot.partial = 0, b""
        del self._owners[owner].reservations[reservation_id]
        self.reserved -= len(slots)
        for at, slot in enumerate(slots):
            slot.checksums = checksums[at * step : at * step + step]
        if keep:
            for slot, wanted in zip(slots, keep, strict=True):
                if not wanted:
                    slot.checksums = None
                    self.reserved += 1
                    self._give_up(slot)
            slots = [slot for slot, wanted in zip(slots, keep, strict=True) if wanted]
        self._infeasible_bytes = self.capacity_bytes + 1
        touch = self._blocks.touch
        clock = self._clock
        for slot in reversed(slots):  # so that a chain's tail ages before its head
            block = slot.block
            block.committed |= 1 << slot.shard
            block.busy -= 1
            if not block.busy:
                self._busy_bytes -= block.bytes
            clock += 1
            block.stamp = clock
            touch(block)
            self.payload_bytes += slot.shard_bytes
        self._clock = clock
        if self._keep:
            for slot in slots:
                self._keep_block(slot.block)
        self._added.update(dict.fromkeys(slots))
        self.counters["committed_slots"] += len(slots)
        self.arrived(slots)
        return slots

    def abort(self, owner: int, reservation_id: int) -> None:
        """Free a reservation's slots. Raises UnknownIdError."""
        slots = self.reservation(owner, reservation_id).slots
        del self._owners[owner].reservations[reservation_id]
        self._free_reserved(slots)

    # ---- get -----------------------------------------------------------------------------------------

    def pin(self, owner: int, namespace: bytes, shards: Sequence[int], keys: bytes) -> Pin:
        """Protect the committed slots among the items until ``release``; pins nest."""
        check_items(namespace, shards, keys)
        get = self._blocks.get
        slots: list[Slot | None] = []
        found: list[Slot] = []
        for at in range(0, len(keys), KEY_BYTES):
            block = get(namespace + keys[at : at + KEY_BYTES])
            if block is None:
                slots.extend([None] * len(shards))
                continue
            for shard in shards:
                slot = block.shards.get(shard)
                if slot is None or slot.checksums is None:
                    slots.append(None)
                    continue
                slots.append(slot)
                found.append(slot)
        return self._pin(owner, slots, found)

    def pin_ready(
        self, owner: int, namespace: bytes, shards: Sequence[int], keys: bytes, transfer: int, first_layer: int
    ) -> Pin:
        """Protect the leading items that have layer ``first_layer``, as ``pin`` does; None for all others.

        Items that ``transfer`` is writing are among them, and stay in their place until they are released
        whatever becomes of their writer.
        """
        check_items(namespace, shards, keys)
        items = len(keys) // KEY_BYTES * len(shards)
        found: list[Slot] = []
        for at in range(0, len(keys), KEY_BYTES):
            block = self._blocks.get(namespace + keys[at : at + KEY_BYTES])
            for shard in shards:
                slot = block.shards.get(shard) if block is not None else None
                if slot is None or slot.ready(transfer) <= first_layer:
                    return self._pin(owner, [*found, *[None] * (items - len(found))], found)
                found.append(slot)
        return self._pin(owner, [*found], found)

    def layers_ready(self, block_key: bytes, shard: int, transfer: int) -> int:
        """Return how many leading layers of an item may be read by who names this transfer."""
        block = self._blocks.get(block_key)
        slot = block.shards.get(shard) if block is not None else None
        return slot.ready(transfer) if slot is not None else 0

    def _pin(self, owner: int, slots: list[Slot | None], found: list[Slot]) -> Pin:
        if not found:
            return Pin(0, slots)
        touch = self._blocks.touch
        clock = self._clock
        for slot in reversed(found):  # so that a chain's tail ages before its head
            if not slot.pins:
                self.pinned += 1
            slot.pins += 1
            block = slot.block
            if not block.busy:
                self._busy_bytes += block.bytes
            block.busy += 1
            clock += 1
            block.stamp = clock
            touch(block)
        self._clock = clock
        self._last_id = pin_id = self._last_id + 1
        self._owner(owner).pins[pin_id] = found
        return Pin(pin_id, slots)

    def touch(self, namespace: bytes, shards: Sequence[int], keys: bytes) -> list[Slot]:
        """Count a use of the committed slots among the items, as ``pin`` does; returns them."""
        check_items(namespace, shards, keys)
        get = self._blocks.get
        found: list[Slot] = []
        for at in range(0, len(keys), KEY_BYTES):
            block = get(namespace + keys[at : at + KEY_BYTES])
            if block is None:
                continue
            for shard in shards:
                slot = block.shards.get(shard)
                if slot is not None and slot.checksums is not None:
                    found.append(slot)
        for slot in reversed(found):  # so that a chain's tail ages before its head
            self._touch(slot.block)
        return found

    def slot(self, block_key: bytes, shard: int) -> Slot | None:
        """Return a committed slot (``block_key``: namespace digest and key), None if there is none."""
        block = self._blocks.get(block_key)
        slot = block.shards.get(shard) if block is not None else None
        return slot if slot is not None and slot.checksums is not None else None

    def hold(self, owner: int, block_key: bytes, shard: int) -> Pin | None:
        """Protect one committed slot until ``release``, as ``pin`` does, without counting as a use of it."""
        slot = self.slot(block_key, shard)
        if slot is None:
            return None
        if not slot.pins:
            self.pinned += 1
        slot.pins += 1
        block = slot.block
        if not block.busy:
            self._busy_bytes += block.bytes
        block.busy += 1
        self._last_id = pin_id = self._last_id + 1
        self._owner(owner).pins[pin_id] = [slot]
        return Pin(pin_id, [slot])

    def release(self, owner: int, pin_id: int) -> None:
        """End a pin; one that this owner does not hold is ignored."""
        held = self._owners.get(owner)
        if held is not None:
            self._unpin(held.pins.pop(pin_id, ()))

    def local_prefix(self, namespace: bytes, shards: int, keys: bytes) -> int:
        """Return how many leading keys, of the first LOCAL_PREFIX_KEYS_MAX, have all of ``shards`` (a count) here."""
        if not 1 <= shards <= SHARDS_MAX:
            raise InvalidArgumentError("shards", f"must be from 1 to {SHARDS_MAX}, not {shards}")
        check_items(namespace, (0,), keys, KEYS_PER_CALL_MAX)
        whole = (1 << shards) - 1
        end = min(len(keys), LOCAL_PREFIX_KEYS_MAX * KEY_BYTES)
        for at in range(0, end, KEY_BYTES):
            block = self._blocks.get(namespace + keys[at : at + KEY_BYTES])
            if block is None or block.committed & whole != whole:
                return at // KEY_BYTES
        return end // KEY_BYTES

    def states(self, namespace: bytes, keys: bytes) -> bytes:
        """Return a byte a key: whether some shard of it is being written, and whether some is committed."""
        found = bytearray()
        for at in range(0, len(keys), KEY_BYTES):
            block = self._blocks.get(namespace + keys[at : at + KEY_BYTES])
            state = 0
            if block is not None:
                state |= messages.COMMITTED if block.committed else 0
                state |= messages.BEING_WRITTEN if len(block.shards) > block.committed.bit_count() else 0
            found.append(state)
        return bytes(found)

    # ---- connections ---------------------------------------------------------------------------------

    def disconnect(self, owner: int, quarantine: bool = False) -> None:
        """End an owner: its pins die; its reservations are freed, or kept from everybody if quarantined.

        Quarantine is for a client whose process may still be copying into its slots.
        """
        held = self._owners.pop(owner, None)
        if held is None:
            return
        for pinned in held.pins.values():
            self._unpin(pinned)
        slots = [slot for reservation in held.reservations.values() for slot in reservation.slots]
        if quarantine and slots:
            for slot in slots:
                slot.transfer = 0  # nobody goes on with it: no more readers
            self.counters["quarantined"] += len(slots)
            self._quarantine.setdefault(owner, []).extend(slots)
        else:
            self._free_reserved(slots)

    def in_quarantine(self, owner: int) -> bool:
        """Return whether an owner that is gone still keeps slots from everybody."""
        return owner in self._quarantine

    def process_gone(self, owner: int) -> None:
        """Free what an owner still has, quarantined slots too: nobody can write to them any more."""
        self.disconnect(owner)
        self._free_reserved(self._quarantine.pop(owner, ()))

    # ---- the master's wishes -------------------------------------------------------------------------

    def set_victims(self, runs: Sequence[BlockRun]) -> None:
        """Replace the list of blocks to take first when room is needed, coldest first."""
        self._victims = [key for run in runs for key in block_keys(run)]
        self._victims_next = 0
        self._victims_stamp = self._clock

    def evict(self, runs: Sequence[BlockRun]) -> int:
        """Drop these blocks, except pinned ones and ones being written; return the bytes freed."""
        freed = 0
        for run in runs:
            for key in block_keys(run):
                block = self._blocks.get(key)
                if block is not None and not block.busy:
                    freed += block.bytes
                    self.counters["commanded_evictions"] += 1
                    self._drop(block, self._commanded)
        return freed

    def keep(self, runs: Sequence[BlockRun]) -> None:
        """Never evict these blocks, those that come later too; beyond half of the capacity they are like others."""
        for run in runs:
            for key in block_keys(run):
                self._keep.add(key)
                if (block := self._blocks.get(key)) is not None:
                    self._keep_block(block)

    def let_go(self, runs: Sequence[BlockRun]) -> None:
        """Keep these blocks no longer."""
        for run in runs:
            for key in block_keys(run):
                self._keep.discard(key)
                block = self._blocks.get(key)
                if block is not None and block.kept:
                    del self._kept[block]
                    self._keep_no_longer(block)

    def let_all_go(self) -> None:
        """Keep nothing any longer: a new session's master says anew what to keep."""
        # There may be a million keys, and few of their blocks here.
        kept, self._kept, self._keep = self._kept, {}, set()
        for block in kept:
            self._keep_no_longer(block)

    def _keep_no_longer(self, block: Block) -> None:
        block.kept = False
        self._blocks.back(block)
        self._touch(block)  # its turn would have come long ago
        self._kept_bytes -= block.bytes
        block.busy -= 1
        if not block.busy:
            self._busy_bytes -= block.bytes
        self._infeasible_bytes = self.capacity_bytes + 1

    def _keep_block(self, block: Block) -> None:
        wanted = block.committed and not block.kept and block.key in self._keep
        if wanted and self._kept_bytes + block.bytes <= self.capacity_bytes // 2:
            block.kept = True
            self._kept[block] = None
            self._kept_bytes += block.bytes
            if not block.busy:
                self._busy_bytes += block.bytes
            block.busy += 1
            self._blocks.aside(block)  # or every eviction that comes past it would have to step over it

    # ---- what changed --------------------------------------------------------------------------------

    @property
    def changes(self) -> int:
        """How many slots ``take_changes`` would tell of."""
        return len(self._added) + len(self._removed) + len(self._commanded)

    def take_changes(self) -> tuple[tuple[BlockRun, ...], tuple[BlockRun, ...]]:
        """Return (added, removed) since the last call; apply removed first.

        A slot that came and went in between is in neither; one that went and came again is in both.
        """
        added = group_runs((slot.block.key, slot.shard, slot.shard_bytes) for slot in self._added)
        removed = group_runs(self._removed)
        if self._commanded:
            removed += group_runs(self._commanded, commanded=True)
        self._added = {}
        self._removed, self._commanded = [], []
        return added, removed

    def snapshot(self) -> tuple[BlockRun, ...]:
        """Return everything committed, colder blocks first."""
        return tuple(run for runs in self.snapshot_slices() for run in runs)

    def snapshot_slices(self) -> Iterator[tuple[BlockRun, ...]]:
        """Yield what ``snapshot`` returns a slice at a time; the segment may change between two slices.

        What was there at the start and still is when its slice comes is in it; many slices are empty. Applying all
        changes since the start on top gives the segment as it is.
        """
        for blocks in self._blocks.walk():
            yield group_runs(
                (block.key, slot.shard, slot.shard_bytes)
                for block in blocks
                for slot in block.shards.values()
                if slot.checksums is not None
            )

    # ---- making room ---------------------------------------------------------------------------------

    def _insert(self, slot: Slot) -> None:
        """Make a new slot part of its block: reserved, hence busy."""
        block = slot.block
        block.shards[slot.shard] = self._slot_at[slot.start] = slot
        if not block.busy:
            self._busy_bytes += block.bytes
        block.busy += 1
        block.bytes += slot.extent_bytes
        self._busy_bytes += slot.extent_bytes
        if block.kept:
            self._kept_bytes += slot.extent_bytes

    def _recycle(self, key: bytes, shard: int, size: int) -> Slot | None:
        """Evict the coldest block and return its slot for another key, if it is one slot of the right size.

        This is what a full pool of one block size does all day: the objects stay, which halves its cost.
        """
        block = self._coldest(None)
        if block is None or len(block.shards) != 1:
            return None
        (slot,) = block.shards.values()
        if slot.extent_bytes != size:
            return None
        self._count_eviction(block)
        self._forget(slot, self._removed)
        self._blocks.rekey(block, key)
        if slot.shard != shard:
            block.shards = {shard: slot}
            slot.shard = shard
        slot.checksums = None
        slot.filed = False
        block.committed = 0
        block.busy = 1
        self._busy_bytes += size
        return slot

    def _make_room(self, size: int, keep: Block | None) -> int | None:
        """Evict until ``size`` bytes lie in one piece and take them; None if nothing may be evicted for it.

        The coldest block goes if that is enough; otherwise neighbours go with it, as few and cold as can be.
        """
        if size >= self._infeasible_bytes or self.capacity_bytes - self._busy_bytes < size:
            return None
        coldest = self._coldest(keep)
        if coldest is None:
            return None
        if any(self._allocator.span_if_freed(slot.start) >= size for slot in coldest.shards.values()):
            self._drop(coldest, self._removed)
            return self._allocator.allocate(size)
        cold = list(islice(self._coldest_first(keep), _CANDIDATES_MAX))
        oldest = (self._blocks.coldest or coldest).stamp
        search = WindowSearch(self._allocator, self._slot_at, size, keep, cold, oldest, self._clock)
        window = search.near_cold()
        if window is None:
            self.counters["window_scans"] += 1
            window = search.anywhere()
        if window is None:
            if keep is None:
                self._infeasible_bytes = size
            return None
        self.counters["window_evictions"] += 1
        self._clear(*window)
        return self._allocator.allocate(size)

    def _coldest(self, keep: Block | None) -> Block | None:
        """Return the block whose turn it is: the master's next victim, then our own coldest."""
        blocks, victims = self._blocks, self._victims
        while self._victims_next < len(victims):
            block = blocks.get(victims[self._victims_next])
            if block is not None and not block.busy and block.stamp <= self._victims_stamp and block is not keep:
                return block
            self._victims_next += 1
        coldest = blocks.coldest
        if coldest is not None and not coldest.busy and coldest is not keep:
            return coldest
        for block in islice(blocks, len(blocks)):
            if not block.busy and block is not keep:
                return block
            # What is in use has no business at the cold end, where every eviction would step over it again.
            self._touch(block)
        return None

    def _coldest_first(self, keep: Block | None) -> Iterator[Block]:
        """Yield the blocks whose turn comes next; the segment must not change meanwhile."""
        for key in islice(self._victims, self._victims_next, None):
            victim = self._blocks.get(key)
            if victim is not None and not victim.busy and victim.stamp <= self._victims_stamp and victim is not keep:
                yield victim
        for block in self._blocks:
            if not block.busy and block is not keep:
                yield block

    def _clear(self, low: int, high: int) -> None:
        """Drop every block with a slot in [low, high)."""
        blocks: dict[Block, None] = {}
        while low < high:
            slot = self._slot_at.get(low)
            if slot is None:
                low += self._allocator.hole_at(low)
            else:
                blocks[slot.block] = None
                low += slot.extent_bytes
        for block in blocks:
            self._drop(block, self._removed)

    def _drop(self, block: Block, removed: list[tuple[bytes, int, int]]) -> None:
        """Evict a block with all its shards, to be told in ``removed``."""
        self._count_eviction(block)
        self._blocks.remove(block)
        for slot in block.shards.values():
            self._forget(slot, removed)
            del self._slot_at[slot.start]
            self._allocator.free(slot.start)
        block.shards.clear()  # slots point back: without this only the garbage collector could free them

    def _count_eviction(self, block: Block) -> None:
        counters = self.counters
        victims, at = self._victims, self._victims_next
        if at < len(victims) and victims[at] == block.key:
            counters["victim_hits"] += 1
            self._victims_next = at + 1
        counters["evictions"] += 1
        counters["evicted_bytes"] += block.bytes

    def _forget(self, slot: Slot, removed: list[tuple[bytes, int, int]]) -> None:
        """Note that a committed slot is gone, or about to be another's."""
        if self.table is not None and slot.entry != UNLISTED:
            self.table.strike(slot)
        self.payload_bytes -= slot.shard_bytes
        if slot in self._added:
            del self._added[slot]
        else:
            removed.append((slot.block.key, slot.shard, slot.shard_bytes))

    # ---- helpers -------------------------------------------------------------------------------------

    def _found(self, block: Block, shard: int) -> int:
        """Return the status of an item that exists, and touch it: somebody wanted to store it again."""
        if block.shards[shard].checksums is None:
            return BEING_WRITTEN
        self._touch(block)
        return STORED

    def _touch(self, block: Block) -> None:
        self._clock += 1
        block.stamp = self._clock
        self._blocks.touch(block)

    def _owner(self, owner: int) -> Owner:
        held = self._owners.get(owner)
        if held is None:
            held = self._owners[owner] = Owner()
        return held

    def _unpin(self, slots: Iterable[Slot]) -> None:
        for slot in slots:
            slot.pins -= 1
            if not slot.pins:
                self.pinned -= 1
            block = slot.block
            block.busy -= 1
            if not block.busy:
                self._busy_bytes -= block.bytes
            if not slot.pins and slot in self._orphans:
                self._orphans.discard(slot)
                self._unreserve(slot)
        self._infeasible_bytes = self.capacity_bytes + 1

    def _free_reserved(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            self._give_up(slot)

    def _give_up(self, slot: Slot) -> None:
        """Give a slot that will never be committed back, as soon as nobody reads it any more."""
        slot.transfer, slot.partial = 0, b""
        if slot.pins:
            self._orphans.add(slot)
        else:
            self._unreserve(slot)

    def _unreserve(self, slot: Slot) -> None:
        """Give a slot that was never committed back."""
        self.reserved -= 1
        block = slot.block
        del block.shards[slot.shard]
        del self._slot_at[slot.start]
        self._allocator.free(slot.start)
        self._busy_bytes -= slot.extent_bytes
        block.bytes -= slot.extent_bytes
        if block.kept:
            self._kept_bytes -= slot.extent_bytes
        block.busy -= 1
        if not block.busy:
            self._busy_bytes -= block.bytes
        if not block.shards:
            self._blocks.remove(block)
        self._infeasible_bytes = self.capacity_bytes + 1

    def check(self) -> None:
        """Raise AssertionError unless every count, order and index agrees with the slots themselves."""
        check_segment(self)
