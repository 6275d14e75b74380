"""Time to first token with a real vLLM on the CPU: computed, from the engine's own cache, from the pool.

Usage: ``python tests/e2e/ttft.py [--model tiny|medium|both] [--tokens 4096] [--rounds N] [--json PATH]``.

Three engines with vLLM's default processes on one master and one node: the first computes and stores, the
second has never seen the prompt and loads it, the third has no connector. Each round sends one new prompt
to each of them. A prompt is one token longer than what can be cached, so both kinds of hit compute the same
single token. A figure is the median of the rounds; a hit that did not happen ends the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))  # as a script, Python looks only beside this file

from kvpool.bench.harness import BenchError, one_command  # noqa: E402
from kvpool.bench.pool import BenchPool, bench_pool  # noqa: E402
from kvpool.bench.report import Figure, Report  # noqa: E402
from kvpool.errors import InvalidArgumentError  # noqa: E402
from kvpool.model import format_size  # noqa: E402
from tests.e2e.engine import engine_environment  # noqa: E402
from tests.e2e.ttft_engine import LOG  # noqa: E402

ROUNDS_MIN = 3
START_S = 300.0
ANSWER_S = 120.0
STORED_S = 30.0
END_S = 15.0
SETTLE_S = 0.3
"""Before each prompt: what the engine before does after its answer is not part of the next one's time."""

TOKENS_MAX = 16000
LOG_LINES_SHOWN = 15
DEFAULTS = {"OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING"}
"""What the tests set and this measurement leaves at vLLM's default."""

ABOUT = (
    "TTFT: from LLM.generate(max_tokens=1) to its return, in the process that calls vLLM, which runs its engine "
    "core in another one. Prompts of {prompt} random tokens; a hit covers {tokens} of them."
)
FIGURES = ("ttft_no_connector_miss", "ttft_miss", "ttft_hbm_hit", "ttft_pool_hit_second_engine")


@dataclass(frozen=True, slots=True)
class Kind:
    """A model of ``make_model.py``, and how much time it gets."""

    name: str
    token_bytes: int
    rounds: int
    at_most_s: float


KINDS = {kind.name: kind for kind in (Kind("tiny", 768, 9, 30), Kind("medium", 12288, 5, 240))}


@dataclass(slots=True)
class Answer:
    """An engine's answer to one prompt, and what its connector did meanwhile."""

    start: float
    ms: float
    cached: int
    token: int
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)


class EngineProcess:
    """vLLM with all its processes, in a process group that is gone after ``close``."""

    def __init__(self, name: str, folder: Path, arguments: dict[str, Any]) -> None:
        home = folder / name
        environment = {k: v for k, v in engine_environment(home).items() if k not in DEFAULTS}
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": cores, "PYTHONPATH": str(ROOT), LOG: str(home / "times")}
        ours = {k: v for k, v in os.environ.items() if not k.startswith("KVPOOL_") and k not in DEFAULTS}
        self._name = name
        self._times, self._output = home / "times", home / "output"
        self._read_to = 0
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.e2e.ttft_engine", json.dumps(arguments)],
                cwd=ROOT,
                env={**ours, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                start_new_session=True,  # Ctrl-C reaches only us; and a group to end as one
            )

    def read(self, timeout_s: float) -> Any:
        """Return the next line it says. Raises BenchError."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout_s)[0]:
            raise BenchError(f"the {self._name} engine did not answer within {timeout_s:.0f} s\n{self._last_words()}")
        line = self._process.stdout.readline()
        if not line:
            raise BenchError(f"the {self._name} engine has ended\n{self._last_words()}")
        return json.loads(line)

    def first_token(self, prompt: list[int]) -> Answer:
        """Answer a prompt with one token. Raises BenchError."""
        time.sleep(SETTLE_S)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(prompt) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise BenchError(f"the {self._name} engine has ended\n{self._last_words()}") from None
        return Answer(**self.read(ANSWER_S), notes=self._notes())

    def _notes(self) -> dict[str, dict[str, Any]]:
        """Return what the connector's client noted since the last call."""
        if not self._times.exists():
            return {}
        with self._times.open() as times:
            times.seek(self._read_to)
            lines = times.readlines()
            self._read_to = times.tell()
        return {note["what"]: note for note in map(json.loads, lines)}

    def _last_words(self) -> str:
        lines = self._output.read_text(errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-LOG_LINES_SHOWN:])

    def ask_to_end(self) -> None:
        """Let it end by itself."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def close(self, timeout_s: float) -> None:
        """End what is left of it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


@dataclass(frozen=True, slots=True)
class Engines:
    first: EngineProcess
    second: EngineProcess
    alone: EngineProcess


@contextlib.contextmanager
def running_engines(folder: Path, model: Path, pool: BenchPool, kind: Kind, tokens: int) -> Iterator[Engines]:
    """Start three engines side by side; end them, by force if something went wrong."""
    arguments: dict[str, Any] = {
        "model": str(model),
        "dtype": "bfloat16",
        "enforce_eager": True,
        "kv_cache_memory_bytes": max(8 * tokens, 16384) * kind.token_bytes,
        "max_model_len": tokens + 128,
        "max_num_batched_tokens": max(tokens + 128, 2048),  # a miss is one step
    }
    connector = {
        "kv_connector": "KVPoolConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "master": pool.master,
            "client_factory": "tests.e2e.ttft_engine:timed_client",
        },
    }
    pooled = {**arguments, "kv_transfer_config": connector}
    started: list[EngineProcess] = []
    patience_s = 0.0
    try:
        for name, options in (("first", pooled), ("second", pooled), ("connectorless", arguments)):
            started.append(EngineProcess(name, folder, options))
        for engine in started:
            block_tokens = engine.read(START_S)["block_tokens"]
            if tokens % block_tokens:
                raise InvalidArgumentError("tokens", f"must be a multiple of the block size, {block_tokens}")
        yield Engines(*started)
        patience_s = END_S
        for engine in started:
            engine.ask_to_end()
    finally:
        for engine in started:
            engine.close(patience_s)


class Rounds:
    """The answers of one model, round by round; every one is checked before it counts."""

    def __init__(self, engines: Engines, pool: BenchPool, tokens: int) -> None:
        self._engines = engines
        self._pool = pool
        self._tokens = tokens
        self._random = random.Random(19)
        self.seen: dict[str, list[Answer]] = {name: [] for name in FIGURES}

    def warm_up(self) -> None:
        """Run a round that does not count."""
        self._round()

    def measure(self) -> None:
        """Run a round."""
        for name, answer in zip(FIGURES, self._round(), strict=True):
            self.seen[name].append(answer)

    def _round(self) -> tuple[Answer, Answer, Answer, Answer]:
        prompt = [self._random.randrange(3, 4096) for _ in range(self._tokens + 1)]
        stored = self._pool.status().blocks
        alone = self._engines.alone.first_token(prompt)
        miss = self._engines.first.first_token(prompt)
        self._expect(alone.cached == miss.cached == 0, "a new prompt was found somewhere")
        self._wait_stored(lambda: self._pool.status().blocks > stored)
        hbm = self._engines.first.first_token(prompt)
        self._expect(hbm.cached == self._tokens, f"the first engine had cached {hbm.cached} tokens")
        self._expect("load" not in hbm.notes, "the first engine loaded what it has")
        pooled = self._engines.second.first_token(prompt)
        load = pooled.notes.get("load", {"blocks": 0, "tiers": {}})
        self._expect(pooled.cached == self._tokens, f"the second engine was spared {pooled.cached} tokens")
        self._expect(
            load["tiers"] == {"local": load["blocks"]} and load["blocks"] == pooled.notes["lookup"]["blocks"] > 0,
            f"the second engine found {pooled.notes.get('lookup')} and loaded {load}",
        )
        self._expect(hbm.token == pooled.token, "the pool gave another token than the engine's own cache")
        return alone, miss, hbm, pooled

    def _expect(self, truth: bool, text: str) -> None:
        if not truth:
            raise BenchError(f"{text}; {self._tokens} were wanted")

    def _wait_stored(self, begun: Callable[[], bool]) -> None:
        """Wait until the first engine has saved all of it: the commit is one step, seen by the master at once."""
        deadline = time.monotonic() + STORED_S
        while not begun():
            if time.monotonic() > deadline:
                raise BenchError("the first engine did not store the prompt")
            time.sleep(0.05)

    def figures(self, model: str) -> list[Figure]:
        """Return the medians."""
        medians = {name: statistics.median(answer.ms for answer in seen) for name, seen in self.seen.items()}
        limit = medians["ttft_hbm_hit"]
        detail = {"model": model, "tokens": self._tokens}
        return [
            Figure(name, value, "ms", "ttft_hbm_hit", value / limit, detail, limit) for name, value in medians.items()
        ]

    def split(self, model: str) -> str:
        """Return where the time of a pool hit goes, in a line."""
        hits = self.seen["ttft_pool_hit_second_engine"]

        def middle(of: Callable[[Answer], float]) -> float:
            return statistics.median(of(hit) for hit in hits) * 1000

        size = hits[0].notes["load"]["bytes"]
        ask = middle(lambda hit: hit.notes["lookup"]["start"] - hit.start)
        lookup = middle(lambda hit: hit.notes["lookup"]["end"] - hit.notes["lookup"]["start"])
        between = middle(lambda hit: hit.notes["load"]["start"] - hit.notes["lookup"]["end"])
        load = middle(lambda hit: hit.notes["load"]["end"] - hit.notes["load"]["start"])
        rest = middle(lambda hit: hit.start + hit.ms / 1000 - hit.notes["load"]["end"])
        same = sum(a.token == b.token for a, b in zip(self.seen["ttft_miss"], hits, strict=True))
        return (
            f"{model}, a pool hit: {ask:.1f} ms to the lookup, {lookup:.1f} ms lookup, {between:.1f} ms to the load, "
            f"{load:.1f} ms load ({format_size(size)}, {size / load / 1e6:.1f} GB/s), {rest:.1f} ms to the token; "
            f"{len(hits)} rounds, tokens as from HBM in all, as computed in {same}."
        )


def make_checkpoint(folder: Path, kind: str) -> Path:
    """Make the model in another process, so that torch does not stay in this one. Raises BenchError."""
    made = subprocess.run(
        [sys.executable, str(HERE / "make_model.py"), str(folder), kind],
        env={**os.environ, **engine_environment(folder.parent / "making")},
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        raise BenchError(f"the {kind} model could not be made:\n{made.stderr[-2000:]}")
    return folder


def measure(report: Report, kind: Kind, tokens: int, rounds: int) -> None:
    """Measure one model."""
    segment = (rounds + 2) * tokens * kind.token_bytes * 5 // 4 + (64 << 20)
    with tempfile.TemporaryDirectory(prefix="kvpool-ttft-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        report.step(f"{kind.name}: making the model")
        model = make_checkpoint(folder / "model", kind.name)
        report.step(f"{kind.name}: starting three engines")
        with (
            bench_pool(None, segment_size=segment) as pool,
            running_engines(folder, model, pool, kind, tokens) as engines,
        ):
            run = Rounds(engines, pool, tokens)
            report.step(f"{kind.name}: warming up")
            run.warm_up()
            end = time.monotonic() + kind.at_most_s
            for done in range(rounds):
                if done < ROUNDS_MIN or time.monotonic() < end:
                    report.step(f"{kind.name}: round {done + 1} of {rounds}")
                    run.measure()
            for figure in run.figures(kind.name):
                report.add(figure)
            report.note(run.split(kind.name))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", type=click.Choice([*KINDS, "both"]), default="both", show_default=True)
@click.option("--tokens", type=click.IntRange(128, TOKENS_MAX), default=4096, show_default=True, help="Of a hit.")
@click.option("--rounds", type=click.IntRange(1, 100), help="Prompts; by default as many as fit a few minutes.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write the figures here.")
def main(model: str, tokens: int, rounds: int | None, json_path: str | None) -> None:
    """Measure the time to first token of a miss, of a hit in the engine's own cache, and of a pool hit."""
    report = Report("ttft")
    kinds = [kind for kind in KINDS.values() if model in {kind.name, "both"}]
    report.note(ABOUT.format(prompt=tokens + 1, tokens=tokens))
    with one_command():
        with report.running(sum(3 + (rounds or kind.rounds) for kind in kinds)):
            for kind in kinds:
                measure(report, kind, tokens, rounds or kind.rounds)
        report.note("load average at the end: {:.1f}, {:.1f}, {:.1f}".format(*os.getloadavg()))
        report.show(json_path)


if __name__ == "__main__":
    main()
