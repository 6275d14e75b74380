"""kvpool-proxy in front of real engines: their tokens, whichever way they come."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvpool.bench.ttft_engines import EngineSpec, end_groups, engine_python, kvpool_transfer, read_model
from kvpool.server.launch import Children, free_port
from tests.e2e.conftest import MARGIN_MIN, Pool
from tests.e2e.forked import start_forked

HOST = "127.0.0.1"
BLOCK_TOKENS = 32
TOKENS = 6
START_S = 300.0
ASK_S = 60.0

DONE = 'kvpool_proxy_prefills_total{outcome="done"}'
AT_ONCE = 'kvpool_proxy_decode_starts_total{when="with_prefill"}'
MOVED = "vllm:external_prefix_cache_hits_total"
ASKED = "vllm:prompt_tokens_total"
HITS = "vllm:prefix_cache_hits_total"
LEFT = 'kvpool_proxy_prefills_total{outcome="left"}'
FOUND = 'kvpool_proxy_lookups_total{outcome="found"}'

NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
        "kv_buffer_device": "cpu"}  # fmt: skip


class Server:
    """Something that speaks OpenAI's language."""

    def __init__(self, port: int) -> None:
        self.address = f"{HOST}:{port}"

    def post(self, path: str, body: dict[str, Any]) -> bytes:
        request = urllib.request.Request(
            f"http://{self.address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=ASK_S) as answer:
            data: bytes = answer.read()
            return data

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=ASK_S) as answer:
            return str(answer.read().decode())

    def is_healthy(self) -> bool:
        try:
            self.get("/health")
        except OSError:
            return False
        return True

    def found(self) -> set[str]:
        """Return the instances that a proxy has found by itself, and that are up."""
        roles = json.loads(self.get("/instances")).values()
        return {one["instance"] for role in roles for one in role if one["up"] and one["discovered"]}

    def metric(self, name: str) -> float:
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(name)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def complete(self, prompt: list[int], **more: Any) -> dict[str, Any]:
        body = {"model": "bench", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 2} | more
        answer: dict[str, Any] = json.loads(self.post("/v1/completions", body))["choices"][0]
        return answer

    def chat(self, text: str, **more: Any) -> dict[str, Any]:
        body = {"model": "bench", "messages": [{"role": "user", "content": text}], "max_tokens": TOKENS,
                "temperature": 0, "logprobs": True, "top_logprobs": 2} | more  # fmt: skip
        answer: dict[str, Any] = json.loads(self.post("/v1/chat/completions", body))["choices"][0]
        return answer

    def streamed(self, path: str, **body: Any) -> str:
        """Return the text of a stream that has ended as it should."""
        more = {"model": "bench", "max_tokens": TOKENS, "temperature": 0, "stream": True}
        events = self.post(path, more | body).decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        choices = [choice for event in events[:-2] for choice in json.loads(event[6:])["choices"]]
        return "".join(c["text"] if "text" in c else c["delta"].get("content") or "" for c in choices)


def margin(choice: dict[str, Any]) -> float:
    """Return by how much the second best token lost, at the closest place."""
    logprobs = choice["logprobs"]
    tops = logprobs.get("top_logprobs") or [
        {number: top["logprob"] for number, top in enumerate(token["top_logprobs"])} for token in logprobs["content"]
    ]
    values = [sorted(top.values(), reverse=True) for top in tops]
    # Tokens of one text are one entry in a completion's answer: nothing is sure then.
    return min(top[0] - top[1] if len(top) > 1 else 0.0 for top in values)


class Sure:
    """Prompts that are answered with a clear margin, and what an engine says to them that has not seen them."""

    def __init__(self, engine: Server, seed: int) -> None:
        self._engine = engine
        self._rng = random.Random(seed)

    def tokens(self, length: int) -> tuple[list[int], str]:
        for _ in range(50):
            prompt = [self._rng.randrange(3, 4096) for _ in range(length)]
            choice = self._engine.complete(prompt)
            if margin(choice) >= MARGIN_MIN:
                return prompt, choice["text"]
        raise AssertionError("no prompt with a clear margin")

    def words(self, count: int) -> tuple[str, str]:
        for _ in range(50):
            text = " ".join(f"w{self._rng.randrange(1000)}" for _ in range(count))
            choice = self._engine.chat(text)
            if margin(choice) >= MARGIN_MIN:
                return text, choice["message"]["content"]
        raise AssertionError("no text with a clear margin")


@contextmanager
def served(
    folder: Path, model: Path, transfers: list[dict[str, Any] | None], flags: dict[str, list[int]], *more: str,
    environment: dict[str, str] | None = None, arguments: Sequence[str] = (),
) -> Iterator[tuple[list[Server], Server]]:  # fmt: skip
    """Run engines and a proxy in front of them; ``flags``: which engines follow which of the proxy's flags.

    Engines that none follows are to be found through the master: all but those without a ``transfer``.
    """
    children = Children()
    ports = [free_port(HOST) for _ in transfers]
    python = engine_python(sys.executable, "python")
    deadline = time.monotonic() + START_S
    try:
        for number, (port, transfer) in enumerate(zip(ports, transfers, strict=True)):
            home = folder / f"e{number}"
            home.mkdir()
            own = {"VLLM_NIXL_SIDE_CHANNEL_HOST": HOST, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port(HOST))}
            spec = EngineSpec(
                f"engine {number}", python, read_model(model), 400, BLOCK_TOKENS, 4096,
                transfer and transfer | {"engine_id": uuid.uuid4().hex}, own | (environment or {}), arguments,
            )  # fmt: skip
            start_forked(children, spec.name, spec.command(port, home))
        engines = [Server(port) for port in ports]
        for engine in engines:
            children.wait_until(engine.is_healthy, f"{engine.address} was not ready", deadline)
        proxy = Server(free_port(HOST))
        told = ["--host", HOST, "--port", proxy.address.rpartition(":")[2], *more]
        for flag, numbers in flags.items():
            wanted = [engines[number].address for number in numbers]
            told += [flag, *(one if flag == "--instances" else one.rpartition(":")[2] for one in wanted)]
        children.start("proxy", "kvpool.cli.proxy", told)
        children.wait_until(proxy.is_healthy, "the proxy was not ready", deadline)
        if not flags:
            expected = {f"http://{e.address}" for e, transfer in zip(engines, transfers, strict=True) if transfer}
            children.wait_until(lambda: proxy.found() == expected, "the proxy does not find the engines", deadline)
        yield engines, proxy
    finally:
        end_groups(children.children)


def check_same_tokens(proxy: Server, prompts: Sure) -> None:
    """Completions and chat, streamed and not, prompts short and long."""
    for length in (40, 300, 1000):
        prompt, text = prompts.tokens(length)
        assert proxy.complete(prompt)["text"] == text
        assert proxy.streamed("/v1/completions", prompt=prompt) == text
        words, said = prompts.words(length // 5)
        assert proxy.chat(words)["message"]["content"] == said
        assert proxy.streamed("/v1/chat/completions", messages=[{"role": "user", "content": words}]) == said


def until_found(proxy: Server) -> None:
    """Send prompts until the proxy has learnt of the engines' namespace, which is there since their first request."""
    deadline = time.monotonic() + 30
    while not proxy.metric(FOUND):
        assert time.monotonic() < deadline, "the master's word never counted"
        proxy.complete([3] * 640)
        time.sleep(0.2)


def test_two_engines_on_one_pool(tmp_path: Path, model: Path, pool: Pool) -> None:
    """Found through the master, engines get prompts where it says they lie; the tokens are those of an engine."""
    transfer = kvpool_transfer(pool.address, "", {"report_residency": True})
    del transfer["kv_connector_extra_config"]["node"]
    more = ("--master", pool.address, "--lookup_timeout", "5s")
    with served(tmp_path, model, [transfer, transfer], {}, *more) as (engines, proxy):
        assert json.loads(proxy.get("/v1/models"))["data"][0]["id"] == "bench"
        check_same_tokens(proxy, Sure(engines[0], 1))
        until_found(proxy)
        name = "vllm:prefix_cache_hits_total"
        for number, engine in enumerate(engines * 2):
            talk = [random.Random(number).randrange(3, 4096) for _ in range(640)]
            engine.complete(talk)  # behind the proxy's back
            time.sleep(1)  # the engine's report and the master's index are in no hurry
            before = [one.metric(name) for one in engines]
            for turn in range(3):
                talk += [turn + 3] * 64
                proxy.complete(talk)
            gained = [one.metric(name) - old for one, old in zip(engines, before, strict=True)]
            assert gained[number % 2] >= 3 * 640
            assert gained[1 - number % 2] == 0
        assert proxy.metric(FOUND) >= 12
        assert proxy.metric('kvpool_proxy_held_tokens_total{role="both",source="master"}') >= 12 * 640


def test_prefill_and_decode_meet_in_the_pool(tmp_path: Path, model: Path, pool: Pool) -> None:
    """Our connector on both sides: what is in the pool, or with the decode engine, is not prefilled again."""
    transfer = kvpool_transfer(pool.address, "", {"report_residency": True, "gate": "off", "lookup_timeout": "5s"})
    del transfer["kv_connector_extra_config"]["node"]
    flags = {"--prefiller-ports": [0], "--decoder-ports": [1]}
    more = ("--master", pool.address, "--lookup_timeout", "5s")
    with served(tmp_path, model, [transfer, transfer, None], flags, *more) as (engines, proxy):
        proxy.complete([3] * 640)
        until_found(proxy)
        done = proxy.metric(DONE)
        prompts = Sure(engines[2], 4)
        for _ in range(3):
            prompt, text = prompts.tokens(640)
            assert proxy.complete(prompt)["text"] == text
            time.sleep(1)
            assert proxy.complete(prompt)["text"] == text
        assert proxy.metric(DONE) - done == 3
        assert proxy.metric('kvpool_proxy_prefills_total{outcome="skipped"}') >= 3


def test_prefill_and_decode_at_once(tmp_path: Path, model: Path, pool: Pool) -> None:
    """The decode engine takes the prompt's KV while it is computed: the same tokens, next to nothing computed twice."""

    def transfer(role: str) -> dict[str, Any]:
        made = kvpool_transfer(pool.address, "", {"use_layerwise": True, "gate": "off", "lookup_timeout": "5s"})
        del made["kv_connector_extra_config"]["node"]
        return made | {"kv_role": role}

    transfers = [transfer("kv_producer"), transfer("kv_consumer"), None]
    with served(tmp_path, model, transfers, {}, "--master", pool.address) as (engines, proxy):
        proxy.complete([3] * 640)  # the engines' first steps say how they hold KV
        engines[1].complete([4] * 640)
        before = {name: engines[1].metric(name) for name in (MOVED, ASKED, HITS)}
        started, ended = proxy.metric(AT_ONCE), proxy.metric(DONE) + proxy.metric(LEFT)
        check_same_tokens(proxy, Sure(engines[2], 5))
        assert proxy.metric(AT_ONCE) - started == 12
        # A prompt that the decode engine has itself by then may be answered before it is prefilled again.
        assert proxy.metric(DONE) + proxy.metric(LEFT) - ended == 12
        assert proxy.metric(DONE) >= 6
        moved, asked, hits = (engines[1].metric(name) - old for name, old in before.items())
        assert moved > 0
        assert asked - moved - hits <= 12 * BLOCK_TOKENS


@pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="needs nixl: make setup-vllm")
def test_prefill_and_decode_apart(tmp_path: Path, model: Path) -> None:
    """NixlConnector moves the prompt's KV: the decode engine says the same tokens and computes next to nothing."""
    environment = {"UCX_TLS": "tcp,sm,self", "UCX_NET_DEVICES": "lo"}
    flags = {"--prefiller-ports": [0], "--decoder-ports": [1]}
    # A third engine says what is right: what the prefill engine has computed already would prove less.
    with served(tmp_path, model, [NIXL, NIXL, None], flags, environment=environment) as (engines, proxy):
        # On a processor with tiles, vLLM's attention must not begin with a step of one token: it asks for them later.
        engines[1].complete([4] * 640)
        before = {name: engines[1].metric(name) for name in (MOVED, ASKED, HITS)}
        check_same_tokens(proxy, Sure(engines[2], 3))
        assert proxy.metric(DONE) == 12
        moved, asked, hits = (engines[1].metric(name) - old for name, old in before.items())
        assert moved > 0
        assert asked - moved - hits <= 12 * BLOCK_TOKENS
