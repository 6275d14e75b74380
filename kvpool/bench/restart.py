"""How soon a master that was killed serves again what its catalog has: C files, no node that stores anything.

A session without memory behind it reports files of a backend, and the master is killed when it has acknowledged
all of them. The clock runs from the start of the new process, Python's own start included.
"""

from __future__ import annotations

import os
import queue
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import grpc

from kvpool.bench.harness import BenchError
from kvpool.bench.pool import HOST, bench_children
from kvpool.model import KEY_BYTES, Namespace
from kvpool.rpc.convert import namespace_to_proto
from kvpool.rpc.v1 import master_pb2, master_pb2_grpc, node_pb2, node_pb2_grpc, types_pb2
from kvpool.server.launch import CHANNEL_OPTIONS, Children, StartError, free_port, is_serving, join_address

SPACE = Namespace(model="kvpool-bench-restart")
BACKEND = types_pb2.Backend(id=b"kvpool-bench-dir", url="kvpool-bench", capacity_bytes=1 << 50)
SHARD_BYTES = 128 << 10
DELTA_BLOCKS = 1024
PROMPT_BLOCKS = 1024
HEARTBEAT_S = 0.1
START_S = 60.0
ACKNOWLEDGED_S = 120.0
AGAIN_S = 0.01


class Restarted(NamedTuple):
    """Seconds: until all files were acknowledged; after the restart to the first answer, and to all prompts whole."""

    blocks: int
    acknowledged_s: float
    answering_s: float
    whole_s: float


class _Session:
    """A node that stores nothing: it says hello, and what it is told to, until it is closed."""

    def __init__(self, address: str) -> None:
        self.acknowledged = 0
        self.ended = threading.Event()
        self._messages: queue.SimpleQueue[node_pb2.NodeMessage | None] = queue.SimpleQueue()
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._messages.put(node_pb2.NodeMessage(hello=node_pb2.Hello(
            address=types_pb2.NodeAddress(node_id="kvpool-bench", host=HOST, port=1),
            epoch=1, capacity_bytes=1 << 30, namespaces=[namespace_to_proto(SPACE)], backends=[BACKEND],
        )))  # fmt: skip
        self._messages.put(node_pb2.NodeMessage(inventory=node_pb2.Inventory(sequence=0, chunk=0, last=True)))
        self._messages.put(node_pb2.NodeMessage(scanned=node_pb2.Scanned(backend=BACKEND.id, last=True)))
        threading.Thread(target=self._read, name="kvpool-bench-session", daemon=True).start()

    def tell(self, message: node_pb2.NodeMessage) -> None:
        """Send a message."""
        self._messages.put(message)

    def close(self) -> None:
        """End the session."""
        self._messages.put(None)
        self._channel.close()

    def _said(self) -> Iterator[node_pb2.NodeMessage]:
        while True:
            try:
                message = self._messages.get(timeout=HEARTBEAT_S)
            except queue.Empty:
                message = node_pb2.NodeMessage(heartbeat=node_pb2.Heartbeat(sequence=self.acknowledged))
            if message is None:
                return
            yield message

    def _read(self) -> None:
        try:
            for message in node_pb2_grpc.NodeSessionStub(self._channel).Session(self._said()):
                body = message.WhichOneof("body")
                if body == "ack":
                    self.acknowledged = max(self.acknowledged, message.ack.sequence)
                elif body == "scan":
                    self.tell(node_pb2.NodeMessage(scanned=node_pb2.Scanned(backend=BACKEND.id, last=True)))
        except (grpc.RpcError, ValueError):  # the master was killed, or the channel closed
            pass
        self.ended.set()


def measure(blocks: int = 200_000) -> Restarted:
    """Fill a catalog, kill the master, start another one, ask for everything. Raises BenchError, StartError."""
    address = join_address(HOST, free_port(HOST))
    keys = os.urandom(KEY_BYTES * blocks)
    children = bench_children()
    with tempfile.TemporaryDirectory(prefix="kvpool-bench-", ignore_cleanup_errors=True) as directory:
        try:
            acknowledged_s = _fill(children, address, directory, keys)
            children.children[0].process.kill()
            children.children[0].process.wait(START_S)
            children.children.clear()
            started = time.monotonic()
            _start(children, address, directory)
            answering, whole = _ask(children, address, keys)
        finally:
            children.close()
    return Restarted(blocks, acknowledged_s, answering - started, whole - started)


def _start(children: Children, address: str, directory: str) -> None:
    arguments = ["--host", HOST, "--port", address.rpartition(":")[2], "--data_dir", directory]
    children.start("master", "kvpool.cli.master", [*arguments, "--log_level", "warning"])


def _fill(children: Children, address: str, directory: str, keys: bytes) -> float:
    _start(children, address, directory)
    with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        children.wait_until(lambda: is_serving(channel), "the master was not ready", time.monotonic() + START_S)
    session = _Session(address)
    started = time.monotonic()
    step = DELTA_BLOCKS * KEY_BYTES
    last = 0
    for last, at in enumerate(range(0, len(keys), step), 1):
        run = types_pb2.BlockRun(namespace=SPACE.digest, shards=b"\x01", shard_bytes=SHARD_BYTES,
                                 keys=keys[at : at + step], backend=BACKEND.id)  # fmt: skip
        session.tell(node_pb2.NodeMessage(delta=node_pb2.Delta(sequence=last, added=[run])))
    while session.acknowledged < last:
        if session.ended.is_set() or time.monotonic() > started + ACKNOWLEDGED_S:
            raise BenchError(f"the master acknowledged {session.acknowledged} of {last} deltas")
        time.sleep(AGAIN_S)
    acknowledged_s = time.monotonic() - started
    session.close()
    return acknowledged_s


def _ask(children: Children, address: str, keys: bytes) -> tuple[float, float]:
    """Return when the master gave its first answer, and when every prompt was whole."""
    deadline = time.monotonic() + START_S
    session: _Session | None = None
    answering = 0.0
    step = PROMPT_BLOCKS * KEY_BYTES
    at = 0
    with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        stub = master_pb2_grpc.MasterStub(channel)
        while at < len(keys):
            children.check()
            if time.monotonic() > deadline:
                raise StartError(f"only {at // KEY_BYTES} blocks were found in time")
            if session is None or session.ended.is_set():
                session = _Session(address)
            prompt = keys[at : at + step]
            request = master_pb2.LookupRequest(namespace=SPACE.digest, hashes=prompt)
            try:
                found = stub.Lookup(request, timeout=1.0).prefix
            except grpc.RpcError:
                time.sleep(AGAIN_S)
                continue
            answering = answering or time.monotonic()
            if found * KEY_BYTES == len(prompt):
                at += step
            else:
                time.sleep(AGAIN_S)
        whole = time.monotonic()
        if session is not None:
            session.close()
    return answering, whole
