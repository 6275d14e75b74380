"""Channel against peers that misbehave, and the pool that lends channels."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvpool import errors
from kvpool.rpc.errors import to_proto
from kvpool.rpc.v1.node_pb2 import Get, LocalPrefix, LocalPrefixReply, NodeFrame, NodeFrameReply
from kvpool.transport.channel import Channel, ChannelPool
from kvpool.transport.frames import HEAD, MAGIC, encode
from kvpool.transport.sockets import TICK_S

T = 10.0

Peer = Callable[[Callable[[socket.socket], None]], Channel]


@pytest.fixture
def peer() -> Iterator[Peer]:
    """Return a function that connects a channel to a peer that runs the given script."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []
    channels: list[Channel] = []
    over = threading.Event()

    def connect(script: Callable[[socket.socket], None]) -> Channel:
        def run() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.settimeout(T)
                script(sock)
                over.wait(T)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        channels.append(Channel.connect_tcp("127.0.0.1", listener.getsockname()[1], T))
        return channels[-1]

    with listener:
        yield connect
        over.set()
        for channel in channels:
            channel.close()
        for thread in threads:
            thread.join(T)
            assert not thread.is_alive()


def ask(channel: Channel, timeout_s: float = T) -> int:
    request = NodeFrame(local_prefix=LocalPrefix())
    reply, _ = channel.call(request, NodeFrameReply, b"k" * 16, timeout_s=timeout_s)
    return reply.local_prefix.prefix


def answer(frame_id: int, prefix: int = 0) -> bytes:
    return encode(NodeFrameReply(id=frame_id, local_prefix=LocalPrefixReply(prefix=prefix)))


def test_silent_peer_breaks_the_channel_for_good(peer: Peer) -> None:
    """After a timeout the late answer is never read, not even by a request that would fit."""
    channel = peer(lambda sock: None)
    begin = time.monotonic()
    with pytest.raises(errors.UnavailableError, match="no answer"):
        ask(channel, 0.5)
    assert time.monotonic() - begin >= 0.5 - TICK_S
    assert channel.broken
    with pytest.raises(errors.UnavailableError, match="closed"):
        ask(channel)


def test_trickling_peer_meets_the_total_deadline(peer: Peer) -> None:
    """Progress alone does not extend a call."""
    stop = threading.Event()

    def trickle(sock: socket.socket) -> None:
        sock.sendall(encode(NodeFrameReply(id=1), 1 << 20))
        try:
            while not stop.wait(0.01):
                sock.sendall(b"x")
        except OSError:
            pass  # the channel has had enough

    channel = peer(trickle)
    with pytest.raises(errors.UnavailableError):
        ask(channel, 0.3)
    stop.set()


def test_peer_that_takes_nothing_meets_the_deadline(peer: Peer) -> None:
    """Sending is bounded as receiving is."""
    channel = peer(lambda sock: None)
    with pytest.raises(errors.UnavailableError, match=r"took no bytes|deadline"):
        channel.call(NodeFrame(), NodeFrameReply, bytes(64 << 20), timeout_s=0.1)
    assert channel.broken


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (b"", errors.UnavailableError, "closed the connection"),
        (answer(1)[:-1], errors.UnavailableError, "closed the connection"),
        (b"HTTP/1.1 400 Bad Request", errors.FrameError, "magic"),
        (HEAD.pack(MAGIC, 1 << 30, 0), errors.FrameError, "header has"),
        (HEAD.pack(MAGIC, 0, 1 << 63), errors.FrameError, "payload has"),
        (HEAD.pack(MAGIC, 1, 0) + b"\xff", errors.FrameError, "not a NodeFrameReply"),
        (answer(2), errors.FrameError, "answer to request 2, not 1"),
        (encode(NodeFrameReply(error=to_proto(errors.OverloadedError("full")))), errors.OverloadedError, "full"),
        (
            encode(NodeFrameReply(id=9, error=to_proto(errors.InvalidArgumentError("keys", "too many")))),
            errors.UnavailableError,
            "an earlier request was refused: .*too many",
        ),
    ],
)
def test_bad_answers_break_the_channel(peer: Peer, data: bytes, error: type[Exception], text: str) -> None:
    """Each is a KVPoolError that says what came instead."""

    def script(sock: socket.socket) -> None:
        sock.recv(1 << 16)
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    channel = peer(script)
    with pytest.raises(error, match=text):
        ask(channel)
    assert channel.broken


def test_unread_payload_makes_the_channel_unusable(peer: Peer) -> None:
    """What is left of an answer is never taken for the next one."""
    channel = peer(lambda sock: sock.sendall(encode(NodeFrameReply(id=1), 5000) + bytes(5000)))
    channel.begin(NodeFrame(get=Get()), NodeFrameReply, timeout_s=T)
    channel.recv_into([memoryview(bytearray(4999))])
    assert not channel.is_usable()
    with pytest.raises(errors.UnavailableError, match="not read to its end"):
        ask(channel)


def test_more_than_the_payload_is_not_read(peer: Peer) -> None:
    """Asking beyond the end is an error, not a wait."""
    channel = peer(lambda sock: sock.sendall(encode(NodeFrameReply(id=1), 10) + bytes(10)))
    channel.begin(NodeFrame(get=Get()), NodeFrameReply, timeout_s=T)
    with pytest.raises(errors.FrameError, match="10 bytes left, not 11"):
        channel.recv_into([memoryview(bytearray(11))])


def test_nobody_there_is_unavailable(tmp_path: Any) -> None:
    """Connecting fails with one error, whatever the cause."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    attempts: list[Callable[[], Channel]] = [
        lambda: Channel.connect_tcp("127.0.0.1", port, T),
        lambda: Channel.connect_tcp("127.0.0.1", 1 << 20, T),
        lambda: Channel.connect_unix(tmp_path / "none", T),
        lambda: Channel.connect_unix("x" * 500, T),
    ]
    for connect in attempts:
        with pytest.raises(errors.UnavailableError, match="cannot reach"):
            connect()


def test_without_file_descriptors_nobody_can_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """A shortage is like a peer that is away."""

    def none_left(*arguments: Any) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(socket, "socket", none_left)
    for connect in (
        lambda: Channel.connect_unix(tmp_path / "socket", T),
        lambda: Channel.connect_tcp("127.0.0.1", 1, T),
    ):
        with pytest.raises(errors.UnavailableError, match="Too many open files"):
            connect()


def test_pool_lends_one_channel_to_one_caller(served: Any) -> None:
    """Idle channels are used again; a further caller waits, up to its deadline."""
    made: list[Channel] = []

    def connect(timeout_s: float) -> Channel:
        made.append(Channel.connect_unix(served.path, timeout_s))
        return made[-1]

    pool = ChannelPool(connect, channels_max=1)
    with pool.channel(T) as first:
        assert ask(first) == 16
        with pytest.raises(errors.OverloadedError, match="1 channels"), pool.channel(0.01):
            pass
        taken = threading.Event()
        thread = threading.Thread(target=lambda: wait_for_channel(pool, taken))
        thread.start()
        assert not taken.is_set()
    assert taken.wait(T)
    thread.join(T)
    assert len(made) == 1
    pool.close()
    assert first.broken
    with pytest.raises(errors.UnavailableError), pool.channel(T):
        pass


def wait_for_channel(pool: ChannelPool, taken: threading.Event) -> None:
    with pool.channel(T):
        taken.set()


def test_pool_replaces_channels_that_died(served: Any) -> None:
    """A broken one is dropped when it comes back, one whose server closed it when it is taken."""
    pool = ChannelPool(lambda timeout_s: Channel.connect_unix(served.path, timeout_s))
    with pool.channel(T) as first:
        ask(first)
    served.call(lambda: [conn.close("test") for conn in list(served.server.connections.values())])
    with pool.channel(T) as second:
        assert second is not first
        assert ask(second) == 16
        second.close()
    with pool.channel(T) as third:
        assert ask(third) == 16
    assert repr(pool) == "<ChannelPool idle 1 lent 0 of 4>"
    pool.close()


def test_pool_that_cannot_connect_keeps_its_places() -> None:
    """A failed attempt takes no place for ever."""
    pool = ChannelPool(lambda timeout_s: Channel.connect_tcp("127.0.0.1", 1 << 20, timeout_s), channels_max=1)
    for _ in range(3):
        with pytest.raises(errors.UnavailableError), pool.channel(0.01):
            pass
    assert repr(pool) == "<ChannelPool idle 0 lent 0 of 1>"
