"""``kvpool-bench ttft``: real vLLM engines on one pool, and the time to the first token of a streamed answer.

Without further flags two engines, each beside a node of its own, answer data set A cold, from the engine's own
cache (the limit), from the pool through their own node, and the other engine through the first one's node. With
``--miss_only`` and ``--fault`` throughput is measured in pairs against engines without a connector.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from kvpool.bench.harness import FiniteRange, Helper, one_command
from kvpool.bench.pool import BenchPool, bench_pool
from kvpool.bench.report import json_option
from kvpool.bench.ttft_data import Prompts, Shape
from kvpool.bench.ttft_engines import (
    Engine,
    Engines,
    EngineSpec,
    Model,
    Python,
    engine_python,
    get_model,
    kvpool_transfer,
    need_kvpool,
    running_engines,
)
from kvpool.bench.ttft_http import Server
from kvpool.bench.ttft_pairs import OFF, OFF_AGAIN, Arm, Fault, FaultRun, Pairs, measure_misses
from kvpool.bench.ttft_phases import Phases, System
from kvpool.bench.ttft_pools import MOONCAKE_TRANSFER, Stored, blocks_added, mooncake_pool, need_mooncake
from kvpool.bench.ttft_relay import delaying_relay
from kvpool.bench.ttft_report import TTFTReport, check_plot, draw
from kvpool.errors import InvalidArgumentError
from kvpool.model import format_size, parse_size

KVPOOL, MOONCAKE = "kvpool", "mooncake"
FAULTS = ("slow", "stopped", "dead_master")
SLOW_S = 2.0
PAIRS_MIN = 10
SEGMENT_SPARE = 1.2
SEGMENT_MIN = 256 << 20
SEGMENT_UNKNOWN = 4 << 30
ASK_S = 30.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for."""

    shapes: tuple[Shape, ...]
    seed: int
    vocabulary: tuple[int, int]
    evict: str
    evict_prompts: int
    timeout_s: float
    pairs: int
    block_tokens: int
    segment_size: int
    engine_arguments: tuple[str, ...]
    connector: Mapping[str, Any]
    """More keys of our connector's ``kv_connector_extra_config``."""

    @property
    def prompts(self) -> Prompts:
        """A fresh source of prompts."""
        return Prompts(self.seed, *self.vocabulary)

    @property
    def shape(self) -> Shape:
        """The only shape of a measurement that has one."""
        return self.shapes[0]

    @property
    def engine_blocks(self) -> int:
        """Blocks of an engine's own cache: what the largest data set needs."""
        return max(shape.engine_blocks(self.block_tokens) for shape in self.shapes)

    def spec(self, name: str, python: Python, model: Model) -> EngineSpec:
        """Return an engine without a connector."""
        longest = max(shape.input_tokens + shape.output_tokens for shape in self.shapes)
        return EngineSpec(
            name,
            python,
            model,
            self.engine_blocks,
            self.block_tokens,
            longest + self.block_tokens,
            arguments=self.engine_arguments,
            resettable=self.evict == "reset",
        )

    def segment_bytes(self, model: Model) -> int:
        """Return how much memory a node needs so that data set A is still there after B."""
        if self.segment_size:
            return self.segment_size
        if not model.token_bytes:
            return SEGMENT_UNKNOWN
        capacity = self.engine_blocks * self.block_tokens
        most = max(
            (2 * shape.prompts + 2 * shape.concurrency + shape.evicting_prompts(capacity)) * shape.input_tokens
            for shape in self.shapes
        )
        return max(SEGMENT_MIN, int(most * model.token_bytes * SEGMENT_SPARE))


class TTFTBench:
    """One run of the command with engines of its own."""

    def __init__(self, plan: Plan, python: Python, model: Model, report: TTFTReport, folder: Path) -> None:
        self._plan = plan
        self._python = python
        self._model = model
        self._report = report
        self._folder = folder
        self._segment = plan.segment_bytes(model)

    def _engine(self, name: str, python: Python | None = None, **changes: Any) -> EngineSpec:
        return replace(self._plan.spec(name, python or self._python, self._model), **changes)

    def _pooled(self, name: str, pool: BenchPool, node: int, socket_path: str = "", **changes: Any) -> EngineSpec:
        transfer = kvpool_transfer(pool.master, socket_path or pool.sockets[node], self._plan.connector)
        return self._engine(name, transfer=transfer, **changes)

    def _start(self, engines: Engines, specs: Sequence[EngineSpec]) -> list[Engine]:
        self._report.step(f"starting {len(specs)} engines")
        return engines.start(specs)

    def ttft(self, peer: Python | None) -> None:
        """Measure times to first token, and beside a peer what saving costs."""
        with ExitStack() as stack:
            pool = stack.enter_context(bench_pool(None, nodes=2, segment_size=self._segment))
            specs = [self._pooled(f"{KVPOOL} {number + 1}", pool, number) for number in range(2)]
            waits = [Stored(lambda: blocks_added(pool))]
            if peer is not None:
                theirs = stack.enter_context(mooncake_pool(peer, self._folder, self._segment))
                changes = {"transfer": MOONCAKE_TRANSFER, "environment": theirs.environment}
                specs += [self._engine(f"{MOONCAKE} {number + 1}", peer, **changes) for number in range(2)]
                waits.append(Stored(theirs.keys_stored))
            engines = stack.enter_context(running_engines(self._folder))
            started = self._start(engines, specs)
            plan = self._plan
            systems = [
                System(name, started[2 * i], started[2 * i + 1], wait, plan.evict, plan.evict_prompts)
                for i, (name, wait) in enumerate(zip((KVPOOL, MOONCAKE), waits, strict=False))
            ]
            phases = Phases(systems, plan.prompts, self._report, plan.timeout_s)
            for shape in plan.shapes:
                self._report.add_timings(phases.measure(shape))
            self._say_where(pool)
            if peer is not None:
                engines.stop(started[1::2])
                pool_pids = [pool.pids, (theirs.pid,)]
                arms = [Arm(s.name, e, (e.pid, *p)) for s, e, p in zip(systems, started[::2], pool_pids, strict=True)]
                off = self._start(engines, [self._engine(OFF), self._engine(OFF_AGAIN)])
                self._measure_misses([*_arms(off), *arms])

    def _say_where(self, pool: BenchPool) -> None:
        """Say which node holds the blocks: a hit of the second engine came from the first one's node or did not."""
        blocks = pool.node_blocks()
        first, second = (blocks.get(path, 0) for path in pool.sockets)
        held = f"{second:,} blocks" if second else "none"
        self._report.note(f"{KVPOOL}: the first node holds {first:,} blocks, the second node holds {held}")

    def misses(self) -> None:
        """Measure throughput on prompts that nobody has seen."""
        with bench_pool(None, segment_size=self._segment) as pool, running_engines(self._folder) as engines:
            specs = [self._engine(OFF), self._engine(OFF_AGAIN), self._pooled(KVPOOL, pool, 0)]
            started = self._start(engines, specs)
            self._measure_misses([*_arms(started[:2]), Arm(KVPOOL, started[2], (started[2].pid, *pool.pids))])

    def _measure_misses(self, arms: Sequence[Arm]) -> None:
        plan = self._plan
        measure_misses(arms, plan.shape, plan.prompts, self._report, plan.pairs, plan.timeout_s)

    def fault(self, name: str) -> None:
        """Measure throughput while the pool is broken."""
        plan = self._plan
        with (
            bench_pool(None, segment_size=self._segment) as pool,
            self._fault(name, pool) as (fault, socket_path),
            running_engines(self._folder) as engines,
        ):
            pooled = self._pooled(KVPOOL, pool, 0, socket_path, resettable=True)
            started = self._start(engines, [self._engine(OFF), self._engine(OFF_AGAIN), pooled])
            arms = [*_arms(started[:2]), Arm(KVPOOL, started[2], (started[2].pid, *pool.pids))]
            pairs = Pairs(arms, plan.shape, self._report, plan.timeout_s)
            FaultRun(pairs, plan.shape, plan.prompts, self._report, fault).measure(plan.pairs)
            engines.check()

    @contextmanager
    def _fault(self, name: str, pool: BenchPool) -> Iterator[tuple[Fault, str]]:
        """Yield what breaks the pool and the socket that its engine uses; nothing stays stopped."""
        stored, block = Stored(lambda: blocks_added(pool)), self._plan.block_tokens
        if name == "slow":
            path = str(self._folder / "slow.sock")
            with Helper(delaying_relay, path, pool.sockets[0]) as relay:
                yield Fault(name, lambda: relay.ask(SLOW_S, ASK_S), stored, block), path
            return
        pid, number = (pool.node_pids[0], signal.SIGSTOP) if name == "stopped" else (pool.master_pid, signal.SIGKILL)
        try:
            yield Fault(name, lambda: os.kill(pid, number), stored, block), ""
        finally:
            if number == signal.SIGSTOP:
                os.kill(pid, signal.SIGCONT)  # it has to hear that it shall end


def _arms(engines: Sequence[Engine]) -> list[Arm]:
    return [Arm(engine.name, engine, (engine.pid,)) for engine in engines]


def measure_urls(servers: Sequence[Server], plan: Plan, report: TTFTReport) -> None:
    """Measure servers that somebody else runs. Raises BenchError."""
    for server in servers:
        server.find_model()
    second = servers[1] if len(servers) > 1 else None
    system = System(servers[0].model, servers[0], second, evict=plan.evict, evict_prompts=plan.evict_prompts)
    if servers[0].metrics().own_hits is None:
        report.note(f"{servers[0].url} tells nothing about its caches: whether a hit was one has to be believed")
    if second is None:
        report.note("only one --url: no hit of another engine was measured")
    phases = Phases([system], plan.prompts, report, plan.timeout_s)
    with report.running(phases.steps(len(plan.shapes))):
        for shape in plan.shapes:
            report.add_timings(phases.measure(shape))


def _steps(plan: Plan, *, miss_only: bool, fault: str | None, peer: bool) -> int:
    """Return how many steps a run with engines of its own shows."""
    rounds = (plan.pairs + 1) * (4 if peer else 3)
    if miss_only or fault:
        return 2 + rounds + (2 if fault else 0)
    return 2 + (2 if peer else 1) * 5 * len(plan.shapes) + (1 + rounds if peer else 0)


def _make_plan(options: Mapping[str, Any], *, throughput: bool) -> Plan:
    """Return the plan for checked flags. Raises InvalidArgumentError."""
    inputs = options["input_len"] or ((1024,) if throughput else (4096,))
    at_once = options["concurrency"] or ((8,) if options["fault"] else (4,) if throughput else (1, 4))
    if throughput and (len(inputs) > 1 or len(at_once) > 1):
        raise InvalidArgumentError("input_len", "throughput is measured for one --input_len and one --concurrency")
    low, _, high = options["vocabulary"].partition(":")
    if not (low.isdigit() and high.isdigit() and int(low) + 1 < int(high)):
        raise InvalidArgumentError("vocabulary", f"must be LOW:HIGH, token ids, not {options['vocabulary']!r}")
    block = options["block_size"]
    if min(inputs) <= block and not options["url"]:
        raise InvalidArgumentError("input_len", f"must be more than a block of {block} tokens: less is never a hit")
    prompts = options["prompts"]
    shapes = tuple(Shape(i, options["output_len"], c, prompts) for i in inputs for c in at_once)
    size = options["segment_size"]
    return Plan(
        shapes,
        secrets.randbits(32) if options["seed"] is None else options["seed"],
        (int(low), int(high)),
        options["evict"],
        options["evict_prompts"],
        options["timeout"],
        options["pairs"],
        block,
        parse_size(size, "segment_size") if size else 0,
        tuple(shlex.split(options["engine_args"])),
        _connector(options["connector_config"]),
    )


def _connector(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InvalidArgumentError("connector_config", f"must be a JSON object, not {text!r}")
    return found


def _check_together(options: Mapping[str, Any]) -> None:
    """Raise InvalidArgumentError for flags that exclude each other."""
    modes = [name for name in ("miss_only", "fault", "peer", "url") if options[name]]
    if len(modes) > 1:
        raise InvalidArgumentError(modes[1], f"does not go with --{modes[0]}")
    if len(options["url"]) > 2:
        raise InvalidArgumentError("url", "one or two servers are measured")
    if options["plot"] and (options["miss_only"] or options["fault"]):
        raise InvalidArgumentError("plot", "shows times to first token; throughput is in the table and in --json")


def _run(options: Mapping[str, Any], report: TTFTReport) -> None:
    _check_together(options)
    fault, miss_only, peer_name = options["fault"], options["miss_only"], options["peer"]
    plan = _make_plan(options, throughput=bool(fault or miss_only))
    if options["plot"]:
        check_plot(options["plot"])
    if options["url"]:
        key, name = options["api_key"], options["served_model"]
        measure_urls([Server(url, model=name, api_key=key) for url in options["url"]], plan, report)
        return
    report.note(f"prompts: --seed {plan.seed}")
    python = engine_python(options["engine_python"], "engine_python")
    need_kvpool(python, "engine_python")
    peer = None
    if peer_name:
        peer = engine_python(options["peer_python"], "peer_python")
        need_mooncake(peer, "peer_python")
    steps = _steps(plan, miss_only=miss_only, fault=fault, peer=peer is not None)
    with (
        tempfile.TemporaryDirectory(prefix="kvpool-ttft-", ignore_cleanup_errors=True) as name,
        report.running(steps),
    ):
        report.step("getting the model")
        model = get_model(options["model"], python, Path(name))
        bench = TTFTBench(plan, python, model, report, Path(name))
        if miss_only:
            bench.misses()
        elif fault:
            bench.fault(fault)
        else:
            bench.ttft(peer)
    report.note(
        f"vLLM {python.vllm}, model {options['model']} ({format_size(model.token_bytes)} a token); an engine's own "
        f"cache holds {plan.engine_blocks * plan.block_tokens:,} tokens"
    )


@click.command("ttft")
@click.option("--model", default="medium", show_default=True, help="tiny or medium, made on the spot, or a folder.")
@click.option("--engine_python", default=sys.executable, metavar="PYTHON", help="The engines' interpreter; this one.")
@click.option("--url", multiple=True, help="Drive this server instead; given twice, the second is the other engine.")
@click.option("--served_model", default="", help="Model to ask a --url for; its first.")
@click.option("--api_key", default="", help="For a --url.")
@click.option("--input_len", multiple=True, type=click.IntRange(2, 1 << 20), help="Tokens; may be repeated.  [4096]")
@click.option("--output_len", default=10, type=click.IntRange(1, 65536), show_default=True, help="Tokens.")
@click.option("--concurrency", multiple=True, type=click.IntRange(1, 1024), help="May be repeated.  [1 and 4]")
@click.option("--prompts", default=8, type=click.IntRange(1, 10000), show_default=True, help="Prompts of data set A.")
@click.option(
    "--evict", default="dataset", type=click.Choice(["dataset", "reset"]), show_default=True,
    help="How A leaves the engine's own cache: pushed out by data set B, or by a request that vLLM offers developers.",
)  # fmt: skip
@click.option("--evict_prompts", default=0, type=click.IntRange(0), help="Prompts of data set B; found out.")
@click.option("--miss_only", is_flag=True, help="Throughput on new prompts, with and without the connector, in pairs.")
@click.option("--fault", type=click.Choice(FAULTS), help="Throughput while the pool is broken, in pairs.")
@click.option("--pairs", default=10, type=click.IntRange(PAIRS_MIN, 1000), show_default=True, help="Pairs of rounds.")
@click.option("--peer", type=click.Choice([MOONCAKE]), help="Measure vLLM's MooncakeStoreConnector beside ours.")
@click.option("--peer_python", default=".venv-mooncake/bin/python", show_default=True, help="The peer's interpreter.")
@click.option("--block_size", default=128, type=click.IntRange(1, 4096), show_default=True, help="Tokens of a block.")
@click.option("--segment_size", default="", metavar="SIZE", help="Memory of each node; what both data sets need.")
@click.option("--engine_args", default="", metavar="TEXT", help="More arguments for vllm serve, in one text.")
@click.option("--connector_config", default="", metavar="JSON", help="More of our kv_connector_extra_config.")
@click.option("--vocabulary", default="3:4096", show_default=True, help="Token ids that prompts are made of.")
@click.option(
    "--seed", type=int, help="Of the prompts; another one each time, or a pool that lives on would know them."
)
@click.option("--timeout", default=300.0, type=FiniteRange(1), show_default=True, help="Seconds for a request.")
@json_option
@click.option("--plot", metavar="FILE", help="Draw the times here (PNG; needs matplotlib).")
def command(json_path: str | None, **options: Any) -> None:
    """Time to first token with real vLLM engines: cold, and hits in the engine, in the pool, from another node.

    \b
    Examples:
      kvpool-bench ttft --engine_python .venv-vllm/bin/python --plot ttft.png
      kvpool-bench ttft --input_len 1024 --concurrency 4 --model tiny
      kvpool-bench ttft --miss_only
      kvpool-bench ttft --fault stopped
      kvpool-bench ttft --peer mooncake
      kvpool-bench ttft --url http://10.0.0.7:8000 --url http://10.0.0.8:8000
    """
    report = TTFTReport()
    with one_command():
        try:
            _run(options, report)
        except KeyboardInterrupt:
            if report.figures:  # minutes of measuring went into them
                report.note("INTERRUPTED: this is not all that was asked for")
                report.show(json_path)
            raise
    report.note("load average at the end: {:.1f}, {:.1f}, {:.1f}".format(*os.getloadavg()))
    report.show(json_path)
    if options["plot"]:
        draw(report.timings, options["plot"])
        click.echo(f"drawn: {options['plot']}")


if __name__ == "__main__":
    command()
