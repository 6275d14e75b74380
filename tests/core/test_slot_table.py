"""The table of a segment's slots: what a reader may believe, whatever happens to the slots meanwhile."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from kvpool.core.segment import SegmentState
from kvpool.core.slot_table import NO_PLACE, UNLISTED, SlotFinder, SlotTable, ordered, table_bytes
from kvpool.core.slots import header_bytes
from kvpool.model import Namespace

OWNER = 1
SPACE = Namespace(model="table", layers=2)
OTHER = Namespace(model="table", layers=2, revision="other", layer_groups=2)
SHARD_BYTES = 1024


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")  # as unevenly spread as keys can be


class World:
    """A segment with a table, in memory that a reader shares."""

    def __init__(self, slots: int) -> None:
        self.slot_bytes = header_bytes(2) + SHARD_BYTES
        capacity = slots * self.slot_bytes
        size = -(-capacity // 4096) * 4096 + table_bytes(capacity)
        self.memory = memoryview(bytearray(size))
        self.state = SegmentState(capacity)
        self.state.table = SlotTable(self.memory, self.state.capacity_bytes)
        self.state.register(SPACE)
        self.state.register(OTHER)
        self.finder = SlotFinder(self.memory)

    def put(self, *numbers: int, space: Namespace = SPACE, shard: int = 0, listed: bool = True) -> None:
        """Store blocks whose bytes and checksums say who they are."""
        keys = b"".join(map(key, numbers))
        layers = space.shard_layers
        reservation = self.state.reserve(OWNER, space.digest, [shard], keys, SHARD_BYTES, layers)
        if not reservation.slots:
            return
        checksums = np.array([[slot.generation * 10 + i for i in range(layers)] for slot in reservation.slots], "<u8")
        slots = self.state.commit(OWNER, reservation.id, checksums.tobytes())
        for slot, row in zip(slots, checksums, strict=True):
            end = slot.offset - 96
            self.memory[end - 8 * layers : end] = row.tobytes()
            self.memory[slot.offset : slot.offset + 8] = slot.generation.to_bytes(8, "little")
        if listed:
            assert self.state.table is not None
            self.state.table.add(slots)

    def find(self, *numbers: int, space: Namespace = SPACE, shard: int = 0, shard_bytes: int = SHARD_BYTES) -> Any:
        keys = b"".join(map(key, numbers))
        return self.finder.find(space.digest, keys, shard, space.shard_layers, shard_bytes)


def test_what_is_listed_is_found_with_its_checksums():
    """Offsets and a row of checksums for each key that is there, in the order asked for."""
    world = World(64)
    world.put(*range(20))
    world.state.check()
    seen = world.find(3, 99, 7, 3)
    assert seen.here == [0, 2, 3]
    slots = [world.state.slot(SPACE.digest + key(n), 0) for n in (3, 7, 3)]
    assert seen.offsets.tolist() == [slot.offset for slot in slots if slot]
    assert seen.checksums.tolist() == [[s.generation * 10, s.generation * 10 + 1] for s in slots if s]
    assert world.finder.unchanged(seen).all()


def test_only_the_very_slot_is_found():
    """Another namespace, shard, size or number of layers is another slot; what is not listed is not found."""
    world = World(64)
    world.put(1, space=OTHER, shard=1)
    world.put(2, listed=False)
    assert world.find(1, space=OTHER, shard=1).here == [0]
    assert world.find(1, space=OTHER, shard=0).here == []
    assert world.find(1).here == []
    assert world.find(2).here == []
    assert world.find(1, space=OTHER, shard=1, shard_bytes=SHARD_BYTES // 2).here == []
    assert world.finder.find(OTHER.digest, key(1), 1, 2, SHARD_BYTES).here == []


def test_a_slot_that_is_given_away_has_changed():
    """Eviction clears the generation at once, and the new owner's is another one."""
    world = World(8)
    world.put(*range(8))
    seen = world.find(*range(8))
    assert len(seen.here) == 8
    reservation = world.state.reserve(OWNER, SPACE.digest, [0], key(100), SHARD_BYTES, 2)
    taken = reservation.slots[0].offset
    changed = [n for n, same in zip(seen.here, world.finder.unchanged(seen).tolist(), strict=True) if not same]
    assert [seen.offsets.tolist()[n] for n in changed] == [taken]
    assert world.find(100).here == []
    assert len(world.find(*range(8)).here) == 7
    world.state.abort(OWNER, reservation.id)
    world.put(100)
    assert [seen.here[at] for at in np.flatnonzero(~world.finder.unchanged(seen))] == changed
    world.state.check()


def test_blocks_that_make_room_together_are_all_struck_out():
    """A large slot over several small ones: none of the small ones is believed any more."""
    world = World(16)
    world.put(*range(16))
    seen = world.find(*range(16))
    size = 4 * world.slot_bytes - header_bytes(2)
    slot = world.state.reserve(OWNER, SPACE.digest, [0], key(100), size, 2).slots[0]
    same = world.finder.unchanged(seen).tolist()
    for number, offset in enumerate(seen.offsets.tolist()):
        overlaps = slot.start <= offset < slot.start + slot.extent_bytes
        assert not (overlaps and same[number])
    assert 0 < same.count(False) < 16


def test_an_entry_in_the_middle_of_its_making_is_not_believed():
    """A word that is not there yet is not taken for the key's; and nothing outside of the slots is ever read."""
    world = World(8)
    number = 1 << 64 | 1
    world.put(number)
    (entry,) = world.state.table.listed()  # type: ignore[union-attr]
    rows = world.state.table._rows  # type: ignore[union-attr]
    right = rows[entry].copy()
    for word in range(8):
        rows[entry, word] = 0
        assert world.find(number).here == []
        rows[entry] = right
    assert world.find(number).here == [0]
    for offset in (1 << 63, len(world.memory), 8):
        rows[entry, 7] = offset
        assert world.find(number).here == []


def test_a_full_table_lists_no_more():
    """Slots without a place are not found, and everything else is right; a place that gets free is used."""
    world = World(2000)
    world.put(*range(2000))
    table = world.state.table
    assert table is not None
    slots = [world.state.slot(SPACE.digest + key(n), 0) for n in range(2000)]
    nowhere = {n for n, slot in enumerate(slots) if slot is not None and slot.entry == NO_PLACE}
    assert 0 < len(nowhere) < 2000
    assert set(world.find(*range(2000)).here) == set(range(2000)) - nowhere
    world.state.check()
    world.put(*range(3000, 4000))
    world.state.check()


def test_a_slot_that_is_named_twice_is_listed_once():
    """A pin may name a key twice."""
    world = World(8)
    world.put(1, listed=False)
    slot = world.state.slot(SPACE.digest + key(1), 0)
    assert slot is not None
    assert slot.entry == UNLISTED
    world.state.table.add([slot, None, slot])  # type: ignore[union-attr]
    assert len(world.state.table.listed()) == 1  # type: ignore[union-attr]
    world.state.check()


def test_memory_without_a_table_is_refused():
    """A node that keeps none is read by pins."""
    for memory in (bytearray(1 << 16), bytearray(100), bytearray(0)):
        with pytest.raises(LookupError):
            SlotFinder(memoryview(memory))


def test_only_processors_that_keep_the_order_may_look():
    """Elsewhere loads may be seen in another order than the program's."""
    assert ordered("x86_64")
    assert not ordered("aarch64")


@pytest.mark.parametrize("seed", range(10))
def test_readers_in_the_middle_of_anything_believe_only_what_is_right(seed: int) -> None:
    """Whatever happens between looking and looking again: unchanged means that the bytes are the key's own."""
    choice = random.Random(seed)
    world = World(24)
    owner_of = {}
    believed = 0
    for _ in range(600):
        numbers = [choice.randrange(60) for _ in range(choice.randint(1, 8))]
        seen = world.find(*numbers)
        for number, offset in zip(seen.here, seen.offsets.tolist(), strict=True):
            slot = world.state.slot(SPACE.digest + key(numbers[number]), 0)
            assert slot is not None
            assert slot.offset == offset
            owner_of[offset] = slot.generation
        if choice.random() < 0.7:
            world.put(*{choice.randrange(60) for _ in range(choice.randint(1, 6))}, listed=choice.random() < 0.8)
        bytes_read = [world.memory[offset : offset + 8] for offset in seen.offsets.tolist()]
        generations = [int.from_bytes(some, "little") for some in bytes_read]
        for row, same in enumerate(world.finder.unchanged(seen).tolist()):
            if same:
                believed += 1
                assert generations[row] == owner_of[seen.offsets.tolist()[row]] == seen.checksums[row, 0] // 10
        world.state.check()
    assert believed
