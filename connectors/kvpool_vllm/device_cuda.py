"""NVIDIA GPUs: the segment is page-locked by the CUDA runtime, as torch hands it out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvpool.errors import InvalidArgumentError
from kvpool_vllm.device_accelerator import Accelerator
from kvpool_vllm.device_copies import Copies
from kvpool_vllm.device_pinning import CudaRegistrar, Pinning

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvpool_vllm.device import KVBlocks


class _CurrentDevice:
    """A registrar that first makes a device its thread's current one, as the runtime wants it."""

    def __init__(self, copies: Copies, registrar: CudaRegistrar) -> None:
        self._copies = copies
        self._registrar = registrar

    def register(self, address: int, size: int) -> str:
        self._copies.enter()
        return self._registrar.register(address, size)

    def unregister(self, address: int) -> None:
        self._copies.enter()
        self._registrar.unregister(address)


def cuda_device(groups: Sequence[KVBlocks]) -> Accelerator:
    """Return the device that holds these blocks; raise InvalidArgumentError where torch has no CUDA."""
    if not torch.cuda.is_available():
        raise InvalidArgumentError("KV cache", "lies on cuda, but torch finds no CUDA device")
    block_bytes = max(len(kv) * kv.layer_block_bytes for kv in groups)
    copies = Copies(groups[0].device, block_bytes)
    return Accelerator(copies, Pinning(_CurrentDevice(copies, CudaRegistrar(torch.cuda.cudart()))), block_bytes)
