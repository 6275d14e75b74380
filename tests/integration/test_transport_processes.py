"""Channels and other processes: a stopped peer, a forked child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvpool.errors import UnavailableError
from kvpool.rpc.v1.node_pb2 import Get, LocalPrefix, NodeFrame, NodeFrameReply
from kvpool.transport.channel import Channel

T = 20.0

SERVER = """
import asyncio, sys
import uvloop
from kvpool.rpc.v1.node_pb2 import Got, LocalPrefixReply, NodeFrameReply
from kvpool.transport.frames import frame_buffers
from kvpool.transport.server import FrameServer

class Handler:
    def opened(self, conn):
        pass
    def closed(self, conn, reason):
        print("closed", flush=True)
    def streams_payload(self, conn, message, size):
        return False
    def frame(self, conn, message, payload):
        reply = NodeFrameReply(id=message.id)
        if message.WhichOneof("body") == "get":
            reply.got.CopyFrom(Got(layers=1))
            frame = frame_buffers(reply, [memoryview(bytes(message.get.first_layer))])
            conn.run_blocking(lambda io: io.send_all(frame, 10.0), lambda result, error: None)
        else:
            reply.local_prefix.CopyFrom(LocalPrefixReply(prefix=len(payload)))
            conn.reply(reply)

async def main():
    FrameServer(Handler()).listen_unix(sys.argv[1])
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)

uvloop.run(main())
"""

FORKER = """
import os, sys
from kvpool.errors import UnavailableError
from kvpool.rpc.v1.node_pb2 import LocalPrefix, NodeFrame, NodeFrameReply
from kvpool.transport.channel import Channel, ChannelPool

def ask(channel):
    return channel.call(NodeFrame(local_prefix=LocalPrefix()), NodeFrameReply, b"k" * 16, timeout_s=10.0)[0]

pool = ChannelPool(lambda timeout_s: Channel.connect_unix(sys.argv[1], timeout_s), channels_max=1)
alone = Channel.connect_unix(sys.argv[1], 10.0)
with pool.channel(10.0) as lent:
    ask(lent), ask(alone)
    child = os.fork()
    if child == 0:
        for channel in (lent, alone):
            try:
                ask(channel)
            except UnavailableError:
                pass
            else:
                os._exit(1)
        with pool.channel(10.0) as own:
            ask(own)
        os._exit(0 if repr(pool) == "<ChannelPool idle 1 lent 0 of 1>" else 2)
    assert os.waitpid(child, 0)[1] == 0
    ask(lent)
ask(alone)
print(repr(pool))
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A server process on ``tmp_path / "s"``."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(tmp_path / "s")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_stopped_server_meets_the_deadline(server: subprocess.Popen[str], tmp_path: Path) -> None:
    """SIGSTOP before a call and in the middle of a payload: UnavailableError, and nothing waits longer."""
    waiting = Channel.connect_unix(tmp_path / "s", T)
    reading = Channel.connect_unix(tmp_path / "s", T)
    request = NodeFrame(get=Get(first_layer=64 << 20))
    reading.start(request, timeout_s=T)
    reading.proceed(request, NodeFrameReply, progress_s=0.1)  # bounds the payload's waits alone
    os.kill(server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(UnavailableError):
            reading.recv_into([memoryview(bytearray(64 << 20))])
        with pytest.raises(UnavailableError):
            waiting.call(NodeFrame(local_prefix=LocalPrefix()), NodeFrameReply, timeout_s=0.1)
    finally:
        os.kill(server.pid, signal.SIGCONT)
    with Channel.connect_unix(tmp_path / "s", T) as again:
        again.call(NodeFrame(local_prefix=LocalPrefix()), NodeFrameReply, timeout_s=T)


def test_forked_child_drops_what_its_parent_talks_through(server: subprocess.Popen[str], tmp_path: Path) -> None:
    """The child makes channels of its own, the parent's go on, also one that is lent at the fork."""
    done = subprocess.run(
        [sys.executable, "-c", FORKER, str(tmp_path / "s")], capture_output=True, text=True, timeout=T, check=False
    )
    assert (done.returncode, done.stdout) == (0, "<ChannelPool idle 1 lent 0 of 1>\n"), done.stderr


def test_connection_of_a_killed_client_ends_at_once(server: subprocess.Popen[str], tmp_path: Path) -> None:
    """A child that a client forked does not keep the client's connection open."""
    script = (
        "import os, sys, time\n"
        "from kvpool.transport.channel import Channel\n"
        "channel = Channel.connect_unix(sys.argv[1], 10.0)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    sys.stdin.read()\n"
        "    os._exit(0)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "s")], stdin=subprocess.PIPE):
        assert server.stdout is not None
        assert server.stdout.readline() == "closed\n"
