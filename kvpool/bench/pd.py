"""``kvpool-bench pd``: conversations through ``kvpool-proxy``, routed by prefixes and in turn, on the same engines.

Engines are simulated, started here (colocated, or prefill and decode apart), or given by URL. ``--transfer`` measures
instead how long a prompt takes from a prefilling engine to a decoding one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from kvpool.bench import pd_workload
from kvpool.bench.harness import BenchError, FiniteRange, one_command
from kvpool.bench.pd_drive import Drive
from kvpool.bench.pd_report import PDReport, draw
from kvpool.bench.pd_results import Result, Row
from kvpool.bench.pd_sim import ROUTINGS, Cluster, Simulation
from kvpool.bench.pd_stage import POLICIES, PREFIX, EngineSizes, Shape, Stage, engine_specs, host, learn, proxies
from kvpool.bench.pd_transfer import measure_transfer
from kvpool.bench.pd_workload import KINDS, Ask
from kvpool.bench.pool import bench_pool
from kvpool.bench.report import json_option
from kvpool.bench.ttft_engines import engine_python, get_model, need_kvpool, running_engines
from kvpool.bench.ttft_http import Server
from kvpool.bench.ttft_report import check_plot
from kvpool.errors import InvalidArgumentError, KVPoolError
from kvpool.model import format_size, parse_size
from kvpool.proxy.routing import Policy

CHARS_A_TOKEN = 3
"""At the least, of the texts that are made here: an engine's room is reckoned by it."""


@dataclass(frozen=True, slots=True)
class Work:
    """A workload and what it is called."""

    name: str
    asks: list[Ask]

    @property
    def longest(self) -> int:
        """Tokens of its longest request, at most."""
        return max(len(ask.prompt) // CHARS_A_TOKEN + ask.output_tokens for ask in self.asks)

    @property
    def under_way(self) -> int:
        """Tokens of all sessions that are under way at a time, at most: what caches would have to hold."""
        last = {ask.session: ask.turn for ask in self.asks}
        held: dict[int, int] = {}
        most = 0
        for ask in self.asks:
            held[ask.session] = len(ask.prompt) // 4
            most = max(most, sum(held.values()))
            if ask.turn == last[ask.session]:
                del held[ask.session]
        return most


def _works(options: Mapping[str, Any], report: PDReport) -> list[Work]:
    """Return the workloads that were asked for, one that is read, or made. Raises InvalidArgumentError."""
    if options["read"]:
        return [Work(Path(options["read"]).stem, pd_workload.read(options["read"]))]
    seed = secrets.randbits(32) if options["seed"] is None else options["seed"]
    report.note(f"workload: --seed {seed}")
    names = options["workload"] or (
        ("chat", "documents", "mixed", "shared", "unique") if options["simulated"] else ("small",)
    )
    changes = {name: options[name] for name in ("sessions", "turns", "active") if options[name]}
    works = []
    for name in names:
        kind = dataclasses.replace(KINDS[name], **changes)
        works.append(Work(name, pd_workload.make(kind, seed, rate=options["rate"], think_s=options["think"])))
    return works


def simulate(works: Sequence[Work], options: Mapping[str, Any], report: PDReport) -> None:
    """Run workloads on simulated instances."""
    for work in works:
        count = options["instances"]
        hbm = options["hbm_tokens"] or max(work.under_way, options["concurrency"] * work.longest) // count
        node = options["node_tokens"]
        cluster = Cluster(count, hbm, 4 * hbm if node is None else node)
        rows = []
        for name, (policy, master) in ROUTINGS.items():
            report.step(f"{work.name}, {name}")
            done = Simulation(cluster, policy, master=master).run(work.asks, options["concurrency"])
            rows.append(Row(work.name, name, [done], f"{count} simulated"))
        report.add_rows(rows)
        endless = Cluster(1, 1 << 40, 0)
        most = Simulation(endless, Policy.PREFIX, master=False).run(work.asks, options["concurrency"]).near_tokens
        most_over = f", {most / rows[0].near_tokens:.2f} x round robin's" if rows[0].near_tokens else ""
        report.note(
            f"{work.name}: {most:,} tokens were asked before: more nobody can hit{most_over}; "
            f"{len(work.asks)} requests; an instance holds {hbm:,} tokens, its node "
            f"{cluster.node_tokens:,}; all sessions under way hold {work.under_way:,}"
        )


@dataclass(frozen=True, slots=True)
class Measurement:
    """Workloads through proxies, routing after routing, round after round."""

    stage: Stage
    options: Mapping[str, Any]
    report: PDReport

    def run(self, work: Work, engines: str) -> None:
        """Measure one workload under each routing. Raises BenchError."""
        rounds: dict[str, list[Result]] = {name: [] for name in self.stage.proxies}
        for number in range(self.options["rounds"]):
            # Who goes first changes: what a noisy machine does is shared out.
            for name in list(rounds)[:: -1 if number % 2 else 1]:
                self.report.step(f"{work.name}, {name}, round {number + 1}")
                rounds[name].append(self._round(work, name, number))
        self.report.add_rows([Row(work.name, name, results, engines) for name, results in rounds.items()])

    def _round(self, work: Work, name: str, number: int) -> Result:
        # The same workload again, but no prompt of it was ever seen.
        mark = f"{number} {list(self.stage.proxies).index(name)}"
        asks = pd_workload.marked(work.asks, mark)
        counters, proxy = self.stage.counters, self.stage.proxies[name]
        before = counters.read()
        asked, wall_s = Drive(proxy, asks, self.options["concurrency"], self.options["timeout"]).run()
        counted = counters.since(before)
        return Result(asked, wall_s, counted.tokens if counted else {}, counted.moved if counted else 0)

    def warm_up(self) -> None:
        """Let every engine compute once, and the proxies learn what they can."""
        for number, server in enumerate((*self.stage.serving, *self.stage.decoding)):
            answer = server.complete(f"[warm up {number}] " + "ban der lin " * 60, 4, self.options["timeout"])
            if answer.error:
                raise BenchError(f"the engine at {server.url} does not answer: {answer.error}")
        for name, proxy in self.stage.proxies.items():
            for number in range(2):
                proxy.complete(f"[warm up {name} {number}] " + "fon gul mer " * 60, 4, self.options["timeout"])


def measure_engines(works: Sequence[Work], shape: Shape, options: Mapping[str, Any], report: PDReport) -> None:
    """Run workloads on engines of our own."""
    python = engine_python(options["engine_python"], "engine_python")
    need_kvpool(python, "engine_python")
    block = options["block_size"]
    longest = max(work.longest for work in works)
    hbm = options["hbm_tokens"] or max(max(work.under_way for work in works) // shape.serving, 2 * longest)
    sizes = EngineSizes(-(-hbm // block), block, longest + 2 * block, tuple(shlex.split(options["engine_args"])))
    with (
        tempfile.TemporaryDirectory(prefix="kvpool-pd-", ignore_cleanup_errors=True) as name,
        report.running(3 + len(works) * options["rounds"] * len(POLICIES)),
        ExitStack() as stack,
    ):
        report.step("getting the model")
        model = get_model(options["model"], python, Path(name))
        pool = None
        if shape.connector == "kvpool":
            segment = options["segment_size"] or max(256 << 20, 2 * hbm * model.token_bytes)
            hosts = [host(number) for number in range(shape.engines)]
            pool = stack.enter_context(bench_pool(None, nodes=shape.engines, segment_size=segment, hosts=hosts))
        report.step(f"starting {shape.engines} engines")
        engines = stack.enter_context(running_engines(Path(name)))
        started = engines.start(engine_specs(shape, sizes, python, model, pool, options["connector_config"]))
        stage = Stage(started[: shape.serving], started[shape.serving :])
        master = pool.master if pool else None
        more = ["--lookup_timeout", "2s", *shlex.split(options["proxy_args"])]
        stack.enter_context(proxies(stage, POLICIES, master, more))
        _measure(stage, works, shape, options, report, master=master is not None)
        engines.check()
    report.note(
        f"vLLM {python.vllm}, model {options['model']} ({format_size(model.token_bytes)} a token); an engine's own "
        f"cache holds {sizes.blocks * block:,} tokens"
    )


def measure_urls(works: Sequence[Work], options: Mapping[str, Any], report: PDReport) -> None:
    """Run workloads on engines that somebody else runs."""
    key, name = options["api_key"], options["served_model"]
    serving, decoding = (
        [Server(url, model=name, api_key=key) for url in options[which]] for which in ("url", "decode_url")
    )
    for server in (*serving, *decoding):
        server.find_model()
    stage, shape = Stage(serving, decoding), Shape(len(serving), len(decoding))
    master = options["master"]
    more = [*(["--api_key", key] if key else []), *shlex.split(options["proxy_args"])]
    with (
        report.running(1 + len(works) * options["rounds"] * len(POLICIES)),
        proxies(stage, POLICIES, master, more),
    ):
        _measure(stage, works, shape, options, report, master=master is not None)


def _measure(
    stage: Stage, works: Sequence[Work], shape: Shape, options: Mapping[str, Any], report: PDReport, *, master: bool
) -> None:
    measurement = Measurement(stage, options, report)
    report.step("warming up")
    measurement.warm_up()
    if master and not learn(stage, "[learn] " + "pan ser dil " * 200, 2, options["timeout"]):
        report.note(f"WARNING: the master's word never counted: {PREFIX} is routed by what was sent where")
    for work in works:
        measurement.run(work, shape.words)


def _check(options: dict[str, Any]) -> None:
    """Turn texts into values and raise InvalidArgumentError for flags that exclude each other."""
    modes = [name for name in ("simulated", "url", "prefill", "transfer") if options[name]]
    if len(modes) > 1:
        raise InvalidArgumentError(modes[1], f"does not go with --{modes[0]}")
    if bool(options["prefill"]) != bool(options["decode"]):
        raise InvalidArgumentError("decode", "--prefill and --decode are given together")
    if options["decode_url"] and not options["url"]:
        raise InvalidArgumentError("decode_url", "needs --url: those that prefill")
    if options["connector"] == "none" and options["prefill"]:
        raise InvalidArgumentError("connector", "prefill and decode apart need one")
    if options["read"] and options["workload"]:
        raise InvalidArgumentError("workload", "does not go with --read")
    size = options["segment_size"]
    options["segment_size"] = parse_size(size, "segment_size") if size else 0
    try:
        found = json.loads(options["connector_config"] or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InvalidArgumentError("connector_config", "must be a JSON object")
    options["connector_config"] = found
    if options["plot"] and options["transfer"]:
        raise InvalidArgumentError("plot", "does not go with --transfer")
    if options["plot"]:
        check_plot(options["plot"])


def _run(options: dict[str, Any], report: PDReport) -> None:
    _check(options)
    if options["transfer"]:
        measure_transfer(options, report)
        return
    works = _works(options, report)
    if options["write"]:
        if len(works) > 1:
            raise InvalidArgumentError("write", "one --workload is written")
        pd_workload.write(works[0].asks, options["write"])
        report.note(f"written: {len(works[0].asks)} requests to {options['write']}")
        return
    if options["simulated"]:
        options["instances"] = options["instances"] or 4
        options["concurrency"] = options["concurrency"] or 2 * options["instances"]
        with report.running(len(works) * len(ROUTINGS)):
            simulate(works, options, report)
        return
    options["concurrency"] = options["concurrency"] or 2
    if options["url"]:
        measure_urls(works, options, report)
    else:
        serving = options["prefill"] or options["instances"] or 2
        measure_engines(works, Shape(serving, options["decode"], options["connector"]), options, report)


@click.command("pd")
@click.option("--simulated", is_flag=True, help="Simulated instances: the proxy's own choices, nothing computed.")
@click.option(
    "--instances", default=0, type=click.IntRange(0, 256), help="Engines that do everything.  [2; simulated 4]"
)
@click.option("--prefill", default=0, type=click.IntRange(0, 16), help="Engines that prefill, with --decode.")
@click.option("--decode", default=0, type=click.IntRange(0, 16), help="Engines that decode.")
@click.option(
    "--connector", default="kvpool", type=click.Choice(["kvpool", "nixl", "none"]), show_default=True,
    help="Of engines started here: ours on a pool of its own, vLLM's NixlConnector, or none.",
)  # fmt: skip
@click.option(
    "--url", multiple=True, help="An engine that runs already; repeated for each. With --decode_url: it prefills."
)
@click.option("--decode_url", multiple=True, help="An engine that decodes what those of --url have prefilled.")
@click.option("--master", metavar="HOST:PORT", help="The pool's master, for engines by --url.")
@click.option("--served_model", default="", help="Model to ask a --url for; its first.")
@click.option("--api_key", default="", help="For --url.")
@click.option(
    "--workload", multiple=True, type=click.Choice(list(KINDS)),
    help="What is asked; may be repeated.  [small; simulated: all others]",
)  # fmt: skip
@click.option("--sessions", default=0, type=click.IntRange(0), help="Sessions in all; the workload's own.")
@click.option("--turns", default=0, type=click.IntRange(0), help="Turns of a session; the workload's own.")
@click.option("--active", default=0, type=click.IntRange(0), help="Sessions under way at a time; the workload's own.")
@click.option("--rate", default=0.0, type=FiniteRange(0), help="Sessions that begin a second, at random times.")
@click.option("--think", default=0.0, type=FiniteRange(0), help="With --rate: mean seconds before the next turn.")
@click.option("--seed", type=int, help="Of the workload; another one each time.")
@click.option("--write", metavar="FILE", help="Write the workload, one JSON object a line, and measure nothing.")
@click.option("--read", metavar="FILE", help="Take the workload from such a file.")
@click.option("--concurrency", default=0, type=click.IntRange(0, 256), help="Requests at once.  [2; simulated: 2 each]")
@click.option("--rounds", default=2, type=click.IntRange(1, 100), show_default=True, help="Of each routing, in turns.")
@click.option(
    "--hbm_tokens", default=0, type=click.IntRange(0), help="Of an engine's cache.  [all together: all sessions]"
)
@click.option("--node_tokens", type=click.IntRange(0), help="Of a simulated node; 0: no pool.  [4 x --hbm_tokens]")
@click.option("--model", default="medium", show_default=True, help="tiny or medium, made on the spot, or a folder.")
@click.option("--engine_python", default=sys.executable, metavar="PYTHON", help="The engines' interpreter; this one.")
@click.option("--engine_args", default="", metavar="TEXT", help="More arguments for vllm serve, in one text.")
@click.option("--proxy_args", default="", metavar="TEXT", help="More arguments for kvpool-proxy, in one text.")
@click.option("--connector_config", default="", metavar="JSON", help="More of our kv_connector_extra_config.")
@click.option("--block_size", default=32, type=click.IntRange(1, 4096), show_default=True, help="Tokens of a block.")
@click.option("--segment_size", default="", metavar="SIZE", help="Memory of each node; twice its engine's cache.")
@click.option("--timeout", default=300.0, type=FiniteRange(1), show_default=True, help="Seconds for a request.")
@click.option("--transfer", is_flag=True, help="How long a prompt's KV takes from a prefilling to a decoding engine.")
@click.option(
    "--systems", multiple=True, type=click.Choice(["kvpool", "nixl"]), help="What --transfer measures.  [both]"
)
@click.option(
    "--transfer_tokens", default=4096, type=click.IntRange(1, 1 << 20), show_default=True, help="Of a prompt."
)
@click.option("--prompts", default=3, type=click.IntRange(1, 1000), show_default=True, help="For --transfer.")
@json_option
@click.option("--plot", metavar="FILE", help="Draw hits and times here (PNG; needs matplotlib).")
def command(json_path: str | None, **options: Any) -> None:
    """Conversations through kvpool-proxy: routed by prefixes beside each engine in turn, hits and times in one table.

    \b
    Workloads (--workload):
      small      a few short conversations: for engines on a CPU
      chat       conversations under eight system prompts
      documents  questions about long documents
      mixed      conversations, every second one about a document
      shared     one question each, under one system prompt
      unique     one question each, nothing in common
    \b
    Examples:
      kvpool-bench pd --simulated --seed 1
      kvpool-bench pd --engine_python .venv-vllm/bin/python --instances 2 --plot pd.png
      kvpool-bench pd --prefill 1 --decode 1 --model tiny
      kvpool-bench pd --workload chat --seed 1 --write chat.jsonl
      kvpool-bench pd --transfer --systems kvpool --systems nixl
      kvpool-bench pd --read chat.jsonl --url http://10.0.0.1:8100 --url http://10.0.0.2:8100 --master 10.0.0.7:50088
    """
    report = PDReport()
    with one_command():
        try:
            _run(options, report)
        except (KeyboardInterrupt, KVPoolError):
            if report.figures:  # minutes of measuring went into them
                report.note("ENDED EARLY: this is not all that was asked for")
                report.show(json_path)
            raise
    if options["write"]:
        click.echo("\n".join(report.notes))
        return
    report.note("load average at the end: {:.1f}, {:.1f}, {:.1f}".format(*os.getloadavg()))
    report.show(json_path)
    if options["plot"]:
        draw(report.rows, options["plot"])
        click.echo(f"drawn: {options['plot']}")


if __name__ == "__main__":
    command()
