"""Every block the pool knows: key to row, and what there is to say about a row, in columns.

Columns are reserved at full size and touched row by row, so that they cost memory only for rows in
use and never have to be copied to grow.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpool.core.columns import zeros
from kvpool.core.holds import HARD, Holds, Levels
from kvpool.core.keytable import KeyTable, Rows, Words, as_words
from kvpool.core.messages import BlockRun
from kvpool.core.placement import NOWHERE, Owner, PlacementTable
from kvpool.core.recency import Recency
from kvpool.core.slots import file_bytes
from kvpool.model import KEY_BYTES, Namespace

ROWS_PER_SLICE = 1024
ROWS_MARKED_PER_SLICE = 1 << 15
NAMESPACES_MAX = 4096
HELD_MAX = 1 << 22
"""Keys that may be held at once; twice what pins and transfers may hold together, as they are let go of in slices."""

_NO_NAMESPACE = -1


@dataclass(slots=True)
class Space:
    """One namespace in the index. ``descriptor`` is None while only blocks have been seen of it."""

    number: int
    digest: bytes
    table: KeyTable
    descriptor: Namespace | None = None
    stored_bytes: int = 0
    siblings: list[Space] = field(default_factory=list)  # other descriptors of the same model
    announced: float | None = None  # by an engine, when last

    @property
    def full(self) -> int:
        """Mask of a whole block."""
        return (1 << self.descriptor.shards) - 1 if self.descriptor else 0


class Lost(NamedTuple):
    """What an incarnation had of one namespace (its number), among the rows of a slice."""

    incarnation: int
    space: int
    rows: Rows


class Index:
    """Blocks of all namespaces: placement, size, lease count and recency by row."""

    def __init__(self, rows_max: int) -> None:
        self.rows_max = rows_max
        self.keys: Words = zeros((rows_max, 2), np.uint64)
        self.placement: NDArray[np.int32] = zeros(rows_max, np.int32)
        self.shard_bytes: NDArray[np.int64] = zeros(rows_max, np.int64)
        self.leased: NDArray[np.int32] = zeros(rows_max, np.int32)
        self.pinned: Levels = zeros(rows_max, np.uint8)  # how each row's key is held: 0, SOFT or HARD
        self.space_of: NDArray[np.int16] = zeros(rows_max, np.int16)
        self.listed: NDArray[np.bool_] = zeros(rows_max, bool)  # on some node's victim list
        self.asked: NDArray[np.uint8] = zeros(rows_max, np.uint8)  # why the master last asked for its eviction
        self.recency = Recency(zeros(rows_max, np.int64))
        self.placements = PlacementTable()
        self.holds = Holds(HELD_MAX)
        self.spaces: dict[bytes, Space] = {}
        self._by_number: list[Space] = []
        self._free: NDArray[np.int32] = zeros(rows_max, np.int32)  # a stack
        self._free_count = 0
        self.rows_used = 0  # rows ever handed out: the columns are live below this
        self.blocks_on: dict[int, int] = {}  # by incarnation
        self.file_bytes: dict[int, int] = {}  # by incarnation, of those that are storage backends
        self.refused = 0  # blocks that found no row

    def __len__(self) -> int:
        """Return the number of blocks."""
        return sum(len(space.table) for space in self.spaces.values())

    @property
    def rows_free(self) -> int:
        """How many blocks more there is room for."""
        return self.rows_max - self.rows_used + self._free_count

    # ---- namespaces ----------------------------------------------------------------------------

    def space(self, digest: bytes) -> Space:
        """Return the namespace's part of the index, made on first sight."""
        space = self.spaces.get(digest)
        if space is None:
            space = Space(len(self._by_number), digest, KeyTable(self.keys))
            self.spaces[digest] = space
            self._by_number.append(space)
        return space

    def describe(self, descriptor: Namespace) -> Space:
        """Attach its descriptor to a namespace; idempotent."""
        space = self.space(descriptor.digest)
        if space.descriptor is None:
            space.descriptor = descriptor
            for other in self.spaces.values():
                if other is not space and other.descriptor and other.descriptor.model == descriptor.model:
                    other.siblings.append(space)
                    space.siblings.append(other)
        return space

    def moving(self) -> list[KeyTable]:
        """Return the tables that are on their way to a larger array."""
        return [space.table for space in self.spaces.values() if space.table.moving] + self.holds.moving()

    # ---- what nodes report ---------------------------------------------------------------------

    def add(self, run: BlockRun, incarnation: int, tier: str, *, touch: bool = True) -> bytes:
        """Record that an incarnation holds these shards of these blocks; they become the hottest.

        Without ``touch`` only those do that were not known at all. Returns the keys that there is no room for.
        """
        space = self.space(run.namespace)
        rows, fresh = space.table.insert(as_words(run.keys), self._take_rows)
        if len(fresh):
            self.space_of[fresh] = space.number
            self.placement[fresh] = NOWHERE
            self.leased[fresh] = 0
            self.listed[fresh] = False
            self.asked[fresh] = 0
            held = self.holds.any_of(space.digest)
            self.pinned[fresh] = self.holds.levels(space.digest, self.keys.take(fresh, axis=0)) if held else 0
        refused = b""
        if (rows < 0).any():
            self.refused += int(np.count_nonzero(rows < 0))
            refused = np.frombuffer(run.keys, np.uint8).reshape(-1, KEY_BYTES)[rows < 0].tobytes()
            rows = rows[rows >= 0]
        # A put walks its chain head first; reversed, the tail ages before the head.
        if touch:
            if not self.recency.touch(rows[::-1]):
                rows = np.unique(rows)
        else:
            self.recency.touch(fresh[::-1])
            rows = np.unique(rows)
        owner = Owner(incarnation, tier, run.shards)
        before = self.placement.take(rows)
        # The newest report's size counts for all copies, or the account would not come down to zero.
        grown = self.placements.copies.take(before) * (run.shard_bytes - self.shard_bytes.take(rows))
        space.stored_bytes += int(grown.sum())
        if self.file_bytes and grown.any():
            self._resize_files(space, rows, before, run.shard_bytes)
        self.shard_bytes[rows] = run.shard_bytes
        after = self.placements.added(before, space.full, owner)
        self._replace(space, rows, before, after, incarnation)
        return refused

    def remove(self, run: BlockRun, incarnation: int, tier: str) -> tuple[Rows, Rows]:
        """Record that these shards are gone; returns the rows that had been there, and those that are whole no more.

        What is left of those lies at other incarnations and can never be a hit again. Rows that are free
        now still have their columns, until the next call.
        """
        space = self.spaces.get(run.namespace)
        if space is None:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        rows = space.table.find(as_words(run.keys))
        rows = np.unique(rows[rows >= 0])
        before = self.placement.take(rows)
        held = self.placements.held_by(incarnation).take(before)
        after = self.placements.removed(before, Owner(incarnation, tier, run.shards))
        broken = self.placements.complete.take(before) & ~self.placements.complete.take(after) & (after != NOWHERE)
        self._replace(space, rows, before, after, incarnation)
        return rows[held], rows[broken]

    def drop_slice(self, incarnations: Collection[int], start: int) -> tuple[int, Rows, list[Lost]]:
        """Take dead incarnations out of the rows from ``start`` on.

        Returns where to go on (at or past ``rows_used``: done), the rows of blocks that are whole no more,
        and what each incarnation had. Rows that are free now still have their columns, until the next call.
        """
        end = min(start + 16 * ROWS_PER_SLICE, self.rows_used)
        numbers = self.placement[start:end]
        held = np.zeros(len(self.placements.whole), bool)
        for incarnation in incarnations:
            held |= self.placements.held_by(incarnation)
        hit = np.flatnonzero(held.take(numbers))
        if len(hit) > ROWS_PER_SLICE:
            hit = hit[:ROWS_PER_SLICE]
            end = start + int(hit[-1]) + 1
        broken_rows, lost = [], []
        rows = hit + start
        for number in np.unique(self.space_of.take(rows)).tolist():
            space = self._by_number[number]
            mine = rows[self.space_of.take(rows) == number]
            for incarnation in incarnations:
                before = self.placement.take(mine)
                lost.append(Lost(incarnation, number, mine[self.placements.held_by(incarnation).take(before)]))
                after = before
                for tier in self._tiers(before, incarnation):
                    after = self.placements.removed(after, Owner(incarnation, tier, -1))
                broken = (
                    self.placements.complete.take(before)
                    & ~self.placements.complete.take(after)
                    & (after != NOWHERE)
                )
                broken_rows.append(mine[broken])
                self._replace(space, mine, before, after, incarnation)
                mine = mine[after != NOWHERE]
        return end, np.concatenate(broken_rows) if broken_rows else np.empty(0, np.int64), lost

    def _tiers(self, numbers: NDArray[np.int32], incarnation: int) -> set[str]:
        return {
            owner.tier
            for number in np.unique(numbers).tolist()
            for owner in self.placements[number].owners
            if owner.incarnation == incarnation
        }

    def _replace(
        self, space: Space, rows: Rows, before: NDArray[np.int32], after: NDArray[np.int32], incarnation: int
    ) -> None:
        """Move distinct rows of one namespace from placement to placement, with the accounts."""
        if not len(rows):
            return
        self.placement[rows] = after
        copies = self.placements.copies
        space.stored_bytes += int(((copies.take(after) - copies.take(before)) * self.shard_bytes.take(rows)).sum())
        if incarnation in self.file_bytes:
            shards = self._shards_on(after, incarnation) - self._shards_on(before, incarnation)
            self.file_bytes[incarnation] += int((shards * self._file_sizes(space, rows)).sum())
        held = self.placements.held_by(incarnation)
        change = int(np.count_nonzero(held.take(after))) - int(np.count_nonzero(held.take(before)))
        self.blocks_on[incarnation] = self.blocks_on.get(incarnation, 0) + change
        gone = rows[after == NOWHERE]
        if len(gone):
            space.table.remove(gone)
            self.recency.forget(gone)
            self.space_of[gone] = _NO_NAMESPACE
            self._give_back(gone[self.leased.take(gone) == 0])

    def _resize_files(self, space: Space, rows: Rows, before: NDArray[np.int32], shard_bytes: int) -> None:
        """Keep the accounts of backends right when blocks are reported with another size than before."""
        grown = file_bytes(shard_bytes, self._layers(space)) - self._file_sizes(space, rows)
        for incarnation in self.file_bytes:
            self.file_bytes[incarnation] += int((self._shards_on(before, incarnation) * grown).sum())

    def _file_sizes(self, space: Space, rows: Rows) -> NDArray[np.int64]:
        """Return, for each row of a namespace, the bytes that a file of one of its shards takes."""
        sizes, back = np.unique(self.shard_bytes.take(rows), return_inverse=True)
        return np.array([file_bytes(size, self._layers(space)) for size in sizes.tolist()], np.int64)[back.ravel()]

    @staticmethod
    def _layers(space: Space) -> int:
        return space.descriptor.shard_layers if space.descriptor is not None else 1

    # ---- rows ----------------------------------------------------------------------------------

    def _take_rows(self, count: int) -> Rows:
        reused = min(count, self._free_count)
        self._free_count -= reused
        old = self._free[self._free_count : self._free_count + reused].astype(np.int64)
        new = min(count - reused, self.rows_max - self.rows_used)
        fresh = np.arange(self.rows_used, self.rows_used + new)
        self.rows_used += new
        return np.concatenate((old, fresh)) if reused else fresh

    def _give_back(self, rows: Rows) -> None:
        self._free[self._free_count : self._free_count + len(rows)] = rows
        self._free_count += len(rows)

    def lease(self, rows: Rows) -> None:
        """Count one lease more on each of these distinct rows."""
        self.leased[rows] += 1

    def unlease(self, rows: Rows) -> None:
        """Count one lease less; a row whose block went away meanwhile becomes free with its last lease."""
        self.leased[rows] -= 1
        over = rows[(self.leased.take(rows) == 0) & (self.space_of.take(rows) == _NO_NAMESPACE)]
        if len(over):
            self._give_back(over)

    def free_placements(self) -> Iterator[None]:
        """Begin to free the placements that no row has any more; returns the slices that do.

        The index may change between two slices.
        """
        return self._free_placements(self.placements.begin_marking())

    def _free_placements(self, forgotten: Iterator[None]) -> Iterator[None]:
        yield from forgotten
        # What a row gets from here on is marked as it gets it, whether it lies behind, ahead or is new.
        end = self.rows_used
        for start in range(0, end, ROWS_MARKED_PER_SLICE):
            self.placements.mark(self.placement[start : min(start + ROWS_MARKED_PER_SLICE, end)])
            yield
        yield from self.placements.free_unmarked()

    # ---- holds ---------------------------------------------------------------------------------

    def hold(self, namespace: bytes, keys: bytes, level: int) -> Rows:
        """Hold these keys, SOFT or HARD, once more; returns the rows of the blocks that are there."""
        words = as_words(keys)
        return self._mark(namespace, words, self.holds.add(namespace, words, level))

    def let_go(self, namespace: bytes, keys: bytes, level: int) -> Levels:
        """Take back one hold on each of these keys; returns how they are held now."""
        words = as_words(keys)
        levels = self.holds.remove(namespace, words, level)
        self._mark(namespace, words, levels)
        return levels

    def _mark(self, namespace: bytes, words: Words, levels: Levels) -> Rows:
        rows = self.space(namespace).table.find(words)
        there = rows >= 0
        rows = rows[there]
        self.pinned[rows] = levels[there]
        return rows

    # ---- reading -------------------------------------------------------------------------------

    def owners(self, rows: Rows) -> set[int]:
        """Return the incarnations that hold anything of these rows."""
        numbers = np.unique(self.placement.take(rows)).tolist()
        return {owner.incarnation for number in numbers for owner in self.placements[number].owners}

    def runs_on(self, rows: Rows, incarnation: int) -> Iterator[BlockRun]:
        """Group consecutive rows by namespace, shards and size, naming what one incarnation holds of them."""
        rows = rows[self.placements.held_by(incarnation).take(self.placement.take(rows))]
        for part, space, number in self._groups(rows):
            mask = self.placements.shards_of(number, incarnation)
            yield BlockRun(space.digest, mask, int(self.shard_bytes[part[0]]), self.keys.take(part, axis=0).tobytes())

    def files_on(self, rows: Rows, incarnation: int) -> list[BlockRun]:
        """Group rows, wherever they are, by namespace, shards and size, naming what one incarnation holds of them."""
        rows = rows[self.placements.held_by(incarnation).take(self.placement.take(rows))]
        numbers, back = np.unique(self.placement.take(rows), return_inverse=True)
        masks = [self.placements.shards_of(number, incarnation) for number in numbers.tolist()]
        kinds = np.array([masks.index(mask) for mask in masks], np.int64)[back.ravel()]
        groups, back = np.unique(
            np.stack((self.space_of.take(rows), kinds, self.shard_bytes.take(rows))), axis=1, return_inverse=True
        )
        runs = []
        for at, (number, kind, size) in enumerate(groups.T.tolist()):
            part = rows[back.ravel() == at]
            runs.append(BlockRun(self._by_number[number].digest, masks[kind], size, self.keys[part].tobytes()))
        return runs

    def bytes_on(self, rows: Rows, incarnation: int) -> NDArray[np.int64]:
        """Return, for each row, the payload bytes that one incarnation holds of it."""
        return self._shards_on(self.placement.take(rows), incarnation) * self.shard_bytes.take(rows)

    def shards_on(self, run: BlockRun, incarnation: int) -> int:
        """Return how many of these shards one incarnation holds."""
        space = self.spaces.get(run.namespace)
        rows = space.table.find(as_words(run.keys)) if space is not None else np.empty(0, np.int64)
        numbers, counts = np.unique(self.placement.take(np.unique(rows[rows >= 0])), return_counts=True)
        masks = [self.placements.shards_of(number, incarnation) & run.shards for number in numbers.tolist()]
        return sum(mask.bit_count() * count for mask, count in zip(masks, counts.tolist(), strict=True))

    def file_bytes_on(self, rows: Rows, incarnation: int) -> NDArray[np.int64]:
        """Return, for each row, what its files take of a storage backend."""
        sizes = np.zeros(len(rows), np.int64)
        spaces = self.space_of.take(rows)
        for number in np.unique(spaces).tolist():
            mine = np.flatnonzero(spaces == number)
            sizes[mine] = self._file_sizes(self._by_number[number], rows.take(mine))
        return self._shards_on(self.placement.take(rows), incarnation) * sizes

    def _shards_on(self, placements: NDArray[np.int32], incarnation: int) -> NDArray[np.int64]:
        """Return, for each placement, how many shards one incarnation holds."""
        numbers, back = np.unique(placements, return_inverse=True)
        shards = [self.placements.shards_of(n, incarnation).bit_count() for n in numbers.tolist()]
        return np.array(shards, np.int64)[back.ravel()]

    def _groups(self, rows: Rows) -> Iterator[tuple[Rows, Space, int]]:
        if not len(rows):
            return
        numbers, spaces, sizes = self.placement.take(rows), self.space_of.take(rows), self.shard_bytes.take(rows)
        change = (numbers[1:] != numbers[:-1]) | (spaces[1:] != spaces[:-1]) | (sizes[1:] != sizes[:-1])
        edges = [0, *(np.flatnonzero(change) + 1).tolist(), len(rows)]
        for start, end in pairwise(edges):
            yield rows[start:end], self._by_number[int(spaces[start])], int(numbers[start])

    def coldest(self, incarnation: int, *, leased: bool = False) -> Iterator[Rows]:
        """Yield the rows an incarnation holds, coldest first, slice by slice.

        Those under a lease or held softly come only with ``leased``, and then alone; those held hard
        never do. The index may change between two slices. Empty slices are yielded too, so that the
        caller can stop to do something else.
        """
        position = 0
        while (piece := self.recency.after(position)) is not None:
            rows, position = piece[0].astype(np.int64), piece[1]
            held = self.placements.held_by(incarnation).take(self.placement.take(rows))
            pinned = self.pinned.take(rows)
            spared = (self.leased.take(rows) > 0) | (pinned > 0)
            yield rows[held & (spared == leased) & (pinned < HARD)]
