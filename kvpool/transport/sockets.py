"""Blocking vectored socket I/O with the kernel's own timeouts, for both ends of the data plane.

A blocking socket with SO_RCVTIMEO and SO_SNDTIMEO costs one system call for each send and receive, and
gives up the GIL once for the whole of it; ``settimeout`` would poll before every one.
"""

from __future__ import annotations

import math
import socket
import struct
import time
from collections.abc import Callable, Iterable, Sequence

import xxhash

from kvpool.errors import UnavailableError
from kvpool.processes import cpu_count
from kvpool.transport.frames import Buffer

IOV_MAX = 1024
"""Buffers that one sendmsg or recvmsg takes (Linux)."""

SEND_BYTES_MAX = 2 << 20
"""Bytes handed to one send: while a longer one runs, acknowledgements wait, and TCP is a quarter slower."""

STEP_BYTES = 256 << 10
"""What is received at once, and then hashed: it is to be in a core's own cache still, with what the kernel needs.
While it is hashed nothing is taken from the socket: much more, and the sender has to wait."""

Control = Sequence[tuple[int, int, bytes]]
"""What ``sendmsg`` sends along."""

_TIMEVAL = struct.Struct("@ll")
SPIN_S = 3e-4
"""How long a small answer is looked for before sleeping: going to sleep and waking costs tens of microseconds.
With one core only, looking would keep the one who answers from it: it is not done there."""

TICK_S = 0.01
"""The kernel counts timeouts in ticks of its clock, and may end one by so much too early."""

_TIMEOUT_STEPS = 8


def byte_views(buffers: Iterable[Buffer]) -> list[memoryview]:
    """Return the non-empty buffers as views of bytes."""
    views = []
    for buffer in buffers:
        view = memoryview(buffer)
        if view.format != "B" or view.ndim != 1:
            view = view.cast("B")
        if len(view):
            views.append(view)
    return views


def tune_tcp(sock: socket.socket) -> None:
    """Send small frames at once, and notice a host that vanished within half a minute."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)


class TimedSocket:
    """Sends and receives all of some buffers on a blocking socket.

    ``progress_s`` bounds the wait of a single system call in which nothing moves, ``end`` (of
    ``time.monotonic``) the whole. Both raise UnavailableError, as do end-of-file and a reset.
    The wait for ``end`` is exact to an eighth of ``progress_s``, so that a usual call sets no option.
    """

    __slots__ = ("_receive_s", "_send_s", "_spin_s", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._receive_s = 0.0
        self._send_s = 0.0
        self._spin_s = SPIN_S if cpu_count() > 1 else 0.0

    def send_all(self, views: list[memoryview], progress_s: float, end: float) -> None:
        """Send all views (not empty ones), as few system calls as possible."""
        sock, first = self.sock, 0
        while first < len(views):
            self._set_send_timeout(progress_s, end)
            try:
                part = _part(views, first)
                done = sock.send(part[0]) if len(part) == 1 else sock.sendmsg(part)
            except OSError as exc:
                raise self._unsent(exc) from exc
            first = _advance(views, first, done)

    def send_first(self, view: memoryview, control: Control, progress_s: float, end: float) -> memoryview:
        """Send a view's first byte with control messages (file descriptors); returns the rest."""
        self._set_send_timeout(progress_s, end)
        try:
            return view[self.sock.sendmsg([view[:1]], control) :]
        except OSError as exc:
            raise self._unsent(exc) from exc

    def receive_exact(self, views: list[memoryview], progress_s: float, end: float) -> None:
        """Fill all views (not empty ones)."""
        first = 0
        while first < len(views):
            done = self.receive_some(views[first : first + IOV_MAX], progress_s, end, socket.MSG_WAITALL)
            first = _advance(views, first, done)

    def receive_some(self, views: Sequence[memoryview], progress_s: float, end: float, flags: int = 0) -> int:
        """Receive at least one byte into the views and return how many."""
        self.set_receive_timeout(progress_s, end)
        try:
            if len(views) == 1:
                done = self.sock.recv_into(views[0], 0, flags)
            else:
                done = self.sock.recvmsg_into(views, 0, flags)[0]
        except BlockingIOError as exc:
            raise UnavailableError(f"no answer for {self._receive_s:.3g} s") from exc
        except OSError as exc:
            raise UnavailableError(f"connection lost: {exc.strerror or exc}") from exc
        if not done:
            raise UnavailableError("the other end closed the connection")
        return done

    def spin(self) -> None:
        """Look for bytes for a moment, without taking any; whoever waits for a small answer calls this first."""
        end = time.perf_counter() + self._spin_s
        receive = self.sock.recv
        try:
            while time.perf_counter() < end:
                try:
                    receive(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
                except BlockingIOError:
                    continue
                return
        except OSError:
            return  # the receive that follows says what it is

    def set_receive_timeout(self, progress_s: float, end: float) -> None:
        """Set how long the next receive may wait; raise UnavailableError when the time is up."""
        patience = _patience(progress_s, end)
        if patience != self._receive_s:
            self._set(socket.SO_RCVTIMEO, patience)
            self._receive_s = patience

    def _set_send_timeout(self, progress_s: float, end: float) -> None:
        patience = _patience(progress_s, end)
        if patience != self._send_s:
            self._set(socket.SO_SNDTIMEO, patience)
            self._send_s = patience

    def _unsent(self, exc: OSError) -> UnavailableError:
        if isinstance(exc, BlockingIOError):
            return UnavailableError(f"the other end took no bytes for {self._send_s:.3g} s")
        return UnavailableError(f"connection lost: {exc.strerror or exc}")

    def _set(self, option: int, seconds: float) -> None:
        try:
            self.sock.setsockopt(socket.SOL_SOCKET, option, timeval(seconds))
        except OSError as exc:
            raise UnavailableError(f"connection lost: {exc.strerror or exc}") from exc


def receive_hashed(receive: Callable[[list[memoryview]], None], target: memoryview, step: int = STEP_BYTES) -> int:
    """Have ``receive`` fill a target step by step; returns its xxh3-64."""
    if len(target) <= step:
        receive([target])
        return xxhash.xxh3_64_intdigest(target)
    digest = xxhash.xxh3_64()
    for start in range(0, len(target), step):
        part = target[start : start + step]
        receive([part])
        digest.update(part)
    return digest.intdigest()


def _part(views: list[memoryview], first: int) -> list[memoryview]:
    """Return what one system call is to send."""
    size = 0
    for i in range(first, min(len(views), first + IOV_MAX)):
        view = views[i]
        if size + len(view) > SEND_BYTES_MAX:
            return [*views[first:i], view[: SEND_BYTES_MAX - size]] if size < SEND_BYTES_MAX else views[first:i]
        size += len(view)
    return views[first : first + IOV_MAX]


def timeval(seconds: float) -> bytes:
    """Return a struct timeval of at least one millisecond: zero would mean to wait for ever."""
    micros = max(1000, int(seconds * 1e6))
    return _TIMEVAL.pack(micros // 1_000_000, micros % 1_000_000)


def _patience(progress_s: float, end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise UnavailableError("deadline exceeded")
    if left >= progress_s:
        return progress_s
    step = progress_s / _TIMEOUT_STEPS
    return math.ceil(left / step) * step


def _advance(views: list[memoryview], first: int, done: int) -> int:
    """Drop ``done`` bytes from ``views[first:]``; return the new first."""
    while first < len(views):
        size = len(views[first])
        if done < size:
            if done:
                views[first] = views[first][done:]
            return first
        done -= size
        first += 1
    return first
