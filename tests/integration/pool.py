"""Real daemons for the tests: started, waited for, killed by pid, and looked at when they are gone."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np
from numpy.typing import NDArray

from kvpool import Client, Namespace
from kvpool.client_results import Lookup
from kvpool.errors import KVPoolError
from kvpool.rpc.convert import namespace_to_proto
from kvpool.rpc.v1 import admin_pb2, admin_pb2_grpc, master_pb2, master_pb2_grpc
from kvpool.rpc.v1.node_pb2 import (
    Commit,
    LocalPrefix,
    NodeFrame,
    NodeFrameReply,
    Pin,
    ReleasePin,
    ReleaseReservation,
    Reserve,
)
from kvpool.transport.channel import Channel

ROOT = Path(__file__).parents[2]
T = 30.0
"""No wait of a test is longer, unless it says so."""

SEGMENT = 64 << 20
SPACE = Namespace(model="demo", layers=4)


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = T, pause_s: float = 0.01) -> float:
    """Wait until a condition holds; returns the seconds it took."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > timeout_s:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(pause_s)
    return time.monotonic() - begin


def say(text: str) -> None:
    """Print a finding; ``-s`` or ``-rP`` shows it."""
    print(text)  # noqa: T201


_given: deque[int] = deque(maxlen=100)


def free_port() -> int:
    """Return a port below the range that outgoing connections use: it stays free while nobody listens.

    Processes that run tests side by side choose from ports of their own; none is given twice in a row of many, as it
    may be some time until somebody listens.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for _ in range(1000):
        port = random.randrange(20_000, 30_000) // 16 * 16 + worker % 16
        if port in _given:
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            _given.append(port)
            return port
    raise AssertionError("no free port")


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a daemon: none of the settings that may be around."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("KVPOOL_") and k != "MOONCAKE_CONFIG_PATH"}
    return {**clean, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'connectors'}", **more}


def run_module(module: str, *arguments: str, timeout_s: float = T, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a program of ours to its end."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True, text=True, timeout=timeout_s, check=False, env=environment(**env), cwd=ROOT,
    )  # fmt: skip


class Process:
    """One program, its output in a file."""

    def __init__(self, name: str, arguments: Sequence[str], log: Path) -> None:
        self.name = name
        self.log = log
        self._seen = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment(), cwd=ROOT,
            )  # fmt: skip
        self.pid = self.popen.pid

    @property
    def alive(self) -> bool:
        """Whether it runs, or is stopped."""
        return self.popen.poll() is None

    def words(self) -> str:
        """Return what this process has said."""
        with self.log.open("rb") as stream:
            stream.seek(self._seen)
            return stream.read().decode(errors="replace")

    def says(self, text: str) -> bool:
        """Whether it has said something; fails when it has ended without a word of that."""
        words = self.words()
        if text not in words and not self.alive:
            raise AssertionError(f"{self.name} ended with {self.popen.returncode}:\n{words}")
        return text in words

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.popen.send_signal(number)

    def kill(self) -> None:
        """Kill -9, and wait until it is gone."""
        self.popen.kill()
        self.popen.wait(T)

    def end(self) -> int:
        """Ask it to end, and return its exit code."""
        if self.alive:
            self.send(signal.SIGCONT)
            self.send(signal.SIGTERM)
        try:
            return self.popen.wait(T)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.name} does not end:\n{self.words()}") from None

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop it (SIGSTOP) for a while."""
        self.send(signal.SIGSTOP)
        wait_for(lambda: f"{_stat(self.pid)}" == "T", f"{self.name} stops")
        try:
            yield
        finally:
            self.send(signal.SIGCONT)


def _stat(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


class Pool:
    """A master and nodes in a directory of their own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.nodes: dict[str, Process] = {}
        self._arguments: dict[str, tuple[str, ...]] = {}
        self._everybody: list[Process] = []
        self._guests: list[Process] = []
        self._cleanup = contextlib.ExitStack()
        self._admin: admin_pb2_grpc.AdminStub | None = None
        self.expected_errors: list[str] = []
        """Log lines of level ERROR that a test means to cause contain one of these."""

    # ---- starting ------------------------------------------------------------------------------------

    def start_master(self, *more: str) -> Process:
        """Start the master, the one from before with its old settings unless there are new ones."""
        self._arguments["master"] = more or self._arguments.get("master", ())
        arguments = ("kvpool.cli.master", "--host", "127.0.0.1", "--port", str(self.port), *self._arguments["master"])
        self.master = self._start("master", arguments)
        wait_for(lambda: self.master.says("serves on"), "the master serves")
        return self.master

    def start_node(self, name: str, *more: str, wait: bool = True) -> Process:
        """Start a node, the one from before with its old settings unless there are new ones."""
        more = self._arguments[name] = more or self._arguments.get(name, ("--segment_size", str(SEGMENT)))
        arguments = (
            "kvpool.cli.node", "--master", self.address, "--host", "127.0.0.1", "--node_id", name,
            "--socket_path", self.socket_path(name), *more,
        )  # fmt: skip
        node = self.nodes[name] = self._start(name, arguments)
        if wait:
            wait_for(lambda: node.says("is ready"), f"node {name} is ready")
            wait_for(lambda: self.state(name) == "live", f"node {name} is live")
        return node

    def _start(self, name: str, arguments: Sequence[str]) -> Process:
        process = Process(name, arguments, self.directory / f"{name}.log")
        self._everybody.append(process)
        return process

    def adopt(self, name: str, arguments: Sequence[str]) -> Process:
        """Start another program; it is killed before the pool ends."""
        process = Process(name, arguments, self.directory / f"{name}.log")
        self._guests.append(process)
        return process

    def socket_path(self, name: str) -> str:
        """Return where a node listens for local clients."""
        return str(self.directory / f"{name}.sock")

    def client(self, node: str | None = None, **options: Any) -> Client:
        """Return a client that is attached to a node, or to none; it gives transfers more time than they need."""
        path = self.socket_path(node or "none")
        options.setdefault("transfer_timeout_ms", 10_000)
        client = self._cleanup.enter_context(Client(self.address, node=path, **options))
        if node is not None:  # its first try may have met a busy node
            wait_for(client.has_node, f"the client is attached to {node}")
        assert client.has_node() == (node is not None)
        return client

    # ---- looking -------------------------------------------------------------------------------------

    def admin(self) -> admin_pb2_grpc.AdminStub:
        """Return a stub of the operators' service, one for the whole test."""
        if self._admin is None:
            self._admin = admin_pb2_grpc.AdminStub(self._cleanup.enter_context(self.channel()))
        return self._admin

    def channel(self) -> grpc.Channel:
        """Return a gRPC channel that tries again at once."""
        options = [
            ("grpc.use_local_subchannel_pool", 1), ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.min_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 100),
        ]  # fmt: skip
        return grpc.insecure_channel(self.address, options)

    def statuses(self) -> dict[str, admin_pb2.NodeStatus]:
        """Return what the master says of each node, nothing while it is away."""
        try:
            with self.channel() as channel:
                reply = admin_pb2_grpc.AdminStub(channel).Nodes(admin_pb2.NodesRequest(), timeout=T)
        except grpc.RpcError:
            return {}
        return {node.address.node_id: node for node in reply.nodes}

    def state(self, name: str) -> str:
        """Return live, suspect, ... or "" for a node that the master does not know."""
        status = self.statuses().get(name)
        return status.state if status is not None else ""

    def status(self) -> admin_pb2.StatusResponse:
        """Return the master's page about the pool."""
        reply: admin_pb2.StatusResponse = self.admin().Status(admin_pb2.StatusRequest(), timeout=T, wait_for_ready=True)
        return reply

    def blocks(self) -> int:
        """Return how many blocks the master knows."""
        return self.status().blocks

    def raw(self, name: str) -> RawNode:
        """Return a bare connection to a node."""
        return self._cleanup.enter_context(RawNode(self.socket_path(name)))

    def wait_idle(self, name: str, segment_bytes: int = SEGMENT) -> float:
        """Wait until nothing is pinned, reserved or quarantined: a block as large as the segment then finds room.

        Drops everything that the node holds.
        """
        with RawNode(self.socket_path(name)) as node:
            node.register(SPACE)

            refused: list[str] = []

            def whole_segment_is_free() -> bool:
                try:
                    reservation, _ = node.reserve(SPACE, [b"whole segment!!!"], segment_bytes - 4096)
                except KVPoolError as exc:
                    refused.append(str(exc))
                    return False
                node.abort(reservation)
                return True

            try:
                return wait_for(whole_segment_is_free, f"nothing is pinned or reserved on {name}")
            except AssertionError as exc:
                raise AssertionError(f"{exc}: {refused[-1]}") from None

    # ---- ending --------------------------------------------------------------------------------------

    def close(self) -> None:
        """End everything, and check that it ends well and leaves nothing behind."""
        self._cleanup.close()
        for guest in self._guests:
            if guest.alive:
                guest.kill()
        graceful = [p for p in self._everybody if p.alive]
        try:
            for process in reversed(graceful):
                assert process.end() == 0, f"{process.name}:\n{process.words()}"
            left = sorted(path.name for path in self.directory.glob("*.sock*"))
            ended = {f"{p.name}.sock" for p in graceful}
            assert not [name for name in left if name in ended or not name.endswith(".sock")], left
            for process in self._everybody:
                for line in process.words().splitlines():
                    bad = " ERROR " in line or line.startswith("Traceback")
                    assert not bad or any(text in line for text in self.expected_errors), (
                        f"{process.name}:\n{process.words()[-8000:]}"
                    )
        finally:
            for process in self._everybody:
                if process.alive:
                    process.kill()


class RawNode:
    """A connection that speaks frames itself, to hold what a well-behaved client never would."""

    def __init__(self, path: str) -> None:
        self.channel = Channel.connect_unix(path, T)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.channel.close()

    def call(self, frame: NodeFrame, payload: bytes = b"") -> tuple[NodeFrameReply, memoryview]:
        """Send a request, return the answer."""
        return self.channel.call(frame, NodeFrameReply, payload, timeout_s=T)

    def register(self, space: Namespace) -> None:
        """Make a namespace known."""
        self.call(NodeFrame(register=namespace_to_proto(space)))

    def reserve(self, space: Namespace, keys: list[bytes], size: int) -> tuple[int, list[int]]:
        """Reserve shard 0 of each key; returns the reservation and the offsets."""
        shape = Reserve(namespace=space.digest, shards=[0], shard_bytes=size, layers=space.shard_layers)
        reply, payload = self.call(NodeFrame(reserve=shape), b"".join(keys))
        return reply.reserved.reservation, np.frombuffer(payload, np.int64).tolist()

    def abort(self, reservation: int) -> None:
        """Give a reservation back."""
        self.call(NodeFrame(abort=ReleaseReservation(reservation=reservation)))

    def commit(self, reservation: int, checksums: bytes) -> int:
        """Commit a reservation."""
        reply, _ = self.call(NodeFrame(commit=Commit(reservation=reservation)), checksums)
        return reply.committed.stored

    def pin(self, space: Namespace, keys: list[bytes]) -> tuple[int, list[int]]:
        """Pin shard 0 of each key; returns the pin and (offset, size) of each, flat."""
        reply, payload = self.call(NodeFrame(pin=Pin(namespace=space.digest, shards=[0])), b"".join(keys))
        return reply.pinned.pin, np.frombuffer(payload[: 16 * len(keys)], np.int64).tolist()

    def release(self, pin: int) -> None:
        """End a pin."""
        self.channel.send_only(NodeFrame(release=ReleasePin(pin=pin)), timeout_s=T)

    def local_prefix(self, space: Namespace, keys: list[bytes]) -> int:
        """Ask for the leading blocks that are here."""
        frame = NodeFrame(local_prefix=LocalPrefix(namespace=space.digest, shards=space.shards))
        return self.call(frame, b"".join(keys))[0].local_prefix.prefix


# ---- blocks whose bytes follow from their key ----------------------------------------------------------

Bytes = NDArray[np.uint8]
_NOISE = np.random.default_rng(1).integers(0, 1 << 63, 1 << 19, dtype=np.uint64)


def key_of(chain: int, block: int) -> bytes:
    """Return a block's key."""
    return hashlib.blake2b(b"%d/%d" % (chain, block), digest_size=16).digest()


def chain_of(chain: int, blocks: int) -> list[bytes]:
    """Return the keys of a prompt."""
    return [key_of(chain, block) for block in range(blocks)]


def content_of(key: bytes, size: int) -> Bytes:
    """Return a block's bytes: every word depends on the key and on its place."""
    return (_NOISE[: size // 8] ^ np.frombuffer(key[:8], np.uint64)[0]).view(np.uint8)


def put_chain(client: Client, space: Namespace, keys: list[bytes], size: int) -> int:
    """Store blocks, all of them; returns how many were new."""
    result = client.put(space, keys, [content_of(key, size) for key in keys])
    assert not result.failed, result
    return result.stored


def lookup_without_master(client: Client, space: Namespace, keys: list[bytes], **options: Any) -> Lookup:
    """Look up where there is no master: the node has 8 ms for its answer, which a busy machine may take alone."""
    answers: list[Lookup] = []

    def answered() -> bool:
        answers.append(client.lookup(space, keys, **options))
        return answers[-1].reason != "no_pool"

    wait_for(answered, "this host's node answers")
    return answers[-1]


def get_chain(client: Client, space: Namespace, keys: list[bytes], size: int, **options: Any) -> Any:
    """Get blocks and check the bytes of those that came."""
    buffers = [np.zeros(size, np.uint8) for _ in keys]
    result = client.get(space, keys, buffers, **options)
    for key, buffer, ok in zip(keys, buffers, result.ok, strict=True):
        assert not ok or np.array_equal(buffer, content_of(key, size)), "wrong bytes"
    return result


def lookup_by_grpc(channel: grpc.Channel, space: Namespace, keys: list[bytes]) -> master_pb2.LookupResponse:
    """Ask the master by gRPC."""
    request = master_pb2.LookupRequest(namespace=space.digest, hashes=b"".join(keys))
    reply: master_pb2.LookupResponse = master_pb2_grpc.MasterStub(channel).Lookup(request, timeout=T)
    return reply
