"""One connection of a FrameServer: reads frames on the loop, lends its socket to a thread for bulk data."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from google.protobuf.message import Message

from kvpool.errors import FrameError, InvalidArgumentError, KVPoolError, OverloadedError, UnavailableError
from kvpool.rpc.errors import to_proto
from kvpool.rpc.v1.node_pb2 import NodeFrame, NodeFrameReply
from kvpool.transport.frames import JOIN_BYTES_MAX, Buffer, FrameParser, frame_buffers, parse_message, small_frame
from kvpool.transport.shm import fd_control
from kvpool.transport.sockets import IOV_MAX, TimedSocket, byte_views

if TYPE_CHECKING:
    from kvpool.transport.server import FrameServer

log = logging.getLogger(__name__)

READ_BYTES = 1 << 16
READ_BYTES_MAX = 1 << 20
READ_AHEAD_BYTES_MAX = 1 << 18
"""Pipelined requests that are taken in while one is in work."""

OUTPUT_PAUSE_BYTES = 1 << 20
"""Replies waiting for a slow reader before its next request is looked at."""

OUTPUT_BYTES_MAX = 64 << 20
"""Replies waiting for a reader before it is given up."""

READS_PER_TURN = 8
FRAMES_PER_TURN = 64
TURN_S = 0.002
"""Frames of one connection, and how long it takes to begin with the last one, before the others have their turn."""

RATE_BYTES_S_MIN = 1 << 20
"""A peer slower than this over a whole transfer loses it: it holds a thread meanwhile."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end: process and user on a unix socket, the IP address on TCP."""

    pid: int | None
    uid: int | None
    host: str
    unix: bool


class Handler(Protocol):
    """What a FrameServer does with its connections; everything is called on the loop's thread.

    A KVPoolError raised by ``opened`` refuses the connection; raised by the others it becomes the
    Error reply to that request.
    """

    def opened(self, conn: Connection) -> None:
        """Take a new connection."""

    def frame(self, conn: Connection, message: NodeFrame, payload: memoryview) -> None:
        """Take a request; it is in work until this returns, or what it started by ``run_blocking`` or ``hold`` ends."""

    def streams_payload(self, conn: Connection, message: NodeFrame, payload_bytes: int) -> bool:
        """Return True to take this payload by ``run_blocking``; ``frame`` is then not called."""

    def closed(self, conn: Connection, reason: str) -> None:
        """Forget a connection; called once, after the work on it has ended."""


class BlockingIO:
    """The socket in the hands of a thread."""

    def __init__(self, timed: TimedSocket, parser: FrameParser, payload_left: int) -> None:
        self._timed = timed
        self._parser = parser
        self.payload_left = payload_left
        self.sent = False
        self.broken: UnavailableError | None = None

    def send_all(self, buffers: Sequence[Buffer], deadline_s: float, fds: Sequence[int] = ()) -> None:
        """Send buffers; UnavailableError when the peer takes nothing for ``deadline_s``, or is far too slow."""
        views = byte_views(buffers)
        self.sent = True
        end = self._end(views, deadline_s)
        try:
            if fds:
                views = byte_views((self._timed.send_first(views[0], fd_control(fds), deadline_s, end), *views[1:]))
            self._timed.send_all(views, deadline_s, end)
        except UnavailableError as exc:
            self.broken = exc
            raise

    def recv_exact_into(self, buffers: Sequence[memoryview], deadline_s: float) -> None:
        """Fill buffers from the request's payload, what has arrived before first. Errors as ``send_all``."""
        views = byte_views(buffers)
        size = sum(map(len, views))
        if size > self.payload_left:
            raise InvalidArgumentError("payload", f"has {self.payload_left} bytes left, {size} are needed")
        while views and self._parser.buffered:
            early = self._parser.take(len(views[0]))
            views[0][: len(early)] = early
            self.payload_left -= len(early)
            views[0] = views[0][len(early) :]
            if not len(views[0]):
                del views[0]
        left = sum(map(len, views))
        try:
            self._timed.receive_exact(views, deadline_s, self._end(views, deadline_s))
        except UnavailableError as exc:
            self.broken = exc
            raise
        self.payload_left -= left

    @staticmethod
    def _end(views: Sequence[memoryview], deadline_s: float) -> float:
        return time.monotonic() + deadline_s + sum(map(len, views)) / RATE_BYTES_S_MIN


class _State(enum.Enum):
    IDLE = "idle"
    HELD = "held"
    BLOCKING = "blocking"


_Work = tuple[Callable[[BlockingIO], Any], Callable[[Any, BaseException | None], None]]


class Connection:
    """A peer's socket. All methods belong to the loop's thread."""

    def __init__(self, server: FrameServer, sock: socket.socket, peer: Peer, conn_id: int) -> None:
        self.id = conn_id
        self.peer = peer
        self.active_at = 0.0
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._timed = TimedSocket(sock)
        self._parser = FrameParser(server.stream_bytes_max)
        self._message: NodeFrame | None = None  # its payload is on its way
        self._state = _State.IDLE
        self._work: _Work | None = None  # to be started when the handler has returned
        self._in_step = False
        self._stream_left = 0  # payload on the socket that the request in work may take
        self._skip = 0  # payload that nobody wants
        self._out: deque[tuple[memoryview, tuple[int, ...]]] = deque()
        self._out_bytes = 0
        self._reading = False
        self._turn_asked = False
        self._reason: str | None = None

    def __repr__(self) -> str:
        """Show id, peer and state."""
        peer = f"pid {self.peer.pid}" if self.peer.unix else self.peer.host
        return f"<Connection {self.id} {peer} {self._reason or self._state.value}>"

    @property
    def is_open(self) -> bool:
        """Whether replies can still be sent."""
        return self._reason is None

    @property
    def stuck(self) -> bool:
        """Whether it is the peer's turn in the middle of a frame."""
        if self._state is _State.BLOCKING:
            return False  # these have deadlines of their own
        waiting_for_rest = self._state is _State.IDLE and (self._parser.buffered > 0 or self._skip > 0)
        return self._out_bytes > 0 or waiting_for_rest

    def start(self) -> None:
        """Begin to read."""
        self.active_at = self._loop.time()
        self._update_reading()

    def reply(self, message: Message, payload: Buffer | Sequence[Buffer] = b"", fds: Sequence[int] = ()) -> None:
        """Send a reply now, or as far as the peer takes it; the rest waits, so leave payload and fds as they are.

        Too much that waits closes the connection. Does nothing on a closed one.
        """
        if self._reason is not None:
            return
        if self._state is _State.BLOCKING:
            raise RuntimeError("the socket is lent to a thread; reply when it is done")
        if isinstance(payload, bytes) and len(payload) <= JOIN_BYTES_MAX:
            self._put([memoryview(small_frame(message, payload))], tuple(fds))
            return
        views = byte_views((payload,) if isinstance(payload, (bytes, bytearray, memoryview)) else payload)
        frame = frame_buffers(message, views)
        if sum(map(len, views)) <= JOIN_BYTES_MAX:
            frame = [memoryview(b"".join(frame))]
        self._put(frame, tuple(fds))

    def refuse(self, exc: KVPoolError) -> None:
        """Say why, and close."""
        self.reply_error(0, exc)
        self.close(f"refused: {exc}")

    def reply_error(self, message_id: int, exc: BaseException) -> None:
        """Send the Error reply to a request."""
        self.reply(NodeFrameReply(id=message_id, error=to_proto(exc)))

    def hold(self) -> None:
        """Take no further frame until ``release``: the request in work is answered later."""
        if self._state is _State.IDLE and self._reason is None:
            self._state = _State.HELD

    def release(self) -> None:
        """End ``hold``; an untaken payload is read and dropped."""
        if self._state is _State.HELD:
            self._state = _State.IDLE
            self._end_request()
            self._ask_turn()

    def run_blocking(
        self, work: Callable[[BlockingIO], T], done: Callable[[T | None, BaseException | None], None]
    ) -> None:
        """Run ``work`` in a thread that owns the socket, then ``done(result, error)`` on the loop; reading waits.

        Waiting replies are sent first. An error after part of an answer was sent closes the connection.
        ``done`` is always called, also when the connection is closed meanwhile.
        """
        if self._work is not None or self._state is _State.BLOCKING:
            raise RuntimeError("one work at a time on a connection")
        if self._reason is not None:
            self._loop.call_soon(done, None, UnavailableError(self._reason))
            return
        self._state = _State.BLOCKING
        self._work = (work, done)
        if not self._in_step:
            self._start_work(work, done)

    def close(self, reason: str) -> None:
        """Close; work in a thread is interrupted, and the handler's ``closed`` follows when that has ended."""
        if self._reason is not None:
            return
        self._reason = reason
        self._stop_watching()
        self._out.clear()
        self._out_bytes = 0
        if self._state is _State.BLOCKING:
            with contextlib.suppress(OSError):  # the peer was faster
                self._sock.shutdown(socket.SHUT_RDWR)  # wakes the thread; the number must not be reused yet
        else:
            self._forget()

    # ---- reading ------------------------------------------------------------------------------------

    def _on_readable(self) -> None:
        # Until nothing is left: libuv stops watching a socket that was reset, after a single call, and
        # that call may find data in front of the error. The last, empty read costs no peer any time.
        for _ in range(READS_PER_TURN):
            if not self._reading or not self._read_once():
                return
        if self._reading:
            self._loop.call_soon(self._on_readable)

    def _read_once(self) -> bool:
        """Read and handle what is there; False when there was nothing."""
        size = min(max(READ_BYTES, self._skip, self._parser.missing), READ_BYTES_MAX)
        try:
            data = self._sock.recv(size)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as exc:
            self.close(f"connection lost: {exc.strerror}")
            return False
        if not data:
            self.close("the peer closed the connection" + (" within a frame" if self.stuck else ""))
            return False
        self.active_at = self._loop.time()
        self._parser.feed(data)
        self._turn()
        return True

    def _ask_turn(self) -> None:
        if not self._turn_asked and self._reason is None:
            self._turn_asked = True
            self._loop.call_soon(self._asked_turn)

    def _asked_turn(self) -> None:
        self._turn_asked = False
        self._turn()

    def _turn(self) -> None:
        """Handle the frames that are there, as far as the peer takes our answers."""
        self._in_step = True
        try:
            end = time.monotonic() + TURN_S
            for _ in range(FRAMES_PER_TURN):
                if not self._may_step() or not self._step():
                    break
                if time.monotonic() > end:
                    self._ask_turn()
                    break
            else:
                self._ask_turn()
        except Exception as exc:  # a defect met by one request must not leave its peer waiting
            self._give_up(exc)
        finally:
            self._in_step = False
        self._update_reading()

    def _may_step(self) -> bool:
        return self._reason is None and self._state is _State.IDLE and self._out_bytes <= OUTPUT_PAUSE_BYTES

    def _step(self) -> bool:
        """Handle one frame; False when there is no whole one."""
        if self._skip:
            self._skip -= len(self._parser.take(self._skip))
            if self._skip:
                return False
        header = self._parser.header()
        if header is None:
            return False
        message = self._message
        if message is None:
            message = self._message = parse_message(NodeFrame, header.message)
            if header.payload_bytes and self._offer_stream(message, header.payload_bytes):
                return True
        payload = self._parser.payload()
        if payload is None:
            return False
        self._message = None
        try:
            if message.WhichOneof("body") is None:
                raise InvalidArgumentError("body", "is no request that this node knows")
            self._server.handler.frame(self, message, payload)
        except FrameError:
            raise
        except KVPoolError as exc:
            self._answer_error(message.id, exc)
        self._after_handler()
        return True

    def _offer_stream(self, message: NodeFrame, payload_bytes: int) -> bool:
        self._stream_left = payload_bytes
        try:
            taken = self._server.handler.streams_payload(self, message, payload_bytes)
        except FrameError:
            raise
        except KVPoolError as exc:
            taken = True
            self._answer_error(message.id, exc)
        if not taken:
            self._stream_left = 0
            if payload_bytes > self._server.payload_bytes_max:
                raise FrameError(
                    f"payload has {payload_bytes} bytes, at most {self._server.payload_bytes_max} are allowed"
                )
            return False
        self._message = None
        self._parser.skip_header()
        self._after_handler()
        return True

    def _answer_error(self, message_id: int, exc: Exception) -> None:
        if self._work is not None:  # asked for a thread, then thought better of it
            self._work = None
            self._state = _State.IDLE
        self.reply_error(message_id, exc)

    def _give_up(self, exc: Exception) -> None:
        """Say why, then close: this connection alone."""
        if self._reason is not None:
            return
        if not isinstance(exc, KVPoolError):
            log.error("%r: closing after an unexpected error", self, exc_info=exc)
        self._answer_error(0, exc)
        self.close(f"bad frame: {exc}" if isinstance(exc, FrameError) else f"error: {exc!r}")

    def _after_handler(self) -> None:
        if self._work is not None:
            self._start_work(*self._work)
        elif self._state is _State.IDLE:
            self._end_request()

    def _end_request(self) -> None:
        self._skip, self._stream_left = self._stream_left, 0

    def _update_reading(self) -> None:
        # Idle and not behind, only the rest of one frame can be missing, and its size is limited.
        room = not self._turn_asked if self._state is _State.IDLE else self._parser.buffered < READ_AHEAD_BYTES_MAX
        want = (
            room
            and self._reason is None
            and self._state is not _State.BLOCKING
            and self._out_bytes <= OUTPUT_PAUSE_BYTES
        )
        if want != self._reading:
            self._reading = want
            if want:
                self._loop.add_reader(self._sock, self._on_readable)
            else:
                self._loop.remove_reader(self._sock)

    # ---- the thread's turn --------------------------------------------------------------------------

    def _start_work(self, work: Callable[[BlockingIO], Any], done: Callable[[Any, BaseException | None], None]) -> None:
        self._work = None
        if self._reason is not None:  # closed by the handler right after it asked
            self._state = _State.IDLE
            self._loop.call_soon(done, None, UnavailableError(self._reason))
            self._forget()
            return
        self._stop_watching()
        io = BlockingIO(self._timed, self._parser, self._stream_left)
        early, self._out, self._out_bytes = self._out, deque(), 0
        begun = threading.Lock()

        def run() -> None:
            if not begun.acquire(blocking=False):
                return
            result: Any = None
            error: BaseException | None = None
            try:
                self._sock.setblocking(True)
                self._flush_blocking(io, early)
                result = work(io)
            except BaseException as exc:  # whatever it is, `done` gets it on the loop
                error = exc
            try:
                self._loop.call_soon_threadsafe(self._work_ended, io, done, result, error)
            except RuntimeError:
                log.debug("%r: the loop is gone", self)

        try:
            self._server.executor.submit(run)
        except RuntimeError as refusal:  # `run` may be in the queue all the same, or be run by a thread that was there
            if begun.acquire(blocking=False):
                self._refuse_work(io, done, OverloadedError(f"no thread for a transfer: {refusal}"), told=not early)

    def _refuse_work(
        self, io: BlockingIO, done: Callable[[Any, BaseException | None], None], exc: KVPoolError, *, told: bool
    ) -> None:
        """End work that was not begun, soon, and the connection; ``told``: no answer before it is in the middle."""

        def refused(_: Any, error: BaseException | None) -> None:
            done(None, error)
            self._give_up(exc)

        io.broken = None if told else UnavailableError(str(exc))
        self._loop.call_soon(self._work_ended, io, refused, None, exc)

    def _flush_blocking(self, io: BlockingIO, early: deque[tuple[memoryview, tuple[int, ...]]]) -> None:
        io.sent = bool(early)
        while early:
            view, fds = early.popleft()
            io.send_all((view,), self._server.frame_timeout_s, fds)
        io.sent = False

    def _work_ended(
        self,
        io: BlockingIO,
        done: Callable[[Any, BaseException | None], None],
        result: Any,
        error: BaseException | None,
    ) -> None:
        self._state = _State.IDLE
        if self._reason is not None:
            try:
                done(None, error or UnavailableError(self._reason))
            finally:
                self._forget()
            return
        self._stream_left = io.payload_left
        self._sock.setblocking(False)
        self.active_at = self._loop.time()
        broken = io.broken or (error if error is not None and io.sent else None)
        if broken is not None:
            self.close(str(broken) or repr(broken))
        try:
            done(result, error)
        except Exception as exc:  # as in _turn
            self._give_up(exc)
        if self._state is _State.IDLE:
            self._end_request()
            self._turn()

    # ---- writing ------------------------------------------------------------------------------------

    def _put(self, views: list[memoryview], fds: tuple[int, ...]) -> None:
        if not self._out:
            try:
                if fds or len(views) > 1:
                    sent = self._sock.sendmsg(views[:IOV_MAX], fd_control(fds))
                else:
                    sent = self._sock.send(views[0])
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError as exc:
                self.close(f"connection lost: {exc.strerror}")
                return
            if sent:
                fds = ()
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if not views:
                return
            views[0] = views[0][sent:]
            self._loop.add_writer(self._sock, self._on_writable)
        for view in views:
            self._out.append((view, fds))
            self._out_bytes += len(view)
            fds = ()
        if self._out_bytes > OUTPUT_BYTES_MAX:
            self.close(f"the peer left {self._out_bytes} bytes of replies unread")

    def _on_writable(self) -> None:
        try:
            while self._out:
                view, fds = self._out[0]
                sent = self._sock.sendmsg([view], fd_control(fds))
                self._out_bytes -= sent
                if sent < len(view):
                    self._out[0] = (view[sent:], ())
                else:
                    self._out.popleft()
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as exc:
            self.close(f"connection lost: {exc.strerror}")
            return
        self.active_at = self._loop.time()
        if not self._out:
            self._loop.remove_writer(self._sock)
        self._turn()

    def _stop_watching(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._sock)
        if self._out:
            self._loop.remove_writer(self._sock)

    def _forget(self) -> None:
        self._sock.close()
        self._server.connection_ended(self, self._reason or "")
