"""Prompts that one real engine computes and another goes on with."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import models
from tests.e2e.conftest import EngineProcess, Pool, Prompts
from tests.e2e.engine import BLOCK_TOKENS, Answer
from tests.e2e.test_proxy import ASKED, DONE, HITS, MOVED, NIXL, Server, Sure, check_same_tokens, served

PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}

pytestmark = pytest.mark.timeout(300)


def transfer_config(pool: Pool, role: str, name: str = "KVPoolConnector", **extra: Any) -> dict[str, Any]:
    return {
        "kv_connector": name,
        "kv_role": role,
        "kv_connector_extra_config": {"master": pool.address, "gate": "off", "lookup_timeout": "2s", **extra},
    }


@contextmanager
def engines(
    model: Path, *configs: dict[str, Any], ranks: tuple[int, ...] = (), **arguments: Any
) -> Iterator[list[EngineProcess]]:
    """Run engines, each in a process of its own, started side by side. ``ranks``: of each, one by default."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < max(ranks, default=1):
        pytest.skip(f"needs {max(ranks)} cores")
    with ExitStack() as stack:
        started = []
        for config, tp in zip(configs, ranks or [1] * len(configs), strict=True):
            own = {"tensor_parallel_size": tp} if tp > 1 else {}
            binding = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, cores[:tp]))} if tp > 1 else {}
            started.append(EngineProcess(model, {}, binding, kv_transfer_config=config, **own, **arguments))
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
        # A first token that ends the prefill's answer is not the other engine's, which may choose another one.
        prompt, right = prompts.clear(alone, 300)
        params = prefiller.generate(prompt, 1, PREFILL, right.tokens[:1]).params
        assert params is not None
        answer, own = computed(decoder, lambda: decoder.generate(prompt, 4, params))
        assert (answer.tokens, own) == (right.tokens, 1)
        # What both engines have themselves by now moves, too, where it has to.
        params = prefiller.generate(prompt, 1, PREFILL).params
        decoder.forget()
        answer, own = computed(decoder, lambda: decoder.generate(prompt, 4, params))
        assert (answer.tokens, own) == (right.tokens, 1)
        counters = decoder.counters()
        assert counters["transfer.received"] == 2 * len(lengths) + 2
        assert counters["load.failed"] == 0
        check_nothing_left(pool, prefiller, decoder, alone)


def test_decode_that_is_asked_with_the_prefill(pool: Pool, model: Path, prompts: Prompts, tmp_path: Path) -> None:
    """Layer by layer at both ends: the decoding engine has the first one before the prefill goes on to the second."""
    configs = [transfer_config(pool, role, use_layerwise=True) for role in ("kv_producer", "kv_consumer")]
    with engines(model, *configs, single(pool)) as (prefiller, decoder, alone):
        seen = tmp_path / "seen"
        decoder.ask("tell_first_layer", path=str(seen))
        prefiller.ask("hold_first_layer", path=str(seen))
        for number, length in enumerate((40, 1000), 1):
            prompt, right = prompts.clear(alone, length)
            seen.unlink(missing_ok=True)
            transfer = {"transfer_id": f"{number:016x}"}
            with ThreadPoolExecutor() as threads:
                decoding = threads.submit(
                    computed,
                    decoder,
                    lambda p=prompt, t=transfer: decoder.generate(p, 4, {"do_remote_prefill": True} | t),
                )
                prefilling = threads.submit(prefiller.generate, prompt, 1, PREFILL | transfer)
                answer, own = decoding.result()
                assert prefilling.result().tokens == right.tokens[:1]
            assert seen.exists()
            assert (answer.tokens, own) == (right.tokens, 1)
        assert prefiller.counters()["save.layerwise"] == 2
        # A prefill that nobody begins, and one that is given up.
        answer = decoder.generate(prompt, 4, {"do_remote_prefill": True, "transfer_id": f"{1:016x}"})
        assert answer.tokens == right.tokens
        assert decoder.counters()["transfer.miss.ended"] == 1
        check_nothing_left(pool, prefiller, decoder, alone)


@pytest.mark.parametrize("ranks", [(2, 1), (1, 2)], ids=["TP 2 to 1", "TP 1 to 2"])
def test_engines_of_different_tp(pool: Pool, model: Path, prompts: Prompts, ranks: tuple[int, int]) -> None:
    """Both are told of both sides; heads are cut so that either has whole parts."""
    sides = {"prefill": {"tp_size": ranks[0], "dp_size": 1}, "decode": {"tp_size": ranks[1], "dp_size": 1}}
    configs = [transfer_config(pool, role, "MooncakeConnectorV1", **sides) for role in ("kv_producer", "kv_consumer")]
    with engines(model, *configs, single(pool), ranks=(*ranks, 1)) as (prefiller, decoder, alone):
        for length in (200, 256):
            prompt, right = prompts.clear(alone, length)
            params = prefiller.generate(prompt, 1, PREFILL).params
            assert params is not None
            assert params["tp_size"] == ranks[0]
            answer, own = computed(decoder, lambda p=prompt, given=params: decoder.generate(p, 4, given))
            assert (answer.tokens, own) == (right.tokens, 1)
        check_nothing_left(pool, prefiller, decoder, alone)


@pytest.mark.parametrize("kind", ["sliding-and-full", "chunked-and-full"])
def test_models_with_windows(pool: Pool, home: Path, prompts: Prompts, kind: str) -> None:
    """All groups' blocks move, as far as the next token reads them; chunks of the prefill may be gone by then."""
    checkpoint = home / "models" / kind
    if not checkpoint.exists():
        models.make(home / "models", kind)
    configs = transfer_config(pool, "kv_producer"), transfer_config(pool, "kv_consumer"), single(pool)
    with engines(checkpoint, *configs, max_num_batched_tokens=256) as (prefiller, decoder, alone):
        for length in (40, 64, 200, 700):
            prompt, right = prompts.clear(alone, length)
            params = prefiller.generate(prompt, 1, PREFILL).params
            answer, own = computed(decoder, lambda p=prompt, given=params: decoder.generate(p, 4, given))
            assert (answer.tokens, own) == (right.tokens, 1)
        check_nothing_left(pool, prefiller, decoder, alone)


def test_ours_in_both_parts_of_a_multi_connector(pool: Pool, model: Path, prompts: Prompts, tmp_path: Path) -> None:
    """The UCM guide's engines: the first connector moves prompts, the second is the prefill engine's prefix cache."""
    sides = {"prefill": {"dp_size": 1, "tp_size": 1}, "decode": {"dp_size": 1, "tp_size": 1}}
    ucm = tmp_path / "ucm.yaml"
    ucm.write_text('ucm_connectors:\n  - ucm_connector_name: "UcmPipelineStore"\n')
    store = {"UCM_CONFIG_FILE": str(ucm), "master": pool.address, "gate": "off", "lookup_timeout": "2s"}
    children = [
        transfer_config(pool, "kv_producer", "MooncakeConnectorV1", **sides),
        {
            "kv_connector": "UCMConnector",
            "kv_role": "kv_both",
            "kv_connector_module_path": "ucm.integration.vllm.ucm_connector",
            "kv_connector_extra_config": store,
        },
    ]
    multi = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_producer",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": children},
    }
    consumer = transfer_config(pool, "kv_consumer", "MooncakeConnectorV1", **sides)
    with engines(model, multi, consumer, single(pool)) as (prefiller, decoder, alone):
        prompt, right = prompts.clear(alone, 200)
        params = prefiller.generate(prompt, 1, PREFILL).params
        answer, own = computed(decoder, lambda: decoder.generate(prompt, 4, params))
        assert (answer.tokens, own) == (right.tokens, 1)
        prefiller.forget()
        again, own = computed(prefiller, lambda: prefiller.generate(prompt, 1, PREFILL))
        assert own == 200 % BLOCK_TOKENS, "the second connector has found the full blocks"
        decoder.forget()
        answer, own = computed(decoder, lambda: decoder.generate(prompt, 4, again.params))
        assert (answer.tokens, own) == (right.tokens, 1)
        check_nothing_left(pool, prefiller, decoder, alone)


# ---- through the proxy ----------------------------------------------------------------------------------


def received(engine: Server) -> float:
    """Return how many prompts an engine took from another one."""
    return engine.metric('vllm:kvpool_transfers_total{engine="0",event="received"')


def check_through_proxy(engines: list[Server], proxy: Server, decoders: list[Server]) -> None:
    """Completions and chat, streamed and not; the decoding engines compute one token of a prompt at most."""
    proxy.complete([3] * 640)  # the engines' first steps say how they hold KV
    for decoder in decoders:
        decoder.complete([4] * 640)
    before = {name: sum(d.metric(name) for d in decoders) for name in (MOVED, ASKED, HITS)}
    done = proxy.metric(DONE)
    check_same_tokens(proxy, Sure(engines[-1], random.Random(7).randrange(1 << 30)))
    assert proxy.metric(DONE) - done == 12
    moved, asked, hits = (sum(d.metric(name) for d in decoders) - old for name, old in before.items())
    assert moved > 0
    assert asked - moved - hits <= 12


def wait_over(pool: Pool) -> None:
    """Wait until no transfer and no lease is held."""
    deadline = time.monotonic() + 30
    while (status := pool.control("status"))["transfers"] or status["leases"]:
        assert time.monotonic() < deadline, f"still held: {status}"
    pool.empty()


PROXY = ("--skip_prefill", "off", "--policy", "round_robin")


def test_two_prefill_and_one_decodes(tmp_path: Path, model: Path, pool: Pool) -> None:
    """2P1D through the proxy."""
    producer, consumer = transfer_config(pool, "kv_producer"), transfer_config(pool, "kv_consumer")
    flags = {"--prefiller-ports": [0, 1], "--decoder-ports": [2]}
    with served(tmp_path, model, [producer, producer, consumer, None], flags, *PROXY) as (engines, proxy):
        check_through_proxy(engines, proxy, [engines[2]])
        assert received(engines[2]) >= 12
        for prefiller in engines[:2]:
            assert prefiller.metric('vllm:kvpool_transfers_total{engine="0",event="sealed"') >= 6
        wait_over(pool)


def llmdatadist(role: str) -> dict[str, Any]:
    """Return the rank-table guide's configuration."""
    return json.loads(
        """{"kv_connector": "LLMDataDistCMgrConnector", "kv_buffer_device": "npu", "kv_role": "ROLE",
        "kv_parallel_size": 1, "kv_port": "20001", "engine_id": "0",
        "kv_connector_module_path": "vllm_ascend.distributed.llmdatadist_c_mgr_connector"}""".replace("ROLE", role)
    )


def test_rank_table_guide(tmp_path: Path, model: Path, pool: Pool) -> None:
    """One prefills and two decode, with the guide's own configuration, and with the engine's own cache off."""
    transfers = [llmdatadist("kv_producer"), llmdatadist("kv_consumer"), llmdatadist("kv_consumer"), None]
    environment = {
        "DISAGGREGATED_PREFILL_RANK_TABLE_PATH": str(tmp_path / "ranktable.json"),
        "KVPOOL_MASTER": pool.address,
    }
    flags = {"--prefiller-ports": [0], "--decoder-ports": [1, 2]}
    arguments = ("--no-enable-prefix-caching", "--seed", "1024", "--max-num-batched-tokens", "512")
    with served(tmp_path, model, transfers, flags, *PROXY, environment=environment, arguments=arguments) as (
        engines,
        proxy,
    ):
        check_through_proxy(engines, proxy, engines[1:3])
        assert all(received(decoder) >= 6 for decoder in engines[1:3])
        wait_over(pool)


@pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="needs nixl: make setup-vllm")
def test_nixl_moves_prompts_and_ours_is_the_prefix_cache(tmp_path: Path, model: Path, pool: Pool) -> None:
    """Inside MultiConnector, behind a connector of others: both do their part, and ours takes none in transfers."""
    ours = transfer_config(pool, "kv_both")
    multi = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": [NIXL, ours]},
    }
    environment = {"UCX_TLS": "tcp,sm,self", "UCX_NET_DEVICES": "lo"}
    flags = {"--prefiller-ports": [0], "--decoder-ports": [1]}
    with served(tmp_path, model, [multi, multi, None], flags, *PROXY, environment=environment) as (engines, proxy):
        done = proxy.metric(DONE)
        check_same_tokens(proxy, Sure(engines[2], 9))
        assert proxy.metric(DONE) - done == 12
        prompt, text = Sure(engines[2], 10).tokens(640)
        assert engines[0].complete(prompt)["text"] == text
        pool.wait_blocks(20)
        time.sleep(1)
        found = engines[1].metric("vllm:kvpool_hit_tokens_total")
        assert engines[1].complete(prompt)["text"] == text
        assert engines[1].metric("vllm:kvpool_hit_tokens_total") - found >= 640 - BLOCK_TOKENS
        assert all(received(engine) == 0 for engine in engines[:2])
        wait_over(pool)
