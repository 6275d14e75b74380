"""Both sides of the connector under an engine that schedules like vLLM: whatever fails, tokens are right."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kvpool_vllm.testing import Faults, MemoryPool
from tests.connectors.model_engine import TOKENS, ModelEngine, Request, expected

DEADLINE_S = 60.0

MODES: dict[str, dict[str, Any]] = {
    "async": {},
    "sync": {"sync": True},
    "layerwise": {"sync": True, "use_layerwise": True},
    "layerwise_far": {"sync": True, "use_layerwise": True, "layerwise_prefetch_layers": 8},
    "everything": {"save_decode_cache": True, "discard_partial_chunks": False},
    "everything_sync": {"save_decode_cache": True, "discard_partial_chunks": False, "sync": True},
    "everything_layerwise": {
        "save_decode_cache": True,
        "discard_partial_chunks": False,
        "sync": True,
        "use_layerwise": True,
        "save_queue_blocks": 5,
    },
}


class Lab:
    """One pool, faults on command, and engines that are checked when they are closed."""

    def __init__(self) -> None:
        self.pool, self.faults = MemoryPool(), Faults()
        self.engines: list[ModelEngine] = []

    def engine(self, **options: Any) -> ModelEngine:
        self.engines.append(ModelEngine(self.pool, self.faults, **options))
        return self.engines[-1]

    def drain(self, engine: ModelEngine) -> None:
        """Step until nothing is left to do, each step after all saves, and check that nothing is held then.

        An engine without a model is too quick for its saves: more than may wait are left out.
        """
        deadline = time.monotonic() + DEADLINE_S
        while engine.busy or engine.side.leases:
            assert time.monotonic() < deadline, (
                f"stuck: {[(r.request_id, r.status, len(r.blocks)) for r in engine.requests.values()]}"
            )
            engine.step()
            while len(engine.worker._saved) < engine.worker._unreported_saves:
                assert time.monotonic() < deadline, "a save does not end"
                time.sleep(0)
        assert len(engine.pool.free) == engine.pool.num_gpu_blocks
        assert not engine.side._requests
        assert not engine.side._unsure
        assert not engine.worker._loading
        assert engine.side._saves.blocks == 0

    def answer(self, engine: ModelEngine, prompt: list[int], tokens: int = 3) -> Request:
        request = engine.submit(f"r{random.random()}", prompt, tokens)
        self.drain(engine)
        assert request.answer == expected(prompt, tokens)
        return request


@pytest.fixture
def lab() -> Iterator[Lab]:
    one = Lab()
    yield one
    one.faults.reset()
    for engine in one.engines:
        engine.close()
    assert not one.pool.leases


@pytest.mark.parametrize("mode", MODES)
def test_second_engine_loads_what_the_first_computed(lab: Lab, mode: str) -> None:
    """In every way of loading the answer is the same, and the prompt's blocks are loaded, not computed."""
    prompt = list(range(30))
    first, second = lab.engine(**MODES[mode]), lab.engine(**MODES[mode])
    lab.answer(first, prompt)
    lab.answer(second, prompt)
    assert second.loaded_tokens >= 28
    assert second.side.counters["load.arrived"] >= 7


@pytest.mark.parametrize("mode", ["sync", "layerwise", "layerwise_far"])
def test_whole_prompt_in_the_pool_leaves_a_token_to_compute(lab: Lab, mode: str) -> None:
    """The step that loads also samples."""
    prompt = list(range(6 * TOKENS))
    lab.answer(lab.engine(), prompt)
    second = lab.engine(**MODES[mode])
    lab.answer(second, prompt, 1)
    assert second.loaded_tokens == 6 * TOKENS - 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arrived", range(8))
def test_load_that_ends_early_is_computed(lab: Lab, mode: str, arrived: int) -> None:
    """Whatever garbage is in the blocks that did not arrive, nobody sees it: not even a request that comes then."""
    prompt = list(range(30))
    lab.answer(lab.engine(**MODES[mode]), prompt)
    engine = lab.engine(budget=8, **MODES[mode])
    lab.faults.get_blocks_max, lab.faults.spoil_rest = arrived, True
    requests = [engine.submit(f"r{i}", prompt + [i] * (i % 3), 3) for i in range(6)]
    for _ in range(2):
        engine.step()
    requests += [engine.submit(f"late{i}", [*prompt, 7, 7, i], 3) for i in range(3)]
    lab.drain(engine)
    for request in requests:
        assert request.answer == expected(request.prompt, 3)
    engine.forget()
    lab.faults.reset()
    lab.answer(engine, prompt)


@pytest.mark.parametrize("mode", ["sync", "layerwise"])
def test_abort_right_after_a_failed_load_leaves_no_garbage_in_the_cache(lab: Lab, mode: str) -> None:
    """Blocks that the step was to load are in the engine's cache before they are loaded, and out of it if they fail."""
    prompt = list(range(40))
    lab.answer(lab.engine(), prompt)
    engine = lab.engine(**MODES[mode])
    lab.faults.get_blocks_max, lab.faults.spoil_rest = 3, True
    request = engine.submit("doomed", prompt, 3)
    while not lab.faults.gets:
        engine.step()
    engine.abort(request)
    lab.faults.raises = {"lookup": RuntimeError("injected")}  # so that only the engine's cache can answer
    lab.answer(engine, prompt)


def test_request_waits_for_the_load_that_its_cache_hit_relies_on(lab: Lab) -> None:
    """Two requests for one prompt in one step: the second has none of the first's blocks before they are loaded."""
    prompt = list(range(30))
    lab.answer(lab.engine(), prompt)
    engine = lab.engine(sync=True)
    both = [engine.submit(name, prompt, 2) for name in ("one", "two")]
    while not lab.faults.gets:
        engine.step()
    assert both[1].status == "waiting"
    assert engine.side.counters["load.jobs"] == 1
    lab.drain(engine)
    assert both[0].answer == both[1].answer == expected(prompt, 2)
    assert engine.side.counters["load.jobs"] == 1, "the second one had them from the first"


@pytest.mark.parametrize("mode", MODES)
def test_layer_or_block_that_vanishes_between_lookup_and_load(lab: Lab, mode: str) -> None:
    """A pool that forgets at the moment of loading is a miss."""
    prompt = list(range(30))
    lab.answer(lab.engine(**MODES[mode]), prompt)
    engine = lab.engine(**MODES[mode])
    lab.faults.before_get = lab.pool.shards.clear
    lab.answer(engine, prompt)
    assert engine.side.counters["load.arrived"] < 7


def test_failure_between_two_layers_is_computed(lab: Lab) -> None:
    """The first layer arrives and is used, the second is lost: the step's output does not count."""
    prompt = list(range(30))
    lab.answer(lab.engine(), prompt)
    engine = lab.engine(sync=True, use_layerwise=True)
    seen = []

    def lose_at_second() -> None:
        seen.append(1)
        if len(seen) == 2:
            lab.faults.raises = {"get": RuntimeError("injected")}
            lab.pool.shards.clear()

    lab.faults.before_get = lose_at_second
    lab.answer(engine, prompt)
    assert len(seen) == 2
    assert engine.worker.counters["load.failed"] == 7


def test_partial_block_is_found_by_its_own_tokens_only(lab: Lab) -> None:
    """A prompt's last block counts where all its tokens agree, and not for a longer or shorter prompt."""
    settings = {"discard_partial_chunks": False}
    prompt = list(range(30))
    lab.answer(lab.engine(**settings), prompt)
    for length, loaded in ((30, 30), (29, 28), (31, 28)):
        engine = lab.engine(**settings)
        lab.answer(engine, list(range(length)))
        assert engine.loaded_tokens == loaded
    engine = lab.engine()
    lab.answer(engine, prompt)
    assert engine.loaded_tokens == 28


def test_prompt_shorter_than_a_block_may_be_stored(lab: Lab) -> None:
    """A partial block can be the only one."""
    lab.answer(lab.engine(discard_partial_chunks=False), [1, 2, 3])
    engine = lab.engine(discard_partial_chunks=False)
    lab.answer(engine, [1, 2, 3])
    assert engine.loaded_tokens == 3


def test_generated_blocks_are_stored_if_wanted(lab: Lab) -> None:
    """The next turn of a conversation finds the answer too."""
    prompt = list(range(10))
    for wanted, loaded in ((False, 8), (True, 28)):
        lab.pool.clear()
        engine = lab.engine(save_decode_cache=wanted)
        request = lab.answer(engine, prompt, 20)
        turn = prompt + request.answer + [1, 2, 3]
        later = lab.engine()
        lab.answer(later, turn)
        assert later.loaded_tokens == loaded


@pytest.mark.parametrize("sync", [False, True])
def test_partial_block_that_was_loaded_is_stored_once_it_is_full(lab: Lab, sync: bool) -> None:
    """Under its own name: the chain of the next turn has no hole where the prompt ended."""
    prompt = list(range(10))
    settings = {"save_decode_cache": True, "discard_partial_chunks": False}
    lab.answer(lab.engine(**settings), prompt, 1)
    request = lab.answer(lab.engine(sync=sync, **settings), prompt, 20)
    later = lab.engine()
    lab.answer(later, prompt + request.answer)
    assert later.loaded_tokens == 28


def test_short_prompts_are_left_alone_if_wanted(lab: Lab) -> None:
    """Minimum lengths, apart for saving and loading, count the prompt's tokens."""
    short, long = list(range(19)), list(range(100, 120))
    engine = lab.engine(save_min_tokens=20)
    lab.answer(engine, short)
    assert not lab.pool.shards
    lab.answer(engine, long)
    assert len(lab.pool.shards) == 5
    lab.answer(lab.engine(), short)
    picky = lab.engine(load_min_tokens=20)
    lab.answer(picky, short)
    assert (picky.loaded_tokens, picky.side.counters["lookup.asked"]) == (0, 0)
    lab.answer(picky, long)
    assert picky.loaded_tokens > 0


def test_what_was_dropped_is_saved_by_a_request_that_finds_it_in_the_engine(lab: Lab) -> None:
    """A full queue costs a save now; the chain is whole again once somebody comes back with it."""
    prompt = list(range(40))
    engine = lab.engine(save_queue_blocks=2)
    lab.faults.put_gate.close()
    request = engine.submit("first", prompt, 1)
    while not request.is_finished():
        engine.step()
    assert engine.side.counters["save.dropped_blocks"] == 8
    lab.faults.put_gate.open()
    lab.drain(engine)
    assert len(lab.pool.shards) == 2
    engine.side._saves._queue_blocks = 0
    lab.answer(engine, [*prompt, 1, 2, 3])
    assert len(lab.pool.shards) == 10


def test_what_the_pool_did_not_take_is_offered_again(lab: Lab) -> None:
    """Blocks whose save failed are saved by the next request that hits them in the engine."""
    prompt = list(range(40))
    engine = lab.engine()
    lab.faults.raises = {"put": RuntimeError("injected")}
    lab.answer(engine, prompt)
    lab.faults.reset()
    assert not lab.pool.shards
    lab.answer(engine, [*prompt, 1])
    assert len(lab.pool.shards) == 10


def test_last_blocks_of_a_request_that_ends_in_the_step_of_its_load(lab: Lab) -> None:
    """What is computed behind a load is saved once the load is known to be good, even if the request is over."""
    lab.answer(lab.engine(), list(range(20)))
    engine = lab.engine(sync=True)
    lab.answer(engine, list(range(32)), 1)
    assert engine.loaded_tokens == 20
    assert len(lab.pool.shards) == 8


@pytest.mark.parametrize("mode", ["sync", "layerwise"])
def test_what_was_computed_behind_a_failed_load_is_not_stored(lab: Lab, mode: str) -> None:
    """Its KV is as wrong as what it was computed from; what is computed afterwards is stored."""
    lab.answer(lab.engine(), list(range(20)))
    engine = lab.engine(budget=64, **MODES[mode])
    lab.faults.get_blocks_max, lab.faults.spoil_rest = 2, True
    lab.answer(engine, list(range(36)))
    lab.faults.reset()
    third = lab.engine()
    lab.answer(third, list(range(36)))
    assert third.loaded_tokens == 36


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(6))
def test_anything_may_happen(lab: Lab, mode: str, seed: int) -> None:
    """Shared prefixes, little memory, aborts, preemptions, failures of every kind: right tokens, nothing leaked."""
    rng = random.Random(f"{mode}/{seed}")
    engines = [lab.engine(blocks=rng.choice((16, 30)), budget=rng.choice((4, 8, 24)), **MODES[mode]) for _ in range(2)]
    stems = [[rng.randrange(1000) for _ in range(36)] for _ in range(2)]
    requests: list[Request] = []
    for number in range(60):
        engine = rng.choice(engines)
        stem = rng.choice(stems)
        prompt = stem[: rng.randrange(8, 37)] + [rng.randrange(1000) for _ in range(rng.randrange(8))]
        requests.append(engine.submit(f"r{number}", prompt, rng.randrange(1, 16)))
        for _ in range(rng.randrange(8)):
            disturb(rng, lab, engine, requests)
            engine.step()
    lab.faults.reset()
    for engine in engines:
        lab.drain(engine)
    for request in requests:
        assert request.answer == expected(request.prompt, len(request.answer))
    assert sum(len(request.answer) == request.max_tokens for request in requests) > len(requests) // 2


def disturb(rng: random.Random, lab: Lab, engine: ModelEngine, requests: list[Request]) -> None:
    """Do one bad thing, or make good what was done."""
    match rng.randrange(20):
        case 0:
            mine = [request for request in requests if request.request_id in engine.requests]
            if mine:
                engine.abort(rng.choice(mine))
        case 1:
            lab.faults.get_blocks_max, lab.faults.spoil_rest = rng.randrange(4), True
        case 2:
            lab.faults.raises = {rng.choice(("get", "put", "lookup")): RuntimeError("injected")}
        case 3:
            gates = [lab.faults.put_gate, lab.faults.lookup_gate]
            if not engine.side._sync:  # such a load is waited for
                gates.append(lab.faults.get_gate)
            rng.choice(gates).close()
        case 4:
            lab.pool.shards.clear()
        case 5 | 6 | 7:
            engine.forget()
        case 8 | 9 | 10 | 11:
            lab.faults.reset()
