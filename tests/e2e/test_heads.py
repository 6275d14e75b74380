"""Engines of different tensor parallelism on one pool."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvpool.model import Namespace, split_keys
from kvpool.proxy.chains import block_keys
from tests.e2e.conftest import Pool, Prompts
from tests.e2e.test_models import PROMPT, running, stored

TP1: dict[str, Any] = {}
TP2: dict[str, Any] = {"tensor_parallel_size": 2}
SEEDS = {"prefill": {"tp_size": 2, "dp_size": 1}, "decode": {"tp_size": 1}}
"""Both engines are told of both sides."""

BLOCKS = PROMPT // 32

pytestmark = pytest.mark.timeout(300)


def namespaces(pool: Pool) -> dict[int, str]:
    """Return the digests of the namespaces by their head groups."""
    found = pool.control("namespaces")["namespaces"]
    return {item["descriptor"]["head_groups"]: item["digest"] for item in found}


@pytest.mark.parametrize(("storing", "loading"), [(TP2, TP1), (TP1, TP2)], ids=["TP 2 to 1", "TP 1 to 2"])
def test_what_one_stores_the_other_answers_from(
    pool: Pool, home: Path, prompts: Prompts, storing: dict[str, Any], loading: dict[str, Any]
) -> None:
    """All blocks of a prompt are loaded, and the tokens are those of the engine that computed them."""
    with running(pool, home, "qwen2", SEEDS, **storing) as engine:
        prompt, cold = stored(engine, pool, prompts)
    with running(pool, home, "qwen2", SEEDS, **loading) as engine:
        hit = engine.generate(prompt, 4)
        assert hit.cached == BLOCKS * 32
        assert hit.tokens == cold.tokens
        assert engine.counters()["load.arrived"] == BLOCKS
        engine.forget()
        if loading is TP1:  # whose worker counts in its own process
            arrived = engine.counters()["load.blocks"]
            assert engine.generate(prompt, 4).tokens == cold.tokens
            assert engine.counters()["load.blocks"] == arrived + BLOCKS
    assert set(namespaces(pool)) == {2}


@pytest.fixture
def own_pool(tmp_path: Path) -> Any:
    """Return a pool in which nobody has stored anything."""
    one = Pool(tmp_path)
    yield one
    one.close()


def test_engines_that_are_not_told_share_nothing(own_pool: Pool, home: Path, prompts: Prompts) -> None:
    """Each stores as it holds; why one does not find the other's blocks is said in a word."""
    with running(own_pool, home, "qwen2") as engine:
        prompt, cold = stored(engine, own_pool, prompts)
    with running(own_pool, home, "qwen2", **TP2) as engine:
        engine.generate(prompts.random(PROMPT), 1)
        digests = namespaces(own_pool)
        for block in _explained(own_pool, digests[2], _keys(own_pool, prompt)[:2]):
            assert block["other_namespace"] == digests[1]
            assert [difference["field"] for difference in block["differences"]] == ["head_groups"]
        alone = engine.generate(prompt, 4)
        assert (alone.cached, alone.tokens) == (0, cold.tokens)


def _explained(pool: Pool, namespace: str, keys: list[str]) -> list[Any]:
    line = [sys.executable, "-m", "kvpool.cli.ctl", "--master", pool.address, "explain", "--json"]
    asked = subprocess.run(
        [*line, "--namespace", namespace, *keys], capture_output=True, text=True, timeout=30, check=False
    )
    assert asked.returncode == 1, "none is there"
    blocks: list[Any] = json.loads(asked.stdout)["blocks"]
    return blocks


def _keys(pool: Pool, prompt: list[int]) -> list[str]:
    (found,) = (item for item in pool.control("namespaces")["namespaces"] if item["descriptor"]["head_groups"] == 1)
    return [key.hex() for key in split_keys(block_keys(Namespace(**found["descriptor"]), prompt))]


def test_kernels_pack_each_head_by_itself() -> None:
    """The CPU's attention writes the same bytes for some heads, whether or not others lie beside them."""
    torch = pytest.importorskip("torch")
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    from kvpool_vllm.device import KVBlocks

    isa = _get_attn_isa(torch.bfloat16, 32, 64)
    slots = torch.arange(4 * 32, dtype=torch.int64)
    generator = torch.Generator().manual_seed(5)
    key, value = (torch.randn(4 * 32, 4, 64, generator=generator).to(torch.bfloat16) for _ in range(2))

    def written(first: int, end: int) -> KVBlocks:
        cache = torch.zeros(4, end - first, 32, 2 * 64, dtype=torch.bfloat16)
        keys, values = cache.view(4, end - first, 64, 64).chunk(2, dim=2)
        some = key[:, first:end].contiguous(), value[:, first:end].contiguous()
        ops.cpu_attn_reshape_and_cache(*some, keys, values, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto")
        return KVBlocks({"l.0": cache}, 4, end - first)

    whole = written(0, 4)
    for parts in (2, 4):
        for number, part in enumerate(whole.split(parts)):
            alone = written(number * 4 // parts, (number + 1) * 4 // parts)
            for (mine,), (theirs,) in zip(part.views(range(4)), alone.views(range(4)), strict=True):
                assert mine.tobytes() == theirs.tobytes()
                assert mine.any()
