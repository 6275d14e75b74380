"""Batched copies between an accelerator's blocks and host memory, on side streams.

A block is one long run in the pool and one short run a layer in the engine (18 KiB with MLA), and a copy
engine needs long runs to be fast. So a batch goes through a staging area on the device: kernels gather
blocks into it, or scatter them out of it, a layer at a time, while the copy engine moves the batch before
or after, one run a block. Two staging areas a direction, so that both always have work.

Written against torch's device modules, which CUDA and Ascend have in common. ``torch.cpu`` is one too,
whose streams do everything at once: tests run this code on it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any

import torch

from kvpool.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from kvpool_vllm.device import KVBlocks

    Bytes = npt.NDArray[np.uint8]

STAGING_BYTES = 64 << 20
"""Of one staging area, four of which lie on the device. At least what hides the launching of a kernel for each
layer behind the copying: some 5 us each against 55 GB/s."""

POLL_FIRST_S, POLL_MAX_S = 5e-5, 2e-4
"""Between looks at an event: neither torch nor CUDA can wait for one with a deadline."""


class Transfer:
    """Copies that were handed to the device; what they read and write must stay until they are done."""

    def __init__(self, event: Any, keep: Sequence[Any]) -> None:
        self._event = event
        self._keep: Sequence[Any] = keep

    def wait(self, timeout_s: float) -> bool:
        """Wait for all of it; returns whether it is done. Raises RuntimeError when the device has failed."""
        deadline = time.monotonic() + timeout_s
        pause_s = POLL_FIRST_S
        while not self._event.query():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            time.sleep(min(pause_s, left_s))
            pause_s = min(POLL_MAX_S, 2 * pause_s)
        self._keep = ()
        return True


class _Staging:
    """Device memory for a part of a batch, and the event after which it is free again."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self.free: Any = None

    def area(self, blocks: int, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return it as [blocks, layers, ..], in the layers' words, as one of them has its blocks."""
        words = self.bytes.view(rows[0].dtype)
        shape = rows[0].shape[1:]
        return words[: blocks * len(rows) * shape.numel()].view(blocks, len(rows), *shape)


class _Lane:
    """One direction: a stream for the copy engine, one for kernels, and two staging areas used in turn."""

    def __init__(self, module: Any, device: torch.device, staging_bytes: int) -> None:
        self.lock = threading.Lock()
        self.module = module
        self.device = device
        self.copying = module.Stream()
        self.kernels = module.Stream()
        self._areas = [_Staging(staging_bytes, device) for _ in range(2)]
        self._turn = 0

    def next(self) -> _Staging:
        """Return the staging area whose turn it is."""
        self._turn ^= 1
        return self._areas[self._turn]

    def record(self, stream: Any) -> Any:
        """Return an event that comes when the stream has done what it was given so far."""
        event = self.module.Event()
        event.record(stream)
        return event

    def indices(self, block_ids: Sequence[int]) -> torch.Tensor:
        """Return block ids on the device, for the kernels' stream only, without waiting for the device."""
        host = torch.tensor(block_ids, dtype=torch.int64)
        if self.device.type == "cpu":
            return host
        with self.module.stream(self.kernels):
            return host.pin_memory().to(self.device, non_blocking=True)

    def drain(self) -> None:
        """Wait for everything it was given."""
        for stream in (self.copying, self.kernels):
            if hasattr(stream, "synchronize"):  # torch.cpu's streams have nothing to wait for
                stream.synchronize()


def _host(view: Bytes) -> torch.Tensor:
    return torch.from_numpy(view)


def _size(rows: Sequence[torch.Tensor]) -> int:
    """Return the bytes of a block in these layers."""
    size: int = len(rows) * rows[0].shape[1:].numel() * rows[0].element_size()
    return size


def _check(block_ids: Sequence[int], runs: Sequence[Sequence[Bytes]], rows: Sequence[torch.Tensor]) -> None:
    """Raise InvalidArgumentError unless there are the bytes of just these blocks: a short run leaves others in."""
    size = _size(rows)
    if len(block_ids) != len(runs) or any(sum(map(len, pieces)) != size for pieces in runs):
        raise InvalidArgumentError("blocks", f"{len(block_ids)} of them need as many runs of {size} bytes each")


class Copies:
    """The copies of one device. Thread-safe; calls return when the work is handed over, not when it is done."""

    def __init__(self, device: torch.device, block_bytes_max: int, *, staging_bytes: int = STAGING_BYTES) -> None:
        """Take four times ``staging_bytes`` of the device's memory, more for large blocks, less where little is left.

        At start, so that nothing is taken from a running engine. Raises InvalidArgumentError where there is
        no room for a block.
        """
        self.device = device
        self._module = torch.get_device_module(device)
        self.enter()
        least = -(-block_bytes_max // 8) * 8
        self.staging_bytes = max(least, -(-staging_bytes // 8) * 8)
        while True:
            try:
                self._in, self._out = (_Lane(self._module, device, self.staging_bytes) for _ in range(2))
                break
            except torch.OutOfMemoryError:
                if self.staging_bytes == least:
                    raise InvalidArgumentError(
                        "gpu_memory_utilization", f"leaves no room on {device} for copying: 4 areas of {least} bytes"
                    ) from None
                self.staging_bytes = max(least, self.staging_bytes // 16 * 8)

    def enter(self) -> None:
        """Make the device the calling thread's current one."""
        if self.device.type != "cpu":
            self._module.set_device(self.device.index or 0)

    def fence(self) -> Any:
        """Return an event on the current stream of the calling thread, the engine's."""
        event = self._module.Event()
        event.record(self._module.current_stream())
        return event

    def host_buffer(self, size: int) -> Bytes:
        """Return page-locked host memory."""
        buffer: Bytes = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type != "cpu").numpy()
        return buffer

    def load(
        self,
        kv: KVBlocks,
        block_ids: Sequence[int],
        sources: Sequence[Sequence[Bytes]],
        *,
        layers: tuple[int, int] | None = None,
        after: Any = None,
    ) -> Transfer:
        """Fill blocks: ``sources[i]`` has the bytes of block i, layer after layer, in consecutive pieces.

        Nothing is written before ``after``. The pieces must be page-locked for the copies to be fast.
        Raises InvalidArgumentError for pieces that are not as long as a block.
        """
        rows, lane = kv.words(layers), self._in
        _check(block_ids, sources, rows)
        event: Any = None
        with self._submitting(lane, block_ids, after) as ids:
            for start, end in self._parts(len(block_ids), rows):
                staging = lane.next()
                area = staging.area(end - start, rows)
                with lane.module.stream(lane.copying):
                    if staging.free is not None:
                        lane.copying.wait_event(staging.free)
                    for block, pieces in zip(_block_bytes(area), sources[start:end], strict=True):
                        at = 0
                        for piece in pieces:
                            block[at : at + len(piece)].copy_(_host(piece), non_blocking=True)
                            at += len(piece)
                lane.kernels.wait_event(lane.record(lane.copying))
                with lane.module.stream(lane.kernels):
                    for row, words in zip(rows, area.unbind(1), strict=True):
                        row.index_copy_(0, ids[start:end], words)
                staging.free = event = lane.record(lane.kernels)
        return Transfer(lane.record(lane.kernels) if event is None else event, (sources, ids))

    def store(
        self,
        kv: KVBlocks,
        block_ids: Sequence[int],
        targets: Sequence[Sequence[Bytes]],
        *,
        after: Any = None,
    ) -> Transfer:
        """Read blocks, as they are after ``after``, into ``targets``, which are as the sources of ``load``."""
        rows, lane = kv.words(), self._out
        _check(block_ids, targets, rows)
        event: Any = None
        with self._submitting(lane, block_ids, after) as ids:
            for start, end in self._parts(len(block_ids), rows):
                staging = lane.next()
                area = staging.area(end - start, rows)
                with lane.module.stream(lane.kernels):
                    if staging.free is not None:
                        lane.kernels.wait_event(staging.free)
                    for row, words in zip(rows, area.unbind(1), strict=True):
                        torch.index_select(row, 0, ids[start:end], out=words)
                lane.copying.wait_event(lane.record(lane.kernels))
                with lane.module.stream(lane.copying):
                    for block, pieces in zip(_block_bytes(area), targets[start:end], strict=True):
                        at = 0
                        for piece in pieces:
                            _host(piece).copy_(block[at : at + len(piece)], non_blocking=True)
                            at += len(piece)
                staging.free = event = lane.record(lane.copying)
        return Transfer(lane.record(lane.copying) if event is None else event, (targets, ids))

    @contextlib.contextmanager
    def _submitting(self, lane: _Lane, block_ids: Sequence[int], after: Any) -> Iterator[torch.Tensor]:
        """Have a lane, behind ``after``, to give it work; yields the blocks' numbers on the device."""
        self.enter()
        # The engine may have made its tensors in inference mode, which only lets itself write to them.
        with lane.lock, torch.inference_mode():
            try:
                ids = lane.indices(block_ids)
                if after is not None:
                    lane.kernels.wait_event(after)
                yield ids
            except BaseException:  # whatever it was: nobody may take the memory back while copies use it
                lane.drain()
                raise

    def close(self) -> None:
        """Wait for what is under way."""
        self._in.drain()
        self._out.drain()

    def _parts(self, blocks: int, rows: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
        """Return the (start, end) of what fits a staging area at a time."""
        each = self.staging_bytes // _size(rows)
        return [(start, min(start + each, blocks)) for start in range(0, blocks, each)]


def _block_bytes(area: torch.Tensor) -> list[torch.Tensor]:
    """Return the bytes of each block of a staging area."""
    return list(area.view(torch.uint8).view(area.shape[0], -1).unbind(0))
