"""Batched copies between blocks and host memory: right bytes in the right places, whatever the shapes.

On the CPU always (its streams do everything at once), on a GPU where there is one.
"""

from __future__ import annotations

import itertools
import sys
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvpool.errors import InvalidArgumentError
from kvpool.model import KEY_BYTES, Namespace

torch: Any = pytest.importorskip("torch", reason="needs torch, which comes with an engine: make e2e")

from kvpool_vllm.device import HostDevice, KVBlocks, open_device  # noqa: E402
from kvpool_vllm.device_copies import Copies, Transfer  # noqa: E402
from kvpool_vllm.metadata import Part  # noqa: E402
from kvpool_vllm.testing import MemoryClient, MemoryPool  # noqa: E402

WAIT_S = 30.0
BLOCKS = 12

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch finds none")
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=gpu)]


def llama(device: str, layers: int = 3) -> dict[str, Any]:
    """Keys and values of a few heads."""
    return {f"l.{i}": torch.zeros(BLOCKS, 2, 16, 4, 8, dtype=torch.bfloat16, device=device) for i in range(layers)}


def mla(device: str, layers: int = 5) -> dict[str, Any]:
    """One latent vector a token."""
    return {f"l.{i}": torch.zeros(BLOCKS, 16, 72, dtype=torch.bfloat16, device=device) for i in range(layers)}


def interleaved(device: str, layers: int = 3) -> dict[str, Any]:
    """One storage for all layers, block by block."""
    storage = torch.zeros(BLOCKS, layers, 16, 8, dtype=torch.float16, device=device)
    return {f"l.{i}": storage[:, i] for i in range(layers)}


def heads_first(device: str, layers: int = 2) -> dict[str, Any]:
    """Shaped as tokens x heads, kept as heads x tokens."""
    return {
        f"l.{i}": torch.zeros(BLOCKS, 4, 16, 8, dtype=torch.bfloat16, device=device).transpose(1, 2)
        for i in range(layers)
    }


def odd_bytes(device: str, layers: int = 2) -> dict[str, Any]:
    """Runs that no wide word divides."""
    return {f"l.{i}": torch.zeros(BLOCKS, 7, 3, dtype=torch.uint8, device=device) for i in range(layers)}


SHAPES = [llama, mla, interleaved, heads_first, odd_bytes]


def filled(caches: dict[str, Any], seed: int) -> dict[str, Any]:
    """Give every byte a value of its own."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in caches.values():
        raw = torch.randint(0, 256, (tensor.numel() * tensor.element_size(),), dtype=torch.uint8, generator=generator)
        tensor.copy_(raw.view(tensor.dtype).view(tensor.shape))
    return caches


def as_stored(caches: dict[str, Any], block: int) -> bytes:
    """Return a block's bytes by torch's own means: layer after layer, each as it lies in memory."""
    parts = []
    for tensor in caches.values():
        inner = tensor[block]
        order = sorted(range(inner.dim()), key=lambda d: -inner.stride(d))
        parts.append(inner.permute(order).contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return b"".join(parts)


def wait(transfer: Transfer) -> None:
    assert transfer.wait(WAIT_S)


def pieces(data: np.ndarray, *cuts: int) -> list[np.ndarray]:
    edges = [0, *cuts, len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("staged_blocks", [1, 2, 100])
def test_blocks_go_out_and_come_back(device: str, shape: Any, staged_blocks: int) -> None:
    """Stored bytes are the blocks' own, loaded ones end in their blocks and layers and nowhere else."""
    caches, empty = filled(shape(device), 1), shape(device)
    kv, other = KVBlocks(caches, BLOCKS), KVBlocks(empty, BLOCKS)
    size = len(kv) * kv.layer_block_bytes
    copies = Copies(kv.device, size, staging_bytes=staged_blocks * size + 7)
    ids = [7, 2, 11, 0, 5]
    host = copies.host_buffer(len(ids) * size).reshape(len(ids), size)
    wait(copies.store(kv, ids, [pieces(row, 5, size - 1) for row in host]))
    assert [row.tobytes() for row in host] == [as_stored(caches, block) for block in ids]
    targets = [3, 9, 1, 10, 4]
    wait(copies.load(other, targets, [pieces(row, 17) for row in host]))
    for block, target in zip(ids, targets, strict=True):
        assert as_stored(empty, target) == as_stored(caches, block)
    untouched = set(range(BLOCKS)) - set(targets)
    assert not any(any(as_stored(empty, block)) for block in untouched)
    copies.close()


@pytest.mark.parametrize("device", DEVICES)
def test_some_layers_are_loaded(device: str) -> None:
    """The sources hold just these; the other layers keep what they have."""
    caches = filled(llama(device, 4), 1)
    kv = KVBlocks(caches, BLOCKS)
    before = [as_stored(caches, block) for block in range(BLOCKS)]
    copies = Copies(kv.device, 4 * kv.layer_block_bytes, staging_bytes=1)
    rows = copies.host_buffer(2 * 2 * kv.layer_block_bytes).reshape(2, -1)
    rows[:] = 7
    wait(copies.load(kv, [6, 1], [[row] for row in rows], layers=(1, 3)))
    layer = kv.layer_block_bytes
    for block, old in enumerate(before):
        new = old[:layer] + bytes([7]) * 2 * layer + old[3 * layer :] if block in {6, 1} else old
        assert as_stored(caches, block) == new


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_of_inference_mode(device: str) -> None:
    """Engines make their caches in it, and let only themselves write to them otherwise."""
    with torch.inference_mode():
        caches = llama(device)
    kv = KVBlocks(caches, BLOCKS)
    size = len(kv) * kv.layer_block_bytes
    copies = Copies(kv.device, size)
    row = copies.host_buffer(size)
    row[:] = 3
    wait(copies.load(kv, [4], [[row]], after=copies.fence()))
    assert set(as_stored(caches, 4)) == {3}
    row[:] = 0
    wait(copies.store(kv, [4], [[row]], after=copies.fence()))
    assert set(row) == {3}


def of_vllm(device: str, heads: int = 4, layers: int = 3) -> dict[str, Any]:
    """Blocks x heads x tokens x content, kept in that order."""
    return {f"l.{i}": torch.zeros(BLOCKS, heads, 16, 24, dtype=torch.bfloat16, device=device) for i in range(layers)}


def of_vllm_turned(device: str, heads: int = 4, layers: int = 3) -> dict[str, Any]:
    """The same shape, kept as tokens x heads."""
    return {
        f"l.{i}": torch.zeros(BLOCKS, 16, heads, 24, dtype=torch.bfloat16, device=device).transpose(1, 2)
        for i in range(layers)
    }


def apart(device: str, heads: int = 4, layers: int = 3) -> dict[str, Any]:
    """Keys beside values in each block, of all layers in one storage."""
    storage = torch.zeros(BLOCKS, layers, 2, 16, heads, 10, dtype=torch.float16, device=device)
    return {f"l.{i}": storage[:, i] for i in range(layers)}


def in_rows(device: str, heads: int = 4, layers: int = 3) -> dict[str, Any]:
    """Each block is two of the kernel's."""
    return {
        f"l.{i}": torch.zeros(2 * BLOCKS, 16, heads, 8, dtype=torch.bfloat16, device=device).transpose(1, 2)
        for i in range(layers)
    }


SPLIT = [(of_vllm, 1), (of_vllm_turned, 1), (apart, 3), (in_rows, 1)]
"""Shapes, and the dimension that counts their heads."""


def ranks(shape: Any, caches: dict[str, Any], dim: int, parts: int) -> list[dict[str, Any]]:
    """Return what as many ranks would hold, each in tensors of its own."""
    found = []
    for number in range(parts):
        own = shape("cpu", 4 // parts)
        for name, tensor in own.items():
            tensor.copy_(caches[name].cpu().narrow(dim, number * 4 // parts, 4 // parts))
        found.append(own)
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("shape", "dim"), SPLIT)
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("staged_blocks", [1, 100])
def test_heads_go_out_as_other_ranks_have_them(
    device: str, shape: Any, dim: int, parts: int, staged_blocks: int
) -> None:
    """A part has the bytes of a rank that holds just these heads; loaded, it touches no others."""
    caches, empty = filled(shape(device), 1), shape(device)
    kv, other = KVBlocks(caches, BLOCKS, 4), KVBlocks(empty, BLOCKS, 4)
    ids, targets = [7, 2, 11, 0, 5], [3, 9, 1, 10, 4]
    alone = ranks(shape, caches, dim, parts)
    for number, (part, into, rank) in enumerate(
        zip(
            kv.split(parts),
            other.split(parts),
            map(partial(KVBlocks, blocks=BLOCKS, heads=4 // parts), alone),
            strict=True,
        )
    ):
        assert part.layer_block_bytes == rank.layer_block_bytes
        size = len(part) * part.layer_block_bytes
        copies = Copies(part.device, size, staging_bytes=staged_blocks * size + 7)
        host = copies.host_buffer(len(ids) * size).reshape(len(ids), size)
        wait(copies.store(part, ids, [pieces(row, 5, size - 1) for row in host]))
        expected = [b"".join(view.tobytes() for view in views) for views in rank.views(ids)]
        assert [row.tobytes() for row in host] == expected
        if device == "cpu":
            assert [b"".join(view.tobytes() for view in views) for views in part.views(ids)] == expected
        wait(copies.load(into, targets, [pieces(row, 17) for row in host]))
        wait(copies.load(into, targets[:1], [[host[0][part.layer_block_bytes :]]], layers=(1, len(part))))
        now = [KVBlocks(own, BLOCKS) for own in ranks(shape, empty, dim, parts)]
        for seen, rank_now in enumerate(now):
            filled_now = [b"".join(view.tobytes() for view in views) for views in rank_now.views(targets)]
            if seen == number:
                assert filled_now == expected
            elif seen > number:
                assert not any(map(any, filled_now))
        copies.close()
    rows = BLOCKS if len(next(iter(caches.values()))) == BLOCKS else 2 * BLOCKS
    for name, tensor in empty.items():
        for block, target in zip(ids, targets, strict=True):
            each = rows // BLOCKS
            there, here = tensor[target * each :][:each], caches[name][block * each :][:each]
            assert torch.equal(there.contiguous().view(torch.uint8), here.contiguous().view(torch.uint8))


def test_parts_of_contiguous_heads_are_runs() -> None:
    """Where heads lie outermost, as on the CPU, the host's views have no gaps, and are the engine's memory."""
    caches = filled(of_vllm("cpu"), 1)
    _, second = KVBlocks(caches, BLOCKS, 4).split(2)
    (views,) = second.views([3])
    assert all(view.ndim == 1 and view.flags.c_contiguous for view in views)
    views[1][:] = 0
    assert not caches["l.1"][3, 2:].any()
    assert caches["l.1"][3, :2].any()


@pytest.mark.parametrize(
    ("shape", "heads", "parts"),
    [
        ((BLOCKS, 2, 16, 2, 8), 2, 2),  # keys and values, or heads?
        ((BLOCKS, 16, 576), 4, 2),
        ((BLOCKS, 16, 4, 8), 0, 2),
        ((BLOCKS, 16, 8, 3), 3, 3),  # heads innermost
        ((BLOCKS, 3, 16, 8), 3, 2),
    ],
)
def test_heads_that_cannot_be_told_apart_are_refused(shape: tuple[int, ...], heads: int, parts: int) -> None:
    """At start, in a sentence; undivided, the same memory is fine."""
    kv = KVBlocks({"l.0": torch.zeros(shape)}, BLOCKS, heads)
    assert kv.split(1) == [kv]
    with pytest.raises(InvalidArgumentError, match=r"head_groups: layer l.0 holds blocks as .* cannot be cut into"):
        kv.split(parts)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_layouts_say_nothing_about_the_number_of_heads(heads: int) -> None:
    """Ranks of any TP have the same; tokens x heads and heads x tokens differ even with one head."""
    layouts = [KVBlocks(shape("cpu", heads), BLOCKS, heads).layout for shape, _ in SPLIT]
    assert layouts == ["*x16x24", "*x16x24@1,0,2", "2x16x*x10" if heads != 2 else "2x16x2x10", "*x16x8@1,0,2"]


def test_widest_words_that_fit() -> None:
    """Eight bytes where runs and strides allow it, one where nothing else does."""
    assert KVBlocks(llama("cpu"), BLOCKS).words()[0].dtype == torch.int64
    assert KVBlocks(odd_bytes("cpu"), BLOCKS).words()[0].dtype == torch.uint8
    assert len(KVBlocks(llama("cpu"), BLOCKS).words((1, 3))) == 2


def test_the_order_in_memory_is_part_of_the_layout() -> None:
    """Tensors of one shape whose bytes lie in another order never share a layout."""
    plain = {"l.0": torch.zeros(BLOCKS, 16, 4, 8)}
    turned = {"l.0": torch.zeros(BLOCKS, 4, 16, 8).transpose(1, 2)}
    kv, other = KVBlocks(plain, BLOCKS), KVBlocks(turned, BLOCKS)
    assert kv.shape == other.shape
    assert (kv.layout, other.layout) == ("16x4x8", "16x4x8@1,0,2")


def test_groups_of_different_sizes_share_a_device() -> None:
    """Hybrid models have a set of blocks for each group; host memory needs nothing of a device."""
    groups = [KVBlocks(llama("cpu"), BLOCKS), KVBlocks(mla("cpu"), BLOCKS)]
    assert groups[0].layer_block_bytes != groups[1].layer_block_bytes
    assert isinstance(open_device(groups), HostDevice)


class LateEvent:
    """Comes after so many looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def query(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def test_a_wait_ends_with_the_copies_or_the_deadline() -> None:
    """What is not done in time is told, and may be waited for again; buffers are kept until then."""
    buffer = [np.zeros(1)]
    transfer = Transfer(LateEvent(3), buffer)
    assert not transfer.wait(0.0)
    assert transfer._keep is buffer
    assert transfer.wait(WAIT_S)
    assert not transfer._keep


def test_a_failure_in_the_middle_waits_for_what_was_begun() -> None:
    """The caller may take its memory back once the error is out."""
    kv = KVBlocks(llama("cpu"), BLOCKS)
    size = len(kv) * kv.layer_block_bytes
    copies = Copies(kv.device, size, staging_bytes=1)
    drained = []
    copies._in.drain = lambda: drained.append(True)  # type: ignore[method-assign]
    rows = list(np.zeros((2, size), np.uint8))
    with pytest.raises(IndexError):
        copies.load(kv, [1, BLOCKS + 1], [[row] for row in rows])
    assert drained == [True]


@pytest.mark.parametrize("lengths", [[0], [0, 1], [0, 0, 0], [-1, 0]])
def test_runs_that_are_not_the_blocks_are_refused(lengths: list[int]) -> None:
    """A run that is too short would leave the bytes of another block in a block."""
    kv = KVBlocks(llama("cpu"), BLOCKS)
    size = len(kv) * kv.layer_block_bytes
    copies = Copies(kv.device, size)
    runs = [[np.zeros(size + more, np.uint8)] for more in lengths]
    with pytest.raises(InvalidArgumentError, match="blocks"):
        copies.load(kv, [1, 2], runs)
    with pytest.raises(InvalidArgumentError, match="blocks"):
        copies.store(kv, [1, 2], runs)


def test_little_memory_left_means_smaller_areas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to one block; less is refused in words that name the engine's setting."""
    kv = KVBlocks(llama("cpu"), BLOCKS)
    size = len(kv) * kv.layer_block_bytes
    empty, limit = torch.empty, 3 * size

    def scarce(count: int, **more: Any) -> Any:
        if count > limit:
            raise torch.OutOfMemoryError
        return empty(count, **more)

    monkeypatch.setattr(torch, "empty", scarce)
    assert size <= Copies(kv.device, size, staging_bytes=100 * size).staging_bytes <= limit
    limit = size - 1
    with pytest.raises(InvalidArgumentError, match="gpu_memory_utilization"):
        Copies(kv.device, size)


def test_a_device_without_its_runtime_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, at start."""
    kv = KVBlocks(llama("cpu"), BLOCKS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    for kind, words in (("cuda", "finds no CUDA device"), ("npu", "torch_npu cannot be imported")):
        monkeypatch.setattr(kv, "device", SimpleNamespace(type=kind))
        with pytest.raises(InvalidArgumentError, match=words):
            open_device([kv])


def test_an_npu_copies_through_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its runtime importable; the device here is the CPU, whose modules are alike."""
    monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
    from kvpool_vllm.device_npu import npu_device

    groups = [filled(mla("cpu"), 1), filled(llama("cpu", 5), 2)]
    memory = [KVBlocks(caches, BLOCKS) for caches in groups]
    device = npu_device(memory)
    client: Any = MemoryClient(MemoryPool())
    for number, (caches, kv) in enumerate(zip(groups, memory, strict=True)):
        space = Namespace(model="demo", layers=5, kv_group=str(number))
        keys = bytes(range(4 * KEY_BYTES))
        before = [as_stored(caches, block) for block in (1, 2, 3, 4)]
        assert device.save(client, Part(space, keys, [1, 2, 3, 4]), kv, after=device.fence()).stored == 4
        assert device.load(client, Part(space, keys, [8, 7, 6, 5]), kv, after=device.fence()).prefix == 4
        assert [as_stored(caches, block) for block in (8, 7, 6, 5)] == before
    assert +device.counters == {"save.buffered": 8, "load.buffered": 8}
    device.close()


@pytest.mark.parametrize(("shape", "dim"), SPLIT)
def test_heads_go_through_buffers_from_one_rank_to_two(shape: Any, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And from two to one, whichever of them holds heads that lie apart."""
    monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
    from kvpool_vllm.device_npu import npu_device

    space, keys, ids = Namespace(model="demo", layers=3, head_groups=2), bytes(range(2 * KEY_BYTES)), [3, 8]
    for one_stores in (True, False):
        client: Any = MemoryClient(MemoryPool())
        caches = filled(shape("cpu"), 1)
        halves = ranks(shape, caches, dim, 2)
        if one_stores:
            halves = [shape("cpu", 2) for _ in halves]
        else:
            caches = shape("cpu")
        both = KVBlocks(caches, BLOCKS, 4)
        alone = [KVBlocks(half, BLOCKS, 2) for half in halves]
        sources, targets = (both.split(2), alone) if one_stores else (alone, both.split(2))
        for shard, (source, target) in enumerate(zip(sources, targets, strict=True)):
            for kv, store in ((source, True), (target, False)):
                device = npu_device([both if kv not in alone else kv])
                move: Any = device.save if store else device.load
                result = move(client, Part(space, keys, ids), kv, shard=shard, after=device.fence())
                assert (result.stored if store else result.prefix) == 2
                device.close()
        for number, half in enumerate(halves):
            for name, tensor in half.items():
                mine = caches[name].narrow(dim, 2 * number, 2)
                for block in range(BLOCKS):
                    rows = tensor.shape[0] // BLOCKS
                    there, here = (t[block * rows :][:rows].contiguous().view(torch.uint8) for t in (tensor, mine))
                    assert torch.equal(there, here) == (block in ids)
