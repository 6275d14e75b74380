"""Where slots lie: a contiguous allocator over one range of bytes.

Best fit without slabs, so that any mix of sizes shares the segment and one size alone fills it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import pairwise

from kvpool.core.addresses import ByAddress
from kvpool.errors import InvalidArgumentError

UNIT_BYTES = 512
"""Everything is allocated in multiples of this."""


def round_up(size: int, unit: int) -> int:
    """Return the smallest multiple of ``unit`` that holds ``size``."""
    return -(-size // unit) * unit


def require(holds: bool, invariant: str) -> None:
    """Raise AssertionError naming an invariant that does not hold."""
    if not holds:
        raise AssertionError(f"does not hold: {invariant}")


class ExtentAllocator:
    """Free and used extents that tile ``[0, capacity_bytes)``.

    An exact fit is O(1); a split or a coalescing adds a binary search among the distinct free sizes.
    """

    __slots__ = ("_bins", "_free", "_sizes", "_starts", "_unit", "_used", "capacity_bytes", "used_bytes")

    def __init__(self, capacity_bytes: int, unit: int = UNIT_BYTES) -> None:
        """Raise InvalidArgumentError if not even one unit fits."""
        if unit < 1:
            raise InvalidArgumentError("unit", f"must be at least 1, not {unit}")
        capacity = capacity_bytes // unit * unit
        if capacity < unit:
            raise InvalidArgumentError("capacity_bytes", f"must be at least {unit}, not {capacity_bytes}")
        self._unit = unit
        self.capacity_bytes = capacity
        self.used_bytes = 0
        self._used = ByAddress[int](capacity)
        self._free = ByAddress[int](capacity)
        # Of every extent, free or used: its end leads to its start, so that neighbours are one step away.
        self._starts = ByAddress[int](capacity)
        self._free[0], self._starts[capacity] = capacity, 0
        self._bins: dict[int, set[int]] = {capacity: {0}}
        self._sizes: list[int] = [capacity]

    def __repr__(self) -> str:
        """Return what a failing test wants to see."""
        return f"<ExtentAllocator {self.used_bytes}/{self.capacity_bytes} used, {len(self._free)} holes>"

    @property
    def free_bytes(self) -> int:
        """Bytes in all holes together."""
        return self.capacity_bytes - self.used_bytes

    @property
    def largest_free(self) -> int:
        """Bytes of the largest hole."""
        return self._sizes[-1] if self._sizes else 0

    def allocate(self, size: int) -> int | None:
        """Return the offset of ``size`` bytes (rounded up to the unit), or None if no hole is large enough."""
        unit = self._unit
        if size % unit or size <= 0:
            if size <= 0:
                raise InvalidArgumentError("size", f"must be at least 1, not {size}")
            size = round_up(size, unit)
        sizes = self._sizes
        if not sizes or sizes[-1] < size:
            return None
        exact = self._bins.get(size)
        if exact is not None:
            offset = exact.pop()
            if not exact:
                self._drop_bin(size)
            del self._free[offset]
        else:
            hole = sizes[bisect_left(sizes, size)]
            fits = self._bins[hole]
            offset = fits.pop()
            if not fits:
                self._drop_bin(hole)
            del self._free[offset]
            self._starts[offset + size] = offset
            self._add_hole(offset + size, hole - size)
        self._used[offset] = size
        self.used_bytes += size
        return offset

    def free(self, offset: int) -> None:
        """Give an allocated extent back; holes that touch become one. KeyError if it is not allocated."""
        size = self._used.pop(offset)
        self.used_bytes -= size
        end = offset + size
        right = self._free.get(end)
        if right is not None:
            self._remove_hole(end, right)
            del self._starts[end]
            size += right
        left = self._starts.get(offset)
        if left is not None and left in self._free:
            left_size = self._free[left]
            self._remove_hole(left, left_size)
            del self._starts[offset]
            offset = left
            size += left_size
        self._add_hole(offset, size)

    def size_of(self, offset: int) -> int:
        """Return the bytes of the allocated extent at ``offset``. KeyError if there is none."""
        return self._used[offset]

    def hole_at(self, offset: int) -> int:
        """Return the bytes of the hole that starts at ``offset``, 0 if there is none."""
        return self._free.get(offset) or 0

    def span_if_freed(self, offset: int) -> int:
        """Return the bytes of the hole there would be if the extent at ``offset`` were freed."""
        size = self._used[offset]
        before = self._starts.get(offset)
        left = 0 if before is None else self.hole_at(before)
        return left + size + self.hole_at(offset + size)

    def before(self, offset: int) -> int | None:
        """Return the start of the extent, free or used, that ends at ``offset``."""
        return self._starts.get(offset)

    def extents(self) -> Iterator[tuple[int, int, bool]]:
        """Yield (offset, bytes, used) of every extent in address order: for tests and rare, slow paths."""
        offset = 0
        while offset < self.capacity_bytes:
            used = self._used.get(offset)
            size = self._free[offset] if used is None else used
            yield offset, size, used is not None
            offset += size

    def check(self) -> None:
        """Raise AssertionError unless extents tile the range and every index agrees with them."""
        extents = list(self.extents())
        holes = {offset: size for offset, size, used in extents if not used}
        require(sum(size for _, size, _ in extents) == self.capacity_bytes, "used + free = capacity")
        require(len(extents) == len(self._used) + len(self._free), "no extent outside the tiling")
        require(holes == dict(self._free.items()), "every hole is known")
        ends = {offset + size: offset for offset, size, _ in extents}
        require(dict(self._starts.items()) == ends, "every end is known")
        require(sum(size for _, size in self._used.items()) == self.used_bytes, "used bytes are counted")
        require(all(a[2] or b[2] for a, b in pairwise(extents)), "holes that touch are one")
        require(self._sizes == sorted(self._bins) == sorted(set(holes.values())), "every size of a hole is known")
        require({o: s for s, offsets in self._bins.items() for o in offsets} == holes, "every hole is in its bin")

    def _add_hole(self, offset: int, size: int) -> None:
        self._free[offset] = size
        self._starts[offset + size] = offset
        same = self._bins.get(size)
        if same is None:
            self._bins[size] = {offset}
            insort(self._sizes, size)
        else:
            same.add(offset)

    def _remove_hole(self, offset: int, size: int) -> None:
        del self._free[offset]
        same = self._bins[size]
        same.discard(offset)
        if not same:
            self._drop_bin(size)

    def _drop_bin(self, size: int) -> None:
        del self._bins[size]
        del self._sizes[bisect_left(self._sizes, size)]
