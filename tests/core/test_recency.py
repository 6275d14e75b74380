"""Recency beside a list: exactly the least recently used order, in a log that stays short."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.core import recency
from kvpool.core.recency import Recency

ROWS = 64


@pytest.fixture(autouse=True, scope="module")
def short_segments():
    """Segments of eight entries, so that a few touches squeeze and merge them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recency, "SEGMENT", 8)
        patch.setattr(recency, "SLICE", 3)
        yield


class Twin:
    """A Recency and the plain list, coldest first, that it must equal."""

    def __init__(self) -> None:
        self.order = Recency(np.zeros(ROWS, np.int64))
        self.list: list[int] = []

    def touch(self, rows: list[int]) -> None:
        distinct = self.order.touch(np.array(rows, np.int64))
        assert distinct == (len(set(rows)) == len(rows))
        for row in rows:
            if row in self.list:
                self.list.remove(row)
            self.list.append(row)

    def forget(self, rows: list[int]) -> None:
        self.order.forget(np.array(rows, np.int64))
        self.list = [row for row in self.list if row not in rows]

    def read(self) -> list[int]:
        found: list[int] = []
        position = 0
        while (piece := self.order.after(position)) is not None:
            assert piece[1] > position
            found += piece[0].tolist()
            position = piece[1]
        return found


some_rows = st.lists(st.integers(0, ROWS - 1), max_size=24)
script = st.lists(st.tuples(st.sampled_from(["touch", "touch", "touch", "forget"]), some_rows), max_size=30)


@settings(max_examples=300)
@given(script)
def test_the_order_is_that_of_the_last_touches(changes):
    """Reading the whole order gives every live row once, coldest first."""
    twin = Twin()
    for verb, rows in changes:
        twin.touch(rows) if verb == "touch" else twin.forget(rows)
        assert twin.read() == twin.list


@settings(max_examples=300)
@given(script, script)
def test_reading_in_slices_while_the_order_changes(before, between):
    """What is not touched meanwhile is read once and in order; what is touched turns up (again) later."""
    twin = Twin()
    for verb, rows in before:
        twin.touch(rows) if verb == "touch" else twin.forget(rows)
    old = list(twin.list)
    changed: set[int] = set()
    found: list[int] = []
    position = 0
    changes = iter(between)
    while (piece := twin.order.after(position)) is not None:
        found += piece[0].tolist()
        position = piece[1]
        verb, rows = next(changes, ("", []))
        if verb:
            changed |= set(rows)
            twin.touch(rows) if verb == "touch" else twin.forget(rows)
    assert [row for row in found if row not in changed] == [row for row in old if row not in changed]
    last_seen = {row: i for i, row in enumerate(found)}
    live = sorted(set(last_seen) & set(twin.list), key=last_seen.__getitem__)
    assert live == twin.list


@settings(max_examples=100)
@given(st.lists(some_rows, min_size=20, max_size=80), st.integers(1, ROWS))
def test_the_log_stays_within_a_few_times_the_live_rows(touches, width):
    """Stale entries are squeezed out as fast as new ones come."""
    twin = Twin()
    for rows in touches:
        twin.touch([row % width for row in rows])
        assert twin.order.log_entries <= 3 * len(twin.list) + 6 * 8


def test_a_touch_longer_than_a_segment_keeps_its_order():
    """A long chain is one touch."""
    twin = Twin()
    twin.touch(list(range(ROWS)))
    twin.touch(list(range(40, 0, -1)))
    assert twin.read() == twin.list
    assert twin.order.clock == ROWS + 40
