"""Which blocks go: found slice by slice, while what is behind the slice changes."""

from __future__ import annotations

import numpy as np
import pytest

from kvpool.core import eviction, recency
from kvpool.core.holds import HARD, SOFT
from kvpool.core.index import Index
from kvpool.core.messages import BlockRun
from kvpool.model import Namespace

SPACE = Namespace(model="m")
NODE, OTHER = 1, 2
ROWS = 12
SIZE = 10


def run_of(*numbers: int) -> BlockRun:
    """Return blocks with these numbers."""
    return BlockRun(SPACE.digest, 1, SIZE, b"".join(bytes([n]) * 16 for n in numbers))


@pytest.fixture
def index(monkeypatch):
    """An index of twelve blocks of a node, the first the coldest, looked through four at a time."""
    monkeypatch.setattr(recency, "SLICE", 4)
    index = Index(64)
    index.describe(SPACE)
    index.add(run_of(*range(ROWS)), NODE, "dram")
    return index


def numbers_of(index: Index, rows: np.ndarray) -> list[int]:
    """Return which blocks lie in these rows."""
    return [key & 0xFF for key in index.keys.take(rows, axis=0)[:, 0].tolist()]


def rows_of(index: Index, *numbers: int) -> np.ndarray:
    """Return the rows of blocks."""
    table = index.spaces[SPACE.digest].table
    return table.find(np.frombuffer(run_of(*numbers).keys, "<u8").reshape(-1, 2))


@pytest.mark.parametrize("wanted", [1, 4, 5, 9, ROWS])
def test_as_many_as_it_takes_coldest_first(index, wanted):
    """However many slices that are."""
    slices = list(eviction.slices_for_eviction(index, NODE, wanted * SIZE, 0))
    assert max(len(rows) for rows, _ in slices) <= 4
    assert not any(leased for _, leased in slices)
    order = numbers_of(index, np.concatenate([rows for rows, _ in slices]))
    assert len(order) == wanted
    assert order == numbers_of(index, np.concatenate(list(index.coldest(NODE))))[:wanted]


@pytest.mark.parametrize("change", ["touched", "leased", "pinned", "pinned softly", "gone", "elsewhere", "another's"])
def test_what_changes_behind_the_slice_is_left_alone(index, change):
    """A block that was used, or is not the node's any more, when its slice comes does not go."""
    order = numbers_of(index, np.concatenate(list(index.coldest(NODE))))
    index.add(run_of(order[5]), OTHER, "dram", touch=False)
    slices = eviction.slices_for_eviction(index, NODE, ROWS * SIZE, 0)
    first, _ = next(slices)
    one = order[5] if change == "elsewhere" else order[6]
    row = rows_of(index, one)
    if change == "touched":
        index.recency.touch(row)
    elif change == "leased":
        index.recency.touch(row)
        index.lease(row)
    elif change.startswith("pinned"):
        index.hold(SPACE.digest, run_of(one).keys, SOFT if change == "pinned softly" else HARD)
    else:
        index.remove(run_of(one), NODE, "dram")
    if change == "another's":
        index.add(run_of(50), OTHER, "dram")
        assert rows_of(index, 50).tolist() == row.tolist()
    rest = [n for rows, leased in slices if not leased for n in numbers_of(index, rows)]
    came = [*numbers_of(index, first), *rest]
    assert came[: ROWS - 1] == [n for n in order if n != one]
    assert came[ROWS - 1 :] == ([one] if change == "touched" else []), "a block that was used has its turn later"


def test_leased_and_softly_pinned_ones_go_last(index):
    """And only up to the least that has to go."""
    order = numbers_of(index, np.concatenate(list(index.coldest(NODE))))
    index.lease(rows_of(index, *order[:5]))
    index.hold(SPACE.digest, run_of(order[5]).keys, SOFT)
    index.hold(SPACE.digest, run_of(order[6]).keys, HARD)
    slices = list(eviction.slices_for_eviction(index, NODE, ROWS * SIZE, 10 * SIZE))
    went = [(n, leased) for rows, leased in slices for n in numbers_of(index, rows)]
    assert went == [(n, False) for n in order[7:]] + [(n, True) for n in order[:5]]
