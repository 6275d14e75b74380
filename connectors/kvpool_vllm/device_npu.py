"""Ascend NPUs, by ``torch_npu``: the same copies as on CUDA, through page-locked buffers.

The node's segment is not page-locked: Ascend's runtime page-locks what it has allocated itself, and support
for memory of others differs by release.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from kvpool.errors import InvalidArgumentError
from kvpool_vllm.device_accelerator import Accelerator
from kvpool_vllm.device_copies import Copies
from kvpool_vllm.device_pinning import Pinning

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvpool_vllm.device import KVBlocks


def npu_device(groups: Sequence[KVBlocks]) -> Accelerator:
    """Return the device that holds these blocks; raise InvalidArgumentError without ``torch_npu``."""
    try:
        importlib.import_module("torch_npu")  # importing it makes torch.npu
    except ImportError as exc:
        raise InvalidArgumentError("KV cache", f"lies on an NPU, but torch_npu cannot be imported: {exc}") from exc
    block_bytes = max(len(kv) * kv.layer_block_bytes for kv in groups)
    return Accelerator(Copies(groups[0].device, block_bytes), Pinning(None), block_bytes)
