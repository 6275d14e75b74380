"""Blocks through a pool whose memory is much smaller than they are: written behind to files, and read back."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np

from kvpool.bench.fs_raw import Mode, forget_all, in_threads, read_files, write_files
from kvpool.bench.harness import BenchError, layers_of
from kvpool.bench.limits import Walk
from kvpool.bench.pool import ASK_S, BenchPool
from kvpool.client import Client
from kvpool.client_results import GetResult
from kvpool.model import KEY_BYTES, Namespace, split_keys
from kvpool.rpc.v1 import admin_pb2, admin_pb2_grpc
from kvpool.tiers.blockfile import extent_bytes
from kvpool.tiers.layout import BLOCKS
from kvpool.tiers.store import FileName

BATCH_BYTES = 32 << 20
AT_ONCE = 2
"""Gets under way together, as an engine's worker has them."""

CALL_MS = 20_000.0
SETTLE_S = 60.0
POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of a block, of all blocks of one round, and of the node's memory."""

    block_bytes: int
    data_bytes: int
    segment_bytes: int

    @property
    def batch(self) -> int:
        """Blocks in one call."""
        return max(1, min(BATCH_BYTES, self.segment_bytes // 8) // self.block_bytes)

    @property
    def batches(self) -> int:
        """Calls in a round."""
        return max(2, self.data_bytes // (self.batch * self.block_bytes))

    @property
    def blocks(self) -> int:
        """Blocks of a round."""
        return self.batches * self.batch

    @property
    def bytes(self) -> int:
        """Payload of a round."""
        return self.blocks * self.block_bytes

    @property
    def namespace(self) -> Namespace:
        """A namespace whose blocks have so many bytes."""
        return Namespace(model=f"kvpool-bench-fs-{self.block_bytes}", layers=layers_of(self.block_bytes))


def storage_flags(directory: Path, mode: Mode, capacity_bytes: int) -> list[str]:
    """Return a node's flags for a file tier in a directory."""
    return [
        "--pipeline", "Cache|Posix", "--storage_backends", str(directory), "--storage_capacity", str(capacity_bytes),
        "--storage_threads", str(mode.threads), "--storage_direct", "auto" if mode.direct else "off",
    ]  # fmt: skip


class FilePool:
    """One client of a pool with one node and one backend."""

    def __init__(self, pool: BenchPool, client: Client, sizes: Sizes, mode: Mode, directory: Path) -> None:
        self._pool = pool
        self._client = client
        self._sizes = sizes
        self._mode = mode
        self._directory = directory
        self._space = sizes.namespace
        self._reasons = ""
        rng = np.random.default_rng(sizes.block_bytes)
        file_bytes = extent_bytes(sizes.block_bytes, self._space.layers)
        self._walk = Walk(sizes.segment_bytes, file_bytes, header_bytes=0, unit=mmap.PAGESIZE)
        content = rng.integers(0, 256, file_bytes, np.uint8)  # does not compress
        for _ in range(self._walk.blocks):
            self._walk.next()[:] = content
        self._source = list(rng.integers(0, 256, (sizes.batch, sizes.block_bytes), np.uint8))
        self._targets = [[np.ones(sizes.block_bytes, np.uint8) for _ in self._source] for _ in range(AT_ONCE)]

    def close(self) -> None:
        """Give memory back."""
        self._walk.close()

    def catalogued(self) -> int:
        """Return how many blocks the master knows to be in files. Raises BenchError."""
        try:
            reply = admin_pb2_grpc.AdminStub(self._pool.channel).Backends(admin_pb2.BackendsRequest(), timeout=ASK_S)
        except grpc.RpcError as error:
            raise BenchError(f"the master does not answer: {error}") from None
        self._reasons = ", ".join(backend.reason for backend in reply.backends)
        return sum(int(backend.blocks) for backend in reply.backends)

    def fill(self) -> tuple[float, list[bytes]]:
        """Put a round's blocks until each is a file that the master has catalogued; returns seconds, and the keys.

        What waits to be written is kept to a quarter of the node's memory: later puts must not push it out unwritten.
        """
        keys = [os.urandom(KEY_BYTES * self._sizes.batch) for _ in range(self._sizes.batches)]
        ahead = max(self._sizes.batch, self._sizes.segment_bytes // 4 // self._sizes.block_bytes)
        before = self.catalogued()
        start = time.perf_counter()
        for number, each in enumerate(keys, start=1):
            result = self._client.put(self._space, each, self._source, timeout_ms=CALL_MS)
            if result.stored != self._sizes.batch:
                raise BenchError(f"a put stored {result.stored} of {self._sizes.batch} blocks: {result.errors}")
            self._await_files(before + number * self._sizes.batch - ahead)
        self._await_files(before + self._sizes.blocks)
        return time.perf_counter() - start, keys

    def _await_files(self, blocks: int) -> None:
        deadline = time.monotonic() + SETTLE_S
        while (there := self.catalogued()) < blocks:
            if time.monotonic() > deadline:
                raise BenchError(
                    f"{there} of {blocks} blocks have become files within {SETTLE_S:.0f} s {self._reasons}"
                )
            time.sleep(POLL_S)

    def make_directories(self) -> list[bytes]:
        """Fill once, and make the directories that are not there yet: a pool has them after some thousand blocks.

        Returns the keys of what was filled.
        """
        _, keys = self.fill()
        for path in self._paths([(16 * n).to_bytes(2, "big") + bytes(KEY_BYTES - 2) for n in range(4096)]):
            path.parent.mkdir(parents=True, exist_ok=True)
        return keys

    def write_raw(self) -> float:
        """Write a round's files without the pool, in its directories, and remove them; returns seconds."""
        keys = split_keys(os.urandom(KEY_BYTES * self._sizes.blocks))
        paths = [path.with_suffix(".raw") for path in self._paths(keys)]
        try:
            return write_files(paths, self._walk, self._mode)
        finally:
            for path in paths:
                path.unlink(missing_ok=True)

    def read_raw(self, keys: Sequence[bytes]) -> float:
        """Read the files of some blocks without the pool; returns seconds."""
        self.forget()
        return read_files(self._paths(split_keys(b"".join(keys))), self._walk, self._mode)

    def _paths(self, keys: Sequence[bytes]) -> list[Path]:
        return [self._directory / BLOCKS / str(FileName(self._space.digest, key, 0)) for key in keys]

    def forget(self) -> None:
        """Make files cold that are read through the page cache."""
        if not self._mode.direct:
            forget_all(self._directory)

    def read(self, keys: Sequence[bytes]) -> float:
        """Get blocks, about in the order in which they were put, from files; returns seconds. Raises BenchError.

        They are given the answer of an earlier lookup, as an engine's worker is.
        """
        self.forget()
        for target in (target for targets in self._targets for target in targets):
            target[:64] = 0
        rest = iter([(each, self._client.lookup(self._space, each)) for each in keys])  # advancing it is atomic

        def work(number: int) -> None:
            for each, found in rest:
                result = self._client.get(
                    self._space, each, self._targets[number], lookup=found, timeout_ms=CALL_MS
                )  # fmt: skip
                self._check(result, self._sizes.batch, "fs")

        seconds = in_threads(AT_ONCE, work)
        if not all(
            np.array_equal(a, b) for targets in self._targets for a, b in zip(self._source, targets, strict=True)
        ):
            raise BenchError("a get returned bytes that were not stored")
        return seconds

    def latencies(self, keys: Sequence[bytes], tier: str) -> list[float]:
        """Get blocks one by one; returns the seconds of each. Raises BenchError for one from another tier."""
        target = self._targets[0][:1]
        seconds = []
        for key in keys:
            start = time.perf_counter()
            result = self._client.get(self._space, key, target, timeout_ms=CALL_MS)
            seconds.append(time.perf_counter() - start)
            self._check(result, 1, tier)
        return seconds

    def sweep(self, keys: Sequence[bytes], tier: str) -> float:
        """Get a few batches that lie in one tier; returns seconds. Raises BenchError."""
        start = time.perf_counter()
        for each in keys:
            self._check(
                self._client.get(self._space, each, self._targets[0], timeout_ms=CALL_MS), self._sizes.batch, tier
            )
        return time.perf_counter() - start

    @staticmethod
    def _check(result: GetResult, blocks: int, tier: str) -> None:
        if result.prefix != blocks:
            raise BenchError(f"a get returned {result.prefix} of {blocks} blocks: {result.reasons}")
        if result.tiers.get(tier, 0) != blocks:
            raise BenchError(f"blocks came from {result.tiers}, not from {tier}: the figure would lie")
