"""What ``kvpool-bench device`` measures: blocks of real shapes between an engine's memory and a segment's slots."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvpool.client_bytes import copy_plain
from kvpool.errors import UnavailableError
from kvpool_vllm.device import ACCELERATORS, KVBlocks
from kvpool_vllm.device_copies import Copies
from kvpool_vllm.device_pinning import CudaRegistrar, PinnedSegment, PinState

if TYPE_CHECKING:
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]

HEADER_BYTES = 512
"""In front of each slot, as a node has it."""

WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's KV in blocks of 16 tokens, bfloat16."""

    name: str
    layers: int
    block: tuple[int, ...]
    """Of one layer."""


SHAPES = (Shape("Llama-3-8B", 32, (8, 16, 256)), Shape("DeepSeek-V3 (MLA)", 61, (16, 576)))


def find_device() -> torch.device:
    """Return the accelerator of this machine, or the CPU."""
    for kind in ACCELERATORS:
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            return torch.device(kind, 0)
    return torch.device("cpu")


class DeviceBench:
    """One model's blocks on a device, as many slots, and a single run of as many bytes on both sides."""

    def __init__(self, memory: Bytes, device: torch.device, shape: Shape, blocks: int) -> None:
        """``memory``: a mapped segment, page-locked here where the device can.

        Raises UnavailableError where the memory cannot be page-locked.
        """
        self.device = device
        count = blocks + blocks // 4  # blocks of a request lie scattered among others'
        tensors = {
            f"layer.{i}": torch.zeros((count, *shape.block), dtype=torch.bfloat16, device=device)
            for i in range(shape.layers)
        }
        self._kv = KVBlocks(tensors, count)
        self._ids = np.random.default_rng(7).permutation(count)[:blocks].tolist()
        size = self._kv.layer_block_bytes * shape.layers
        self.bytes = blocks * size
        self._slots: list[Bytes] = [
            memory[at : at + size]
            for at in range(HEADER_BYTES, HEADER_BYTES + blocks * (HEADER_BYTES + size), HEADER_BYTES + size)
        ]
        self._pinned: PinnedSegment | None = None
        self._copies: Copies | None = None
        if device.type == "cpu":
            self._views = self._kv.views(self._ids)
            self._host, self._there = np.ones(self.bytes, np.uint8), np.ones(self.bytes, np.uint8)
            return
        self._copies = Copies(device, size)
        if device.type == "cuda":
            self._pinned = PinnedSegment(memory, CudaRegistrar(torch.cuda.cudart()))
            self._pinned.start()
            if not self._pinned.wait(WAIT_S):
                raise UnavailableError(f"the segment cannot be page-locked: {self._pinned.reason or 'too slow'}")
        self._runs = [[slot] if self._pinned is None else self._pinned.pieces(slot) for slot in self._slots]
        self._host_run = torch.from_numpy(self._copies.host_buffer(self.bytes))
        self._device_run = torch.zeros(self.bytes, dtype=torch.uint8, device=device)

    @property
    def page_locked(self) -> bool:
        """Whether slots and blocks are copied to each other without a buffer in between."""
        return self._pinned is not None and self._pinned.state is PinState.REGISTERED

    def load(self) -> float:
        """Fill the blocks out of the slots; returns seconds."""
        start = time.perf_counter()
        if self._copies is None:
            for slot, views in zip(self._slots, self._views, strict=True):
                copy_plain([slot], views, self._kv.layer_block_bytes)
        else:
            self._end(self._copies.load(self._kv, self._ids, self._runs).wait(WAIT_S))
        return time.perf_counter() - start

    def store(self) -> float:
        """Fill the slots out of the blocks; returns seconds."""
        start = time.perf_counter()
        if self._copies is None:
            for slot, views in zip(self._slots, self._views, strict=True):
                copy_plain(views, [slot], self._kv.layer_block_bytes)
        else:
            self._end(self._copies.store(self._kv, self._ids, self._runs).wait(WAIT_S))
        return time.perf_counter() - start

    def copy_in(self) -> float:
        """Copy as many bytes in one run, from page-locked memory to the device; returns seconds."""
        return self._one_run(inwards=True)

    def copy_out(self) -> float:
        """Copy as many bytes in one run from the device; returns seconds."""
        return self._one_run(inwards=False)

    def _one_run(self, *, inwards: bool) -> float:
        start = time.perf_counter()
        if self._copies is None:
            np.copyto(*((self._there, self._host) if inwards else (self._host, self._there)))
            return time.perf_counter() - start
        module: Any = torch.get_device_module(self.device)
        if inwards:
            self._device_run.copy_(self._host_run, non_blocking=True)
        else:
            self._host_run.copy_(self._device_run, non_blocking=True)
        module.synchronize()
        return time.perf_counter() - start

    def check(self) -> bool:
        """Send bytes there and back; returns whether they are the same in every block. Warms everything up."""
        rng = np.random.default_rng(11)
        marks = rng.integers(0, 256, (len(self._slots), 4096), np.uint8)
        for slot, mark in zip(self._slots, marks, strict=True):
            slot[:] = np.resize(mark, len(slot))
        self.load()
        for slot in self._slots:
            slot[:] = 0
        self.store()
        return all(
            np.array_equal(slot, np.resize(mark, len(slot))) for slot, mark in zip(self._slots, marks, strict=True)
        )

    def close(self) -> None:
        """Let go of the memory."""
        if self._copies is not None:
            self._copies.close()
        if self._pinned is not None:
            self._pinned.close()
        self._slots.clear()

    @staticmethod
    def _end(done: bool) -> None:
        if not done:
            raise UnavailableError(f"the device has not copied within {WAIT_S:g} s")
