"""/metrics: the state as it is when somebody asks, read on the loop, written out on the scraper's own thread.

Names are Mooncake's where they mean the same (``master_*``, ``segment_*``), ours begin with ``kvpool_``.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric, UntypedMetricFamily
from prometheus_client.registry import Collector

from kvpool.core.agreement import warnings
from kvpool.core.master import MasterState
from kvpool.core.segment import SegmentState
from kvpool.core.storage import StorageBackend
from kvpool.errors import InvalidArgumentError

if TYPE_CHECKING:
    from kvpool.server.dataplane import DataPlane

log = logging.getLogger(__name__)

READ_S: Final = 2.0
"""How long a scrape waits for the loop."""

IDLE_S: Final = 5.0
"""How long a connection may keep us waiting for its next bytes."""

CONNECTIONS_MAX: Final = 32

_LOOKUP_END = "lookup_end_"
_TRANSFERS = "transfers."


class Value(NamedTuple):
    """One metric; ``kind`` is gauge, counter, or untyped for a counter whose name does not end in _total.

    With several labels, ``label`` has their names with blanks between, and each key is a tuple.
    """

    kind: str
    name: str
    text: str
    value: float | Mapping[str, float] | Mapping[tuple[str, ...], float]
    label: str = ""


_FAMILIES: Final[dict[str, type[GaugeMetricFamily | CounterMetricFamily | UntypedMetricFamily]]] = {
    "gauge": GaugeMetricFamily,
    "counter": CounterMetricFamily,
    "untyped": UntypedMetricFamily,
}


class _StateCollector(Collector):
    """Reads the state on its owner's loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, read: Callable[[], list[Value]]) -> None:
        self._loop = loop
        self._read = read

    def collect(self) -> Iterable[Metric]:
        """Yield all families; raises TimeoutError when the loop does not turn."""
        done: Future[list[Value]] = Future()

        def read() -> None:
            try:
                done.set_result(self._read())
            except Exception as exc:  # whatever is wrong is the scraper's to hear, not the loop's
                done.set_exception(exc)

        self._loop.call_soon_threadsafe(read)
        for kind, name, text, value, label in done.result(READ_S):
            family = _FAMILIES[kind](name, text, labels=label.split() or None)
            for key, number in value.items() if isinstance(value, Mapping) else [((), value)]:
                family.add_metric([key] if isinstance(key, str) else key, number)
            yield family


class _Handler(WSGIRequestHandler):
    timeout = IDLE_S

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- its name in the base class
        """Say nothing."""


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each scrape, but only so many: whoever connects and is silent must not take all we have."""

    daemon_threads = True
    request_queue_size = CONNECTIONS_MAX

    def __init__(self, address: str, port: int) -> None:
        family, _, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family = family
        self._free = threading.BoundedSemaphore(CONNECTIONS_MAX)
        super().__init__((str(where[0]), port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer on a thread of its own, or hang up on one too many."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # there was no thread
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and make room for the next one."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 -- as in the base class
        """Log why a scrape ended early."""
        log.debug("a scrape by %s ended early: %r", client_address, sys.exception())


def serve(port: int, host: str, read: Callable[[], list[Value]], *, insecure: bool) -> Callable[[], None]:
    """Serve /metrics until the function that is returned is called; port 0 does nothing.

    In protected mode only on the loopback. Raises InvalidArgumentError for a port in use.
    """
    if not port:
        return lambda: None
    registry = CollectorRegistry()
    registry.register(_StateCollector(asyncio.get_running_loop(), read))
    address = host if insecure else "127.0.0.1"
    try:
        server = _Server(address, port)
    except OSError as exc:
        field = "metrics_port" if exc.errno in {errno.EADDRINUSE, errno.EACCES} else "host"
        raise InvalidArgumentError(field, f"cannot listen on {address}:{port}: {exc.strerror or exc}") from exc
    server.set_app(make_wsgi_app(registry))
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    log.info("metrics are on http://%s:%d/metrics", address, port)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop


def master_values(state: MasterState, clock: Callable[[], float]) -> list[Value]:
    """Return the master's metrics."""
    now = clock()
    counters, leases, removals, residency = state.counters, state.leases, state.removals, state.residency
    nodes = {name: node for name, node in state.nodes.items() if node.state in {"live", "warming"}}
    states = dict.fromkeys(("live", "warming", "suspect", "dead"), 0)
    for node in state.nodes.values():
        states[node.state] += 1
    used = {name: node.used_bytes for name, node in nodes.items()}
    capacity = {name: node.capacity_bytes for name, node in nodes.items()}
    ends = {k.removeprefix(_LOOKUP_END): v for k, v in counters.items() if k.startswith(_LOOKUP_END)}
    moved = {k.removeprefix(_TRANSFERS): v for k, v in counters.items() if k.startswith(_TRANSFERS)}
    others = {k: v for k, v in counters.items() if not k.startswith((_LOOKUP_END, _TRANSFERS))}
    spaces = list(state.index.spaces.values())
    return [
        Value("gauge", "master_key_count", "Blocks in the index", len(state.index)),
        Value("gauge", "master_allocated_bytes", "Bytes used on live nodes", sum(used.values())),
        Value("gauge", "master_total_capacity_bytes", "Bytes of live nodes", sum(capacity.values())),
        Value("gauge", "master_active_clients", "Live nodes", states["live"]),
        Value("gauge", "segment_allocated_bytes", "Bytes used on a node", used, "segment"),
        Value("gauge", "segment_total_capacity_bytes", "Bytes of a node", capacity, "segment"),
        Value("untyped", "master_evicted_key_count", "Blocks that nodes have evicted", counters["blocks_removed"]),
        Value("counter", "master_attempted_evictions", "Evictions asked of nodes", state.evictions_asked),
        Value("gauge", "kvpool_nodes", "Nodes by state", states, "state"),
        Value("gauge", "kvpool_warming", "Whether nodes are still reporting what they hold", state.warming),
        Value("gauge", "kvpool_namespaces", "Namespaces", len(spaces)),
        Value("gauge", "kvpool_hash_disagreements", "Groups of engines that hash differently",
              len(warnings(spaces, now))),
        Value("gauge", "kvpool_leases", "Leases", len(leases)),
        Value("gauge", "kvpool_leased_blocks", "Leased blocks, once a lease", leases.blocks),
        Value("counter", "kvpool_leases_expired", "Leases that nobody released in time", leases.expired),
        Value("counter", "kvpool_leases_refused", "Leases refused because there were too many", leases.refused),
        Value("counter", "kvpool_lookups", "Lookups", counters["lookups"]),
        Value("counter", "kvpool_lookup_hit_blocks", "Blocks found, by the nearest tier", _hits(counters), "tier"),
        Value("counter", "kvpool_lookup_misses", "Lookups that ended before the prompt did, by reason", ends, "reason"),
        Value("counter", "kvpool_master_events", "Everything else that is counted", others, "event"),
        Value("counter", "kvpool_index_refused_blocks", "Blocks refused because the index was full (max_blocks)",
              state.index.refused),
        Value("gauge", "kvpool_removals_kept", "Removals that explain can tell of", len(removals)),
        Value("gauge", "kvpool_removals_max", "Removals that are kept at most", removals.entries_max),
        Value("counter", "kvpool_removals", "Removals", removals.pushed),
        Value("gauge", "kvpool_removals_memory_seconds", "How far back removals are known", now - removals.since),
        Value("gauge", "kvpool_engines", "Engines that report what they hold", len(residency.engines)),
        Value("gauge", "kvpool_engines_announced", "Engines that routers can find", len(state.engines)),
        Value("gauge", "kvpool_engine_blocks", "Blocks in engines' own memory (tier hbm)", len(residency)),
        Value("gauge", "kvpool_uptime_seconds", "Time since the start", now - state.started),
        Value("gauge", "kvpool_pins", "Operators' pins", len(state.pins.by_id)),
        Value("gauge", "kvpool_prompt_transfers_under_way", "Prompts on their way between engines",
              len(state.transfers.by_id)),
        Value("gauge", "kvpool_prompt_transfer_blocks", "Blocks held for them", state.transfers.blocks),
        Value("counter", "kvpool_prompt_transfers", "What has become of transfers", moved, "event"),
        *_storage_values(state),
    ]  # fmt: skip


def _hits(counters: Counter[str]) -> dict[str, float]:
    files = counters["lookup_hit_blocks_fs"]
    return {"dram": counters["lookup_hit_blocks"] - files, "fs": files}


def _storage_values(state: MasterState) -> list[Value]:
    """Return the metrics of storage backends, labelled by name."""
    backends = state.backends

    def each(read: Callable[[StorageBackend], float]) -> dict[str, float]:
        return {backend.name: read(backend) for backend in backends.by_id.values()}

    return [
        Value("gauge", "kvpool_storage_used_bytes", "Bytes of files", each(backends.used_bytes), "backend"),
        Value("gauge", "kvpool_storage_removing_bytes", "Bytes of files that are to be removed",
              each(lambda b: b.removing_bytes), "backend"),
        Value("gauge", "kvpool_storage_capacity_bytes", "Bytes of files it may hold", each(lambda b: b.capacity_bytes),
              "backend"),
        Value("gauge", "kvpool_storage_blocks", "Blocks it has something of", each(backends.blocks), "backend"),
        Value("gauge", "kvpool_storage_nodes", "Live nodes that read it", each(lambda b: len(backends.serving(b))),
              "backend"),
        Value("gauge", "kvpool_storage_full", "Whether nothing more is written", each(lambda b: b.full), "backend"),
        Value("gauge", "kvpool_storage_scanning", "Whether it is being scanned", each(lambda b: bool(b.scanner)),
              "backend"),
    ]  # fmt: skip


def node_values(state: SegmentState, plane: DataPlane) -> list[Value]:
    """Return a node's metrics."""
    return [
        Value("gauge", "segment_allocated_bytes", "Bytes of all slots, headers included", state.used_bytes),
        Value("gauge", "segment_total_capacity_bytes", "Bytes of the segment", state.capacity_bytes),
        Value("gauge", "kvpool_payload_bytes", "Committed payload bytes", state.payload_bytes),
        Value("gauge", "kvpool_blocks", "Blocks, those being written included", len(state)),
        Value("gauge", "kvpool_pinned_slots", "Slots protected for readers", state.pinned),
        Value("gauge", "kvpool_reserved_slots", "Slots being written", state.reserved),
        Value("counter", "kvpool_segment_events", "What the segment counts", dict(state.counters), "event"),
        Value("counter", "kvpool_transfers", "What the data plane counts", dict(plane.counters), "event"),
    ]
