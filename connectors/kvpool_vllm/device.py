"""The engine's KV memory, and how its blocks come from and go to the pool.

A ``Device`` loads and saves the blocks of one job. Blocks in host memory are read and written in place;
those of an accelerator go straight between it and the pool's slots (``device_accelerator.py``).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Protocol

from kvpool.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import numpy.typing as npt
    import torch

    from kvpool.client import Client, GetResult, PutResult
    from kvpool_vllm.metadata import Part

ACCELERATORS = ("cuda", "npu")
WORD_BYTES = (8, 4, 2, 1)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 10 behind layer 9, so that every engine stores layers in the same order."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _memory_order(inner: torch.Tensor) -> list[int] | None:
    """Return the dimensions from the outermost in memory to the innermost; None if the bytes have gaps."""
    order = sorted((d for d in range(inner.dim()) if inner.shape[d] > 1), key=lambda d: -inner.stride(d))
    expected = 1
    for dim in reversed(order):
        if inner.stride(dim) != expected:
            return None
        expected *= inner.shape[dim]
    return order


def _block_rows(name: str, tensor: torch.Tensor, blocks: int) -> torch.Tensor:
    """Return one layer as rows of bytes, a row per block, on the tensor's own memory."""
    import torch

    where = f"KV cache of layer {name}"
    if tensor.device.type not in {"cpu", *ACCELERATORS}:
        supported = ", ".join(("cpu", *ACCELERATORS))
        raise InvalidArgumentError(where, f"lies on {tensor.device.type}; supported are {supported}")
    rows, inner = tensor.shape[0], tensor[0]
    if rows % blocks or _memory_order(inner) is None:
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
    return flat.view(torch.uint8)


class KVBlocks:
    """All layers of one rank, or of one group of them; a block is a run of bytes in each layer."""

    def __init__(self, kv_caches: Mapping[str, torch.Tensor], blocks: int) -> None:
        """Raise InvalidArgumentError where a block is not one run of bytes per layer, equally long in all."""
        self.names = sorted(kv_caches, key=_natural)
        if not self.names:
            raise InvalidArgumentError("KV cache", "the engine registered no layers")
        self._rows = [_block_rows(name, kv_caches[name], blocks) for name in self.names]
        sizes = {rows.shape[1] for rows in self._rows}
        if len(sizes) > 1:
            raise InvalidArgumentError("KV cache", f"all layers must have equal blocks, sizes are {sorted(sizes)}")
        kinds = {rows.device for rows in self._rows}
        if len(kinds) > 1:
            raise InvalidArgumentError("KV cache", f"all layers must lie on one device, not {sorted(map(str, kinds))}")
        self.layer_block_bytes: int = sizes.pop()
        self.device: torch.device = kinds.pop()
        first = kv_caches[self.names[0]]
        self.shape = tuple(first.shape[1:])
        """Of one block in one layer, part of the layout."""
        order = _memory_order(first[0]) or []
        permuted = order != sorted(order)
        self.layout = "x".join(map(str, self.shape)) + ("@" + ",".join(map(str, order)) if permuted else "")
        """The shape, and the order of its dimensions in memory where that is another one."""
        self._host: list[npt.NDArray[np.uint8]] = (
            [rows.numpy() for rows in self._rows] if self.device.type == "cpu" else []
        )
        self._words: list[torch.Tensor] = []

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._rows)

    def views(
        self, block_ids: Sequence[int], layers: tuple[int, int] | None = None
    ) -> list[list[npt.NDArray[np.uint8]]]:
        """Return, for each block, its bytes layer by layer (``layers``: first and end), in host memory."""
        host = self._host if layers is None else self._host[layers[0] : layers[1]]
        return [[layer[block] for layer in host] for block in block_ids]

    def words(self, layers: tuple[int, int] | None = None) -> list[torch.Tensor]:
        """Return each layer as rows of the widest integers that fit, a row per block: kernels move them faster."""
        if not self._words:
            self._words = self._widest()
        return self._words if layers is None else self._words[layers[0] : layers[1]]

    def _widest(self) -> list[torch.Tensor]:
        import torch

        kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
        for width in WORD_BYTES:
            if all(
                rows.shape[1] % width == rows.stride(0) % width == rows.storage_offset() % width == 0
                for rows in self._rows
            ):
                return [rows.view(kinds[width]) for rows in self._rows]
        return self._rows  # not reached: every run is a multiple of one byte


class Device(Protocol):
    """Moves the blocks of one job between the engine's memory and the pool, on the caller's thread.

    Trouble with the pool is in the result; whatever is raised is the device's own failure. When a call returns
    or raises, nothing of it is under way any more.
    """

    def fence(self) -> Any:
        """Return what stands for the work that the engine's current stream has been given; None where nothing does."""
        ...

    def load(
        self,
        client: Client,
        part: Part,
        kv: KVBlocks,
        *,
        shard: int = 0,
        layers: tuple[int, int] | None = None,
        timeout_ms: float | None = None,
        after: Any = None,
    ) -> GetResult:
        """Fill the blocks of ``part``, no sooner than the ``after`` fence; as ``Client.get``."""
        ...

    def save(self, client: Client, part: Part, kv: KVBlocks, *, shard: int = 0, after: Any = None) -> PutResult:
        """Store the blocks of ``part`` as they are once the ``after`` fence is passed; as ``Client.put``."""
        ...

    def close(self) -> None:
        """Let go of what the device holds; calls that wait for it end."""
        ...


class HostDevice:
    """Blocks in host memory: the client copies them in place."""

    def fence(self) -> None:
        """Return None: what the engine has computed is in memory."""

    def load(
        self,
        client: Client,
        part: Part,
        kv: KVBlocks,
        *,
        shard: int = 0,
        layers: tuple[int, int] | None = None,
        timeout_ms: float | None = None,
        after: Any = None,  # noqa: ARG002 -- nothing runs behind the engine's back here
    ) -> GetResult:
        """Fill the blocks of ``part``."""
        return client.get(
            part.namespace,
            part.keys,
            kv.views(part.block_ids, layers),
            shard=shard,
            lookup=part.lookup,
            layers=layers,
            timeout_ms=timeout_ms,
        )

    def save(
        self,
        client: Client,
        part: Part,
        kv: KVBlocks,
        *,
        shard: int = 0,
        after: Any = None,  # noqa: ARG002 -- see load
    ) -> PutResult:
        """Store the blocks of ``part``."""
        return client.put(part.namespace, part.keys, kv.views(part.block_ids), shard=shard)

    def close(self) -> None:
        """Do nothing."""


def open_device(groups: Sequence[KVBlocks]) -> Device:
    """Return the device that holds these blocks, of all groups of a rank.

    Raises InvalidArgumentError where its runtime is missing.
    """
    kind = groups[0].device.type
    if kind == "cuda":
        from kvpool_vllm.device_cuda import cuda_device

        return cuda_device(groups)
    if kind == "npu":
        from kvpool_vllm.device_npu import npu_device

        return npu_device(groups)
    return HostDevice()
