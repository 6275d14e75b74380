"""``kvpool-bench store``: put and get through shared memory and over TCP, beside what the machine can do.

The client is another process than the node. Every buffer, and every page of the segment, is touched
before anything is timed. A figure is the median of rounds that alternate with rounds of its limit, which
copies the same blocks in batches of the same size between equally cold memory. Gets are given the answer
of an earlier lookup, as an engine's worker is.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

import click
import numpy as np

from kvpool.bench.harness import BenchError, Helper, helpers, interleaved, layers_of, one_command
from kvpool.bench.limits import Bytes, MemoryCopy, RawSocket, Walk, raw_peer
from kvpool.bench.pool import NO_NODE, BenchPool, bench_pool, connected, leaving_nothing, slot_bytes
from kvpool.bench.report import Figure, Report, json_option
from kvpool.client import Client, Lookup
from kvpool.errors import InvalidArgumentError
from kvpool.model import KEY_BYTES, Namespace, parse_size

SEGMENT_BYTES = 512 << 20
ROUND_BYTES = 64 << 20
"""A round moves about this much, so that a timer's error does not show."""

FILLED = 0.5
"""Share of the segment that gets are spread over."""

BATCHES_MIN = 3
"""One that is written, and two that gets go round."""

FIGURE_S = 4.0
BUSY_S = 8.0
READ_S = 20.0
STEPS_PER_SIZE = 9


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for, for one size of block."""

    block_bytes: int
    blocks: int
    rounds: int
    segment_size: int
    checksums: tuple[str, ...]
    readers: int

    @property
    def batch_bytes(self) -> int:
        """Bytes of one call."""
        return self.block_bytes * self.blocks

    @property
    def batches(self) -> int:
        """Calls of one round."""
        return max(1, ROUND_BYTES // self.batch_bytes)

    @property
    def segment_batches(self) -> int:
        """Calls that fill the segment."""
        return self.segment_size // (slot_bytes(self.block_bytes, self.namespace.layers) * self.blocks)

    @property
    def namespace(self) -> Namespace:
        """A namespace whose blocks have so many bytes."""
        return Namespace(model=f"kvpool-bench-store-{self.block_bytes}", layers=layers_of(self.block_bytes))

    def check(self, field: str = "segment_size") -> None:
        """Raise InvalidArgumentError for what cannot be measured; ``field``: what to change."""
        if self.segment_batches < BATCHES_MIN:
            raise InvalidArgumentError(
                field,
                f"{BATCHES_MIN} batches of {self.blocks} blocks of {self.block_bytes} bytes must fit "
                f"{self.segment_size} bytes of memory, headers included",
            )


class Mover:
    """One client with its buffers: puts fresh blocks, gets those that it was told of."""

    def __init__(self, client: Client, plan: Plan) -> None:
        self.client = client
        self._plan = plan
        self._space = plan.namespace
        rng = np.random.default_rng(plan.block_bytes)
        source = rng.integers(0, 256, (plan.blocks, plan.block_bytes), np.uint8)
        self.sources: list[Bytes] = list(source)
        self.targets: list[Bytes] = list(np.ones_like(source))
        self._stored: Iterator[tuple[bytes, Lookup]] = iter(())

    def put(self, batches: int) -> float:
        """Store batches of new blocks; returns seconds. Raises BenchError."""
        fresh = [os.urandom(KEY_BYTES * self._plan.blocks) for _ in range(batches)]
        start = time.perf_counter()
        results = [self.client.put(self._space, keys, self.sources) for keys in fresh]
        seconds = time.perf_counter() - start
        for result in results:
            if result.stored != self._plan.blocks:
                raise BenchError(f"a put stored {result.stored} of {self._plan.blocks} blocks: {result.errors}")
        return seconds

    def fill(self) -> None:
        """Walk through the whole segment once: every page is then in our page table too."""
        self.put(self._plan.segment_batches + 1)

    def store(self) -> list[bytes]:
        """Store what gets are spread over and return its keys, batch by batch."""
        batches = max(BATCHES_MIN - 1, int(FILLED * self._plan.segment_batches))
        keys = [os.urandom(KEY_BYTES * self._plan.blocks) for _ in range(batches)]
        for each in keys:
            result = self.client.put(self._space, each, self.sources)
            if result.stored != self._plan.blocks:
                raise BenchError(f"a put stored {result.stored} of {self._plan.blocks} blocks: {result.errors}")
        return keys

    def read_from(self, keys: Sequence[bytes]) -> None:
        """Make gets go round these batches; the first time round is not timed, and its bytes are compared.

        Raises BenchError, also when the blocks have not become known before the deadline.
        """
        deadline = time.monotonic() + READ_S
        while self._look_up(keys[-1]).prefix < self._plan.blocks:
            if time.monotonic() > deadline:
                raise BenchError("what was put does not show in lookups")
            time.sleep(0.01)
        self._stored = itertools.cycle([(each, self._look_up(each)) for each in keys])
        for _ in keys:
            for target in self.targets:
                target[:64] = 0
            self.get(1)
            if not all(np.array_equal(a, b) for a, b in zip(self.sources, self.targets, strict=True)):
                raise BenchError("a get returned bytes that were not stored")

    def _look_up(self, keys: bytes) -> Lookup:
        return self.client.lookup(self._space, keys)

    def get(self, batches: int) -> float:
        """Get batches; returns seconds. Raises BenchError."""
        wanted = [next(self._stored) for _ in range(batches)]
        start = time.perf_counter()
        results = [self.client.get(self._space, keys, self.targets, lookup=found) for keys, found in wanted]
        seconds = time.perf_counter() - start
        for result in results:
            if result.prefix != self._plan.blocks:
                raise BenchError(f"a get returned {result.prefix} of {self._plan.blocks} blocks: {result.reasons}")
        return seconds


@contextmanager
def _mover(pool: BenchPool, plan: Plan, node: str, checksum: str = "always") -> Iterator[Mover]:
    with connected(pool.master, plan.namespace, node=node, checksum=checksum, name="store") as client:
        yield Mover(client, plan)


@contextmanager
def _spinning() -> Iterator[None]:
    """Keep a thread of this process busy in Python."""
    stop: list[bool] = []

    def spin() -> None:
        x = 0
        while not stop:
            x += 1

    thread = threading.Thread(target=spin, name="spinner", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.append(True)
        thread.join(5.0)


class StoreBench:
    """Measures one size of block in one pool."""

    def __init__(self, pool: BenchPool, plan: Plan, report: Report, memory: MemoryCopy, raw: RawSocket) -> None:
        self._pool = pool
        self._plan = plan
        self._report = report
        self._memory = memory
        self._raw = raw

    def run(self) -> None:
        """Measure everything."""
        plan, report = self._plan, self._report
        socket_path = next(iter(self._pool.sockets), "")
        if not socket_path:
            report.note("no node of this pool runs on this host: local figures are left out")
        for checksum in plan.checksums if socket_path else ():
            with _mover(self._pool, plan, socket_path, checksum) as mover:
                self._local(mover, checksum)
        with _mover(self._pool, plan, NO_NODE) as mover:
            self._remote(mover)
            report.step(f"{plan.readers} readers")
            self._pool.settle()
            self._readers(mover.store())

    def _figure(self, name: str, limit: str, seconds: Sequence[float], batches: int, **detail: str | bool) -> None:
        """Add a figure from the medians of (limit, ours)."""
        size = self._plan.batch_bytes * batches
        self._report.add(
            Figure(
                name,
                size / seconds[1] / 1e9,
                "GB/s",
                limit,
                seconds[0] / seconds[1],
                {
                    "block_bytes": self._plan.block_bytes,
                    "blocks": self._plan.blocks,
                    **detail,
                },
                size / seconds[0] / 1e9,
            )
        )

    def _both(self, limit: Callable[[], float], ours: Callable[[], float]) -> list[float]:
        return interleaved([limit, ours], self._plan.rounds, FIGURE_S)

    def _local(self, mover: Mover, checksum: str) -> None:
        plan, batches, report = self._plan, self._plan.batches, self._report
        report.step(f"local_put, checksum {checksum}")
        mover.fill()
        seconds = self._both(
            lambda: self._memory.put(mover.sources, batches),
            lambda: mover.put(batches),
        )
        self._figure("local_put", "memory_copy", seconds, batches, checksum=checksum)
        report.step(f"local_get, checksum {checksum}")
        self._pool.settle()
        mover.read_from(mover.store())
        seconds = self._both(
            lambda: self._memory.get(mover.targets, batches),
            lambda: mover.get(batches),
        )
        self._figure("local_get", "memory_copy", seconds, batches, checksum=checksum)
        if checksum == "always":
            report.step("local_get beside a busy thread")
            few = max(1, batches // 8)

            def busy() -> float:
                with _spinning():
                    return mover.get(few)

            seconds = interleaved([lambda: mover.get(few), busy], plan.rounds, BUSY_S)
            self._figure("local_get", "idle", seconds, few, checksum=checksum, busy=True)

    def _remote(self, mover: Mover) -> None:
        batches, report = self._plan.batches, self._report
        report.step("remote_put")
        mover.fill()
        seconds = self._both(lambda: self._raw.put(mover.sources, batches), lambda: mover.put(batches))
        self._figure("remote_put", "raw_socket", seconds, batches)
        report.step("remote_get")
        self._pool.settle()
        mover.read_from(mover.store())
        seconds = self._both(lambda: self._raw.get(mover.targets, batches), lambda: mover.get(batches))
        self._figure("remote_get", "raw_socket", seconds, batches)

    def _readers(self, keys: list[bytes]) -> None:
        plan = self._plan
        with helpers(_reader, [(self._pool.master, plan, keys[i:] + keys[:i]) for i in range(plan.readers)]) as all_:

            def read(some: list[Helper]) -> float:
                for helper in some:
                    helper.send(plan.batches)
                times: list[tuple[float, float]] = [helper.receive(READ_S) for helper in some]
                return (max(end for _, end in times) - min(start for start, _ in times)) / len(some)

            seconds = interleaved([lambda: read(all_[:1]), lambda: read(all_)], plan.rounds, FIGURE_S)
        size = plan.batch_bytes * plan.batches
        detail = {"block_bytes": plan.block_bytes, "blocks": plan.blocks, "readers": plan.readers}
        one, all_readers = (size / each / 1e9 for each in seconds)
        figure = Figure("remote_get", all_readers, "GB/s", "one_reader", all_readers / one, detail, one)
        self._report.add(figure)


def _reader(conn: Connection, master: str, plan: Plan, keys: list[bytes]) -> None:
    """Get as many batches as asked, over TCP: a helper."""
    with connected(master, plan.namespace, name="reader") as client:
        mover = Mover(client, plan)
        mover.read_from(keys)
        conn.send(None)
        while True:
            batches = conn.recv()
            start = time.monotonic()
            mover.get(batches)
            conn.send((start, time.monotonic()))


def size_of(master: str | None, wanted: int | None) -> int:
    """Return the memory to walk through: of a private node, or of each node of a pool that runs, if it has so much.

    Raises InvalidArgumentError, BenchError.
    """
    if master is None:
        return wanted or SEGMENT_BYTES
    with bench_pool(master) as pool:
        there = pool.smallest_node_bytes()
    if wanted is not None and wanted > there:
        raise InvalidArgumentError("segment_size", f"must be at most {there}, which a node has, not {wanted}")
    return wanted or min(SEGMENT_BYTES, there)


def measure(plan: Plan, master: str | None, report: Report) -> None:
    """Measure one size of block. Raises KVPoolError."""
    with bench_pool(master, segment_size=plan.segment_size) as pool, ExitStack() as stack:
        stack.enter_context(leaving_nothing(pool, plan.namespace))
        report.step("getting ready")
        walk = stack.enter_context(closing(Walk(plan.segment_size, plan.block_bytes)))
        peer = stack.enter_context(Helper(raw_peer, plan.segment_size, plan.block_bytes, plan.blocks))
        raw = stack.enter_context(closing(RawSocket(peer.ready)))
        StoreBench(pool, plan, report, MemoryCopy(walk), raw).run()


@click.command("store")
@click.option(
    "--master", metavar="HOST:PORT",
    help="Measure this pool instead of a private one. Blocks of others may be evicted; the benchmark's are at its end.",
)  # fmt: skip
@click.option(
    "--block_bytes", multiple=True, default=("2MB", "64KB"), show_default=True, help="Size of a block; may be repeated."
)
@click.option("--blocks", type=click.IntRange(1, 4096), default=32, show_default=True, help="Blocks in one call.")
@click.option("--rounds", type=click.IntRange(1, 1000), default=15, show_default=True, help="Rounds of each figure.")
@click.option(
    "--checksum",
    type=click.Choice(["always", "transfer"]),
    multiple=True,
    default=("always", "transfer"),
    show_default=True,
    help="When the local client verifies; may be repeated.",
)
@click.option(
    "--segment_size", metavar="SIZE",
    help="Memory of the private node; with --master how much of it is filled.  [512MB, or what a node has]",
)  # fmt: skip
@click.option("--readers", type=click.IntRange(1, 64), default=4, show_default=True, help="Readers at once.")
@json_option
def command(
    master: str | None,
    block_bytes: tuple[str, ...],
    blocks: int,
    rounds: int,
    checksum: tuple[str, ...],
    segment_size: str | None,
    readers: int,
    json_path: str | None,
) -> None:
    """Put and get, local and remote, beside a memory copy and a bare TCP copy.

    \b
    Examples:
      kvpool-bench store
      kvpool-bench store --block_bytes 1MB --blocks 64 --json store.json
    """
    report = Report("store")
    with one_command():
        wanted = None if segment_size is None else parse_size(segment_size, "segment_size")
        sizes = [parse_size(text, "block_bytes") for text in block_bytes]
        segment = size_of(master, wanted)
        checksums = tuple(dict.fromkeys(checksum))
        plans = [Plan(size, blocks, rounds, segment, checksums, readers) for size in sizes]
        for plan in plans:
            plan.check("segment_size" if master is None or wanted is not None else "block_bytes")
        with report.running(STEPS_PER_SIZE * len(plans)):
            for plan in plans:
                measure(plan, master, report)
    report.show(json_path)
