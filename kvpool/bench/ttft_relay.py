"""A relay between a client and a node's unix socket that can hold back what the node answers: a slow node."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from kvpool.transport.shm import FDS_MAX, close_fds

CHUNK_BYTES = 1 << 20
BACKLOG = 64
QUEUE_MAX = 1024

_Piece = tuple[float, bytes, list[int]]


class Relay:
    """Passes bytes and file descriptors both ways; those from the node wait ``delay_s`` first."""

    def __init__(self, listen_path: str, node_path: str) -> None:
        """Listen; connections to the node are made as clients come."""
        self.delay_s = 0.0
        self._node_path = node_path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(listen_path)
        self._listener.listen(BACKLOG)
        _thread("relay-accept", self._accept)

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            node = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                node.connect(self._node_path)
            except OSError:
                client.close()
                node.close()
                continue
            answers: queue.Queue[_Piece | None] = queue.Queue(QUEUE_MAX)
            _thread("relay-ask", self._pass_on, client, node)
            _thread("relay-read", self._read_answers, node, answers)
            _thread("relay-answer", self._send_answers, answers, client)

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while piece := _receive(source):
                _send(target, *piece)
        except OSError:
            pass  # either end is gone, which both are told below
        _hang_up(target, socket.SHUT_WR)

    def _read_answers(self, node: socket.socket, answers: queue.Queue[_Piece | None]) -> None:
        try:
            while piece := _receive(node):
                answers.put((time.monotonic() + self.delay_s, *piece))
        except OSError:
            pass  # the end of the answers, as below
        answers.put(None)
        node.close()

    def _send_answers(self, answers: queue.Queue[_Piece | None], client: socket.socket) -> None:
        while (answer := answers.get()) is not None:
            due, data, fds = answer
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                _send(client, data, fds)
            except OSError:
                continue  # it has hung up: drop the rest, so that the reader ends too
        _hang_up(client, socket.SHUT_RDWR)  # which also wakes the thread that listens to it
        client.close()


def _thread(name: str, target: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=target, args=arguments, name=name, daemon=True).start()


def _receive(source: socket.socket) -> tuple[bytes, list[int]] | None:
    data, fds, _, _ = socket.recv_fds(source, CHUNK_BYTES, FDS_MAX)
    return (data, list(fds)) if data else None


def _send(target: socket.socket, data: bytes, fds: list[int]) -> None:
    try:
        sent = socket.send_fds(target, [data], fds) if fds else 0
        target.sendall(data[sent:])
    finally:
        close_fds(fds)


def _hang_up(target: socket.socket, how: int) -> None:
    try:
        target.shutdown(how)
    except OSError:
        return  # gone already


def delaying_relay(conn: Connection, listen_path: str, node_path: str) -> None:
    """Relay until the pipe closes; each number that comes through it is the new delay in seconds: a helper."""
    relay = Relay(listen_path, node_path)
    conn.send(None)
    while True:
        relay.delay_s = float(conn.recv())
        conn.send(None)
