"""Small frames on an asyncio transport: the master's fast path for lookups.

Each frame is answered at once, on the loop: no task, no future, no copy of a frame that arrived whole.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from typing import cast

from kvpool.errors import KVPoolError, OverloadedError, UnavailableError
from kvpool.transport.frames import REQUEST_BYTES_MAX, Buffer, FrameParser
from kvpool.transport.sockets import tune_tcp

After = Callable[[], None]

FrameHandler = Callable[[bytes, memoryview, str], tuple[Sequence[Buffer], After | None]]
"""Header, payload and the peer's address to the buffers of the answer (none: no answer), and what is
still to do once it is on its way, before any other frame or event is looked at."""

WRITE_HIGH_BYTES = 1 << 20
FRAMES_PER_TURN = 64

STUCK_S = 30.0
"""How long a peer may leave a frame unfinished, or our answers unread, without any progress."""

STUCK_SWEEPS = 3
"""So many looks find a stuck connection unchanged: counted, not timed, so that a stall of our own costs nobody's."""


class FrameService:
    """The connections of one port: make it, and give it to ``loop.create_server`` as the protocol factory.

    ``check`` takes a new peer's address and raises KVPoolError for one that is not let in. ``error_frame`` makes
    the frame that tells a peer why it is cut off: for that, for a bad frame, for a KVPoolError that ``handler``
    raised, for one connection too many, or after ``stuck_s`` in which nothing moved in the middle of a frame.
    """

    def __init__(
        self,
        handler: FrameHandler,
        error_frame: Callable[[KVPoolError], bytes],
        *,
        check: Callable[[str], None] = lambda _: None,
        connections_max: int = 4096,
        payload_bytes_max: int = REQUEST_BYTES_MAX,
        stuck_s: float = STUCK_S,
        closed: Callable[[str, str], None] | None = None,
    ) -> None:
        self.handler = handler
        self.error_frame = error_frame
        self.check = check
        self.connections_max = connections_max
        self.payload_bytes_max = payload_bytes_max
        self.stuck_s = stuck_s
        self.closed = closed  # (peer, reason), when a connection was cut off
        self.connections: set[FrameProtocol] = set()
        self._sweep_at: asyncio.TimerHandle | None = None

    def __call__(self) -> FrameProtocol:
        """Return the protocol of a new connection."""
        return FrameProtocol(self)

    def add(self, connection: FrameProtocol) -> None:
        """Count a connection, and look at it from time to time until it is forgotten."""
        self.connections.add(connection)
        if self._sweep_at is None:
            self._sweep_later()

    def _sweep_later(self) -> None:
        pause_s = self.stuck_s / STUCK_SWEEPS
        self._sweep_at = asyncio.get_running_loop().call_later(pause_s, self._sweep)

    def _sweep(self) -> None:
        self._sweep_at = None
        for connection in list(self.connections):
            connection.look()
        if self.connections:
            self._sweep_later()

    def close(self) -> None:
        """Close every connection."""
        if self._sweep_at is not None:
            self._sweep_at.cancel()
            self._sweep_at = None
        for connection in list(self.connections):
            connection.abort()


class FrameProtocol(asyncio.Protocol):
    """One connection of a FrameService."""

    def __init__(self, service: FrameService) -> None:
        self._service = service
        self._handler = service.handler
        self._parser = FrameParser(service.payload_bytes_max)
        self._transport: asyncio.Transport | None = None
        self._peer_host = ""
        self._fd = -1
        self._paused = False  # the peer does not read our answers
        self._reading = True
        self._turn: asyncio.Handle | None = None
        self._pieces = 0  # received
        self._seen = (0, 0)  # pieces and bytes not taken yet, when the service looked
        self._stuck = 0  # looks in a row that have found it so

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a connection; refuse one of a peer that is not let in, or when there are too many."""
        transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._transport = transport
        peer = transport.get_extra_info("peername")
        sock = transport.get_extra_info("socket")
        if isinstance(peer, tuple):
            self._peer_host = peer[0]
            if sock is not None:
                tune_tcp(sock)
                self._fd = sock.fileno()
        elif sock is not None and sock.family != socket.AF_UNIX:
            transport.abort()  # a peer that has reset its connection already: nobody knows who asks
            return
        transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        try:
            self._service.check(self._peer_host)
            if len(self._service.connections) >= self._service.connections_max:
                raise OverloadedError(f"all {self._service.connections_max} connections are taken")
        except KVPoolError as exc:
            self._cut_off(exc)
            return
        self._service.add(self)

    def data_received(self, data: bytes) -> None:
        """Answer the frames that are complete."""
        if self._transport is not None:
            self._pieces += 1
            self._parser.feed(data)
            if self._turn is None:
                self._answer()

    def _answer(self) -> None:
        parser, transport = self._parser, self._transport
        self._turn = None
        if transport is None:
            return
        try:
            for _ in range(FRAMES_PER_TURN):
                if self._paused or transport.is_closing():
                    return
                header = parser.header()
                if header is None:
                    break
                payload = parser.payload()
                if payload is None:
                    break
                buffers, after = self._handler(header.message, payload, self._peer_host)
                if buffers:
                    self._write(transport, buffers[0] if len(buffers) == 1 else b"".join(buffers))
                if after is not None:
                    after()
            else:
                # Others have their turn; nothing more is read meanwhile.
                self._read(False)
                self._turn = asyncio.get_running_loop().call_soon(self._answer)
                return
        except KVPoolError as exc:
            self._cut_off(exc)
            return
        self._read(True)

    def _write(self, transport: asyncio.Transport, data: Buffer) -> None:
        """Send now: the transport itself would wait for the end of the loop's turn."""
        if self._fd >= 0 and not transport.get_write_buffer_size():
            try:
                sent = os.write(self._fd, data)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError:
                return  # the transport learns it from its next read
            if sent == len(data):
                return
            data = memoryview(data)[sent:]
        transport.write(data)

    def _read(self, on: bool) -> None:
        transport = self._transport
        if on != self._reading and transport is not None and not transport.is_closing():
            self._reading = on
            if on:
                transport.resume_reading()
            else:
                transport.pause_reading()

    def pause_writing(self) -> None:
        """Look at no further request while the peer does not read our answers."""
        self._paused = True
        self._read(False)

    def resume_writing(self) -> None:
        """Go on."""
        self._paused = False
        if self._turn is None and self._transport is not None:
            self._turn = asyncio.get_running_loop().call_soon(self._answer)

    def connection_lost(self, exc: BaseException | None) -> None:  # noqa: ARG002
        """Forget the connection."""
        self._transport = None
        self._fd = -1  # closed, and soon somebody else's
        if self._turn is not None:
            self._turn.cancel()
        self._service.connections.discard(self)

    def look(self) -> None:
        """Cut the connection off once its peer neither sends the rest of a frame nor takes what it was sent."""
        transport = self._transport
        if transport is None:
            return
        waiting = transport.get_write_buffer_size()
        seen = (self._pieces, waiting)
        self._stuck = self._stuck + 1 if seen == self._seen and (waiting or self._parser.buffered) else 0
        self._seen = seen
        if self._stuck < STUCK_SWEEPS:
            return
        closing = transport.is_closing()
        if not closing:
            what = "in the middle of a frame" if not waiting else "while answers wait to be read"
            self._cut_off(UnavailableError(f"no progress for {self._service.stuck_s:g} s {what}"))
        if waiting:
            transport.abort()  # closing would wait for the peer to take it

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def _cut_off(self, exc: KVPoolError) -> None:
        if self._transport is not None:
            self._transport.write(self._service.error_frame(exc))
            self._transport.close()
        if self._service.closed is not None:
            self._service.closed(self._peer_host, str(exc))
