"""The client's end of the data plane: one blocking socket, one call at a time.

A channel that met a timeout, an end-of-file or a bad frame is broken for good: a late answer must not
be taken for that of another request.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, Self, TypeVar

from google.protobuf.message import Message

from kvpool.errors import FrameError, KVPoolError, OverloadedError, UnavailableError
from kvpool.rpc.errors import from_proto
from kvpool.rpc.v1.types_pb2 import Error
from kvpool.transport.dialing import dial
from kvpool.transport.frames import HEAD, JOIN_BYTES_MAX, Buffer, frame_buffers, parse_head, parse_message, small_frame
from kvpool.transport.shm import FDS_MAX, close_fds, receive_with_fds
from kvpool.transport.sockets import TimedSocket, byte_views, timeval

REPLY_BYTES_MAX = 1 << 30
"""Payload of a reply that ``call`` takes into memory."""

STREAM_BYTES_MAX = 1 << 50

LEAST_S = 0.001
"""Given to a call whose time is over: it fails as any other does that has no time."""

_BUFFER_BYTES = 1 << 16
_STREAM_FIRST_BYTES = 1 << 12  # a streamed payload belongs in the caller's buffers: take little of it before


def time_left(deadline: float) -> float:
    """Return the seconds until a moment of the monotonic clock, for a call that must have some."""
    return max(LEAST_S, deadline - time.monotonic())


class _Request(Protocol):
    id: int

    def SerializeToString(self) -> bytes: ...  # noqa: N802 - protobuf's name


R = TypeVar("R", bound=Message)


class Channel:
    """A connection to a FrameServer or FrameService. Not for two threads at a time.

    Every method that moves bytes raises UnavailableError on a timeout, end-of-file or reset, FrameError
    for bytes that are no frame, and what the other end said when it answered with an error.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._timed = TimedSocket(sock)
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0
        self._next_id = 1
        self._progress_s = 1.0
        self._deadline = 0.0
        self._broken = False
        self.payload_left = 0
        """Bytes of the last reply's payload that were not taken yet."""
        _channels.add(self)

    @classmethod
    def connect_unix(cls, path: str | os.PathLike[str], timeout_s: float) -> Channel:
        """Connect to a unix socket. Raises UnavailableError when nobody answers there."""
        name = os.fspath(path)
        with contextlib.ExitStack() as unless_connected:
            try:
                sock = unless_connected.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                # A full backlog makes a non-blocking connect fail at once; the kernel's own timeout waits.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval(timeout_s))
                sock.connect(name)
            except OSError as exc:
                raise UnavailableError(f"cannot reach {name}: {exc.strerror or exc}") from exc
            unless_connected.pop_all()
        return cls(sock)

    @classmethod
    def connect_tcp(cls, host: str, port: int, timeout_s: float) -> Channel:
        """Connect over TCP. Raises UnavailableError when nobody answers there in time."""
        try:
            return cls(dial(host, port, timeout_s))
        except (OSError, UnicodeError) as exc:
            raise UnavailableError(f"cannot reach {host}:{port}: {exc}") from exc

    @property
    def broken(self) -> bool:
        """Whether this channel can only be closed."""
        return self._broken

    def call(
        self, message: _Request, reply_type: type[R], payload: Buffer | Sequence[Buffer] = b"", *, timeout_s: float
    ) -> tuple[R, memoryview]:
        """Send a request and return the whole answer. Sets ``message.id``."""
        reply = self.begin(message, reply_type, payload, timeout_s=timeout_s, stream=False)
        return reply, self._take_payload()

    def call_with_fds(
        self, message: _Request, reply_type: type[R], *, fds: int = 1, timeout_s: float
    ) -> tuple[R, memoryview, list[int]]:
        """Send a request and return the answer with exactly ``fds`` file descriptors, now the caller's."""
        received: list[int] = []
        if not 0 <= fds <= FDS_MAX:
            raise ValueError(f"fds must be from 0 to {FDS_MAX}")
        try:
            reply = self.begin(message, reply_type, timeout_s=timeout_s, stream=False, fds=received)
            payload = self._take_payload()
            if len(received) != fds:
                self.close()
                raise FrameError(f"the answer carries {len(received)} file descriptors, not {fds}")
        except KVPoolError:
            close_fds(received)
            raise
        return reply, payload, received

    def start(
        self,
        message: _Request,
        payload: Buffer | Sequence[Buffer] = b"",
        *,
        timeout_s: float,
        progress_s: float | None = None,
    ) -> None:
        """Send a request; its answer is for ``finish`` or ``proceed``, and the time until then the caller's."""
        self._open_call(timeout_s, progress_s)
        with self._breaking():
            self._send(message, payload)

    def finish(self, message: _Request, reply_type: type[R], *, soon: bool) -> tuple[R, memoryview]:
        """Return the whole answer to the request that ``start`` sent; ``soon``: it is worth looking out for."""
        return self._receive(message, reply_type, stream=False, fds=None, soon=soon), self._take_payload()

    def proceed(self, message: _Request, reply_type: type[R], *, progress_s: float) -> R:
        """Return the header of the answer to the request that ``start`` sent, as ``begin`` does.

        ``progress_s`` bounds every wait for its payload.
        """
        reply = self._receive(message, reply_type, stream=True, fds=None, soon=False)
        self._progress_s = progress_s
        return reply

    def send_only(self, message: _Request, payload: Buffer | Sequence[Buffer] = b"", *, timeout_s: float) -> None:
        """Send a request that has no answer."""
        self._open_call(timeout_s, None)
        with self._breaking():
            self._send(message, payload)

    def begin(
        self,
        message: _Request,
        reply_type: type[R],
        payload: Buffer | Sequence[Buffer] = b"",
        *,
        timeout_s: float,
        progress_s: float | None = None,
        stream: bool = True,
        fds: list[int] | None = None,
    ) -> R:
        """Send a request and return the answer's header; ``payload_left`` bytes then wait for ``recv_into``.

        ``timeout_s`` bounds the whole call with its payload, ``progress_s`` every wait for the next bytes.
        """
        self._open_call(timeout_s, progress_s)
        with self._breaking():
            try:
                self._send(message, payload)
            except UnavailableError:
                self._raise_last_words(reply_type)
                raise
        return self._receive(message, reply_type, stream=stream, fds=fds, soon=True)

    def _receive(
        self, message: _Request, reply_type: type[R], *, stream: bool, fds: list[int] | None, soon: bool
    ) -> R:
        """Return the answer's header; ``soon`` as in ``finish``."""
        with self._breaking():
            if soon and self._start == self._end:
                self._timed.spin()
            reply, self.payload_left = self._receive_header(reply_type, stream=stream, fds=fds)
            if reply.id != message.id:  # type: ignore[attr-defined]
                if reply.HasField("error"):
                    error = from_proto(reply.error)  # type: ignore[attr-defined]
                    if not reply.id:  # type: ignore[attr-defined]
                        raise error  # about the whole connection
                    raise UnavailableError(f"an earlier request was refused: {error}")  # which nobody waited for
                raise FrameError(f"answer to request {reply.id}, not {message.id}")  # type: ignore[attr-defined]
        if reply.HasField("error"):
            self._take_payload()
            raise from_proto(reply.error)  # type: ignore[attr-defined]
        return reply

    def recv_into(self, buffers: Sequence[memoryview]) -> None:
        """Fill buffers with the next bytes of the payload, with no copy in between."""
        if self._broken:
            raise UnavailableError("the channel is closed")
        views = byte_views(buffers)
        size = sum(map(len, views))
        with self._breaking():
            if size > self.payload_left:
                raise FrameError(f"the payload has {self.payload_left} bytes left, not {size}")
            while views and self._start < self._end:
                early = min(len(views[0]), self._end - self._start)
                views[0][:early] = self._view[self._start : self._start + early]
                self._start += early
                views[0] = views[0][early:]
                if not len(views[0]):
                    del views[0]
            self._timed.receive_exact(views, self._progress_s, self._deadline)
            self.payload_left -= size

    def is_usable(self) -> bool:
        """Return whether another call may be made: nothing is left over and the other end is there."""
        if self._broken or self.payload_left or self._start < self._end:
            return False
        try:
            self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False  # end-of-file, or bytes that nobody asked for

    def close(self) -> None:
        """Close the socket; the channel is then broken."""
        self._broken = True
        self.payload_left = 0
        self._sock.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close."""
        self.close()

    # ---- inside -------------------------------------------------------------------------------------

    def _open_call(self, timeout_s: float, progress_s: float | None) -> None:
        if self._broken:
            raise UnavailableError("the channel is closed")
        if self.payload_left:
            self.close()
            raise UnavailableError("the last answer was not read to its end")
        self._progress_s = timeout_s if progress_s is None else min(progress_s, timeout_s)
        self._deadline = time.monotonic() + timeout_s

    @contextlib.contextmanager
    def _breaking(self) -> Iterator[None]:
        try:
            yield
        except BaseException:  # KeyboardInterrupt too: the stream is in an unknown state
            self.close()
            raise

    def _send(self, message: _Request, payload: Buffer | Sequence[Buffer]) -> None:
        message.id = self._next_id
        self._next_id += 1
        if isinstance(payload, bytes) and len(payload) <= JOIN_BYTES_MAX:
            frame = [memoryview(small_frame(message, payload))]  # type: ignore[arg-type]
            self._timed.send_all(frame, self._progress_s, self._deadline)
            return
        views = byte_views((payload,) if isinstance(payload, (bytes, bytearray, memoryview)) else payload)
        frame = frame_buffers(message, views)  # type: ignore[arg-type]
        if sum(map(len, views)) <= JOIN_BYTES_MAX:
            frame = [memoryview(b"".join(frame))]
        self._timed.send_all(frame, self._progress_s, self._deadline)

    def _receive_header(self, reply_type: type[R], *, stream: bool, fds: list[int] | None) -> tuple[R, int]:
        first = _STREAM_FIRST_BYTES if stream else _BUFFER_BYTES
        self._want(HEAD.size, first, fds)
        maximum = STREAM_BYTES_MAX if stream else REPLY_BYTES_MAX
        header_bytes, payload_bytes = parse_head(self._buffer, self._start, maximum)
        self._start += HEAD.size
        if header_bytes <= _BUFFER_BYTES:
            self._want(header_bytes, first, fds)
            body: Buffer = self._view[self._start : self._start + header_bytes]
            self._start += header_bytes
        else:
            body = bytearray(header_bytes)
            self.payload_left = header_bytes
            self.recv_into((memoryview(body),))
        return parse_message(reply_type, body), payload_bytes

    def _want(self, size: int, at_most: int, fds: list[int] | None) -> None:
        """Have ``size`` bytes in the buffer, reading no more than ``at_most`` at a time."""
        have = self._end - self._start
        if have >= size:
            return
        if self._start:
            self._buffer[:have] = self._buffer[self._start : self._end]
            self._start, self._end = 0, have
        while self._end < size:
            room = self._view[self._end : max(size, min(self._end + at_most, _BUFFER_BYTES))]
            if fds is None:
                self._end += self._timed.receive_some((room,), self._progress_s, self._deadline)
            else:
                self._end += self._receive_fds(room, fds)

    def _receive_fds(self, room: memoryview, fds: list[int]) -> int:
        self._timed.set_receive_timeout(self._progress_s, self._deadline)
        try:
            done = receive_with_fds(self._sock, room, fds)
        except OSError as exc:
            raise UnavailableError(f"no answer: {exc.strerror or exc}") from exc
        if not done:
            raise UnavailableError("the other end closed the connection")
        return done

    def _take_payload(self) -> memoryview:
        size = self.payload_left
        if not size:
            return memoryview(b"")
        if size <= self._end - self._start:
            data = memoryview(bytes(self._view[self._start : self._start + size]))
            self._start += size
            self.payload_left = 0
            return data
        with self._breaking():
            if size > REPLY_BYTES_MAX:
                raise FrameError(f"payload has {size} bytes, at most {REPLY_BYTES_MAX} are allowed")
        data = memoryview(bytearray(size))
        self.recv_into((data,))
        return data

    def _raise_last_words(self, reply_type: type[R]) -> None:
        """Raise what the other end said before it stopped reading, if it said anything."""
        self._progress_s, self._deadline = 0.05, time.monotonic() + 0.05
        try:
            reply, _ = self._receive_header(reply_type, stream=False, fds=None)
        except (UnavailableError, FrameError):
            return  # not a word
        error: Error = reply.error  # type: ignore[attr-defined]
        if error.code and reply.id in {0, self._next_id - 1}:  # type: ignore[attr-defined]
            raise from_proto(error)


class ChannelPool:
    """Up to ``channels_max`` channels to one place, made when first needed, each lent to one caller at a time."""

    def __init__(self, connect: Callable[[float], Channel], *, channels_max: int = 4) -> None:
        """``connect`` makes a channel within the seconds it is given."""
        self._connect = connect
        self._channels_max = channels_max
        self._reset()
        _pools.add(self)

    def __repr__(self) -> str:
        """Show how many are idle and lent."""
        return f"<ChannelPool idle {len(self._idle)} lent {self._lent} of {self._channels_max}>"

    @contextlib.contextmanager
    def channel(self, timeout_s: float) -> Iterator[Channel]:
        """Lend a channel. OverloadedError when none gets free in time, UnavailableError when none can be made."""
        deadline = time.monotonic() + timeout_s
        channel = self._borrow(timeout_s)
        pid = self._pid
        try:
            if channel is None:
                channel = self._connect(time_left(deadline))
            yield channel
        finally:
            self._give_back(channel, pid)

    @property
    def any_free(self) -> bool:
        """Whether a channel could be lent now."""
        return self._lent < self._channels_max

    def close(self) -> None:
        """Close idle channels now, lent ones when they come back."""
        with self._changed:
            self._closed = True
            for channel in self._idle:
                channel.close()
            self._idle.clear()
            self._changed.notify_all()

    def _borrow(self, timeout_s: float) -> Channel | None:
        with self._changed:
            free = self._changed.wait_for(lambda: self._closed or self._lent < self._channels_max, timeout_s)
            if self._closed:
                raise UnavailableError("the channels are closed")
            if not free:
                raise OverloadedError(f"all {self._channels_max} channels are in use")
            self._lent += 1
            while self._idle:
                channel = self._idle.pop()
                if channel.is_usable():
                    return channel
                channel.close()
            return None

    def _give_back(self, channel: Channel | None, pid: int) -> None:
        if pid != self._pid:
            return  # forked while lent: this copy of the pool has never lent it
        with self._changed:
            self._lent -= 1
            if channel is not None:
                if self._closed or channel.broken or channel.payload_left:
                    channel.close()
                else:
                    self._idle.append(channel)
            self._changed.notify()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._idle: list[Channel] = []
        self._lent = 0
        self._closed = getattr(self, "_closed", False)


_channels: weakref.WeakSet[Channel] = weakref.WeakSet()
_pools: weakref.WeakSet[ChannelPool] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    """Drop what the parent talks through: its end-of-file must not depend on us."""
    for channel in list(_channels):
        channel.close()
    for pool in list(_pools):
        pool._reset()  # its lock may be held by a thread that does not exist here


os.register_at_fork(after_in_child=_after_fork_in_child)
