"""The way to this host's own node: pins and reservations by unix socket, bytes through shared memory."""

from __future__ import annotations

import contextlib
import logging
import platform
import secrets
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from kvpool.client_bytes import Blocks, Bytes, CopyThreads, hash_layers, keys_at, pack_digests, unpack_digests, view
from kvpool.client_copies import copy_in, copy_out
from kvpool.client_files import PART_BLOCKS_MAX, PART_BYTES, check_probe, fetch_ms, key_parts, reason_of
from kvpool.client_held import Held
from kvpool.client_unpinned import UnpinnedReads
from kvpool.core.slot_table import ordered
from kvpool.errors import FrameError, InvalidArgumentError, KVPoolError, UnavailableError, UnknownNamespaceError
from kvpool.model import DIGEST_BYTES, KEY_BYTES, Namespace
from kvpool.rpc.convert import namespace_to_proto
from kvpool.rpc.v1 import node_pb2
from kvpool.transport.channel import Channel, ChannelPool
from kvpool.transport.shm import AttachedSegment, close_fds

log = logging.getLogger(__name__)

CHANNELS_MAX = 16
LONG_CHANNELS_MAX = 64
"""Of those who keep a channel for as long as a prompt is computed: they write layers, or wait for them."""

PARTS_AHEAD = 4
"""Parts that the node may read from files for one call at once, the one waited for included."""

CONNECT_S = 0.5
HASH_FIRST_BYTES_MAX = 4 << 20
PATIENCE_S = 0.02
"""A node that does not answer within less than this may be well: its caller is late."""

CONTROL_S = 0.5
"""A node that answers no question for so long is stopped: go on without it."""

NodeFrame = node_pb2.NodeFrame
NodeFrameReply = node_pb2.NodeFrameReply

STORED, BEING_WRITTEN, NO_ROOM = -1, -2, -3


class LocalNode:
    """An attached node of this host. A failure of the socket ends it: ``alive`` is False from then on."""

    def __init__(self, path: str, name: str) -> None:
        """Attach. Raises UnavailableError, or what the node answers."""
        self.path = path
        self._name = name
        self._pool = ChannelPool(self._connect, channels_max=CHANNELS_MAX)
        self._long = ChannelPool(self._connect, channels_max=LONG_CHANNELS_MAX)
        with contextlib.closing(Channel.connect_unix(path, CONNECT_S)) as channel:
            attached, fds = self._attach(channel, CONNECT_S)
        self.node_id, self.epoch = attached.node_id, attached.epoch
        self.backends = frozenset(attached.backends)
        self._segment: AttachedSegment | None = AttachedSegment.from_fd(fds[0], attached.segment_bytes)
        self._segment_bytes = attached.segment_bytes
        self._memory: Bytes | None = np.frombuffer(self._segment.view, np.uint8)
        self._unpinned: UnpinnedReads | None = None
        if ordered(platform.machine()):
            with contextlib.suppress(LookupError):  # a node that keeps no table
                self._unpinned = UnpinnedReads(view(self._memory), self._copy_items, self._touch)
        self._registered: set[bytes] = set()
        self.alive = True
        self.writer = secrets.randbits(63) | 1
        self._lock = threading.Lock()
        self._writing = 0  # puts that may be copying into the segment

    def _connect(self, timeout_s: float) -> Channel:
        """Connect to the very process whose memory is mapped here: another one's offsets mean other bytes."""
        channel = Channel.connect_unix(self.path, timeout_s)
        try:
            attached, fds = self._attach(channel, timeout_s)
            close_fds(fds)
            if attached.epoch != self.epoch:
                self.alive = False
                raise UnavailableError(f"another node serves {self.path} by now")
            self.backends |= frozenset(attached.backends)
        except KVPoolError:
            channel.close()
            raise
        return channel

    def _attach(self, channel: Channel, timeout_s: float) -> tuple[node_pb2.Attached, list[int]]:
        attach = NodeFrame(attach=node_pb2.Attach(client=self._name))
        reply, _, fds = channel.call_with_fds(attach, NodeFrameReply, timeout_s=timeout_s)
        return reply.attached, fds

    def prefault(self) -> None:
        """Enter the segment's pages into our page table, so that no copy has to. Takes seconds for much memory."""
        try:
            if (segment := self._segment) is not None:
                segment.prefault()
        except (InvalidArgumentError, ValueError) as exc:  # ValueError: closed meanwhile
            log.debug("the segment of %s is not prefaulted: %s", self.path, exc)

    def memory(self) -> Bytes:
        """Return the whole segment, mapped as long as somebody holds it. Raises UnavailableError after ``close``."""
        if (memory := self._memory) is None:
            raise UnavailableError("the node was let go of")
        return memory

    def close(self) -> None:
        """Let go of the node; copies that still run keep the mapping until they end."""
        self.alive = False
        self._pool.close()
        self._long.close()
        self._memory = self._unpinned = None
        segment, self._segment = self._segment, None
        if segment is not None:
            segment.close()

    def look(self) -> None:
        """Notice that the node has ended, and tell it what was read. An idle channel that is open asks it nothing."""
        if self._pool.any_free:
            with contextlib.suppress(KVPoolError), self._channel(CONTROL_S):
                pass
        if self.alive and (unpinned := self._unpinned) is not None:
            unpinned.tell()

    def put(
        self,
        namespace: Namespace,
        keys: bytes,
        blocks: Blocks,
        shard: int,
        copies: CopyThreads,
        timeout_s: float,
        transfer: int = 0,
    ) -> dict[str, int]:
        """Store one shard of each block; returns counts of stored, existed, being_written, no_room."""
        timeout_s = min(timeout_s, CONTROL_S)
        digests: list[list[int]] | None = None

        def hash_early() -> None:
            nonlocal digests
            # More than this would have left the cache before it is copied.
            size = len(blocks) * blocks.shard_bytes
            if size <= HASH_FIRST_BYTES_MAX and not blocks.gapped and blocks.rows is None:
                digests = [hash_layers(pieces, blocks.layer_bytes, blocks.layers) for pieces in blocks.pieces]

        with self._writes(), self._channel(timeout_s) as channel, self._reserving(), self._held(channel) as held:
            held.reservation, offsets = self._reserve(
                channel, namespace, keys, shard, (blocks.shard_bytes, blocks.layers), timeout_s, hash_early, transfer
            )
            counts = {
                "existed": offsets.count(STORED),
                "being_written": offsets.count(BEING_WRITTEN),
                "no_room": offsets.count(NO_ROOM),
            }
            items = [(i, offset) for i, offset in enumerate(offsets) if offset >= 0]
            if items:
                digests = copy_in(self.memory(), items, blocks, digests, copies)
                checksums = pack_digests([digest for i, _ in items for digest in digests[i]])
                commit = node_pb2.Commit(reservation=held.reservation)
                reply, _ = channel.call(NodeFrame(commit=commit), NodeFrameReply, checksums, timeout_s=timeout_s)
                counts["stored"] = reply.committed.stored
        return counts

    def _reserve(
        self,
        channel: Channel,
        namespace: Namespace,
        keys: bytes,
        shard: int,
        shape: tuple[int, int],
        timeout_s: float,
        meanwhile: Callable[[], None] = lambda: None,
        transfer: int = 0,
    ) -> tuple[int, tuple[int, ...]]:
        """Reserve slots of ``shape`` (bytes, layers); returns (reservation, offsets, below 0 as ``STORED`` and so on).

        ``meanwhile`` is called while the node looks for room.
        """
        shard_bytes, layers = shape
        reserve = node_pb2.Reserve(
            namespace=namespace.digest, shards=[shard], shard_bytes=shard_bytes, layers=layers, writer=self.writer,
            transfer=transfer,
        )  # fmt: skip
        request = NodeFrame(reserve=reserve)
        try:
            channel.start(request, keys, timeout_s=timeout_s)
            meanwhile()
            reply, payload = channel.finish(request, NodeFrameReply, soon=True)
        except UnknownNamespaceError:
            self._register(channel, namespace, timeout_s)
            reply, payload = channel.call(request, NodeFrameReply, keys, timeout_s=timeout_s)
        return reply.reserved.reservation, self._places(payload, len(keys) // KEY_BYTES, 1, shard_bytes)

    # ---- layers, before the commit -------------------------------------------------------------------

    def begin_put(
        self, namespace: Namespace, keys: bytes, shard: int, shape: tuple[int, int], transfer: int, timeout_s: float
    ) -> tuple[contextlib.ExitStack, Channel, int, tuple[int, ...]]:
        """Reserve slots on a channel that is the caller's until it closes the stack; until then it may write to them.

        Returns (stack, channel, reservation, offsets).
        """
        with contextlib.ExitStack() as held:
            held.enter_context(self._writes())
            channel = held.enter_context(self._channel(timeout_s, self._long))
            with self._reserving(), self._held(channel) as reserved:
                reserved.reservation, offsets = self._reserve(
                    channel, namespace, keys, shard, shape, timeout_s, transfer=transfer
                )
            return held.pop_all(), channel, reserved.reservation, offsets

    def copy_layers(
        self, offsets: Sequence[int], blocks: Blocks, first_layer: int, copies: CopyThreads
    ) -> list[list[int]]:
        """Copy some layers of blocks into their slots; returns their checksums."""
        begin = first_layer * blocks.layer_bytes
        items = [(i, offset + begin) for i, offset in enumerate(offsets)]
        return copy_in(self.memory(), items, blocks, None, copies)

    @contextlib.contextmanager
    def long_channel(self, timeout_s: float) -> Iterator[Channel]:
        """Lend a channel to somebody who waits on it; when it breaks, the node counts as gone."""
        with self._channel(timeout_s, self._long) as channel:
            yield channel

    def read_ready(
        self, pinned: node_pb2.Pinned, payload: memoryview, asked: int, blocks: Blocks, first_layer: int,
        copies: CopyThreads,
    ) -> list[str]:  # fmt: skip
        """Copy the layers that are ready, ``blocks``, from where they are pinned; returns "" or a miss reason for each.

        ``asked``: of how many blocks the payload speaks; those that are here come first.
        """
        places = self._places(payload[: 16 * asked], asked, 2, pinned.layers * blocks.layer_bytes)
        checksums = unpack_digests(payload[16 * asked :])
        if len(checksums) != pinned.ready * len(blocks):
            raise FrameError("the checksums do not fit the blocks that are pinned")
        reasons = ["wrong_size"] * len(blocks)
        begin = first_layer * blocks.layer_bytes
        items = [
            (i, places[2 * i] + begin, i * pinned.ready, (i + 1) * pinned.ready)
            for i in range(len(blocks))
            if places[2 * i + 1] == pinned.layers * blocks.layer_bytes
        ]
        self._copy_items(items, checksums, blocks, True, copies, reasons)
        return reasons

    def get(
        self,
        namespace: Namespace,
        keys: bytes,
        blocks: Blocks,
        shard: int,
        first_layer: int,
        verify: bool,
        copies: CopyThreads,
        timeout_s: float,
    ) -> list[str]:
        """Fill the buffers of the blocks that are here; returns "" or a miss reason for each."""
        digest, timeout_s = namespace.digest, min(timeout_s, CONTROL_S)
        unpinned = self._unpinned
        if unpinned is None:
            return self._get_pinned(digest, keys, blocks, shard, first_layer, verify, copies, timeout_s)
        layers = (first_layer, namespace.shard_layers)
        reasons = unpinned.get(digest, keys, blocks, shard, layers, verify, copies)
        rest = [number for number, reason in enumerate(reasons) if reason]
        if rest:
            wanted, some = keys_at(keys, rest), blocks.some(rest)
            found = self._get_pinned(digest, wanted, some, shard, first_layer, verify, copies, timeout_s)
            for number, reason in zip(rest, found, strict=True):
                reasons[number] = reason
        return reasons

    def get_listed(
        self, namespace: Namespace, keys: bytes, blocks: Blocks, shard: int, copies: CopyThreads
    ) -> list[str]:
        """Fill the buffers of whole blocks that can be read without asking; returns "" for those."""
        if (unpinned := self._unpinned) is None:
            return ["not_here"] * len(blocks)
        return unpinned.get(namespace.digest, keys, blocks, shard, (0, namespace.shard_layers), True, copies)

    def _touch(self, namespace: bytes, shard: int, keys: bytes) -> None:
        """Tell the node that blocks were read without a pin, if that can be done at once."""
        if self._pool.any_free:
            with contextlib.suppress(KVPoolError), self._channel(CONTROL_S) as channel:
                frame = NodeFrame(touch=node_pb2.Touch(namespace=namespace, shards=[shard]))
                for part in reversed(key_parts(keys)):  # as within one: the head of a chain is used last
                    channel.send_only(frame, part, timeout_s=CONTROL_S)

    def _get_pinned(
        self,
        namespace: bytes,
        keys: bytes,
        blocks: Blocks,
        shard: int,
        first_layer: int,
        verify: bool,
        copies: CopyThreads,
        timeout_s: float,
    ) -> list[str]:
        pin = NodeFrame(pin=node_pb2.Pin(namespace=namespace, shards=[shard]))
        reasons = [""] * len(blocks)
        for part, some_keys, some in reversed(list(blocks.parts(keys, PART_BLOCKS_MAX))):  # a chain's head is used last
            with self._channel(timeout_s) as channel:
                reply, payload = channel.call(pin, NodeFrameReply, some_keys, timeout_s=timeout_s)
                taken = self._take(channel, reply.pinned, payload, some, first_layer, verify, copies)
            reasons[part.start : part.stop] = taken
        return reasons

    def fetch(
        self,
        namespace: bytes,
        parts: Sequence[tuple[bytes, Blocks]],
        place: tuple[int, int],
        backend: bytes,
        verify: bool,
        copies: CopyThreads,
        deadline: float,
    ) -> Iterator[list[str]]:
        """Have blocks read from files and fill their buffers; yields "" or a miss reason for each of a part.

        ``parts``: keys and buffers; ``place``: shard and first layer. While one part is copied the next ones
        are read. Storage that fails is no failure of the node: it stays attached whatever is raised.
        """
        shard, first_layer = place
        rest = deque(parts)
        asked: deque[tuple[contextlib.ExitStack, Channel, NodeFrame, Blocks]] = deque()
        try:
            while rest or asked:
                # Nobody waits for a channel while holding one.
                while rest and (not asked or (len(asked) < PARTS_AHEAD and self._pool.any_free)):
                    left_s = deadline - time.monotonic()
                    if left_s <= 0:
                        raise UnavailableError("deadline exceeded")
                    keys, blocks = rest.popleft()
                    pin = node_pb2.Pin(namespace=namespace, shards=[shard], fetch_ms=fetch_ms(left_s), backend=backend)
                    held = contextlib.ExitStack()
                    channel = held.enter_context(self._pool.channel(left_s))
                    asked.append((held, channel, NodeFrame(pin=pin), blocks))
                    channel.start(asked[-1][2], keys, timeout_s=left_s)
                held, channel, request, blocks = asked[0]
                reply, payload = channel.finish(request, NodeFrameReply, soon=False)
                reasons = self._take(channel, reply.pinned, payload, blocks, first_layer, verify, copies)
                asked.popleft()
                held.close()
                yield reasons
        finally:
            for held, channel, _, _ in asked:
                channel.close()  # an answer may still come
                held.close()

    def serves(self, backend: bytes, named: str) -> bool:
        """Return whether this node reads a backend's files, given the node that the master named for them."""
        if named == self.node_id and backend not in self.backends:
            self.backends |= {backend}  # storage may have been opened long after we attached
        return backend in self.backends

    def part_bytes(self) -> int:
        """Return how much to ask of storage at a time: a small segment must hold several parts for several calls."""
        return min(PART_BYTES, self._segment_bytes // (8 * PARTS_AHEAD))

    def prefetch(self, namespace: bytes, keys: bytes, shards: Sequence[int], backend: bytes, timeout_s: float) -> None:
        """Ask for blocks to be brought from files into memory; does not wait for them."""
        with self._pool.channel(timeout_s) as channel:
            frame = NodeFrame(prefetch=node_pb2.Prefetch(namespace=namespace, shards=shards, backend=backend))
            for part in key_parts(keys, len(shards)):
                channel.send_only(frame, part, timeout_s=timeout_s)

    def probe_storage(self, namespace: bytes, backend: bytes) -> None:
        """Return when the node's storage answers. Raises UnavailableError."""
        nothing = node_pb2.Pin(namespace=namespace, shards=[0], fetch_ms=fetch_ms(CONTROL_S), backend=backend)
        with self._pool.channel(CONTROL_S) as channel:
            _, payload = channel.call(NodeFrame(pin=nothing), NodeFrameReply, bytes(KEY_BYTES), timeout_s=CONTROL_S)
        check_probe(self._places(payload[:16], 1, 2, 0)[0])

    def _take(
        self,
        channel: Channel,
        pinned: node_pb2.Pinned,
        payload: memoryview,
        blocks: Blocks,
        first_layer: int,
        verify: bool,
        copies: CopyThreads,
    ) -> list[str]:
        """Copy what is pinned into the buffers and let go of it; returns "" or a miss reason for each block."""
        places = self._places(payload[: 16 * len(blocks)], len(blocks), 2, blocks.shard_bytes)
        reasons = [reason_of(offset) for offset in places[::2]]
        if not pinned.pin:
            return [reason or "not_here" for reason in reasons]
        try:
            checksums = unpack_digests(payload[16 * len(blocks) :])
            self._copy_out(places, checksums, pinned.layers, blocks, first_layer, verify, copies, reasons)
        finally:
            release = NodeFrame(release=node_pb2.ReleasePin(pin=pinned.pin))
            channel.send_only(release, timeout_s=CONTROL_S)
        return reasons

    def _copy_out(
        self,
        places: tuple[int, ...],
        checksums: tuple[int, ...],
        slot_layers: int,
        blocks: Blocks,
        first_layer: int,
        verify: bool,
        copies: CopyThreads,
        reasons: list[str],
    ) -> None:
        pairs = zip(places[::2], places[1::2], strict=True)
        here = [(i, offset, size) for i, (offset, size) in enumerate(pairs) if offset >= 0]
        if len(checksums) != len(here) * slot_layers:
            raise FrameError("the checksums do not fit the blocks that are pinned")
        items = []
        last_layer = first_layer + blocks.layers
        for number, (i, offset, size) in enumerate(here):
            if size != slot_layers * blocks.layer_bytes or last_layer > slot_layers:
                reasons[i] = "wrong_size"
                continue
            first = number * slot_layers
            items.append((i, offset + first_layer * blocks.layer_bytes, first + first_layer, first + last_layer))

        self._copy_items(items, checksums, blocks, verify, copies, reasons)

    def _copy_items(
        self,
        items: Sequence[tuple[int, int, int, int]],
        checksums: Sequence[int],
        blocks: Blocks,
        verify: bool,
        copies: CopyThreads,
        reasons: list[str],
    ) -> None:
        copy_out(self.memory(), items, checksums, blocks, verify, copies, reasons)

    @property
    def writing(self) -> bool:
        """Whether some put may still be copying into the segment."""
        return self._writing > 0

    def abandon(self, writer: int) -> None:
        """Let the node free what another, closed LocalNode of this process had reserved."""
        with self._channel(CONTROL_S) as channel:
            channel.call(NodeFrame(abandon=node_pb2.Abandon(writer=writer)), NodeFrameReply, timeout_s=CONTROL_S)

    @contextlib.contextmanager
    def _writes(self) -> Iterator[None]:
        with self._lock:
            self._writing += 1
        try:
            yield
        finally:
            with self._lock:
                self._writing -= 1

    def _held(self, channel: Channel) -> Held:
        def lose() -> None:
            self.alive = False

        return Held(channel, lose)

    @contextlib.contextmanager
    def _reserving(self) -> Iterator[None]:
        """Whom an answer is late from, however short the time, keeps what was reserved until it is attached anew."""
        try:
            yield
        except (UnavailableError, FrameError):
            self.alive = False
            raise

    def local_prefix(self, namespace: Namespace, keys: bytes, timeout_s: float) -> int:
        """Return how many leading blocks this node holds whole."""
        request = node_pb2.LocalPrefix(namespace=namespace.digest, shards=namespace.shards)
        # Not by _channel: the time is so short that a busy node may miss it, which is no reason to leave it.
        with self._pool.channel(timeout_s) as channel:
            reply, _ = channel.call(NodeFrame(local_prefix=request), NodeFrameReply, keys, timeout_s=timeout_s)
        return reply.local_prefix.prefix

    def probe(self) -> None:
        """Return when the node answers. Raises UnavailableError."""
        anything = NodeFrame(local_prefix=node_pb2.LocalPrefix(namespace=bytes(DIGEST_BYTES), shards=1))
        with self._pool.channel(CONTROL_S) as channel:
            channel.call(anything, NodeFrameReply, timeout_s=CONTROL_S)

    def register(self, namespace: Namespace, timeout_s: float) -> None:
        """Make a namespace known to the node, once."""
        if namespace.digest not in self._registered:
            with self._channel(timeout_s) as channel:
                self._register(channel, namespace, timeout_s)

    def _register(self, channel: Channel, namespace: Namespace, timeout_s: float) -> None:
        channel.call(NodeFrame(register=namespace_to_proto(namespace)), NodeFrameReply, timeout_s=timeout_s)
        self._registered.add(namespace.digest)

    @contextlib.contextmanager
    def _channel(self, timeout_s: float, pool: ChannelPool | None = None) -> Iterator[Channel]:
        """Lend a channel; when it breaks, the node counts as gone until it is attached anew.

        Not when an answer has not come because the caller had next to no time left for it.
        """
        start = time.monotonic()
        try:
            with (pool or self._pool).channel(timeout_s) as channel:
                yield channel
        except (UnavailableError, FrameError):
            if timeout_s >= PATIENCE_S or time.monotonic() - start < timeout_s:
                self.alive = False
            raise

    def _places(self, payload: memoryview, blocks: int, columns: int, shard_bytes: int) -> tuple[int, ...]:
        """Return the answer's offsets (and sizes, in turn), none of which leads out of the segment."""
        if len(payload) != 8 * blocks * columns:
            raise FrameError(f"the answer has {len(payload)} bytes for {blocks} blocks")
        places = struct.unpack(f"<{blocks * columns}q", payload)
        if max(places[::columns], default=0) + shard_bytes > self._segment_bytes:
            raise FrameError("an offset lies outside of the segment")
        return places
