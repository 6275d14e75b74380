"""Real engines and real pools for the end-to-end tests; they run in the environment of ``make e2e``."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engine import Answer, Engine, engine_environment
from tests.e2e.forked import Forked

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MARGIN_MIN = 0.25
"""A prompt is used where no other token comes this close: bf16 rounds differently for other shapes."""

MEMORY_CLIENT = {"client_factory": "kvpool_vllm.testing:memory_client"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs an engine, skip it where there is none, and let vLLM's own warnings pass."""
    absent = pytest.mark.skip(reason="needs vLLM: make e2e")
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.e2e)
        item.add_marker(pytest.mark.filterwarnings("default"))
        if importlib.util.find_spec("vllm") is None:
            item.add_marker(absent)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for what vLLM leaves behind, after pointing vLLM at it."""
    path = tmp_path_factory.mktemp("vllm")
    os.environ.update(engine_environment(path))
    return path


@pytest.fixture(scope="session")
def model(home: Path) -> Path:
    """Return a tiny checkpoint whose answers depend on the whole prompt."""
    from kvpool_vllm.random_model import make_model

    return make_model(home / "tiny-model")


@pytest.fixture(scope="module")  # one at a time: vLLM keeps a process's worker connector in a global
def memory_engine(model: Path) -> Iterator[Engine]:
    """Return the engine of this process, on a pool in this process that fails on command."""
    engine = Engine(model, MEMORY_CLIENT)
    yield engine
    engine.close()


class Prompts:
    """Random prompts that the model answers with a clear margin, so that equal tokens mean equal KV."""

    def __init__(self) -> None:
        self._rng = random.Random(11)

    def random(self, length: int) -> list[int]:
        return [self._rng.randrange(3, 4096) for _ in range(length)]

    def clear(self, engine: Any, length: int, tokens: int = 4) -> tuple[list[int], Answer]:
        """Return a prompt and its cold answer."""
        for _ in range(50):
            prompt = self.random(length)
            answer = engine.generate(prompt, tokens)
            if answer.margin >= MARGIN_MIN:
                return prompt, answer
        raise AssertionError("no prompt with a clear margin")


@pytest.fixture(scope="session")
def prompts() -> Prompts:
    """Return a source of prompts."""
    return Prompts()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


class Pool:
    """A master and one node as processes of their own."""

    def __init__(
        self, folder: Path, segment_size: str = "256MB", *, master: Sequence[str] = (), node: Sequence[str] = ()
    ) -> None:
        """``master``, ``node``: more arguments for each."""
        self._folder = folder
        self._segment_size = segment_size
        self._more = {"master": master, "node": node}
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith("KVPOOL_")}
        self.address = f"127.0.0.1:{free_port()}"
        self.start()

    def start(self) -> None:
        """Start both, where they were before."""
        self.master = self._start("master", "--port", self.address.rpartition(":")[2])
        try:
            self.node = self._start_node()
        except BaseException:
            self.master.kill()  # nobody holds anything that could be closed
            raise

    def kill(self) -> None:
        """Kill -9 both, and wait until they are gone."""
        for process in (self.master, self.node):
            process.kill()
            process.wait(30)

    def _start(self, component: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self._folder / f"{component}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", f"kvpool.cli.{component}", *arguments, *self._more[component]],
                env=self._environment,
                stdout=log,
                stderr=log,
            )

    def _start_node(self) -> subprocess.Popen[bytes]:
        socket_path = str(self._folder / "node.sock")
        segment = ("--segment_size", self._segment_size, "--socket_path", socket_path)
        node = self._start("node", "--master", self.address, *segment)
        try:
            self._wait_ready(node)
        except BaseException:
            node.kill()
            raise
        return node

    def control(self, *command: str) -> Any:
        """Ask the master through the command line; None where that has nothing to say."""
        line = [sys.executable, "-m", "kvpool.cli.ctl", "--master", self.address, *command, "--json"]
        asked = subprocess.run(line, env=self._environment, capture_output=True, text=True, timeout=30, check=False)
        return json.loads(asked.stdout) if asked.returncode == 0 else None

    def nodes(self) -> list[Any]:
        """Return the master's nodes while one is live."""
        answer = self.control("nodes")
        found: list[Any] = answer["nodes"] if answer else []
        return found

    def empty(self) -> None:
        """Evict all blocks; those that somebody still pins would stay."""
        assert self.control("evict", "--coldest", "1TB", "--yes")["blocks"]
        deadline = time.monotonic() + 30
        while (status := self.control("status"))["blocks"] or status["used_bytes"]:
            assert time.monotonic() < deadline, f"still in use: {status}"

    def wait_blocks(self, blocks: int) -> None:
        """Wait until the master knows of this many; it hears of a stored block some milliseconds later."""
        deadline = time.monotonic() + 30
        while (known := self.control("status")["blocks"]) < blocks:
            assert time.monotonic() < deadline, f"the master knows {known} of {blocks} blocks"

    def _wait_ready(self, node: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 60
        while not self.nodes():
            assert node.poll() is None, f"the node ended with {node.returncode}"
            assert time.monotonic() < deadline, "the node did not reach the master"

    def replace_node(self) -> None:
        """Start another node where the last one was, once that one is gone for the master too."""
        self.node.wait(30)
        deadline = time.monotonic() + 30
        while self.nodes():
            assert time.monotonic() < deadline, "the master still counts on a dead node"
        self.node = self._start_node()

    def close(self) -> None:
        for process in (self.node, self.master):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Return a running pool."""
    one = Pool(tmp_path_factory.mktemp("pool"))
    yield one
    one.close()


class EngineProcess:
    """An engine in a process of its own."""

    def __init__(self, model: Path, connector: dict[str, Any], environment: dict[str, str], **arguments: Any) -> None:
        line = [str(model), json.dumps(connector), json.dumps(arguments)]
        environment = {**os.environ, **environment}
        self._process: Any
        if arguments.get("tensor_parallel_size", 1) == 1:
            self._process = Forked("tests.e2e.engine", line, environment, asks=True)
        else:  # ranks are processes, which vLLM starts on the CPU with an environment of their own
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.e2e.engine", *line],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        self.pid = self._process.pid
        self._up = False

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the engine process ended with {self._process.wait(10)}"
        return json.loads(line)

    def _ask(self, **request: Any) -> Any:
        self.wait_up()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def wait_up(self) -> None:
        """Wait until it answers, so that two can start side by side."""
        if not self._up:
            assert self._read() == "ready"
            self._up = True

    def ask(self, do: str, **request: Any) -> Any:
        """Have it do what ``tests.e2e.engine`` knows."""
        return self._ask(do=do, **request)

    def generate(
        self,
        prompt: list[int],
        tokens: int = 8,
        params: dict[str, Any] | None = None,
        stops: list[int] | None = None,
    ) -> Answer:
        return Answer(**self._ask(do="generate", prompt=prompt, tokens=tokens, params=params, stops=stops))

    def forget(self) -> None:
        self._ask(do="forget")

    def counters(self) -> dict[str, int]:
        found: dict[str, int] = self.state()["counters"]
        return found

    def state(self) -> dict[str, Any]:
        answer: dict[str, Any] = self._ask(do="state")
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended already, which its test has said
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        assert self._process.stdout is not None
        self._process.stdout.close()
