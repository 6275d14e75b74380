"""Small frames on an asyncio transport: the master's fast path for lookups.

Each frame is answered at once, on the loop: no task, no future, no copy of a frame that arrived whole.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from typing import cast

from kvpool.errors import KVPoolError, OverloadedError
from kvpool.transport.frames import REQUEST_BYTES_MAX, Buffer, FrameParser
from kvpool.transport.sockets import tune_tcp

After = Callable[[], None]

FrameHandler = Callable[[bytes, memoryview, str], tuple[Sequence[Buffer], After | None]]
"""Header, payload and the peer's address to the buffers of the answer (none: no answer), and what is
still to do once it is on its way, before any other frame or event is looked at."""

WRITE_HIGH_BYTES = 1 << 20
FRAMES_PER_TURN = 64


class FrameService:
    """The connections of one port: make it, and give it to ``loop.create_server`` as the protocol factory.

    ``error_frame`` makes the frame that tells a peer why it is cut off: for a bad frame, a KVPoolError
    that ``handler`` raised, or one connection too many.
    """

    def __init__(
        self,
        handler: FrameHandler,
        error_frame: Callable[[KVPoolError], bytes],
        *,
        connections_max: int = 4096,
        payload_bytes_max: int = REQUEST_BYTES_MAX,
        closed: Callable[[str, str], None] | None = None,
    ) -> None:
        self.handler = handler
        self.error_frame = error_frame
        self.connections_max = connections_max
        self.payload_bytes_max = payload_bytes_max
        self.closed = closed  # (peer, reason), when a connection was cut off
        self.connections: set[FrameProtocol] = set()

    def __call__(self) -> FrameProtocol:
        """Return the protocol of a new connection."""
        return FrameProtocol(self)

    def close(self) -> None:
        """Close every connection."""
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

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a connection, or refuse it when there are too many."""
        transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._transport = transport
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            self._peer_host = peer[0]
            sock = transport.get_extra_info("socket")
            if sock is not None:
                tune_tcp(sock)
                self._fd = sock.fileno()
        transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        if len(self._service.connections) >= self._service.connections_max:
            self._cut_off(OverloadedError(f"all {self._service.connections_max} connections are taken"))
            return
        self._service.connections.add(self)

    def data_received(self, data: bytes) -> None:
        """Answer the frames that are complete."""
        if self._transport is not None:
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

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def _cut_off(self, exc: KVPoolError) -> None:
        if self._transport is not None:
            self._transport.write(self._service.error_frame(exc))
            self._transport.close()
            self._transport = None
        if self._service.closed is not None:
            self._service.closed(self._peer_host, str(exc))
