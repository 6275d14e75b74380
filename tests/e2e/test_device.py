"""KV tensors as bytes: the shapes that engines register, and those that are refused."""

from __future__ import annotations

from typing import Any

import pytest

from kvpool.errors import InvalidArgumentError

torch = pytest.importorskip("torch")
device = pytest.importorskip("kvpool_vllm.device")


def layers(*shape: int, count: int = 2, names: str = "model.layers.{}.attn") -> dict[str, Any]:
    return {names.format(i): torch.full(shape, i, dtype=torch.bfloat16) for i in range(count)}


def test_views_are_the_engines_own_memory() -> None:
    """A byte written through a view is in the tensor, in its block and layer, and nowhere else."""
    caches = layers(8, 2, 4, 16)
    kv = device.KVBlocks(caches, 8)
    assert (len(kv), kv.layer_block_bytes) == (2, 2 * 4 * 16 * 2)
    (views,) = kv.views([3])
    views[1][:] = 0
    tensor = caches["model.layers.1.attn"]
    assert not tensor[3].any()
    assert tensor[2].all()
    assert tensor[4].all()


def test_layers_come_in_their_natural_order() -> None:
    """Layer 10 lies behind layer 9, whatever order the engine names them in."""
    caches = dict(reversed(layers(4, 8, count=12).items()))
    kv = device.KVBlocks(caches, 4)
    assert [name.split(".")[2] for name in kv.names] == [str(i) for i in range(12)]


def test_layers_interleaved_in_one_storage() -> None:
    """Blocks may lie apart, as when one storage holds all layers block by block."""
    storage = torch.zeros(6, 2, 32, dtype=torch.bfloat16)
    kv = device.KVBlocks({f"l.{i}": storage[:, i] for i in range(2)}, 6)
    kv.views([5])[0][1][:] = 0xFF
    assert storage[5, 1].isnan().all()
    assert not storage[5, 0].any()
    assert not storage[:5].any()


def test_kernels_may_cut_blocks_into_rows() -> None:
    """Two rows of the tensor are one block of the engine."""
    kv = device.KVBlocks(layers(8, 16), 4)
    assert kv.layer_block_bytes == 2 * 16 * 2
    assert len(kv.views([3])[0][0]) == 64


@pytest.mark.parametrize(
    ("caches", "blocks"),
    [
        (layers(2, 8, 16), 8),  # keys and values outermost
        ({"l.0": torch.zeros(8, 16, 4)[:, :, ::2]}, 8),
        ({"l.0": torch.zeros(8, 16, 4)[:, :8].transpose(1, 2)[:, 1:3]}, 8),
        ({"l.0": torch.zeros(8, 16), "l.1": torch.zeros(8, 32)}, 8),
        ({}, 8),
        ({"l.0": torch.zeros(8, 16, device="meta")}, 8),
    ],
)
def test_what_has_no_whole_blocks_is_refused(caches: dict[str, Any], blocks: int) -> None:
    """At start, naming the layer and what it should be."""
    with pytest.raises(InvalidArgumentError, match="KV cache"):
        device.KVBlocks(caches, blocks)
