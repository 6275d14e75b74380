"""What of the index is kept free: rows and placements.

Where storage is larger than the index, rows come to an end before bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kvpool.core.backends import DOOMED_MAX, Backends
from kvpool.core.effects import Effect
from kvpool.core.index import Index
from kvpool.core.keytable import Rows
from kvpool.core.removals import Why

FREE_LEAST = 0.03
"""Below this share of free rows some are freed, until there are ``FREE_AGAIN``."""

FREE_AGAIN = 0.04
NOTHING_FOUND_S = 10.0


class PlacementRelief:
    """Frees placements that no block has any more, when there are many."""

    def __init__(self, index: Index, jobs: deque[Iterator[list[Effect]]]) -> None:
        self._index = index
        self._jobs = jobs

    def tick(self) -> None:
        """Begin, as long work, if it is time to."""
        if self._index.placements.crowded:
            self._jobs.append([] for _ in self._index.free_placements())


class RowRelief:
    """Drops blocks that only files hold, coldest first, when few rows are left."""

    def __init__(self, index: Index, backends: Backends, jobs: deque[Iterator[list[Effect]]]) -> None:
        self._index = index
        self._backends = backends
        self._jobs = jobs
        self._job = False
        self._not_before = float("-inf")

    def tick(self, now: float) -> None:
        """Begin, as long work, if it is time to."""
        few = self._index.rows_free < FREE_LEAST * self._index.rows_max
        if few and not self._job and now >= self._not_before:
            self._job = True
            self._jobs.append(self._free(now))

    def _free(self, now: float) -> Iterator[list[Effect]]:
        try:
            # Without those whose removals do not keep up.
            backends = [b for b in self._backends.by_id.values() if len(b.doomed) < DOOMED_MAX]
            for rows in self._coldest({backend.incarnation for backend in backends}):
                short = int(np.ceil(FREE_AGAIN * self._index.rows_max)) - self._index.rows_free
                if short <= 0 or any(len(backend.doomed) >= DOOMED_MAX for backend in backends):
                    return
                effects: list[Effect] = []
                for incarnation in self._index.owners(rows[:short]):
                    effects += self._backends.doom(incarnation, rows[:short], Why.CAPACITY, now)
                yield effects
            self._not_before = now + NOTHING_FOUND_S
        finally:
            self._job = False

    def _coldest(self, incarnations: set[int]) -> Iterator[Rows]:
        """Yield rows without lease or pin that nobody else holds anything of, coldest first, slice by slice."""
        index, position = self._index, 0
        while (piece := index.recency.after(position)) is not None:
            rows, position = piece[0].astype(np.int64), piece[1]
            rows = rows[(index.leased.take(rows) == 0) & (index.pinned.take(rows) == 0)]
            numbers, back = np.unique(index.placement.take(rows), return_inverse=True)
            owners = [{owner.incarnation for owner in index.placements[n].owners} for n in numbers.tolist()]
            only: NDArray[np.bool_] = np.array([held <= incarnations for held in owners], bool)
            yield rows[only[back.ravel()]]
