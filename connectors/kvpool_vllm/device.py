"""The engine's KV memory, and how its blocks come from and go to the pool.

A ``Device`` loads and saves the blocks of one job. Blocks in host memory are read and written in place;
those of an accelerator go straight between it and the pool's slots (``device_accelerator.py``).
"""

from __future__ import annotations

import re
from copy import copy
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from kvpool.client_rows import BlockRows
from kvpool.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    import numpy.typing as npt
    import torch

    from kvpool.client import Client, GetResult, PutResult
    from kvpool.model import NodeAddress
    from kvpool_vllm.metadata import Part

ACCELERATORS = ("cuda", "npu")
WORD_BYTES = (8, 4, 2, 1)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 10 behind layer 9, so that every engine stores layers in the same order."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _memory_order(inner: torch.Tensor, always: int | None = None) -> list[int] | None:
    """Return the dimensions from the outermost in memory to the innermost; None if the bytes have gaps.

    Those of size 1 are left out, except for the one to tell ``always``.
    """
    order = sorted((d for d in range(inner.dim()) if inner.shape[d] > 1), key=lambda d: -inner.stride(d))
    expected = 1
    for dim in reversed(order):
        if inner.stride(dim) != expected:
            return None
        expected *= inner.shape[dim]
    if always is not None and always not in order:
        # Behind those of equal stride: it counts runs as long as theirs.
        place = sum(inner.stride(dim) >= inner.stride(always) for dim in order)
        order.insert(place, always)
    return order


def _check_rows(name: str, tensor: torch.Tensor, blocks: int) -> None:
    """Raise InvalidArgumentError unless a block is one run of bytes in this layer."""
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


def _head_dim(tensor: torch.Tensor, heads: int) -> int | None:
    """Return which dimension of a layer's tensor counts the heads; None where that cannot be told."""
    found = [dim for dim in range(1, tensor.dim()) if tensor.shape[dim] == heads]
    if len(found) > 1 and tensor.dim() == 4 and tensor.shape[1] == heads:
        return 1  # vLLM's own order: blocks, heads, tokens, content
    return found[0] if len(found) == 1 else None


def _block_bytes(tensor: torch.Tensor, blocks: int, cut: tuple[int, int, int] | None = None) -> torch.Tensor:
    """Return one layer's bytes [blocks, ..] on the tensor's own memory, in the order that they have there.

    ``cut``: a dimension, and the first and end of its indices that are wanted; those of a block come in the
    order in which a tensor of these alone would have them.
    """
    import torch

    sizes, strides, start = list(tensor.shape), list(tensor.stride()), tensor.storage_offset()
    if cut is not None:
        dim, first, end = cut
        sizes[dim] = end - first
        start += first * strides[dim]
    rows = sizes[0] // blocks
    inner = sorted(
        ((size, stride) for size, stride in zip(sizes[1:], strides[1:], strict=True) if size > 1),
        key=lambda pair: -pair[1],
    )
    runs: list[tuple[int, int]] = []  # (size, stride), those that continue each other as one
    for size, stride in [(rows, strides[0]), *inner] if rows > 1 else inner:
        if runs and runs[-1][1] == size * stride:
            runs[-1] = (runs[-1][0] * size, stride)
        else:
            runs.append((size, stride))
    if not runs or runs[-1][1] != 1:
        runs.append((1, 1))
    shape, steps = zip((blocks, rows * strides[0]), *runs, strict=True)
    return torch.as_strided(tensor, shape, steps, start).view(torch.uint8)


class KVBlocks:
    """All layers of one rank, or of one group of them, or some heads of these.

    A block is a run of bytes in each layer; where heads do not lie outermost, that of some heads has gaps.
    """

    def __init__(self, kv_caches: Mapping[str, torch.Tensor], blocks: int, heads: int = 0) -> None:
        """``heads``: KV heads of each layer here, 0 where they are no concern.

        Raises InvalidArgumentError where a block is not one run of bytes per layer, equally long in all.
        """
        self.names = sorted(kv_caches, key=_natural)
        if not self.names:
            raise InvalidArgumentError("KV cache", "the engine registered no layers")
        self._caches = [kv_caches[name] for name in self.names]
        self._blocks = blocks
        self._heads = heads
        for name in self.names:
            _check_rows(name, kv_caches[name], blocks)
        kinds = {tensor.device for tensor in self._caches}
        if len(kinds) > 1:
            raise InvalidArgumentError("KV cache", f"all layers must lie on one device, not {sorted(map(str, kinds))}")
        self.device: torch.device = kinds.pop()
        first = self._caches[0]
        self.shape = tuple(first.shape[1:])
        """Of one block in one layer, part of the layout."""
        self._dims = [_head_dim(tensor, heads) if heads else None for tensor in self._caches]
        self.layout = self._describe(first, self._dims[0])
        """The shape, "*" for the heads, and the order of its dimensions in memory where that is another one."""
        self._use([_block_bytes(tensor, blocks) for tensor in self._caches])

    def _describe(self, tensor: torch.Tensor, dim: int | None) -> str:
        # How many heads a rank has says nothing about the bytes of each.
        order = _memory_order(tensor[0], None if dim is None else dim - 1) or []
        shape = ["*" if d + 1 == dim else str(size) for d, size in enumerate(self.shape)]
        return "x".join(shape) + ("@" + ",".join(map(str, order)) if order != sorted(order) else "")

    def _use(self, rows: list[torch.Tensor]) -> None:
        self._rows = rows
        sizes = {layer.shape[1:].numel() for layer in rows}
        if len(sizes) > 1:
            raise InvalidArgumentError("KV cache", f"all layers must have equal blocks, sizes are {sorted(sizes)}")
        self.layer_block_bytes: int = sizes.pop()
        self._host: list[npt.NDArray[np.uint8]] = [layer.numpy() for layer in rows] if self.device.type == "cpu" else []
        self._words: list[torch.Tensor] = []

    def split(self, parts: int) -> list[KVBlocks]:
        """Return the same memory cut by heads into equal parts, the first heads first.

        Raises InvalidArgumentError where heads cannot be told apart.
        """
        if parts == 1:
            return [self]
        each = self._heads // parts
        cuts: list[KVBlocks] = []
        for number in range(parts):
            rows = []
            for name, tensor, dim in zip(self.names, self._caches, self._dims, strict=True):
                if dim is None or self._heads % parts or tensor.stride(dim) == 1:
                    raise InvalidArgumentError(
                        "head_groups",
                        f"layer {name} holds blocks as {tuple(tensor.shape[1:])}, in which {self._heads or 'its'} "
                        f"heads cannot be cut into {parts} parts",
                    )
                rows.append(_block_bytes(tensor, self._blocks, (dim, number * each, (number + 1) * each)))
            part = copy(self)
            part._heads = each
            part._caches, part._dims = [], []  # not to be cut again
            part._use(rows)
            cuts.append(part)
        return cuts

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._rows)

    def views(
        self, block_ids: Sequence[int], layers: tuple[int, int] | None = None
    ) -> Sequence[list[npt.NDArray[np.uint8]]]:
        """Return, for each block, its bytes layer by layer (``layers``: first and end), in host memory.

        In C order they are as they are stored.
        """
        host = self._host if layers is None else self._host[layers[0] : layers[1]]
        if block_ids and all(layer.ndim == 2 for layer in host):
            return BlockRows(host, block_ids)
        return [[layer[block] for layer in host] for block in block_ids]

    def words(self, layers: tuple[int, int] | None = None) -> list[torch.Tensor]:
        """Return each layer as [blocks, ..] of the widest integers that fit: kernels move them faster."""
        if not self._words:
            self._words = self._widest()
        return self._words if layers is None else self._words[layers[0] : layers[1]]

    def _widest(self) -> list[torch.Tensor]:
        import torch

        kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
        for width in WORD_BYTES:
            if all(
                number % width == 0
                for rows in self._rows
                for number in (rows.shape[-1], *rows.stride()[:-1], rows.storage_offset())
            ):
                return [rows.view(kinds[width]) for rows in self._rows]
        return self._rows  # not reached: every run is a multiple of one byte


class Way(NamedTuple):
    """Where blocks come from that another engine stores meanwhile."""

    transfer: int
    node: NodeAddress
    alive: Callable[[], bool]
    """Whether to wait on; asked when nothing has come for a while."""


class Device(Protocol):
    """Moves the blocks of one job between the engine's memory and the pool, on the caller's thread.

    Trouble with the pool is in the result; whatever is raised is the device's own failure. When a call returns
    or raises, nothing of it is under way any more.
    """

    saves_layers: bool
    """Whether a layer can be saved as soon as the engine's thread has been through it."""

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

    def receive(
        self,
        client: Client,
        part: Part,
        kv: KVBlocks,
        way: Way,
        *,
        shard: int = 0,
        timeout_ms: float = 1000,
        after: Any = None,
    ) -> GetResult:
        """Fill the blocks of ``part`` as they are stored, no sooner than the fence; as ``Client.receive``."""
        ...

    def save(
        self, client: Client, part: Part, kv: KVBlocks, *, shard: int = 0, after: Any = None, transfer: int = 0
    ) -> PutResult:
        """Store the blocks of ``part`` as they are once the ``after`` fence is passed; as ``Client.put``."""
        ...

    def close(self) -> None:
        """Let go of what the device holds; calls that wait for it end."""
        ...


class HostDevice:
    """Blocks in host memory: the client copies them in place."""

    saves_layers = True

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

    def receive(
        self,
        client: Client,
        part: Part,
        kv: KVBlocks,
        way: Way,
        *,
        shard: int = 0,
        timeout_ms: float = 1000,
        after: Any = None,  # noqa: ARG002 -- see load
    ) -> GetResult:
        """Fill the blocks of ``part``, layer by layer where they are stored so."""
        return client.receive(
            part.namespace,
            part.keys,
            kv.views(part.block_ids),
            shard=shard,
            transfer=way.transfer,
            node=way.node,
            alive=way.alive,
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
        transfer: int = 0,
    ) -> PutResult:
        """Store the blocks of ``part``."""
        return client.put(part.namespace, part.keys, kv.views(part.block_ids), shard=shard, transfer=transfer)

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
