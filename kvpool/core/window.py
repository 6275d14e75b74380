"""Which neighbours to evict so that a slot of another size fits: the cheapest window of addresses."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvpool.core.addresses import ByAddress
from kvpool.core.allocator import ExtentAllocator
from kvpool.core.slots import Block, Slot

# How many extents a search looks at before it settles for the best window seen.
_STEPS_MAX: Final = 512
# What a byte of the coldest block costs, and how much more one of the hottest.
_COLD_PRICE: Final = 16
_HEAT_PRICE: Final = 64


@dataclass(slots=True)
class WindowSearch:
    """One search for ``size`` bytes in one piece, of holes and blocks that may be evicted.

    ``cold`` are the blocks whose turn it is; ``keep`` may not be evicted; ``oldest`` and ``newest`` are
    the stamps between which a block's heat is told.
    """

    allocator: ExtentAllocator
    slot_at: ByAddress[Slot]
    size: int
    keep: Block | None
    cold: Sequence[Block]
    oldest: int
    newest: int

    def near_cold(self) -> tuple[int, int] | None:
        """Return (start, end) of the cheapest window around the cold blocks, or None if none is long enough."""
        best: tuple[int, int, int] | None = None
        seen: list[tuple[int, int]] = []
        steps = 0
        for slot in [slot for block in self.cold for slot in block.shards.values()]:
            if any(low <= slot.start < high for low, high in seen):
                continue
            low, high = slot.start, slot.start + slot.extent_bytes + self.size
            while low > slot.start - self.size:
                before = self.allocator.before(low)
                if before is None or self._fixed(before):
                    break
                low = before
                steps += 1
            found = self._cheapest(low, high)
            seen.append((low, high))
            if found is not None and (best is None or found < best):
                best = found
            if best is not None and steps > _STEPS_MAX:
                break
        return None if best is None else best[1:]

    def anywhere(self) -> tuple[int, int] | None:
        """Return (start, end) of the cheapest window of the whole segment, in time linear in its slots."""
        best = self._cheapest(0, self.allocator.capacity_bytes)
        return None if best is None else best[1:]

    def _cheapest(self, low: int, high: int) -> tuple[int, int, int] | None:
        """Return (price, start, end) of the cheapest window made of extents that start in [low, high).

        A window costs the bytes of every block in it, more the hotter the block; holes are free.
        """
        slot_at, hole_at, keep, cold = self.slot_at, self.allocator.hole_at, self.keep, self.cold
        size, oldest, age = self.size, self.oldest, max(1, self.newest - self.oldest)
        high = min(high, self.allocator.capacity_bytes)
        best: tuple[int, int, int] | None = None
        window: deque[tuple[int, int]] = deque()
        start = offset = low
        total = price = 0
        while offset < high:
            slot = slot_at.get(offset)
            if slot is None:
                length, cost = hole_at(offset), 0
            else:
                block = slot.block
                length = slot.extent_bytes
                if block.busy or block is keep:
                    window.clear()
                    total = price = 0
                    start = offset = offset + length
                    continue
                heat = 0 if block in cold else _HEAT_PRICE * (block.stamp - oldest) // age
                cost = block.bytes * (_COLD_PRICE + heat)
            window.append((length, cost))
            offset += length
            total += length
            price += cost
            while total - window[0][0] >= size:
                length, cost = window.popleft()
                start += length
                total -= length
                price -= cost
            if total >= size and (best is None or price < best[0]):
                best = (price, start, offset)
        return best

    def _fixed(self, start: int) -> bool:
        slot = self.slot_at.get(start)
        return slot is not None and (slot.block.busy > 0 or slot.block is self.keep)
