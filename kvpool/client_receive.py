"""Receiving what a transfer is still writing: part by part, whatever layers of it are there.

What this host's node has whole by now is read as any get reads it, without asking where that can be done.
The first part that lacks something is waited for, at its node, a second at a time; the parts behind it are
then asked in passing, each while the one before is copied, until one of them has nothing new.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from kvpool.client_bytes import CopyThreads, unpack_digests
from kvpool.client_gets import Call
from kvpool.client_node import CONTROL_S, LocalNode
from kvpool.client_peers import PROGRESS_S, Peer, Peers, Want, receive_blocks, take
from kvpool.client_results import reason_of_error
from kvpool.client_switching import quick_switching
from kvpool.errors import FrameError, KVPoolError, UnavailableError
from kvpool.model import CHECKSUM_BYTES, KEY_BYTES, NodeAddress
from kvpool.rpc.v1 import node_pb2

log = logging.getLogger(__name__)

SLICE_S = 1.0
"""How long the node is waited for before the caller is asked whether somebody still writes."""

POLL_S = 0.001
"""How long a part that need not be there yet is waited for."""

PART_BYTES_MIN = 4 << 20
PART_BYTES_MAX = 32 << 20
PARTS = 2
"""A prompt is asked for in about so many parts."""

GAPS_MAX = 8
"""Each costs a question; where there are more, what lies between them is read once more."""

NodeFrame = node_pb2.NodeFrame
NodeFrameReply = node_pb2.NodeFrameReply


@dataclass(slots=True)
class _Part:
    """Consecutive blocks of a call, of which the same number of layers is here."""

    first: int
    end: int
    layers: int = 0


class _Asked(Protocol):
    """A question for the layers of a part that are not here yet."""

    def answer(self) -> tuple[int, int]:
        """Wait for the answer: how many leading blocks have come, and how many more layers of each."""

    def take(self, part: _Part, layers: int) -> list[str]:
        """Fill the buffers of so many more layers of a part; returns "" or a miss reason for each block."""

    def close(self) -> None:
        """Let go of it, answered or not."""


class _AskedHere:
    """A question to this host's node; what it answers stays pinned until ``close``."""

    def __init__(self, way: _Here, call: Call, transfer: int, part: _Part, wait_s: float) -> None:
        self._way, self._call = way, call
        self._items = part.end - part.first
        self._pinned: node_pb2.Pinned | None = None
        self._payload = memoryview(b"")
        pin = node_pb2.Pin(
            namespace=call.space.digest, shards=[call.shard], transfer=transfer,
            wait_ms=_milliseconds(wait_s), first_layer=part.layers,
        )  # fmt: skip
        self._request = NodeFrame(pin=pin)
        with contextlib.ExitStack() as held:
            self._channel = held.enter_context(way.node.long_channel(_patience(call)))
            # Its answer may have to wait here, for as long as the part before is copied.
            self._channel.start(
                self._request, _keys(call, part),
                timeout_s=max(wait_s, call.left_s) + CONTROL_S, progress_s=wait_s + CONTROL_S,
            )  # fmt: skip
            self._held = held.pop_all()

    def answer(self) -> tuple[int, int]:
        reply, self._payload = self._channel.finish(self._request, NodeFrameReply, soon=False)
        self._pinned = reply.pinned
        return _leading(self._payload, self._items, 2), reply.pinned.ready

    def take(self, part: _Part, layers: int) -> list[str]:
        if self._pinned is None:
            raise FrameError("there was no answer")
        blocks = self._call.blocks.span(part.first, part.end, part.layers, part.layers + layers)
        return self._way.node.read_ready(
            self._pinned, self._payload, self._items, blocks, part.layers, self._way.copies
        )

    def close(self) -> None:
        if self._pinned is None:
            self._channel.close()  # an answer may still come
        elif self._pinned.pin and not self._channel.broken:
            release = NodeFrame(release=node_pb2.ReleasePin(pin=self._pinned.pin))
            with contextlib.suppress(UnavailableError):
                self._channel.send_only(release, timeout_s=CONTROL_S)
        self._held.close()


class _Here:
    """The way to this host's node."""

    tier = "local"

    def __init__(self, node: LocalNode, copies: CopyThreads) -> None:
        self.node = node
        self.copies = copies

    def listed(self, call: Call) -> list[bool]:
        """Fill the buffers of blocks that can be read without asking; returns which."""
        with quick_switching:
            reasons = self.node.get_listed(call.space, call.keys, call.blocks, call.shard, self.copies)
        return [not reason for reason in reasons]

    def ask(self, call: Call, transfer: int, part: _Part, wait_s: float) -> _Asked:
        return _AskedHere(self, call, transfer, part, wait_s)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """A node whose channels break counts as gone."""
        try:
            yield
        except (UnavailableError, FrameError):
            self.node.alive = False
            raise


class _AskedThere:
    """A question to another host's node, which sends the bytes with its answer."""

    def __init__(self, peer: Peer, call: Call, transfer: int, part: _Part, wait_s: float) -> None:
        self._call = call
        self._items = part.end - part.first
        self._layers = self._come = 0
        get = node_pb2.Get(
            namespace=call.space.digest, shards=[call.shard], transfer=transfer,
            wait_ms=_milliseconds(wait_s), first_layer=part.layers,
        )  # fmt: skip
        self._request = NodeFrame(get=get)
        with contextlib.ExitStack() as held:
            self._channel = held.enter_context(peer.waiting.channel(_patience(call)))
            self._channel.start(
                self._request, _keys(call, part),
                timeout_s=max(wait_s, call.left_s) + PROGRESS_S, progress_s=wait_s + PROGRESS_S,
            )  # fmt: skip
            self._answered = False
            self._held = held.pop_all()

    def answer(self) -> tuple[int, int]:
        reply = self._channel.proceed(self._request, NodeFrameReply, progress_s=PROGRESS_S)
        self._answered = True
        sizes = take(self._channel, 8 * self._items)
        self._come, self._layers = _leading(sizes, self._items, 1), reply.got.layers
        self._sizes = struct.unpack(f"<{self._items}q", sizes)
        self._checksums = unpack_digests(take(self._channel, CHECKSUM_BYTES * self._layers * self._come))
        return self._come, self._layers

    def take(self, part: _Part, layers: int) -> list[str]:
        blocks = self._call.blocks.span(part.first, part.end, part.layers, part.layers + layers)
        want = Want(self._call.shard, part.layers, layers, blocks.layer_bytes)
        return list(receive_blocks(self._channel, self._sizes[: len(blocks)], blocks.pieces, want, self._checksums))

    def close(self) -> None:
        if not self._answered or self._channel.payload_left:
            self._channel.close()
        self._held.close()


class _There:
    """The way to another host's node."""

    tier = "remote"

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def listed(self, call: Call) -> list[bool]:
        """Return that all is to be asked for."""
        return [False] * len(call.blocks)

    def ask(self, call: Call, transfer: int, part: _Part, wait_s: float) -> _Asked:
        return _AskedThere(self._peer, call, transfer, part, wait_s)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Several failures in a row open the node's breaker."""
        with self._peer.guard.call():
            yield


class Receives:
    """Fills buffers with what transfers write."""

    def __init__(self, peers: Peers, copies: CopyThreads, local: Callable[[], LocalNode | None]) -> None:
        """``local``: this host's node."""
        self._peers = peers
        self._copies = copies
        self._local = local

    def run(self, call: Call, transfer: int, address: NodeAddress, alive: Callable[[], bool]) -> str:
        """Fill what comes until the deadline; returns the tier that it came from. Sets ``call.reasons``."""
        node = self._local()
        own = node is not None and node.node_id == address.node_id
        way = _Here(node, self._copies) if node is not None and own else _There(self._peers.at(address))
        receive = _Receive(call, transfer, way)
        try:
            with way.watched():
                receive.begin(way.listed(call))
                why = receive.run(alive)
        except KVPoolError as exc:
            log.debug("receiving from %s: %s", address.node_id, exc)
            why = reason_of_error(exc)
        call.reasons = ["" if here else receive.wrong or why for here in receive.complete]
        return way.tier


class _Receive:
    """One call under way."""

    def __init__(self, call: Call, transfer: int, way: _Here | _There) -> None:
        self.complete = [False] * len(call.blocks)
        self._limit = len(call.blocks)  # nothing is asked for from here on
        self.wrong = ""  # why the prefix ends where bytes were not as they should be
        self._call = call
        self._transfer = transfer
        self._way = way
        self._parts: list[_Part] = []

    def begin(self, here: list[bool]) -> None:
        """Take in which blocks are here already; the others are to be asked for."""
        gaps = list(_gaps(here))
        if len(gaps) > GAPS_MAX:
            gaps = [range(gaps[0].start, gaps[-1].stop)]
            here[gaps[0].start : gaps[0].stop] = [False] * len(gaps[0])
        self.complete = here
        each = self._call.blocks.shard_bytes
        size = max(1, min(max(-(-here.count(False) // PARTS), PART_BYTES_MIN // each), PART_BYTES_MAX // each))
        for run in gaps:
            self._parts += [_Part(first, min(first + size, run.stop)) for first in range(run.start, run.stop, size)]

    def run(self, alive: Callable[[], bool]) -> str:
        """Receive until all is here, or return why no more comes."""
        patience = SLICE_S
        while self._parts:
            if self._call.left_s <= 0:
                return "late"
            if not self._round(patience):
                if patience < SLICE_S:
                    return "not_here"
                if self._call.left_s > 0 and not alive():
                    patience = POLL_S  # what came since the last look is still taken
        return ""

    def _round(self, patience: float) -> bool:
        """Wait for the first part, then ask for the others; returns whether anything came."""
        call, parts = self._call, self._parts
        came = False
        at = 0
        asked: _Asked | None = self._ask(parts[0], min(patience, call.left_s))
        quick = contextlib.ExitStack()
        try:
            while asked is not None:
                part = parts[at]
                blocks, layers = asked.answer()
                if not at:
                    quick.enter_context(quick_switching)  # only now, as the first answer may take long
                now, asked = asked, None
                with contextlib.closing(now):
                    if not blocks:
                        break
                    came = True
                    if blocks < part.end - part.first:
                        parts.insert(at + 1, _Part(part.first + blocks, part.end, part.layers))
                        part.end = part.first + blocks
                    elif at + 1 < len(parts):
                        asked = self._ask(parts[at + 1], POLL_S)
                    self._take(now, part, layers)
                at += 1
        finally:
            quick.close()
            if asked is not None:
                asked.close()
            rest = [part for part in parts if part.layers < call.blocks.layers and part.first < self._limit]
            self._parts = [part for part in rest if part.first < part.end]
        return came

    def _ask(self, part: _Part, wait_s: float) -> _Asked:
        return self._way.ask(self._call, self._transfer, part, max(POLL_S, wait_s))

    def _take(self, asked: _Asked, part: _Part, layers: int) -> None:
        left = self._call.blocks.layers - part.layers
        if not 1 <= layers <= left:
            raise FrameError(f"the node answers with {layers} layers, {left} are left")
        reasons = asked.take(part, layers)
        part.layers += layers
        for number, reason in enumerate(reasons, part.first):
            if reason and number < self._limit:
                self._limit, self.wrong = number, reason
        part.end = min(part.end, self._limit)
        if layers == left:
            self.complete[part.first : part.end] = [True] * max(0, part.end - part.first)


def _gaps(here: list[bool]) -> Iterator[range]:
    """Yield runs of blocks that are not here."""
    end = 0
    for there, run in itertools.groupby(here):
        first, end = end, end + sum(1 for _ in run)
        if not there:
            yield range(first, end)


def _keys(call: Call, part: _Part) -> bytes:
    return call.keys[part.first * KEY_BYTES : part.end * KEY_BYTES]


def _patience(call: Call) -> float:
    """Return how long to wait for a channel."""
    return max(POLL_S, min(CONTROL_S, call.left_s))


def _milliseconds(wait_s: float) -> int:
    return max(1, int(1000 * wait_s))


def _leading(payload: memoryview, items: int, columns: int) -> int:
    """Return how many leading items of an answer are here."""
    if len(payload) < 8 * items * columns:
        raise FrameError(f"the answer has {len(payload)} bytes for {items} blocks")
    places = struct.unpack_from(f"<{items * columns}q", payload)[::columns]
    return next((i for i, place in enumerate(places) if place < 0), items)
