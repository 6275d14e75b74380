"""This host's slots lent to a caller who moves the bytes itself: a device's copy engine, straight from or to them.

``lend_blocks`` pins what is to be read, ``lend_slots`` reserves what is to be written; both last as long as
their ``with`` block, which must not end before the device is done. Like a client's calls they raise only
for misuse: without a node, or when it fails, nothing is lent and the reason is told.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from kvpool.client import Client
from kvpool.client_bytes import Bytes, hash_layers, pack_digests, unpack_digests
from kvpool.client_files import key_parts
from kvpool.client_node import BEING_WRITTEN, CONTROL_S, NO_ROOM, STORED, LocalNode
from kvpool.client_results import PutResult, reason_of_error
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

NodeFrame = node_pb2.NodeFrame
NodeFrameReply = node_pb2.NodeFrameReply


def shared_memory(client: Client) -> Bytes | None:
    """Return the whole segment of this host's node as mapped here, to be registered with a device; None without one."""
    node = client._local()
    return None if node is None else node._memory


def watch_memory(client: Client, left: Callable[[], object]) -> None:
    """Have ``left`` called, quick, whenever the client lets go of a node: the memory is free once nobody holds it."""
    client._own.watchers.add(left)


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
    channel = held.enter_context(node._channel(CONTROL_S))
    lent.memory = node.memory()
    for part in reversed(key_parts(keys)):  # a chain's head is used last
        slots, checksums = _pin_part(held, channel, node, namespace, part, shard, layers, lent)
        whole = len(slots) == len(part) // KEY_BYTES
        lent.slots = slots + lent.slots if whole else slots
        lent.checksums = checksums + lent.checksums if whole else checksums


def _pin_part(
    held: contextlib.ExitStack,
    channel: Channel,
    node: LocalNode,
    namespace: Namespace,
    keys: bytes,
    shard: int,
    layers: tuple[int, int],
    lent: LentBlocks,
) -> tuple[list[Bytes], list[tuple[int, ...]]]:
    """Return the leading slots of a part, and their checksums."""
    first, end = layers
    blocks, shard_bytes = len(keys) // KEY_BYTES, namespace.shard_layers * lent.layer_bytes
    pin = NodeFrame(pin=node_pb2.Pin(namespace=namespace.digest, shards=[shard]))
    reply, payload = channel.call(pin, NodeFrameReply, keys, timeout_s=CONTROL_S)
    places = node._places(payload[: 16 * blocks], blocks, 2, shard_bytes)
    if not reply.pinned.pin:
        return [], []
    held.callback(_release, channel, reply.pinned.pin)
    pinned = sum(offset >= 0 for offset in places[::2])
    digests = unpack_digests(payload[16 * blocks :])
    slot_layers = reply.pinned.layers
    if len(digests) != pinned * slot_layers:
        raise FrameError("the checksums do not fit the blocks that are pinned")
    memory = node.memory()
    slots: list[Bytes] = []
    checksums: list[tuple[int, ...]] = []
    for number, (offset, size) in enumerate(zip(places[::2], places[1::2], strict=True)):
        if offset < 0 or size != shard_bytes or slot_layers != namespace.shard_layers:
            break
        slots.append(memory[offset + first * lent.layer_bytes : offset + end * lent.layer_bytes])
        checksums.append(digests[number * slot_layers + first : number * slot_layers + end])
    return slots, checksums


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
    node: LocalNode | None = None
    channel: Channel | None = None
    reservations: dict[int, list[int]] = field(default_factory=dict)
    """Numbers of the blocks of each that is neither committed nor given back."""

    def commit(self) -> PutResult:
        """Hash what was written to the slots and store it; call when every slot is filled."""
        if self.slots and self.channel is not None:
            digests = self._digests()
            try:
                for reservation, numbers in list(self.reservations.items()):
                    commit = NodeFrame(commit=node_pb2.Commit(reservation=reservation))
                    checksums = pack_digests([digest for number in numbers for digest in digests[number]])
                    reply, _ = self.channel.call(commit, NodeFrameReply, checksums, timeout_s=CONTROL_S)
                    self.result.stored += reply.committed.stored
                    del self.reservations[reservation]
            except KVPoolError as exc:
                _blame(self.node, exc)
                self._failed("unavailable", sum(map(len, self.reservations.values())))
        return self._counted()

    def lose(self) -> None:
        """Leave the slots to whoever may still be writing to them: the node keeps them until this process has ended.

        The ``with`` block may not end before that either: a node that is attached anew is told who writes no more.
        """
        if self.channel is not None:
            self.channel.close()

    def _failed(self, reason: str, blocks: int) -> None:
        self.result.errors[reason] = self.result.errors.get(reason, 0) + blocks

    def _digests(self) -> dict[int, list[int]]:
        digests: dict[int, list[int]] = {}

        def work(numbers: Sequence[int]) -> None:
            for number in numbers:
                digests[number] = hash_layers([self.slots[number]], self.shard_bytes // self.layers, self.layers)

        self.client._copies.run(list(self.slots), self.shard_bytes, work)
        return digests

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
    client.register(namespace)
    node = client._local()
    lent = LentSlots(client, blocks, namespace.shard_layers, shard_bytes, node=node)
    with contextlib.ExitStack() as held:
        try:
            if node is None:
                raise UnavailableError("no node on this host")
            _reserve(held, node, namespace, keys, shard, lent)
        except InvalidArgumentError:
            raise
        except KVPoolError as exc:
            _blame(node, exc)
            nothing = PutResult(errors={_reason(exc): blocks})
            lent = LentSlots(client, blocks, namespace.shard_layers, shard_bytes, result=nothing)
        yield lent


def _reserve(
    held: contextlib.ExitStack, node: LocalNode, namespace: Namespace, keys: bytes, shard: int, lent: LentSlots
) -> None:
    held.enter_context(node._writes())
    lent.channel = channel = held.enter_context(node._channel(CONTROL_S))
    lent.memory = memory = node.memory()
    held.callback(_abort, lent, channel)
    first = 0
    for part in key_parts(keys):
        try:
            reservation, offsets = node._reserve(
                channel, namespace, part, shard, (lent.shard_bytes, lent.layers), CONTROL_S
            )
        except KVPoolError as exc:
            if not first or channel.broken:  # with it, what was reserved is lost
                raise
            lent._failed(_reason(exc), lent.blocks - first)
            break
        slots = {number: memory[at : at + lent.shard_bytes] for number, at in enumerate(offsets, first) if at >= 0}
        if slots:
            lent.reservations[reservation] = list(slots)
            lent.slots |= slots
        counts = Counter(offsets)
        lent.result.existed += counts[STORED] + counts[BEING_WRITTEN]
        if counts[NO_ROOM]:
            lent._failed("no_room", counts[NO_ROOM])
        first += len(offsets)


def _abort(lent: LentSlots, channel: Channel) -> None:
    for reservation in lent.reservations:
        abort = NodeFrame(abort=node_pb2.ReleaseReservation(reservation=reservation))
        try:
            channel.call(abort, NodeFrameReply, timeout_s=CONTROL_S)
        except KVPoolError as exc:  # it dies with its process, or when the node is attached anew
            _blame(lent.node, exc)


def _blame(node: LocalNode | None, exc: KVPoolError) -> None:
    log.debug("lent slots: %s", exc)
    if node is not None and isinstance(exc, (UnavailableError, FrameError)):
        node.alive = False  # until it is attached anew


def _reason(exc: KVPoolError) -> str:
    if isinstance(exc, TooLargeError):
        return "too_large"
    return "no_room" if isinstance(exc, AllPinnedError) else reason_of_error(exc)
