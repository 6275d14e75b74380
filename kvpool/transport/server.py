"""The node's end of the data plane: frames on a unix socket and on TCP, one event loop, a thread for each transfer.

The loop handles small frames itself on raw non-blocking sockets (not asyncio streams: file descriptors
travel along, and a socket is lent to a thread while bulk data moves). See ``connection.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from kvpool.errors import InvalidArgumentError, KVPoolError, OverloadedError
from kvpool.rpc.errors import to_proto
from kvpool.rpc.v1.node_pb2 import NodeFrameReply
from kvpool.transport.connection import BlockingIO, Connection, Handler, Peer
from kvpool.transport.frames import REQUEST_BYTES_MAX, encode
from kvpool.transport.sockets import tune_tcp

__all__ = ["BlockingIO", "Connection", "FrameServer", "Handler", "Peer"]

log = logging.getLogger(__name__)

STREAM_BYTES_MAX = 1 << 40
"""Payload that a request may announce when the handler streams it; the handler knows its real limit."""

UNIX_PATH_BYTES_MAX = 100
"""Of 107: the socket is made under a longer name first."""

_BACKLOG = 512
_ACCEPTS_PER_TURN = 32
_SWEEP_S = 1.0
_UCRED = struct.Struct("3i")
_OUT_OF_FILES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class FrameServer:
    """Serves NodeFrame requests to a Handler; create and use it on a running event loop.

    ``threads`` bounds the transfers that run at a time, ``connections_max`` the connections (a further
    one is told OVERLOADED), ``frame_timeout_s`` how long a peer may leave a frame unfinished or a reply
    unread without any progress.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        connections_max: int = 1024,
        threads: int = 64,
        payload_bytes_max: int = REQUEST_BYTES_MAX,
        stream_bytes_max: int = STREAM_BYTES_MAX,
        frame_timeout_s: float = 30.0,
    ) -> None:
        self.handler = handler
        self.payload_bytes_max = payload_bytes_max
        self.stream_bytes_max = max(stream_bytes_max, payload_bytes_max)
        self.frame_timeout_s = frame_timeout_s
        self.executor = ThreadPoolExecutor(threads, "kvpool-transfer")
        self.connections: dict[int, Connection] = {}
        self._connections_max = connections_max
        self._loop = asyncio.get_running_loop()
        self._listeners: list[socket.socket] = []
        self._unix_paths: list[tuple[str, int]] = []
        self._next_id = 1
        self._empty = asyncio.Event()
        self._sweep_timer = self._loop.call_later(_SWEEP_S, self._sweep)

    def listen_unix(self, path: str | os.PathLike[str], mode: int = 0o660) -> None:
        """Listen on a unix socket; a stale file gives way, a live server is InvalidArgumentError("socket_path")."""
        name = os.fspath(path)
        if not 0 < len(os.fsencode(name)) <= UNIX_PATH_BYTES_MAX:
            raise InvalidArgumentError("socket_path", f"must have 1 to {UNIX_PATH_BYTES_MAX} bytes: {name}")
        _refuse_live_socket(name)
        made = f"{name}.{os.getpid() % 1_000_000}"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            with contextlib.suppress(FileNotFoundError):
                Path(made).unlink()
            sock.bind(made)
            Path(made).chmod(mode)
            sock.listen(_BACKLOG)
            inode = Path(made).stat().st_ino
            Path(made).rename(name)  # nobody ever meets it half ready
        except OSError as exc:
            sock.close()
            with contextlib.suppress(OSError):
                Path(made).unlink()
            raise InvalidArgumentError("socket_path", f"cannot listen on {name}: {exc.strerror}") from exc
        self._unix_paths.append((name, inode))
        self._add_listener(sock, _unix_peer)

    def listen_tcp(self, host: str, port: int) -> tuple[str, int]:
        """Listen on TCP and return (address, port); port 0 takes a free one. Errors name ``host`` or ``port``."""
        if not 0 <= port < 1 << 16:
            raise InvalidArgumentError("port", f"must be from 0 to 65535, not {port}")
        try:
            family, kind, _, _, address = socket.getaddrinfo(
                host or "0.0.0.0", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
        except (OSError, UnicodeError) as exc:
            raise InvalidArgumentError("host", f"{host!r} is no address of this host: {exc}") from exc
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(_BACKLOG)
        except OSError as exc:
            sock.close()
            field = "host" if exc.errno == errno.EADDRNOTAVAIL else "port"
            raise InvalidArgumentError(field, f"cannot listen on {host}:{port}: {exc.strerror}") from exc
        self._add_listener(sock, _tcp_peer)
        bound = sock.getsockname()
        return bound[0], bound[1]

    async def close(self, timeout_s: float = 5.0) -> None:
        """Stop listening, close every connection, and wait for the work in threads to end."""
        self._sweep_timer.cancel()
        self._stop_listening()
        for conn in list(self.connections.values()):
            conn.close("the server is closing")
        if self.connections:
            self._empty.clear()
            try:
                await asyncio.wait_for(self._empty.wait(), timeout_s)
            except TimeoutError:
                log.warning("%d transfers did not end within %g s", len(self.connections), timeout_s)
        self.executor.shutdown(wait=False, cancel_futures=True)
        await asyncio.sleep(0)  # the handler has been told of every connection

    def connection_ended(self, conn: Connection, reason: str) -> None:
        """Forget a connection whose socket is closed; only for ``Connection``."""
        # Later, because the handler may be in the middle of a reply to this very connection.
        self._loop.call_soon(self.handler.closed, conn, reason)
        del self.connections[conn.id]
        if not self.connections:
            self._empty.set()

    def _stop_listening(self) -> None:
        for sock in self._listeners:
            self._loop.remove_reader(sock)
            sock.close()
        self._listeners.clear()
        for path, inode in self._unix_paths:
            with contextlib.suppress(OSError):
                if Path(path).stat().st_ino == inode:
                    Path(path).unlink()
        self._unix_paths.clear()

    def _add_listener(self, sock: socket.socket, peer_of: Callable[[socket.socket], Peer]) -> None:
        self._listeners.append(sock)
        self._loop.add_reader(sock, self._on_acceptable, sock, peer_of)

    def _on_acceptable(self, listener: socket.socket, peer_of: Callable[[socket.socket], Peer]) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as exc:
                if exc.errno in _OUT_OF_FILES:
                    log.warning("cannot accept a connection: %s", exc.strerror)
                    # It stays acceptable: look away for a moment instead of spinning.
                    self._loop.remove_reader(listener)
                    self._loop.call_later(_SWEEP_S / 4, partial(self._listen_again, listener, peer_of))
                    return
                continue  # this one is gone already; the next may be fine
            try:
                sock.setblocking(False)
                peer = peer_of(sock)
            except OSError:
                sock.close()
                continue
            self._open(sock, peer)

    def _listen_again(self, listener: socket.socket, peer_of: Callable[[socket.socket], Peer]) -> None:
        if listener in self._listeners:
            self._loop.add_reader(listener, self._on_acceptable, listener, peer_of)

    def _open(self, sock: socket.socket, peer: Peer) -> None:
        if len(self.connections) >= self._connections_max:
            _refuse(sock, OverloadedError(f"all {self._connections_max} connections are taken"))
            return
        conn = Connection(self, sock, peer, self._next_id)
        self._next_id += 1
        self.connections[conn.id] = conn
        try:
            self.handler.opened(conn)
        except KVPoolError as exc:
            conn.refuse(exc)
            return
        conn.start()

    def _sweep(self) -> None:
        now = self._loop.time()
        for conn in list(self.connections.values()):
            if conn.stuck and now - conn.active_at > self.frame_timeout_s:
                conn.close(f"no progress for {self.frame_timeout_s:g} s in the middle of a frame")
        self._sweep_timer = self._loop.call_later(_SWEEP_S, self._sweep)


def _refuse(sock: socket.socket, exc: KVPoolError) -> None:
    with contextlib.suppress(OSError):
        sock.send(encode(NodeFrameReply(error=to_proto(exc))))
    sock.close()


def _unix_peer(sock: socket.socket) -> Peer:
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return Peer(pid or None, uid if uid >= 0 else None, "", unix=True)  # pid 0: a process of another namespace


def _tcp_peer(sock: socket.socket) -> Peer:
    tune_tcp(sock)
    return Peer(None, None, sock.getpeername()[0], unix=False)


def _refuse_live_socket(path: str) -> None:
    """Raise InvalidArgumentError unless a socket may be put at ``path``: nothing there, or nobody answers."""
    try:
        status = Path(path).stat()
    except FileNotFoundError:
        return
    except OSError as exc:
        raise InvalidArgumentError("socket_path", f"cannot use {path}: {exc.strerror}") from exc
    if not stat.S_ISSOCK(status.st_mode):
        raise InvalidArgumentError("socket_path", f"{path} exists and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return  # its owner is gone; renaming over it replaces it
        except OSError:
            pass  # a full backlog, or no permission: somebody is there
    raise InvalidArgumentError("socket_path", f"another process serves {path}")
