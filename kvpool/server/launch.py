"""Starts masters and nodes as children of this process, knows when they serve, and ends them with it."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import grpc

from kvpool.errors import InvalidArgumentError, KVPoolError
from kvpool.processes import module_command
from kvpool.rpc.v1 import admin_pb2, admin_pb2_grpc

LOG_LINES_KEPT = 200
LOG_LINES_SHOWN = 15
STOP_S = 10.0
REFUSED_CODE = 2
"""What our programs end with when they refuse a setting."""

ASK_S = 1.0

# A master takes a moment to listen: try again soon, and never by way of a proxy.
CHANNEL_OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
]


class StartError(KVPoolError):
    """A part of the pool did not start, or has died; ``refused``: because it was given what is not allowed."""

    def __init__(self, problem: str, *, refused: bool = False) -> None:
        super().__init__(problem)
        self.refused = refused


@dataclass
class Child:
    """One process of the pool, with its last lines of output."""

    name: str
    process: subprocess.Popen[bytes]
    socket_path: str = ""
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=LOG_LINES_KEPT))
    reader: threading.Thread | None = None

    def follow(self, echo: Callable[[str], None] | None) -> None:
        """Keep reading the output, so that the child never blocks on a full pipe."""
        stream = self.process.stdout
        if stream is None:
            raise ValueError("the child's output is not a pipe")
        self.reader = threading.Thread(target=self._read, args=(stream, echo), name=f"log-{self.name}", daemon=True)
        self.reader.start()

    def _read(self, stream: IO[bytes], echo: Callable[[str], None] | None) -> None:
        with stream:
            for raw in stream:
                line = raw.decode(errors="replace").rstrip()
                self.lines.append(line)
                if echo is not None:
                    echo(f"{self.name}: {line}")

    def last_words(self) -> str:
        """Return the last lines of output, indented."""
        if self.reader is not None:
            self.reader.join(timeout=1.0)
        return "\n".join(f"  {line}" for line in list(self.lines)[-LOG_LINES_SHOWN:]) or "  (it said nothing)"


class Children:
    """The processes of one pool; ``close`` ends them and removes what they left. Set ``stop`` to end a wait."""

    def __init__(
        self, echo: Callable[[str], None] | None = None, *, environment: Mapping[str, str] | None = None
    ) -> None:
        """Pass each line of their output to ``echo``; their environment is ours unless one is given."""
        self.children: list[Child] = []
        self.stop = threading.Event()
        self._echo = echo
        self._environment = environment

    def start(self, name: str, module: str, arguments: list[str], *, socket_path: str = "") -> Child:
        """Start ``python -m module`` in a session of its own, so that Ctrl-C reaches only this process."""
        process = subprocess.Popen(
            [*module_command("kvpool.server.child"), str(os.getpid()), module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=self._environment,
        )
        child = Child(name, process, socket_path)
        self.children.append(child)
        child.follow(self._echo)
        return child

    def check(self) -> None:
        """Raise StartError when a child has ended."""
        for child in self.children:
            code = child.process.poll()
            if code is not None:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                words = child.last_words()
                raise StartError(f"{child.name} {how}. Its last lines:\n{words}", refused=code == REFUSED_CODE)

    def wait_until(self, condition: Callable[[], bool], what: str, deadline: float) -> bool:
        """Wait for a condition while all children live; False when told to stop meanwhile. Raises StartError."""
        while not condition():
            self.check()
            if time.monotonic() > deadline:
                words = "\n".join(f"{child.name}:\n{child.last_words()}" for child in self.children)
                raise StartError(f"{what} in time. Last lines:\n{words}")
            if self.stop.wait(0.05):
                return False
        return True

    def close(self) -> None:
        """End all children, the first one, whom the others report to, after them; remove their sockets."""
        deadline = time.monotonic() + STOP_S
        for some in (self.children[1:], self.children[:1]):
            for child in some:
                if child.process.poll() is None:
                    child.process.terminate()
            for child in some:
                try:
                    child.process.wait(timeout=max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    child.process.kill()
                    child.process.wait(timeout=STOP_S)
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


def free_port(host: str, port: int = 0) -> int:
    """Return ``port``, for 0 any, if nobody listens on it. Raises InvalidArgumentError("port" or "host").

    Asked before anything starts: another pool's master would answer in the place of ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, UnicodeError) as error:
            taken = isinstance(error, OSError) and error.errno in {errno.EADDRINUSE, errno.EACCES}
            why = getattr(error, "strerror", None) or error
            problem = f"cannot listen on {join_address(host, port)}: {why}"
            raise InvalidArgumentError("port" if taken else "host", problem) from None
        return int(probe.getsockname()[1])


def join_address(host: str, port: int) -> str:
    """Return ``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_serving(channel: grpc.Channel) -> bool:
    """Return whether a master answers."""
    try:
        admin_pb2_grpc.AdminStub(channel).Status(admin_pb2.StatusRequest(), timeout=ASK_S)
    except grpc.RpcError:
        return False
    return True


def live_nodes(channel: grpc.Channel) -> list[admin_pb2.NodeStatus]:
    """Return the nodes that the master counts as live; none while it does not answer."""
    try:
        reply = admin_pb2_grpc.AdminStub(channel).Nodes(admin_pb2.NodesRequest(), timeout=ASK_S)
    except grpc.RpcError:
        return []
    return [node for node in reply.nodes if node.state == "live"]
