"""Throughput with a connector beside throughput without one, in pairs, on a machine that is never quiet.

A round sends the same prompts to every engine, one engine after the other, and begins with another engine each
time. Two engines have no connector: how far they are apart is what the machine's noise makes of nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import psutil

from kvpool.bench.harness import BenchError
from kvpool.bench.report import Figure, Report
from kvpool.bench.ttft_data import Prompts, Ratios, Shape, ratios
from kvpool.bench.ttft_http import Load, Prompt, Server

OFF, OFF_AGAIN = "none", "none again"
WINDOW_S = 5.0
"""After a fault, until throughput counts: what a connector may take to notice."""

WINDOW_ROUNDS = 4
PREFIX_GROUPS = 2


@dataclass(slots=True)
class Arm:
    """One engine and what its rounds came to."""

    name: str
    server: Server
    pids: tuple[int, ...] = ()
    """Its processes, the pool's included; their children count too."""
    tokens_per_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    requests: int = 0

    def take(self, load: Load, shape: Shape, cpu_s: float) -> None:
        """Count a round."""
        self.cpu_s.append(cpu_s)
        self.requests += len(load.answers)
        self.failed += [answer.error for answer in load.failed]
        answered = len(load.answers) - len(load.failed)
        tokens = answered * (shape.input_tokens + shape.output_tokens)
        self.tokens_per_s.append(max(tokens, 1) / load.wall_s)


def cpu_seconds(pids: Sequence[int]) -> float:
    """Return what these processes and their children have used of the CPUs; those that are gone count nothing."""
    total = 0.0
    for pid in pids:
        try:
            parent = psutil.Process(pid)
            family = [parent, *parent.children(recursive=True)]
        except psutil.Error:
            continue
        for process in family:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
    return total


class Pairs:
    """Rounds over some engines, the first of which has no connector."""

    def __init__(self, arms: Sequence[Arm], shape: Shape, report: Report, timeout_s: float) -> None:
        self.arms = list(arms)
        self._shape = shape
        self._report = report
        self._timeout_s = timeout_s

    def send(self, server: Server, prompts: Sequence[Prompt], output_tokens: int | None = None) -> Load:
        """Send prompts to one engine."""
        tokens = self._shape.output_tokens if output_tokens is None else output_tokens
        return server.run(prompts, tokens, self._shape.concurrency, self._timeout_s)

    def warm_up(self, prompts: Callable[[], list[list[int]]]) -> None:
        """Run a round that does not count. Raises BenchError where a healthy engine does not answer."""
        data = prompts()
        for arm in self.arms:
            self._report.step(f"warming up: {arm.name}")
            failed = self.send(arm.server, data).failed
            if failed:
                raise BenchError(f"the {arm.name} engine failed before anything was done to it: {failed[0].error}")

    def measure(self, rounds: Iterator[list[list[int]]]) -> None:
        """Run a round for each set of prompts; what an interrupt leaves are whole rounds."""
        for number, data in enumerate(rounds):
            first = number % len(self.arms)
            took: list[tuple[Arm, Load, float]] = []
            for arm in self.arms[first:] + self.arms[:first]:
                self._report.step(f"round {number + 1}: {arm.name}")
                before = cpu_seconds(arm.pids)
                load = self.send(arm.server, data)
                took.append((arm, load, cpu_seconds(arm.pids) - before))
            for arm, load, cpu_s in took:
                arm.take(load, self._shape, cpu_s)

    def against_off(self) -> dict[str, Ratios]:
        """Return each engine's throughput over that of the first, by its name."""
        off = self.arms[0]
        return {arm.name: ratios(arm.tokens_per_s, off.tokens_per_s) for arm in self.arms[1:]}

    def cpu_of_off(self, arm: Arm) -> float | None:
        """Return the middle of CPU time over that of the first engine; None where it is not known."""
        off = self.arms[0]
        if not (min(off.cpu_s, default=0.0) > 0 and min(arm.cpu_s, default=0.0) > 0):
            return None
        return ratios(arm.cpu_s, off.cpu_s).median

    def report(self, name: str) -> None:
        """Add the figures, if there was a round."""
        if not self.arms[0].tokens_per_s:
            return
        for arm_name, found in self.against_off().items():
            arm = next(arm for arm in self.arms if arm.name == arm_name)
            shape = self._shape
            detail = {
                "engine": arm_name,
                "input": shape.input_tokens,
                "output": shape.output_tokens,
                "concurrency": shape.concurrency,
                "pairs": found.count,
                "failed": len(arm.failed),
                "requests": arm.requests,
                "quartiles": [round(found.low, 4), round(found.high, 4)],
                "range": [round(found.least, 4), round(found.most, 4)],
                "sure": [round(found.sure_from, 4), round(found.sure_to, 4)],
                "cpu_over_off": self.cpu_of_off(arm),
                "tokens_per_s": [round(value, 1) for value in arm.tokens_per_s],
                "off_tokens_per_s": [round(value, 1) for value in self.arms[0].tokens_per_s],
            }
            self._report.add(Figure(name, found.median, "", "no_connector", found.median, detail, 1.0))
        for arm in self.arms:
            if arm.failed:
                self._report.note(
                    f"connector {arm.name}: {len(arm.failed)} of {arm.requests} requests failed: {arm.failed[0]}"
                )


def measure_misses(
    arms: Sequence[Arm], shape: Shape, prompts: Prompts, report: Report, rounds: int, limit_s: float
) -> None:
    """Measure throughput on prompts that nobody has seen: what saving costs."""
    pairs = Pairs(arms, shape, report, limit_s)
    pairs.warm_up(lambda: prompts.distinct(shape.prompts, shape.input_tokens))
    try:
        pairs.measure(prompts.distinct(shape.prompts, shape.input_tokens) for _ in range(rounds))
    finally:
        pairs.report("miss_throughput")


@dataclass(frozen=True, slots=True)
class Fault:
    """What is done to the pool, and how one waits for what was stored before."""

    name: str
    inject: Callable[[], None]
    wait_stored: Callable[[int], str]
    block_tokens: int


class FaultRun:
    """Measures throughput while the pool is broken: prefixes that it holds are asked for all the same."""

    def __init__(self, pairs: Pairs, shape: Shape, prompts: Prompts, report: Report, fault: Fault) -> None:
        """The pool's engine is the last of the pairs' arms."""
        self._pairs = pairs
        self._shape = shape
        self._prompts = prompts
        self._report = report
        self._fault = fault
        self._arm = pairs.arms[-1]

    def measure(self, rounds: int) -> None:
        """Store, break, wait, measure."""
        shape, pairs = self._shape, self._pairs
        length = max(1, shape.input_tokens // 2 // self._fault.block_tokens) * self._fault.block_tokens
        if length >= shape.input_tokens:
            raise BenchError(f"prompts must be longer than a block of {self._fault.block_tokens} tokens")
        sets = [self._prompts.distinct(PREFIX_GROUPS, length) for _ in range(rounds + WINDOW_ROUNDS)]
        pairs.warm_up(lambda: self._round(self._prompts.distinct(PREFIX_GROUPS, length)))
        self._report.step("storing the shared prefixes")
        self._store([prefix for each in sets for prefix in each])
        healthy = pairs.send(self._arm.server, self._round(sets.pop())).wall_s
        self._report.step(f"{self._fault.name}: the first {WINDOW_S:.0f} s")
        self._fault.inject()
        self._window(sets[rounds:], healthy)
        try:
            pairs.measure(self._round(each) for each in sets[:rounds])
        finally:
            pairs.report(f"throughput_{self._fault.name}")

    def _round(self, prefixes: list[list[int]]) -> list[list[int]]:
        return self._prompts.sharing(prefixes, self._shape.prompts, self._shape.input_tokens)

    def _store(self, prefixes: list[list[int]]) -> None:
        """Have the pool hold the prefixes, and the engine not."""
        server = self._arm.server
        self._fault.wait_stored(0)
        load = self._pairs.send(server, [[*prefix, *self._prompts.tokens(1)] for prefix in prefixes], 1)
        if load.failed:
            raise BenchError(f"storing the prefixes failed: {load.failed[0].error}")
        warning = self._fault.wait_stored(sum(len(prefix) // self._fault.block_tokens for prefix in prefixes))
        if warning:  # a save that timed out on a busy machine is dropped: the round that asks for it computes it
            self._report.note(f"WARNING: {warning}")
        deadline = time.monotonic() + WINDOW_S
        while not server.reset_prefix_cache():  # refused while blocks are still being saved
            if time.monotonic() > deadline:
                raise BenchError("the engine does not let go of its own prefix cache")
            time.sleep(0.1)

    def _window(self, sets: list[list[list[int]]], healthy_s: float) -> None:
        """Keep the engine busy until throughput counts; a round that has begun is ended."""
        end = time.monotonic() + WINDOW_S
        walls, failed, requests = [], 0, 0
        number = 0
        while time.monotonic() < end:
            load = self._pairs.send(self._arm.server, self._round(sets[number % len(sets)]))
            number += 1
            walls.append(load.wall_s)
            failed += len(load.failed)
            requests += len(load.answers)
            self._arm.failed += [answer.error for answer in load.failed]
            self._arm.requests += len(load.answers)
        self._report.note(
            f"{self._fault.name}: a round of {self._shape.prompts} took {healthy_s:.2f} s before, "
            f"{walls[0]:.2f} s at once after it, {walls[-1]:.2f} s at the end of the first {WINDOW_S:.0f} s; "
            f"{failed} of {requests} requests failed meanwhile"
        )
