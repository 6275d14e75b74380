"""A client's buffers, and the copies between them and a segment: bytes move once, hashed while in cache.

Steps are large enough that the GIL is given up for nearly all of the time, and small enough that what was just copied
is hashed out of the cache.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from typing import Any, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvpool.client_rows import BlockRows, digest64
from kvpool.errors import InvalidArgumentError
from kvpool.model import KEY_BYTES
from kvpool.processes import begin_thread, cpu_count

Bytes = NDArray[np.uint8]
Buffer = Any
"""bytes, bytearray, memoryview, a numpy array: whatever has contiguous bytes; or a uint8 array of any strides,
whose bytes are meant in C order."""

STEP_BYTES = 512 << 10
"""What is copied at once, and then hashed: what was read and what was written are to be in a core's own cache still.

Beside a thread that computes in Python each step may have to wait for the GIL: much less would be slower there.
"""

HOLD_BYTES_MAX = 128 << 10
"""A small block is copied in some ten microseconds without giving up the GIL: beside a thread that computes
in Python, getting it back would take ten times as long."""

PIECES_A_THREAD = 8

PART_BYTES_MIN = 2 << 20
"""Less than this is not worth a thread of its own."""

_BYTE = np.dtype(np.uint8)
_CONTIGUOUS, _WRITEABLE = 0x1, 0x400  # of ``flags.num``: NPY_ARRAY_C_CONTIGUOUS, NPY_ARRAY_WRITEABLE
T = TypeVar("T")


class _GapsError(InvalidArgumentError):
    """An array whose bytes have gaps."""


def as_bytes(buffer: Buffer, field: str, *, writable: bool) -> Bytes:
    """Return a buffer's bytes without a copy. Raises InvalidArgumentError naming ``field``."""
    array: Bytes | None
    try:
        if isinstance(buffer, np.ndarray):
            if buffer.dtype == np.uint8 and buffer.ndim == 1 and buffer.strides == (1,):
                array = buffer
            else:
                array = buffer.reshape(-1).view(np.uint8) if buffer.flags.c_contiguous else None
        else:
            array = np.frombuffer(buffer, np.uint8)
    except (TypeError, ValueError, BufferError) as exc:
        raise InvalidArgumentError(field, f"{type(buffer).__name__} is no buffer of contiguous bytes: {exc}") from exc
    if array is None:
        raise _GapsError(field, "the array's bytes are not contiguous")
    if writable and not array.flags.writeable:
        raise InvalidArgumentError(field, "the buffer is read-only")
    return array


class Blocks:
    """The caller's buffers of one call: ``pieces[i]`` are block i's, one for all its layers or one a layer.

    Pieces are runs of bytes, or, where ``gapped``, arrays of more dimensions, one a layer.
    """

    gapped = False
    rows: BlockRows | None = None
    """The same blocks, where many may be copied at once."""

    def __init__(
        self, blocks: Sequence[Buffer | Sequence[Buffer]], keys: bytes, layers: int, *, writable: bool
    ) -> None:
        """Check and wrap. Raises InvalidArgumentError for buffers that do not fit each other, or the keys."""
        if len(blocks) * KEY_BYTES != len(keys):
            raise InvalidArgumentError("blocks", f"{len(blocks)} buffers for {len(keys) // KEY_BYTES} hashes")
        self.layers = layers
        self._pieces: list[list[Bytes]] | None = None
        if isinstance(blocks, BlockRows) and len(blocks) and blocks.layer_bytes <= STEP_BYTES:
            if len(blocks.layers) != layers or (writable and not blocks.writable):
                problem = f"must be tables that can be written to, one for each of {layers} layers"
                raise InvalidArgumentError("blocks", problem)
            self.rows = blocks
            self.layer_bytes, self.shard_bytes = blocks.layer_bytes, layers * blocks.layer_bytes
            return
        try:
            self._pieces = _runs(blocks, writable=writable)
        except _GapsError:
            self.gapped = True
            self._pieces = [_arrays(block, layers, writable=writable) for block in blocks]
        sizes = {pieces[0].nbytes if len(pieces) == 1 else sum(p.nbytes for p in pieces) for pieces in self.pieces}
        if len(sizes) > 1:
            raise InvalidArgumentError("blocks", f"all blocks of a call must have one size, not {sorted(sizes)[:4]}")
        self.shard_bytes = sizes.pop() if sizes else 0
        if self.pieces and not self.shard_bytes:
            raise InvalidArgumentError("blocks", "must not be empty")
        if self.shard_bytes % layers:
            raise InvalidArgumentError(
                "blocks", f"{self.shard_bytes} bytes cannot be divided into {layers} equal layers"
            )
        self.layer_bytes = self.shard_bytes // layers
        for pieces in self.pieces:
            if len(pieces) != 1 and (len(pieces) != layers or any(p.nbytes != self.layer_bytes for p in pieces)):
                raise InvalidArgumentError(
                    "blocks", f"give one buffer a block, or {layers} (one a layer) of {self.layer_bytes} bytes each"
                )

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.pieces) if self.rows is None else len(self.rows)

    @property
    def pieces(self) -> list[list[Bytes]]:
        """Each block's bytes."""
        if self._pieces is None:
            self._pieces = list(self.rows or ())
        return self._pieces

    @property
    def simple(self) -> bool:
        """Whether each block is one small run with one checksum."""
        return self.layers == 1 and self.layer_bytes <= HOLD_BYTES_MAX and not self.gapped and self.rows is None

    def span(self, first: int, end: int, first_layer: int, end_layer: int) -> Blocks:
        """Return the buffers of some layers of consecutive blocks."""
        part = copy(self)
        part.layers = end_layer - first_layer
        part.shard_bytes = part.layers * self.layer_bytes
        if self.rows is not None:
            part.rows, part._pieces = self.rows[first:end].span(first_layer, end_layer), None
            return part
        part._pieces = self.pieces[first:end]
        if part.layers != self.layers:
            part._pieces = [
                [layer_of(pieces, layer, self.layer_bytes) for layer in range(first_layer, end_layer)]
                for pieces in part.pieces
            ]
        return part

    def some(self, numbers: Sequence[int]) -> Blocks:
        """Return the buffers of some of the blocks."""
        part = copy(self)
        if self.rows is not None:
            part.rows, part._pieces = self.rows.some(numbers), None
        else:
            part._pieces = [self.pieces[number] for number in numbers]
        return part

    def parts(self, keys: bytes, most: int) -> Iterator[tuple[range, bytes, Blocks]]:
        """Yield up to ``most`` consecutive blocks at a time: which they are, their keys (packed), and they."""
        if len(self) <= most:
            yield range(len(self)), keys, self
            return
        for start in range(0, len(self), most):
            part = range(start, min(start + most, len(self)))
            yield part, keys[part.start * KEY_BYTES : part.stop * KEY_BYTES], self.some(part)

    def gathered(self) -> Blocks:
        """Return a copy without gaps."""
        part = copy(self)
        part.gapped, part.rows = False, None
        part._pieces = [[np.empty(self.shard_bytes, np.uint8)] for _ in self.pieces]
        for source, target in zip(self.pieces, part.pieces, strict=True):
            copy_plain(source, target, self.layer_bytes)
        return part


def _runs(blocks: Sequence[Buffer | Sequence[Buffer]], *, writable: bool) -> list[list[Bytes]]:
    wanted = _CONTIGUOUS | _WRITEABLE if writable else _CONTIGUOUS
    return [
        [block]
        if type(block) is np.ndarray
        and block.dtype is _BYTE
        and block.ndim == 1
        and block.flags.num & wanted == wanted
        else [as_bytes(part, "blocks", writable=writable) for part in block]
        if isinstance(block, (list, tuple))
        else [as_bytes(block, "blocks", writable=writable)]
        for block in blocks
    ]


def _arrays(block: Buffer | Sequence[Buffer], layers: int, *, writable: bool) -> list[Bytes]:
    """Return one piece a layer, of any strides; all have more than one dimension."""
    parts: Sequence[Any] = block if isinstance(block, (list, tuple)) else [block]
    pieces: list[Bytes] = []
    for part in parts:
        array: Bytes
        try:
            array = as_bytes(part, "blocks", writable=writable)
        except _GapsError:
            array = part
            if array.dtype != np.uint8 or (writable and not array.flags.writeable):
                raise InvalidArgumentError("blocks", "an array with gaps must be of uint8, and not read-only") from None
        pieces.append(array if array.ndim > 1 else array[:, np.newaxis])
    if len(pieces) == 1 and layers > 1:
        (whole,) = pieces
        if not len(whole) or len(whole) % layers:
            raise InvalidArgumentError("blocks", f"give one array a layer, or one whose first dimension is {layers}")
        each = len(whole) // layers
        pieces = [whole[at : at + each] for at in range(0, len(whole), each)]
    return pieces


def view(array: Any) -> memoryview:
    """Return an array's bytes for the socket layer."""
    return memoryview(array)


def copy_hashed(source: Sequence[Bytes], target: Sequence[Bytes], layer_bytes: int, layers: int) -> list[int]:
    """Copy a shard and return the xxh3-64 of each layer of ``target``'s bytes, as they are in ``source``.

    One side is a single piece (the slot), the other one piece or one a layer.
    """
    digests: list[int] = []
    whole = len(source) == 1 and len(target) == 1
    if whole and layers == 1 and layer_bytes <= HOLD_BYTES_MAX:
        try:  # looking costs small blocks a fiftieth of their time
            view(target[0])[:] = view(source[0])
        except (ValueError, NotImplementedError):
            return _copy_gapped(source, target, layer_bytes, layers)
        return [digest64(target[0])]
    if (not whole or layers == 1) and _gapped(source, target):
        return _copy_gapped(source, target, layer_bytes, layers)
    if whole and layer_bytes <= STEP_BYTES:
        step = max(1, STEP_BYTES // layer_bytes) * layer_bytes
        for start in range(0, layers * layer_bytes, step):
            part = target[0][start : start + step]
            np.copyto(part, source[0][start : start + step])
            digests += [digest64(part[at : at + layer_bytes]) for at in range(0, len(part), layer_bytes)]
        return digests
    for layer in range(layers):
        here = layer_of(source, layer, layer_bytes)
        there = layer_of(target, layer, layer_bytes)
        if layer_bytes <= STEP_BYTES:
            np.copyto(there, here)
            digests.append(digest64(there))
            continue
        digest: Any = xxhash.xxh3_64()
        for start in range(0, layer_bytes, STEP_BYTES):
            part = there[start : start + STEP_BYTES]
            np.copyto(part, here[start : start + STEP_BYTES])
            digest.update(part)
        digests.append(digest.intdigest())
    return digests


def _copy_gapped(source: Sequence[Bytes], target: Sequence[Bytes], layer_bytes: int, layers: int) -> list[int]:
    digests = []
    for layer in range(layers):
        here = layer_of(source, layer, layer_bytes)
        there = layer_of(target, layer, layer_bytes)
        run = scratch(layer_bytes) if there.ndim > 1 else there
        np.copyto(run.reshape(here.shape), here)
        digests.append(digest64(run))
        if run is not there:
            scatter(run, there)
    return digests


_own = threading.local()


def scratch(size: int) -> Bytes:
    """Return the calling thread's own memory, of at least a layer; the next call may return the same."""
    held: Bytes | None = getattr(_own, "bytes", None)
    if held is None or len(held) < size:
        held = _own.bytes = np.empty(size, np.uint8)
    return held[:size]


def scatter(run: Bytes, target: Bytes) -> None:
    """Copy a run of bytes into an array of any strides, in C order."""
    np.copyto(target, run.reshape(target.shape))


def copy_plain(source: Sequence[Bytes], target: Sequence[Bytes], layer_bytes: int) -> None:
    """Copy a shard without hashing it."""
    whole = len(source) == 1 and len(target) == 1
    if whole and len(target[0]) <= HOLD_BYTES_MAX:
        try:  # as above
            view(target[0])[:] = view(source[0])
        except (ValueError, NotImplementedError):
            pass
        else:
            return
    if _gapped(source, target):
        for layer in range(max(len(source), len(target))):
            here, there = layer_of(source, layer, layer_bytes), layer_of(target, layer, layer_bytes)
            if there.ndim > 1:
                scatter(here, there)
            else:
                np.copyto(there.reshape(here.shape), here)
    elif whole:
        np.copyto(target[0], source[0])
    else:
        for layer in range(max(len(source), len(target))):
            np.copyto(layer_of(target, layer, layer_bytes), layer_of(source, layer, layer_bytes))


def _gapped(source: Sequence[Bytes], target: Sequence[Bytes]) -> bool:
    return source[0].ndim > 1 or target[0].ndim > 1


def hash_layers(pieces: Sequence[Bytes], layer_bytes: int, layers: int) -> list[int]:
    """Return the xxh3-64 of each layer."""
    return [digest64(layer_of(pieces, layer, layer_bytes)) for layer in range(layers)]


def layer_of(pieces: Sequence[Bytes], layer: int, layer_bytes: int) -> Bytes:
    """Return one layer of a shard that is in one piece, or in one a layer."""
    if len(pieces) > 1:
        return pieces[layer]
    return pieces[0][layer * layer_bytes : (layer + 1) * layer_bytes]


def layers_of(pieces: Sequence[Bytes], first: int, count: int, layer_bytes: int) -> list[Bytes]:
    """Return some layers of such a shard, in one piece or one a layer."""
    if len(pieces) > 1:
        return list(pieces[first : first + count])
    return [pieces[0][first * layer_bytes : (first + count) * layer_bytes]]


def keys_at(keys: bytes, numbers: Iterable[int]) -> bytes:
    """Return the keys, packed, that have these numbers among ``keys``."""
    return b"".join([keys[number * KEY_BYTES : (number + 1) * KEY_BYTES] for number in numbers])


def pack_digests(digests: Sequence[int]) -> bytes:
    """Return checksums as the wire has them."""
    return struct.pack(f"<{len(digests)}Q", *digests)


def unpack_digests(data: memoryview | bytes) -> tuple[int, ...]:
    """Return checksums from the wire."""
    return struct.unpack(f"<{len(data) // 8}Q", data)


class CopyThreads:
    """The client's threads for moving bytes, made when first needed."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.streams = max(1, min(threads, cpu_count() // 2))
        """Transfers from one host at once: each keeps a core busy here, as does each sender, which may be here too."""
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._closed = False
        self._pid = 0

    def run(
        self, items: Sequence[T], item_bytes: int, work: Callable[[Sequence[T]], None], most: int | None = None
    ) -> None:
        """Run ``work`` over all items, cut into up to ``most`` or ``threads`` parts; the caller's thread takes one."""
        threads = min(self.threads, most or self.threads)
        parts = min(threads, len(items), max(1, len(items) * item_bytes // PART_BYTES_MIN))
        if parts <= 1:
            work(items)
            return
        # In small pieces, taken in turn: a thread that starts late, or loses its core, takes fewer.
        size = max(1, len(items) // (parts * PIECES_A_THREAD))
        pieces = iter([items[at : at + size] for at in range(0, len(items), size)])

        helping = 0
        changed = threading.Condition()
        failed: list[BaseException] = []

        def help_out() -> None:
            nonlocal helping
            with changed:
                helping += 1
            try:
                for piece in pieces:  # advancing an iterator over a list is atomic
                    work(piece)
            except BaseException as exc:  # whatever it is, it is the caller's
                failed.append(exc)
            finally:
                with changed:
                    helping -= 1
                    changed.notify()

        def settle() -> None:
            for _ in pieces:
                pass
            with changed:
                changed.wait_for(lambda: not helping)

        try:
            with contextlib.suppress(RuntimeError):  # no thread can be started, or none any more: the caller does all
                executor = self.executor()
                for _ in range(parts - 1):
                    executor.submit(help_out)
            for piece in pieces:
                work(piece)
        finally:
            # Nobody may leave while a thread still writes to the caller's buffers. One that has not begun, busy with
            # another's work or not even started, finds nothing to do when it does.
            _to_its_end(settle)
        if failed:
            raise failed[0]

    def executor(self) -> ThreadPoolExecutor:
        """Return the threads; a forked child makes its own. Raises RuntimeError once closed."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the threads were ended")
            if self._executor is None or self._pid != os.getpid():
                self._executor = ThreadPoolExecutor(max(1, self.threads), "kvpool-copy", begin_thread)
                self._pid = os.getpid()
            return self._executor

    def close(self) -> None:
        """End the threads once they are idle; who comes later does without."""
        with self._lock:
            self._closed = True
            if self._executor is not None:
                self._executor.shutdown(wait=False)
                self._executor = None


def _to_its_end(wait: Callable[[], None]) -> None:
    """Wait, whatever is raised by signals meanwhile; raise it then."""
    interrupted: BaseException | None = None
    while True:
        try:
            wait()
        except BaseException as exc:  # KeyboardInterrupt, or what else a handler raises
            interrupted = exc
        else:
            break
    if interrupted is not None:
        raise interrupted
