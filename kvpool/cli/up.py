"""``kvpool up``: a master and nodes as children of one process, gone when it ends."""

from __future__ import annotations

import functools
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import click
import grpc
from rich.console import Console
from rich.table import Table

from kvpool.cli.options import CONTEXT, RefusedUsage, load_settings, one_line_errors
from kvpool.cli.printers import console
from kvpool.config import Loaded, MasterSettings, NodeSettings
from kvpool.model import format_size, parse_duration_ms
from kvpool.rpc.v1 import admin_pb2
from kvpool.server.launch import (
    CHANNEL_OPTIONS,
    Children,
    StartError,
    free_port,
    is_serving,
    join_address,
    live_nodes,
)
from kvpool.server.peers import is_loopback

NODES_MAX = 64


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


def _made(path: Path) -> Path:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise RefusedUsage(f"base_dir: cannot make {path}: {error.strerror}") from None
    return path


@contextmanager
def _work_dir(base_dir: str | None, *, needed: bool) -> Iterator[Path]:
    """Yield where nodes keep their own sockets and state: the user's directory, or one that goes away."""
    if base_dir is not None:
        yield _made(Path(base_dir).absolute())
    elif not needed:  # nothing will be put there
        yield Path(tempfile.gettempdir())
    else:
        with tempfile.TemporaryDirectory(prefix="kvpool-up-", ignore_cleanup_errors=True) as made:
            yield Path(made)


def _reach(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


@dataclass(frozen=True)
class _Plan:
    """Everything ``up`` was asked for."""

    nodes: int
    host: str
    port: int
    config: str | None
    segment_size: str | None
    insecure: bool
    private: bool
    node: Loaded[NodeSettings]
    timeout_s: float

    @property
    def address(self) -> str:
        """Where the master is reached from here."""
        return join_address(_reach(self.host), self.port)

    @property
    def _insecure(self) -> str:
        return "--insecure" if self.insecure else "--no_insecure"

    def master_arguments(self) -> list[str]:
        """Return the command line of the master."""
        shared = ["--config", self.config] if self.config else []
        return [*shared, "--host", self.host, "--port", str(self.port), self._insecure]

    def node_arguments(self, index: int, directory: Path) -> tuple[list[str], str]:
        """Return the command line of a node, and its socket; the first uses this user's usual socket."""
        arguments = ["--config", self.config] if self.config else []
        # A metrics_port of file or environment is the master's: two parts cannot listen on it.
        arguments += ["--master", self.address, "--host", self.host, "--port", "0", "--metrics_port", "0"]
        arguments.append(self._insecure)
        if self.segment_size is not None:
            arguments += ["--segment_size", self.segment_size]
        if self.node.sources["advertise_host"] == "default" and _reach(self.host) == self.host:
            arguments += ["--advertise_host", self.host]
        path = self.node.settings.socket_path
        if self.private or index > 0:
            path = str(directory / "node.sock")
        if self.private or self.nodes > 1:
            arguments += ["--node_id", f"{socket.gethostname()}-{index}", "--data_dir", str(_made(directory))]
        return [*arguments, "--socket_path", path], path


def _check_reachable(host: str, *, insecure: bool) -> None:
    """Refuse an address by which nobody would be answered, not even we."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(_reach(host), None)}
    except (OSError, UnicodeError):
        return  # listening on it says what is wrong
    if not insecure and not all(map(is_loopback, found)):
        raise RefusedUsage(
            f"host: {host} is not the loopback, by which alone a pool answers without --insecure; "
            "give --insecure on a network that you trust"
        )


def _show(out: Console, address: str, nodes: list[admin_pb2.NodeStatus]) -> None:
    table = Table(title="kvpool is up", title_justify="left")
    for heading in ("part", "address", "socket", "memory"):
        table.add_column(heading, overflow="fold")
    table.add_row("master", address, "", "")
    for node in sorted(nodes, key=lambda node: node.address.node_id):
        where = node.address
        table.add_row(
            f"node {where.node_id}", f"{where.host}:{where.port}", where.socket_path, format_size(node.capacity_bytes)
        )
    out.print(table)
    flag = "" if address.endswith(":50088") else f" --master {address}"
    out.print(f"Look into it:   kvpoolctl{flag} status", highlight=False)
    out.print(f'From Python:    kvpool.Client("{address}")', highlight=False)
    out.print("Ctrl-C ends it and leaves nothing behind.", highlight=False)
    out.file.flush()


def _run(plan: _Plan, pool: Children, work_dir: Path, out: Console) -> None:
    deadline = time.monotonic() + plan.timeout_s
    live: list[admin_pb2.NodeStatus] = []
    with grpc.insecure_channel(plan.address, options=CHANNEL_OPTIONS) as channel:
        pool.start("master", "kvpool.cli.master", plan.master_arguments())
        if not pool.wait_until(lambda: is_serving(channel), "the master was not ready", deadline):
            return
        for index in range(plan.nodes):
            arguments, path = plan.node_arguments(index, work_dir / f"node-{index}")
            pool.start(f"node {index}", "kvpool.cli.node", arguments, socket_path=path)

        def all_live() -> bool:
            live[:] = live_nodes(channel)
            return len(live) >= plan.nodes

        if not pool.wait_until(all_live, f"not all of {plan.nodes} nodes were ready", deadline):
            return
    _show(out, plan.address, live)
    while not pool.stop.wait(0.2):
        pool.check()
    out.print("stopping")


@click.command("up", context_settings=CONTEXT)
@click.option("--nodes", type=click.IntRange(1, NODES_MAX), default=1, show_default=True, help="How many nodes.")
@click.option("--port", metavar="PORT", help="The master's port; 0 takes a free one.  [default: 50088; KVPOOL_PORT]")
@click.option("--host", metavar="HOST", help="Address to listen on.  [default: 127.0.0.1; KVPOOL_HOST]")
@click.option(
    "--insecure/--no_insecure", default=None,
    help="Answer peers of other hosts without TLS or a token.  [default: false; KVPOOL_INSECURE]",
)  # fmt: skip
@click.option("--segment_size", metavar="SIZE", help="Memory of each node.  [default: 1GB; KVPOOL_SEGMENT_SIZE]")
@click.option("--base_dir", metavar="DIR", help="Put sockets and state here instead of in this user's usual places.")
@click.option(
    "--config", metavar="FILE",
    help="YAML or JSON file with settings of master and nodes; metrics_port is the master's.  [KVPOOL_CONFIG]",
)  # fmt: skip
@click.option(
    "--ready_timeout", metavar="DURATION", default="60s", show_default=True, help="How long a start may take."
)
@click.option("-v", "--verbose", is_flag=True, help="Show the log of every part.")
def command(
    nodes: int,
    port: str | None,
    host: str | None,
    insecure: bool | None,
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
    master = load_settings(MasterSettings, {"port": port, "host": host, "insecure": insecure}, config)
    node = load_settings(NodeSettings, {"segment_size": segment_size}, config)
    listen = "127.0.0.1" if master.sources["host"] == "default" else master.settings.host
    _check_reachable(listen, insecure=master.settings.insecure)
    with one_line_errors():
        timeout_s = parse_duration_ms(ready_timeout, "ready_timeout") / 1000
        master_port = free_port(listen, master.settings.port)
    plan = _Plan(
        nodes=nodes,
        host=listen,
        port=master_port,
        config=config,
        segment_size=segment_size,
        insecure=master.settings.insecure,
        private=base_dir is not None,
        node=node,
        timeout_s=timeout_s,
    )
    with one_line_errors(), _work_dir(base_dir, needed=nodes > 1) as work_dir:
        pool = Children(echo=functools.partial(click.echo, err=True) if verbose else None)
        with _signals(pool.stop):
            try:
                _run(plan, pool, work_dir, console())
            except StartError as error:
                raise (RefusedUsage if error.refused else click.ClickException)(str(error)) from None
            finally:
                pool.close()


if __name__ == "__main__":
    command(prog_name="kvpool up")
