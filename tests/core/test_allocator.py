"""The extent allocator against a list of units that are free or not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.core.allocator import UNIT_BYTES, ExtentAllocator
from kvpool.errors import InvalidArgumentError

UNITS = 40


def holes_of(taken: list[int | None]) -> list[tuple[int, int]]:
    holes: list[tuple[int, int]] = []
    for unit, owner in enumerate(taken):
        if owner is None:
            if holes and sum(holes[-1]) == unit:
                holes[-1] = (holes[-1][0], holes[-1][1] + 1)
            else:
                holes.append((unit, 1))
    return holes


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 12 * UNIT_BYTES)), max_size=60))
def test_agrees_with_an_array_of_units(steps):
    """Whatever is allocated and freed, extents never overlap, the fit is the best one and None means no hole."""
    allocator = ExtentAllocator(UNITS * UNIT_BYTES)
    taken: list[int | None] = [None] * UNITS
    offsets: list[int] = []
    for allocate, size in steps:
        if allocate:
            units = -(-size // UNIT_BYTES)
            fits = [length for _, length in holes_of(taken) if length >= units]
            offset = allocator.allocate(size)
            assert (offset is None) == (not fits)
            if offset is None:
                continue
            first = offset // UNIT_BYTES
            assert next(n for at, n in holes_of(taken) if at == first) == min(fits)
            assert taken[first : first + units] == [None] * units
            taken[first : first + units] = [offset] * units
            assert allocator.size_of(offset) == units * UNIT_BYTES
            offsets.append(offset)
        elif offsets:
            offset = offsets.pop(size % len(offsets))
            before = allocator.span_if_freed(offset)
            allocator.free(offset)
            taken = [None if owner == offset else owner for owner in taken]
            first = offset // UNIT_BYTES
            assert before == next(n for at, n in holes_of(taken) if at <= first < at + n) * UNIT_BYTES
        allocator.check()
        assert allocator.free_bytes == taken.count(None) * UNIT_BYTES
        assert allocator.used_bytes + allocator.free_bytes == allocator.capacity_bytes
        assert allocator.largest_free == max((n for _, n in holes_of(taken)), default=0) * UNIT_BYTES


def test_one_size_fills_everything():
    """With one size nothing is lost but the remainder, also after frees in any order."""
    allocator = ExtentAllocator(1 << 20)
    size = 24 * UNIT_BYTES
    offsets = []
    while (offset := allocator.allocate(size)) is not None:
        offsets.append(offset)
    assert allocator.free_bytes < size
    for offset in offsets[::3] + offsets[1::3]:
        allocator.free(offset)
    again = 0
    while allocator.allocate(size) is not None:
        again += 1
    assert again == len(offsets[::3] + offsets[1::3])
    allocator.check()


def test_what_is_not_allocated_cannot_be_freed():
    """A wrong offset raises and changes nothing."""
    allocator = ExtentAllocator(UNITS * UNIT_BYTES)
    offset = allocator.allocate(1)
    assert offset == 0
    with pytest.raises(KeyError):
        allocator.free(UNIT_BYTES)
    with pytest.raises(KeyError):
        allocator.size_of(7)
    allocator.free(offset)
    with pytest.raises(KeyError):
        allocator.free(offset)
    allocator.check()


@pytest.mark.parametrize(("capacity", "unit", "field"), [(511, 512, "capacity_bytes"), (4096, 0, "unit")])
def test_a_segment_has_at_least_one_unit(capacity, unit, field):
    """An impossible range is refused by name."""
    with pytest.raises(InvalidArgumentError) as caught:
        ExtentAllocator(capacity, unit)
    assert caught.value.field == field


@pytest.mark.parametrize("size", [0, -512])
def test_nothing_is_not_allocated(size):
    """A size below 1 is a mistake of the caller."""
    with pytest.raises(InvalidArgumentError):
        ExtentAllocator(4096).allocate(size)
