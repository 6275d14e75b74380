"""Blocks that are rows of one table a layer, as engines hold them: copied one layer of many blocks at a time.

A block of layers is small pieces. One call for each of them would take longer than their bytes, and give up the
GIL as often; one layer of blocks whose slots follow each other at equal distances is a single strided copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvpool.errors import InvalidArgumentError

if TYPE_CHECKING:
    from kvpool.client_bytes import CopyThreads

Bytes = NDArray[np.uint8]

RUN_BYTES = 1 << 20
"""Of a layer, about, copied in one call, and hashed thereafter: threads that copy less are in each other's way."""

UNIT_BYTES = 4 << 20
"""What a thread takes at a time at most, some layers of a run of blocks."""

UNITS = 8
"""Into so many the whole is cut where that leaves more than a run for each: all threads are to have something."""

digest64: Callable[[Any], int] = xxhash.xxh3_64_intdigest
"""One-shot xxh3-64 of a buffer; typed for arrays, which have the buffer protocol."""


class BlockRows(Sequence[list[Bytes]]):
    """Block i is row ``numbers[i]`` of each of ``layers``, uint8 tables [rows, bytes] without gaps within a row."""

    def __init__(self, layers: Sequence[Bytes], numbers: Sequence[int]) -> None:
        """Raises InvalidArgumentError for tables that do not fit each other, or rows that they lack."""
        shapes = {layer.shape[1:] for layer in layers}
        if len(shapes) != 1 or any(t.dtype != np.uint8 or t.ndim != 2 or t.strides[1] != 1 for t in layers):
            raise InvalidArgumentError("blocks", f"layers must be uint8 tables of equal rows, not {sorted(shapes)}")
        self.layer_bytes: int = shapes.pop()[0]
        if not self.layer_bytes:
            raise InvalidArgumentError("blocks", "must not be empty")
        self.layers = layers
        self.numbers = np.asarray(numbers, np.intp)
        rows = min(len(layer) for layer in layers)
        if self.numbers.ndim != 1 or not ((self.numbers >= 0) & (self.numbers < rows)).all():
            raise InvalidArgumentError("blocks", f"rows must be from 0 to {rows - 1}")

    @property
    def writable(self) -> bool:
        """Whether blocks can be filled."""
        return all(layer.flags.writeable for layer in self.layers)

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.numbers)

    @overload
    def __getitem__(self, at: int) -> list[Bytes]: ...
    @overload
    def __getitem__(self, at: slice) -> BlockRows: ...
    def __getitem__(self, at: int | slice) -> list[Bytes] | BlockRows:
        """Return a block's bytes layer by layer, or some of the blocks."""
        if isinstance(at, slice):
            return self._with(self.layers, self.numbers[at])
        number = self.numbers[at]
        return [layer[number] for layer in self.layers]

    def __iter__(self) -> Iterator[list[Bytes]]:
        """Yield each block's bytes layer by layer."""
        return ([layer[number] for layer in self.layers] for number in self.numbers.tolist())

    def some(self, blocks: Sequence[int]) -> BlockRows:
        """Return some of the blocks."""
        return self._with(self.layers, self.numbers[list(blocks)])

    def span(self, first_layer: int, end_layer: int) -> BlockRows:
        """Return some of the layers."""
        return self._with(self.layers[first_layer:end_layer], self.numbers)

    def _with(self, layers: Sequence[Bytes], numbers: NDArray[np.intp]) -> BlockRows:
        part = copy(self)
        part.layers, part.numbers = layers, numbers
        return part


def rows_in(
    memory: memoryview, rows: BlockRows, items: Sequence[tuple[int, int]], copies: CopyThreads
) -> list[list[int]]:
    """Copy into ``memory``: (number of the block, offset) for each; returns each one's checksums, layer by layer."""
    job = _RowCopy(memory, rows, items)
    digests = [[0] * len(rows.layers) for _ in items]

    def work(units: Sequence[_Unit]) -> None:
        for unit in units:
            for layer, found in enumerate(job.into(unit), unit.layer):
                for number, digest in enumerate(found, unit.first):
                    digests[number][layer] = digest

    copies.run(job.units, job.unit_bytes, work)
    return digests


def rows_out(
    memory: memoryview,
    rows: BlockRows,
    items: Sequence[tuple[int, int, int, int]],
    checksums: Sequence[int] | None,
    copies: CopyThreads,
    reasons: list[str],
) -> None:
    """Copy from ``memory``: (number of the block, offset, first and end of its checksums) for each.

    Sets the ``reasons`` of these blocks, "" or "corrupt"; without checksums nothing is verified.
    """
    job = _RowCopy(memory, rows, [(number, offset) for number, offset, _, _ in items])
    wrong: set[int] = set()

    def work(units: Sequence[_Unit]) -> None:
        for unit in units:
            found = job.out(unit, verify=checksums is not None)
            if checksums is None:
                continue
            firsts = [first for _, _, first, _ in items[unit.first : unit.end]]
            for layer, digests in enumerate(found, unit.layer):
                expected = [checksums[first + layer] for first in firsts]
                if digests != expected:
                    pairs = enumerate(zip(digests, expected, strict=True), unit.first)
                    wrong.update(item for item, (digest, right) in pairs if digest != right)

    copies.run(job.units, job.unit_bytes, work)
    for item, (number, _, _, _) in enumerate(items):
        reasons[number] = "corrupt" if item in wrong else ""


class _Unit(NamedTuple):
    """Layers from ``layer`` on, before ``end_layer``, of the items from number ``first`` on, before ``end``."""

    first: int
    end: int
    layer: int
    end_layer: int


class _RowCopy:
    """Copies between rows and slots, in units that threads may take in any order."""

    def __init__(self, memory: memoryview, rows: BlockRows, items: Sequence[tuple[int, int]]) -> None:
        """``items``: (number of the block, offset of its first layer in ``memory``), the layers behind each other."""
        self._memory = memory
        self._rows = rows
        self._offsets = [offset for _, offset in items]
        self._numbers = rows.numbers[[number for number, _ in items]]
        size, layers = rows.layer_bytes, len(rows.layers)
        unit_bytes = min(UNIT_BYTES, max(RUN_BYTES, len(items) * layers * size // UNITS))
        self.units: list[_Unit] = []
        for first, end in _runs(self._offsets, max(1, RUN_BYTES // size)):
            each = max(1, unit_bytes // (size * (end - first)))
            self.units += [_Unit(first, end, at, min(at + each, layers)) for at in range(0, layers, each)]
        self.unit_bytes = len(items) * layers * size // max(1, len(self.units))

    def out(self, unit: _Unit, *, verify: bool) -> list[list[int]]:
        """Fill rows; returns for each layer the xxh3-64 of each item, nothing unless ``verify``."""
        numbers, digests = self._numbers[unit.first : unit.end], []
        where = _where(numbers)
        for layer, slots in self._slots(unit):
            layer[where] = slots
            if verify:
                rows = layer[where] if isinstance(where, slice) else [layer[number] for number in numbers.tolist()]
                digests.append(list(map(digest64, rows)))
        return digests

    def into(self, unit: _Unit) -> list[list[int]]:
        """Fill slots; returns for each layer the xxh3-64 of each item."""
        where, digests = _where(self._numbers[unit.first : unit.end]), []
        for layer, slots in self._slots(unit):
            np.copyto(slots, layer[where])
            digests.append(list(map(digest64, slots)))
        return digests

    def _slots(self, unit: _Unit) -> Iterator[tuple[Bytes, Bytes]]:
        """Yield each layer's table, and its bytes in the items' slots. Raises ValueError outside of the memory."""
        size, count = self._rows.layer_bytes, unit.end - unit.first
        start = self._offsets[unit.first]
        step = self._offsets[unit.first + 1] - start if count > 1 else size
        for number in range(unit.layer, unit.end_layer):
            at = start + number * size
            slots: Bytes = np.ndarray((count, size), np.uint8, self._memory, at, (step, 1))
            yield self._rows.layers[number], slots


def _runs(offsets: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of runs of offsets at equal distances, of about ``most`` and at most a quarter more."""
    first = 0
    for at in range(1, len(offsets) + 1):
        if at < len(offsets) and (
            at == first + 1 or offsets[at] - offsets[at - 1] == offsets[first + 1] - offsets[first]
        ):
            continue
        pieces = -(-(at - first) // (most + most // 4))
        step = -(-(at - first) // pieces)
        for begin in range(first, at, step):
            yield begin, min(begin + step, at)
        first = at


def _where(numbers: NDArray[np.intp]) -> slice | NDArray[np.intp]:
    """Return what indexes these rows of a table: a slice of those at equal distances, which copies nothing."""
    first, last = int(numbers[0]), int(numbers[-1])
    if len(numbers) == 1:
        return slice(first, first + 1)
    step = int(numbers[1]) - first
    if not step or (np.diff(numbers) != step).any():
        return numbers
    end = last + step
    return slice(first, end if end >= 0 else None, step)
