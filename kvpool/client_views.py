"""This host's slots lent to a caller who moves the bytes itself: a device's copy engine, straight from or to them.

``lend_blocks`` pins what is to be read, ``lend_slots`` reserves what is to be written; both last as long as
their ``with`` block, which must not end before the device is done. Like a client's calls they raise only
for misuse: without a node, or when it fails, nothing is lent and the reason is told.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kvpool.client import Client
from kvpool.client_bytes import Bytes, hash_layers, pack_digests, unpack_digests
from kvpool.client_node import BEING_WRITTEN, NO_ROOM, STORED, LocalNode
from kvpool.client_results import PutResult
from kvpool.errors import (
    AllPinnedError,
    FrameError,
    InvalidArgumentError,
    KVPoolError,
    TooLargeError,
    UnavailableError,
)
from kvpool.model import KEY_BYTES, Namespace
from kvpool.rpc.v1 import node_pb2
from kvpool.transport.channel import Channel

log = logging.getLogger(__name__)

CONTROL_S = 0.5
"""A node that answers no question for so long is stopped."""

NodeFrame = node_pb2.NodeFrame
NodeFrameReply = node_pb2.NodeFrameReply


def shared_memory(client: Client) -> Bytes | None:
    """Return the whole segment of this host's node as mapped here, to be registered with a device; None without one."""
    node = client._local()
    return None if node is None else node._memory


@dataclass(slots=True)
class LentBlocks:
    """The leading blocks of a get that lie in this host's node, pinned."""

    client: Client
    memory: Bytes | None = None
    """The segment that the slots lie in; another one after the node was lost and found again."""
    slots: list[Bytes] = field(default_factory=list)
    """Each block's bytes in the node's memory, only to be read: the layers asked for, one after the other."""
    checksums: list[tuple[int, ...]] = field(default_factory=list)
    layer_bytes: int = 0

    def intact(self) -> int:
        """Return how many leading blocks have the bytes that were stored; all when the client does not verify.

        Hashes the slots themselves, which are pinned: it may run while a device reads them.
        """
        if not self.client._verify_local or not self.slots:
            return len(self.slots)
        bad: list[int] = []  # list.append is atomic

        def work(numbers: Sequence[int]) -> None:
            for number in numbers:
                expected = self.checksums[number]
                if tuple(hash_layers([self.slots[number]], self.layer_bytes, len(expected))) != expected:
                    bad.append(number)

        self.client._copies.run(range(len(self.slots)), len(self.slots[0]), work)
        return min(bad, default=len(self.slots))

    def count_loaded(self, blocks: int) -> None:
        """Count so many blocks as got from this host, as the client's own gets do."""
        if blocks:
            self.client._counters["get.local_blocks"] += blocks
            self.client._counters["get.local_bytes"] += blocks * len(self.slots[0])


@contextlib.contextmanager
def lend_blocks(
    client: Client,
    namespace: Namespace,
    keys: bytes,
    layer_bytes: int,
    *,
    shard: int = 0,
    layers: tuple[int, int] | None = None,
) -> Iterator[LentBlocks]:
    """Pin the leading blocks that this host's node holds and lend their bytes.

    ``keys``: 16 bytes a block; ``layer_bytes``: of one layer of a block; ``layers``: (first, end), None for
    all. Raises InvalidArgumentError.
    """
    first, end = (0, namespace.shard_layers) if layers is None else layers
    if not 0 <= first < end <= namespace.shard_layers:
        raise InvalidArgumentError("layers", f"must lie within 0 and {namespace.shard_layers}, not {first} to {end}")
    client.register(namespace)
    node = client._local()
    with contextlib.ExitStack() as held:
        lent = LentBlocks(client, layer_bytes=layer_bytes)
        if node is not None and keys:
            try:
                _pin(held, node, namespace, keys, shard, (first, end), lent)
            except InvalidArgumentError:
                raise
            except KVPoolError as exc:
                _blame(node, exc)
                lent = LentBlocks(client, layer_bytes=layer_bytes)
        yield lent


def _pin(
    held: contextlib.ExitStack,
    node: LocalNode,
    namespace: Namespace,
    keys: bytes,
    shard: int,
    layers: tuple[int, int],
    lent: LentBlocks,
) -> None:
    first, end = layers
    blocks, shard_bytes = len(keys) // KEY_BYTES, namespace.shard_layers * lent.layer_bytes
    channel = held.enter_context(node._channel(CONTROL_S))
    pin = NodeFrame(pin=node_pb2.Pin(namespace=namespace.digest, shards=[shard]))
    reply, payload = channel.call(pin, NodeFrameReply, keys, timeout_s=CONTROL_S)
    places = node._places(payload[: 16 * blocks], blocks, 2, shard_bytes)
    if not reply.pinned.pin:
        return
    held.callback(_release, channel, reply.pinned.pin)
    pinned = sum(offset >= 0 for offset in places[::2])
    checksums = unpack_digests(payload[16 * blocks :])
    slot_layers = reply.pinned.layers
    if len(checksums) != pinned * slot_layers:
        raise FrameError("the checksums do not fit the blocks that are pinned")
    lent.memory = node._memory
    for number, (offset, size) in enumerate(zip(places[::2], places[1::2], strict=True)):
        if offset < 0 or size != shard_bytes or slot_layers != namespace.shard_layers:
            break
        lent.slots.append(node._memory[offset + first * lent.layer_bytes : offset + end * lent.layer_bytes])
        lent.checksums.append(checksums[number * slot_layers + first : number * slot_layers + end])


def _release(channel: Channel, pin: int) -> None:
    with contextlib.suppress(KVPoolError):  # a pin dies with its connection
        channel.send_only(NodeFrame(release=node_pb2.ReleasePin(pin=pin)), timeout_s=CONTROL_S)


@dataclass(slots=True)
class LentSlots:
    """Slots for those blocks of a put that this host's node wants; ``commit`` makes them visible."""

    client: Client
    blocks: int
    """Of the put."""
    layers: int
    shard_bytes: int
    memory: Bytes | None = None
    """The segment that the slots lie in; None when nothing could be lent."""
    slots: dict[int, Bytes] = field(default_factory=dict)
    """By a block's number in the put, the place of its bytes in the node's memory, layer after layer."""
    result: PutResult = field(default_factory=PutResult)
    """What is known without writing; counts the blocks stored once they are committed."""
    channel: Channel | None = None
    reservation: int = 0

    def commit(self) -> PutResult:
        """Hash what was written to the slots and store it; call when every slot is filled."""
        if self.slots and self.channel is not None:
            commit = NodeFrame(commit=node_pb2.Commit(reservation=self.reservation))
            checksums = pack_digests([digest for each in self._digests() for digest in each])
            try:
                reply, _ = self.channel.call(commit, NodeFrameReply, checksums, timeout_s=CONTROL_S)
            except KVPoolError as exc:
                log.debug("commit: %s", exc)
                self.result.errors["unavailable"] = len(self.slots)
            else:
                self.reservation = 0
                self.result.stored = reply.committed.stored
        return self._counted()

    def _digests(self) -> list[list[int]]:
        digests: dict[int, list[int]] = {}

        def work(numbers: Sequence[int]) -> None:
            for number in numbers:
                digests[number] = hash_layers([self.slots[number]], self.shard_bytes // self.layers, self.layers)

        self.client._copies.run(list(self.slots), self.shard_bytes, work)
        return [digests[number] for number in self.slots]

    def _counted(self) -> PutResult:
        result, counters = self.result, self.client._counters
        result.failed = self.blocks - result.stored - result.existed
        counters["put.stored"] += result.stored
        counters["put.existed"] += result.existed
        counters["put.bytes"] += result.stored * self.shard_bytes
        for reason, count in result.errors.items():
            counters[f"put.failed.{reason}"] += count
        return result


@contextlib.contextmanager
def lend_slots(
    client: Client, namespace: Namespace, keys: bytes, layer_bytes: int, *, shard: int = 0
) -> Iterator[LentSlots]:
    """Reserve slots of this host's node and lend them to be written; what is not committed is freed.

    Arguments as of ``lend_blocks``. Nothing is lent without a node: then ``memory`` is None and ``result``
    says "unavailable". Raises InvalidArgumentError.
    """
    blocks = len(keys) // KEY_BYTES
    shard_bytes = namespace.shard_layers * layer_bytes
    lent = LentSlots(client, blocks, namespace.shard_layers, shard_bytes)
    client.register(namespace)
    node = client._local()
    with contextlib.ExitStack() as held:
        try:
            if node is None:
                raise UnavailableError("no node on this host")
            _reserve(held, node, namespace, keys, shard, lent)
        except InvalidArgumentError:
            raise
        except KVPoolError as exc:
            _blame(node, exc)
            lent.result = PutResult(errors={_reason(exc): blocks})
        yield lent


def _reserve(
    held: contextlib.ExitStack, node: LocalNode, namespace: Namespace, keys: bytes, shard: int, lent: LentSlots
) -> None:
    held.enter_context(node._writes())
    channel = held.enter_context(node._channel(CONTROL_S))
    reservation, offsets = node._reserve(
        channel, namespace, keys, shard, (lent.shard_bytes, lent.layers), CONTROL_S
    )
    lent.channel, lent.reservation = channel, reservation
    held.callback(_abort, lent)
    lent.memory = node._memory
    lent.slots = {
        number: node._memory[at : at + lent.shard_bytes] for number, at in enumerate(offsets) if at >= 0
    }
    counts = Counter(offsets)
    lent.result.existed = counts[STORED] + counts[BEING_WRITTEN]
    if counts[NO_ROOM]:
        lent.result.errors["no_room"] = counts[NO_ROOM]


def _abort(lent: LentSlots) -> None:
    if lent.reservation and lent.channel is not None:
        abort = NodeFrame(abort=node_pb2.ReleaseReservation(reservation=lent.reservation))
        with contextlib.suppress(KVPoolError):  # it dies with its connection, and its process
            lent.channel.call(abort, NodeFrameReply, timeout_s=CONTROL_S)


def _blame(node: LocalNode | None, exc: KVPoolError) -> None:
    log.debug("nothing is lent: %s", exc)
    if node is not None and isinstance(exc, (UnavailableError, FrameError)):
        node.alive = False  # until it is attached anew


def _reason(exc: KVPoolError) -> str:
    if isinstance(exc, TooLargeError):
        return "too_large"
    if isinstance(exc, AllPinnedError):
        return "no_room"
    return "unavailable" if isinstance(exc, UnavailableError) else "refused"
