"""How long a prompt's KV takes from an engine that prefills to one that decodes, beside bare copies of the same bytes.

The prompt is one token longer than whole blocks, so that the decoding engine computes one token of it, whether it
was sent the KV or has it in its own cache: the difference of both times to first token is the transfer's.
"""

from __future__ import annotations

import mmap
import os
import secrets
import shlex
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvpool.bench.harness import BenchError, Helper, helpers
from kvpool.bench.pd_counts import Counters
from kvpool.bench.pd_report import PDReport
from kvpool.bench.pd_results import Where
from kvpool.bench.pd_stage import EngineSizes, Shape, engine_specs
from kvpool.bench.pool import bench_pool
from kvpool.bench.report import Figure
from kvpool.bench.ttft_data import Prompts
from kvpool.bench.ttft_engines import engine_python, get_model, need_kvpool, running_engines
from kvpool.bench.ttft_http import Answer, Server
from kvpool.client_rows import Bytes
from kvpool.errors import InvalidArgumentError
from kvpool.model import format_size
from kvpool.proxy.prompts import fetch, for_decode, for_prefill

HITS: Final = 3
"""Times that a prompt is sent again: the middle one is what a hit in the engine's own cache takes."""
COPIES: Final = 5
OUTPUT_TOKENS: Final = 2
COPY_S: Final = 60.0
RUN: Final = "both copies"
LAYERS: Final = "both by layers"
"""Of one run of bytes, the fastest that a copy can be; and as KV lies in the engines, whose layers are tables of their
own, and in the segment, where a block's layers follow each other. Both by one thread, and without checksums."""

COLD: Final = "both by layers, cold"
"""The second, made once and as soon after a prefill as the transfer is: the others repeat a copy until caches and
address translation know its memory."""

QUIET_S: Final = 1.5
"""An engine's processes yield in a loop for a second after their last step. On a machine that both engines share,
that takes a core from the other one, by chance for all of that second."""

SETTLE_S: Final = 5.0
"""What was transferred has been counted, and what was to be saved has been, by then."""

AFTER: Final = "after the prefill"
WITH: Final = "with the prefill"

SECONDS: Final = {
    "kvpool": ("vllm:kvpool_save_seconds_total", "vllm:kvpool_load_seconds_total"),
    "nixl": ("vllm:nixl_none", "vllm:nixl_xfer_time_seconds_sum"),
}
"""Counters of the time that the connectors say they took, where KV leaves an engine and where it comes into one."""


def _copier(conn: Connection, path: str, shape: tuple[int, int, int], into: bool) -> None:
    """Copy between memory of its own and the segment as it is asked to, in one run or by layers."""
    blocks, layers, piece = shape
    size = blocks * layers * piece
    own = np.ones(size, np.uint8)
    with Path(path).open("r+b") as file, mmap.mmap(file.fileno(), size) as mapped:
        segment = np.frombuffer(mapped, np.uint8)
        if into:
            segment[:] = 1  # every page is there before anything is timed
        tables, slots = own.reshape(layers, blocks, piece), segment.reshape(blocks, layers, piece)
        ways = {RUN: [(own, segment)], LAYERS: [(table, slots[:, number]) for number, table in enumerate(tables)]}
        conn.send("ready")
        try:
            while way := conn.recv():
                conn.send(_copy(ways[way], into))
        finally:
            ways.clear()
            del segment, slots


def _copy(pairs: Sequence[tuple[Bytes, Bytes]], into: bool) -> float:
    start = time.monotonic()
    for own, segment in pairs:
        np.copyto(segment if into else own, own if into else segment)
    return time.monotonic() - start


@dataclass(frozen=True, slots=True)
class Copies:
    """Two processes and a segment between them: the way that KV takes through a node, with nothing else on it."""

    into: Helper
    out: Helper

    def measure(self, way: str) -> float:
        """Return ms of the copy into the segment and of the one out of it together, the middle of some."""
        return statistics.median(self.once(way) for _ in range(COPIES))

    def once(self, way: str) -> float:
        """Return ms of one copy into the segment and one out of it together."""
        return 1000 * (float(self.into.ask(way, COPY_S)) + float(self.out.ask(way, COPY_S)))


@contextmanager
def copies(blocks: int, layers: int, piece: int) -> Iterator[Copies]:
    """Yield bare copies of so many blocks, of which each layer has ``piece`` bytes."""
    shape = blocks, layers, piece
    descriptor = os.memfd_create("kvpool-bench")
    try:
        os.ftruncate(descriptor, blocks * layers * piece)
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        with helpers(_copier, [(path, shape, True), (path, shape, False)]) as (into, out):
            yield Copies(into, out)
    finally:
        os.close(descriptor)


@dataclass(slots=True)
class Times:
    """Of one system and way; ms, an entry for each prompt."""

    prefill: list[float] = field(default_factory=list)
    """From the request to the prefilling engine to its answer."""
    first: list[float] = field(default_factory=list)
    """From the request to the decoding engine to its first token."""
    hit: list[float] = field(default_factory=list)
    """The same for the same prompt when that engine has it in its own cache."""
    whole: list[float] = field(default_factory=list)
    """From the first request of both to the first token."""
    copied: dict[str, list[float]] = field(default_factory=lambda: {RUN: [], LAYERS: [], COLD: []})
    """The bare copies of the same bytes, into the segment and out of it, close by in time."""
    seconds: list[tuple[float, float]] = field(default_factory=list)
    """What the connectors say that they took, as KV left an engine, and as it came into one."""
    computed: list[int] = field(default_factory=list)
    """Tokens of the prompt that the decoding engine has computed, by its counters."""

    @property
    def transfer(self) -> list[float]:
        """By how much the first token came later than one that only had to wait for the prefill."""
        each = zip(self.whole, self.prefill, self.hit, strict=True)
        return [whole - prefill - hit for whole, prefill, hit in each]


@dataclass(frozen=True, slots=True)
class System:
    """A prefilling engine and a decoding one. ``at_once``: the decoding one may be asked while the other computes."""

    name: str
    prefill: Server
    decode: Server
    at_once: bool = False


class TransferRun:
    """Measures systems one after the other, each beside bare copies."""

    def __init__(self, tokens: int, prompts: int, source: Prompts, report: PDReport, timeout_s: float) -> None:
        self._tokens = tokens
        self._prompts = prompts
        self._source = source
        self._report = report
        self._timeout_s = timeout_s

    def measure(self, system: System, bare: Copies) -> None:
        """Measure one system. Raises BenchError when a request failed."""
        ways: dict[str, Callable[[System, list[int]], tuple[float, Answer, float]]] = {AFTER: self._after}
        if system.at_once:
            ways[WITH] = self._with
        self._report.step(f"{system.name}: warming up")
        short = min(257, self._tokens + 1)
        # A prompt that is computed comes first: on a processor with tiles, vLLM's attention asks for them only then.
        self._stream(system.decode, self._source.tokens(short))
        for way in ways.values():  # connections, agents, first steps
            way(system, self._source.tokens(short))
        times = {name: Times() for name in ways}
        try:
            for number in range(self._prompts):
                for name, way in ways.items():
                    self._report.step(f"{system.name}, {name}: prompt {number + 1}")
                    self._one(system, way, times[name], bare)
        finally:  # a prompt takes long: those that were measured are not lost with one that was not
            for name, found in times.items():
                if found.seconds:
                    self._tell(system, name, found)

    def _one(
        self,
        system: System,
        way: Callable[[System, list[int]], tuple[float, Answer, float]],
        times: Times,
        bare: Copies,
    ) -> None:
        prompt = self._source.tokens(self._tokens + 1)
        before, counted = _seconds(system), Counters([system.decode])
        start = counted.read()
        bare_before = {name: bare.measure(name) for name in (RUN, LAYERS)}
        prefill_s, answer, whole_s = way(system, prompt)
        time.sleep(QUIET_S)
        times.copied[COLD].append(bare.once(LAYERS))
        hits = [self._stream_quietly(system.decode, prompt) for _ in range(HITS)]
        if any(hit.text != answer.text for hit in hits):
            self._report.note(
                f"{system.name}: a hit said something else than the transferred prompt: a near tie, or wrong KV"
            )
        for name, before_ms in bare_before.items():
            times.copied[name].append(min(before_ms, bare.measure(name)))
        after, counts = _seconds_once_counted(system, before), counted.since(start)
        times.prefill.append(prefill_s * 1000)
        times.first.append(answer.ttft_s * 1000)
        times.hit.append(statistics.median(hit.ttft_s for hit in hits) * 1000)
        times.whole.append(whole_s * 1000)
        times.seconds.append((after[0] - before[0], after[1] - before[1]))
        if counts is not None:  # a hit computes one token
            times.computed.append(counts.tokens[Where.NONE] - HITS)

    def _after(self, system: System, prompt: list[int]) -> tuple[float, Answer, float]:
        """Ask the decoding engine when the other has answered, as proxies do."""
        start = time.monotonic()
        params = self._prefill(system, for_prefill(_body(prompt)))
        prefill_s = time.monotonic() - start
        answer = self._stream_quietly(system.decode, prompt, for_decode({}, params))
        return prefill_s, answer, prefill_s + answer.ttft_s

    def _with(self, system: System, prompt: list[int]) -> tuple[float, Answer, float]:
        """Ask both at the same time."""
        transfer = f"{secrets.randbits(63) + 1:016x}"
        took: list[float] = []
        problem: list[BenchError] = []

        def prefill() -> None:
            start = time.monotonic()
            try:
                self._prefill(system, for_prefill(_body(prompt), transfer))
            except BenchError as error:
                problem.append(error)
            took.append(time.monotonic() - start)

        beside = threading.Thread(target=prefill, name="prefill", daemon=True)
        beside.start()
        answer = self._stream(system.decode, prompt, for_decode({}, fetch(transfer)))
        beside.join(self._timeout_s)
        if problem or not took:
            raise problem[0] if problem else BenchError("the prefill did not end")
        return took[0], answer, answer.ttft_s

    def _prefill(self, system: System, body: Mapping[str, Any]) -> Mapping[str, Any]:
        params = system.prefill.ask_whole(body, self._timeout_s).get("kv_transfer_params")
        if not isinstance(params, dict):
            raise BenchError(f"{system.name}: the prefilling engine does not say where the prompt's KV is")
        return params

    def _stream_quietly(self, engine: Server, prompt: Sequence[int], more: Mapping[str, Any] | None = None) -> Answer:
        """Ask when no engine does anything."""
        time.sleep(QUIET_S)
        return self._stream(engine, prompt, more)

    def _stream(self, engine: Server, prompt: Sequence[int], more: Mapping[str, Any] | None = None) -> Answer:
        answer = engine.complete(prompt, OUTPUT_TOKENS, self._timeout_s, **(more or {}))
        if answer.error:
            raise BenchError(f"a request to {engine.url} failed: {answer.error}")
        return answer

    # ---- figures -----------------------------------------------------------------------------------

    def _tell(self, system: System, way: str, times: Times) -> None:
        base = {"system": system.name, "decode asked": way, "tokens": self._tokens, "prompts": len(times.hit)}
        detail = base | {
            "computed_tokens": times.computed,
            "first_token_ms": _rounded(times.first),
            "own_hit_ms": _rounded(times.hit),
            "prefill_ms": _rounded(times.prefill),
            "copy_ms": _rounded(times.copied[RUN]),
        }
        for name, limits in times.copied.items():
            self._add("transfer", times.transfer, name, limits, detail)
        if way == AFTER:
            out_of, into = ([pair[n] * 1000 for pair in times.seconds] for n in range(2))
            if any(into):
                each = [a + b for a, b in zip(out_of, into, strict=True)]
                for name, limits in times.copied.items():
                    self._add("connector's own time", each, name, limits, base | {"in_ms": _rounded(into)})
        self._add("ttft", times.whole, "its prefill", times.prefill, detail)
        if times.computed and max(times.computed) > 1:
            self._report.note(
                f"WARNING: {system.name}, decode asked {way}: the decoding engine computed up to "
                f"{max(times.computed)} tokens of a prompt"
            )

    def _add(
        self, name: str, each: Sequence[float], limit: str, limits: Sequence[float], detail: dict[str, Any]
    ) -> None:
        value, beside = statistics.median(each), statistics.median(limits)
        self._report.add(Figure(name, value, "ms", limit, value / beside, detail | {"each_ms": _rounded(each)}, beside))


def _body(prompt: Sequence[int]) -> dict[str, Any]:
    return {"prompt": list(prompt), "temperature": 0.0}


def _seconds(system: System) -> tuple[float, float]:
    out_of, into = SECONDS[system.name]
    return system.prefill.sample(out_of), system.decode.sample(into)


def _seconds_once_counted(system: System, before: tuple[float, float]) -> tuple[float, float]:
    deadline = time.monotonic() + SETTLE_S
    while (found := _seconds(system))[1] == before[1] and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 2) for value in values]


def measure_transfer(options: Mapping[str, Any], report: PDReport) -> None:
    """Measure the systems that were asked for, each with two engines of its own, one after the other."""
    python = engine_python(options["engine_python"], "engine_python")
    need_kvpool(python, "engine_python")
    tokens, block, prompts = options["transfer_tokens"], options["block_size"], options["prompts"]
    if tokens % block:
        raise InvalidArgumentError("transfer_tokens", f"must be whole blocks of {block} tokens")
    # Room for a few prompts: what was sent is hit again, and then forgotten.
    sizes = EngineSizes(
        4 * (tokens // block + 2), block, tokens + 2 * block, tuple(shlex.split(options["engine_args"]))
    )
    names = options["systems"] or ("kvpool", "nixl")
    steps = 1 + len(names) * (2 + 2 * prompts)
    with tempfile.TemporaryDirectory(prefix="kvpool-pd-", ignore_cleanup_errors=True) as folder, report.running(steps):
        report.step("getting the model")
        model = get_model(options["model"], python, Path(folder))
        if not model.token_bytes:
            raise InvalidArgumentError("model", "its configuration does not tell how much KV a token takes")
        seed = secrets.randbits(32) if options["seed"] is None else options["seed"]
        report.note(f"prompts: --seed {seed}; {format_size(tokens * model.token_bytes)} of KV each")
        run = TransferRun(tokens, prompts, Prompts(seed, 3, 4096), report, options["timeout"])
        with copies(tokens // block, model.layers, block * model.token_bytes // model.layers) as bare:
            for name in names:
                report.step(f"starting two engines, {name}")
                with ExitStack() as stack:
                    pool = None
                    if name == "kvpool":
                        segment = options["segment_size"] or max(256 << 20, 8 * tokens * model.token_bytes)
                        pool = stack.enter_context(bench_pool(None, segment_size=segment))  # one machine, one node
                    home = Path(folder) / name[0]  # short: sockets lie in it
                    home.mkdir()
                    engines = stack.enter_context(running_engines(home))
                    config = {"use_layerwise": True, **options["connector_config"]}
                    specs = engine_specs(Shape(1, 1, name), sizes, python, model, pool, config)
                    prefill, decode = engines.start(specs)
                    at_once = name == "kvpool" and bool(config["use_layerwise"])
                    run.measure(System(name, prefill, decode, at_once), bare)
                    engines.check()
    report.note(f"vLLM {python.vllm}, model {options['model']} ({format_size(model.token_bytes)} a token)")
