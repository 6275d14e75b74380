"""Real engines of several architectures and parallel sizes on a real pool."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import models
from tests.e2e.conftest import MARGIN_MIN, EngineProcess, Pool, Prompts
from tests.e2e.engine import BLOCK_TOKENS, Answer
from tests.e2e.forked import Forked

PROMPT = 645
"""Five tokens more than whole blocks of 16 or 32."""

pytestmark = pytest.mark.timeout(240)


@contextmanager
def running(
    pool: Pool, home: Path, kind: str, more: dict[str, Any] | None = None, **arguments: Any
) -> Iterator[EngineProcess]:
    """Run an engine of this kind of model on the pool; nothing must be left held when it ends.

    ``more``: settings of the connector.
    """
    cores = sorted(os.sched_getaffinity(0))
    ranks = arguments.get("tensor_parallel_size", 1)
    if len(cores) < ranks:
        pytest.skip(f"needs {ranks} cores")
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, cores[:ranks]))} if ranks > 1 else {}
    checkpoint = home / "models" / kind
    if not checkpoint.exists():
        models.make(home / "models", kind)
    settings = {"master": pool.address, "client_factory": "kvpool_vllm.testing:faulty_client", "lookup_timeout": "1s"}
    engine = EngineProcess(checkpoint, settings | (more or {}), binding, **arguments)
    try:
        yield engine
        engine.ask("settle")
        state = engine.state()
        assert (state["leases"], state["tracked"], state["held_for_saving"]) == (0, 0, 0)
        engine.forget()  # which fails while any block is held
    finally:
        engine.close()


def stored(engine: EngineProcess, pool: Pool, prompts: Prompts) -> tuple[list[int], Answer]:
    """Return a prompt that was computed and stored, with its answer: clear, and not one token repeated."""
    for _ in range(50):
        prompt = prompts.random(PROMPT)
        known, before = pool.control("status")["blocks"], engine.counters().get("save.stored", 0)
        cold = engine.generate(prompt, 4)
        if engine.state()["client"].get("worker"):  # ranks that are processes count for themselves
            pool.wait_blocks(known + engine.counters()["save.stored"] - before)
        if cold.margin >= MARGIN_MIN:
            assert cold.cached == 0
            return prompt, cold
    raise AssertionError("no prompt with a clear margin")


@pytest.mark.parametrize(
    ("kind", "whole", "window"),
    [
        ("qwen2", 1, 0),
        ("mla", 1, 0),
        ("sliding-and-full", 1, 3),
        ("sinks-and-experts", 1, 3),
        ("sliding-only", 0, 3),
        # Three groups of one chunked layer each: the chunk of four blocks has just begun.
        ("chunked-and-full", 1, 3 * 0),
    ],
)
def test_same_tokens_cold_from_hbm_and_from_the_pool(
    pool: Pool, home: Path, prompts: Prompts, kind: str, whole: int, window: int
) -> None:
    """Each kind of attention: what is loaded is what is needed, and is answered from as if computed.

    That is ``whole`` times the prompt, and ``window`` blocks.
    """
    with running(pool, home, kind) as engine:
        block = engine.state()["block_tokens"]
        # vLLM makes them smaller for MLA on a processor without tiles.
        assert block == BLOCK_TOKENS or (kind == "mla" and block == BLOCK_TOKENS // 2)
        prompt, cold = stored(engine, pool, prompts)
        hbm = engine.generate(prompt, 4)
        before = engine.counters()
        engine.forget()
        pooled = engine.generate(prompt, 4)
        assert cold.tokens == hbm.tokens == pooled.tokens
        assert pooled.cached == PROMPT // block * block
        assert hbm.cached == pooled.cached
        after = engine.counters()
        assert after["load.blocks"] - before.get("load.blocks", 0) == whole * (PROMPT // block) + window
        assert after.get("save.jobs", 0) == before.get("save.jobs", 0), "what was loaded is not saved again"
        if kind == "mla":
            return  # computing behind a short prefix rounds otherwise than computing the whole prompt
        engine.forget()
        partly = Answer(**engine.ask("generate_partly", prompt=prompt, blocks=2))
        assert partly.tokens[:4] == cold.tokens, "a load that fails is computed instead"
        engine.forget()
        longer = prompt[: PROMPT // 2] + prompts.random(64)
        assert engine.generate(longer, 1).cached == PROMPT // 2 // block * block


def test_ranks_with_the_same_head_store_it_once(pool: Pool, home: Path, prompts: Prompts) -> None:
    """Two ranks, one KV head: each stores half of the blocks, and both load all of them."""
    pool_blocks = pool.control("status")["blocks"]
    with running(pool, home, "one-kv-head", tensor_parallel_size=2) as engine:
        prompt = prompts.random(PROMPT)
        cold = engine.generate(prompt, 4)
        pool.wait_blocks(pool_blocks + PROMPT // 32)
        assert pool.control("status")["blocks"] == pool_blocks + PROMPT // 32
        engine.forget()
        pooled = engine.generate(prompt, 4)
        assert pooled.cached == PROMPT // 32 * 32
        assert engine.counters()["load.arrived"] == PROMPT // 32
        if cold.margin >= MARGIN_MIN:
            assert pooled.tokens == cold.tokens


def test_model_that_cannot_be_shared_is_refused_in_a_sentence(pool: Pool, home: Path) -> None:
    """The engine does not start, and says why."""
    models.make(home / "models", "mamba")
    engine = Forked("tests.e2e.engine", [str(home / "models" / "mamba"), "{}", "{}"], dict(os.environ), merge=True)
    with engine.stdout as output:
        said = output.read().decode()
    assert engine.wait(30) != 0
    assert "model: has KV of kind MambaSpec, which kvpool cannot share: its state is kept for whole" in said
