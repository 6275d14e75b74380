"""PlacementTable beside plain dicts: who holds which shards of a block, and what lookups may count on."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.core import placement as placement_module
from kvpool.core.placement import NOWHERE, Owner, PlacementTable

BLOCKS = 6
FULL = 0b111
incarnations = st.integers(1, 5)
blocks = st.lists(st.integers(0, BLOCKS - 1), min_size=1, unique=True)
change = st.one_of(
    st.tuples(st.sampled_from(["add", "add", "remove"]), blocks, incarnations, st.integers(1, FULL)),
    st.tuples(st.just("live"), incarnations, st.booleans()),
    st.tuples(st.just("purge"), incarnations),
    st.tuples(st.just("free"), st.integers(1, 12)),
)


@pytest.fixture(autouse=True, scope="module")
def small_slices():
    """Freeing what no block carries takes many slices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement_module, "_STEPS_PER_SLICE", 2)
        patch.setattr(placement_module, "_FREED_PER_SLICE", 2)
        yield


class Twin:
    """A table with one placement number for each of a few blocks, and what it must say about them."""

    def __init__(self) -> None:
        self.table = PlacementTable()
        self.numbers = np.zeros(BLOCKS, np.int32)
        self.held: list[dict[int, int]] = [{} for _ in range(BLOCKS)]
        self.alive: set[int] = set()
        self.freeing: Iterator[None] | None = None

    def add(self, rows: list[int], incarnation: int, shards: int) -> None:
        self.numbers[rows] = self.table.added(self.numbers[rows], FULL, Owner(incarnation, "dram", shards))
        for row in rows:
            self.held[row][incarnation] = self.held[row].get(incarnation, 0) | shards

    def remove(self, rows: list[int], incarnation: int, shards: int) -> None:
        self.numbers[rows] = self.table.removed(self.numbers[rows], Owner(incarnation, "dram", shards))
        for row in rows:
            left = self.held[row].pop(incarnation, 0) & ~shards
            if left:
                self.held[row][incarnation] = left

    def live(self, incarnation: int, live: bool) -> None:
        self.table.set_live(incarnation, live=live)
        self.alive = self.alive | {incarnation} if live else self.alive - {incarnation}

    def purge(self, incarnation: int) -> None:
        self.remove(list(range(BLOCKS)), incarnation, FULL)
        self.table.purge(incarnation)
        self.alive.discard(incarnation)

    def free(self, slices: int = 10**6) -> None:
        """Do some slices of freeing what no block carries, from where the last ones ended."""
        if self.freeing is None:
            self.freeing = self._free()
        for _ in range(slices):
            if next(self.freeing, self) is self:
                self.freeing = None
                return

    def _free(self) -> Iterator[None]:
        yield from self.table.begin_marking()
        for row in range(BLOCKS):
            self.table.mark(self.numbers[row : row + 1])
            yield
        yield from self.table.free_unmarked()

    def check(self) -> None:
        for number, held in zip(self.numbers.tolist(), self.held, strict=True):
            assert (number == NOWHERE) == (not held)
            assert {o.incarnation: o.shards for o in self.table[number].owners} == held
            everywhere = live = 0
            for incarnation, shards in held.items():
                everywhere |= shards
                live |= shards if incarnation in self.alive else 0
            assert self.table.whole[number] == (live == FULL)
            assert self.table.complete[number] == (everywhere == FULL)
            assert self.table.copies[number] == sum(shards.bit_count() for shards in held.values())
            for incarnation in range(1, 6):
                assert self.table.held_by(incarnation)[number] == (incarnation in held)
                assert self.table.shards_of(number, incarnation) == held.get(incarnation, 0)
        for (before, _, owner, adding), after in self.table._steps.items():
            had, has = ({o.incarnation: o.shards for o in self.table[n].owners} for n in (before, after))
            mask = had.get(owner.incarnation, 0)
            mask = mask | owner.shards if adding else mask & ~owner.shards
            assert has == {i: m for i, m in {**had, owner.incarnation: mask}.items() if m}


@settings(max_examples=200)
@given(st.lists(change, max_size=40))
def test_it_says_what_plain_dicts_say(changes):
    """Adding, losing, judging alive and purging agree with the oracle after every step."""
    twin = Twin()
    for verb, *rest in changes:
        getattr(twin, verb)(*rest)
        twin.check()
    if twin.freeing is not None:
        twin.free()
        twin.check()
    twin.free()
    twin.check()
    assert set(twin.table._numbers.values()) == set(twin.numbers.tolist()) - {NOWHERE}


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, FULL)), min_size=1, max_size=80))
def test_many_placements_grow_the_columns(owners):
    """Hundreds of distinct placements keep their facts when the columns grow."""
    table = PlacementTable()
    for incarnation, _ in owners:
        table.set_live(incarnation, live=True)
    numbers = np.array([NOWHERE], np.int32)
    held: dict[int, int] = {}
    for incarnation, shards in owners:
        numbers = table.added(numbers, FULL, Owner(incarnation, "dram", shards))
        held[incarnation] = held.get(incarnation, 0) | shards
        assert {o.incarnation: o.shards for o in table[int(numbers[0])].owners} == held
        assert table.copies[numbers[0]] == sum(mask.bit_count() for mask in held.values())


def test_a_purged_number_is_used_again():
    """The number space does not grow with every node that comes and goes."""
    table = PlacementTable()
    for incarnation in range(1, 500):
        numbers = table.added(np.array([NOWHERE, NOWHERE], np.int32), FULL, Owner(incarnation, "dram", FULL))
        assert (table.removed(numbers, Owner(incarnation, "dram", FULL)) == NOWHERE).all()
        table.purge(incarnation)
    assert len(table) < 16


def test_numbers_that_no_block_carries_are_used_again():
    """Copies that come and go at varying nodes leave at most about as many placements as there are blocks."""
    table, choose = PlacementTable(), random.Random(1)
    blocks = 3 * placement_module.CROWDED_FROM // 4
    numbers = np.zeros(blocks, np.int32)
    for _ in range(20_000):
        row = choose.randrange(blocks)
        owner = Owner(choose.randrange(1, 33), "dram", 1)
        before = numbers[row : row + 1]
        there = table.held_by(owner.incarnation)[before[0]]
        numbers[row] = (table.removed(before, owner) if there else table.added(before, 1, owner))[0]
        if table.crowded:
            for _ in table.begin_marking():
                pass
            table.mark(numbers)
            for _ in table.free_unmarked():
                pass
    assert len(table) <= placement_module.CROWDED_FROM * 2
    assert len(table._steps) <= 4 * placement_module.CROWDED_FROM * 2


def test_what_blocks_get_while_marking_goes_on_is_kept():
    """Also by a step that had been taken before, and when the columns grow."""
    table, owner, other = PlacementTable(), Owner(1, "dram", 1), Owner(2, "dram", 1)
    numbers = table.added(np.zeros(2, np.int32), 1, owner)
    table.removed(table.added(numbers, 1, other), other)
    marking = table.begin_marking()
    table.mark(numbers)
    numbers[1:] = table.added(numbers[1:], 1, other)
    many = [int(table.added(np.zeros(1, np.int32), 1, Owner(n, "dram", 1))[0]) for n in range(3, 40)]
    for _ in (*marking, *table.free_unmarked()):
        pass
    assert [table[number].owners for number in numbers.tolist()] == [(owner,), (owner, other)]
    assert [table[number].owners for number in many] == [(Owner(n, "dram", 1),) for n in range(3, 40)]
