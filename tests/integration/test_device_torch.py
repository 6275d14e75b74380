"""Blocks of torch tensors to and from a real node, straight between them and its memory.

On a GPU where there is one. On the CPU always: there the runtime that page-locks is a fake, and torch's
streams do everything at once; the rest is what runs on a GPU.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from kvpool.client_views import shared_memory
from kvpool.model import KEY_BYTES, Namespace
from tests.integration.pool import Pool

torch: Any = pytest.importorskip("torch", reason="needs torch, which comes with an engine: make e2e")

from kvpool_vllm.device import KVBlocks  # noqa: E402
from kvpool_vllm.device_cuda import cuda_device  # noqa: E402
from kvpool_vllm.metadata import Part  # noqa: E402

BLOCKS, LAYERS = 80, 5
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch finds none")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=gpu)])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        runtime = SimpleNamespace(
            cudaHostRegister=lambda _address, _size, _flags: 0,
            cudaHostUnregister=lambda _address: 0,
            cudaError=SimpleNamespace(success=0),
        )
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    return str(request.param)


def test_blocks_go_straight_to_slots_and_back(kind: str, bare_pool: Pool) -> None:
    """Two engines on one host: what one saves the other loads, bit by bit, without a buffer on either side."""
    bare_pool.start_master()
    bare_pool.start_node("a")
    space = Namespace(model="demo", layers=LAYERS)
    sides = []
    for name in ("writer", "reader"):
        caches = {f"l.{i}": torch.zeros(BLOCKS, 16, 576, dtype=torch.bfloat16, device=kind) for i in range(LAYERS)}
        kv = KVBlocks(caches, BLOCKS)
        device = cuda_device([kv])
        client = bare_pool.client("a", checksum="transfer", name=name)
        segment = device._pinning.segment(shared_memory(client))
        assert segment is not None
        assert segment.wait(60.0)
        sides.append((caches, kv, device, client))
    (source, kv, writer, client), (target, other, reader, second) = sides
    generator = torch.Generator().manual_seed(1)
    for tensor in source.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    ids = torch.randperm(BLOCKS, generator=generator).tolist()
    saved, loaded = ids[:64], ids[10:74]
    keys = os.urandom(64 * KEY_BYTES)
    assert writer.save(client, Part(space, keys, saved), kv, after=writer.fence()).stored == 64
    result = reader.load(second, Part(space, keys, loaded), other, after=reader.fence())
    assert (result.prefix, result.tiers) == (64, {"local": 64})
    for name, tensor in target.items():
        assert torch.equal(tensor[loaded], source[name][saved])
        assert not tensor[[i for i in range(BLOCKS) if i not in loaded]].any()
    assert +writer.counters == {"save.direct": 64}
    assert +reader.counters == {"load.direct": 64}
    writer.close()
    reader.close()
