"""``kvpool-bench lookup``: how long a lookup takes, how many a second, what the index bears and weighs.

Lookups are of prompts that are fully present, hashes packed, with a lease that is released outside of
the timed part. A latency is a median of calls that alternate with calls of its limit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from multiprocessing.connection import Connection

import click
import grpc
import numpy as np

from kvpool.bench.harness import BenchError, FiniteRange, Helper, helpers, one_command
from kvpool.bench.index import Sizes, measure_commits, measure_memory
from kvpool.bench.limits import PingPong, ping_peer
from kvpool.bench.pool import TIMEOUT_MS, BenchPool, bench_pool, connected, details_of, leaving_nothing
from kvpool.bench.report import Figure, Report, json_option
from kvpool.client import Client
from kvpool.model import KEY_BYTES, Namespace
from kvpool.rpc.v1 import master_pb2, master_pb2_grpc

SPACE = Namespace(model="kvpool-bench-lookup")
STORED_BYTES = 512  # of each block: only its key matters here
BLOCKS = (64, 1024)
MISSING = 500
WARM_UP = 50
TURN = 20
"""Calls of one kind in a row before it is the other's turn."""

KNOWN_S = 20.0
LEASES = 64
"""Leases that one release ends, in the rate's measurement."""


def _store(client: Client, blocks: int) -> bytes:
    """Store a prompt of tiny blocks and wait until lookups find all of it. Raises BenchError."""
    keys = os.urandom(KEY_BYTES * blocks)
    result = client.put(SPACE, keys, list(np.zeros((blocks, STORED_BYTES), np.uint8)), timeout_ms=TIMEOUT_MS)
    if result.failed:
        raise BenchError(f"storing {blocks} tiny blocks failed: {result.errors}")
    deadline = time.monotonic() + KNOWN_S
    while client.lookup(SPACE, keys).prefix < blocks:
        if time.monotonic() > deadline:
            raise BenchError("what was put does not show in lookups")
        time.sleep(0.01)
    return keys


class Latency:
    """Takes turns between ours and the limit, and makes a figure of both."""

    def __init__(self, report: Report, rounds: int) -> None:
        self._report = report
        self._rounds = rounds

    def measure(
        self, name: str, ours: Callable[[], float], limit: tuple[str, Callable[[], float]], detail: dict[str, int]
    ) -> None:
        """Call both many times; each returns its own seconds."""
        for _ in range(WARM_UP):
            ours()
            limit[1]()
        seen: list[float] = []
        bare: list[float] = []
        for _ in range(-(-self._rounds // TURN)):
            bare.extend(limit[1]() for _ in range(TURN))
            seen.extend(ours() for _ in range(TURN))
        p50, p99 = np.percentile(np.array(seen) * 1e6, (50, 99))
        base = float(np.median(bare)) * 1e6
        more = {"p99": round(float(p99), 1), "calls": len(seen)}
        self._report.add(
            Figure(name, float(p50), "us", limit[0], float(p50) / base, {**detail, **more}, limit_value=base)
        )


def _lookup_seconds(client: Client, keys: bytes, prefix: int) -> Callable[[], float]:
    def call() -> float:
        start = time.perf_counter()
        found = client.lookup(SPACE, keys, lease=True)
        seconds = time.perf_counter() - start
        client.release([found.lease])
        if found.prefix != prefix:
            raise BenchError(f"a lookup found {found.prefix} blocks instead of {prefix}: {found.reason}")
        return seconds

    return call


def _measure_frames(pool: BenchPool, prompts: dict[int, bytes], latency: Latency, report: Report) -> None:
    with (
        connected(pool.master, SPACE, name="lookup") as client,
        Helper(ping_peer) as peer,
        closing(PingPong(peer.ready)) as ping,
    ):
        limit = ("tcp_pingpong", ping)
        for blocks, keys in prompts.items():
            report.step(f"lookup, {blocks} blocks")
            latency.measure("lookup", _lookup_seconds(client, keys, blocks), limit, {"blocks": blocks})
        blocks, keys = max(prompts.items())
        at = min(MISSING, blocks // 2)
        report.step(f"lookup, block {at} missing")
        gap = keys[: at * KEY_BYTES] + os.urandom(KEY_BYTES) + keys[(at + 1) * KEY_BYTES :]
        detail = {"blocks": blocks, "missing": at}
        latency.measure("lookup", _lookup_seconds(client, gap, at), limit, detail)


def _measure_grpc(pool: BenchPool, keys: bytes, latency: Latency, report: Report) -> None:
    stub = master_pb2_grpc.MasterStub(pool.channel)
    request = master_pb2.LookupRequest(namespace=SPACE.digest, hashes=keys, lease=True)
    nothing = master_pb2.LeaseRequest()
    blocks = len(keys) // KEY_BYTES

    def look_up() -> float:
        start = time.perf_counter()
        found = stub.Lookup(request, timeout=TIMEOUT_MS / 1000)
        seconds = time.perf_counter() - start
        stub.ReleaseLeases(master_pb2.LeaseRequest(leases=[found.lease]), timeout=TIMEOUT_MS / 1000)
        if found.prefix != blocks:
            raise BenchError(f"a lookup over gRPC found {found.prefix} blocks instead of {blocks}")
        return seconds

    def empty() -> float:
        start = time.perf_counter()
        stub.RenewLeases(nothing, timeout=TIMEOUT_MS / 1000)
        return time.perf_counter() - start

    report.step("lookup_grpc")
    try:
        latency.measure("lookup_grpc", look_up, ("grpc_empty_unary", empty), {"blocks": blocks})
    except grpc.RpcError as error:
        raise BenchError(f"gRPC: {details_of(error)}") from None


def _asker(conn: Connection, master: str, keys: bytes) -> None:
    """Look up for as many seconds as asked: a helper."""
    with connected(master, SPACE, name="asker") as client:
        blocks = len(keys) // KEY_BYTES
        conn.send(None)
        while True:
            seconds = conn.recv()
            count, leases = 0, []
            start = time.monotonic()
            while time.monotonic() - start < seconds:
                found = client.lookup(SPACE, keys, lease=True)
                if found.prefix != blocks:
                    raise BenchError(f"a lookup found {found.prefix} blocks instead of {blocks}: {found.reason}")
                count += 1
                leases.append(found.lease)
                if len(leases) == LEASES:
                    client.release(leases)
                    leases = []
            client.release(leases)
            conn.send((count, start, time.monotonic()))


def _measure_rate(pool: BenchPool, prompts: Sequence[bytes], seconds: float, report: Report) -> None:
    report.step("lookup_rate")
    with helpers(_asker, [(pool.master, keys) for keys in prompts]) as askers:
        for warm in (min(0.2, seconds), seconds):
            for asker in askers:
                asker.send(warm)
            answers = [asker.receive(seconds + KNOWN_S) for asker in askers]
    lookups = sum(count for count, _, _ in answers)
    wall = max(end for _, _, end in answers) - min(start for _, start, _ in answers)
    detail = {"blocks": len(prompts[0]) // KEY_BYTES, "clients": len(askers)}
    report.add(Figure("lookup_rate", lookups / wall, "1/s", detail=detail))


@click.command("lookup")
@click.option("--master", metavar="HOST:PORT", help="Measure this master; the index's figures need one of their own.")
@click.option(
    "--rounds", type=click.IntRange(1, 1_000_000), default=3000, show_default=True, help="Calls of each kind."
)
@click.option("--clients", type=click.IntRange(1, 64), default=3, show_default=True, help="Processes for the rate.")
@click.option("--rate_seconds", type=FiniteRange(0.1, 600), default=4.0, show_default=True, help="... for so long.")
@click.option(
    "--index_blocks", type=click.IntRange(10_000, 10_000_000), default=1_000_000, show_default=True,
    help="Blocks of the index under load; its memory is measured at 0.7 to 1.5 times as many.",
)  # fmt: skip
@click.option(
    "--commit_rate", type=click.IntRange(0), default=0,
    help="Blocks a second that nodes report while the index grows; without it as fast as the master takes them.",
)  # fmt: skip
@json_option
def command(
    master: str | None,
    rounds: int,
    clients: int,
    rate_seconds: float,
    index_blocks: int,
    commit_rate: int,
    json_path: str | None,
) -> None:
    """Lookups and the index: latency, rate, commits meanwhile, memory.

    \b
    Examples:
      kvpool-bench lookup
      kvpool-bench lookup --master 10.0.0.7:50088 --json lookup.json
    """
    report = Report("lookup")
    latency = Latency(report, rounds)
    with one_command(), report.running(5 if master else 9):
        with bench_pool(master) as pool, leaving_nothing(pool, SPACE):
            with connected(pool.master, SPACE, name="lookup") as client:
                prompts = {blocks: _store(client, blocks) for blocks in BLOCKS}
                others = [_store(client, max(BLOCKS)) for _ in range(clients)]
            _measure_frames(pool, prompts, latency, report)
            _measure_grpc(pool, prompts[max(BLOCKS)], latency, report)
            _measure_rate(pool, others, rate_seconds, report)
        if master is None:
            sizes = Sizes(index_blocks, int(0.7 * index_blocks), int(1.5 * index_blocks), commit_rate)
            measure_commits(sizes, report)
            measure_memory(sizes, report)
        else:
            report.note("index_commit and master_memory fill a master: they are measured without --master only")
    report.show(json_path)
