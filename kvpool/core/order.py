"""A segment's blocks by their keys, and in the order of their last use: nothing takes longer for there being many.

A dict that grows moves all that it has at once, tens of milliseconds for some hundred thousand blocks; of many small
ones each moves little. The order is a ring through the blocks themselves, and has nothing that grows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import islice
from typing import Final

from kvpool.core.slots import Block

PARTS: Final = 256
"""By the last byte of a key, which is a hash's, and not by Python's hash: that is another one in every process."""

_SAMPLES_A_PART: Final = 16
_STEP: Final = 1024


class BlockOrder:
    """Blocks by key, coldest first. Those that are set ``aside`` are found, and have no place in the order."""

    __slots__ = ("_count", "_ring", "parts")

    def __init__(self) -> None:
        self.parts: list[dict[bytes, Block]] = [{} for _ in range(PARTS)]
        self._count = 0
        self._ring = ring = Block(b"")  # stands between the hottest and the coldest
        ring.newer = ring.older = ring

    def __len__(self) -> int:
        return self._count

    def get(self, key: bytes) -> Block | None:
        """Return the block of a key."""
        return self.parts[key[-1]].get(key)

    def add(self, block: Block) -> None:
        """Take a block whose key is new here, as the hottest."""
        key = block.key
        self.parts[key[-1]][key] = block
        self._count += 1
        self._link(block)

    def remove(self, block: Block) -> None:
        """Forget a block."""
        key = block.key
        del self.parts[key[-1]][key]
        self._count -= 1
        if block.newer is not None:
            self.aside(block)

    def rekey(self, block: Block, key: bytes) -> None:
        """Give a block that is in the order a key that is new here, and make it the hottest."""
        parts, before = self.parts, block.key
        del parts[before[-1]][before]
        parts[key[-1]][key] = block
        block.key = key
        self.touch(block)

    def touch(self, block: Block) -> None:
        """Make a block the hottest, unless it is set aside."""
        newer, older, ring = block.newer, block.older, self._ring
        if newer is None or older is None or newer is ring:
            return
        older.newer, newer.older = newer, older
        hottest = ring.older
        assert hottest is not None  # noqa: S101 -- a ring is closed
        hottest.newer, block.older = block, hottest
        block.newer, ring.older = ring, block

    def aside(self, block: Block) -> None:
        """Take a block out of the order, until ``back``."""
        newer, older = block.newer, block.older
        if newer is not None and older is not None:
            older.newer, newer.older = newer, older
            block.newer = block.older = None

    def back(self, block: Block) -> None:
        """Give a block that was set aside a place in the order, as the hottest."""
        if block.newer is None:
            self._link(block)

    @property
    def coldest(self) -> Block | None:
        """The first in the order."""
        block = self._ring.newer
        return None if block is self._ring else block

    def __iter__(self) -> Iterator[Block]:
        """Yield the blocks in their order, which must not change meanwhile but at what was yielded last."""
        ring = self._ring
        block = ring.newer
        while block is not None and block is not ring:
            following = block.newer
            yield block
            block = following

    def values(self) -> Iterator[Block]:
        """Yield all blocks, those set aside too, in no order; they must not change meanwhile."""
        return (block for part in self.parts for block in part.values())

    def walk(self) -> Iterator[list[Block]]:
        """Yield all blocks a few thousand at a time, colder ones first; they may change whenever it yields.

        Many of the lists are empty. What is there all the while is in one of them, and a block that is not there any
        more may be, without slots or with another key.
        """
        samples: list[int] = []
        passed = 0
        for part in self.parts:
            some = islice(part.values(), 0, None, max(1, len(part) // _SAMPLES_A_PART))
            samples += [block.stamp for block in some]
            passed += len(part)
            if passed >= _STEP:
                passed = 0
                yield []
        bounds = sorted(samples)[::_SAMPLES_A_PART]
        colder: list[list[Block]] = [[] for _ in range(len(bounds) + 1)]
        for part in self.parts:
            for block in list(part.values()):
                colder[bisect_left(bounds, block.stamp)].append(block)
                passed += 1
                if passed >= _STEP:
                    passed = 0
                    yield []
        for between in colder:
            between.sort(key=_stamp)
            for start in range(0, len(between), _STEP):
                yield between[start : start + _STEP]

    def _link(self, block: Block) -> None:
        ring = self._ring
        hottest = ring.older
        assert hottest is not None  # noqa: S101 -- a ring is closed
        hottest.newer, block.older = block, hottest
        block.newer, ring.older = ring, block


def _stamp(block: Block) -> int:
    return block.stamp
