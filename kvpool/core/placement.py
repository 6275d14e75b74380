"""Who holds which shards of a block, as small integers.

"Node 3 has all of it in DRAM" is true of a hundred thousand blocks at once: each distinct placement is
kept once and blocks carry its number. A node's death then changes a few placements, not its blocks.

Nobody counts the blocks of a placement. When there are many, those that blocks carry are marked, and the others freed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NOWHERE = 0

CROWDED_FROM = 1024
"""So many placements are kept without asking whether blocks still carry them."""

_STEPS_PER_SLICE = 1024
_FREED_PER_SLICE = 256


class Owner(NamedTuple):
    """Some shards (bit mask) of a block, held by one node incarnation in one tier."""

    incarnation: int
    tier: str
    shards: int


class Placement(NamedTuple):
    """All owners of a block; ``full`` is the mask of a whole block in its namespace."""

    full: int
    owners: tuple[Owner, ...]


_Step = tuple[int, int, Owner, bool]


class PlacementTable:
    """Interned placements; number 0 is "nowhere".

    Columns by placement number: ``whole`` (all shards at live owners), ``complete`` (all shards,
    whoever has them), ``copies`` (shards counted over all owners).
    """

    def __init__(self) -> None:
        self._numbers: dict[Placement, int] = {}
        self._placements: list[Placement | None] = [Placement(0, ())]
        self._free: list[int] = []
        self._steps: dict[_Step, int] = {}
        self._live: set[int] = set()
        self._held: dict[int, NDArray[np.bool_]] = {}
        self._none_held: NDArray[np.bool_] = np.zeros(16, bool)
        self._marked: NDArray[np.bool_] = np.zeros(16, bool)  # carried by a block since marking began
        self._marking = False
        self._crowded_at = CROWDED_FROM
        self.whole: NDArray[np.bool_] = np.zeros(16, bool)
        self.complete: NDArray[np.bool_] = np.zeros(16, bool)
        self.copies: NDArray[np.int64] = np.zeros(16, np.int64)

    def __len__(self) -> int:
        """Return the size of the number space: every number is below it."""
        return len(self._placements)

    def __getitem__(self, number: int) -> Placement:
        """Return a placement by its number."""
        placement = self._placements[number]
        if placement is None:
            raise KeyError(number)
        return placement

    def added(self, numbers: NDArray[np.int32], full: int, owner: Owner) -> NDArray[np.int32]:
        """Return the placements after ``owner`` got these shards."""
        return self._stepped(numbers, full, owner, adding=True)

    def removed(self, numbers: NDArray[np.int32], owner: Owner) -> NDArray[np.int32]:
        """Return the placements after ``owner`` lost these shards."""
        return self._stepped(numbers, 0, owner, adding=False)

    def shards_of(self, number: int, incarnation: int) -> int:
        """Return the mask of shards that one incarnation has, over its tiers."""
        mask = 0
        for owner in self[number].owners:
            if owner.incarnation == incarnation:
                mask |= owner.shards
        return mask

    def held_by(self, incarnation: int) -> NDArray[np.bool_]:
        """Return, for each placement number, whether this incarnation is an owner (do not write to it)."""
        held = self._held.get(incarnation)
        return held if held is not None else self._none_held

    def set_live(self, incarnation: int, *, live: bool) -> None:
        """Let lookups count on an incarnation, or not."""
        if live == (incarnation in self._live):
            return
        if live:
            self._live.add(incarnation)
        else:
            self._live.discard(incarnation)
        for number in np.flatnonzero(self.held_by(incarnation)).tolist():
            self._judge(number)

    def is_live(self, incarnation: int) -> bool:
        """Return whether lookups count on this incarnation."""
        return incarnation in self._live

    def purge(self, incarnation: int) -> None:
        """Forget every placement that names this incarnation; no block may carry one any more."""
        self._live.discard(incarnation)
        numbers = np.flatnonzero(self.held_by(incarnation))
        self._release(numbers)
        self._held.pop(incarnation, None)
        dead = set(numbers.tolist())
        self._steps = {
            step: to
            for step, to in self._steps.items()
            if step[0] not in dead and to not in dead and step[2].incarnation != incarnation
        }

    # ---- placements that no block carries ------------------------------------------------------

    @property
    def crowded(self) -> bool:
        """Whether it is time to mark: twice as many placements, or many more steps, than the last time left."""
        many = len(self._numbers) >= self._crowded_at or len(self._steps) >= 4 * self._crowded_at
        return many and not self._marking

    def begin_marking(self) -> Iterator[None]:
        """Mark what blocks get from now on; returns the slices that forget the steps known so far.

        Call ``mark`` with the numbers of all blocks, then ``free_unmarked``; others may change blocks in between.
        """
        self._marking = True
        self._marked[:] = False
        # Steps are marked when they are taken first. One that is known already would lead to a number unseen.
        steps, self._steps = self._steps, {}
        return _emptied(steps)

    def mark(self, numbers: NDArray[np.int32]) -> None:
        """Keep these."""
        self._marked[numbers] = True

    def free_unmarked(self) -> Iterator[None]:
        """Free, slice by slice, every number that was not marked."""
        for start in range(NOWHERE + 1, len(self), _FREED_PER_SLICE):
            part = slice(start, min(start + _FREED_PER_SLICE, len(self)))
            unmarked = (np.flatnonzero(~self._marked[part]) + start).tolist()
            self._release(np.array([n for n in unmarked if self._placements[n] is not None], np.int64))
            yield
        self._marking = False
        self._crowded_at = max(CROWDED_FROM, 2 * len(self._numbers))

    def _release(self, numbers: NDArray[np.int64]) -> None:
        """Give numbers to others; no block may carry one, and no step lead from or to one."""
        for number in numbers.tolist():
            del self._numbers[self[number]]
            self._placements[number] = None
            self._free.append(number)
        for held in self._held.values():
            held[numbers] = False

    def _stepped(self, numbers: NDArray[np.int32], full: int, owner: Owner, *, adding: bool) -> NDArray[np.int32]:
        if not len(numbers):
            return numbers
        first = int(numbers[0])
        if (numbers == first).all():
            return np.full(len(numbers), self._step(first, full, owner, adding=adding), np.int32)
        befores, back = np.unique(numbers, return_inverse=True)
        afters = [self._step(int(n), full, owner, adding=adding) for n in befores]
        return np.array(afters, np.int32)[back.ravel()]

    def _step(self, number: int, full: int, owner: Owner, *, adding: bool) -> int:
        step = (number, full, owner, adding)
        after = self._steps.get(step)
        if after is None:
            after = self._steps[step] = self._intern(_changed(self[number], full, owner, adding=adding))
            self._marked[number] = self._marked[after] = True
        return after

    def _intern(self, placement: Placement) -> int:
        if not placement.owners:
            return NOWHERE
        number = self._numbers.get(placement)
        if number is None:
            if self._free:
                number = self._free.pop()
                self._placements[number] = placement
            else:
                number = len(self._placements)
                self._placements.append(placement)
            self._numbers[placement] = number
            if number >= len(self.whole):
                self.whole = np.concatenate((self.whole, np.zeros_like(self.whole)))
                self.complete = np.concatenate((self.complete, np.zeros_like(self.complete)))
                self.copies = np.concatenate((self.copies, np.zeros_like(self.copies)))
                self._marked = np.concatenate((self._marked, np.zeros_like(self._marked)))
                self._none_held = np.zeros_like(self.whole)
                self._held = {i: np.concatenate((h, np.zeros_like(h))) for i, h in self._held.items()}
            for owner in placement.owners:
                self._held.setdefault(owner.incarnation, np.zeros_like(self.whole))[number] = True
            self._judge(number)
        return number

    def _judge(self, number: int) -> None:
        placement = self[number]
        live = everywhere = copies = 0
        for owner in placement.owners:
            everywhere |= owner.shards
            copies += owner.shards.bit_count()
            if owner.incarnation in self._live:
                live |= owner.shards
        self.whole[number] = live == placement.full != 0
        self.complete[number] = everywhere == placement.full != 0
        self.copies[number] = copies


def _emptied(steps: dict[_Step, int]) -> Iterator[None]:
    while steps:
        for _ in range(min(len(steps), _STEPS_PER_SLICE)):
            steps.popitem()
        yield


def _changed(before: Placement, full: int, change: Owner, *, adding: bool) -> Placement:
    owners, seen = [], False
    for owner in before.owners:
        if owner[:2] != change[:2]:
            owners.append(owner)
            continue
        seen = True
        shards = owner.shards | change.shards if adding else owner.shards & ~change.shards
        if shards:
            owners.append(owner._replace(shards=shards))
    if adding and not seen:
        owners.append(change)
    return Placement(full if adding else before.full, tuple(sorted(owners)))
