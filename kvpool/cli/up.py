"""``kvpool up``: a master and nodes as children of one process, gone when it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.table import Table

from kvpool.cli.options import CONTEXT, RefusedUsage, load_settings
from kvpool.config import Loaded, MasterSettings, NodeSettings
from kvpool.errors import InvalidArgumentError
from kvpool.model import format_size, parse_duration_ms
from kvpool.rpc.v1 import admin_pb2, admin_pb2_grpc

LOG_LINES_KEPT = 200
LOG_LINES_SHOWN = 15
STOP_SECONDS = 5.0
NODES_MAX = 64


@dataclass
class Child:
    """One process of the pool, with its last lines of output."""

    name: str
    process: subprocess.Popen[bytes]
    socket_path: str = ""
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=LOG_LINES_KEPT))
    reader: threading.Thread | None = None

    def follow(self, echo: bool) -> None:
        """Keep reading the output, so that the child never blocks on a full pipe."""
        stream = self.process.stdout
        if stream is None:
            raise ValueError("the child's output is not a pipe")
        self.reader = threading.Thread(target=self._read, args=(stream, echo), name=f"log-{self.name}", daemon=True)
        self.reader.start()

    def _read(self, stream: IO[bytes], echo: bool) -> None:
        with stream:
            for raw in stream:
                line = raw.decode(errors="replace").rstrip()
                self.lines.append(line)
                if echo:
                    click.echo(f"{self.name}: {line}", err=True)

    def last_words(self) -> str:
        """Return the last lines of output, indented."""
        if self.reader is not None:
            self.reader.join(timeout=1.0)
        return "\n".join(f"  {line}" for line in list(self.lines)[-LOG_LINES_SHOWN:]) or "  (it said nothing)"


class UpFailed(click.ClickException):
    """The pool did not start, or a part of it died: exit code 1."""


class Pool:
    """The children of one ``kvpool up``; closing it ends them and removes what they left."""

    def __init__(self, work_dir: Path, echo: bool) -> None:
        self.work_dir = work_dir
        self.children: list[Child] = []
        self.stop = threading.Event()
        self._echo = echo

    def start(self, name: str, module: str, arguments: list[str], *, socket_path: str = "") -> Child:
        """Start ``python -m module`` in a session of its own, so that Ctrl-C reaches only this process."""
        process = subprocess.Popen(
            [sys.executable, "-m", "kvpool.cli.child", str(os.getpid()), module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        child = Child(name, process, socket_path)
        self.children.append(child)
        child.follow(self._echo)
        return child

    def check(self) -> None:
        """Raise UpFailed when a child has ended."""
        for child in self.children:
            code = child.process.poll()
            if code is not None:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                raise UpFailed(f"{child.name} {how}. Its last lines:\n{child.last_words()}")

    def wait_until(self, condition: Callable[[], bool], what: str, deadline: float) -> bool:
        """Wait for a condition while all children live; False when told to stop meanwhile."""
        while not condition():
            self.check()
            if time.monotonic() > deadline:
                words = "\n".join(f"{child.name}:\n{child.last_words()}" for child in self.children)
                raise UpFailed(f"{what} in time. Last lines:\n{words}")
            if self.stop.wait(0.05):
                return False
        return True

    def close(self) -> None:
        """End all children, nodes first; remove their sockets."""
        for child in reversed(self.children):
            if child.process.poll() is None:
                child.process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for child in reversed(self.children):
            try:
                child.process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait(timeout=STOP_SECONDS)
            if child.socket_path and child.process.returncode != 0:
                _remove_dead_socket(child.socket_path)


def _remove_dead_socket(path: str) -> None:
    """Remove a socket that nobody listens on; a node that refused to start may have met another's."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink(missing_ok=True)
        except OSError:
            return


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            raise RefusedUsage(f"host: cannot listen on {host}: {error.strerror}") from None
        return int(probe.getsockname()[1])


def _serving(channel: grpc.Channel) -> bool:
    try:
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=1.0)
    except grpc.RpcError:
        return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def _live_nodes(channel: grpc.Channel) -> list[admin_pb2.NodeStatus]:
    try:
        reply = admin_pb2_grpc.AdminStub(channel).Nodes(admin_pb2.NodesRequest(), timeout=1.0)
    except grpc.RpcError:
        return []
    return [node for node in reply.nodes if node.state == "live"]


@contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    def handle(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _work_dir(base_dir: str | None, *, needed: bool) -> Iterator[Path]:
    """Yield where nodes keep their own sockets and state: the user's directory, or one that goes away."""
    if base_dir is not None:
        path = Path(base_dir).absolute()
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise RefusedUsage(f"base_dir: cannot make {path}: {error.strerror}") from None
        yield path
    elif not needed:  # nothing will be put there
        yield Path(tempfile.gettempdir())
    else:
        with tempfile.TemporaryDirectory(prefix="kvpool-up-", ignore_cleanup_errors=True) as made:
            yield Path(made)


def _reach(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True)
class _Plan:
    """Everything ``up`` was asked for."""

    nodes: int
    host: str
    port: int
    config: str | None
    segment_size: str | None
    private: bool
    node: Loaded[NodeSettings]
    timeout_s: float

    @property
    def address(self) -> str:
        """Where the master is reached from here."""
        return _join(_reach(self.host), self.port)

    def master_arguments(self) -> list[str]:
        """Return the command line of the master."""
        shared = ["--config", self.config] if self.config else []
        return [*shared, "--host", self.host, "--port", str(self.port)]

    def node_arguments(self, index: int, directory: Path) -> tuple[list[str], str]:
        """Return the command line of a node, and its socket; the first uses this user's usual socket."""
        arguments = ["--config", self.config] if self.config else []
        arguments += ["--master", self.address, "--host", self.host, "--port", "0"]
        if self.segment_size is not None:
            arguments += ["--segment_size", self.segment_size]
        if self.node.sources["advertise_host"] == "default" and _reach(self.host) == self.host:
            arguments += ["--advertise_host", self.host]
        path = self.node.settings.socket_path
        if self.private or index > 0:
            path = str(directory / "node.sock")
        if self.private or self.nodes > 1:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            arguments += ["--node_id", f"{socket.gethostname()}-{index}", "--data_dir", str(directory)]
        return [*arguments, "--socket_path", path], path


def _show(console: Console, address: str, nodes: list[admin_pb2.NodeStatus]) -> None:
    table = Table(title="kvpool is up", title_justify="left")
    for heading in ("part", "address", "socket", "memory"):
        table.add_column(heading, overflow="fold")
    table.add_row("master", address, "", "")
    for node in sorted(nodes, key=lambda node: node.address.node_id):
        where = node.address
        table.add_row(
            f"node {where.node_id}", f"{where.host}:{where.port}", where.socket_path, format_size(node.capacity_bytes)
        )
    console.print(table)
    flag = "" if address.endswith(":50088") else f" --master {address}"
    console.print(f"Look into it:   kvpoolctl{flag} status", highlight=False)
    console.print(f'From Python:    kvpool.Client("{address}")', highlight=False)
    console.print("Ctrl-C ends it and leaves nothing behind.", highlight=False)
    console.file.flush()


# A master takes a moment to listen: try again soon, and never by way of a proxy.
_CHANNEL_OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
]


def _run(plan: _Plan, pool: Pool, console: Console) -> None:
    deadline = time.monotonic() + plan.timeout_s
    live: list[admin_pb2.NodeStatus] = []
    with grpc.insecure_channel(plan.address, options=_CHANNEL_OPTIONS) as channel:
        pool.start("master", "kvpool.cli.master", plan.master_arguments())
        if not pool.wait_until(lambda: _serving(channel), "the master was not ready", deadline):
            return
        for index in range(plan.nodes):
            arguments, path = plan.node_arguments(index, pool.work_dir / f"node-{index}")
            pool.start(f"node {index}", "kvpool.cli.node", arguments, socket_path=path)

        def all_live() -> bool:
            live[:] = _live_nodes(channel)
            return len(live) >= plan.nodes

        if not pool.wait_until(all_live, f"not all of {plan.nodes} nodes were ready", deadline):
            return
    _show(console, plan.address, live)
    while not pool.stop.wait(0.2):
        pool.check()
    console.print("stopping")


@click.command("up", context_settings=CONTEXT)
@click.option("--nodes", type=click.IntRange(1, NODES_MAX), default=1, show_default=True, help="How many nodes.")
@click.option("--port", metavar="PORT", help="The master's port; 0 takes a free one.  [default: 50088; KVPOOL_PORT]")
@click.option("--host", metavar="HOST", help="Address to listen on.  [default: 127.0.0.1; KVPOOL_HOST]")
@click.option("--segment_size", metavar="SIZE", help="Memory of each node.  [default: 1GB; KVPOOL_SEGMENT_SIZE]")
@click.option("--base_dir", metavar="DIR", help="Put sockets and state here instead of in this user's usual places.")
@click.option("--config", metavar="FILE", help="YAML or JSON file with settings of master and nodes.  [KVPOOL_CONFIG]")
@click.option(
    "--ready_timeout", metavar="DURATION", default="60s", show_default=True, help="How long a start may take."
)
@click.option("-v", "--verbose", is_flag=True, help="Show the log of every part.")
def command(
    nodes: int,
    port: str | None,
    host: str | None,
    segment_size: str | None,
    base_dir: str | None,
    config: str | None,
    ready_timeout: str,
    verbose: bool,
) -> None:
    """Run a master and nodes on this machine until Ctrl-C; nothing is left behind.

    \b
    Examples:
      kvpool up
      kvpool up --nodes 2 --segment_size 256MB
      kvpool up --port 0 --base_dir ./pool -v
    """
    master = load_settings(MasterSettings, {"port": port, "host": host}, config)
    node = load_settings(NodeSettings, {"segment_size": segment_size}, config)
    try:
        timeout_s = parse_duration_ms(ready_timeout, "ready_timeout") / 1000
    except InvalidArgumentError as error:
        raise RefusedUsage(str(error)) from None
    listen = "127.0.0.1" if master.sources["host"] == "default" else master.settings.host
    plan = _Plan(
        nodes=nodes,
        host=listen,
        port=master.settings.port or _free_port(listen),
        config=config,
        segment_size=segment_size,
        private=base_dir is not None,
        node=node,
        timeout_s=timeout_s,
    )
    with _work_dir(base_dir, needed=nodes > 1) as work_dir:
        pool = Pool(work_dir, verbose)
        with _signals(pool.stop):
            try:
                _run(plan, pool, Console())
            finally:
                pool.close()


if __name__ == "__main__":
    command(prog_name="kvpool up")
