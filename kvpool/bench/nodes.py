"""Nodes without memory: real sessions with the master that report blocks which nobody stores.

They run in a process of their own. What they send is made beforehand, so that the clock sees the master.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import grpc

from kvpool.bench.harness import BenchError
from kvpool.model import KEY_BYTES, Namespace
from kvpool.rpc.convert import namespace_to_proto
from kvpool.rpc.v1 import node_pb2, types_pb2

BLOCK_BYTES = 64 << 10
DELTA_BLOCKS = 1024
"""What a node's flushes come to when it stores some hundred thousand blocks a second."""

CHUNK_BLOCKS = 32768
IN_FLIGHT_MAX = 64
HEARTBEAT_S = 0.2
ANSWER_S = 60.0
SESSION = "/kvpool.v1.NodeSession/Session"
SPACE = Namespace(model="kvpool-bench-index")


@dataclass(frozen=True, slots=True)
class Join:
    """Connect a new node that holds so many blocks; answered by (start, end, its first keys)."""

    node_id: str
    blocks: int


@dataclass(frozen=True, slots=True)
class Add:
    """Report new blocks, by all of these nodes at once; answered by (start, end) up to the last acknowledgement.

    ``rate``: blocks a second of all nodes together; 0 for as fast as the master takes them.
    """

    node_ids: tuple[str, ...]
    blocks: int
    rate: int = 0


@dataclass(frozen=True, slots=True)
class Leave:
    """End a node's session; answered by the time."""

    node_id: str


def _run(keys: bytes) -> types_pb2.BlockRun:
    return types_pb2.BlockRun(namespace=SPACE.digest, shards=b"\x01", shard_bytes=BLOCK_BYTES, keys=keys)


class SimulatedNode:
    """One session."""

    def __init__(self, channel: grpc.aio.Channel, node_id: str) -> None:
        self.node_id = node_id
        self.sequence = 0
        self.blocks = 0
        self._acked = 0
        self._progress = asyncio.Event()
        self._writing = asyncio.Lock()
        self._call: Any = channel.stream_stream(
            SESSION, request_serializer=None, response_deserializer=node_pb2.MasterMessage.FromString
        )(None)
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._beat())]

    async def join(self, blocks: int) -> tuple[float, float, bytes]:
        """Say hello and report everything; returns (start, end, the first keys)."""
        self.sequence, self.blocks = 1, blocks
        hello = node_pb2.Hello(
            address=types_pb2.NodeAddress(node_id=self.node_id, host="127.0.0.1", port=1),
            epoch=int.from_bytes(os.urandom(7), "little") | 1,
            capacity_bytes=1 << 50,
            used_bytes=blocks * BLOCK_BYTES,
            sequence=self.sequence,
            namespaces=[namespace_to_proto(SPACE)],
        )
        first = os.urandom(KEY_BYTES * min(blocks, CHUNK_BLOCKS))
        chunks = []
        for number, at in enumerate(range(0, max(1, blocks), CHUNK_BLOCKS)):
            count = min(CHUNK_BLOCKS, blocks - at)
            chunk = node_pb2.Inventory(
                sequence=self.sequence,
                chunk=number,
                last=at + CHUNK_BLOCKS >= blocks,
                added=[_run(os.urandom(KEY_BYTES * count) if number else first)],
            )
            chunks.append(node_pb2.NodeMessage(inventory=chunk).SerializeToString())
        await self._write(node_pb2.NodeMessage(hello=hello).SerializeToString())
        start = time.monotonic()
        for chunk_bytes in chunks:
            await self._write(chunk_bytes)
        await self._wait(lambda: self._acked >= self.sequence)
        return start, time.monotonic(), first[: KEY_BYTES * 4096]

    def deltas(self, blocks: int) -> list[bytes]:
        """Return messages that add so many new blocks."""
        made = []
        for at in range(0, blocks, DELTA_BLOCKS):
            count = min(DELTA_BLOCKS, blocks - at)
            self.sequence += 1
            self.blocks += count
            delta = node_pb2.Delta(
                sequence=self.sequence,
                added=[_run(os.urandom(KEY_BYTES * count))],
                used_bytes=self.blocks * BLOCK_BYTES,
            )
            made.append(node_pb2.NodeMessage(delta=delta).SerializeToString())
        return made

    async def send(self, messages: list[bytes], every_s: float) -> None:
        """Send deltas, at most some ahead of their acknowledgements, and wait for the last of those."""
        first = self.sequence - len(messages) + 1
        start = time.monotonic()
        for number, message in enumerate(messages):
            if every_s:
                await asyncio.sleep(max(0.0, start + number * every_s - time.monotonic()))
            allowed = first + number - IN_FLIGHT_MAX
            if self._acked < allowed:
                await self._wait(lambda allowed=allowed: self._acked >= allowed)  # type: ignore[misc]
            await self._write(message)
        await self._wait(lambda: self._acked >= self.sequence)

    async def leave(self) -> None:
        """Cut the session."""
        self._call.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _write(self, message: bytes) -> None:
        async with self._writing:
            await self._call.write(message)

    async def _wait(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + ANSWER_S
        while not condition():
            if self._tasks[0].done():
                raise BenchError(f"the master ended the session of {self.node_id}: {self._call.details()}")
            if time.monotonic() > end:
                raise BenchError(f"the master acknowledged {self._acked} of {self.sequence} deltas")
            self._progress.clear()
            try:
                await asyncio.wait_for(self._progress.wait(), 1.0)
            except TimeoutError:
                continue

    async def _read(self) -> None:
        try:
            async for message in self._call:
                if message.WhichOneof("body") == "ack":
                    self._acked = max(self._acked, message.ack.sequence)
                    self._progress.set()
        finally:
            self._progress.set()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            beat = node_pb2.Heartbeat(used_bytes=self.blocks * BLOCK_BYTES, sequence=self._acked)
            await self._write(node_pb2.NodeMessage(heartbeat=beat).SerializeToString())


def simulated_nodes(conn: Connection, master: str) -> None:
    """Be as many nodes as asked for: a helper that takes Join, Add and Leave."""
    asyncio.run(_serve(conn, master))


async def _serve(conn: Connection, master: str) -> None:
    options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    loop = asyncio.get_running_loop()
    channels = []
    nodes: dict[str, SimulatedNode] = {}

    async def join(request: Join) -> tuple[float, float, bytes]:
        channels.append(grpc.aio.insecure_channel(master, options))
        nodes[request.node_id] = node = SimulatedNode(channels[-1], request.node_id)
        return await node.join(request.blocks)

    async def add(request: Add) -> tuple[float, float]:
        some = [nodes[node_id] for node_id in request.node_ids]
        shares = list(_shares(request.blocks, len(some)))
        messages = [node.deltas(share) for node, share in zip(some, shares, strict=True)]
        every_s = DELTA_BLOCKS * len(some) / request.rate if request.rate else 0.0
        start = time.monotonic()
        await asyncio.gather(*(node.send(made, every_s) for node, made in zip(some, messages, strict=True)))
        return start, time.monotonic()

    async def leave(request: Leave) -> float:
        await nodes.pop(request.node_id).leave()
        return time.monotonic()

    handlers: dict[type, Callable[[Any], Awaitable[Any]]] = {Join: join, Add: add, Leave: leave}
    try:
        conn.send(None)
        while True:
            request = await loop.run_in_executor(None, conn.recv)
            conn.send(await handlers[type(request)](request))
    finally:
        for node in nodes.values():
            await node.leave()
        for channel in channels:
            await channel.close(None)


def _shares(total: int, parts: int) -> Iterator[int]:
    for part in range(parts):
        yield total * (part + 1) // parts - total * part // parts
