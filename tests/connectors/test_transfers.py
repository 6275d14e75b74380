"""Prompts that one engine computes and another goes on with: whatever fails, tokens are right and nothing is left."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvpool.client_transfers import TransferPart
from kvpool_vllm import step_time
from kvpool_vllm.keeper import Keeper, Outgoing
from kvpool_vllm.names import Names
from kvpool_vllm.settings import Role
from kvpool_vllm.testing import Faults, MemoryPool, MemoryTransfers
from kvpool_vllm.transfers import Engine
from tests.connectors.model_engine import GROUPS, NAMESPACE, TOKENS, ModelEngine, Request, expected

DEADLINE_S = 30.0

PRODUCER = {"role": Role(loads=False, saves=True), "engine": Engine(produces=True, engine_id="p")}
CONSUMER = {"role": Role(loads=False, saves=False), "engine": Engine(consumes=True, engine_id="d")}
BOTH = {"role": Role(loads=True, saves=True), "engine": Engine(produces=True, consumes=True, engine_id="b")}

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks": {"budget": 7},
    "tails_are_kept": {"discard_partial_chunks": False},
    "layers": {"use_layerwise": True},
    "layers_of_chunks": {"use_layerwise": True, "budget": 7},
}


class Pair:
    """A prefilling and a decoding engine on one pool."""

    def __init__(self) -> None:
        self.pool, self.faults = MemoryPool(), Faults()
        self.engines: list[ModelEngine] = []
        self._names = 0

    def engine(self, kind: dict[str, Any], **options: Any) -> ModelEngine:
        self.engines.append(ModelEngine(self.pool, self.faults, **(kind | options)))
        self.engines[-1].step()  # in which the worker says where it stores
        return self.engines[-1]

    def both(self, **options: Any) -> tuple[ModelEngine, ModelEngine]:
        return self.engine(PRODUCER, **options), self.engine(CONSUMER, **options)

    def submit(self, engine: ModelEngine, prompt: list[int], tokens: int, params: dict[str, Any] | None) -> Request:
        self._names += 1
        return engine.submit(f"r{self._names}", prompt, tokens, params)

    def until(self, condition: Any, *engines: ModelEngine) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, [(r.request_id, r.status) for e in engines for r in e.requests.values()]
            for engine in engines:
                engine.step()
                while len(engine.worker._saved) < engine.worker._unreported_saves and not self.faults.put_gate.closed:
                    time.sleep(0)  # an engine without a model is too quick for its saves

    def drain(self, *engines: ModelEngine) -> None:
        self.until(lambda: not any(engine.busy or engine.side.leases for engine in engines), *engines)
        for engine in engines:
            assert len(engine.pool.free) == engine.pool.num_gpu_blocks
            assert not engine.side._requests
            assert not engine.worker._loading
            assert not engine.side._transfers._incoming
            assert not engine.side._transfers._jobs

    def prefill(self, engine: ModelEngine, prompt: list[int], tokens: int = 1, **params: Any) -> Request:
        request = self.submit(engine, prompt, tokens, {"do_remote_decode": True, "do_remote_prefill": False} | params)
        self.until(lambda: request.status == "finished", engine)
        return request

    def decode(
        self, engine: ModelEngine, prompt: list[int], params: dict[str, Any] | None, *others: ModelEngine
    ) -> Request:
        request = self.submit(engine, prompt, 3, params)
        self.drain(engine, *others)
        assert request.answer == expected(prompt, 3)
        return request


@pytest.fixture
def pair() -> Iterator[Pair]:
    one = Pair()
    yield one
    one.faults.reset()
    for engine in one.engines:
        engine.close()
    assert not one.pool.leases


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [1, 3, TOKENS, TOKENS + 1, 26, 28])
@pytest.mark.parametrize("tokens", [1, 2])
def test_prompt_moves_whole(pair: Pair, mode: str, length: int, tokens: int) -> None:
    """The partial block too; the decoding engine computes the one token that it needs for the next, and no other."""
    producer, consumer = pair.both(**MODES[mode])
    prompt = list(range(length))
    params = pair.prefill(producer, prompt, tokens).returned
    assert params is not None
    pair.drain(producer)
    pair.decode(consumer, prompt, params)
    assert consumer.loaded_tokens == (length if length > 1 else 0)
    assert not pair.pool.open_transfers
    whole = length // TOKENS
    assert len(pair.pool.shards) == whole + (mode == "tails_are_kept" and length % TOKENS > 0)


@pytest.mark.parametrize("params", ["do_remote_prefill", 5, ["do_remote_decode"], [1.5], True], ids=str)
def test_parameters_that_are_none_name_no_transfer(pair: Pair, params: Any) -> None:
    """Whatever a client has put in their place: its prompt is computed, and the engine goes on."""
    engine = pair.engine(BOTH)
    request = pair.decode(engine, list(range(30)), params)
    assert request.returned is None
    assert not any(name.startswith("transfer.") for name in engine.side.counters)


def test_what_the_producer_has_in_its_own_memory_moves_too(pair: Pair) -> None:
    """A second prompt with the same beginning is transferred from block 0 on, even where the pool has lost it."""
    producer, consumer = pair.both()
    prompt = list(range(30))
    pair.prefill(producer, prompt)
    pair.drain(producer)
    pair.pool.shards.clear()
    params = pair.prefill(producer, [*prompt, 1, 2]).returned
    pair.decode(consumer, [*prompt, 1, 2], params, producer)
    assert consumer.loaded_tokens == 32


def test_what_the_producer_has_loaded_moves_too(pair: Pair) -> None:
    """In every way of loading."""
    prompt = list(range(30))
    for options in ({}, {"sync": True}, {"sync": True, "use_layerwise": True}):
        first, second, consumer = pair.engine(BOTH), pair.engine(BOTH, **options), pair.engine(CONSUMER)
        pair.prefill(first, prompt)
        pair.drain(first)
        params = pair.prefill(second, prompt).returned
        assert second.loaded_tokens == 28
        pair.decode(consumer, prompt, params, second)
        assert consumer.loaded_tokens == 30


def test_decode_is_asked_at_the_same_time(pair: Pair) -> None:
    """With the transfer's number alone it finds the rest, and waits for what is not computed yet."""
    producer, consumer = pair.both(budget=4)
    prompt = list(range(30))
    decoding = pair.submit(consumer, prompt, 3, {"do_remote_prefill": True, "transfer_id": "00000000000000ff"})
    for _ in range(20):
        consumer.step()
    assert decoding.status == "waiting"
    prefilling = pair.submit(producer, prompt, 1, {"do_remote_decode": True, "transfer_id": "00000000000000ff"})
    pair.until(lambda: decoding.status == "loading", producer, consumer)
    pair.drain(producer, consumer)
    assert prefilling.answer == expected(prompt, 1)
    assert decoding.answer == expected(prompt, 3)
    assert consumer.loaded_tokens == 30
    assert not pair.pool.open_transfers


def test_master_s_answer_is_waited_for_in_the_same_step(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a moment, as that to a lookup is: an empty step takes longer."""
    monkeypatch.setattr(step_time, "STEP_S", 5.0)  # however busy the machine is
    producer, consumer = pair.both()
    prompt = list(range(30))
    early = pair.submit(consumer, prompt, 3, {"do_remote_prefill": True, "transfer_id": "00000000000000ff"})
    consumer.step()
    params = pair.prefill(producer, prompt[1:]).returned
    pair.drain(producer)
    request = pair.submit(consumer, prompt[1:], 3, params)
    consumer.step()
    assert (early.status, request.status) == ("waiting", "loading")
    pair.submit(producer, prompt, 1, {"do_remote_decode": True, "transfer_id": "00000000000000ff"})
    pair.drain(producer, consumer)


def test_only_an_engine_without_work_waits_for_prompts(pair: Pair) -> None:
    """Its workers are told to wait while a claim or a load is outstanding; not beside something to compute."""
    producer, consumer = pair.both(budget=4)
    waits: list[tuple[str, bool, bool]] = []
    build_meta = consumer.side.build_meta

    def build(scheduled: dict[str, int], block_ids_of: Any) -> Any:
        meta = build_meta(scheduled, block_ids_of)
        waits.append((decoding.status, bool(scheduled), meta.wait_s > 0))
        return meta

    consumer.side.build_meta = build  # type: ignore[method-assign]
    prompt = list(range(30))
    decoding = pair.submit(consumer, prompt, 3, {"do_remote_prefill": True, "transfer_id": "00000000000000ff"})
    for _ in range(20):
        consumer.step()
    pair.submit(consumer, [7] * 12, 8, None)
    for _ in range(5):
        consumer.step()
    pair.submit(producer, prompt, 1, {"do_remote_decode": True, "transfer_id": "00000000000000ff"})
    pair.drain(producer, consumer)
    assert ("waiting", False, True) in waits
    assert ("waiting", True, False) in waits
    assert ("loading", False, True) in waits
    assert not any(wait and scheduled for _, scheduled, wait in waits)


def test_two_requests_of_one_prompt_at_once(pair: Pair) -> None:
    """Each has a transfer of its own; the tail that they share lives until the last of them has it."""
    producer, consumer = pair.both()
    prompt = list(range(30))
    params = [pair.prefill(producer, prompt).returned for _ in range(2)]
    assert params[0] != params[1]
    for given in params:
        pair.decode(consumer, prompt, given, producer)
        consumer.forget()
    assert consumer.loaded_tokens == 60
    assert not pair.pool.open_transfers


def test_two_samples_of_one_request(pair: Pair) -> None:
    """Requests that share a transfer: it ends with the last of them."""
    producer, consumer = pair.both()
    prompt = list(range(30))
    params = pair.prefill(producer, prompt).returned
    assert params is not None
    pair.drain(producer)
    samples = [pair.submit(consumer, prompt, 3, dict(params)) for _ in range(2)]
    pair.drain(consumer)
    assert [sample.answer for sample in samples] == [expected(prompt, 3)] * 2
    assert consumer.loaded_tokens >= 32
    assert consumer.side.counters["transfer.incomplete"] == 0
    assert pair.pool.calls == ["open", "seal", "end"]


def test_two_samples_that_wait_for_the_prefill(pair: Pair) -> None:
    """Both hear of it when it begins."""
    producer, consumer = pair.both()
    prompt = list(range(30))
    samples = [pair.submit(consumer, prompt, 3, {"do_remote_prefill": True, "transfer_id": "9"}) for _ in range(2)]
    for _ in range(3):
        consumer.step()
    pair.submit(producer, prompt, 1, {"do_remote_decode": True, "transfer_id": "9"})
    pair.drain(producer, consumer)
    assert [sample.answer for sample in samples] == [expected(prompt, 3)] * 2
    assert consumer.loaded_tokens >= 32
    assert not consumer.side.counters["transfer.miss.not_opened"]


def test_own_cache_is_not_loaded_again(pair: Pair) -> None:
    """What the decoding engine has of the prompt counts; with all of it but a token nothing is loaded."""
    producer, consumer = pair.both()
    prompt = list(range(30))
    pair.decode(consumer, prompt, pair.prefill(producer, prompt).returned, producer)
    longer = [*prompt, *range(100, 107)]
    pair.decode(consumer, longer, pair.prefill(producer, longer).returned, producer)
    assert consumer.loaded_tokens == 30 + 37 - 28
    pair.decode(consumer, longer, pair.prefill(producer, longer).returned, producer)
    assert consumer.loaded_tokens == 30 + 37 - 28
    assert not pair.pool.open_transfers


def test_layers_are_stored_while_the_next_is_computed(pair: Pair) -> None:
    """Before the forward goes on to its last layer, the ones before are with the pool."""
    producer, consumer = pair.both(use_layerwise=True)
    seen: list[int] = []

    def wait(layer: int) -> None:
        if producer.requests and layer < 2:
            deadline = time.monotonic() + DEADLINE_S
            while pair.pool.layers.get(5, 0) <= layer:
                assert time.monotonic() < deadline
            seen.append(layer)

    producer.on_layer = wait
    prompt = list(range(14))
    params = pair.prefill(producer, prompt, transfer_id="5").returned
    assert seen == [0, 1]
    pair.decode(consumer, prompt, params, producer)
    assert consumer.loaded_tokens == 14
    assert producer.worker.counters["save.layerwise"] == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("known", [True, False])
def test_partial_block_is_not_stored_before_the_master_knows_that_it_will_go(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, mode: str, known: bool
) -> None:
    """An engine that dies before would leave it behind; where the master refuses, nothing of it is stored at all."""
    producer, consumer = pair.both(**MODES[mode] | {"discard_partial_chunks": True})
    asked, answered = threading.Event(), threading.Event()
    answer = MemoryTransfers.open

    def late(transfers: MemoryTransfers, *args: Any) -> bool:
        asked.set()
        assert answered.wait(DEADLINE_S)
        return known and answer(transfers, *args)

    monkeypatch.setattr(MemoryTransfers, "open", late)
    prompt = list(range(26))
    params = pair.prefill(producer, prompt).returned
    assert asked.wait(DEADLINE_S)  # by the thread that keeps transfers
    whole = len(prompt) // TOKENS
    pair.until(lambda: len(pair.pool.shards) == whole, producer)
    for _ in range(20):
        producer.step()
    assert len(pair.pool.shards) == whole
    assert producer.busy
    answered.set()
    pair.drain(producer)
    assert len(pair.pool.shards) == whole + known
    pair.decode(consumer, prompt, params)
    assert consumer.loaded_tokens == (26 if known else 0)


# ---- what goes wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arrived", range(8))
def test_what_does_not_come_is_computed(pair: Pair, arrived: int) -> None:
    """Whatever garbage is in the blocks that did not come."""
    producer, consumer = pair.both()
    prompt = list(range(30))
    params = pair.prefill(producer, prompt).returned
    pair.faults.get_blocks_max, pair.faults.spoil_rest = arrived, True
    pair.decode(consumer, prompt, params, producer)
    assert consumer.side.counters["transfer.incomplete"] == 1
    assert not pair.pool.open_transfers


def test_producer_is_aborted(pair: Pair) -> None:
    """Its transfer ends, whenever that is; who waits for it computes."""
    for steps in range(6):
        producer, consumer = pair.both(budget=8)
        prompt = list(range(30))
        number = f"{steps + 1:016x}"
        prefilling = pair.submit(producer, prompt, 1, {"do_remote_decode": True, "transfer_id": number})
        decoding = pair.submit(consumer, prompt, 3, {"do_remote_prefill": True, "transfer_id": number})
        for _ in range(steps):
            producer.step()
            consumer.step()
        producer.abort(prefilling)
        if not steps:  # it never ran, and nobody ever hears of it
            consumer.abort(decoding)
        pair.drain(producer, consumer)
        assert not pair.pool.open_transfers
        assert decoding.answer == (expected(prompt, 3) if steps else [])


def test_consumer_is_aborted(pair: Pair) -> None:
    """Waiting for the prefill, or for its blocks: the transfer ends, and the engine's blocks are free again."""
    producer, consumer = pair.both(budget=8)
    prompt = list(range(30))
    decoding = pair.submit(consumer, prompt, 3, {"do_remote_prefill": True, "transfer_id": "1"})
    consumer.step()
    consumer.abort(decoding)
    pair.drain(consumer)
    pair.faults.put_gate.close()
    prefilling = pair.submit(producer, prompt, 1, {"do_remote_decode": True, "transfer_id": "2"})
    decoding = pair.submit(consumer, prompt, 3, {"do_remote_prefill": True, "transfer_id": "2"})
    pair.until(lambda: decoding.status == "loading" and pair.faults.receive_gate.arrived.is_set(), producer, consumer)
    consumer.abort(decoding)
    pair.drain(consumer)
    pair.faults.put_gate.open()
    pair.drain(producer)
    assert prefilling.status == "finished"
    assert not pair.pool.open_transfers


@pytest.mark.parametrize("late", [False, True])
def test_another_consumer_comes_instead(pair: Pair, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As routers ask one where another has failed: it has all of it, and is not robbed of it by the first one's end."""
    monkeypatch.setattr(step_time, "STEP_S", 0.0)  # so that the first one has not begun to load after one step
    producer, first, second = pair.engine(PRODUCER), pair.engine(CONSUMER), pair.engine(CONSUMER)
    prompt = list(range(30))
    params = pair.prefill(producer, prompt).returned
    assert params is not None
    pair.drain(producer)  # a thread of its own opens the transfer, and the partial block is saved a step after that
    (transfer,) = pair.pool.transfers.values()
    failing = pair.submit(first, prompt, 3, dict(params))
    first.step()
    pair.until(lambda: transfer.consumer != "")
    if not late:
        first.abort(failing)
        pair.drain(first)
    decoding = pair.submit(second, prompt, 3, dict(params))
    pair.until(lambda: decoding.status == "loading", second)
    if late:
        first.abort(failing)
        pair.drain(first)
    pair.drain(second)
    assert second.loaded_tokens == len(prompt)
    assert second.side.counters["transfer.received"] == 1
    assert decoding.answer == expected(prompt, 3)
    assert not pair.pool.open_transfers


def test_one_that_is_given_back_and_opened_late(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for it since is not robbed of it either."""
    monkeypatch.setattr("kvpool_vllm.keeper.RENEW_EVERY_S", 0.02)
    monkeypatch.setattr("kvpool_vllm.keeper.LOOK_EVERY_S", 0.02)
    producer, first, second = pair.engine(PRODUCER, budget=4), pair.engine(CONSUMER), pair.engine(CONSUMER)
    prompt, params = list(range(30)), {"do_remote_prefill": True, "transfer_id": "1"}
    failing = pair.submit(first, prompt, 3, dict(params))
    first.step()
    first.abort(failing)
    pair.drain(first)
    decoding = pair.submit(second, prompt, 3, dict(params))
    pair.submit(producer, prompt, 1, {"do_remote_decode": True, "transfer_id": "1"})
    pair.drain(producer, second)
    assert decoding.answer == expected(prompt, 3)
    assert second.side.counters["transfer.received"] == 1


def test_prefill_that_never_begins(pair: Pair) -> None:
    """Is waited for as long as the setting says, then the prompt is computed."""
    consumer = pair.engine(CONSUMER, transfer_open_timeout="20ms")
    pair.decode(consumer, list(range(30)), {"do_remote_prefill": True, "transfer_id": "1"})
    assert consumer.side.counters["transfer.miss.not_opened"] == 1
    assert consumer.loaded_tokens == 0
    assert not pair.pool.open_transfers


def test_prefill_that_begins_too_late(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its transfer is ended by the engine that has given it up: nobody else would come for it."""
    monkeypatch.setattr("kvpool_vllm.keeper.RENEW_EVERY_S", 0.02)
    monkeypatch.setattr("kvpool_vllm.keeper.LOOK_EVERY_S", 0.02)
    producer, consumer = pair.engine(PRODUCER), pair.engine(CONSUMER, transfer_open_timeout="20ms")
    prompt = list(range(30))
    pair.decode(consumer, prompt, {"do_remote_prefill": True, "transfer_id": "1"})
    pair.prefill(producer, prompt, transfer_id="1")
    pair.until(lambda: not pair.pool.open_transfers and "open" in pair.pool.calls, producer, consumer)


def test_prefill_that_is_wanted_again(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks once more for what was given up before it began gets it: nobody ends it any more."""
    monkeypatch.setattr("kvpool_vllm.keeper.RENEW_EVERY_S", 0.02)
    monkeypatch.setattr("kvpool_vllm.keeper.LOOK_EVERY_S", 0.02)
    producer, consumer = pair.both(budget=4)
    prompt, params = list(range(30)), {"do_remote_prefill": True, "transfer_id": "1"}
    aborted = pair.submit(consumer, prompt, 3, dict(params))
    consumer.step()
    consumer.abort(aborted)
    pair.drain(consumer)
    decoding = pair.submit(consumer, prompt, 3, dict(params))
    prefilling = pair.submit(producer, prompt, 1, {"do_remote_decode": True, "transfer_id": "1"})
    pair.until(lambda: "open" in pair.pool.calls, producer)
    time.sleep(0.1)  # in which a look would come
    assert pair.pool.open_transfers
    pair.drain(producer, consumer)
    assert decoding.answer == expected(prompt, 3)
    assert prefilling.status == "finished"
    assert consumer.side.counters["transfer.received"] == 1


def test_prefill_that_was_given_up(pair: Pair) -> None:
    """Is not waited for."""
    consumer = pair.engine(CONSUMER)
    consumer.side._client.transfers.open(7, [TransferPart(NAMESPACE, b"k" * 16)], [""])
    consumer.side._client.transfers.end([7])
    pair.decode(consumer, list(range(30)), {"do_remote_prefill": True, "transfer_id": "7"})
    assert consumer.side.counters["transfer.miss.ended"] == 1


def test_another_namespace(pair: Pair) -> None:
    """KV that means something else is never taken, and the prompt is computed at once."""
    producer, consumer = pair.both()
    prompt = list(range(30))
    params = pair.prefill(producer, prompt).returned
    assert params is not None
    pair.drain(producer)  # or it may be opened after its end, and is kept for its TTL
    params["remote_namespaces"] = ["00" * 16]
    pair.decode(consumer, prompt, params, producer)
    assert consumer.side.counters["transfer.miss.namespace"] == 1
    assert consumer.loaded_tokens == 0
    assert not pair.pool.open_transfers


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"remote_tokens": 31}, "prompt"),
        ({"remote_nodes": []}, "no_node"),
        ({"remote_nodes": [{"node_id": ""}]}, "no_node"),
        ({"remote_nodes": [{"where": "here"}]}, "foreign"),
        ({"remote_nodes": 3}, "foreign"),
        ({"remote_nodes": [{"node_id": ["memory"]}]}, "foreign"),
        ({"remote_nodes": [{"node_id": "memory", "host": None}]}, "foreign"),
        ({"remote_nodes": [{"node_id": "memory", "host": "h" * 2000}]}, "foreign"),
        ({"remote_nodes": [{"node_id": "memory", "port": "1"}]}, "foreign"),
        ({"remote_nodes": [{"node_id": "memory", "port": 1 << 70}]}, "foreign"),
        ({"remote_nodes": [{"node_id": "memory"}] * 257}, "foreign"),
        ({"remote_namespaces": [3]}, "foreign"),
        ({"remote_namespaces": []}, "namespace"),
        ({"remote_tokens": [30]}, "foreign"),
        ({"remote_tokens": {}}, "foreign"),
        ({"remote_tokens": True}, "foreign"),
        ({"transfer_id": None}, "foreign"),
        ({"transfer_id": "many"}, "foreign"),
        ({"transfer_id": "0"}, "foreign"),
        ({"transfer_id": "1" * 17}, "foreign"),
    ],
)
def test_parameters_that_make_no_sense(pair: Pair, change: dict[str, Any], reason: str) -> None:
    """The request is answered all the same."""
    producer, consumer = pair.both()
    prompt = list(range(30))
    params = pair.prefill(producer, prompt).returned
    assert params is not None
    pair.decode(consumer, prompt, params | change, producer)
    assert consumer.side.counters[f"transfer.miss.{reason}"] == 1
    assert consumer.loaded_tokens == 0


def test_parameters_name_no_node_that_the_master_does_not(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody may have written them: blocks come from where the master says; a transfer it never hears of is none."""
    producer, consumer = pair.both()
    prompt = list(range(30))
    params = pair.prefill(producer, prompt).returned
    assert params is not None
    elsewhere = {"remote_nodes": [{"node_id": "mine", "host": "elsewhere", "port": 1}]}
    pair.decode(consumer, prompt, params | elsewhere, producer)  # the pool in memory knows one node
    assert consumer.side.counters["transfer.received"] == 1
    monkeypatch.setattr("kvpool_vllm.transfers.TOLD_WAIT_S", 0.02)
    consumer = pair.engine(CONSUMER)
    pair.decode(consumer, prompt, params | elsewhere | {"transfer_id": "1"}, producer)
    assert consumer.side.counters["transfer.miss.not_opened"] == 1
    assert consumer.loaded_tokens == 0


def test_prompt_that_was_promised_comes_without_a_master(pair: Pair) -> None:
    """The request says where it is."""
    producer, consumer = pair.both()
    prompt = list(range(30))
    params = pair.prefill(producer, prompt).returned
    pair.drain(producer)
    consumer.side._client.transfers.master_is_away = True
    pair.decode(consumer, prompt, params)
    assert consumer.side.counters["transfer.received"] == 1


def test_master_is_away(pair: Pair) -> None:
    """Nothing is promised, and who was promised something does not wait."""
    producer, consumer = pair.both()
    for engine in (producer, consumer):
        engine.side._client.transfers.master_is_away = True
    prompt = list(range(30))
    request = pair.submit(producer, prompt, 2, {"do_remote_decode": True})
    producer.step()  # which has the master asked, by a thread of its own
    outgoing = producer.side._requests[request.request_id].outgoing
    assert outgoing is not None
    pair.until(lambda: outgoing.refused)
    assert request.status != "finished"
    pair.until(lambda: request.status == "finished", producer)
    assert request.returned is None
    assert producer.side.counters["transfer.miss.refused"] == 1
    pair.decode(consumer, prompt, {"do_remote_prefill": True, "transfer_id": "1"}, producer)
    assert consumer.side.counters["transfer.miss.no_master"] == 1


def test_request_that_ends_otherwise_is_not_handed_over(pair: Pair) -> None:
    """Only one that ended by its length; the transfer of another one ends."""
    producer = pair.engine(PRODUCER)
    request = pair.submit(producer, list(range(30)), 5, {"do_remote_decode": True})
    pair.until(lambda: len(request.answer) == 2, producer)
    producer.abort(request)
    pair.drain(producer)
    assert request.returned is None
    assert not pair.pool.open_transfers


def test_engines_that_take_no_part(pair: Pair) -> None:
    """Ignore the parameters."""
    engine = pair.engine({"role": Role(loads=True, saves=True)})
    prompt = list(range(30))
    assert pair.prefill(engine, prompt).returned is None
    pair.decode(engine, prompt, {"do_remote_prefill": True, "transfer_id": "1"})
    assert not pair.pool.calls


def test_preempted_producer_goes_on(pair: Pair) -> None:
    """Its transfer outlives the preemption, and is whole in the end."""
    producer, consumer = pair.engine(PRODUCER, blocks=14, budget=8), pair.engine(CONSUMER)
    prompts = [[i, *range(24)] for i in range(4)]
    requests = [pair.submit(producer, prompt, 8, {"do_remote_decode": True}) for prompt in prompts]
    pair.drain(producer)
    assert producer.preemptions
    for request in requests:
        assert request.answer == expected(request.prompt, 8)
        pair.decode(consumer, request.prompt, request.returned)
    assert consumer.side.counters["transfer.received"] == 4
    assert not pair.pool.open_transfers


def test_preempted_consumer_does_not_wait_again(pair: Pair) -> None:
    """What was loaded is gone with the preemption; it is computed, or found in the pool."""
    producer, consumer = pair.engine(PRODUCER), pair.engine(CONSUMER, blocks=19, budget=8)
    prompts = [[i, *range(24)] for i in range(2)]
    params = [pair.prefill(producer, prompt).returned for prompt in prompts]
    pair.drain(producer)
    requests = [pair.submit(consumer, p, 40, given) for p, given in zip(prompts, params, strict=True)]
    claimed = consumer.side._transfers._incoming.values()
    pair.until(lambda: all(incoming.found is not None for incoming in claimed))  # so that both have a place at once
    pair.drain(consumer)
    assert consumer.preemptions
    assert [request.answer for request in requests] == [expected(prompt, 40) for prompt in prompts]
    assert not pair.pool.open_transfers


def test_adapters_move_under_names_of_their_own(pair: Pair) -> None:
    """An adapter's name says nothing about its weights: what is moved with one can be found by nobody else."""
    producer, consumer = pair.both()
    prompt = list(range(30))
    request = pair.submit(producer, prompt, 1, {"do_remote_decode": True})
    request.lora_request = object()
    producer.requests.pop(request.request_id)
    producer.waiting.remove(request)
    producer.side._requests.clear()
    producer.requests[request.request_id] = request
    producer.side.track(request)
    producer.waiting.append(request)
    pair.until(lambda: request.status == "finished", producer)
    pair.drain(producer)
    assert len(pair.pool.shards) == 8
    names = {name[:16] for name in request.block_hashes}
    assert not names & {key for _, key, _ in pair.pool.shards}
    decoding = Request("d", prompt, 3, kv_transfer_params=request.returned, lora_request=object())
    consumer.requests["d"] = decoding
    consumer.side.track(decoding)
    consumer.waiting.append(decoding)
    pair.drain(consumer)
    assert decoding.answer == expected(prompt, 3)
    assert consumer.loaded_tokens == 30
    assert not pair.pool.shards


def test_names_of_a_transfer_alone_say_which_tokens_they_are_of() -> None:
    """A prompt of the same length gets nothing of them: where templates say the time, both engines need not agree."""
    names = Names(GROUPS, discard_tails=True)
    prompt = list(range(30))

    def of(tokens: list[int], transfer: int = 1, **what: Any) -> list[bytes]:
        return names.of_transfer(Request("r", tokens, 1, **what), transfer)[0]

    adapter: dict[str, Any] = {"lora_request": object()}
    image: dict[str, Any] = {"mm_features": ("image",)}
    for what in (adapter, image):
        own = of(prompt, **what)
        assert len(set(own)) == 8
        assert [a == b for a, b in zip(own, of([*prompt[:-1], 7], **what), strict=True)] == [True] * 7 + [False]
        assert not set(own) & set(of([7, *prompt[1:]], **what))
        assert own[-1] != of(prompt, transfer=2, **what)[-1]
    assert not set(of(prompt, **adapter)) & set(of(prompt, transfer=2, **adapter))


def test_reset_leaves_what_is_on_its_way_behind(pair: Pair) -> None:
    """Other weights may be in the engine by then."""
    producer = pair.engine(PRODUCER, budget=8)
    request = pair.submit(producer, list(range(30)), 1, {"do_remote_decode": True})
    producer.step()
    producer.step()
    producer.side.forget_namespace()
    pair.drain(producer)
    assert request.status == "finished"
    assert request.returned is None
    assert not pair.pool.open_transfers


def test_reset_keeps_nothing_of_what_began_before(pair: Pair) -> None:
    """The rest of a prompt that was begun with other weights is stored for nobody; what begins later is."""
    one = pair.engine(BOTH, budget=8)
    old = pair.submit(one, list(range(30)), 1, None)
    one.step()
    worker = one.worker
    pair.until(lambda: pair.pool.shards and len(worker._saved) >= worker._unreported_saves, one)  # none half done
    assert old.status != "finished"
    late = pair.submit(one, list(range(100, 130)), 1, None)
    one.side.forget_namespace()
    before = {key for _, key, _ in pair.pool.shards}
    pair.drain(one)
    assert (old.status, late.status) == ("finished", "finished")
    stored = {key for _, key, _ in pair.pool.shards} - before
    assert len(stored) == 30 // TOKENS


# ---- everything at once --------------------------------------------------------------------------------


class Storm:
    """Requests that are prefilled and decoded, serially or at once, some aborted at any moment."""

    def __init__(self, pair: Pair, seed: int, **options: Any) -> None:
        self.pair, self.rng = pair, random.Random(seed)
        own = {"blocks": 26, "budget": 9} | options
        self.prefiller, self.decoder = pair.engine(PRODUCER, **own), pair.engine(CONSUMER, **own)
        self.left: list[tuple[list[int], Request]] = []
        """Prompts whose prefill is under way, and not yet asked to be decoded."""
        self.decoding: list[Request] = []
        self.aborted: set[str] = set()
        self.faults = False
        self.number = 0

    def begin(self) -> None:
        self.number += 1
        shared = list(range(self.rng.choice((0, 9, 17))))
        prompt = shared + [self.rng.randrange(9) for _ in range(self.rng.randrange(1, 14))]
        at_once = self.rng.random() < 0.5
        given = {"transfer_id": f"{self.number:x}"} if at_once else {}
        prefilling = self.pair.submit(
            self.prefiller, prompt, self.rng.choice((1, 1, 3)), {"do_remote_decode": True} | given
        )
        if at_once:
            self._decode(prompt, {"do_remote_prefill": True} | given)
        else:
            self.left.append((prompt, prefilling))

    def _decode(self, prompt: list[int], params: dict[str, Any] | None) -> None:
        self.decoding.append(self.pair.submit(self.decoder, prompt, self.rng.choice((1, 4, 12)), params))

    def go_on(self) -> None:
        """Have decoded what is prefilled, and abort some."""
        for prompt, prefilling in list(self.left):
            if prefilling.status == "finished" and self.is_known(prefilling.returned):
                self.left.remove((prompt, prefilling))
                self._decode(prompt, prefilling.returned)
        for engine in (self.prefiller, self.decoder):
            for request in list(engine.requests.values()):
                if self.rng.random() < 0.01 and self.is_known(request.kv_transfer_params):
                    self.aborted.add(request.request_id)
                    engine.abort(request)

    def is_known(self, params: dict[str, Any] | None) -> bool:
        """Whether the master has heard of a transfer: one that is opened after its end would be kept for its TTL."""
        if self.faults or not params or "transfer_id" not in params:
            return True  # with faults many are never known, and nobody counts what is kept
        return int(params["transfer_id"], 16) in self.pair.pool.transfers

    def spoil(self) -> None:
        faults = self.pair.faults
        faults.spoil_rest = True
        faults.get_blocks_max = self.rng.choice((None, None, None, 0, 2))
        faults.raises = self.rng.choice(
            ({}, {}, {}, {"put": RuntimeError("injected")}, {"receive": OSError("injected")})
        )
        for engine in (self.prefiller, self.decoder):
            engine.side._client.transfers.master_is_away = self.rng.random() < 0.2

    def run(self, requests: int, *, faults: bool) -> None:
        self.faults = faults
        deadline = time.monotonic() + DEADLINE_S
        while self.number < requests or self.left or self.prefiller.busy or self.decoder.busy:
            assert time.monotonic() < deadline, [vars(r) for r in self.decoder.requests.values()]
            if self.number < requests and self.rng.random() < 0.3:
                self.begin()
            if faults and self.rng.random() < 0.1:
                self.spoil()
            self.prefiller.step()
            self.decoder.step()
            self.go_on()
        self.pair.faults.reset()
        for engine in (self.prefiller, self.decoder):
            engine.side._client.transfers.master_is_away = False
        self.pair.drain(self.prefiller, self.decoder)
        for request in self.decoding:
            if request.request_id not in self.aborted:
                assert request.answer == expected(request.prompt, request.max_tokens)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mode", ["plain", "layers", "tails_are_kept"])
def test_storm(pair: Pair, mode: str, seed: int) -> None:
    """Aborts and preemptions at every moment: tokens are right, and every transfer ends."""
    storm = Storm(pair, seed, transfer_open_timeout="20s", **MODES[mode])
    storm.run(60, faults=False)
    assert storm.decoder.side.counters["transfer.received"] > 10
    assert storm.aborted
    assert not pair.pool.open_transfers


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mode", ["plain", "layers"])
def test_storm_with_faults(pair: Pair, mode: str, seed: int) -> None:
    """Puts and receives that fail, and a master that is away now and then: tokens are right all the same."""
    storm = Storm(pair, seed, transfer_open_timeout="100ms", **MODES[mode])
    storm.run(60, faults=True)
    assert storm.decoder.side.counters["transfer.received"] > 0


def test_what_cannot_be_said_keeps_nothing_else_from_being_said():
    """An opening that fails in a way of its own counts as refused, and what was to be said with it is."""
    entered, go_on, said = threading.Event(), threading.Event(), []

    class Broken:
        class transfers:  # noqa: N801 - as the client's
            @staticmethod
            def end(transfers: list[int], *_: Any, **__: Any) -> None:
                said.append(("end", transfers))
                entered.set()
                assert go_on.wait(DEADLINE_S)

            @staticmethod
            def open(*_: Any) -> bool:
                raise ValueError("cannot be said")

            @staticmethod
            def seal(transfer: int, ttl_ms: int) -> None:
                said.append(("seal", transfer))

    keeper = Keeper(Broken(), "an engine")  # type: ignore[arg-type]  # stands in for Client
    outgoing = Outgoing(1, [], 0)
    keeper.end(3)
    assert entered.wait(DEADLINE_S)
    keeper.open(outgoing, [], [])  # in one batch with what follows
    keeper.seal(2, 1000)
    go_on.set()
    deadline = time.monotonic() + DEADLINE_S
    while ("seal", 2) not in said:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert outgoing.refused
    keeper.close()


def test_a_seal_that_nobody_has_answered_is_said_again(monkeypatch: pytest.MonkeyPatch):
    """With the renewals, which go on until then; not after its end, nor once nobody would come for it."""
    monkeypatch.setattr("kvpool_vllm.keeper.RENEW_EVERY_S", 0.01)
    said: Counter[tuple[str, int]] = Counter()
    answering = threading.Event()

    class Deaf:
        class transfers:  # noqa: N801 - as the client's
            @staticmethod
            def open(transfer: int, *_: Any) -> bool:
                return True

            @staticmethod
            def seal(transfer: int, ttl_ms: int) -> bool | None:
                said["seal", transfer] += 1
                return True if answering.is_set() else None

            @staticmethod
            def renew(transfers: list[int], consumer: str) -> list[int]:
                said.update(("renew", transfer) for transfer in transfers)
                return []

            @staticmethod
            def end(transfers: list[int], *_: Any, **__: Any) -> list[int]:
                return []

    def until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.001)

    keeper = Keeper(Deaf(), "an engine")  # type: ignore[arg-type]  # stands in for Client
    keeper.open(Outgoing(1, [], 0), [], [])
    keeper.seal(1, 60_000)
    keeper.seal(2, 60_000)
    keeper.seal(3, 0)
    until(lambda: said["seal", 1] > 2 and said["renew", 1] > 2 and said["seal", 2] > 2 and said["seal", 3] > 0)
    keeper.end(2)
    until(lambda: len(keeper) == 1)
    asked = said["seal", 2]
    answering.set()
    until(lambda: len(keeper) == 0)
    assert said["seal", 2] == asked
    keeper.close()
