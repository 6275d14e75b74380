"""The engine's KV tensors as host buffers, one per block and layer.

Only CPU tensors so far: their blocks are plain memory, read and written in place.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvpool.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 10 behind layer 9, so that every engine stores layers in the same order."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _block_rows(name: str, tensor: torch.Tensor, blocks: int) -> npt.NDArray[np.uint8]:
    """Return one layer as rows of bytes, a row per block, on the tensor's own memory."""
    where = f"KV cache of layer {name}"
    if tensor.device.type != "cpu":
        raise InvalidArgumentError(where, f"lies on {tensor.device.type}; only cpu is supported so far")
    rows, inner = tensor.shape[0], tensor[0]
    if rows % blocks or not inner.is_contiguous():
        raise InvalidArgumentError(
            where, f"a block must be one run of bytes, shape {tuple(tensor.shape)} with {blocks} blocks has none"
        )
    # Kernels may cut a block into several rows; these must then follow each other without a gap.
    if rows != blocks and tensor.stride(0) != inner.numel():
        raise InvalidArgumentError(where, f"{rows} rows for {blocks} blocks must be contiguous")
    per_block = rows // blocks
    flat = torch.as_strided(
        tensor, (blocks, per_block * inner.numel()), (per_block * tensor.stride(0), 1), tensor.storage_offset()
    )
    view: npt.NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return view


class KVBlocks:
    """All layers of one rank; a block is a list of per-layer byte views into the engine's memory."""

    def __init__(self, kv_caches: Mapping[str, torch.Tensor], blocks: int) -> None:
        """Raise InvalidArgumentError where a block is not one contiguous run of bytes per layer."""
        self.names = sorted(kv_caches, key=_natural)
        if not self.names:
            raise InvalidArgumentError("KV cache", "the engine registered no layers")
        self._layers = [_block_rows(name, kv_caches[name], blocks) for name in self.names]
        sizes = {layer.shape[1] for layer in self._layers}
        if len(sizes) > 1:
            raise InvalidArgumentError("KV cache", f"all layers must have equal blocks, sizes are {sorted(sizes)}")
        self.layer_block_bytes: int = sizes.pop()
        self.shape = tuple(kv_caches[self.names[0]].shape[1:])
        """Of one block in one layer, part of the layout."""

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._layers)

    def views(self, block_ids: Sequence[int]) -> list[list[npt.NDArray[np.uint8]]]:
        """Return, for each block, its bytes layer by layer."""
        return [[layer[block] for layer in self._layers] for block in block_ids]
