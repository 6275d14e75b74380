"""What an engine tells of the pool, and how it does with a pool that hangs."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.conftest import Pool, Prompts
from tests.e2e.engine import BLOCK_TOKENS, Engine

BLOCKS = 12
PROMPT = BLOCKS * BLOCK_TOKENS + 5


class Recorder:
    """Stands for the publisher: keeps what was published."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def publish(self, batch: Any) -> None:
        self.events += batch.events

    def of(self, kind: str, medium: str | None = None) -> list[Any]:
        """Return the events of a kind, and of a medium if one is given."""
        found = [event for event in self.events if type(event).__name__ == kind]
        return found if medium is None else [event for event in found if event.medium == medium]

    def shutdown(self) -> None:
        """Nothing to end."""


@pytest.fixture(scope="module")
def engine(model: Any, pool: Pool) -> Iterator[Engine]:
    """Return an engine on a real pool, with statistics and events."""
    one = Engine(
        model,
        {"master": pool.address, "breaker_probe_interval": "200ms", "lookup_timeout": "500ms"},
        disable_log_stats=False,
        kv_events_config={"enable_kv_cache_events": True, "publisher": "null"},
    )
    yield one
    one.close()


@pytest.fixture
def published(engine: Engine) -> Recorder:
    """Return what the engine publishes from now on."""
    recorder = Recorder()
    engine.vllm_scheduler.kv_event_publisher = recorder
    return recorder


def metrics(engine: Engine) -> dict[str, float]:
    """Return our metrics on vLLM's page, by name and label."""
    found = {}
    for metric in engine.llm.get_metrics():
        if metric.name.startswith("vllm:kvpool_"):
            label = next((v for k, v in metric.labels.items() if k not in {"model_name", "engine"}), "")
            found[f"{metric.name.removeprefix('vllm:kvpool_')} {label}".strip()] = metric.value
    return found


def gained(engine: Engine, before: dict[str, float], name: str) -> float:
    return metrics(engine).get(name, 0) - before.get(name, 0)


def settle(engine: Engine, pool: Pool, blocks: int) -> None:
    """Wait until the master knows of the blocks."""
    engine.drain()
    pool.wait_blocks(blocks)


def test_metrics_and_events_of_a_miss_and_a_hit(
    engine: Engine, pool: Pool, prompts: Prompts, published: Recorder
) -> None:
    """A prompt that is stored and loaded again shows in vLLM's metrics, and in its events."""
    prompt = prompts.random(PROMPT)
    before = metrics(engine)
    engine.generate(prompt, 2)
    settle(engine, pool, BLOCKS)
    assert gained(engine, before, "save_blocks stored") == BLOCKS
    assert gained(engine, before, "save_bytes") > 0
    assert gained(engine, before, "miss_blocks not_stored") + gained(engine, before, "miss_blocks namespace_unknown")

    stored = published.of("BlockStored", "kvpool")
    assert [token for event in stored for token in event.token_ids] == prompt[: BLOCKS * BLOCK_TOKENS]
    own = published.of("BlockStored", "GPU")
    assert [h for e in stored for h in e.block_hashes] == [h for e in own for h in e.block_hashes][:BLOCKS]
    assert stored[0].parent_block_hash is None

    engine.forget()
    before = metrics(engine)
    engine.generate(prompt, 2)
    assert gained(engine, before, "hit_tokens local") == BLOCKS * BLOCK_TOKENS
    assert gained(engine, before, "load_bytes local") > 0
    assert gained(engine, before, "lookups hits") == 1
    assert metrics(engine)["tokens_per_second prefill"] > 0

    pool.empty()
    engine.forget()
    engine.generate(prompt, 2)
    (removed,) = published.of("BlockRemoved", "kvpool")
    assert removed.block_hashes == stored[0].block_hashes[:1]


def test_what_the_engine_holds_is_shown_by_the_master(
    engine: Engine, pool: Pool, prompts: Prompts, published: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys come when blocks are cached, and go with the cache; vLLM's publisher gets its events all the same."""
    told: list[bytes] = []
    client = engine.scheduler.watch.residency._client
    report = client.report_residency

    def listen(namespace: Any, added: bytes = b"", removed: bytes = b"", cleared: bool = False) -> None:
        told.extend(added[i : i + 16] for i in range(0, len(added), 16))
        report(namespace, added, removed, cleared)

    def shown() -> int:
        """Return how many of the keys told the master shows as the engine's own."""
        digest = engine.scheduler._namespaces[0].digest.hex()
        keys = ",".join(key.hex() for key in told)
        answer = pool.control("lookup", "--namespace", digest, "--hashes", keys)  # None where the pool has nothing
        residents = answer["residents"] if answer else []
        return sum(part["blocks"] for one in residents if one["tier"] == "hbm" for part in one["ranges"])

    def wait_shown(blocks: int) -> None:
        deadline = time.monotonic() + 30
        while (found := shown()) != blocks:
            assert time.monotonic() < deadline, f"the master shows {found} of {blocks} blocks"

    monkeypatch.setattr(client, "report_residency", listen)
    engine.forget()
    engine.generate(prompts.random(PROMPT), 1)
    assert len(told) == BLOCKS
    assert published.of("AllBlocksCleared")
    assert sum(len(event.block_hashes) for event in published.of("BlockStored", "GPU")) == BLOCKS
    wait_shown(BLOCKS)
    engine.forget()
    engine.generate(prompts.random(BLOCK_TOKENS + 1), 1)
    wait_shown(1)


def test_engine_goes_on_beside_a_node_that_hangs(engine: Engine, pool: Pool, prompts: Prompts) -> None:
    """Every request is answered while the node is stopped, soon without waiting for it; it is used again later."""
    shared = prompts.random(8 * BLOCK_TOKENS)
    asked = [shared + prompts.random(4 * BLOCK_TOKENS + 1) for _ in range(8)]
    engine.generate_all(asked, 2)
    settle(engine, pool, 8 + 8 * 4)
    engine.forget()
    pool.node.send_signal(signal.SIGSTOP)
    try:
        assert len(engine.generate_all(asked, 2)) == 8
        assert engine.worker._client.unusable_nodes()
        engine.generate(prompts.random(BLOCK_TOKENS), 1)  # a step in which the scheduler hears of it
        before, counters = metrics(engine), engine.counters()
        engine.forget()
        assert len(engine.generate_all(asked, 2)) == 8
        # The master may have noticed too, and then does not name the node.
        reasons = ("breaker_open", "owner_suspect", "not_stored")
        assert sum(gained(engine, before, f"miss_blocks {reason}") for reason in reasons) >= 8
        assert engine.counters()["load.jobs"] == counters["load.jobs"], "nobody waits for a load"
    finally:
        pool.node.send_signal(signal.SIGCONT)
    deadline = time.monotonic() + 30
    while engine.worker._client.unusable_nodes() or not engine.worker._client.has_node():
        assert time.monotonic() < deadline
        engine.generate(prompts.random(BLOCK_TOKENS), 1)
    engine.generate(prompts.random(BLOCK_TOKENS), 1)
    engine.forget()
    before = metrics(engine)
    while not gained(engine, before, "hit_tokens local"):
        assert time.monotonic() < deadline
        engine.generate_all(asked, 2)
        engine.forget()
