"""Least-recently-used order over millions of rows, kept by appending.

A linked list costs two random writes for every touched block. Here a touch gives each row a new
stamp and appends the row to a log; a log entry counts only while it carries its row's newest stamp.
The cold end is the front of the log. Stale entries are squeezed out a slice at a time, two old
segments for each new one, so that the log stays under about twice the number of live rows.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SEGMENT = 8192

SLICE = 1024
"""Entries of the log that are read at once: whoever reads on looks at each of its rows."""


@dataclass(slots=True)
class _Segment:
    last: int  # the newest stamp in it
    rows: NDArray[np.int32]
    stamps: NDArray[np.int64]


class Recency:
    """The order in which rows were last touched. ``stamps`` is a column: 0 = not in the order."""

    def __init__(self, stamps: NDArray[np.int64]) -> None:
        self._stamps = stamps
        self._segments: list[_Segment] = []
        self._lasts: list[int] = []  # of each segment, for bisect
        self._cursor = 0  # next segment to squeeze
        self._tail = np.empty(SEGMENT, np.int32)
        self._fill = 0
        self._next = 1  # stamp of the next touch

    @property
    def clock(self) -> int:
        """The newest stamp given out."""
        return self._next - 1

    @property
    def log_entries(self) -> int:
        """Entries in the log, stale ones included."""
        return self._fill + sum(len(s.rows) for s in self._segments)

    def touch(self, rows: NDArray[np.int64]) -> bool:
        """Make these rows the hottest, the last of them hottest of all; returns False if one came twice."""
        n = len(rows)
        stamps = np.arange(self._next, self._next + n)
        self._stamps[rows] = stamps
        self._next += n
        done = 0
        while done < n:
            step = min(n - done, SEGMENT - self._fill)
            self._tail[self._fill : self._fill + step] = rows[done : done + step]
            self._fill += step
            done += step
            if self._fill == SEGMENT:
                self._close_tail(self._next - n + done - 1)
        return bool((self._stamps.take(rows) == stamps).all())

    def stamps_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the newest stamp of each row: while it is the same, nobody touched, removed or reused the row."""
        return self._stamps.take(rows)

    def forget(self, rows: NDArray[np.int64]) -> None:
        """Take rows out of the order."""
        self._stamps[rows] = 0

    def after(self, stamp: int) -> tuple[NDArray[np.int32], int] | None:
        """Return the next slice of live rows with stamps above ``stamp``, coldest first, and where it ends.

        The end is the argument for the next call; None when nothing hotter is left, and a slice may be empty. Between
        two calls the order may change: rows touched meanwhile turn up later.
        """
        while (i := bisect_right(self._lasts, stamp)) < len(self._segments):
            segment = self._squeeze(i)
            if segment is None:
                continue
            start = int(np.searchsorted(segment.stamps, stamp, side="right"))
            end = start + SLICE
            return segment.rows[start:end], int(segment.stamps[end - 1]) if end < len(segment.rows) else segment.last
        if stamp >= self.clock or not self._fill:
            return None
        first = self._next - self._fill
        skip = max(0, stamp + 1 - first)
        rows = self._tail[skip : min(self._fill, skip + SLICE)].copy()
        stamps = np.arange(first + skip, first + skip + len(rows))
        return rows[self._stamps.take(rows) == stamps], first + skip + len(rows) - 1

    def _close_tail(self, last: int) -> None:
        self._segments.append(_Segment(last, self._tail, np.arange(last - SEGMENT + 1, last + 1)))
        self._lasts.append(last)
        self._tail, self._fill = np.empty(SEGMENT, np.int32), 0
        for _ in range(2):
            if not self._segments:
                return  # the first step removed the only one
            if self._cursor >= len(self._segments):
                self._cursor = 0
            if self._squeeze(self._cursor) is not None:
                self._merge_with_previous()
                self._cursor += 1

    def _squeeze(self, i: int) -> _Segment | None:
        """Drop stale entries of one segment; returns None if that emptied and removed it."""
        segment = self._segments[i]
        live = self._stamps.take(segment.rows) == segment.stamps
        if not live.all():
            segment.rows, segment.stamps = segment.rows[live], segment.stamps[live]
            if not len(segment.rows):
                del self._segments[i], self._lasts[i]
                if i < self._cursor:
                    self._cursor -= 1
                return None
        return segment

    def _merge_with_previous(self) -> None:
        i = self._cursor
        if i == 0:
            return
        left, right = self._segments[i - 1], self._segments[i]
        if len(left.rows) + len(right.rows) > SEGMENT:
            return
        right.rows = np.concatenate((left.rows, right.rows))
        right.stamps = np.concatenate((left.stamps, right.stamps))
        del self._segments[i - 1], self._lasts[i - 1]
        self._cursor -= 1
