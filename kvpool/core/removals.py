"""What the index has lost: a ring of the last removals, so that a miss can be explained.

25 bytes an entry, touched only as far as it has been filled. Entries are written in batches on the way
of a report; nothing is kept to find one quickly, because only people ask: a search looks through all
entries, a slice at a time.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from enum import IntEnum
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from kvpool.core.columns import zeros
from kvpool.core.keytable import Rows, Words

REMOVALS_MAX = 1 << 20
NODES_MAX = 1 << 15
SEARCH_SLICE = 8192
MATCHES_SLICE = 64
FOUND_MAX = 4
"""Removals told of one key, the newest ones."""

_TICKS_S = 10
"""Times are kept in tenths of a second."""


class Why(IntEnum):
    """What took a block out of a node, or its node out of the index."""

    MASTER = 0  # evicted on command of a master that was restarted since
    ROOM = 1  # the node made room for a put
    WATERMARK = 2
    OPERATOR = 3
    INCOMPLETE = 4  # evicted because its other shards were gone already
    NODE_LOST = 5  # not heard of for too long
    NODE_RESTARTED = 6
    NOT_REPORTED = 7  # missing when its node reported everything anew
    CAPACITY = 8  # its storage backend was over its high watermark, or the index had few rows left
    FILE_LOST = 9  # its file was missing or broken when somebody read it
    TRANSFER = 10  # it was of use to one transfer only, which has ended


EVICTIONS = frozenset(
    {Why.MASTER, Why.ROOM, Why.WATERMARK, Why.OPERATOR, Why.INCOMPLETE, Why.CAPACITY, Why.TRANSFER}
)


@dataclass(frozen=True, slots=True)
class Removal:
    """One entry: ``space`` is the namespace's number in the index, ``at`` the time in seconds."""

    space: int
    why: Why
    node_id: str
    at: float


class Removals:
    """The last removals. Times are seconds, none of them before ``since``."""

    def __init__(self, since: float, entries_max: int = REMOVALS_MAX) -> None:
        self.entries_max = entries_max
        self.pushed = 0  # ever
        self._since = since
        self._keys: Words = zeros((entries_max, 2), np.uint64)
        self._space: NDArray[np.int16] = zeros(entries_max, np.int16)
        self._why: NDArray[np.uint8] = zeros(entries_max, np.uint8)
        self._node: NDArray[np.int16] = zeros(entries_max, np.int16)
        self._at: NDArray[np.uint32] = zeros(entries_max, np.uint32)
        self._nodes = ["(forgotten)"]
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        """Return the number of entries."""
        return min(self.pushed, self.entries_max)

    @property
    def overflowed(self) -> bool:
        """Whether older removals have been forgotten."""
        return self.pushed > self.entries_max

    @property
    def since(self) -> float:
        """The time from which on every removal is here."""
        if not self.overflowed:
            return self._since
        return self._since + (int(self._at[self.pushed % self.entries_max]) + 1) / _TICKS_S

    def push(self, keys: Words, space: int, why: int | NDArray[np.uint8], node_id: str, at: float) -> None:
        """Add a batch of one namespace and node; ``why`` is one for all or one for each."""
        count = len(keys)
        if not count:
            return
        if count > self.entries_max:
            self.pushed += count - self.entries_max
            keys, count = keys[-self.entries_max :], self.entries_max
            why = why if isinstance(why, int) else why[-self.entries_max :]
        number = self._number(node_id)
        tick = int((at - self._since) * _TICKS_S)
        start = self.pushed % self.entries_max
        head = min(count, self.entries_max - start)
        for first, end, place in ((0, head, start), (head, count, 0)):
            there = slice(place, place + end - first)
            self._keys[there] = keys[first:end]
            self._why[there] = why if isinstance(why, int) else why[first:end]
            self._space[there], self._node[there], self._at[there] = space, number, tick
        self.pushed += count

    def _number(self, node_id: str) -> int:
        number = self._numbers.get(node_id)
        if number is None:
            if len(self._nodes) >= NODES_MAX:
                return 0
            number = self._numbers[node_id] = len(self._nodes)
            self._nodes.append(node_id)
        return number

    def search(self, keys: Words, space: int | None = None) -> Generator[None, None, list[list[Removal]]]:
        """Yield between slices; return the newest removals of each key, newest first, of one or of all namespaces.

        More may be pushed between two slices: that is not looked at, and what it overwrites is left out.
        """
        found: list[list[Removal]] = [[] for _ in keys]
        order = np.argsort(keys[:, 0], kind="stable")
        low = keys[order, 0]
        missing = len(found)
        end = self.pushed
        while missing and (begin := max(0, self.pushed - self.entries_max, end - SEARCH_SLICE)) < end:
            # In one piece: a slice ends where the ring does.
            begin = max(begin, end - 1 - (end - 1) % self.entries_max)
            part = slice(begin % self.entries_max, (end - 1) % self.entries_max + 1)
            column = self._keys[part, 0]
            at = np.minimum(np.searchsorted(low, column), len(low) - 1)
            matched = low.take(at) == column
            if space is not None:
                matched &= self._space[part] == space
            matches = np.flatnonzero(matched)[::-1]
            entries = self._entries(part, matches)
            for start in range(0, len(matches), MATCHES_SLICE):
                chunk = at.take(matches[start : start + MATCHES_SLICE]).tolist()
                for first, entry in zip(chunk, islice(entries, MATCHES_SLICE), strict=True):
                    missing -= _put(found, keys, order[first:], low[first:], entry)
                yield
            end = begin
            yield
        return found

    def _entries(self, part: slice, matches: Rows) -> Iterator[tuple[bytes, Removal]]:
        """Copy these entries of a part now; what they mean is put together one by one."""
        packed = self._keys[part].take(matches, axis=0).tobytes()
        spaces, whys, nodes, ticks = (
            column[part].take(matches) for column in (self._space, self._why, self._node, self._at)
        )
        return (
            (
                packed[16 * i : 16 * i + 16],
                Removal(
                    int(spaces[i]), Why(int(whys[i])), self._nodes[nodes[i]], self._since + int(ticks[i]) / _TICKS_S
                ),
            )
            for i in range(len(matches))
        )


def _put(
    found: list[list[Removal]], keys: Words, order: Rows, low: Words, entry: tuple[bytes, Removal]
) -> int:
    """Add an entry to those of the keys that begin alike (the first ones of ``low``) which are the entry's."""
    key, removal = entry
    filled = 0
    for i, half in zip(order, low, strict=True):
        if half != low[0]:
            break
        if len(found[i]) < FOUND_MAX and keys[i].tobytes() == key:
            found[i].append(removal)
            filled += len(found[i]) == FOUND_MAX
    return filled
