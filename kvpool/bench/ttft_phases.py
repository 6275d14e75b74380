"""The benchmark proper: data set A cold, from the engine's own cache, from another engine's node, from its own node.

Every phase sends the same prompts. Between the last two, data set B pushes A out of the engine's own cache.
What an engine tells of its hits is read before and after each phase, so that no figure stands for a hit that
did not happen.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from kvpool.bench.harness import BenchError
from kvpool.bench.report import Report
from kvpool.bench.ttft_data import Prompts, Shape, percentile
from kvpool.bench.ttft_http import Load, Metrics, Prompt, Server

COLD, HBM, LOCAL, OTHER = "cold", "hbm_hit", "local_hit", "other_node_hit"
PHASES = (COLD, HBM, LOCAL, OTHER)
LABELS = {
    COLD: "cold",
    HBM: "HBM hit",
    LOCAL: "pool, own node",
    OTHER: "pool, other node",
}

SHARE_MIN = 0.95
"""Below this share of hits a figure comes with a warning."""

BLOCK_TOKENS_UNKNOWN = 16

WAKE_TOKENS = 256
"""Of the prompts that wake an engine which has stood idle: enough to go through all of its weights."""


@dataclass(frozen=True, slots=True)
class System:
    """What is measured: two engines on one pool, or what there is of that."""

    name: str
    first: Server
    second: Server | None = None
    wait_stored: Callable[[int], str] = lambda _blocks: ""
    """Waits until so many more blocks are stored than at the last call, for 0 until no more are; returns a warning."""
    evict: str = "dataset"
    """How A leaves the engine's own cache: dataset (by B) or reset (by a request)."""
    evict_prompts: int = 0
    """Prompts of B; 0 asks the engine how much it holds."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One phase of one system: a time to first token in ms for each prompt, and how much of it was a hit."""

    system: str
    shape: Shape
    phase: str
    ttft_ms: list[float]
    wall_s: float
    hit_share: float | None = None
    """Of the tokens that could be; None where the server does not tell."""
    same_text: int | None = None
    """Answers equal to those of the HBM hits."""

    @property
    def median_ms(self) -> float:
        """The middle time."""
        return statistics.median(self.ttft_ms)

    @property
    def p90_ms(self) -> float:
        """Nine in ten were not slower."""
        return percentile(self.ttft_ms, 0.9)


@dataclass(slots=True)
class _Run:
    """One system under one shape."""

    system: System
    shape: Shape
    prompts: list[list[int]]
    timings: dict[str, Timing] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)


class Phases:
    """Runs all phases for some systems side by side, phase by phase."""

    def __init__(self, systems: Sequence[System], prompts: Prompts, report: Report, timeout_s: float) -> None:
        self._systems = systems
        self._prompts = prompts
        self._report = report
        self._timeout_s = timeout_s

    def steps(self, shapes: int) -> int:
        """Return how many steps are shown for so many shapes."""
        return len(self._systems) * (1 + len(PHASES)) * shapes

    def measure(self, shape: Shape) -> list[Timing]:
        """Return the timings of one shape. Raises BenchError when a request failed."""
        data = self._prompts.distinct(shape.prompts, shape.input_tokens)
        runs = [_Run(system, shape, data) for system in self._systems]
        for run in runs:
            self._step(run, "warming up")
            self._warm_up(run)
        for phase, label in LABELS.items():
            for run in runs:
                self._step(run, label)
                self._phase(run, phase)
        return [timing for run in runs for timing in self._in_order(run)]

    def _in_order(self, run: _Run) -> Iterator[Timing]:
        return (run.timings[phase] for phase in PHASES if phase in run.timings)

    def _step(self, run: _Run, text: str) -> None:
        shape = run.shape
        self._report.step(f"{run.system.name}, {shape.input_tokens}/{shape.output_tokens} x{shape.concurrency}: {text}")

    def _warm_up(self, run: _Run) -> None:
        """Let every path be gone once: first steps, connections, the way between the nodes."""
        data = self._prompts.distinct(run.shape.concurrency, run.shape.input_tokens)
        self._send(run, run.system.first, data)
        self._stored(run, len(data))
        for server in (run.system.first, run.system.second):
            if server is not None:
                self._send(run, server, data)
        self._stored(run, 0)

    def _wake(self, run: _Run, server: Server) -> None:
        """Have an engine that stood idle for minutes compute something: what it lost meanwhile is not the pool's."""
        tokens = min(run.shape.input_tokens, WAKE_TOKENS)
        self._send(run, server, self._prompts.distinct(run.shape.concurrency, tokens))

    def _phase(self, run: _Run, phase: str) -> None:
        system = run.system
        server = system.second if phase == OTHER else system.first
        if server is None or (phase == LOCAL and not self._evict(run)):
            return
        if phase == OTHER:
            self._wake(run, server)
        before = server.metrics()
        load = self._send(run, server, run.prompts)
        share = hit_share(phase, run.shape, load, before, server.metrics())
        texts = run.texts[phase] = [answer.text for answer in load.answers]
        same = sum(map(str.__eq__, texts, run.texts[HBM])) if phase in {LOCAL, OTHER} else None
        times = [answer.ttft_s * 1000 for answer in load.answers]
        timing = Timing(system.name, run.shape, phase, times, load.wall_s, share, same)
        run.timings[phase] = timing
        self._judge(timing)
        if phase == COLD:
            self._stored(run, len(run.prompts))

    def _judge(self, timing: Timing) -> None:
        share = timing.hit_share
        if share is None:
            return
        if timing.phase == COLD and share > 0:
            raise BenchError(f"{timing.system}: {share:.0%} of new random prompts was found somewhere")
        if timing.phase != COLD and share < SHARE_MIN:
            self._report.note(
                f"WARNING: {timing.system}, {timing.phase}, concurrency {timing.shape.concurrency}: only {share:.0%} "
                "of the tokens were hits; the time is that of a mixture"
            )

    def _send(self, run: _Run, server: Server, prompts: Sequence[Prompt], output_tokens: int | None = None) -> Load:
        shape = run.shape
        tokens = shape.output_tokens if output_tokens is None else output_tokens
        load = server.run(prompts, tokens, shape.concurrency, self._timeout_s)
        if load.failed:
            raise BenchError(
                f"{run.system.name}: {len(load.failed)} of {len(prompts)} requests to {server.url} failed: "
                f"{load.failed[0].error}"
            )
        return load

    def _stored(self, run: _Run, prompts: int) -> None:
        block = run.system.first.metrics().block_tokens or BLOCK_TOKENS_UNKNOWN
        warning = run.system.wait_stored(prompts * (run.shape.input_tokens // block))
        if warning:
            self._report.note(f"WARNING: {run.system.name}: {warning}")

    def _evict(self, run: _Run) -> bool:
        """Push A out of the first engine's own cache; False, with a note, where that cannot be done."""
        system = run.system
        if system.evict == "reset":
            if system.first.reset_prefix_cache():
                return True
            self._report.note(
                f"{system.name}: no local hit was measured: the server at {system.first.url} does not reset its "
                "prefix cache (vLLM does with VLLM_SERVER_DEV_MODE=1)"
            )
            return False
        capacity = system.first.metrics().capacity_tokens
        count = system.evict_prompts or (0 if capacity is None else run.shape.evicting_prompts(capacity))
        if not count:
            self._report.note(
                f"{system.name}: no local hit was measured: the server at {system.first.url} does not tell how much "
                "its own cache holds; say with --evict_prompts how many prompts fill it"
            )
            return False
        # One token each: only their prompts count.
        self._send(run, system.first, self._prompts.distinct(count, run.shape.input_tokens), 1)
        self._stored(run, 0)  # a connector may well drop some of them: nobody will ask
        return True


def hit_share(phase: str, shape: Shape, load: Load, before: Metrics, after: Metrics) -> float | None:
    """Return which share of the tokens that can be a hit were one, of the phase's own kind, at most 1.

    An engine computes at least a prompt's last token, and so its last block when that comes from its own cache.
    """
    own = None if before.own_hits is None or after.own_hits is None else after.own_hits - before.own_hits
    pool = 0.0
    if before.external_hits is not None and after.external_hits is not None:
        pool = after.external_hits - before.external_hits
    if own is None:  # no such page: the answers may say, of all kinds together
        cached = [answer.cached_tokens for answer in load.answers]
        if None in cached:
            return None
        own = pool = float(sum(filter(None, cached)))
        hits = own
    else:
        hits = {COLD: own + pool, HBM: own}.get(phase, pool)
    block = after.block_tokens or BLOCK_TOKENS_UNKNOWN
    possible = len(load.answers) * ((shape.input_tokens - 1) // block * block)
    return min(1.0, hits / possible) if possible else 0.0
