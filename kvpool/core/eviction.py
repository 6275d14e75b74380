"""Which blocks go first: the least recently used, leased ones last, spare copies before sole ones."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import numpy as np
from numpy.typing import NDArray

from kvpool.core.effects import Effect
from kvpool.core.index import Index
from kvpool.core.keytable import Rows

VICTIMS_MAX = 16384


def slices_for_eviction(index: Index, incarnation: int, target: int, least: int) -> Iterator[tuple[Rows, bool]]:
    """Yield (rows, leased) to evict from a node until ``target`` bytes are found.

    Leased blocks come only when nothing else is left, and only up to ``least`` bytes.
    """
    freed = 0
    for leased, wanted in ((False, target), (True, least)):
        if freed >= wanted:
            return
        for rows in index.coldest(incarnation, leased=leased):
            sizes = np.cumsum(index.bytes_on(rows, incarnation)) if len(rows) else np.empty(0, np.int64)
            enough = int(np.searchsorted(sizes, wanted - freed)) + 1
            yield rows[:enough], leased
            freed += int(sizes[min(enough, len(sizes)) - 1]) if len(sizes) else 0
            if freed >= wanted:
                return


def pick_victims(index: Index, incarnation: int, size: int) -> Generator[list[Effect], None, Rows]:
    """Yield between slices; return a node's coldest unleased blocks, about ``size`` bytes, as of the return."""
    picked: list[Rows] = []
    stamps: list[NDArray[np.int64]] = []
    total = count = 0
    for rows in index.coldest(incarnation):
        if len(rows):
            sizes = np.cumsum(index.bytes_on(rows, incarnation))
            enough = min(int(np.searchsorted(sizes, size - total)) + 1, VICTIMS_MAX - count, len(rows))
            picked.append(rows[:enough])
            stamps.append(index.recency.stamps_of(rows[:enough]))
            total += int(sizes[enough - 1])
            count += enough
        if total >= size or count >= VICTIMS_MAX:
            break
        yield []
    if not picked:
        return np.empty(0, np.int64)
    rows = np.concatenate(picked)
    # Between slices rows were touched, leased (which touches), held, freed or given to other blocks.
    rows = rows[(index.recency.stamps_of(rows) == np.concatenate(stamps)) & (index.pinned.take(rows) == 0)]
    rows = rows[index.placements.held_by(incarnation).take(index.placement.take(rows))]
    return _spare_first(index, rows, incarnation)


def _spare_first(index: Index, rows: Rows, incarnation: int) -> Rows:
    """Put blocks that would stay whole without this node in front, order kept otherwise."""
    numbers, back = np.unique(index.placement.take(rows), return_inverse=True)
    spare: NDArray[np.bool_] = np.array([_spare(index, number, incarnation) for number in numbers.tolist()], bool)
    is_spare = spare[back.ravel()]
    return np.concatenate((rows[is_spare], rows[~is_spare]))


def _spare(index: Index, number: int, incarnation: int) -> bool:
    placement = index.placements[number]
    others = 0
    for owner in placement.owners:
        if owner.incarnation != incarnation and index.placements.is_live(owner.incarnation):
            others |= owner.shards
    return others == placement.full
