"""Two real engines, each in a process of its own, on a real master and node."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.conftest import EngineProcess, Pool, Prompts
from tests.e2e.engine import BLOCK_TOKENS, Answer

BLOCKS = 20
PROMPT = BLOCKS * BLOCK_TOKENS + 5

pytestmark = pytest.mark.timeout(240)


@dataclass
class Engines:
    first: EngineProcess
    second: EngineProcess


@pytest.fixture(scope="module")
def engines(pool: Pool, model: Path) -> Iterator[Engines]:
    """Return two engines that know the pool's master and nothing of each other."""
    settings = {"master": pool.address, "client_factory": "kvpool_vllm.testing:faulty_client", "lookup_timeout": "1s"}
    both = Engines(EngineProcess(model, settings, {}), EngineProcess(model, settings, {}))
    both.first.wait_up()
    both.second.wait_up()
    yield both
    both.first.close()
    both.second.close()


def gained(engine: EngineProcess, name: str, before: dict[str, int]) -> int:
    return engine.counters().get(name, 0) - before.get(name, 0)


def stored(engine: EngineProcess, pool: Pool, prompts: Prompts, tokens: int = 8) -> tuple[list[int], Answer]:
    """Return a prompt that the engine computed and stored, and its answer; the pool knows the blocks."""
    known, before = pool.control("status")["blocks"], engine.counters()
    prompt, cold = prompts.clear(engine, PROMPT, tokens)
    assert cold.cached == 0
    pool.wait_blocks(known + gained(engine, "save.stored", before))
    return prompt, cold


def test_same_tokens_cold_from_hbm_from_the_pool_and_in_a_second_engine(
    engines: Engines, pool: Pool, prompts: Prompts
) -> None:
    """One prompt, answered alike: computed, cached, loaded by the engine that stored it, loaded by another."""
    before, other = engines.first.counters(), engines.second.counters()
    prompt, cold = stored(engines.first, pool, prompts)
    assert gained(engines.first, "save.stored", before) >= BLOCKS
    hbm = engines.first.generate(prompt)
    engines.first.forget()
    again = engines.first.generate(prompt)
    elsewhere = engines.second.generate(prompt)
    assert cold.tokens == hbm.tokens == again.tokens == elsewhere.tokens
    assert hbm.cached == again.cached == elsewhere.cached == BLOCKS * BLOCK_TOKENS
    assert gained(engines.first, "load.blocks", before) == BLOCKS
    assert gained(engines.second, "load.blocks", other) == BLOCKS
    assert gained(engines.second, "save.jobs", other) == 0, "what was loaded is not saved again"


def test_second_engine_continues_a_shared_prefix(engines: Engines, pool: Pool, prompts: Prompts) -> None:
    """A prompt that shares only its beginning with what is stored loads that, and stores the rest."""
    prompt, _ = stored(engines.first, pool, prompts)
    longer = prompt[: 10 * BLOCK_TOKENS] + prompts.random(10 * BLOCK_TOKENS)
    before, known = engines.second.counters(), pool.control("status")["blocks"]
    cold = engines.second.generate(longer)
    assert cold.cached == 10 * BLOCK_TOKENS
    assert gained(engines.second, "save.stored", before) == 10
    pool.wait_blocks(known + 10)
    engines.second.forget()
    assert engines.second.generate(longer).cached == 20 * BLOCK_TOKENS


@pytest.mark.parametrize("arrived", [0, 9])
def test_load_that_fails_midway_is_recomputed(engines: Engines, pool: Pool, prompts: Prompts, arrived: int) -> None:
    """The second engine computes what did not arrive, and answers as the first did."""
    prompt, cold = stored(engines.first, pool, prompts)
    before = engines.second.counters()
    answer = Answer(**engines.second.ask("generate_partly", prompt=prompt, blocks=arrived))
    assert answer.tokens == cold.tokens
    assert gained(engines.second, "load.failed", before) == BLOCKS - arrived


def test_abort_during_a_load_leaks_nothing(engines: Engines, prompts: Prompts, pool: Pool) -> None:
    """Blocks, leases, pins and the request itself are gone afterwards, and the next request is served."""
    prompt, cold = stored(engines.first, pool, prompts)
    seen = engines.second.ask("abort_during_load", prompt=prompt)
    assert seen["held"] >= BLOCKS, "the load still writes into these blocks"
    assert seen["leaked"] == seen["tracked"] == 0
    assert engines.second.state()["leases"] == 0
    assert pool.control("status")["leases"] == 0
    assert engines.second.generate(prompt).tokens == cold.tokens
    pool.empty()


def test_node_killed_when_a_load_begins(engines: Engines, prompts: Prompts, pool: Pool) -> None:
    """The request is answered all the same; a new node serves both engines again."""
    prompt, cold = stored(engines.first, pool, prompts)
    answer = Answer(**engines.second.ask("generate_killing", prompt=prompt, pid=pool.node.pid))
    assert answer.tokens == cold.tokens
    assert engines.second.state()["leases"] == 0
    computed = engines.first.generate(prompts.random(PROMPT))
    assert computed.cached == 0, "an engine without a pool goes on"
    pool.replace_node()
    prompt, cold = stored(engines.first, pool, prompts)
    assert engines.second.generate(prompt).tokens == cold.tokens


def test_ranks_of_a_tensor_parallel_engine(pool: Pool, model: Path, prompts: Prompts) -> None:
    """Two ranks store two shards of each block; both come back after the engine forgot."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("needs two cores")
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, cores))}
    engine = EngineProcess(model, {"master": pool.address, "lookup_timeout": "1s"}, binding, tensor_parallel_size=2)
    try:
        known = pool.control("status")["blocks"]
        prompt, cold = prompts.clear(engine, PROMPT)
        pool.wait_blocks(known + BLOCKS)
        deadline = time.monotonic() + 30
        pooled = cold
        while pooled.cached < BLOCKS * BLOCK_TOKENS:  # the second rank's shards may be known a little later
            assert time.monotonic() < deadline, engine.counters()
            engine.forget()
            pooled = engine.generate(prompt, 4)
        assert pooled.tokens == cold.tokens
        assert engine.counters()["load.arrived"] >= BLOCKS
    finally:
        engine.close()
