"""A FrameServer with a handler that does one odd thing per request, on a loop in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from kvpool.errors import RefusedError, TooLargeError
from kvpool.rpc.v1.node_pb2 import (
    Attached,
    Committed,
    Got,
    LocalPrefixReply,
    NodeFrame,
    NodeFrameReply,
    Pinned,
)
from kvpool.transport.frames import frame_buffers
from kvpool.transport.server import BlockingIO, Connection, FrameServer
from kvpool.transport.shm import create_memfd, seal

WAIT_S = 10.0
SEGMENT_BYTES = 8192


class OddHandler:
    """What each request does is in ``frame``; records openings and closings."""

    def __init__(self) -> None:
        self.fd = create_memfd("test", SEGMENT_BYTES)
        seal(self.fd)
        self.closed_reasons: list[str] = []
        self.changed = threading.Condition()
        self.written = bytearray()
        self.done_errors: list[BaseException | None] = []
        self.released: list[int] = []
        self.refuse = False
        self.deadline_s = 5.0

    def opened(self, conn: Connection) -> None:
        if self.refuse:
            raise RefusedError("protected mode: only loopback")

    def closed(self, conn: Connection, reason: str) -> None:
        with self.changed:
            self.closed_reasons.append(reason)
            self.changed.notify_all()

    def wait_for(self, condition: Callable[[], Any]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, WAIT_S)

    def frame(self, conn: Connection, message: NodeFrame, payload: memoryview) -> None:
        kind = message.WhichOneof("body")
        reply = NodeFrameReply(id=message.id)
        if kind == "local_prefix":
            reply.local_prefix.CopyFrom(LocalPrefixReply(prefix=len(payload)))
            conn.reply(reply, payload)
        elif kind == "attach":
            reply.attached.CopyFrom(Attached(segment_bytes=SEGMENT_BYTES))
            conn.reply(reply, fds=[self.fd])
        elif kind == "get":
            self.send(conn, reply, message.get.first_layer)
        elif kind == "reserve":
            raise TooLargeError("the block is larger than the segment")
        elif kind == "register":
            raise ZeroDivisionError("a defect")
        elif kind == "release":
            with self.changed:
                self.released.append(message.release.pin)
                self.changed.notify_all()
        elif kind == "pin":
            conn.hold()
            reply.pinned.CopyFrom(Pinned(pin=5))
            asyncio.get_running_loop().call_soon(self.answer_held, conn, reply)

    def answer_held(self, conn: Connection, reply: NodeFrameReply) -> None:
        conn.reply(reply)
        conn.release()

    def send(self, conn: Connection, reply: NodeFrameReply, size: int) -> None:
        reply.got.CopyFrom(Got(layers=1))
        data = memoryview(bytes(range(256)) * (size // 256))
        half = size // 2
        frame = frame_buffers(reply, [data[:half], data[half:]])
        conn.run_blocking(lambda io: io.send_all(frame, self.deadline_s), self.done)

    def done(self, result: object, error: BaseException | None) -> None:
        with self.changed:
            self.done_errors.append(error)
            self.changed.notify_all()

    def streams_payload(self, conn: Connection, message: NodeFrame, payload_bytes: int) -> bool:
        kind = message.WhichOneof("body")
        if kind == "abort":
            raise TooLargeError("not that much")
        if kind != "write":
            return False
        self.written = bytearray(payload_bytes)

        def work(io: BlockingIO) -> int:
            view = memoryview(self.written)
            if message.write.reservation == 1:  # takes a part, then thinks better of it
                io.recv_exact_into([view[:100]], self.deadline_s)
                raise TooLargeError("half of it was enough")
            half = payload_bytes // 2
            io.recv_exact_into([view[:half], view[half:]], self.deadline_s)
            return payload_bytes

        def done(result: int | None, error: BaseException | None) -> None:
            self.done(result, error)
            if error is not None:
                conn.reply_error(message.id, error)
            else:
                conn.reply(NodeFrameReply(id=message.id, committed=Committed(stored=result or 0)))

        conn.run_blocking(work, done)
        return True


class Served:
    """A running server: ``handler``, ``path``, ``port``; ``call`` runs something on its loop."""

    def __init__(self, directory: Path, **limits: Any) -> None:
        self.handler = OddHandler()
        self.path = str(directory / "node.sock")
        self.port = 0
        self._ready = threading.Event()
        self._limits = limits
        self._thread = threading.Thread(target=lambda: uvloop.run(self._main()))
        self._thread.start()
        assert self._ready.wait(WAIT_S)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self.server = FrameServer(self.handler, **self._limits)
        self.server.listen_unix(self.path)
        _, self.port = self.server.listen_tcp("127.0.0.1", 0)
        self._ready.set()
        await self._stop.wait()
        await self.server.close()

    def call(self, function: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(WAIT_S)

    def call_soon(self, function: Callable[[], Any]) -> None:
        self._loop.call_soon_threadsafe(function)

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(WAIT_S)
            assert not self._thread.is_alive()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Start a server with given limits; closed after the test."""
    made: list[Served] = []

    def start(**limits: Any) -> Served:
        made.append(Served(tmp_path, **limits))
        return made[-1]

    yield start
    for served in made:
        served.close()


@pytest.fixture
def served(serve: Callable[..., Served]) -> Served:
    """A server with the usual limits."""
    return serve()
