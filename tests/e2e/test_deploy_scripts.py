"""deploy/scripts with real engines on the CPU: a prefill and a decode engine that meet in the pool."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import ROOT, Pool, Prompts, free_port

START_S = 180
BLOCK = 128
PATIENT = {"KVPOOL_GATE": "off", "KVPOOL_LOOKUP_TIMEOUT": "10s", "KVPOOL_TRANSFER_TIMEOUT": "30s"}
"""This model computes faster than a busy machine loads: here a hit is waited for."""

ARGUMENTS = ("--dtype", "bfloat16", "--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20),
             "--max-model-len", "2048", "--served-model-name", "tiny")  # fmt: skip


def ask(port: int, path: str, body: Any = None) -> bytes:
    """Return the answer of a server on this machine; raises OSError."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        data: bytes = answer.read()
    return data


def complete(port: int, prompt: list[int], tokens: int) -> str:
    """Return the text of a completion."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    text: str = json.loads(ask(port, "/v1/completions", body))["choices"][0]["text"]
    return text


class Script:
    """An engine started by one of the scripts, on one core."""

    def __init__(self, name: str, core: int, model: Path, pool: Pool, folder: Path) -> None:
        self.port = free_port()
        self._log = folder / f"{name}.log"
        command = ["sh", str(ROOT / "deploy/scripts" / name), str(core), "127.0.0.1", "lo", str(self.port),
                   "1", "1", "0", "127.0.0.1", "0", *ARGUMENTS]  # fmt: skip
        environment = {key: value for key, value in os.environ.items() if key != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        environment["VLLM_SERVER_DEV_MODE"] = "1"  # for /reset_prefix_cache
        environment |= PATIENT | {"DEVICE": "cpu", "MODEL": str(model), "KVPOOL_MASTER": pool.address}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def _get(self, path: str, body: Any = None) -> bytes:
        return ask(self.port, path, body)

    def wait_up(self) -> None:
        """Wait until it is healthy."""
        deadline = time.monotonic() + START_S
        while True:
            assert self._process.poll() is None, self._log.read_text()[-4000:]
            with contextlib.suppress(OSError):
                self._get("/health")
                return
            assert time.monotonic() < deadline, self._log.read_text()[-4000:]
            time.sleep(0.2)

    def complete(self, prompt: list[int], tokens: int) -> str:
        """Return the text of a completion."""
        return complete(self.port, prompt, tokens)

    def forget(self) -> None:
        """Empty its own cache."""
        self._get("/reset_prefix_cache", {})

    def hit_tokens(self) -> float:
        """Return the tokens that it has loaded from the pool."""
        line = re.compile(r"^vllm:kvpool_hit_tokens_total\{.*\} ([0-9.e+]+)$", re.MULTILINE)
        found = line.findall(self._get("/metrics").decode())
        return sum(map(float, found))

    def close(self) -> None:
        """End it and what it has started."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)


@pytest.fixture(scope="module")
def engines(pool: Pool, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Script, Script]]:
    """Return a prefill and a decode engine, started side by side."""
    cores = sorted(os.sched_getaffinity(0))
    folder = tmp_path_factory.mktemp("scripts")
    with contextlib.ExitStack() as stack:
        prefill = Script("prefill.sh", cores[0], model, pool, folder)
        stack.callback(prefill.close)
        decode = Script("decode.sh", cores[-1], model, pool, folder)
        stack.callback(decode.close)
        prefill.wait_up()
        decode.wait_up()
        yield prefill, decode


def test_decode_loads_what_prefill_stored(engines: tuple[Script, Script], pool: Pool, prompts: Prompts) -> None:
    """The full blocks of a prompt come out of the pool, and the decode engine adds none to it."""
    prefill, decode = engines
    prompt = prompts.random(3 * BLOCK + 40)
    prefill.complete(prompt, 1)
    pool.wait_blocks(3)
    assert decode.hit_tokens() == 0
    assert decode.complete(prompt, 4)
    assert decode.hit_tokens() == 3 * BLOCK
    decode.complete(prompts.random(2 * BLOCK + 10), 4)
    assert pool.control("status")["blocks"] == 3


def test_prefill_finds_what_it_stored_before(engines: tuple[Script, Script], pool: Pool, prompts: Prompts) -> None:
    """A prefill engine loads prefixes too: here one that its own cache has lost."""
    prefill, _ = engines
    prompt = prompts.random(2 * BLOCK + 10)
    before = pool.control("status")["blocks"]
    prefill.complete(prompt, 1)
    pool.wait_blocks(before + 2)
    prefill.forget()
    hits = prefill.hit_tokens()
    prefill.complete(prompt, 1)
    assert prefill.hit_tokens() - hits == 2 * BLOCK


@contextlib.contextmanager
def proxy(*arguments: str) -> Iterator[int]:
    """Run kvpool-proxy; returns its port."""
    port = free_port()
    command = [sys.executable, "-m", "kvpool.cli.proxy", "--host", "127.0.0.1", "--port", str(port), *arguments]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None
            with contextlib.suppress(OSError):
                found = json.loads(ask(port, "/healthcheck"))
                if (found["prefill_instances"], found["decode_instances"]) == (1, 1):
                    break
            assert time.monotonic() < deadline, "the proxy does not find both engines"
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(40)


def test_the_proxy_brings_them_together(engines: tuple[Script, Script], pool: Pool, prompts: Prompts) -> None:
    """The proxy finds them; a request is prefilled here and decoded there, and its blocks are there again later."""
    _, decode = engines
    prompt = prompts.random(3 * BLOCK + 40)
    before = pool.control("status")["blocks"]
    with proxy("--master", pool.address) as port:
        assert complete(port, prompt, 4)
        pool.wait_blocks(before + 3)  # the decode engine stores nothing: they are the prefill engine's
        decode.forget()
        hits = decode.hit_tokens()
        assert complete(port, prompt, 4)
    assert decode.hit_tokens() - hits >= 3 * BLOCK
