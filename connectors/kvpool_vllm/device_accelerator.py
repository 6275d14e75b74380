"""Blocks of an accelerator to and from the pool: straight between it and the slots of this host's node.

Straight only once the node's memory is page-locked for the device. Until then, and for blocks of other
hosts, bytes take the client's ordinary way into and out of a page-locked buffer, two halves of it in turn.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from kvpool.client import GetResult, PutResult
from kvpool.client_views import lend_blocks, lend_slots, shared_memory, watch_memory
from kvpool.errors import UnavailableError
from kvpool.model import KEY_BYTES
from kvpool_vllm import LOGGER_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from kvpool.client import Client
    from kvpool_vllm.device import KVBlocks, Way
    from kvpool_vllm.device_pinning import PinnedSegment, Pinning
    from kvpool_vllm.metadata import Part

    Bytes = npt.NDArray[np.uint8]

logger = logging.getLogger(LOGGER_NAME)

HALF_BYTES = 32 << 20
"""Of a buffer: its halves are filled and emptied in turn."""

OVERDUE_S = 5.0
"""After which a transfer makes the device count as stuck."""

_unfinished: list[object] = []
"""Copies that nobody has seen the end of, and what they use."""


class Transferring(Protocol):
    """Copies under way."""

    def wait(self, timeout_s: float) -> bool:
        """Return whether they are done."""
        ...


class Copying(Protocol):
    """What moves bytes between the device and host memory: ``device_copies.Copies``."""

    def fence(self) -> Any: ...  # noqa: D102 -- see Copies

    def host_buffer(self, size: int) -> Bytes: ...  # noqa: D102

    def load(  # noqa: D102
        self,
        kv: KVBlocks,
        block_ids: Sequence[int],
        sources: Sequence[Sequence[Bytes]],
        *,
        layers: tuple[int, int] | None = None,
        after: Any = None,
    ) -> Transferring: ...

    def store(  # noqa: D102
        self, kv: KVBlocks, block_ids: Sequence[int], targets: Sequence[Sequence[Bytes]], *, after: Any = None
    ) -> Transferring: ...


class Accelerator:
    """A device whose blocks are out of the host's reach."""

    saves_layers = False  # it may be far behind the engine's thread

    def __init__(
        self, copies: Copying, pinning: Pinning, block_bytes_max: int, *, half_bytes: int = HALF_BYTES
    ) -> None:
        """``block_bytes_max``: of a block in all layers, in the largest group."""
        self._copies = copies
        self._pinning = pinning
        self._half_bytes = max(half_bytes, block_bytes_max)
        self._lock = threading.Lock()
        self._buffers: list[Bytes] = []  # idle ones; as many as threads have ever used at once
        self._overdue = 0
        self._closed = False
        self.counters: Counter[str] = Counter()
        """Blocks that went ``direct`` and ``buffered``, by direction."""

    @property
    def stuck(self) -> bool:
        """Whether some copies are overdue: no job is begun then."""
        return self._overdue > 0

    def fence(self) -> Any:
        """Return an event on the engine's stream; call on the engine's thread."""
        return self._copies.fence()

    def close(self) -> None:
        """End the waits, then unregister the node's memory."""
        self._closed = True
        self._pinning.close()
        self._buffers.clear()

    # ---- load ----------------------------------------------------------------------------------------

    def load(
        self,
        client: Client,
        part: Part,
        kv: KVBlocks,
        *,
        shard: int = 0,
        layers: tuple[int, int] | None = None,
        timeout_ms: float | None = None,
        after: Any = None,
    ) -> GetResult:
        """Fill the blocks of ``part``; stop at the first that cannot be had."""
        deadline = None if timeout_ms is None else time.monotonic() + timeout_ms / 1000
        wanted = len(part.block_ids)
        if self.stuck:
            return GetResult(0, [False] * wanted, {"device_stuck": wanted}, {})
        direct = self._load_direct(client, part, kv, shard, layers, after)

        def get(some: Part, blocks: list[Bytes], left_ms: float | None) -> GetResult:
            return client.get(
                some.namespace, some.keys, blocks, shard=shard, lookup=some.lookup, layers=layers, timeout_ms=left_ms
            )

        result = self._load_buffered(get, _rest(part, direct), kv, layers, deadline, after)
        self._count("load.direct", direct)
        self._count("load.buffered", result.prefix)
        tiers = Counter(result.tiers)
        tiers["local"] += direct
        arrived = direct + result.prefix
        return GetResult(arrived, [i < arrived for i in range(wanted)], result.reasons, dict(+tiers))

    def receive(
        self,
        client: Client,
        part: Part,
        kv: KVBlocks,
        way: Way,
        *,
        shard: int = 0,
        timeout_ms: float = 1000,
        after: Any = None,
    ) -> GetResult:
        """Fill the blocks of ``part`` as they are stored; always through a buffer, where each byte is verified."""
        wanted = len(part.block_ids)
        if self.stuck:
            return GetResult(0, [False] * wanted, {"device_stuck": wanted}, {})

        def get(some: Part, blocks: list[Bytes], left_ms: float | None) -> GetResult:
            return client.receive(
                some.namespace,
                some.keys,
                blocks,
                shard=shard,
                transfer=way.transfer,
                node=way.node,
                alive=way.alive,
                timeout_ms=left_ms or timeout_ms,
            )

        result = self._load_buffered(get, part, kv, None, time.monotonic() + timeout_ms / 1000, after)
        self._count("load.received", result.prefix)
        return GetResult(result.prefix, [i < result.prefix for i in range(wanted)], result.reasons, result.tiers)

    def _load_direct(
        self,
        client: Client,
        part: Part,
        kv: KVBlocks,
        shard: int,
        layers: tuple[int, int] | None,
        after: Any,
    ) -> int:
        """Fill leading blocks out of the node's memory; returns how many are there and intact."""
        segment = self._segment(client)
        if segment is None:
            return 0
        with contextlib.ExitStack() as held:
            keys = part.keys if held.enter_context(segment.using()) else b""
            lent = held.enter_context(
                lend_blocks(client, part.namespace, keys, kv.layer_block_bytes, shard=shard, layers=layers)
            )
            if not lent.slots or lent.memory is not segment.memory:
                return 0
            sources = [segment.pieces(slot) for slot in lent.slots]
            transfer = self._copies.load(kv, part.block_ids[: len(sources)], sources, layers=layers, after=after)
            try:
                intact = lent.intact()
            finally:
                self._finish(transfer, held)
            lent.count_loaded(intact)
            return intact

    def _load_buffered(
        self,
        get: Callable[[Part, list[Bytes], float | None], GetResult],
        part: Part,
        kv: KVBlocks,
        layers: tuple[int, int] | None,
        deadline: float | None,
        after: Any,
    ) -> GetResult:
        """Fill blocks through a buffer: while the client gets into one half, the device empties the other."""
        result = GetResult(0, [], {}, {})
        reasons: Counter[str] = Counter()
        tiers: Counter[str] = Counter()
        block_bytes = (len(kv) if layers is None else layers[1] - layers[0]) * kv.layer_block_bytes
        each = self._half_bytes // block_bytes
        if not part.block_ids:
            return result
        with self._halves() as halves:
            for turn, start in enumerate(range(0, len(part.block_ids), each)):
                some = _rest(part, start, each)
                blocks = halves.blocks(turn, len(some.block_ids), block_bytes)
                left_ms = None if deadline is None else max(1.0, (deadline - time.monotonic()) * 1000)
                got = get(some, blocks, left_ms)
                tiers.update(got.tiers)
                reasons.update(got.reasons)
                if got.prefix:
                    ids, sources = some.block_ids[: got.prefix], [[block] for block in blocks[: got.prefix]]
                    halves.use(turn, self._copies.load(kv, ids, sources, layers=layers, after=after))
                    result.prefix += got.prefix
                if got.prefix < len(some.block_ids):
                    break
        result.reasons, result.tiers = dict(reasons), dict(tiers)
        return result

    # ---- save ----------------------------------------------------------------------------------------

    def save(
        self, client: Client, part: Part, kv: KVBlocks, *, shard: int = 0, after: Any = None, transfer: int = 0
    ) -> PutResult:
        """Store the blocks of ``part``."""
        wanted = len(part.block_ids)
        if self.stuck:
            return PutResult(0, 0, wanted, {"device_stuck": wanted})
        result = self._save_direct(client, part, kv, shard, after)
        if result is not None:
            self._count("save.direct", result.stored)
            return result
        result = self._save_buffered(client, part, kv, shard, after, transfer)
        self._count("save.buffered", result.stored)
        return result

    def _save_direct(self, client: Client, part: Part, kv: KVBlocks, shard: int, after: Any) -> PutResult | None:
        """Write into the node's memory; returns None where that cannot be."""
        segment = self._segment(client)
        if segment is None:
            return None
        with contextlib.ExitStack() as held:
            if not held.enter_context(segment.using()):
                return None
            lent = held.enter_context(lend_slots(client, part.namespace, part.keys, kv.layer_block_bytes, shard=shard))
            if lent.memory is not segment.memory:
                return lent.commit() if lent.memory is None and "unavailable" not in lent.result.errors else None
            if lent.slots:
                ids = [part.block_ids[number] for number in lent.slots]
                targets = [segment.pieces(slot) for slot in lent.slots.values()]
                self._finish(self._copies.store(kv, ids, targets, after=after), held, lent.lose)
            return lent.commit()

    def _save_buffered(
        self, client: Client, part: Part, kv: KVBlocks, shard: int, after: Any, transfer: int
    ) -> PutResult:
        """Store through a buffer: while the client puts one half, the device fills the other."""
        wanted, block_bytes = len(part.block_ids), len(kv) * kv.layer_block_bytes
        each = self._half_bytes // block_bytes
        parts = [_rest(part, start, each) for start in range(0, wanted, each)]
        total = PutResult()
        errors: Counter[str] = Counter()
        with self._halves() as halves:
            filled: list[list[Bytes]] = []
            for turn in range(len(parts) + 1):
                if turn < len(parts):
                    ids = parts[turn].block_ids
                    filled.append(halves.blocks(turn, len(ids), block_bytes))
                    targets = [[block] for block in filled[turn]]
                    halves.use(turn, self._copies.store(kv, ids, targets, after=after))
                if turn > 0:
                    halves.finish(turn - 1)
                    keys = parts[turn - 1].keys
                    put = client.put(part.namespace, keys, filled[turn - 1], shard=shard, transfer=transfer)
                    total.stored += put.stored
                    total.existed += put.existed
                    total.failed += put.failed
                    errors.update(put.errors)
        total.errors = dict(errors)
        return total

    # ---- inside --------------------------------------------------------------------------------------

    def _segment(self, client: Client) -> PinnedSegment | None:
        if not self._pinning.possible:
            return None
        watch_memory(client, self._pinning.let_go)
        memory = shared_memory(client)
        segment = self._pinning.segment(memory)
        if memory is not shared_memory(client):  # the node went just now, and nobody lets go of it once more
            self._pinning.let_go()
            return None
        return segment

    def _count(self, name: str, blocks: int) -> None:
        with self._lock:
            self.counters[name] += blocks

    def _finish(
        self, transfer: Transferring, held: contextlib.ExitStack, lose: Callable[[], None] = lambda: None
    ) -> None:
        """Wait until copies are done, however long that takes, for nobody may have their memory before.

        Raises UnavailableError when the device is closed meanwhile. What they use is then theirs as long as this
        process runs: what would let go of it is taken out of ``held``, and ``lose`` called.
        """
        try:
            self._wait(transfer)
        except BaseException:  # closed, or the device has failed: who knows what it still does
            _unfinished.append((transfer, held.pop_all()))
            lose()
            raise

    def _wait(self, transfer: Transferring) -> None:
        """Wait; overdue copies make the device count as stuck: new jobs are refused meanwhile."""
        if transfer.wait(OVERDUE_S):
            return
        with self._lock:
            self._overdue += 1
        logger.error("kvpool: copies of the device take longer than %g s; nothing new is loaded or saved", OVERDUE_S)
        try:
            while not transfer.wait(1.0):
                if self._closed:
                    raise UnavailableError("the device was closed before its copies were done")
        finally:
            with self._lock:
                self._overdue -= 1

    @contextlib.contextmanager
    def _halves(self) -> Iterator[_Halves]:
        """Lend a buffer, which is free again when the copies that use it are done."""
        with self._lock:
            buffer = self._buffers.pop() if self._buffers else None
        if buffer is None:
            buffer = self._copies.host_buffer(2 * self._half_bytes)
        with contextlib.ExitStack() as held:
            held.callback(self._buffers.append, buffer)
            halves = _Halves(self, buffer, held)
            held.callback(halves.finish, 1)
            held.callback(halves.finish, 0)
            yield halves


class _Halves:
    """A buffer that is lent to one job."""

    def __init__(self, owner: Accelerator, buffer: Bytes, held: contextlib.ExitStack) -> None:
        self._owner = owner
        self._held = held
        half = len(buffer) // 2
        self._halves = [buffer[:half], buffer[half:]]
        self._transfers: list[Transferring | None] = [None, None]

    def blocks(self, turn: int, blocks: int, block_bytes: int) -> list[Bytes]:
        """Return room for some blocks, once the copies that used it are done."""
        self.finish(turn)
        return list(self._halves[turn % 2][: blocks * block_bytes].reshape(blocks, block_bytes))

    def use(self, turn: int, transfer: Transferring) -> None:
        """Keep the half of this turn until these copies are done."""
        self._transfers[turn % 2] = transfer

    def finish(self, turn: int) -> None:
        """Wait for the copies of this turn."""
        transfer, self._transfers[turn % 2] = self._transfers[turn % 2], None
        if transfer is not None:
            self._owner._finish(transfer, self._held)


def _rest(part: Part, first: int, blocks: int | None = None) -> Part:
    """Return the part from block ``first`` on, or so many blocks of it."""
    end = len(part.block_ids) if blocks is None else first + blocks
    if not first and end >= len(part.block_ids):
        return part
    lookup = part.lookup
    if lookup is not None and first:
        runs, skip = [], first
        for run in lookup.runs:
            if run.blocks > skip:
                runs.append(replace(run, blocks=run.blocks - skip))
            skip = max(0, skip - run.blocks)
        lookup = replace(lookup, runs=runs)
    keys, block_ids = part.keys[first * KEY_BYTES : end * KEY_BYTES], part.block_ids[first:end]
    return replace(part, keys=keys, block_ids=block_ids, lookup=lookup)
