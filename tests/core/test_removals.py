"""The ring of removals beside a list that keeps everything; ages beside all the times there were."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.core import ages as ages_module
from kvpool.core import removals as removals_module
from kvpool.core.ages import Ages
from kvpool.core.keytable import as_words
from kvpool.core.removals import FOUND_MAX, Removal, Removals, Why

KEYS = [blake2b(bytes([i]), digest_size=16).digest() for i in range(10)]
# Two keys that begin alike, and two that are alike but for their beginning.
KEYS += [KEYS[0][:8] + bytes(8), bytes(8) + KEYS[0][8:]]
SIZE = 16


@pytest.fixture(autouse=True, scope="module")
def small_slices():
    """Slices of three entries, so that a search has many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(removals_module, "SEARCH_SLICE", 3)
        patch.setattr(removals_module, "MATCHES_SLICE", 2)
        yield


def packed(numbers):
    return as_words(b"".join(KEYS[n] for n in numbers))


def finish(steps):
    """Run a search to its end at once."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def newest(entries, number, at_most=FOUND_MAX):
    return [removal for key, removal in reversed(entries) if key == KEYS[number]][:at_most]


pushes = st.tuples(
    st.integers(0, 2 * SIZE).flatmap(lambda n: st.lists(st.integers(0, len(KEYS) - 1), min_size=n, max_size=n)),
    st.integers(0, 3),
    st.sampled_from(list(Why)),
    st.sampled_from(["a", "b", "c"]),
    st.booleans(),
)


class Twin:
    """A ring, and a list of all that was pushed."""

    def __init__(self):
        self.ring = Removals(100.0, SIZE)
        self.all = []
        self.now = 100.0

    def push(self, numbers, space, why, node, each):
        self.now += 0.5
        whys = np.full(len(numbers), int(why), np.uint8) if each else int(why)
        self.ring.push(packed(numbers), space, whys, node, self.now)
        self.all += [(KEYS[n], Removal(space, why, node, self.now)) for n in numbers]

    def kept(self):
        return self.all[-SIZE:]


@given(
    st.lists(pushes, max_size=12),
    st.lists(st.integers(0, len(KEYS) - 1), min_size=1, max_size=8),
    st.none() | st.integers(0, 3),
)
@settings(max_examples=200, deadline=None)
def test_a_search_finds_the_newest_removals_that_are_kept(batches, asked, space):
    """Of every key asked for, however often, in whatever order; never of another key that looks like it."""
    twin = Twin()
    for batch in batches:
        twin.push(*batch)
    kept = [entry for entry in twin.kept() if space in {None, entry[1].space}]
    assert finish(twin.ring.search(packed(asked), space)) == [newest(kept, n) for n in asked]
    assert len(twin.ring) == len(twin.kept())
    assert twin.ring.overflowed == (len(twin.all) > SIZE)
    if twin.ring.overflowed:
        assert twin.kept()[0][1].at <= twin.ring.since <= twin.now + 0.2
    else:
        assert twin.ring.since == 100.0


@given(st.lists(pushes, min_size=1, max_size=12), st.lists(pushes, max_size=12), st.data())
@settings(max_examples=200, deadline=None)
def test_a_search_beside_pushes_tells_only_what_was(before, meanwhile, data):
    """What is found had been there at the start; what is missed was overwritten before the end."""
    twin = Twin()
    for batch in before:
        twin.push(*batch)
    start = list(twin.kept())
    asked = list(range(len(KEYS)))
    steps, waiting = twin.ring.search(packed(asked)), list(meanwhile)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found = end.value
            break
        if waiting and data.draw(st.booleans()):
            twin.push(*waiting.pop())
    for n in asked:
        expected = newest(start, n)
        assert found[n] == expected[: len(found[n])], "newest first, without a gap"
        lasting = newest([e for e in start if any(e is kept for kept in twin.kept())], n)
        assert len(found[n]) >= len(lasting), "what lasted is found"


def test_nodes_beyond_the_bound_lose_their_name(monkeypatch):
    """A removal is kept even where there is no room for one more node's name."""
    monkeypatch.setattr(removals_module, "NODES_MAX", 2)
    ring = Removals(0.0, SIZE)
    ring.push(packed([1]), 0, int(Why.ROOM), "first", 1.0)
    ring.push(packed([2]), 0, int(Why.ROOM), "second", 1.0)
    names = [found[0].node_id for found in finish(ring.search(packed([1, 2])))]
    assert names == ["first", "(forgotten)"]


def test_an_empty_ring_and_an_empty_question():
    """Nothing is found, nothing is raised."""
    ring = Removals(5.0, SIZE)
    ring.push(packed([]), 0, 0, "a", 6.0)
    assert finish(ring.search(packed([0]))) == [[]] and finish(ring.search(packed([]))) == []
    assert (len(ring), ring.since) == (0, 5.0)


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0.1, 5.0)), max_size=60), st.integers(0, 100))
@settings(max_examples=100, deadline=None)
def test_ages_never_call_a_use_older_than_it_is(steps, stamp):
    """The time told is one at which the stamp was given out already, and the closest one that was noted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ages_module, "MARKS_MAX", 8)
        ages, clock, now = Ages(), 0, 0.0
        given_at = {}
        for more, seconds in steps:
            now += seconds
            for _ in range(more):
                clock += 1
                given_at[clock] = now
            ages.note(clock, now)
        when = ages.when(stamp, now)
        assert given_at.get(stamp, 0.0) <= when <= now
