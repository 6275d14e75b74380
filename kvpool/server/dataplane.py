"""The node's data plane: frames from clients to ``SegmentState``, bytes by threads on pinned ranges only."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from kvpool.core.file_jobs import File, Miss
from kvpool.core.segment import STORED, Pin, SegmentState, Slot
from kvpool.core.slots import check_items
from kvpool.core.waits import Waiter, Waits
from kvpool.errors import InvalidArgumentError, KVPoolError, OverloadedError, UnknownIdError
from kvpool.model import CHECKSUM_BYTES, KEY_BYTES, LAYERS_MAX
from kvpool.rpc.convert import namespace_from_proto
from kvpool.rpc.errors import to_proto
from kvpool.rpc.v1 import node_pb2
from kvpool.server.filetier import FileTier
from kvpool.server.peers import Guard
from kvpool.tiers.dram import Segment, write_header
from kvpool.transport.connection import BlockingIO, Connection
from kvpool.transport.frames import frame_buffers
from kvpool.transport.sockets import receive_hashed

log = logging.getLogger(__name__)

NodeFrameReply = node_pb2.NodeFrameReply

PROGRESS_S = 5.0
"""How long a peer may take nothing of a transfer before it is given up."""

FETCH_MS_MAX = 60_000
"""A request may wait this long for the file tier."""

WAIT_MS_MAX = 60_000
"""A request may wait this long for blocks that somebody is writing."""

_NO_MISSES: Mapping[File, Miss] = {}
_Answer = Callable[[Pin, Mapping[File, Miss]], None]


@dataclass(slots=True)
class _Process:
    """A local client's process, watched from the first moment of its connection."""

    pid: int
    pidfd: int
    gone: bool = False
    closed: bool = False  # its connection is, and its reservations are in quarantine
    writer: int = 0


@dataclass(slots=True)
class _Wait:
    """A request that waits for blocks, on a connection that takes no other meanwhile."""

    waiter: Waiter
    end: Callable[[], None]
    timer: asyncio.TimerHandle


class DataPlane:
    """Handles the frames of one node; everything but the byte movers runs on the loop's thread."""

    def __init__(self, segment: Segment, state: SegmentState, node_id: str, epoch: int, guard: Guard) -> None:
        self._segment = segment
        self._state = state
        self._node_id = node_id
        self._epoch = epoch
        self._guard = guard
        self._processes: dict[int, _Process] = {}
        self._waits = Waits(state.layers_ready)
        self._waiting: dict[int, _Wait] = {}  # by connection
        state.arrived = self._arrived
        self.changed: Callable[[], None] = lambda: None
        self.tier: FileTier | None = None
        self.counters: Counter[str] = Counter()

    # ---- connections -----------------------------------------------------------------------------

    def opened(self, conn: Connection) -> None:
        """Let a connection in, and watch the process behind a local one."""
        if not conn.peer.unix:
            self._guard.check(conn.peer.host)
        elif conn.peer.pid is not None:
            # A process that is gone already, or one of another pid namespace: end-of-file has to do.
            try:
                pidfd = os.pidfd_open(conn.peer.pid)
            except OSError as exc:
                if exc.errno in {errno.EMFILE, errno.ENFILE, errno.ENOMEM}:  # nobody would know when it has ended
                    raise OverloadedError(f"no process can be watched: {exc.strerror}") from None
                return
            self._processes[conn.id] = _Process(conn.peer.pid, pidfd)
            asyncio.get_running_loop().add_reader(pidfd, self._process_ended, conn)

    def closed(self, conn: Connection, reason: str) -> None:
        """End a connection's pins now, its reservations when nobody can write to them any more."""
        log.debug("%r is closed: %s", conn, reason)
        process = self._processes.get(conn.id)
        alive = process is not None and not process.gone
        if self.tier is not None:
            self.tier.cancel(conn.id)
        if (wait := self._waiting.pop(conn.id, None)) is not None:
            wait.timer.cancel()
            self._waits.cancel(conn.id)
        self._state.disconnect(conn.id, quarantine=alive)
        if process is not None:
            process.closed = True
            if not alive or not self._state.in_quarantine(conn.id):
                self._forget_process(conn.id)
        self.changed()

    def _process_ended(self, conn: Connection) -> None:
        process = self._processes[conn.id]
        process.gone = True
        asyncio.get_running_loop().remove_reader(process.pidfd)
        conn.close("the process ended")
        if process.closed:  # otherwise `closed` follows, once no thread writes to its slots any more
            self._state.process_gone(conn.id)
            self._forget_process(conn.id)
            self.changed()

    def _forget_process(self, conn_id: int) -> None:
        process = self._processes.pop(conn_id, None)
        if process is not None:
            asyncio.get_running_loop().remove_reader(process.pidfd)
            os.close(process.pidfd)

    # ---- requests --------------------------------------------------------------------------------

    def frame(self, conn: Connection, message: node_pb2.NodeFrame, payload: memoryview) -> None:
        """Answer a request."""
        body = message.WhichOneof("body")
        handler = self._HANDLERS.get(body or "")
        if handler is None:
            raise InvalidArgumentError("body", f"{body} needs a payload" if body else "is missing")
        handler(self, conn, message, payload)

    def streams_payload(self, conn: Connection, message: node_pb2.NodeFrame, payload_bytes: int) -> bool:
        """Take the payload of a Write straight into its slots."""
        if message.WhichOneof("body") != "write":
            return False
        slots = self._state.reservation(conn.id, message.write.reservation).slots
        checksums = sum(slot.layers for slot in slots) * CHECKSUM_BYTES
        wanted = checksums + sum(slot.shard_bytes for slot in slots)
        if payload_bytes != wanted:
            raise InvalidArgumentError("payload", f"must be {wanted} bytes for this reservation, not {payload_bytes}")
        self._write(conn, message, slots, checksums)
        return True

    def _attach(self, conn: Connection, message: node_pb2.NodeFrame, payload: memoryview) -> None:
        if not conn.peer.unix:
            raise InvalidArgumentError("attach", "only on the unix socket")
        attached = node_pb2.Attached(
            node_id=self._node_id,
            epoch=self._epoch,
            segment_bytes=self._segment.size,
            backends=[store.id for store in self.tier.stores] if self.tier is not None else (),
        )
        conn.reply(NodeFrameReply(id=message.id, attached=attached), fds=(self._segment.fd,))

    def _register(self, conn: Connection, message: node_pb2.NodeFrame, payload: memoryview) -> None:
        self._state.register(namespace_from_proto(message.register))
        conn.reply(NodeFrameReply(id=message.id))
        self.changed()

    def _reserve(self, conn: Connection, message: node_pb2.NodeFrame, payload: memoryview) -> None:
        request = message.reserve
        reservation = self._state.reserve(
            conn.id,
            request.namespace,
            request.shards,
            bytes(payload),
            request.shard_bytes,
            request.layers,
            request.transfer,
        )
        if conn.id in self._processes:
            self._processes[conn.id].writer = request.writer
        conn.reply(
            NodeFrameReply(id=message.id, reserved=node_pb2.Reserved(reservation=reservation.id)),
            array("q", reservation.offsets).tobytes(),
        )
        if self.tier is not None and STORED in reservation.offsets:
            items = _items(request.namespace, request.shards, payload)
            again = [file for file, offset in zip(items, reservation.offsets, strict=True) if offset == STORED]
            self.tier.state.used(self._state.slot(*file) for file in again)
            self.tier.pump()
        if self._state.has_changes:
            self.changed()

    def _progress(self, conn: Connection, message: node_pb2.NodeFrame, payload: memoryview) -> None:
        self._state.progress(conn.id, message.progress.reservation, message.progress.layers, bytes(payload))

    def _commit(self, conn: Connection, message: node_pb2.NodeFrame, payload: memoryview) -> None:
        request = message.commit
        self._store(conn, message.id, request.reservation, bytes(payload), request.keep or None)

    def _store(self, conn: Connection, number: int, reservation: int, checksums: bytes, keep: bytes | None) -> None:
        """Commit a reservation, answer the frame with this number, and do what a commit is followed by."""
        awaited = self._state.reservation(conn.id, reservation).transfer > 0  # somebody reads it soon
        slots = self._state.commit(conn.id, reservation, checksums, keep)
        conn.reply(NodeFrameReply(id=number, committed=node_pb2.Committed(stored=len(slots))))
        self._describe(slots)
        if awaited and self._state.table is not None:  # before the tier makes room: what it evicts is struck out
            self._state.table.add(slots)
        if self.tier is not None:
            self.tier.state.committed(slots)
            self.tier.pump()
        self.changed()

    def _describe(self, slots: list[Slot]) -> None:
        view = self._segment.view
        for slot in slots:
            write_header(
                view, slot.offset, slot.block.key, slot.shard, slot.shard_bytes, slot.layers, slot.generation,
                slot.checksums or b"",
            )  # fmt: skip

    def _abort(self, conn: Connection, message: node_pb2.NodeFrame, payload: memoryview) -> None:
        self._state.abort(conn.id, message.abort.reservation)
        conn.reply(NodeFrameReply(id=message.id))

    def _abandon(self, conn: Connection, message: node_pb2.NodeFrame, payload: memoryview) -> None:
        writer = message.abandon.writer
        for conn_id, process in list(self._processes.items()):
            if process.closed and process.pid == conn.peer.pid and process.writer == writer != 0:
                self._state.process_gone(conn_id)
                self._forget_process(conn_id)
        conn.reply(NodeFrameReply(id=message.id))

    def _pin(self, conn: Connection, message: node_pb2.NodeFrame, payload: memoryview) -> None:
        request = message.pin
        keys = bytes(payload)

        def answer(pin: Pin, misses: Mapping[File, Miss]) -> None:
            places = array("q")
            for at, slot in enumerate(pin.slots):
                if slot is not None:
                    places.extend((slot.offset, slot.shard_bytes))
                else:
                    places.extend((_miss(misses, request, keys, at), 0))
            here = [slot for slot in pin.slots if slot is not None]
            layers = here[0].layers if here else 0
            ready = _ready(here, request) if request.wait_ms else 0
            end = request.first_layer + ready if request.wait_ms else layers
            checksums = [_checksums(slot, request.first_layer, end) for slot in here]
            conn.reply(
                NodeFrameReply(id=message.id, pinned=node_pb2.Pinned(pin=pin.id, layers=layers, ready=ready)),
                b"".join((places.tobytes(), *checksums)),
            )
            conn.release()
            if self._state.table is not None and not request.wait_ms:  # what was read once will be read again
                self._state.table.add(pin.slots)

        if request.first_layer and not request.wait_ms:
            raise InvalidArgumentError("first_layer", "must be 0 without wait_ms")
        self._find(conn, request, keys, answer)

    def _wait(self, conn: Connection, request: node_pb2.Pin | node_pb2.Get, keys: bytes, answer: _Answer) -> None:
        """Pin what is asked for and answer: when all of it has the first layer, or after ``wait_ms`` what has."""
        state, loop = self._state, asyncio.get_running_loop()
        namespace, shards, transfer, first_layer = (
            request.namespace, request.shards, request.transfer, request.first_layer,
        )  # fmt: skip
        check_items(namespace, shards, keys)
        waiter = Waiter(conn.id, _items(namespace, shards, keys), first_layer, transfer)

        def end() -> None:
            pin = state.pin_ready(conn.id, namespace, shards, keys, transfer, first_layer)
            if self.tier is not None:
                self.tier.state.used(slot for slot in pin.slots if slot is not None and not slot.reserved)
            answer(pin, _NO_MISSES)

        self.counters["waits"] += 1
        if self._waits.add(waiter):
            end()
            return
        conn.hold()
        timer = loop.call_later(request.wait_ms / 1000, self._end_wait, conn.id)
        self._waiting[conn.id] = _Wait(waiter, end, timer)

    def _arrived(self, slots: Sequence[Slot]) -> None:
        """Have those answered who have waited for these slots, when the segment is not in the middle of a call."""
        for waiter in self._waits.arrived(slots):
            asyncio.get_running_loop().call_soon(self._look_again, waiter)

    def _look_again(self, waiter: Waiter) -> None:
        wait = self._waiting.get(waiter.owner)
        if wait is None or wait.waiter is not waiter:
            return
        try:
            complete = self._waits.add(waiter)  # something may be gone again
        except OverloadedError:
            complete = True
        if complete:
            self._end_wait(waiter.owner)

    def _end_wait(self, conn_id: int) -> None:
        wait = self._waiting.pop(conn_id)
        wait.timer.cancel()
        self._waits.remove(wait.waiter)
        wait.end()

    def _find(self, conn: Connection, request: node_pb2.Pin | node_pb2.Get, keys: bytes, answer: _Answer) -> None:
        """Pin what is asked for and answer: now, or when it has been written, or brought by the file tier."""
        namespace, shards = request.namespace, request.shards
        self._check_wait(request)
        if request.wait_ms:
            self._wait(conn, request, keys, answer)
            return
        pin = self._state.pin(conn.id, namespace, shards, keys)
        tier = self.tier
        if tier is None:
            answer(pin, _NO_MISSES)
            return
        tier.state.used(pin.slots)
        if not request.fetch_ms or all(pin.slots):
            answer(pin, _NO_MISSES)
            tier.pump()
            return
        files = _items(namespace, shards, keys)
        conn.hold()

        def fetched(misses: Mapping[File, Miss]) -> None:
            whole = self._state.pin(conn.id, namespace, shards, keys)
            self._state.release(conn.id, pin.id)
            answer(whole, misses)

        absent = [file for file, slot in zip(files, pin.slots, strict=True) if slot is None]
        tier.fetch(conn.id, absent, request.backend, min(request.fetch_ms, FETCH_MS_MAX) / 1000, fetched)

    def _check_wait(self, request: node_pb2.Pin | node_pb2.Get) -> None:
        space = self._state.namespace(request.namespace)
        layers = space.shard_layers if space is not None else LAYERS_MAX
        if request.wait_ms > WAIT_MS_MAX:
            raise InvalidArgumentError("wait_ms", f"must be at most {WAIT_MS_MAX}, not {request.wait_ms}")
        if request.wait_ms and request.fetch_ms:
            raise InvalidArgumentError("fetch_ms", "must be 0 with wait_ms")
        if request.transfer and not request.wait_ms:
            raise InvalidArgumentError("transfer", "must be 0 without wait_ms")
        if request.wait_ms and request.first_layer >= layers:
            raise InvalidArgumentError("first_layer", f"must be from 0 to {layers - 1}, not {request.first_layer}")

    def _prefetch(self, conn: Connection, message: node_pb2.NodeFrame, payload: memoryview) -> None:
        if self.tier is not None:
            request = message.prefetch
            check_items(request.namespace, request.shards, bytes(payload))
            files = _items(request.namespace, request.shards, payload)
            self.tier.state.reads.ahead((f for f in files if self._state.slot(*f) is None), request.backend)
            self.tier.pump()

    def _release(self, conn: Connection, message: node_pb2.NodeFrame, payload: memoryview) -> None:
        self._state.release(conn.id, message.release.pin)

    def _touch(self, conn: Connection, message: node_pb2.NodeFrame, payload: memoryview) -> None:
        request = message.touch
        slots = self._state.touch(request.namespace, request.shards, bytes(payload))
        if self.tier is not None:
            self.tier.state.used(slots)
            self.tier.pump()

    def _local_prefix(self, conn: Connection, message: node_pb2.NodeFrame, payload: memoryview) -> None:
        request = message.local_prefix
        prefix = self._state.local_prefix(request.namespace, request.shards, bytes(payload))
        conn.reply(NodeFrameReply(id=message.id, local_prefix=node_pb2.LocalPrefixReply(prefix=prefix)))

    # ---- bytes over TCP ----------------------------------------------------------------------------

    def _get(self, conn: Connection, message: node_pb2.NodeFrame, payload: memoryview) -> None:
        request = message.get
        keys = bytes(payload)

        def answer(pin: Pin, misses: Mapping[File, Miss]) -> None:
            try:
                frame = self._get_frame(message, keys, pin.slots, misses)
            except KVPoolError as exc:
                self._state.release(conn.id, pin.id)
                conn.reply_error(message.id, exc)
                conn.release()
                return

            def send(io: BlockingIO) -> None:
                io.send_all(frame, PROGRESS_S)

            def done(_: None, error: BaseException | None) -> None:
                self._state.release(conn.id, pin.id)
                self.counters["get_failed" if error else "get_sent"] += 1

            conn.run_blocking(send, done)

        self._find(conn, request, keys, answer)

    def _get_frame(
        self, message: node_pb2.NodeFrame, keys: bytes, slots: Sequence[Slot | None], misses: Mapping[File, Miss]
    ) -> list[memoryview]:
        request = message.get
        sizes, checksums, data = array("q"), [], []
        sent_layers = 0
        ready = _ready([slot for slot in slots if slot is not None], request) if request.wait_ms else 0
        for at, slot in enumerate(slots):
            if slot is None:
                sizes.append(_miss(misses, request, keys, at))
                continue
            layers = request.layer_count or slot.layers - request.first_layer
            if request.wait_ms:
                layers = min(layers, ready)
            if layers < 1 or request.first_layer + layers > slot.layers:
                raise InvalidArgumentError("layer_count", f"this block has layers 0 to {slot.layers - 1}")
            sent_layers = layers
            step = slot.shard_bytes // slot.layers
            start = slot.offset + request.first_layer * step
            data.append(self._segment.view[start : start + layers * step])
            sizes.append(layers * step)
            checksums.append(_checksums(slot, request.first_layer, request.first_layer + layers))
        prefix = memoryview(b"".join((sizes.tobytes(), *checksums)))
        return frame_buffers(NodeFrameReply(id=message.id, got=node_pb2.Got(layers=sent_layers)), [prefix, *data])

    def _write(self, conn: Connection, message: node_pb2.NodeFrame, slots: list[Slot], checksum_bytes: int) -> None:
        reservation = message.write.reservation
        view = self._segment.view
        checksums = bytearray(checksum_bytes)

        def receive(io: BlockingIO) -> bytes:
            take = partial(io.recv_exact_into, deadline_s=PROGRESS_S)
            take([memoryview(checksums)])
            keep = bytearray()
            at = 0
            for slot in slots:
                step = slot.shard_bytes // slot.layers
                right = True
                for layer in range(slot.layers):
                    start = slot.offset + layer * step
                    digest = receive_hashed(take, view[start : start + step])
                    right &= digest == int.from_bytes(checksums[at : at + CHECKSUM_BYTES], "little")
                    at += CHECKSUM_BYTES
                keep.append(right)
            return bytes(keep)

        def done(keep: bytes | None, error: BaseException | None) -> None:
            if keep is None:
                self.counters["write_failed"] += 1
                # Its connection is closed, or it is still there and the reservation with it.
                with contextlib.suppress(UnknownIdError):
                    self._state.abort(conn.id, reservation)
                if conn.is_open:
                    conn.reply(NodeFrameReply(id=message.id, error=to_proto(error or KVPoolError("write failed"))))
                return
            self.counters["write_corrupt"] += keep.count(0)
            self._store(conn, message.id, reservation, bytes(checksums), keep)

        conn.run_blocking(receive, done)

    _HANDLERS: ClassVar = {
        "attach": _attach,
        "register": _register,
        "reserve": _reserve,
        "progress": _progress,
        "commit": _commit,
        "abort": _abort,
        "pin": _pin,
        "release": _release,
        "get": _get,
        "local_prefix": _local_prefix,
        "abandon": _abandon,
        "prefetch": _prefetch,
        "touch": _touch,
    }


def _items(namespace: bytes, shards: Sequence[int], keys: bytes | memoryview) -> list[File]:
    """Return what a request is about, key-major."""
    blocks = [namespace + keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]
    return [(block, shard) for block in blocks for shard in shards]


def _ready(slots: Sequence[Slot], request: node_pb2.Pin | node_pb2.Get) -> int:
    """Return how many layers, from the one asked for on, all of these slots have."""
    return min((slot.ready(request.transfer) for slot in slots), default=request.first_layer) - request.first_layer


def _checksums(slot: Slot, first_layer: int, end_layer: int) -> bytes:
    known = slot.partial if slot.checksums is None else slot.checksums
    return known[first_layer * CHECKSUM_BYTES : end_layer * CHECKSUM_BYTES]


def _miss(misses: Mapping[File, Miss], request: node_pb2.Pin | node_pb2.Get, keys: bytes, item: int) -> int:
    """Return why an item of a request is not here."""
    if not misses:
        return Miss.NOT_HERE
    at, shard = divmod(item, len(request.shards))
    block = request.namespace + keys[at * KEY_BYTES : (at + 1) * KEY_BYTES]
    return misses.get((block, request.shards[shard]), Miss.NOT_HERE)
