"""Index beside a naive model: blocks, accounts, order and rows, with leases and dying nodes in between."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.core import index as index_module
from kvpool.core import placement as placement_module
from kvpool.core import recency
from kvpool.core.holds import HARD, SOFT
from kvpool.core.index import Index
from kvpool.core.keytable import as_words
from kvpool.core.leases import Leases
from kvpool.core.messages import BlockRun
from kvpool.core.placement import NOWHERE
from kvpool.core.slots import file_bytes
from kvpool.model import Namespace
from kvpool.testing.checks import check_index

SPACES = [Namespace(model="a"), Namespace(model="b", layers=2, layer_groups=2)]
KEYS = [blake2b(bytes([i]), digest_size=16).digest() for i in range(12)]
INCARNATIONS = (1, 2, 3)
STORE = 4  # the incarnation of a storage backend


@pytest.fixture(autouse=True, scope="module")
def small_slices():
    """A slice of two rows, so that sweeps and orders have many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "ROWS_PER_SLICE", 2)
        patch.setattr(index_module, "ROWS_MARKED_PER_SLICE", 2)
        patch.setattr(placement_module, "_STEPS_PER_SLICE", 4)
        patch.setattr(placement_module, "_FREED_PER_SLICE", 2)
        patch.setattr(recency, "SEGMENT", 8)
        patch.setattr(recency, "SLICE", 3)
        yield


def _tier(incarnation: int) -> str:
    return "fs" if incarnation == STORE else "dram"


class Twin:
    """An index with two namespaces, and dicts that it must equal."""

    def __init__(self, rows_max: int = 64) -> None:
        self.index = Index(rows_max)
        self.spaces = [self.index.describe(space) for space in SPACES]
        self.held: dict[tuple[int, bytes], dict[int, int]] = {}
        self.order: list[tuple[int, bytes]] = []
        self.leased: list[tuple[np.ndarray, list[tuple[int, bytes]]]] = []
        self.index.file_bytes[STORE] = 0
        self.sizes: dict[tuple[int, bytes], int] = {}
        self.pins: dict[tuple[int, bytes], int] = {}
        self.freeing: Iterator[None] | None = None

    def full(self, space: int) -> int:
        return self.spaces[space].full

    def run(self, space: int, keys: list[int], shards: int, size: int = 100) -> BlockRun:
        return BlockRun(self.spaces[space].digest, shards, size, b"".join(KEYS[k] for k in keys))

    def names(self, space: int, keys: list[int]) -> list[tuple[int, bytes]]:
        return [(space, KEYS[k]) for k in keys]

    def touch(self, names: list[tuple[int, bytes]]) -> None:
        for name in names:
            if name in self.order:
                self.order.remove(name)
            self.order.append(name)

    def add(
        self, space: int, keys: list[int], incarnation: int, mask: int, size: int, *, touch: bool = True
    ) -> None:
        mask = mask & self.full(space) or 1
        new = [name for name in dict.fromkeys(self.names(space, keys)) if name not in self.held]
        self.index.add(self.run(space, keys, mask, size), incarnation, _tier(incarnation), touch=touch)
        for name in self.names(space, keys):
            at = self.held.setdefault(name, {})
            at[incarnation] = at.get(incarnation, 0) | mask
            self.sizes[name] = size
        self.touch((self.names(space, keys) if touch else new)[::-1])

    def load(self, space: int, keys: list[int], mask: int, size: int) -> None:
        """Take in files that were found, which is no use of them."""
        self.add(space, keys, STORE, mask, size, touch=False)

    def pin(self, space: int, keys: list[int], level: int) -> None:
        for digest, name in ((self.spaces[space].digest, name) for name in self.names(space, keys)):
            if before := self.pins.pop(name, 0):
                self.index.let_go(digest, name[1], before)
            if level:
                self.index.hold(digest, name[1], level)
                self.pins[name] = level

    def lose(self, name: tuple[int, bytes], incarnation: int, mask: int) -> bool:
        """Take shards away; returns whether the block was whole before and is neither whole nor gone now."""
        at = self.held.get(name, {})
        before = self.complete(name)
        left = at.pop(incarnation, 0) & ~mask
        if left:
            at[incarnation] = left
        if not at:
            self.held.pop(name, None)
            self.order = [other for other in self.order if other != name]
        return before and not self.complete(name) and name in self.held

    def complete(self, name: tuple[int, bytes]) -> bool:
        return self.masks(name) == self.full(name[0])

    def masks(self, name: tuple[int, bytes]) -> int:
        mask = 0
        for shards in self.held.get(name, {}).values():
            mask |= shards
        return mask

    def remove(self, space: int, keys: list[int], incarnation: int, mask: int) -> None:
        mask = mask & self.full(space) or 1
        had = {name for name in self.names(space, keys) if incarnation in self.held.get(name, {})}
        rows, broken = self.index.remove(self.run(space, keys, mask), incarnation, _tier(incarnation))
        assert {(space, self.index.keys[row].tobytes()) for row in rows.tolist()} == had
        expected = {name for name in self.names(space, keys) if self.lose(name, incarnation, mask)}
        assert {self.name_of(row) for row in broken.tolist()} == expected

    def sweep(self, dead: frozenset[int]) -> None:
        before = {name for name in self.held if self.complete(name)}
        broken: set[tuple[int, bytes]] = set()
        had = {(i, *name) for name, held in self.held.items() for i in held if i in dead}
        lost: list[tuple[int, int, bytes]] = []
        position = 0
        while position < self.index.rows_used:
            position, rows, parts = self.index.drop_slice(dead, position)
            lost += [(i, space, self.index.keys[row].tobytes()) for i, space, part in parts for row in part.tolist()]
            broken |= {self.name_of(row) for row in rows.tolist() if self.index.space_of[row] >= 0}
        for incarnation in dead:
            for name in list(self.held):
                self.lose(name, incarnation, self.full(name[0]))
            self.index.placements.purge(incarnation)
        assert sorted(lost) == sorted(had)
        assert broken == {name for name in before if name in self.held and not self.complete(name)}

    def free(self, slices: int) -> None:
        """Do some slices of freeing placements, from where the last ones ended."""
        if self.freeing is None:
            self.freeing = self.index.free_placements()
        for _ in range(slices):
            if next(self.freeing, self) is self:
                self.freeing = None
                return

    def lease(self, space: int, keys: list[int]) -> None:
        rows = self.rows(space, keys)
        self.index.lease(rows)
        self.leased.append((rows, [self.name_of(row) for row in rows.tolist()]))

    def unlease(self, which: int) -> None:
        if self.leased:
            rows, _ = self.leased.pop(which % len(self.leased))
            self.index.unlease(rows)

    def use(self, space: int, keys: list[int]) -> None:
        rows = self.rows(space, keys)
        self.index.recency.touch(rows)
        self.touch([self.name_of(row) for row in rows.tolist()])

    def rows(self, space: int, keys: list[int]) -> np.ndarray:
        found = self.spaces[space].table.find(as_words(b"".join(KEYS[k] for k in keys)))
        return np.unique(found[found >= 0])

    def name_of(self, row: int) -> tuple[int, bytes]:
        return int(self.index.space_of[row]), self.index.keys[row].tobytes()

    def check(self) -> None:
        check_index(self.index)
        assert len(self.index) == len(self.held)
        for name, at in self.held.items():
            row = int(self.spaces[name[0]].table.find(as_words(name[1]))[0])
            owners = self.index.placements[int(self.index.placement[row])].owners
            assert {owner.incarnation: owner.shards for owner in owners} == at
        for rows, names in self.leased:
            for row, name in zip(rows.tolist(), names, strict=True):
                # A leased row is that block's for as long as the lease lasts, or nobody's.
                assert self.index.space_of[row] < 0 or self.name_of(row) == name
        for incarnation in (*INCARNATIONS, STORE):
            held = [name for name in self.order if incarnation in self.held[name] and self.pins.get(name) != HARD]
            spared = [name for name in held if self.is_leased(name) or self.pins.get(name)]
            assert self.coldest(incarnation, leased=False) == [name for name in held if name not in spared]
            assert self.coldest(incarnation, leased=True) == spared
        stored = {name: at.get(STORE, 0).bit_count() for name, at in self.held.items()}
        assert self.index.file_bytes[STORE] == sum(
            shards * file_bytes(self.sizes[name], SPACES[name[0]].shard_layers) for name, shards in stored.items()
        )

    def is_leased(self, name: tuple[int, bytes]) -> bool:
        row = int(self.spaces[name[0]].table.find(as_words(name[1]))[0])
        return any(row in rows.tolist() for rows, _ in self.leased)

    def coldest(self, incarnation: int, *, leased: bool) -> list[tuple[int, bytes]]:
        return [self.name_of(r) for rows in self.index.coldest(incarnation, leased=leased) for r in rows.tolist()]


spaces = st.integers(0, 1)
some_keys = st.lists(st.integers(0, len(KEYS) - 1), min_size=1, max_size=6)
some_incarnation = st.sampled_from(INCARNATIONS)
any_incarnation = st.sampled_from((*INCARNATIONS, STORE))
masks = st.integers(1, 3)
change = st.one_of(
    st.tuples(st.just("add"), spaces, some_keys, any_incarnation, masks, st.sampled_from([100, 100, 250])),
    st.tuples(st.just("add"), spaces, some_keys, any_incarnation, st.just(3), st.just(100)),
    st.tuples(st.just("remove"), spaces, some_keys, any_incarnation, masks),
    st.tuples(st.just("load"), spaces, some_keys, masks, st.sampled_from([100, 5000])),
    st.tuples(st.just("pin"), spaces, some_keys, st.sampled_from([0, SOFT, HARD])),
    st.tuples(st.just("sweep"), st.frozensets(some_incarnation, min_size=1)),
    st.tuples(st.just("lease"), spaces, some_keys),
    st.tuples(st.just("unlease"), st.integers(0, 9)),
    st.tuples(st.just("use"), spaces, some_keys),
    st.tuples(st.just("free"), st.integers(1, 9)),
)


@settings(max_examples=200)
@given(st.lists(change, max_size=40))
def test_it_says_what_the_naive_model_says(changes):
    """Placement, accounts, order, broken blocks and free rows agree after every change."""
    twin = Twin()
    for verb, *rest in changes:
        getattr(twin, verb)(*rest)
        twin.check()
    while twin.leased:
        twin.unlease(0)
    twin.check()
    if twin.freeing is not None:
        twin.free(1000)
        twin.check()
    twin.free(1000)
    twin.check()
    numbers = twin.index.placements._numbers.values()
    assert set(numbers) == set(np.unique(twin.index.placement[: twin.index.rows_used]).tolist()) - {NOWHERE}


@given(st.lists(st.tuples(some_keys, some_incarnation), max_size=12), st.integers(1, 8))
def test_a_full_index_refuses_and_counts(puts, rows_max):
    """Blocks that find no row are counted and disturb nothing; rows that come free serve others."""
    twin = Twin(rows_max)
    for keys, incarnation in puts:
        twin.index.add(twin.run(0, keys, 1), incarnation, "dram")
        check_index(twin.index)
        assert len(twin.index) <= rows_max
    missing = {key for keys, _ in puts for key in keys} - {
        KEYS.index(twin.index.keys[row].tobytes()) for row in twin.rows(0, list(range(len(KEYS)))).tolist()
    }
    assert bool(twin.index.refused) >= bool(missing)
    for incarnation in INCARNATIONS:
        twin.index.remove(twin.run(0, list(range(len(KEYS))), 1), incarnation, "dram")
    check_index(twin.index)
    assert len(twin.index) == 0
    assert all(space.stored_bytes == 0 for space in twin.spaces)


def test_a_leased_row_is_not_given_to_another_block():
    """A block that goes away under a lease keeps its row until the lease ends."""
    twin = Twin(2)
    leases = Leases(twin.index, 10, 1, 100)
    twin.add(0, [0], 1, 1, 100)
    rows = twin.rows(0, [0])
    leases.take(leases.next_token(1), rows, 0)
    twin.remove(0, [0], 1, 1)
    twin.add(0, [1], 1, 1, 100)
    twin.index.add(twin.run(0, [2], 1), 1, "dram")
    assert twin.index.refused == 1
    assert twin.index.leased[twin.rows(0, [1])] == 0
    leases.expire(11, 10)
    twin.add(0, [2], 1, 1, 100)
    twin.check()


def test_a_different_size_moves_the_account():
    """The newest report of a block's size counts for all its copies, and all of it goes when they do."""
    twin = Twin()
    twin.add(0, [0], 1, 1, 100)
    twin.add(0, [0], 2, 1, 300)
    assert twin.spaces[0].stored_bytes == 600
    twin.remove(0, [0], 1, 1)
    twin.remove(0, [0], 2, 1)
    assert twin.spaces[0].stored_bytes == 0
