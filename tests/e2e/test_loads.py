"""Real engines that load in every way there is: the same tokens, whatever fails, and nothing held afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import MEMORY_CLIENT, EngineProcess, Prompts
from tests.e2e.engine import Answer

pytestmark = pytest.mark.timeout(240)

EVERYTHING = {"save_decode_cache": True, "discard_partial_chunks": False}


@dataclass(frozen=True)
class Kind:
    """How an engine is started."""

    connector: dict[str, Any]
    arguments: dict[str, Any]
    block: int = 32
    partial: bool = False


def multi_connector() -> dict[str, Any]:
    """Return a producer and a consumer side by side, neither of which does the other's work."""
    ours = {"kv_connector": "KVPoolConnector"}
    producer = {"kv_role": "kv_producer", "kv_connector_extra_config": MEMORY_CLIENT}
    consumer = {"kv_role": "kv_consumer", "kv_connector_extra_config": {**MEMORY_CLIENT, "consumer_is_to_load": True}}
    children = [{**ours, **producer}, {**ours, **consumer}]
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": children},
    }


KINDS = {
    "sync": Kind({"load_async": False}, {"block_size": 128, "max_num_batched_tokens": 512}, 128),
    "layerwise": Kind({"use_layerwise": True}, {"max_num_batched_tokens": 512}),
    "everything": Kind(EVERYTHING, {"block_size": 128}, 128, partial=True),
    "everything_layerwise": Kind({"use_layerwise": True, **EVERYTHING}, {}, partial=True),
    "multi": Kind({}, {"kv_transfer_config": multi_connector()}),
}


class Loading:
    """One engine, and what its prompts look like."""

    def __init__(self, kind: Kind, process: EngineProcess, prompts: Prompts) -> None:
        self.kind, self.process, self.prompts = kind, process, prompts
        self.blocks = 1500 // kind.block

    def prompt(self, tokens: int = 4) -> tuple[list[int], Answer]:
        """Return a prompt of whole blocks and five tokens, and its answer; the pool has it, the engine has not."""
        prompt, cold = self.prompts.clear(self.process, self.blocks * self.kind.block + 5, tokens)
        self.process.forget()
        return prompt, cold

    def generate(self, prompt: list[int]) -> Answer:
        return self.process.generate(prompt, 4)

    def faults(self, **values: Any) -> int:
        blocks: int = self.process.ask("faults", values=values)
        return blocks


@pytest.fixture(scope="module", params=KINDS)
def started(request: pytest.FixtureRequest, model: Path, prompts: Prompts) -> Iterator[Loading]:
    """Return an engine of each kind."""
    kind = KINDS[request.param]
    process = EngineProcess(model, {**MEMORY_CLIENT, **kind.connector}, {"KVPOOL_GATE": "off"}, **kind.arguments)
    yield Loading(kind, process, prompts)
    process.close()


@pytest.fixture
def loading(started: Loading) -> Iterator[Loading]:
    """Return the engine, and check afterwards that the test left nothing held."""
    before = started.process.state()
    yield started
    started.faults()
    started.process.ask("settle")
    after = started.process.state()
    assert after["free_blocks"] == before["free_blocks"]
    assert after["leases"] == after["tracked"] == after["held_for_saving"] == 0


def test_same_tokens_cold_from_hbm_and_from_the_pool(loading: Loading) -> None:
    """A prompt is answered alike, whether it is computed, loaded, or in the engine's cache."""
    prompt, cold = loading.prompt()
    pool = loading.generate(prompt)
    hbm = loading.generate(prompt)
    assert cold.tokens == pool.tokens == hbm.tokens
    loaded = len(prompt) if loading.kind.partial else loading.blocks * loading.kind.block
    assert pool.cached in (loaded, len(prompt) - 1)
    assert hbm.cached == loading.blocks * loading.kind.block


def test_whole_blocks_only(loading: Loading) -> None:
    """A prompt without a rest leaves its last token to compute."""
    prompt, cold = loading.prompts.clear(loading.process, 4 * loading.kind.block)
    loading.process.forget()
    assert loading.generate(prompt).tokens == cold.tokens


def test_pool_continues_what_the_engine_holds(loading: Loading) -> None:
    """Where the engine holds the first blocks itself, only the rest is loaded."""
    prompt, cold = loading.prompt()
    loading.process.generate(prompt[: 4 * loading.kind.block + 1], 1)
    assert loading.generate(prompt).tokens == cold.tokens


@pytest.mark.parametrize("arrived", [0, 1, 7])
def test_load_that_fails_midway_is_recomputed(loading: Loading, arrived: int) -> None:
    """Blocks that did not arrive are computed, whatever garbage is in them; nobody else ever sees it."""
    prompt, cold = loading.prompt()
    loading.faults(get_blocks_max=arrived, spoil_rest=True)
    both = loading.process.ask("generate_all", prompts=[prompt, prompt], tokens=4)
    assert [answer["tokens"] for answer in both] == [cold.tokens, cold.tokens]
    loading.faults()
    assert loading.generate(prompt).tokens == cold.tokens, "what is in the engine's cache now"
    loading.process.forget()
    assert loading.generate(prompt).tokens == cold.tokens, "what is in the pool now"


@pytest.mark.parametrize("layers", [1, 2])
def test_layers_that_are_lost_midway(loading: Loading, layers: int) -> None:
    """The forward has begun on what was loaded: its result is thrown away, and computed anew."""
    prompt, cold = loading.prompt()
    loading.faults(gets_max=layers, spoil_rest=True)
    assert loading.generate(prompt).tokens == cold.tokens
    loading.faults()
    assert loading.generate(prompt).tokens == cold.tokens


def test_abort_after_a_failed_load_leaves_no_garbage(loading: Loading) -> None:
    """What a step was to load and did not is not in the engine's cache for the next one to find."""
    prompt, cold = loading.prompt()
    loading.faults(get_blocks_max=2, spoil_rest=True)
    loading.process.ask("abort_after_load", prompt=prompt)
    loading.faults(get_blocks_max=0)
    assert loading.generate(prompt).tokens == cold.tokens


def test_many_at_once(loading: Loading) -> None:
    """Requests that share a prefix, in chunks beside each other, get the same tokens as alone."""
    prefix, _ = loading.prompt()
    prompts = [prefix + loading.prompts.random(n) for n in (3, 40, 200, 3, 700)]
    alone = [loading.generate(prompt) for prompt in prompts]
    loading.process.forget()
    together = loading.process.ask("generate_all", prompts=prompts, tokens=4)
    for answer, other in zip(alone, together, strict=True):
        if answer.margin >= 0.25:
            assert other["tokens"] == answer.tokens


def test_generated_and_partial_blocks(loading: Loading) -> None:
    """The next turn of a conversation, and the very same prompt, find all there is to find."""
    prompt, _ = loading.prompts.clear(loading.process, 2 * loading.kind.block + 5, 4)
    loading.process.forget()
    first = loading.process.generate(prompt, 2 * loading.kind.block)
    stored = len(prompt) if loading.kind.partial else 2 * loading.kind.block
    assert first.cached in (stored, len(prompt) - 1)
    loading.process.forget()
    turn = loading.process.generate(prompt + first.tokens + [5, 6, 7], 1)
    assert turn.cached == (4 if loading.kind.partial else 2) * loading.kind.block


def test_weights_that_changed(loading: Loading) -> None:
    """After a reset of the engine's and the connector's caches nothing stored before is found."""
    prompt, cold = loading.prompt()
    loading.process.ask("reset_all")
    again = loading.generate(prompt)
    assert (again.tokens, again.cached) == (cold.tokens, 0)
    loading.process.forget()
    assert loading.generate(prompt).cached > 0


def test_preempted_requests(model: Path, prompts: Prompts) -> None:
    """Requests that lost their blocks load them again, and continue with the same tokens."""
    arguments = {"kv_cache_memory_bytes": 40 * 32 * 768, "max_model_len": 1024, "max_num_batched_tokens": 512}
    engine = EngineProcess(model, {**MEMORY_CLIENT, **EVERYTHING}, {"KVPOOL_GATE": "off"}, **arguments)
    try:
        asked = [prompts.random(n) for n in (200, 250, 300, 180, 220, 260)]
        alone = [engine.generate(prompt, 100) for prompt in asked]
        engine.forget()
        free = engine.state()["free_blocks"]
        before = engine.counters().get("load.blocks", 0)
        together = engine.ask("generate_all", prompts=asked, tokens=100)
        engine.ask("settle")
        state = engine.state()
        assert state["preemptions"] > 0
        assert state["counters"]["load.blocks"] > before
        assert (state["free_blocks"], state["leases"], state["tracked"]) == (free, 0, 0)
        sure = [answer.sure_tokens(0.1) for answer in alone]
        assert sum(map(len, sure)) > len(sure), "tokens beyond the first"
        assert [answer["tokens"][: len(one)] for one, answer in zip(sure, together, strict=True)] == sure
    finally:
        engine.close()
