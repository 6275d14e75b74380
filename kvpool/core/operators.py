"""What operators ask for: that blocks are dropped, wherever they lie."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kvpool.core.columns import zeros
from kvpool.core.effects import Effect
from kvpool.core.holds import HARD
from kvpool.core.index import ROWS_PER_SLICE, Index
from kvpool.core.keytable import Rows, Words, as_words
from kvpool.core.removals import Why
from kvpool.errors import UnknownNamespaceError

T = TypeVar("T")


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
        return _whole(self.search_keys(namespace, keys))

    def search_keys(self, namespace: bytes, keys: bytes) -> Generator[None, None, tuple[int, int, list[Effect]]]:
        """Do what ``keys`` does; yields between slices of the search."""
        space = self._index.spaces.get(namespace)
        if space is None:
            raise UnknownNamespaceError(f"namespace {namespace.hex()} is not known to the master")
        table, words = space.table, as_words(keys)
        seen = zeros(self._index.rows_max, np.bool_)  # a key may be named twice
        picked: list[Words] = []
        blocks = total = 0
        for start in range(0, len(words), ROWS_PER_SLICE):
            rows = table.find(words[start : start + ROWS_PER_SLICE])
            rows = np.unique(rows[rows >= 0])
            rows = self._evictable(rows[~seen.take(rows)])
            seen[rows] = True
            blocks += len(rows)
            total += int(self._sizes(rows).sum())
            _pack(picked, self._index.keys.take(rows, axis=0))
            yield

        def still_there(part: Words) -> Rows:
            found = table.find(part)
            return found[found >= 0]

        return blocks, total, self._begin([partial(still_there, part) for part in picked])

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
        return _whole(self.search_coldest(size))

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
        return blocks, total, self._begin([partial(self._still_cold, *part) for part in picked])

    def _still_cold(self, rows: Rows, stamps: NDArray[np.int64]) -> Rows:
        cold: Rows = rows[(self._index.recency.stamps_of(rows) == stamps) & (self._index.pinned.take(rows) == 0)]
        return cold

    def _begin(self, slices: list[Callable[[], Rows]]) -> list[Effect]:
        """Drop a slice at once, the others as long work; each says which rows are still meant when it comes."""
        drops = (self._drop(rows()) for rows in slices)
        effects = next(drops, [])
        if len(slices) > 1:
            self._jobs.append(drops)
        return effects

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


def _pack(slices: list[Words], more: Words) -> None:
    """Add keys to slices of keys, to the last one while there is room."""
    if slices and len(slices[-1]) + len(more) <= ROWS_PER_SLICE:
        slices[-1] = np.concatenate((slices[-1], more))
    elif len(more):
        slices.append(more)


def _whole(search: Generator[None, None, T]) -> T:
    """Return what a search finds, without a pause."""
    while True:
        try:
            next(search)
        except StopIteration as end:
            found: T = end.value
            return found
