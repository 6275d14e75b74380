"""What the machine itself can do: a memory copy, a bare TCP connection, a bare round trip."""

from __future__ import annotations

import itertools
import socket
import struct
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

import numpy as np
from numpy.typing import NDArray

from kvpool.tiers.dram import Segment

Bytes = NDArray[np.uint8]

HEADER_BYTES = 512  # in front of each block, as a segment has it
SOCKET_S = 20
PING_BYTES = 64
_GET, _PUT = b"G", b"P"


class Walk:
    """Shared memory as large as a segment, walked through block by block as slots are: as cold as theirs.

    Several threads may walk.
    """

    def __init__(self, size: int, block_bytes: int, *, header_bytes: int = HEADER_BYTES, unit: int = 1) -> None:
        """Map and populate it. Each block begins after a header, and both take a multiple of ``unit``.

        Raises InvalidArgumentError("segment_size") for more than there is.
        """
        self._memory = Segment.create(size, lock=False)
        self._bytes: Bytes = np.frombuffer(self._memory.view, np.uint8)
        self._block_bytes = block_bytes
        step = -(-(header_bytes + block_bytes) // unit) * unit
        starts = range(header_bytes, size - step + header_bytes + 1, step)
        self.blocks = len(starts)
        self._starts = itertools.cycle(starts)  # advancing it is atomic

    def next(self) -> Bytes:
        """Return the next block."""
        start = next(self._starts)
        return self._bytes[start : start + self._block_bytes]

    def close(self) -> None:
        """Give the memory back."""
        del self._bytes
        self._memory.close()


class MemoryCopy:
    """One thread, numpy, block by block."""

    def __init__(self, walk: Walk) -> None:
        self._walk = walk

    def put(self, sources: Sequence[Bytes], batches: int) -> float:
        """Copy buffers into the walk; returns seconds."""
        start = time.perf_counter()
        for _ in range(batches):
            for source in sources:
                np.copyto(self._walk.next(), source)
        return time.perf_counter() - start

    def get(self, targets: Sequence[Bytes], batches: int) -> float:
        """Copy blocks of the walk into buffers; returns seconds."""
        start = time.perf_counter()
        for _ in range(batches):
            for target in targets:
                np.copyto(target, self._walk.next())
        return time.perf_counter() - start


# ---- TCP ---------------------------------------------------------------------------------------------


def _blocking(sock: socket.socket) -> socket.socket:
    """Make a socket plain and blocking, with a deadline that the kernel keeps."""
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", SOCKET_S, 0))
    return sock


def _receive(sock: socket.socket, view: memoryview) -> None:
    while len(view):
        received = sock.recv_into(view, len(view), socket.MSG_WAITALL)
        if not received:
            raise EOFError
        view = view[received:]


def _accept(conn: Connection) -> socket.socket:
    """Listen on a port of our own, tell it, and take the one connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(SOCKET_S)
        conn.send(listener.getsockname()[1])
        return _blocking(listener.accept()[0])


def raw_peer(conn: Connection, size: int, block_bytes: int, blocks: int) -> None:
    """Serve batches out of a walk, or take them into it, on one connection: a helper."""
    walk = Walk(size, block_bytes)
    request = bytearray(1)
    with _accept(conn) as sock:
        while True:
            _receive(sock, memoryview(request))
            if request == _GET:
                for _ in range(blocks):
                    sock.sendall(walk.next().data)
            else:
                for _ in range(blocks):
                    _receive(sock, walk.next().data)
                sock.sendall(_PUT)


class RawSocket:
    """The client's side of ``raw_peer``."""

    def __init__(self, port: int) -> None:
        self._sock = _blocking(socket.create_connection(("127.0.0.1", port), SOCKET_S))

    def get(self, targets: Sequence[Bytes], batches: int) -> float:
        """Receive batches into buffers; returns seconds."""
        views = [target.data for target in targets]
        start = time.perf_counter()
        for _ in range(batches):
            self._sock.sendall(_GET)
            for view in views:
                _receive(self._sock, view)
        return time.perf_counter() - start

    def put(self, sources: Sequence[Bytes], batches: int) -> float:
        """Send batches, each until it is acknowledged; returns seconds."""
        views = [source.data for source in sources]
        ack = memoryview(bytearray(1))
        start = time.perf_counter()
        for _ in range(batches):
            self._sock.sendall(_PUT)
            for view in views:
                self._sock.sendall(view)
            _receive(self._sock, ack)
        return time.perf_counter() - start

    def close(self) -> None:
        """Close the connection, which ends the peer."""
        self._sock.close()


def ping_peer(conn: Connection) -> None:
    """Send back what comes: a helper."""
    data = memoryview(bytearray(PING_BYTES))
    with _accept(conn) as sock:
        while True:
            _receive(sock, data)
            sock.sendall(data)


class PingPong:
    """The client's side of ``ping_peer``."""

    def __init__(self, port: int) -> None:
        self._sock = _blocking(socket.create_connection(("127.0.0.1", port), SOCKET_S))
        self._data = memoryview(bytearray(PING_BYTES))

    def __call__(self) -> float:
        """Make one round trip; returns seconds."""
        start = time.perf_counter()
        self._sock.sendall(self._data)
        _receive(self._sock, self._data)
        return time.perf_counter() - start

    def close(self) -> None:
        """Close the connection, which ends the peer."""
        self._sock.close()
