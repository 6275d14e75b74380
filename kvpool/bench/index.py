"""The master's index under load: commits through nodes' sessions, lookups meanwhile, memory by the block."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import psutil
from numpy.typing import NDArray

from kvpool.bench.harness import BenchError, Helper
from kvpool.bench.nodes import SPACE, Add, Join, Leave, simulated_nodes
from kvpool.bench.pool import BenchPool, bench_pool, connected
from kvpool.bench.report import Figure, Report
from kvpool.model import KEY_BYTES

PROBE_BLOCKS = 1024
PROBE_EVERY_S = 0.002
CLIENT_TTL = "1s"
PHASE_S = 90.0
FIRST_BLOCKS = 4096
MEMORY_STEPS = 16

Samples = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the index becomes, in blocks."""

    index_blocks: int = 1_000_000
    memory_first: int = 700_000
    memory_last: int = 1_500_000
    commit_rate: int = 0  # blocks a second that nodes report while the index grows; 0: all they can


def prober(conn: Connection, master: str, keys: bytes) -> None:
    """Look up a prompt every now and then, between "start" and "stop": a helper.

    Each lookup takes a lease, and releases it outside of the timed part. "stop" is answered by an array of
    (begin, seconds, 1 if not all was found).
    """
    with connected(master, SPACE, name="prober") as client:
        conn.send(None)
        while True:
            conn.recv()
            samples = []
            while not conn.poll(0):
                begin = time.monotonic()
                found = client.lookup(SPACE.digest, keys, lease=True)
                seconds = time.monotonic() - begin
                client.release([found.lease])
                samples.append((begin, seconds, float(found.prefix != len(keys) // KEY_BYTES)))
                time.sleep(max(0.0, PROBE_EVERY_S - seconds))
            conn.recv()
            conn.send(np.array(samples).reshape(-1, 3))


class CommitBench:
    """Phases of one private master's life, with a prober all the time."""

    def __init__(self, pool: BenchPool, nodes: Helper, probe: Helper, report: Report) -> None:
        self._pool = pool
        self._nodes = nodes
        self._probe = probe
        self._report = report

    def run(self, blocks: int, rate: int) -> None:
        """Grow the index by two nodes' deltas, take in a third one's inventory, lose that one."""
        self._phase("growth", blocks, lambda: self._nodes.ask(Add(("a", "b"), blocks, rate), PHASE_S))
        self._phase("inventory", blocks, lambda: self._nodes.ask(Join("c", blocks), PHASE_S)[:2])
        self._phase("sweep", blocks, lambda: self._sweep(blocks))

    def _phase(self, phase: str, blocks: int, work: Callable[[], tuple[float, float]]) -> None:
        self._report.step(f"index_commit, {phase}")
        self._probe.send("start")
        start, end = work()
        samples: Samples = self._probe.ask("stop", PHASE_S)
        inside = samples[(samples[:, 0] + samples[:, 1] >= start) & (samples[:, 0] <= end)]
        if not len(inside):
            raise BenchError(f"no lookup fell into the phase {phase}")
        latency_ms = inside[:, 1] * 1e3
        p50, p99 = np.percentile(latency_ms, (50, 99))
        detail = {
            "phase": phase,
            "blocks": blocks,
            "lookup_p50_ms": round(float(p50), 3),
            "lookup_p99_ms": round(float(p99), 3),
            "lookup_max_ms": round(float(latency_ms.max()), 3),
            "lookups": len(inside),
            "misses": int(inside[:, 2].sum()),
        }
        self._report.add(Figure("index_commit", blocks / (end - start), "blocks/s", detail=detail))

    def _sweep(self, blocks: int) -> tuple[float, float]:
        """Cut a node off; returns when it was last seen in the index and when the last of its blocks was gone."""
        rest = self._pool.status().blocks - blocks
        self._nodes.ask(Leave("c"), PHASE_S)
        deadline = time.monotonic() + PHASE_S
        start = time.monotonic()
        while self._pool.node_state("c") != "dead":
            start = time.monotonic()
            _pause(deadline, "a node that left is not dead")
        while self._pool.status().blocks > rest:
            _pause(deadline, "a dead node's blocks are not gone")
        return start, time.monotonic()


def _pause(deadline: float, problem: str) -> None:
    if time.monotonic() > deadline:
        raise BenchError(problem)
    time.sleep(0.01)


def measure_commits(sizes: Sizes, report: Report) -> None:
    """Measure index_commit with a master of its own."""
    with (
        bench_pool(None, nodes=0, master_flags=["--client_ttl", CLIENT_TTL]) as pool,
        Helper(simulated_nodes, pool.master) as nodes,
    ):
        keys = nodes.ask(Join("a", FIRST_BLOCKS), PHASE_S)[2]
        nodes.ask(Join("b", FIRST_BLOCKS), PHASE_S)
        with Helper(prober, pool.master, keys[: PROBE_BLOCKS * KEY_BYTES]) as probe:
            CommitBench(pool, nodes, probe, report).run(sizes.index_blocks, sizes.commit_rate)


def measure_memory(sizes: Sizes, report: Report) -> None:
    """Measure master_memory with a master of its own: what its resident set grows by, at several sizes."""
    report.step("master_memory")
    with bench_pool(None, nodes=0) as pool, Helper(simulated_nodes, pool.master) as nodes:
        for node_id in ("a", "b"):
            nodes.ask(Join(node_id, 0), PHASE_S)
        process = psutil.Process(pool.master_pid)
        base = process.memory_info().rss
        blocks, seen = 0, {}
        for wanted in np.linspace(sizes.memory_first, sizes.memory_last, MEMORY_STEPS + 1, dtype=int).tolist():
            nodes.ask(Add(("a", "b"), wanted - blocks), PHASE_S)
            blocks = wanted
            if pool.status().blocks != blocks:
                raise BenchError(f"the index has {pool.status().blocks} blocks, not {blocks}")
            seen[blocks] = (process.memory_info().rss - base) / blocks
        worst = max(seen, key=lambda size: seen[size])
        detail = {"blocks": worst, "least": round(min(seen.values()), 1), "nodes": 2}
        report.add(Figure("master_memory", seen[worst], "B/block", detail=detail))
