"""Who waits for which items of a segment: readers of a transfer that has not written them yet.

Pure. A waiter is registered with one item at a time, the first it still lacks: whatever arrives costs a look-up, and
each waiter one step for every item it waits for. The server answers those that ``arrived`` returns, and has
the timers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from kvpool.core.allocator import require
from kvpool.core.slots import Slot
from kvpool.errors import OverloadedError

WAITERS_MAX: Final = 4096
"""Of all connections."""

WAITERS_OF_ONE_MAX: Final = 64
"""Of one connection."""

ITEMS_MAX: Final = 1 << 21
"""Items that all waiters together wait for."""

Item = tuple[bytes, int]
"""Namespace digest and key of a block, and a shard."""


class Waiter:
    """Waits until all ``items`` have layer ``first_layer`` for those who name ``transfer``."""

    __slots__ = ("at", "first_layer", "items", "owner", "transfer")

    def __init__(self, owner: int, items: Sequence[Item], first_layer: int, transfer: int) -> None:
        self.owner = owner
        self.items = items
        self.first_layer = first_layer
        self.transfer = transfer
        self.at = 0  # the item it is registered with; those before it had arrived when it was looked at


class Waits:
    """All waiters of a node; items need not exist."""

    def __init__(self, layers_ready: Callable[[bytes, int, int], int]) -> None:
        """``layers_ready(block_key, shard, transfer)``: how many leading layers that transfer's readers may read."""
        self._layers_ready = layers_ready
        self._at: dict[Item, dict[Waiter, None]] = {}
        self._of: dict[int, set[Waiter]] = {}
        self._waiters = 0
        self._items = 0

    def __repr__(self) -> str:
        return f"<Waits {self._waiters} for {self._items} items>"

    def __len__(self) -> int:
        """Return how many wait."""
        return self._waiters

    def add(self, waiter: Waiter) -> bool:
        """Return whether there is nothing to wait for; otherwise the waiter is registered. Raises OverloadedError."""
        if not self._advance(waiter):
            return True
        mine = self._of.get(waiter.owner, ())
        if len(mine) >= WAITERS_OF_ONE_MAX:
            raise OverloadedError(f"this connection has {WAITERS_OF_ONE_MAX} requests that wait")
        if self._waiters >= WAITERS_MAX or self._items + len(waiter.items) > ITEMS_MAX:
            raise OverloadedError(f"{self._waiters} requests wait for {self._items} items")
        self._of.setdefault(waiter.owner, set()).add(waiter)
        self._waiters += 1
        self._items += len(waiter.items)
        self._register(waiter)
        return False

    def arrived(self, slots: Iterable[Slot]) -> list[Waiter]:
        """Return who has nothing left to wait for, now that these have more layers; they are forgotten."""
        if not self._at:
            return []
        ended = []
        for slot in slots:
            here = self._at.pop((slot.block.key, slot.shard), None)
            for waiter in here or ():
                if self._advance(waiter):
                    self._register(waiter)
                else:
                    self._forget(waiter)
                    ended.append(waiter)
        return ended

    def remove(self, waiter: Waiter) -> None:
        """Forget a waiter; one that is forgotten already is ignored."""
        if waiter in self._of.get(waiter.owner, ()):
            item = waiter.items[waiter.at]
            here = self._at[item]
            del here[waiter]
            if not here:
                del self._at[item]
            self._forget(waiter)

    def cancel(self, owner: int) -> None:
        """Forget an owner's waiters."""
        for waiter in list(self._of.get(owner, ())):
            self.remove(waiter)

    def _advance(self, waiter: Waiter) -> bool:
        """Go to the next item that is not there; False when all are."""
        items, ready = waiter.items, self._layers_ready
        first_layer, transfer = waiter.first_layer, waiter.transfer
        for at in range(waiter.at, len(items)):
            if ready(*items[at], transfer) <= first_layer:
                waiter.at = at
                return True
        waiter.at = 0
        return False

    def _register(self, waiter: Waiter) -> None:
        self._at.setdefault(waiter.items[waiter.at], {})[waiter] = None

    def _forget(self, waiter: Waiter) -> None:
        mine = self._of[waiter.owner]
        mine.discard(waiter)
        if not mine:
            del self._of[waiter.owner]
        self._waiters -= 1
        self._items -= len(waiter.items)

    def check(self) -> None:
        """Raise AssertionError unless the counts and both indexes agree."""
        everybody = [waiter for mine in self._of.values() for waiter in mine]
        require(len(everybody) == self._waiters == sum(map(len, self._at.values())), "waiters are counted")
        require(self._items == sum(len(waiter.items) for waiter in everybody), "items are counted")
        require(all(w in self._at[w.items[w.at]] for w in everybody), "a waiter is found by the item it lacks")
        require(all(self._of.values()) and all(self._at.values()), "nothing empty is kept")
