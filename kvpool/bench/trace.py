"""``kvpool-bench trace FILE``: replay the requests of a production trace through a real pool.

The trace is JSON lines as Mooncake publishes them: ``timestamp`` (ms), ``input_length``, ``output_length``
and ``hash_ids``, one for each 512 tokens. Each request looks its prompt up, loads what is there, checks
every byte, stores the rest and lets go. What counts is the share of all blocks that was loaded, beside an
ideal LRU of the same capacity.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from kvpool.bench.harness import BenchError, FiniteRange, one_command
from kvpool.bench.pool import NO_NODE, TIMEOUT_MS, BenchPool, bench_pool, connected, leaving_nothing, slot_bytes
from kvpool.bench.report import Figure, Report, json_option
from kvpool.client import Client
from kvpool.errors import InvalidArgumentError
from kvpool.model import KEY_BYTES, Namespace, format_size, parse_size

TRACE_TOKENS = 512
BLOCKS_MAX = 1 << 20
PAUSE_S_MAX = 1e9
# A block may be gone between lookup and get: that is a miss, everything else is an error.
LOST = frozenset({"not_here", "not_stored"})
ANSWERS = frozenset({"complete", "not_stored", "not_whole"})


@dataclass(frozen=True, slots=True)
class Request:
    """One line of a trace."""

    at_s: float
    ids: tuple[int, ...]


def read_trace(path: str, requests_max: int) -> list[Request]:
    """Return a trace's requests in order. Raises InvalidArgumentError naming the line."""
    found: list[Request] = []
    try:
        with Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                if requests_max and len(found) >= requests_max:
                    break
                found.append(_request(line, number))
    except OSError as error:
        raise InvalidArgumentError("FILE", f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidArgumentError("FILE", f"{path} is not UTF-8 text") from None
    if not any(request.ids for request in found):
        raise InvalidArgumentError("FILE", f"{path} has no request with hash_ids")
    return found


def _request(line: str, number: int) -> Request:
    wanted = f"line {number}: must be a JSON object with numbers timestamp and hash_ids"
    try:
        record = json.loads(line)
        at_s, ids = float(record["timestamp"]) / 1000, record["hash_ids"]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise InvalidArgumentError("FILE", wanted) from None
    whole = isinstance(ids, list) and len(ids) <= BLOCKS_MAX and all(isinstance(i, int) for i in ids)
    if not whole or not math.isfinite(at_s):
        raise InvalidArgumentError("FILE", wanted)
    return Request(at_s, tuple(ids))


def ideal_hit_rate(requests: Sequence[Request], capacity: int) -> float:
    """Return the block hit rate of one LRU of ``capacity`` blocks; a chain's tail ages before its head."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = total = 0
    for request in requests:
        total += len(request.ids)
        hits += next((n for n, i in enumerate(request.ids) if i not in cache), len(request.ids))
        for i in reversed(request.ids):
            cache[i] = None
            cache.move_to_end(i)
        while len(cache) > capacity:
            cache.popitem(last=False)
    return hits / total


class Contents:
    """Bytes of blocks that follow from their keys, so that every one that comes back can be checked."""

    def __init__(self, block_bytes: int, blocks: int) -> None:
        words = block_bytes // KEY_BYTES
        self._pattern = np.random.default_rng(1).integers(0, 1 << 63, (1, words, 2), np.uint64)
        self._expected = np.ones((blocks, words, 2), np.uint64)
        self._loaded = np.ones((blocks, words, 2), np.uint64)

    def of(self, keys: bytes) -> NDArray[np.uint64]:
        """Return the blocks of some keys; valid until the next call."""
        words = np.frombuffer(keys, np.uint64).reshape(-1, 1, 2)
        out = self._expected[: len(words)]
        np.bitwise_xor(self._pattern, words, out=out)
        return out

    def room(self, blocks: int) -> NDArray[np.uint64]:
        """Return buffers to load into; valid until the next call."""
        return self._loaded[:blocks]


@dataclass(slots=True)
class Tally:
    """What a replay came to."""

    blocks: int = 0
    hits: int = 0
    stored: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    lost: int = 0  # found by a lookup, gone before the get
    seconds: float = 0.0


class Replay:
    """Sends requests through one client, one after another."""

    def __init__(self, client: Client, block_bytes: int, longest: int) -> None:
        self._client = client
        self._space = _space(block_bytes)
        self._salt = os.urandom(16)
        self._keys: dict[int, bytes] = {}
        self._contents = Contents(block_bytes, longest)
        self.tally = Tally()

    def run(self, requests: Sequence[Request], speedup: float, report: Report) -> Tally:
        """Replay; ``speedup`` 0 is as fast as possible."""
        begin = time.monotonic()
        for number, request in enumerate(requests):
            if speedup:
                pause = begin + (request.at_s - requests[0].at_s) / speedup - time.monotonic()
                time.sleep(min(max(0.0, pause), PAUSE_S_MAX))
            self._one(request)
            if number % 50 == 0:
                rate = self.tally.hits / max(1, self.tally.blocks)
                report.advance(number, f"hit rate {rate:.3f}, {self.tally.errors.total()} errors")
        self.tally.seconds = time.monotonic() - begin
        return self.tally

    def _key(self, hash_id: int) -> bytes:
        key = self._keys.get(hash_id)
        if key is None:
            text = self._salt + b"%d" % hash_id
            key = self._keys[hash_id] = hashlib.sha256(text).digest()[:KEY_BYTES]
        return key

    def _one(self, request: Request) -> None:
        tally = self.tally
        keys = b"".join([self._key(i) for i in request.ids])
        found = self._client.lookup(self._space, keys, lease=True)
        if found.reason not in ANSWERS:
            tally.errors[f"lookup: {found.reason}"] += 1
        tally.blocks += len(request.ids)
        loaded = 0
        if found.prefix:
            hit = keys[: found.prefix * KEY_BYTES]
            room = self._contents.room(found.prefix)
            result = self._client.get(self._space, hit, list(room), lookup=found, timeout_ms=TIMEOUT_MS)
            loaded = result.prefix
            for reason, blocks in result.reasons.items():
                if reason in LOST:
                    tally.lost += blocks
                else:
                    tally.errors[f"get: {reason}"] += blocks
            right = self._contents.of(hit[: loaded * KEY_BYTES])
            if not np.array_equal(room[:loaded], right):
                tally.errors["get: wrong bytes"] += 1
            tally.hits += loaded
        rest = keys[loaded * KEY_BYTES :]
        if rest:
            put = self._client.put(self._space, rest, list(self._contents.of(rest)), timeout_ms=TIMEOUT_MS)
            tally.stored += put.stored
            for reason, blocks in put.errors.items():
                tally.errors[f"put: {reason}"] += blocks
        self._client.release([found.lease])


def _space(block_bytes: int) -> Namespace:
    return Namespace(model=f"kvpool-bench-trace-{block_bytes}", block_tokens=TRACE_TOKENS)


def _capacity(pool: BenchPool, wanted: int, block_bytes: int) -> int:
    """Return how many blocks the pool holds. Raises BenchError when ours has another size than it was given."""
    there = int(pool.status().capacity_bytes)
    if pool.private and there != wanted * slot_bytes(block_bytes):
        raise BenchError(f"the pool has {there} bytes, not {wanted * slot_bytes(block_bytes)} as it was asked to")
    return there // slot_bytes(block_bytes)


@click.command("trace")
@click.argument("file", metavar="FILE")
@click.option("--master", metavar="HOST:PORT", help="Replay through this pool, as large as it is.")
@click.option(
    "--capacity_ratio", type=FiniteRange(0, 10, min_open=True), default=0.1, show_default=True,
    help="Size of the private pool: this share of the trace's different blocks.",
)  # fmt: skip
@click.option("--block_bytes", default="16KB", show_default=True, help="Bytes of a block.")
@click.option(
    "--speedup", type=FiniteRange(0, 1e6), default=0.0, show_default=True,
    help="Replay by the timestamps, this many times faster; 0 is as fast as possible.",
)  # fmt: skip
@click.option("--requests", "requests_max", type=click.IntRange(0), default=0, help="Only the first so many requests.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    file: str,
    master: str | None,
    capacity_ratio: float,
    block_bytes: str,
    speedup: float,
    requests_max: int,
    json_path: str | None,
) -> None:
    """Replay a trace of requests through a pool: the hit rate. Exit code 1 if anything went wrong.

    \b
    Examples:
      kvpool-bench trace conversation_trace.jsonl
      kvpool-bench trace conversation_trace.jsonl --capacity_ratio 0.2 --json trace.json
    """
    report = Report("trace")
    with one_command():
        size = parse_size(block_bytes, "block_bytes")
        if size % KEY_BYTES:
            raise InvalidArgumentError("block_bytes", f"must be a multiple of {KEY_BYTES}, not {size}")
        requests = read_trace(file, requests_max)
        unique = len({i for request in requests for i in request.ids})
        wanted = max(1, round(capacity_ratio * unique))
        longest = max(len(request.ids) for request in requests)
        with report.running(len(requests)), bench_pool(master, segment_size=wanted * slot_bytes(size)) as pool:
            capacity = _capacity(pool, wanted, size)
            socket_path = next(iter(pool.sockets), NO_NODE)
            before = pool.status().counters
            space = _space(size)
            with (
                leaving_nothing(pool, space),
                connected(pool.master, space, node=socket_path, name="trace") as client,
            ):
                tally = Replay(client, size, longest).run(requests, speedup, report)
                after = pool.status().counters
        evicted = int(after["blocks_removed"] - before["blocks_removed"])
        rate, ideal = tally.hits / tally.blocks, ideal_hit_rate(requests, capacity)
        detail = {
            "block_bytes": size,
            "requests": len(requests),
            "blocks": tally.blocks,
            "unique_blocks": unique,
            "capacity_blocks": capacity,
            "stored": tally.stored,
            "evicted": evicted,
            "lost": tally.lost,
            "errors": tally.errors.total(),
            "requests_per_s": round(len(requests) / tally.seconds, 1),
        }
        report.add(Figure("trace_hit_rate", rate, "", "lru", rate / ideal if ideal else None, detail, ideal))
    report.note(f"{tally.hits:,} of {tally.blocks:,} blocks hit, every byte of them checked; {evicted:,} evicted")
    report.note(f"pool: {capacity:,} blocks of {format_size(size)}, {len(requests) / tally.seconds:,.0f} requests/s")
    report.note(f"errors: {dict(tally.errors) or 'none'}; gone between lookup and get: {tally.lost}")
    report.show(json_path)
    if tally.errors:
        ctx.exit(1)
