"""Prompts that one real engine computes and another goes on with."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import EngineProcess, Pool, Prompts
from tests.e2e.engine import BLOCK_TOKENS, Answer

PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}

pytestmark = pytest.mark.timeout(300)


def transfer_config(pool: Pool, role: str, name: str = "KVPoolConnector", **extra: Any) -> dict[str, Any]:
    return {
        "kv_connector": name,
        "kv_role": role,
        "kv_connector_extra_config": {"master": pool.address, "gate": "off", "lookup_timeout": "2s", **extra},
    }


@contextmanager
def engines(model: Path, *configs: dict[str, Any], **arguments: Any) -> Iterator[list[EngineProcess]]:
    """Run engines, each in a process of its own, started side by side."""
    with ExitStack() as stack:
        started = []
        for config in configs:
            started.append(EngineProcess(model, {}, {}, kv_transfer_config=config, **arguments))
            stack.callback(started[-1].close)
        for engine in started:
            engine.wait_up()
        yield started


def check_nothing_left(pool: Pool, *running: EngineProcess) -> None:
    """No transfer, lease, reservation, pin or block of an engine is held any more."""
    for engine in running:
        engine.ask("settle")
        state = engine.state()
        assert {name: state[name] for name in ("leases", "tracked", "held_for_saving")} == {
            "leases": 0,
            "tracked": 0,
            "held_for_saving": 0,
        }
    deadline = time.monotonic() + 30
    while (status := pool.control("status"))["transfers"] or status["leases"]:
        assert time.monotonic() < deadline, f"still held: {status}"
    pool.empty()  # which pins and reservations would prevent


def computed(engine: EngineProcess, do: Any) -> tuple[Answer, int]:
    """Return an answer, and how many tokens of its prompt the engine computed for it."""
    before = engine.state()["scheduled_tokens"]
    answer = do()
    return answer, engine.state()["scheduled_tokens"] - before - (len(answer.tokens) - 1)


def single(pool: Pool) -> dict[str, Any]:
    """Return the configuration of an engine that has nothing to do with others."""
    return transfer_config(pool, "kv_both", transfer=False, save_min_tokens=1 << 20, load_min_tokens=1 << 20)


def test_one_prefills_and_one_decodes(pool: Pool, model: Path, prompts: Prompts) -> None:
    """Prompts of all lengths, in chunks too: the decoding engine computes one token of each, and says the same."""
    configs = transfer_config(pool, "kv_producer"), transfer_config(pool, "kv_consumer"), single(pool)
    with engines(model, *configs, max_num_batched_tokens=256) as (prefiller, decoder, alone):
        lengths = (3, BLOCK_TOKENS, BLOCK_TOKENS + 1, 200, 256, 1000)
        for tokens in (1, 2):
            for length in lengths:
                prompt, right = prompts.clear(alone, length)
                params = prefiller.generate(prompt, tokens, PREFILL).params
                assert params is not None
                answer, own = computed(decoder, lambda p=prompt, given=params: decoder.generate(p, 4, given))
                assert answer.tokens == right.tokens
                assert own == 1
                assert answer.params is None
        # What both engines have themselves by now moves, too, where it has to.
        params = prefiller.generate(prompt, 1, PREFILL).params
        decoder.forget()
        answer, own = computed(decoder, lambda: decoder.generate(prompt, 4, params))
        assert (answer.tokens, own) == (right.tokens, 1)
        counters = decoder.counters()
        assert counters["transfer.received"] == 2 * len(lengths) + 1
        assert counters["load.failed"] == 0
        check_nothing_left(pool, prefiller, decoder, alone)
