"""One real engine on a pool that does as it is told: hits, failures, aborts, slow answers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.conftest import Prompts
from tests.e2e.engine import BLOCK_TOKENS, Engine

kvpool_testing = pytest.importorskip("kvpool_vllm.testing")
POOL, FAULTS = kvpool_testing.POOL, kvpool_testing.FAULTS

PROMPT = 20 * BLOCK_TOKENS + 5


@pytest.fixture
def engine(memory_engine: Engine) -> Iterator[Engine]:
    """Return the engine with empty caches, and check afterwards that the test left nothing held."""
    FAULTS.reset()
    POOL.clear()
    memory_engine.forget()
    free = memory_engine.free_blocks()
    yield memory_engine
    FAULTS.reset()
    memory_engine.drain()
    memory_engine.step_until(lambda: memory_engine.scheduler.leases == 0)
    assert memory_engine.free_blocks() == free
    assert POOL.leases == set()
    assert not memory_engine.scheduler._requests
    assert not memory_engine.worker._loading


def gained(engine: Engine, name: str, before: dict[str, int]) -> int:
    return engine.counters().get(name, 0) - before.get(name, 0)


def test_same_tokens_cold_from_hbm_and_from_the_pool(engine: Engine, prompts: Prompts) -> None:
    """A prompt is answered alike, whether it is computed, in the engine's cache, or loaded."""
    prompt, cold = prompts.clear(engine, PROMPT)
    assert cold.cached == 0
    hbm = engine.generate(prompt, 4)
    before = engine.counters()
    engine.forget()
    pool = engine.generate(prompt, 4)
    assert cold.tokens == hbm.tokens == pool.tokens
    assert hbm.cached == pool.cached == 20 * BLOCK_TOKENS
    assert gained(engine, "load.blocks", before) == 20
    assert gained(engine, "save.jobs", before) == 0, "what was loaded is not saved again"


def test_whole_prompt_from_the_pool(engine: Engine, prompts: Prompts) -> None:
    """A prompt of whole blocks is loaded whole; only its last token is computed again."""
    prompt, cold = prompts.clear(engine, 8 * BLOCK_TOKENS)
    hbm = engine.generate(prompt, 4)
    engine.forget()
    before = engine.counters()
    pool = engine.generate(prompt, 4)
    assert pool.tokens == hbm.tokens == cold.tokens
    assert gained(engine, "load.blocks", before) == 8
    assert gained(engine, "save.jobs", before) == 0


def test_pool_continues_what_the_engine_holds(engine: Engine, prompts: Prompts) -> None:
    """Where the engine holds the first blocks itself, only the rest is loaded."""
    prompt, cold = prompts.clear(engine, PROMPT)
    engine.forget()
    engine.generate(prompt[: 8 * BLOCK_TOKENS + 1], 1)
    before = engine.counters()
    pool = engine.generate(prompt, 4)
    assert pool.tokens == cold.tokens
    assert gained(engine, "load.blocks", before) == 12


def test_wrong_bytes_would_show(engine: Engine, prompts: Prompts) -> None:
    """The model's answer depends on the KV of every layer: else equal tokens would prove nothing."""
    prompt, cold = prompts.clear(engine, PROMPT)
    for shard in POOL.shards.values():
        shard[1] = bytes(reversed(shard[1]))
    engine.forget()
    assert engine.generate(prompt, 4).tokens != cold.tokens


@pytest.mark.parametrize("arrived", [0, 1, 7, 19])
def test_load_that_fails_midway_is_recomputed(engine: Engine, prompts: Prompts, arrived: int) -> None:
    """Blocks that did not arrive are computed, whatever garbage the attempt left in them; the rest is used."""
    prompt, cold = prompts.clear(engine, PROMPT)
    engine.forget()
    FAULTS.get_blocks_max, FAULTS.spoil_rest = arrived, True
    before = engine.counters()
    answer = engine.generate(prompt, 4)
    assert answer.tokens == cold.tokens
    assert gained(engine, "load.blocks", before) == arrived
    assert gained(engine, "load.failed", before) == 20 - arrived
    assert FAULTS.gets == 1, "a failed load is not tried again"
    assert engine.generate(prompt, 4).tokens == cold.tokens


def test_pool_that_raises_is_a_miss(engine: Engine, prompts: Prompts) -> None:
    """No exception of a client reaches a request."""
    prompt, cold = prompts.clear(engine, PROMPT)
    for call in ("get", "lookup", "put"):
        engine.forget()
        FAULTS.raises = {call: RuntimeError("injected")}
        assert engine.generate(prompt, 4).tokens == cold.tokens
    FAULTS.raises = {}


def test_abort_during_a_load_leaks_nothing(engine: Engine, prompts: Prompts) -> None:
    """A request aborted while its blocks are being written frees them when, not before, the load ends."""
    prompt, cold = prompts.clear(engine, PROMPT)
    engine.forget()
    free = engine.free_blocks()
    FAULTS.get_gate.close()
    request = engine.submit(prompt)
    engine.step_until(FAULTS.get_gate.arrived.is_set)
    engine.abort(request)
    for _ in range(5):
        engine.llm.llm_engine.step()
    assert engine.free_blocks() <= free - 20, "the load still writes into these blocks"
    assert engine.scheduler.leases == 1
    FAULTS.get_gate.open()
    engine.drain()
    assert engine.free_blocks() == free
    assert engine.generate(prompt, 4).tokens == cold.tokens


def test_abort_of_a_load_that_waits_for_a_thread(engine: Engine, prompts: Prompts) -> None:
    """Loads behind busy threads end at once when their request is aborted."""
    stored = [prompts.clear(engine, 3 * BLOCK_TOKENS + 1) for _ in range(4)]
    engine.forget()
    FAULTS.get_gate.close()
    requests = [engine.submit(prompt) for prompt, _ in stored]
    engine.step_until(lambda: len(engine.worker._loading) == 4)
    for request in requests:
        engine.abort(request)
    engine.step_until(lambda: len(engine.worker._loading) == 2)
    FAULTS.get_gate.open()
    engine.drain()
    for prompt, cold in stored:
        assert engine.generate(prompt, 4).tokens == cold.tokens


def test_abort_during_a_lookup_gives_its_lease_back(engine: Engine, prompts: Prompts) -> None:
    """A lease that arrives after its request is gone is released."""
    prompt, _ = prompts.clear(engine, PROMPT)
    engine.forget()
    FAULTS.lookup_gate.close()
    given = POOL.leases_given
    request = engine.submit(prompt)
    for _ in range(3):
        engine.llm.llm_engine.step()
    engine.abort(request)
    FAULTS.lookup_gate.open()
    engine.step_until(lambda: POOL.leases_given > given and not POOL.leases)


def test_slow_lookup_does_not_hold_others_up(engine: Engine, prompts: Prompts) -> None:
    """While a lookup hangs the engine computes other requests; in the end the lookup is a miss."""
    prompt, cold = prompts.clear(engine, PROMPT)
    short, answer = prompts.clear(engine, BLOCK_TOKENS - 1)
    engine.forget()
    FAULTS.lookup_gate.close()
    before = engine.counters()
    waiting, running = engine.submit(prompt, 4), engine.submit(short, 4)
    outputs = engine.drain()
    assert engine._answer(outputs[waiting]).tokens == cold.tokens
    assert engine._answer(outputs[running]).tokens == answer.tokens
    assert gained(engine, "lookup.abandoned", before) == 1
    FAULTS.lookup_gate.open()


def test_stuck_saves_are_dropped_not_waited_for(engine: Engine, prompts: Prompts) -> None:
    """Saves hold at most a quarter of the engine's blocks; beyond it they are dropped and counted."""
    FAULTS.put_gate.close()
    blocks = engine.vllm_scheduler.kv_cache_manager.block_pool.num_gpu_blocks
    before = engine.counters()
    finished: set[str] = set()
    for _ in range(blocks // 4 // 100 + 2):
        request = engine.submit(prompts.random(100 * BLOCK_TOKENS), 1)
        finished |= engine.step_until(lambda: not engine.vllm_scheduler.has_unfinished_requests()).keys()
        assert request in finished
    assert gained(engine, "save.dropped_blocks", before) >= 100
    assert engine.scheduler._saves.blocks <= blocks // 4
    FAULTS.put_gate.open()
    engine.drain()
    engine.forget()


def test_many_requests_with_shared_prefixes(engine: Engine, prompts: Prompts) -> None:
    """Requests that load the same blocks at the same time get the same tokens as alone."""
    prefix, _ = prompts.clear(engine, 10 * BLOCK_TOKENS)
    alone = [(prompt, engine.generate(prompt, 2)) for prompt in (prefix + prompts.random(40) for _ in range(12))]
    clear = [(prompt, answer) for prompt, answer in alone if answer.margin >= 0.25]
    assert len(clear) >= 3
    engine.forget()
    for (_, expected), answer in zip(clear, engine.generate_all([prompt for prompt, _ in clear], 2), strict=True):
        assert answer.tokens == expected.tokens


def test_nothing_is_shared_for_requests_that_hash_alike_but_differ(engine: Engine, prompts: Prompts) -> None:
    """The namespace says what the hashes do not: model content, layout, instruction set, hash seed."""
    engine.generate(prompts.random(2 * BLOCK_TOKENS), 1)
    (namespace,) = engine.scheduler._namespaces
    assert namespace.model == "tiny-model"
    assert namespace.block_tokens == BLOCK_TOKENS
    assert (namespace.layers, namespace.kv_heads, namespace.head_size) == (3, 2, 32)
    assert namespace.dtype == "bfloat16"
    assert namespace.isa
    assert namespace.layout.startswith("CPU_ATTN:")
    assert len(namespace.hash_fingerprint) == 32
