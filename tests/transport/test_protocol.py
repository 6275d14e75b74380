"""FrameService on uvloop: small frames, answered on the loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
import uvloop

from kvpool.errors import KVPoolError, UnknownNamespaceError
from kvpool.rpc.errors import to_proto
from kvpool.rpc.v1.master_pb2 import LeaseRequest, LookupRequest, LookupResponse, MasterFrame, MasterFrameReply
from kvpool.transport.frames import HEAD, MAGIC, Buffer, encode, parse_message
from kvpool.transport.protocol import WRITE_HIGH_BYTES, After, FrameService

T = 10.0


class Master:
    """Answers a lookup with the number of its payload's bytes and the payload."""

    def __init__(self) -> None:
        self.peers: set[str] = set()
        self.seen = 0
        self.done = 0
        self.closed: list[str] = []

    def after(self) -> None:
        self.done += 1

    def handle(self, header: bytes, payload: memoryview, peer_host: str) -> tuple[Sequence[Buffer], After | None]:
        message = parse_message(MasterFrame, header)
        self.peers.add(peer_host)
        self.seen += 1
        kind = message.WhichOneof("body")
        if kind == "renew":
            raise UnknownNamespaceError("never heard of")
        if kind == "release":
            return (), None
        reply = MasterFrameReply(id=message.id, lookup=LookupResponse(prefix=len(payload)))
        return [encode(reply, len(payload)), payload], self.after


def run(test: Callable[[FrameService, int, Master], Coroutine[Any, Any, None]], **limits: Any) -> Master:
    master = Master()

    def error_frame(exc: KVPoolError) -> bytes:
        return encode(MasterFrameReply(error=to_proto(exc)))

    async def main() -> None:
        service = FrameService(
            master.handle, error_frame, closed=lambda peer, reason: master.closed.append(reason), **limits
        )
        server = await asyncio.get_running_loop().create_server(service, "127.0.0.1", 0)
        await asyncio.wait_for(test(service, server.sockets[0].getsockname()[1], master), T)
        server.close()
        service.close()

    uvloop.run(main())
    return master


def lookup(frame_id: int, payload: bytes = b"k" * 16) -> bytes:
    return encode(MasterFrame(id=frame_id, lookup=LookupRequest()), len(payload)) + payload


async def read(reader: asyncio.StreamReader) -> tuple[MasterFrameReply, bytes]:
    _, header_bytes, payload_bytes = HEAD.unpack(await reader.readexactly(HEAD.size))
    reply = MasterFrameReply.FromString(await reader.readexactly(header_bytes))
    return reply, await reader.readexactly(payload_bytes)


def test_requests_are_answered_in_order_whatever_the_pieces() -> None:
    """Pipelined frames, more than one turn takes, cut anywhere; some without an answer."""

    async def test(service: FrameService, port: int, master: Master) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        stream = b"".join(lookup(i, bytes(i)) for i in range(300))
        stream += encode(MasterFrame(id=1, release=LeaseRequest())) + lookup(300)
        for start in range(0, len(stream), 7919):
            writer.write(stream[start : start + 7919])
            await writer.drain()
        for i in range(300):
            reply, payload = await read(reader)
            assert (reply.id, reply.lookup.prefix, len(payload)) == (i, i, i)
        assert (await read(reader))[0].id == 300
        writer.close()

    master = run(test)
    assert master.peers == {"127.0.0.1"}
    assert (master.seen, master.done) == (302, 301)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"garbage", "magic"),
        (HEAD.pack(MAGIC, 1 << 30, 0), "header has"),
        (HEAD.pack(MAGIC, 1, 0) + b"\xff", "not a MasterFrame"),
        (encode(MasterFrame(renew=LeaseRequest())), "never heard of"),
    ],
)
def test_bad_frame_closes_its_connection_with_a_reason(data: bytes, named: str) -> None:
    """The peer reads why, then the end; the service goes on."""

    async def test(service: FrameService, port: int, master: Master) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data)
        assert named in (await read(reader))[0].error.message
        assert await reader.read() == b""
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(lookup(1))
        assert (await read(reader))[0].id == 1
        writer.close()

    assert named in run(test).closed[0]


def test_one_connection_too_many_is_told_so() -> None:
    """The limit holds, and a place that gets free is given again."""

    async def test(service: FrameService, port: int, master: Master) -> None:
        _, first = await asyncio.open_connection("127.0.0.1", port)
        reader, second = await asyncio.open_connection("127.0.0.1", port)
        assert "1 connections" in (await read(reader))[0].error.message
        assert await reader.read() == b""
        first.close()
        second.close()
        while service.connections:  # noqa: ASYNC110 - bounded by the whole test's deadline
            await asyncio.sleep(0)
        reader, third = await asyncio.open_connection("127.0.0.1", port)
        third.write(lookup(1))
        assert (await read(reader))[0].id == 1
        third.close()

    run(test, connections_max=1)


def test_peer_that_reads_nothing_is_paused() -> None:
    """Its requests are not looked at while answers wait; then all are answered."""
    payload = bytes(64 * 1024)
    frame = lookup(3, payload)

    async def test(service: FrameService, port: int, master: Master) -> None:
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setblocking(False)
        sent = 0
        quiet = 0
        while quiet < 50:
            try:
                sent += sock.send(frame[sent % len(frame) :])
                quiet = 0
            except BlockingIOError:
                quiet += 1
                await asyncio.sleep(0.002)
            assert sent < 512 << 20
        connection = next(iter(service.connections))
        assert connection._transport is not None
        waiting = connection._transport.get_write_buffer_size()
        assert waiting <= WRITE_HIGH_BYTES + 2 * len(frame)
        assert master.seen < sent // len(frame)
        reader, writer = await asyncio.open_connection(sock=sock)
        for _ in range(sent // len(frame)):
            assert (await read(reader))[0].id == 3
        writer.close()

    run(test)
