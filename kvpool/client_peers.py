"""The way to other hosts' nodes: TCP, straight between the caller's buffers and the node's segment."""

from __future__ import annotations

import contextlib
import itertools
import logging
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvpool.client_bytes import (
    Blocks,
    Bytes,
    CopyThreads,
    hash_layers,
    layer_of,
    layers_of,
    pack_digests,
    scatter,
    scratch,
    unpack_digests,
    view,
)
from kvpool.client_files import PART_BYTES, StorageGuards, check_probe, fetch_ms, judge, part_blocks, reason_of
from kvpool.client_health import BreakerOpenError, Guard, Health
from kvpool.client_rows import digest64
from kvpool.errors import FrameError, KVPoolError, OverloadedError, UnavailableError, UnknownNamespaceError
from kvpool.model import CHECKSUM_BYTES, DIGEST_BYTES, KEY_BYTES, Namespace, NodeAddress
from kvpool.rpc.convert import namespace_to_proto
from kvpool.rpc.v1 import node_pb2
from kvpool.transport.channel import Channel, ChannelPool, time_left
from kvpool.transport.sockets import STEP_BYTES, TICK_S, receive_hashed

log = logging.getLogger(__name__)

CHANNELS_MAX = 8
WAITING_CHANNELS_MAX = 64
"""Of those who wait for what a node is still being given."""

PROGRESS_S = 0.4
"""A node that is stopped answers nothing: after this long the next owner is asked."""

PATIENCE_S = 0.1
"""A failure that took longer is not waited for again in the same call."""

REQUEST_BYTES = 128 << 20
"""What is asked for at once: between two requests nothing is on its way."""

GATHER_BYTES = 32 << 20
"""Of blocks with gaps, what is copied to be sent at once."""

SKIP_BYTES = 2 << 20

UNNAMED_S = 600.0
"""A node that the master has not named for so long is forgotten."""

NodeFrame = node_pb2.NodeFrame
NodeFrameReply = node_pb2.NodeFrameReply


@dataclass(frozen=True, slots=True)
class Want:
    """What a get asks of each block."""

    shard: int
    first_layer: int
    layers: int
    layer_bytes: int

    @property
    def bytes(self) -> int:
        """Bytes of one block."""
        return self.layers * self.layer_bytes


class Source(NamedTuple):
    """A node that has a block in its memory, or serves the storage backend that has it as a file."""

    address: NodeAddress
    backend: bytes = b""


@dataclass(slots=True)
class Wanted:
    """A block to fetch: its number in the call, its key, where its bytes go, who has it (nearest first)."""

    number: int
    key: bytes
    pieces: list[Bytes]
    owners: list[Source]


class Peer:
    """One remote node, behind a circuit breaker."""

    def __init__(self, address: NodeAddress, health: Health, connect_s: float) -> None:
        self.address = address
        self.named_at = time.monotonic()
        """When the master was last seen to name it."""
        self.guard = health.guard(address.node_id, self._probe)
        self._storage = StorageGuards(health)

        def connect(timeout_s: float) -> Channel:
            return Channel.connect_tcp(address.host, address.port, min(timeout_s, connect_s))

        self._pool = ChannelPool(connect, channels_max=CHANNELS_MAX)
        self.waiting = ChannelPool(connect, channels_max=WAITING_CHANNELS_MAX)
        """Channels for those who wait."""

    @property
    def usable(self) -> bool:
        """Whether it is worth asking."""
        return self.guard.closed

    @property
    def guards(self) -> list[Guard]:
        """All its breakers."""
        return [self.guard, *self._storage.all()]

    def unusable(self) -> set[str]:
        """Return what of it is left alone: its place, names of its ways to storage."""
        return self._storage.unusable() | (set() if self.usable else {self.address.place})

    def close(self) -> None:
        """Close its channels."""
        self._pool.close()
        self.waiting.close()

    @contextlib.contextmanager
    def channel(self, timeout_s: float) -> Iterator[Channel]:
        """Lend a channel. Raises BreakerOpenError at once while the node is left alone."""
        with self.guard.call(), self._pool.channel(timeout_s) as channel:
            yield channel

    def _probe(self) -> None:
        anything = node_pb2.LocalPrefix(namespace=bytes(DIGEST_BYTES), shards=1)
        with self._pool.channel(PROGRESS_S) as channel:
            channel.call(NodeFrame(local_prefix=anything), NodeFrameReply, timeout_s=PROGRESS_S)

    def storage(self, namespace: bytes, backend: bytes) -> Guard:
        """Return the breaker of this node's way to a backend."""
        address = self.address
        return self._storage.of(
            address.node_id, backend, lambda: self._probe_storage(namespace, backend), address.place
        )

    def _probe_storage(self, namespace: bytes, backend: bytes) -> None:
        nothing = node_pb2.Get(namespace=namespace, shards=[0], fetch_ms=fetch_ms(PROGRESS_S), backend=backend)
        with self._pool.channel(PROGRESS_S) as channel:
            _, payload = channel.call(NodeFrame(get=nothing), NodeFrameReply, bytes(KEY_BYTES), timeout_s=PROGRESS_S)
        if len(payload) >= 8:
            check_probe(struct.unpack_from("<q", payload)[0])

    def get(
        self, namespace: bytes, items: Sequence[Wanted], want: Want, timeout_s: float, backend: bytes = b""
    ) -> Iterator[str]:
        """Fill the buffers of these blocks; yields "" or a miss reason for each. Raises when the node fails.

        With a ``backend`` the node reads from there what it does not have in memory; failing in that is no
        failure of the node.
        """
        request = node_pb2.Get(
            namespace=namespace, shards=[want.shard], first_layer=want.first_layer, layer_count=want.layers
        )
        progress_s = PROGRESS_S
        if backend:
            request.backend, request.fetch_ms, progress_s = backend, fetch_ms(timeout_s), timeout_s
        keys = b"".join([item.key for item in items])
        with self._pool.channel(timeout_s) if backend else self.channel(timeout_s) as channel:
            reply = channel.begin(
                NodeFrame(get=request), NodeFrameReply, keys, timeout_s=timeout_s, progress_s=progress_s
            )
            sizes = struct.unpack(f"<{len(items)}q", take(channel, 8 * len(items)))
            here = sum(size >= 0 for size in sizes)
            layers = reply.got.layers
            checksums = unpack_digests(take(channel, CHECKSUM_BYTES * layers * here))
            if here and layers != want.layers:
                raise FrameError(f"the node sends {layers} layers, {want.layers} were asked for")
            for reason in receive_blocks(channel, sizes, [item.pieces for item in items], want, checksums):
                if not backend:
                    self.guard.ended(None, quick=True)  # its bytes come, however slowly
                yield reason

    def put(
        self, namespace: Namespace, keys: bytes, blocks: Blocks, shard: int, timeout_s: float, transfer: int = 0
    ) -> dict[str, int]:
        """Store one shard of each block; returns counts as a local put does. Raises when the node fails."""
        if blocks.gapped:
            return self._put_gathered(namespace, keys, blocks, shard, timeout_s, transfer)
        reserve = node_pb2.Reserve(
            namespace=namespace.digest, shards=[shard], shard_bytes=blocks.shard_bytes, layers=blocks.layers,
            transfer=transfer,
        )  # fmt: skip
        with self.channel(timeout_s) as channel:
            try:
                reply, payload = channel.call(NodeFrame(reserve=reserve), NodeFrameReply, keys, timeout_s=timeout_s)
            except UnknownNamespaceError:
                descriptor = namespace_to_proto(namespace)
                channel.call(NodeFrame(register=descriptor), NodeFrameReply, timeout_s=timeout_s)
                reply, payload = channel.call(NodeFrame(reserve=reserve), NodeFrameReply, keys, timeout_s=timeout_s)
            if len(payload) != 8 * len(blocks):
                raise FrameError(f"the answer has {len(payload)} bytes for {len(blocks)} blocks")
            offsets = struct.unpack(f"<{len(blocks)}q", payload)
            counts = {
                "existed": offsets.count(-1),
                "being_written": offsets.count(-2),
                "no_room": offsets.count(-3),
            }
            wanted = [pieces for pieces, offset in zip(blocks.pieces, offsets, strict=True) if offset >= 0]
            if wanted:
                digests = [d for pieces in wanted for d in hash_layers(pieces, blocks.layer_bytes, blocks.layers)]
                write = NodeFrame(write=node_pb2.Write(reservation=reply.reserved.reservation))
                payloads = [memoryview(pack_digests(digests)), *(view(p) for pieces in wanted for p in pieces)]
                reply, _ = channel.call(write, NodeFrameReply, payloads, timeout_s=timeout_s)
                counts["stored"] = reply.committed.stored
                counts["corrupt"] = len(wanted) - reply.committed.stored
        return counts

    def _put_gathered(
        self, namespace: Namespace, keys: bytes, blocks: Blocks, shard: int, timeout_s: float, transfer: int
    ) -> dict[str, int]:
        """Store blocks that have gaps: sockets send runs of bytes, so some of them at a time are copied."""
        deadline = time.monotonic() + timeout_s
        counts: Counter[str] = Counter()
        for _, some_keys, some in blocks.parts(keys, max(1, GATHER_BYTES // blocks.shard_bytes)):
            counts.update(self.put(namespace, some_keys, some.gathered(), shard, time_left(deadline), transfer))
        return dict(counts)


class Peers:
    """All remote nodes, by address."""

    def __init__(self, health: Health, connect_s: float) -> None:
        self._health = health
        self._connect_s = connect_s
        self._lock = threading.Lock()
        self._peers: dict[tuple[str, int], Peer] = {}
        self._last: dict[str, tuple[str, int]] = {}
        """Where each node was seen last."""
        self._closed = False

    def at(self, address: NodeAddress) -> Peer:
        """Return the node at an address."""
        with self._lock:
            place = (address.host, address.port)
            peer = self._peers.get(place)
            if peer is None:
                peer = self._peers[place] = Peer(address, self._health, self._connect_s)
                if self._closed:  # for a call that still runs, which is then a miss
                    peer.close()
            if self._last.get(address.node_id) != place:
                self._last[address.node_id] = place
                self._forget_others(peer, address.node_id)
            return peer

    def _forget_others(self, present: Peer, node_id: str) -> None:
        """A node that has moved is not missed where it was; a place that answers is kept, for answers may be old."""
        for place, peer in list(self._peers.items()):
            if peer is not present and peer.address.node_id == node_id and peer.unusable():
                self._forget(place, peer)

    def _forget(self, place: tuple[str, int], peer: Peer) -> None:
        del self._peers[place]
        self._health.forget(peer.guards)
        peer.close()

    def named(self, nodes: Iterable[NodeAddress]) -> None:
        """Forget nodes that the master, which names these, has not named for long: they come back as others."""
        now = time.monotonic()
        with self._lock:
            for address in nodes:
                if (peer := self._peers.get((address.host, address.port))) is not None:
                    peer.named_at = now
            for place, peer in list(self._peers.items()):
                if now - peer.named_at > UNNAMED_S:
                    self._forget(place, peer)
                    if self._last.get(peer.address.node_id) == place:
                        del self._last[peer.address.node_id]

    def unusable(self) -> set[str]:
        """Return what is left alone: places of nodes, names of their ways to storage."""
        with self._lock:
            return {name for peer in self._peers.values() for name in peer.unusable()}

    def close(self) -> None:
        """Close all channels."""
        with self._lock:
            self._closed = True
            for peer in self._peers.values():
                peer.close()
            self._peers.clear()

    def get(
        self, namespace: bytes, wanted: Sequence[Wanted], want: Want, copies: CopyThreads, timeout_s: float
    ) -> dict[int, str]:
        """Fetch each block from the first of its owners that has it; returns "" or a miss reason by block number."""
        deadline = time.monotonic() + timeout_s
        reasons: dict[int, str] = {}
        while wanted:
            requests = []
            groups = self._by_owner(namespace, wanted, reasons)
            for (peer, backend), items in groups.items():
                most = part_blocks(len(items), want.bytes, PART_BYTES if backend else REQUEST_BYTES)
                size = min(most, -(-len(items) // copies.streams))
                requests += [_Request(peer, backend, items[at : at + size]) for at in range(0, len(items), size)]
            again: list[Wanted] = []  # list.extend is atomic
            lost: set[tuple[Peer, bytes]] = set()

            def work(
                part: Sequence[_Request], again: list[Wanted] = again, lost: set[tuple[Peer, bytes]] = lost
            ) -> None:
                for request in part:
                    again.extend(_fetch(request, namespace, want, deadline, reasons, lost))

            copies.run(requests, REQUEST_BYTES, work, max(copies.streams, len(groups)))
            _judge_storage(namespace, requests)
            wanted = again
        return reasons

    def _by_owner(
        self, namespace: bytes, wanted: Sequence[Wanted], reasons: dict[int, str]
    ) -> dict[tuple[Peer, bytes], list[Wanted]]:
        groups: dict[tuple[Peer, bytes], list[Wanted]] = {}
        for item in wanted:
            found_any = bool(item.owners)
            while item.owners:
                address, backend = item.owners[0]
                peer = self.at(address)
                guard = peer.storage(namespace, backend) if backend and peer.usable else peer.guard
                if guard.closed:
                    groups.setdefault((peer, backend), []).append(item)
                    break
                guard.rejected += 1
                item.owners.pop(0)
            else:
                reasons.setdefault(item.number, "breaker_open" if found_any else "not_here")
        return groups


@dataclass(slots=True)
class _Request:
    """Blocks to ask of one node at once, and what came of it."""

    peer: Peer
    backend: bytes
    items: list[Wanted]
    answers: list[str] = field(default_factory=list)


def _judge_storage(namespace: bytes, requests: Sequence[_Request]) -> None:
    answers: dict[tuple[Peer, bytes], list[str]] = {}
    for request in requests:
        if request.backend:
            answers.setdefault((request.peer, request.backend), []).extend(request.answers)
    for (peer, backend), reasons in answers.items():
        judge(peer.storage(namespace, backend), reasons)


def _fetch(
    request: _Request,
    namespace: bytes,
    want: Want,
    deadline: float,
    reasons: dict[int, str],
    lost: set[tuple[Peer, bytes]],
) -> list[Wanted]:
    """Ask one node for some blocks; returns those that another owner may still have.

    ``lost``: who has kept this call waiting in vain, and is waited for no second time.
    """
    peer, items, source = request.peer, request.items, (request.peer, request.backend)
    start = time.monotonic()
    left_s = deadline - start
    answers, rest = request.answers, "refused"
    try:
        if source in lost:
            rest = "owner_lost"
        elif left_s > 0:
            for answer in peer.get(namespace, items, want, left_s, request.backend):
                answers.append(answer)  # what came before a failure is there
        else:
            rest = "late"  # what another one took too long for is not this one's failure
    except BreakerOpenError:
        rest = "breaker_open"
    except UnavailableError:
        rest = "owner_lost" if time.monotonic() < deadline - TICK_S else "late"
        if time.monotonic() - start > PATIENCE_S:
            lost.add(source)
    except OverloadedError:
        rest = "overloaded"
    except KVPoolError as exc:
        log.warning("node %s: %s", peer.address.node_id, exc)
        rest = "refused"
    answers += [rest] * (len(items) - len(answers))
    again = []
    for item, answer in zip(items, answers, strict=True):
        reasons[item.number] = answer
        item.owners.pop(0)
        if answer and item.owners:
            again.append(item)
    return again


def take(channel: Channel, size: int) -> memoryview:
    """Return the next bytes of an answer."""
    if size > channel.payload_left:  # before there is memory for what it says
        raise FrameError(f"the answer has {channel.payload_left} bytes left, not {size}")
    data = memoryview(bytearray(size))
    channel.recv_into([data])
    return data


def skip(channel: Channel, size: int) -> None:
    """Drop the next bytes of an answer."""
    nowhere = memoryview(bytearray(min(size, SKIP_BYTES)))
    for start in range(0, size, SKIP_BYTES):
        channel.recv_into([nowhere[: min(SKIP_BYTES, size - start)]])


def receive_blocks(
    channel: Channel, sizes: Sequence[int], blocks: Sequence[list[Bytes]], want: Want, checksums: tuple[int, ...]
) -> Iterator[str]:
    """Receive an answer's blocks into their buffers; yields "" or a miss reason for each as it has come.

    ``sizes``: what the answer says of each, its bytes or below 0 why there are none; ``checksums``: of the layers of
    those that are sent.
    """
    at = 0
    for right, group in itertools.groupby(zip(sizes, blocks, strict=True), lambda one: one[0] == want.bytes):
        if not right:
            for size, _ in group:
                if size < 0:
                    yield reason_of(size)
                    continue
                skip(channel, size)
                yield "wrong_size"
                at += want.layers
            continue
        for digests in _receive_hashed(channel, [pieces for _, pieces in group], want):
            yield "" if tuple(digests) == checksums[at : at + want.layers] else "corrupt"
            at += want.layers


def _receive_hashed(channel: Channel, blocks: Sequence[list[Bytes]], want: Want) -> Iterator[list[int]]:
    """Receive blocks into their buffers, hashing each step while it is in the cache; yields each one's checksums."""
    layer_bytes, layers = want.layer_bytes, want.layers
    if layer_bytes > STEP_BYTES or blocks[0][0].ndim > 1:
        for pieces in blocks:
            yield [_receive_layer(channel, layer_of(pieces, n, layer_bytes)) for n in range(layers)]
        return
    most = STEP_BYTES // layer_bytes
    together = max(1, most // layers)
    for start in range(0, len(blocks), together):
        some = blocks[start : start + together]
        found: list[list[int]] = [[] for _ in some]
        for first in range(0, layers, most):
            count = min(most, layers - first)
            runs = [layers_of(pieces, first, count, layer_bytes) for pieces in some]
            channel.recv_into([view(piece) for run in runs for piece in run])
            for run, digests in zip(runs, found, strict=True):
                digests.extend(hash_layers(run, layer_bytes, count))
        yield from found


def _receive_layer(channel: Channel, target: Bytes) -> int:
    """Receive a layer that is large, or has gaps."""
    if target.ndim > 1:
        run = scratch(target.nbytes)
        channel.recv_into([view(run)])
        scatter(run, target)
        return digest64(run)
    return receive_hashed(channel.recv_into, view(target), STEP_BYTES)
