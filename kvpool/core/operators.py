"""What operators ask for: that blocks are dropped, wherever they lie."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator

import numpy as np
from numpy.typing import NDArray

from kvpool.core.effects import Effect
from kvpool.core.holds import HARD
from kvpool.core.index import ROWS_PER_SLICE, Index
from kvpool.core.keytable import Rows, as_words
from kvpool.core.removals import Why
from kvpool.errors import UnknownNamespaceError


class Evictions:
    """Evictions by hand, of everything but what is pinned hard. ``evict`` asks a node or a backend to drop rows."""

    def __init__(
        self,
        index: Index,
        jobs: deque[Iterator[list[Effect]]],
        evict: Callable[[int, Rows, Why], list[Effect]],
    ) -> None:
        self._index = index
        self._jobs = jobs
        self._evict = evict

    def keys(self, namespace: bytes, keys: bytes) -> tuple[int, int, list[Effect]]:
        """Ask for these blocks to be dropped everywhere; returns (blocks, bytes, the first slice's effects).

        Raises UnknownNamespaceError.
        """
        space = self._index.spaces.get(namespace)
        if space is None:
            raise UnknownNamespaceError(f"namespace {namespace.hex()} is not known to the master")
        table = space.table
        rows = table.find(as_words(keys))
        rows = self._evictable(np.unique(rows[rows >= 0]))
        words = self._index.keys.take(rows, axis=0)

        def still(part: slice) -> Rows:
            found = table.find(words[part])
            return found[found >= 0]

        return self._begin(rows, still)

    def namespace(self, namespace: bytes) -> tuple[int, int]:
        """Start dropping a whole namespace; returns (blocks, bytes). Raises UnknownNamespaceError."""
        space = self._index.spaces.get(namespace)
        if space is None:
            raise UnknownNamespaceError(f"namespace {namespace.hex()} is not known to the master")

        def job() -> Iterator[list[Effect]]:
            for start in range(0, self._index.rows_used, 16 * ROWS_PER_SLICE):
                part = slice(start, min(start + 16 * ROWS_PER_SLICE, self._index.rows_used))
                mine = np.flatnonzero(self._index.space_of[part] == space.number) + start
                for i in range(0, len(mine), ROWS_PER_SLICE):
                    rows = mine[i : i + ROWS_PER_SLICE]
                    # Since the last slice a row may have gone to another namespace.
                    yield self._drop(rows[self._index.space_of.take(rows) == space.number])

        self._jobs.append(job())
        return len(space.table), space.stored_bytes

    def coldest(self, size: int) -> tuple[int, int, list[Effect]]:
        """Do all of ``search_coldest`` at once."""
        search = self.search_coldest(size)
        while True:
            try:
                next(search)
            except StopIteration as end:
                found: tuple[int, int, list[Effect]] = end.value
                return found

    def search_coldest(self, size: int) -> Generator[None, None, tuple[int, int, list[Effect]]]:
        """Drop about ``size`` bytes of the coldest blocks without lease or pin, memory and files.

        Yields between slices of the search; returns (blocks, bytes, the first slice's effects). What was used since
        it was found stays.
        """
        recency = self._index.recency
        picked: list[tuple[Rows, NDArray[np.int64]]] = []  # with stamps
        blocks = total = position = 0
        newest = recency.clock  # what is touched from now on is not cold, and would be met again for ever
        while total < size and position < newest and (piece := recency.after(position)) is not None:
            rows, position = piece[0].astype(np.int64), piece[1]
            stamps = recency.stamps_of(rows)
            cold = (stamps <= newest) & (self._index.leased.take(rows) == 0) & (self._index.pinned.take(rows) == 0)
            rows, stamps = rows[cold], stamps[cold]
            sizes = np.cumsum(self._sizes(rows))
            enough = min(int(np.searchsorted(sizes, size - total)) + 1, len(rows))
            for start in range(0, enough, ROWS_PER_SLICE):
                end = min(start + ROWS_PER_SLICE, enough)
                picked.append((rows[start:end], stamps[start:end]))
            blocks += enough
            total += int(sizes[enough - 1]) if enough else 0
            yield
        drops = (self._drop(self._still_cold(*part)) for part in picked)
        effects = next(drops, [])
        if len(picked) > 1:
            self._jobs.append(drops)
        return blocks, total, effects

    def _still_cold(self, rows: Rows, stamps: NDArray[np.int64]) -> Rows:
        cold: Rows = rows[(self._index.recency.stamps_of(rows) == stamps) & (self._index.pinned.take(rows) == 0)]
        return cold

    def _begin(self, rows: Rows, still: Callable[[slice], Rows]) -> tuple[int, int, list[Effect]]:
        """Drop a slice at once, the others as long work; ``still`` says which rows of one are meant when it comes."""

        def job() -> Iterator[list[Effect]]:
            for start in range(ROWS_PER_SLICE, len(rows), ROWS_PER_SLICE):
                yield self._drop(still(slice(start, start + ROWS_PER_SLICE)))

        if len(rows) > ROWS_PER_SLICE:
            self._jobs.append(job())
        return len(rows), int(self._sizes(rows).sum()), self._drop(rows[:ROWS_PER_SLICE])

    def _evictable(self, rows: Rows) -> Rows:
        return rows[self._index.pinned.take(rows) < HARD]

    def _drop(self, rows: Rows) -> list[Effect]:
        rows = self._evictable(rows)
        effects: list[Effect] = []
        for incarnation in self._index.owners(rows):
            effects += self._evict(incarnation, rows, Why.OPERATOR)
        return effects

    def _sizes(self, rows: Rows) -> NDArray[np.int64]:
        """Return the payload bytes of all copies of each row."""
        copies = self._index.placements.copies.take(self._index.placement.take(rows))
        return np.multiply(copies, self._index.shard_bytes.take(rows))
