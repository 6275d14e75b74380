"""FrameService on uvloop: small frames, answered on the loop."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
import uvloop

from kvpool.errors import KVPoolError, RefusedError, UnknownNamespaceError
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


def test_a_peer_that_has_gone_before_it_was_seen_is_not_answered() -> None:
    """Its address is not known any more: what it has sent is not taken for that of this host."""

    async def test(service: FrameService, port: int, master: Master) -> None:
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.send(lookup(1))
        sock.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(lookup(2))
        assert (await read(reader))[0].id == 2
        writer.close()

    assert run(test).seen == 1


async def ended(reader: asyncio.StreamReader) -> str:
    """Return what the peer was told before the end, "" for nothing."""
    try:
        message = (await read(reader))[0].error.message
        assert await reader.read() == b""
    except (asyncio.IncompleteReadError, ConnectionResetError):
        return ""
    return message


def test_a_peer_that_is_not_let_in_takes_no_place() -> None:
    """It is told why before it has sent a byte, and never counted; nothing of what it sends is read."""

    def check(peer_host: str) -> None:
        if peer_host == "127.0.0.1":
            raise RefusedError("protected mode")

    async def test(service: FrameService, port: int, master: Master) -> None:
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert "protected mode" in await ended(reader)
            assert not service.connections
            writer.close()

    master = run(test, check=check, connections_max=1)
    assert master.closed == ["protected mode"] * 3
    assert not master.seen


@pytest.mark.parametrize(
    "start", [b"K", MAGIC + b"\x01", lookup(1)[:20], lookup(1, bytes(1 << 20))[:-1], lookup(1) + lookup(2)[:-1]]
)
def test_a_frame_that_is_never_finished_ends_its_connection(start: bytes) -> None:
    """Its memory is not kept for ever; a peer that is slow and one that asks nothing stay."""

    async def test(service: FrameService, port: int, master: Master) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        slow_reader, slow = await asyncio.open_connection("127.0.0.1", port)
        idle_reader, idle = await asyncio.open_connection("127.0.0.1", port)
        writer.write(start)
        frame = lookup(7)
        at = 0
        stuck = asyncio.create_task(reader.read())
        while not stuck.done() or at < len(frame) - 1:
            slow.write(frame[at : at + 1] if at < len(frame) - 1 else b"")
            at += 1
            await asyncio.sleep(0.02)
        assert b"no progress" in stuck.result()
        slow.write(frame[-1:])
        assert (await read(slow_reader))[0].id == 7
        idle.write(lookup(8))
        assert (await read(idle_reader))[0].id == 8
        for each in (writer, slow, idle):
            each.close()

    run(test, stuck_s=0.3)


def test_answers_that_are_never_read_end_their_connection() -> None:
    """What waits to be sent is not kept for ever, nor after a connection was cut off for another reason."""
    frame = lookup(3, bytes(64 * 1024))

    async def fill(service: FrameService, port: int) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setblocking(False)
        quiet = sent = 0
        while quiet < 20:
            try:
                sent += sock.send(frame[sent % len(frame) :])
                quiet = 0
            except BlockingIOError:
                quiet += 1
                await asyncio.sleep(0.002)
        assert service.connections
        return sock

    async def test(service: FrameService, port: int, master: Master) -> None:
        for cut_off in (False, True):
            sock = await fill(service, port)
            (connection,) = service.connections
            if cut_off:
                connection._cut_off(KVPoolError("for another reason"))
                assert service.connections  # as long as its words are not taken
            while service.connections:  # noqa: ASYNC110 - bounded by the whole test's deadline
                await asyncio.sleep(0.01)
            sock.close()

    master = run(test, stuck_s=0.3)
    assert "no progress for 0.3 s while answers wait to be read" in master.closed


def test_nothing_sweeps_where_nobody_is() -> None:
    """The timer lives while there are connections, and comes back with the next one."""

    async def test(service: FrameService, port: int, master: Master) -> None:
        for _ in range(2):
            assert service._sweep_at is None
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            while not service.connections:  # noqa: ASYNC110 - bounded by the whole test's deadline
                await asyncio.sleep(0)
            assert service._sweep_at is not None
            writer.close()
            while service._sweep_at is not None:  # noqa: ASYNC110 - bounded by the whole test's deadline
                await asyncio.sleep(0.01)

    run(test, stuck_s=0.03)
