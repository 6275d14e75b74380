"""A node whose file tier does what a test wants: real frames on real sockets, its files a dict."""

from __future__ import annotations

import asyncio
import struct
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from kvpool.client_bytes import hash_layers, pack_digests
from kvpool.model import KEY_BYTES, NodeAddress
from kvpool.rpc.v1.node_pb2 import Attached, Got, LocalPrefixReply, NodeFrame, NodeFrameReply, Pinned
from kvpool.transport.server import Connection, FrameServer
from kvpool.transport.shm import MappedMemory, create_memfd, seal

WAIT_S = 10.0
SEGMENT_BYTES = 4 << 20
BACKEND = b"one backend's id"


class FileNode:
    """Holds ``memory`` and ``files``: keys with the bytes of shard 0. ``codes``: what storage answers for some keys.

    ``storage`` is "up", "down", or "hangs": answers then come when the wait is over. What is read stays in a
    slot of its own and is not in ``memory`` afterwards.
    """

    def __init__(self, directory: Path, name: str, layers: int, backends: Iterable[bytes] = (BACKEND,)) -> None:
        self.name = name
        self.path = str(directory / f"{name}.sock")
        self.layers = layers
        self.backends = list(backends)
        self.memory: dict[bytes, bytes] = {}
        self.files: dict[bytes, bytes] = {}
        self.codes: dict[bytes, int] = {}
        self.storage = "up"
        self.hold: threading.Event | None = None
        """Answers to fetches wait for it."""
        self.fetches: list[tuple[int, bytes]] = []
        """(blocks, backend) of each frame that asked for files."""
        self.prefetched: list[tuple[tuple[int, ...], bytes, bytes]] = []
        """(shards, keys, backend) of each frame."""
        self.waiting = 0
        self.waiting_max = 0
        self.pinned = 0
        self.counts: Counter[str] = Counter()
        self._fd = create_memfd(name, SEGMENT_BYTES)
        self._segment = MappedMemory(self._fd, SEGMENT_BYTES)
        seal(self._fd)
        self._slots: dict[bytes, int] = {}
        self._free_at = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))
        self._thread.start()
        assert self._ready.wait(WAIT_S)

    @property
    def address(self) -> NodeAddress:
        """Where its TCP side listens."""
        return NodeAddress(self.name, "127.0.0.1", self.port, self.path, "boot")

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._server = FrameServer(self)
        self._server.listen_unix(self.path)
        _, self.port = self._server.listen_tcp("127.0.0.1", 0)
        self._ready.set()
        await self._stop.wait()
        await self._server.close()

    def close(self) -> None:
        """End it: connections break."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(WAIT_S)
        self._segment.close()

    def change(self, key: bytes) -> None:
        """Change a byte of what was read into memory."""
        self._segment.view[self._slots[key] + 5] ^= 1

    # ---- frames --------------------------------------------------------------------------------------

    def opened(self, conn: Connection) -> None:
        """Let everybody in."""

    def closed(self, conn: Connection, reason: str) -> None:
        """Forget it."""

    def streams_payload(self, conn: Connection, message: NodeFrame, payload_bytes: int) -> bool:
        """Take no writes."""
        return False

    def frame(self, conn: Connection, message: NodeFrame, payload: memoryview) -> None:
        """Answer, after a while where storage hangs."""
        kind = message.WhichOneof("body") or ""
        self.counts[kind] += 1
        keys = [bytes(payload[at : at + KEY_BYTES]) for at in range(0, len(payload), KEY_BYTES)]
        reply = NodeFrameReply(id=message.id)
        if kind == "attach":
            reply.attached.CopyFrom(
                Attached(node_id=self.name, epoch=1, segment_bytes=SEGMENT_BYTES, backends=self.backends)
            )
            conn.reply(reply, fds=[self._fd])
        elif kind == "register":
            conn.reply(reply)
        elif kind == "local_prefix":
            reply.local_prefix.CopyFrom(LocalPrefixReply(prefix=0))
            conn.reply(reply)
        elif kind == "prefetch":
            self.prefetched.append((tuple(message.prefetch.shards), bytes(payload), message.prefetch.backend))
        elif kind == "release":
            self.pinned -= 1
        elif kind in {"pin", "get"}:
            request: Any = getattr(message, kind)
            if not request.fetch_ms:
                conn.reply(*self._answer(reply, kind, keys, self.memory))
                return
            self.fetches.append((len(keys), request.backend))
            self.waiting += 1
            self.waiting_max = max(self.waiting, self.waiting_max)
            conn.hold()
            self._loop.create_task(self._fetch(conn, reply, kind, keys, request.fetch_ms))

    async def _fetch(self, conn: Connection, reply: NodeFrameReply, kind: str, keys: list[bytes], ms: int) -> None:
        give_up = self._loop.time() + ms / 1000
        def stuck() -> bool:
            return self.storage == "hangs" or (self.hold is not None and not self.hold.is_set())

        while self._loop.time() < give_up and stuck():  # noqa: ASYNC110 -- set by other threads
            await asyncio.sleep(0.002)
        self.waiting -= 1
        there = {**self.memory, **(self.files if self.storage == "up" else {})}
        missing = {"up": -4, "down": -6, "hangs": -7}[self.storage]
        conn.reply(*self._answer(reply, kind, keys, there, missing))
        conn.release()

    def _answer(
        self, reply: NodeFrameReply, kind: str, keys: list[bytes], there: dict[bytes, bytes], missing: int = -1
    ) -> tuple[NodeFrameReply, bytes]:
        found = [None if key in self.codes and missing != -1 else there.get(key) for key in keys]
        codes = [self.codes.get(key, missing) if missing != -1 else -1 for key in keys]
        data = [block for block in found if block is not None]
        sums = [
            pack_digests(hash_layers([np.frombuffer(b, np.uint8)], len(b) // self.layers, self.layers)) for b in data
        ]
        if kind == "get":
            reply.got.CopyFrom(Got(layers=self.layers))
            sizes = [code if block is None else len(block) for code, block in zip(codes, found, strict=True)]
            return reply, b"".join([struct.pack(f"<{len(sizes)}q", *sizes), *sums, *data])
        pin = 1 if data else 0
        self.pinned += pin
        reply.pinned.CopyFrom(Pinned(pin=pin, layers=self.layers))
        places = []
        for key, code, block in zip(keys, codes, found, strict=True):
            places += [code, 0] if block is None else [self._slot(key, block), len(block)]
        return reply, b"".join([struct.pack(f"<{len(places)}q", *places), *sums])

    def _slot(self, key: bytes, block: bytes) -> int:
        if key not in self._slots:
            self._slots[key], self._free_at = self._free_at, self._free_at + len(block)
            self._segment.view[self._slots[key] : self._free_at] = block
        return self._slots[key]
