"""A put that gives one layer after the other, to readers who wait for them before the commit."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence

from kvpool.client_bytes import Blocks, Buffer, CopyThreads, pack_digests
from kvpool.client_node import BEING_WRITTEN, CONTROL_S, NO_ROOM, STORED, LocalNode
from kvpool.client_results import PutResult, reason_of_error
from kvpool.client_switching import quick_switching
from kvpool.errors import InvalidArgumentError, KVPoolError
from kvpool.model import KEY_BYTES, Namespace
from kvpool.rpc.v1 import node_pb2

log = logging.getLogger(__name__)

NodeFrame = node_pb2.NodeFrame
NodeFrameReply = node_pb2.NodeFrameReply


class LayeredPut:
    """Blocks of one shard whose layers are written one after the other, and read before the last one is there.

    Ends with ``commit`` or ``abort``: it holds memory of the node until then. Trouble with the pool is
    noted and shows in the result. Thread-safe.
    """

    def __init__(
        self,
        node: LocalNode,
        space: Namespace,
        keys: bytes,
        place: tuple[int, int, int],
        timeout_s: float,
        copies: CopyThreads,
        done: Callable[[Counter[str], int], PutResult],
    ) -> None:
        """Reserve; ``place``: shard, its bytes, transfer; ``done``: counts what became of the blocks.

        Raises what the node answers, UnavailableError when it does not.
        """
        shard, shard_bytes, transfer = place
        self._node = node
        self._copies = copies
        self._done = done
        self._lock = threading.Lock()
        self._layers = space.shard_layers
        self._layer_bytes = shard_bytes // self._layers
        self._timeout_s = min(timeout_s, CONTROL_S)
        self._written = 0
        self._result: PutResult | None = None
        self._held, self._channel, self._reservation, places = node.begin_put(
            space, keys, shard, (shard_bytes, self._layers), transfer, self._timeout_s
        )
        self._counts = Counter(
            existed=places.count(STORED) + places.count(BEING_WRITTEN), no_room=places.count(NO_ROOM)
        )
        self.wanted = [number for number, offset in enumerate(places) if offset >= 0]
        """Numbers of the blocks to be written; others are stored, being written by somebody else, or have no room."""
        self._offsets = [places[number] for number in self.wanted]
        self._digests: list[list[int]] = [[] for _ in self.wanted]
        if not self.wanted:
            self._end(Counter())

    def write(self, first_layer: int, end_layer: int, blocks: Sequence[Buffer | Sequence[Buffer]]) -> None:
        """Store these layers of the wanted blocks and tell those who wait for them; does nothing after trouble.

        ``blocks[i]``: the layers of block ``wanted[i]``, as one buffer or one a layer. Layers come in order.
        Raises InvalidArgumentError.
        """
        with self._lock:
            if self._result is not None:
                return
            if not self._written == first_layer < end_layer <= self._layers:
                problem = f"must continue at {self._written} of {self._layers}, not {first_layer} to {end_layer}"
                raise InvalidArgumentError("first_layer", problem)
            keys = bytes(KEY_BYTES * len(self.wanted))
            wrapped = Blocks(blocks, keys, end_layer - first_layer, writable=False)
            if wrapped.layer_bytes != self._layer_bytes:
                problem = f"a layer of these blocks has {self._layer_bytes} bytes, not {wrapped.layer_bytes}"
                raise InvalidArgumentError("blocks", problem)
            try:
                with quick_switching:
                    fresh = self._node.copy_layers(self._offsets, wrapped, first_layer, self._copies)
                for digests, more in zip(self._digests, fresh, strict=True):
                    digests.extend(more)
                self._written = end_layer
                self._tell(end_layer, pack_digests([digest for digests in fresh for digest in digests]))
            except KVPoolError as exc:
                self._fail(exc)

    def _tell(self, layers: int, checksums: bytes) -> None:
        progress = node_pb2.Progress(reservation=self._reservation, layers=layers)
        self._channel.send_only(NodeFrame(progress=progress), checksums, timeout_s=self._timeout_s)

    def commit(self) -> PutResult:
        """Make the blocks visible to everybody; what lacks layers is given back."""
        with self._lock:
            if self._result is not None:
                return self._result
            if self._written < self._layers:
                return self._abort("incomplete")
            checksums = pack_digests([digest for digests in self._digests for digest in digests])
            commit = node_pb2.Commit(reservation=self._reservation)
            try:
                reply, _ = self._channel.call(
                    NodeFrame(commit=commit), NodeFrameReply, checksums, timeout_s=self._timeout_s
                )
            except KVPoolError as exc:
                return self._fail(exc)
            return self._end(Counter(stored=reply.committed.stored))

    def abort(self) -> None:
        """Give everything back; nothing once it has ended."""
        with self._lock:
            if self._result is None:
                self._abort("aborted")

    def _abort(self, why: str) -> PutResult:
        abort = node_pb2.ReleaseReservation(reservation=self._reservation)
        try:
            self._channel.call(NodeFrame(abort=abort), NodeFrameReply, timeout_s=self._timeout_s)
        except KVPoolError as exc:
            return self._fail(exc)
        return self._end(Counter({why: len(self.wanted)}))

    def _fail(self, exc: KVPoolError) -> PutResult:
        log.debug("put of layers: %s", exc)
        self._channel.close()  # the node keeps what may still be written to until this process says otherwise:
        self._node.alive = False  # when it is attached anew
        return self._end(Counter({reason_of_error(exc): len(self.wanted)}))

    def _end(self, counts: Counter[str]) -> PutResult:
        self._held.close()
        self._result = self._done(self._counts + counts, self._layers * self._layer_bytes)
        return self._result
