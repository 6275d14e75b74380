"""PlacementTable beside plain dicts: who holds which shards of a block, and what lookups may count on."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.core.placement import NOWHERE, Owner, PlacementTable

BLOCKS = 6
FULL = 0b111
incarnations = st.integers(1, 5)
blocks = st.lists(st.integers(0, BLOCKS - 1), min_size=1, unique=True)
change = st.one_of(
    st.tuples(st.sampled_from(["add", "add", "remove"]), blocks, incarnations, st.integers(1, FULL)),
    st.tuples(st.just("live"), incarnations, st.booleans()),
    st.tuples(st.just("purge"), incarnations),
)


class Twin:
    """A table with one placement number for each of a few blocks, and what it must say about them."""

    def __init__(self) -> None:
        self.table = PlacementTable()
        self.numbers = np.zeros(BLOCKS, np.int32)
        self.held: list[dict[int, int]] = [{} for _ in range(BLOCKS)]
        self.live: set[int] = set()

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

    def set_live(self, incarnation: int, live: bool) -> None:
        self.table.set_live(incarnation, live=live)
        self.live = self.live | {incarnation} if live else self.live - {incarnation}

    def purge(self, incarnation: int) -> None:
        self.remove(list(range(BLOCKS)), incarnation, FULL)
        self.table.purge(incarnation)
        self.live.discard(incarnation)

    def check(self) -> None:
        for number, held in zip(self.numbers.tolist(), self.held, strict=True):
            assert (number == NOWHERE) == (not held)
            assert {o.incarnation: o.shards for o in self.table[number].owners} == held
            everywhere = live = 0
            for incarnation, shards in held.items():
                everywhere |= shards
                live |= shards if incarnation in self.live else 0
            assert self.table.whole[number] == (live == FULL)
            assert self.table.complete[number] == (everywhere == FULL)
            assert self.table.copies[number] == sum(shards.bit_count() for shards in held.values())
            for incarnation in range(1, 6):
                assert self.table.held_by(incarnation)[number] == (incarnation in held)
                assert self.table.shards_of(number, incarnation) == held.get(incarnation, 0)


@settings(max_examples=200)
@given(st.lists(change, max_size=40))
def test_it_says_what_plain_dicts_say(changes):
    """Adding, losing, judging alive and purging agree with the oracle after every step."""
    twin = Twin()
    for verb, *rest in changes:
        {"add": twin.add, "remove": twin.remove, "live": twin.set_live, "purge": twin.purge}[verb](*rest)
        twin.check()


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
