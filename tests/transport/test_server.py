"""FrameServer and Channel over real sockets: requests, bulk payloads, descriptors, bad peers."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvpool import errors
from kvpool.rpc.v1.node_pb2 import (
    Attach,
    Get,
    LocalPrefix,
    NodeFrame,
    NodeFrameReply,
    Pin,
    ReleasePin,
    ReleaseReservation,
    Reserve,
    Write,
)
from kvpool.rpc.v1.types_pb2 import NamespaceDescriptor
from kvpool.tiers.dram import AttachedSegment
from kvpool.transport import connection
from kvpool.transport.channel import Channel
from kvpool.transport.frames import HEAD, MAGIC, encode

MIB = 1 << 20
T = 10.0


@pytest.fixture(params=["unix", "tcp"])
def channel(request: pytest.FixtureRequest, served: Any) -> Iterator[Channel]:
    with connect(served, request.param) as made:
        yield made


def connect(served: Any, kind: str = "unix") -> Channel:
    if kind == "unix":
        return Channel.connect_unix(served.path, T)
    return Channel.connect_tcp("127.0.0.1", served.port, T)


def raw(served: Any) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", served.port), T)
    sock.settimeout(T)
    return sock


def echo(channel: Channel, payload: bytes = b"k" * 16) -> bytes:
    request = NodeFrame(local_prefix=LocalPrefix(shards=1))
    reply, answer = channel.call(request, NodeFrameReply, payload, timeout_s=T)
    assert reply.local_prefix.prefix == len(payload)
    return bytes(answer)


@pytest.mark.parametrize("size", [0, 1, 16, 1 << 14, (1 << 14) + 1, 1 << 16, 300_000, 16 * MIB])
def test_small_and_large_requests_are_answered(channel: Channel, size: int) -> None:
    """Payloads up to the limit go there and back, again and again."""
    payload = random.Random(size).randbytes(size)
    assert echo(channel, payload) == payload
    assert echo(channel) == b"k" * 16


def test_bulk_payload_lands_in_the_callers_buffers(channel: Channel) -> None:
    """64 MiB from a thread of the server, taken in pieces; then small requests go on."""
    size = 64 * MIB
    request = NodeFrame(get=Get(first_layer=size))
    channel.begin(request, NodeFrameReply, timeout_s=T, progress_s=T)
    assert channel.payload_left == size
    data = memoryview(bytearray(size))
    channel.recv_into([data[:7], data[7 : 3 * MIB]])
    channel.recv_into([data[3 * MIB :]])
    assert channel.payload_left == 0
    assert data == bytes(range(256)) * (size // 256)
    assert echo(channel) == b"k" * 16
    assert channel.is_usable()


def test_bulk_payload_is_taken_from_many_buffers(served: Any, channel: Channel) -> None:
    """A write of more buffers than one system call takes arrives whole."""
    parts = [random.Random(i).randbytes(16_384) for i in range(2500)]
    reply, _ = channel.call(NodeFrame(write=Write(reservation=9)), NodeFrameReply, parts, timeout_s=T)
    assert reply.committed.stored == 2500 * 16_384
    assert served.handler.written == b"".join(parts)
    assert echo(channel) == b"k" * 16


def test_untaken_payload_is_dropped_and_the_connection_lives(channel: Channel) -> None:
    """A refused write, before or in the middle of its payload, costs one error and nothing else."""
    for request in (NodeFrame(abort=ReleaseReservation()), NodeFrame(write=Write(reservation=1))):
        with pytest.raises(errors.TooLargeError):
            channel.call(request, NodeFrameReply, bytes(24 * MIB), timeout_s=T)
        assert echo(channel) == b"k" * 16


def segments_open() -> int:
    """Return how many descriptors of shared memory this process has."""
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of the directory itself
            found += entry.readlink().name.startswith("memfd:")
    return found


def test_descriptor_comes_with_the_answer(served: Any) -> None:
    """Attach hands over the segment; a call without it closes what came."""
    with connect(served) as channel:
        reply, _, fds = channel.call_with_fds(NodeFrame(attach=Attach()), NodeFrameReply, timeout_s=T)
        segment = AttachedSegment.from_fd(fds[0], reply.attached.segment_bytes)
        segment.view[:5] = b"hello"
        assert os.pread(served.handler.fd, 5, 0) == b"hello"
        segment.close()
        before = segments_open()
        with pytest.raises(errors.FrameError, match="1 file descriptors, not 2"):
            channel.call_with_fds(NodeFrame(attach=Attach()), NodeFrameReply, fds=2, timeout_s=T)
        assert segments_open() == before


def test_error_of_a_request_is_raised_and_the_channel_lives(channel: Channel) -> None:
    """A KVPoolError of the handler is one at the caller; an unknown request says so."""
    with pytest.raises(errors.TooLargeError, match="larger than the segment"):
        channel.call(NodeFrame(reserve=Reserve()), NodeFrameReply, timeout_s=T)
    with pytest.raises(errors.InvalidArgumentError, match="body: "):
        channel.call(NodeFrame(), NodeFrameReply, timeout_s=T)
    assert echo(channel) == b"k" * 16


def test_defect_in_the_handler_closes_only_that_connection(served: Any) -> None:
    """The peer is told, the others go on."""
    with connect(served) as other, connect(served) as channel:
        with pytest.raises(errors.KVPoolError, match="a defect"):
            channel.call(NodeFrame(register=NamespaceDescriptor()), NodeFrameReply, timeout_s=T)
        assert channel.broken
        assert echo(other) == b"k" * 16
    served.handler.wait_for(lambda: any("ZeroDivisionError" in r for r in served.handler.closed_reasons))


def test_held_request_is_answered_later_and_in_order(served: Any) -> None:
    """Pipelined requests wait behind one in work; requests without an answer are taken."""
    with raw(served) as sock:
        frames = [
            NodeFrame(id=1, pin=Pin()),
            NodeFrame(id=2, local_prefix=LocalPrefix()),
            NodeFrame(id=3, get=Get(first_layer=256)),
            NodeFrame(id=4, release=ReleasePin(pin=77)),
            NodeFrame(id=5, local_prefix=LocalPrefix()),
        ]
        sock.sendall(b"".join(map(encode, frames)))
        assert [read_reply(sock).id for _ in range(4)] == [1, 2, 3, 5]
    assert served.handler.released == [77]


def read_reply(sock: socket.socket) -> NodeFrameReply:
    _, header_bytes, payload_bytes = HEAD.unpack(read_exactly(sock, HEAD.size))
    reply = NodeFrameReply.FromString(read_exactly(sock, header_bytes))
    read_exactly(sock, payload_bytes)
    return reply


def read_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        assert more, "the connection ended"
        data += more
    return data


def test_many_pipelined_requests_are_all_answered(served: Any) -> None:
    """More frames than one turn takes, in pieces of odd sizes."""
    stream = b"".join(encode(NodeFrame(id=i, local_prefix=LocalPrefix()), 3) + b"abc" for i in range(1, 1001))
    with raw(served) as sock:
        for start in range(0, len(stream), 9973):
            sock.sendall(stream[start : start + 9973])
        assert [read_reply(sock).id for _ in range(1000)] == list(range(1, 1001))


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "magic"),
        (HEAD.pack(MAGIC, 1 << 31, 0), "header has"),
        (HEAD.pack(MAGIC, 0, 1 << 63), "payload has"),
        (encode(NodeFrame(get=Get()), 16 * MIB + 1), "payload has 16777217"),
        (HEAD.pack(MAGIC, 3, 0) + b"\xff\xff\xff", "not a NodeFrame"),
    ],
)
def test_bad_frame_closes_its_connection_with_a_reason(served: Any, data: bytes, named: str) -> None:
    """The peer is told what is wrong, and only its connection ends."""
    with connect(served) as other, raw(served) as sock:
        sock.sendall(data)
        assert named in read_reply(sock).error.message
        assert sock.recv(1) == b""
        assert echo(other) == b"k" * 16
    served.handler.wait_for(lambda: any(named in r for r in served.handler.closed_reasons))


def test_garbage_and_truncated_frames_leave_the_server_alive(served: Any) -> None:
    """A flood of broken connections, and a good one after it."""
    rng = random.Random(4)
    whole = encode(NodeFrame(id=1, write=Write(reservation=9)), 1000) + bytes(1000)
    for i in range(150):
        with raw(served) as sock:
            data = whole[: rng.randrange(1, len(whole))] if i % 2 else rng.randbytes(rng.randrange(1, 3000))
            try:
                sock.sendall(data)
                if i % 3 == 0:  # a reset instead of an orderly end
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            except ConnectionError:
                pass  # already closed on us
    with connect(served, "tcp") as channel:
        assert echo(channel) == b"k" * 16
        served.handler.wait_for(lambda: len(served.server.connections) == 1)


def test_reset_behind_unread_data_ends_the_connection(served: Any) -> None:
    """Data and a reset that arrive together are both noticed: the loop meets them in one event."""
    go_on = threading.Event()
    with raw(served) as sock:
        sock.sendall(encode(NodeFrame(id=1, local_prefix=LocalPrefix())))
        assert read_reply(sock).id == 1
        served.call_soon(lambda: go_on.wait(T))
        sock.sendall(encode(NodeFrame(id=2, release=ReleasePin(pin=1))))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    go_on.set()
    served.handler.wait_for(lambda: served.handler.closed_reasons)


def test_one_connection_too_many_is_told_so(serve: Callable[..., Any]) -> None:
    """OVERLOADED, and room again when one leaves."""
    served = serve(connections_max=2)
    with connect(served) as first, connect(served) as second:
        assert echo(first) == echo(second)
        with connect(served) as third, pytest.raises(errors.OverloadedError, match="2 connections"):
            echo(third)
    served.handler.wait_for(lambda: len(served.handler.closed_reasons) >= 2)
    with connect(served) as channel:
        assert echo(channel) == b"k" * 16


def test_refused_peer_is_told_why(served: Any) -> None:
    """What ``opened`` raises reaches the peer's first call."""
    served.handler.refuse = True
    with connect(served, "tcp") as channel, pytest.raises(errors.RefusedError, match="protected mode"):
        echo(channel)


def test_peer_that_reads_nothing_is_paused_not_buffered(served: Any) -> None:
    """Requests are not looked at while answers wait, so that memory stays bounded; then all is answered."""
    payload = bytes(256 * 1024)
    frame = encode(NodeFrame(id=3, local_prefix=LocalPrefix()), len(payload)) + payload
    sent = 0
    with raw(served) as sock:
        sock.setblocking(False)
        try:
            while sent < 256 * MIB:
                sent += sock.send(frame[sent % len(frame) :])
        except BlockingIOError:
            pass
        conn = served.call(lambda: next(iter(served.server.connections.values())))
        assert sent < 256 * MIB
        assert served.call(lambda: conn._out_bytes) <= connection.OUTPUT_PAUSE_BYTES + 2 * len(payload)
        sock.settimeout(T)
        for _ in range(sent // len(frame)):
            assert read_reply(sock).id == 3


def test_slow_reader_of_bulk_loses_its_connection(served: Any) -> None:
    """A peer that stops reading holds a thread for the deadline only."""
    served.handler.deadline_s = 0.2
    with raw(served) as sock, connect(served) as other:
        sock.sendall(encode(NodeFrame(id=1, get=Get(first_layer=64 * MIB))))
        served.handler.wait_for(lambda: served.handler.done_errors)
        assert isinstance(served.handler.done_errors[0], errors.UnavailableError)
        served.handler.wait_for(lambda: served.handler.closed_reasons)
        assert echo(other) == b"k" * 16


def test_unfinished_frame_is_given_up(serve: Callable[..., Any]) -> None:
    """A peer may be idle between frames, but not within one."""
    served = serve(frame_timeout_s=0.1)
    with connect(served) as idle, raw(served) as sock:
        sock.sendall(encode(NodeFrame(id=1, get=Get(first_layer=1)))[:10])
        served.handler.wait_for(lambda: served.handler.closed_reasons)
        assert "no progress" in served.handler.closed_reasons[0]
        assert echo(idle) == b"k" * 16


def test_closing_the_server_interrupts_transfers(serve: Callable[..., Any]) -> None:
    """``done`` is called with an error, every connection is reported closed, the socket file is gone."""
    served = serve()
    with raw(served) as sock:
        sock.sendall(encode(NodeFrame(id=1, get=Get(first_layer=64 * MIB))))
        sock.recv(1)
        served.close()
    assert isinstance(served.handler.done_errors[0], errors.UnavailableError)
    assert served.handler.closed_reasons == ["the server is closing"]
    assert not Path(served.path).exists()


@pytest.mark.parametrize("bulk", ["get", "write"])
def test_bulk_without_a_thread_is_refused(served: Any, monkeypatch: pytest.MonkeyPatch, bulk: str) -> None:
    """The peer is told, the handler too, and the connection ends; a thread that comes later does not do it."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("kvpool-transfer"):
            raise RuntimeError("can't start new thread")
        start(thread)

    handler = served.handler
    requests = {"get": NodeFrame(get=Get(first_layer=MIB)), "write": NodeFrame(write=Write(reservation=2))}
    with monkeypatch.context() as patch, connect(served) as channel:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(errors.OverloadedError, match="no thread for a transfer"):
            channel.call(requests[bulk], NodeFrameReply, bytes(MIB) if bulk == "write" else b"", timeout_s=T)
        handler.wait_for(lambda: handler.closed_reasons)
        assert "no thread for a transfer" in handler.closed_reasons[0]
        assert not served.call(lambda: dict(served.server.connections))
    with connect(served) as channel:
        channel.call(NodeFrame(get=Get(first_layer=MIB)), NodeFrameReply, timeout_s=T)
    handler.wait_for(lambda: len(handler.done_errors) == 2)
    assert [type(error) for error in handler.done_errors] == [errors.OverloadedError, type(None)]


def test_no_words_go_into_the_middle_of_an_answer(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an answer is on its way as no thread can be had, the peer gets its first bytes and an end-of-file."""
    size = connection.OUTPUT_PAUSE_BYTES
    with raw(served) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

        def answer_without_threads() -> None:
            (conn,) = served.server.connections.values()
            conn._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            conn.reply(NodeFrameReply(id=1), bytes(size))
            assert conn._out_bytes
            patch.setattr(served.server.executor, "submit", refuse)
            conn.run_blocking(lambda _: None, served.handler.done)

        def refuse(_: object) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            sock.sendall(encode(NodeFrame(id=1, local_prefix=LocalPrefix(shards=1))))
            read_reply(sock)
            served.call(answer_without_threads)
            served.handler.wait_for(lambda: served.handler.closed_reasons)
        got = b"".join(iter(lambda: sock.recv(MIB), b""))
    assert len(got) < size
    assert not any(got[len(got) // 2 :])
    assert isinstance(served.handler.done_errors[0], errors.OverloadedError)


def test_peer_of_a_unix_socket_is_known(served: Any) -> None:
    """Process and user id come from the kernel."""
    with connect(served) as channel:
        echo(channel)
        peer = served.call(lambda: next(iter(served.server.connections.values())).peer)
    assert (peer.pid, peer.uid, peer.unix) == (os.getpid(), os.getuid(), True)


def test_socket_file_has_its_mode_and_a_live_one_is_not_taken(served: Any) -> None:
    """A second server on the same path is an error that names the field."""
    assert stat.S_IMODE(Path(served.path).stat().st_mode) == 0o660
    with pytest.raises(errors.InvalidArgumentError, match="socket_path: another process"):
        served.call(lambda: served.server.listen_unix(served.path))
    with connect(served) as channel:
        assert echo(channel) == b"k" * 16


def test_stale_socket_file_gives_way(served: Any, tmp_path: Path) -> None:
    """A file whose server has died is replaced; one that is no socket is not."""
    stale = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stale))
    served.call(lambda: served.server.listen_unix(stale, 0o600))
    with Channel.connect_unix(stale, T) as channel:
        assert echo(channel) == b"k" * 16
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / ("x" * 200), tmp_path / "no" / "directory", ""):
        with pytest.raises(errors.InvalidArgumentError, match="socket_path"):
            served.call(lambda path=path: served.server.listen_unix(path))
    assert (tmp_path / "file").read_text() == "mine"


def test_tcp_port_in_use_is_named(served: Any) -> None:
    """Port and host are named in the error."""
    with pytest.raises(errors.InvalidArgumentError, match=r"port: .*in use"):
        served.call(lambda: served.server.listen_tcp("127.0.0.1", served.port))
    with pytest.raises(errors.InvalidArgumentError, match="port: must be"):
        served.call(lambda: served.server.listen_tcp("127.0.0.1", 1 << 16))
    with pytest.raises(errors.InvalidArgumentError, match="host: "):
        served.call(lambda: served.server.listen_tcp("203.0.113.1", 0))
