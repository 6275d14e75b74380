"""Which keys somebody wants kept, and how much: operators' pins and transfers, counted by key.

A hold is about a key, whether its block is there or not: what comes later is held when it comes. Whoever takes
one lets go of it again; the strongest that stands counts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvpool.core.columns import zeros
from kvpool.core.keytable import KeyTable, Rows, Words

SOFT, HARD = 1, 2
"""How a block is held: to be evicted when nothing else is left, or never."""

Levels = NDArray[np.uint8]
"""0, SOFT or HARD, one for each key asked about."""


class Holds:
    """How often each key of each namespace is held, softly and hard; of at most ``keys_max`` different ones."""

    def __init__(self, keys_max: int) -> None:
        self._keys: Words = zeros((keys_max, 2), np.uint64)
        self._soft: NDArray[np.int32] = zeros(keys_max, np.int32)
        self._hard: NDArray[np.int32] = zeros(keys_max, np.int32)
        self._tables: dict[bytes, KeyTable] = {}
        self._free: list[int] = []
        self._used = 0

    def __len__(self) -> int:
        """Return the number of keys that are held."""
        return sum(map(len, self._tables.values()))

    def any_of(self, namespace: bytes) -> bool:
        """Return whether a namespace has held keys."""
        return bool(self._tables.get(namespace))

    def add(self, namespace: bytes, keys: Words, level: int) -> Levels:
        """Count one hold more on each of these keys; returns how they are held now. Beyond the bound: not at all."""
        table = self._tables.get(namespace)
        if table is None:
            table = self._tables[namespace] = KeyTable(self._keys)
        rows, fresh = table.insert(keys, self._take)
        self._soft[fresh] = self._hard[fresh] = 0
        np.add.at(self._counts(level), rows[rows >= 0], 1)
        return self._levels(rows)

    def remove(self, namespace: bytes, keys: Words, level: int) -> Levels:
        """Count one hold less on each of these keys; returns how they are held now."""
        table = self._tables.get(namespace)
        if table is None:
            return np.zeros(len(keys), np.uint8)
        rows = table.find(keys)
        known = rows[rows >= 0]
        np.subtract.at(self._counts(level), known, 1)
        levels = self._levels(rows)
        over = np.unique(known[levels[rows >= 0] == 0])
        if len(over):
            table.remove(over)
            self._free += over.tolist()
        return levels

    def levels(self, namespace: bytes, keys: Words) -> Levels:
        """Return how these keys are held."""
        table = self._tables.get(namespace)
        return self._levels(table.find(keys)) if table else np.zeros(len(keys), np.uint8)

    def moving(self) -> list[KeyTable]:
        """Return the tables that are on their way to a larger array."""
        return [table for table in self._tables.values() if table.moving]

    def _counts(self, level: int) -> NDArray[np.int32]:
        return self._hard if level == HARD else self._soft

    def _levels(self, rows: Rows) -> Levels:
        levels = np.where(self._hard.take(rows) > 0, HARD, np.where(self._soft.take(rows) > 0, SOFT, 0))
        return np.where(rows >= 0, levels, 0).astype(np.uint8)

    def _take(self, count: int) -> Rows:
        old = [self._free.pop() for _ in range(min(count, len(self._free)))]
        new = min(count - len(old), len(self._soft) - self._used)
        self._used += new
        return np.concatenate((np.array(old, np.int64), np.arange(self._used - new, self._used)))
