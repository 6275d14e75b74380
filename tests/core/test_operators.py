"""Evictions by hand: how a master comes by what many keys mean without standing still."""

from __future__ import annotations

import pytest

from kvpool.core import operators
from kvpool.core.messages import Evict
from kvpool.errors import UnknownNamespaceError
from tests.core.master_pool import ONE, SIZE, Pool, key, keys, run


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Four keys at a time."""
    monkeypatch.setattr(operators, "ROWS_PER_SLICE", 4)


def finish(search):
    """Return how often a search pauses, and what it finds."""
    pauses = 0
    while True:
        try:
            next(search)
        except StopIteration as end:
            return pauses, end.value
        pauses += 1


def test_keys_are_looked_for_a_slice_at_a_time():
    """Each is dropped and counted once, wherever it is named again; what is not there counts for nothing."""
    pool = Pool()
    pool.join(1, "a", run(*range(20)))
    named = keys(*range(10), 100, 101, *range(10), 19, 102)
    pauses, (blocks, size, effects) = finish(pool.master.evictions.search_keys(ONE.digest, named))
    assert (pauses, blocks, size) == (6, 11, 11 * SIZE)
    pool.perform(effects)
    assert len(pool.evicted(1)) <= 4
    pool.perform(pool.master.finish_work())
    assert sorted(pool.evicted(1)) == sorted(key(number) for number in (*range(10), 19))


def test_a_search_for_keys_goes_with_the_pool():
    """What goes while others have their turn is not asked for; what is pinned then stays."""
    pool = Pool()
    pool.join(1, "a", run(*range(8)))
    search = pool.master.evictions.search_keys(ONE.digest, keys(*range(8)))
    next(search)
    next(search)
    _, slices = pool.master.pins.begin(ONE.digest, keys(0), 0, "keep", pool.clock())
    for effects in slices:
        pool.perform(effects)
    blocks, _, effects = finish(search)[1]
    pool.perform(effects)
    pool.perform(pool.master.finish_work())
    assert blocks == 8
    assert sorted(pool.evicted(1)) == sorted(key(number) for number in range(1, 8))
    with pytest.raises(UnknownNamespaceError):
        next(pool.master.evictions.search_keys(b"x" * 16, keys(1)))


def test_few_found_keys_make_few_messages():
    """A slice of what is dropped is full, however thinly the blocks lie among the keys."""
    pool = Pool()
    pool.join(1, "a", run(0, 10, 20, 30))
    pool.perform(pool.master.evictions.keys(ONE.digest, keys(*range(40)))[2])
    assert len(pool.told(1, Evict)) == 1
    assert not pool.master.busy
