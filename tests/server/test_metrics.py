"""What is on /metrics stands in docs/metrics.md, and nothing else does."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
import urllib.request
from collections.abc import Iterable
from pathlib import Path

import pytest
from prometheus_client.metrics import MetricWrapperBase

from kvpool.config import MasterSettings
from kvpool.core.filetier import FileTierState
from kvpool.core.segment import SegmentState
from kvpool.errors import InvalidArgumentError
from kvpool.proxy.metrics import Metrics
from kvpool.proxy.routing import Role, Router
from kvpool.server import metrics
from kvpool.server.dataplane import DataPlane
from kvpool.server.filetier import FileTier
from kvpool.server.launch import free_port
from kvpool.server.master import Pool
from kvpool.server.metrics import Value, master_values, node_values
from kvpool.server.peers import Guard
from kvpool.server.storage import storage_values
from kvpool.tiers.dram import Segment

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def row(name: str, kind: str, labels: Iterable[str], text: str) -> str:
    """A line of the page's tables; counters have the name that Prometheus gives them."""
    shown = ", ".join(f"`{label}`" for label in labels)
    total = "_total" if kind == "counter" else ""
    return f"| `{name}{total}` | {kind} | {shown} | {text} |".replace("|  |", "| |")


def of_values(values: Iterable[Value]) -> list[str]:
    return [row(value.name, value.kind, value.label.split(), value.text) for value in values]


def of_master() -> list[str]:
    return of_values(master_values(Pool(MasterSettings(), None).state, time.monotonic))


def of_node() -> list[str]:
    async def both() -> list[str]:
        segment, state = Segment.create(1 << 20, lock=False), SegmentState(1 << 20)
        plane = DataPlane(segment, state, "a", 1, Guard("node", insecure=False))
        files = FileTier(FileTierState(state, [], queue_bytes_max=1 << 20), segment, threads=1, timeout_s=1.0)
        try:
            return of_values(node_values(state, plane)) + of_values(storage_values(files))
        finally:
            files.close()

    return asyncio.run(both())


def of_proxy() -> list[str]:
    router = Router()
    router.add(Role.BOTH, "http://127.0.0.1:1")
    metrics = Metrics(router, lambda: 0)
    labels = {item._name: item._labelnames for item in vars(metrics).values() if isinstance(item, MetricWrapperBase)}
    return [
        row(each.name, each.type, labels.get(each.name) or each.samples[0].labels, each.documentation)
        for each in metrics.registry.collect()
    ]


def test_every_metric_is_in_its_table_and_nothing_else():
    """With its type, its labels, and what it says."""
    parts = [part.splitlines() for part in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]]
    tables = {lines[0]: [line for line in lines if line.startswith("| `")] for lines in parts}
    assert tables == {"Master": of_master(), "Node": of_node(), "Proxy": of_proxy()}


def scraped(port: int) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        return answer.read()


def test_who_connects_and_is_silent_takes_neither_threads_nor_the_metrics(monkeypatch):
    """So many connections at once, and each of them only for some time: then others are answered again."""
    monkeypatch.setattr(metrics._Handler, "timeout", 0.5)
    port = free_port("127.0.0.1")

    async def scrape() -> bytes:
        before = threading.active_count()
        stop = metrics.serve(port, "127.0.0.1", lambda: [Value("gauge", "kvpool_x", "X", 1)], insecure=False)
        silent = [socket.create_connection(("127.0.0.1", port), 20) for _ in range(2 * metrics.CONNECTIONS_MAX)]
        try:
            for sock in silent:
                with contextlib.suppress(OSError):  # it may be one too many
                    sock.sendall(b"GET /met")
            assert threading.active_count() - before <= metrics.CONNECTIONS_MAX + 1
            for sock in silent:
                with contextlib.suppress(ConnectionResetError):
                    assert sock.recv(1) == b""
            return await asyncio.to_thread(scraped, port)
        finally:
            for sock in silent:
                sock.close()
            await asyncio.to_thread(stop)

    assert b"kvpool_x 1.0" in asyncio.run(scrape())


def test_a_port_in_use_is_named():
    """As every other setting."""

    async def serve(port: int) -> None:
        metrics.serve(port, "127.0.0.1", list, insecure=False)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidArgumentError, match=f"metrics_port: cannot listen on 127.0.0.1:{port}"):
            asyncio.run(serve(port))
