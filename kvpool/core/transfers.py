"""Prompts on their way from a prefilling engine to a decoding one: which blocks they need, and who still wants them.

A transfer is opened by its producer, sealed when all is stored, claimed by its consumer, and ended by either. Until
then its blocks are evicted last, also those that come later. Whoever is at work on it says so within the TTL: the
producer while it is open, then, once it is claimed, the consumer; who says nothing is gone, and the transfer is over.
Times are in the master's uptime.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from heapq import heappop, heappush
from itertools import count, islice

import numpy as np

from kvpool.core.effects import Effect, TransferExpired
from kvpool.core.holds import SOFT
from kvpool.core.index import Index
from kvpool.core.keytable import Rows, as_words
from kvpool.core.nodes import Node
from kvpool.core.removals import Why
from kvpool.errors import InvalidArgumentError, OverloadedError, UnknownNamespaceError
from kvpool.model import DIGEST_BYTES, KEY_BYTES, SHARDS_MAX, NodeAddress

SLICE_BLOCKS = 512
"""Held, or let go of, without a pause."""

TRANSFERS_MAX = 1 << 14
"""Under way at once."""

KEYS_MAX = 1 << 20
"""Keys of all transfers together."""

PARTS_MAX = 64
IDS_MAX = 4096
"""Transfers named in one call."""

NAME_CHARS_MAX = 256
SEAL_MS_MAX = 24 * 3600 * 1000
OVER_MAX = 1 << 16
"""Transfers that are remembered to be over, each for ``OVER_S``."""

OVER_S = 300.0
BACK_S = 5.0
"""How long one that its consumer has given back waits for another: a router asks the next engine at once, and that
engine may be in the middle of a step."""

DROP_AGAIN_S = (1.0, 5.0, 30.0)
"""When blocks of use to one transfer only are looked for again after its end: reports and readers may be late."""

DROPS_MAX = 1 << 16
PER_TICK = 256


@dataclass(frozen=True, slots=True)
class Part:
    """Blocks of one KV cache group, 16 bytes a key; the last ``drop_last`` are of use to this transfer alone."""

    namespace: bytes
    keys: bytes
    drop_last: int = 0


class State(IntEnum):
    """What a transfer is to whoever asks for it."""

    UNKNOWN = 0
    OPEN = 1
    SEALED = 2
    ENDED = 3


@dataclass(frozen=True, slots=True)
class Claimed:
    """What a consumer is told; ``nodes`` by shard, None for one that is not there."""

    state: State
    namespaces: tuple[bytes, ...] = ()
    nodes: tuple[NodeAddress | None, ...] = ()


Piece = tuple[bytes, bytes]
"""Namespace and some keys: what is done in one slice."""


class _Holding:
    """The blocks of a transfer as they were given when it was opened, and how many pieces of them are held."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.blocks = sum(len(part.keys) for part in parts) // KEY_BYTES
        self.taken = 0
        self.over = False
        self._parts = parts
        self._step = SLICE_BLOCKS * KEY_BYTES

    def pieces(self) -> Iterator[Piece]:
        """Yield all blocks, a slice's at a time."""
        return (piece for part in self._parts for piece in self._pieces(part, 0))

    def dropped(self) -> Iterator[Piece]:
        """Yield those of use to this transfer alone."""
        starts = ((part, len(part.keys) - part.drop_last * KEY_BYTES) for part in self._parts)
        return (piece for part, start in starts for piece in self._pieces(part, start))

    def _pieces(self, part: Part, start: int) -> Iterator[Piece]:
        step = self._step
        return ((part.namespace, part.keys[at : at + step]) for at in range(start, len(part.keys), step))


@dataclass(slots=True)
class Transfer:
    """One that is under way."""

    id: int
    namespaces: tuple[bytes, ...]
    nodes: tuple[str, ...]
    producer: str
    holding: _Holding
    until: float  # of its producer while open, then of what it left
    consumer_until: float | None = None  # None: nobody has claimed it
    consumer: str = ""  # who has claimed it last
    back_until: float | None = None  # given back by who had claimed it
    sealed: bool = False
    wake_at: float = float("inf")  # its earliest entry in the queue of deadlines

    @property
    def deadline(self) -> float:
        """When it is over unless somebody is heard of."""
        if self.back_until is not None:
            return self.back_until
        return self.consumer_until if self.sealed and self.consumer_until is not None else self.until


class Transfers:
    """Every transfer, by its id.

    ``evict`` asks a node or a backend to drop rows; ``unlist`` sees to it that those on a victim list are soon not.
    """

    def __init__(
        self,
        index: Index,
        nodes: dict[str, Node],
        ttl_s: float,
        counters: Counter[str],
        jobs: deque[Iterator[list[Effect]]],
        evict: Callable[[int, Rows, Why], list[Effect]],
        unlist: Callable[[Rows], None],
        up: float,
    ) -> None:
        self.by_id: dict[int, Transfer] = {}
        self.blocks = 0  # held, once a transfer
        self.ttl_s = ttl_s
        self._index = index
        self._nodes = nodes
        self._counters = counters
        self._jobs = jobs
        self._evict = evict
        self._unlist = unlist
        self._over: OrderedDict[int, float] = OrderedDict()  # until when it is remembered
        self._deadlines: list[tuple[float, int]] = []  # a heap; entries may be out of date
        self._drops: list[tuple[float, int, Piece, int]] = []  # a heap: when, a number, what, how often before
        self._dropping = False
        self._numbers = count()
        self._up = up

    # ---- what engines say ----------------------------------------------------------------------

    def open(self, transfer: int, parts: Sequence[Part], nodes: Sequence[str], producer: str, up: float) -> None:
        """Begin a transfer, or begin it anew, whatever it was before.

        Raises InvalidArgumentError, UnknownNamespaceError, OverloadedError.
        """
        self._check(transfer, parts, nodes, producer)
        before = self.by_id.get(transfer)
        blocks = sum(len(part.keys) for part in parts) // KEY_BYTES
        if (before is None and len(self.by_id) >= TRANSFERS_MAX) or self.blocks + blocks > KEYS_MAX:
            self._counters["transfers.refused"] += 1
            raise OverloadedError(f"at most {TRANSFERS_MAX} transfers of {KEYS_MAX} blocks can be under way")
        namespaces = tuple(part.namespace for part in parts)
        opened = Transfer(transfer, namespaces, tuple(nodes), producer, _Holding(parts), up + self.ttl_s)
        self.by_id[transfer] = opened
        self.blocks += blocks
        self._over.pop(transfer, None)
        if before is None:
            self._counters["transfers.opened"] += 1
        else:
            before.holding.over = True
            opened.consumer, opened.consumer_until = before.consumer, before.consumer_until
            opened.back_until = before.back_until
        self._jobs.append(self._take(opened.holding, before.holding if before is not None else None))
        self._await(opened)

    def _check(self, transfer: int, parts: Sequence[Part], nodes: Sequence[str], producer: str) -> None:
        _check_ids([transfer], "transfer")
        if not 0 < len(parts) <= PARTS_MAX:
            raise InvalidArgumentError("parts", f"must be 1 to {PARTS_MAX}, not {len(parts)}")
        for part in parts:
            if not part.keys or len(part.keys) % KEY_BYTES:
                raise InvalidArgumentError("parts.keys", f"must be one or more keys of {KEY_BYTES} bytes")
            if not 0 <= part.drop_last <= len(part.keys) // KEY_BYTES:
                raise InvalidArgumentError("parts.drop_last", f"must be from 0 to {len(part.keys) // KEY_BYTES}")
            space = self._index.spaces.get(part.namespace)
            if len(part.namespace) != DIGEST_BYTES or space is None or space.descriptor is None:
                raise UnknownNamespaceError(f"namespace {part.namespace.hex()} is not known to the master")
        if len(nodes) > SHARDS_MAX:
            raise InvalidArgumentError("nodes", f"at most {SHARDS_MAX} shards a block")
        if any(len(node) > NAME_CHARS_MAX for node in nodes):
            raise InvalidArgumentError("nodes", f"an id has at most {NAME_CHARS_MAX} characters")
        _check_name(producer, "producer")

    def seal(self, transfer: int, ttl_ms: int, up: float) -> bool:
        """All is stored that will be; it lives for ``ttl_ms`` (0: the TTL) unless claimed. Returns whether it is known.

        Raises InvalidArgumentError.
        """
        _check_ids([transfer], "transfer")
        if not 0 <= ttl_ms <= SEAL_MS_MAX:
            raise InvalidArgumentError("ttl_ms", f"must be from 0 to {SEAL_MS_MAX}, not {ttl_ms}")
        known = self.by_id.get(transfer)
        if known is None:
            return False
        if not known.sealed:
            known.sealed = True
            self._counters["transfers.sealed"] += 1
        known.until = up + (ttl_ms / 1000 or self.ttl_s)
        if known.consumer_until is not None and known.consumer_until <= up:
            known.consumer_until = None  # it has gone meanwhile: another one may come
        self._await(known)
        return True

    def claim(self, transfer: int, consumer: str, up: float) -> Claimed:
        """The consumer is there, and says where its blocks are wanted. Raises InvalidArgumentError."""
        _check_ids([transfer], "transfer")
        _check_name(consumer, "consumer")
        known = self.by_id.get(transfer)
        if known is None:
            return Claimed(State.ENDED if transfer in self._over else State.UNKNOWN)
        if known.consumer_until is None:
            self._counters["transfers.claimed"] += 1
        known.consumer, known.consumer_until, known.back_until = consumer, up + self.ttl_s, None
        self._await(known)
        state = State.SEALED if known.sealed else State.OPEN
        return Claimed(state, known.namespaces, tuple(self._address(node_id) for node_id in known.nodes))

    def _address(self, node_id: str) -> NodeAddress | None:
        node = self._nodes.get(node_id)
        return node.address if node is not None and node.state in {"live", "warming"} else None

    def renew(self, produced: Sequence[int], consumed: Sequence[int], up: float, consumer: str = "") -> list[int]:
        """Start the TTL of these anew, for their producer or their consumer; returns those that are over or unknown.

        A ``consumer`` with a name takes what another one, which had claimed it after all, has given back. Raises
        InvalidArgumentError.
        """
        _check_name(consumer, "consumer")
        _check_ids(produced, "transfers")
        _check_ids(consumed, "consumed")
        for transfer in produced:
            if (known := self.by_id.get(transfer)) is not None and not known.sealed:
                known.until = up + self.ttl_s
        for transfer in consumed:
            known = self.by_id.get(transfer)
            if known is None:
                continue
            if known.back_until is not None and consumer:
                known.consumer, known.consumer_until, known.back_until = consumer, up + self.ttl_s, None
                self._await(known)
            elif known.consumer_until is not None:  # or its producer's last word comes too late
                known.consumer_until = up + self.ttl_s
        return [transfer for transfer in (*produced, *consumed) if transfer not in self.by_id]

    def end(self, transfers: Sequence[int], up: float, consumer: str = "", *, back: bool = False) -> list[int]:
        """End these; returns those that were over or unknown. Raises InvalidArgumentError.

        ``consumer``: who has claimed them; those that another one has claimed since are left to it. ``back``: they were
        not loaded, and stay for BACK_S, for whoever else may claim them.
        """
        _check_ids(transfers, "transfers")
        _check_name(consumer, "consumer")
        unknown = []
        for transfer in transfers:
            if (known := self.by_id.get(transfer)) is None:
                unknown.append(transfer)
            elif consumer and known.consumer not in {"", consumer}:
                continue
            elif back:
                known.consumer, known.consumer_until, known.back_until = "", None, up + BACK_S
                self._await(known)
            else:
                self._counters["transfers.ended"] += 1
                self._end(known, up)
        return unknown

    # ---- holds ---------------------------------------------------------------------------------

    def _end(self, transfer: Transfer, up: float) -> None:
        del self.by_id[transfer.id]
        self._over[transfer.id] = up + OVER_S
        while len(self._over) > OVER_MAX:
            self._over.popitem(last=False)
        transfer.holding.over = True
        self._jobs.append(self._let_go(transfer.holding))

    def _take(self, holding: _Holding, before: _Holding | None) -> Iterator[list[Effect]]:
        """Hold what a transfer needs, and only then let go of what it needed before."""
        for namespace, keys in holding.pieces():
            if holding.over:
                break
            self._unlist(self._index.hold(namespace, keys, SOFT))
            holding.taken += 1
            yield []
        if before is not None:
            yield from self._let_go(before)

    def _let_go(self, holding: _Holding) -> Iterator[list[Effect]]:
        for namespace, keys in islice(holding.pieces(), holding.taken):
            self._index.let_go(namespace, keys, SOFT)
            yield []
        self.blocks -= holding.blocks
        for piece in holding.dropped():
            yield self._drop(piece)
            self._drop_later(piece, 0)

    def _drop(self, piece: Piece) -> list[Effect]:
        """Drop blocks wherever they are, but those that somebody else has named."""
        namespace, keys = piece
        rows = self._index.space(namespace).table.find(as_words(keys))
        rows = np.unique(rows[rows >= 0])
        rows = rows[(self._index.pinned.take(rows) == 0) & (self._index.leased.take(rows) == 0)]
        effects: list[Effect] = []
        for incarnation in self._index.owners(rows):
            effects += self._evict(incarnation, rows, Why.TRANSFER)
        return effects

    # ---- time ----------------------------------------------------------------------------------

    def tick(self, up: float) -> list[Effect]:
        """End what nobody wants any more, forget what ended long ago, look again for what must be dropped."""
        self._up = up
        effects: list[Effect] = []
        for _ in range(PER_TICK):
            if not self._deadlines or self._deadlines[0][0] > up:
                break
            effects += self._wake(*heappop(self._deadlines), up)
        while self._over and next(iter(self._over.values())) <= up:
            self._over.popitem(last=False)
        if not self._dropping and self._drops and self._drops[0][0] <= up:
            self._dropping = True
            self._jobs.append(self._drop_again(up))
        return effects

    def _await(self, transfer: Transfer) -> None:
        """See to it that a tick looks at a transfer at its deadline, or before."""
        if transfer.deadline < transfer.wake_at:
            transfer.wake_at = transfer.deadline
            heappush(self._deadlines, (transfer.wake_at, transfer.id))

    def _wake(self, at: float, number: int, up: float) -> list[Effect]:
        transfer = self.by_id.get(number)
        if transfer is None or transfer.wake_at != at:
            return []
        if transfer.deadline > up:
            transfer.wake_at = float("inf")
            self._await(transfer)
            return []
        if transfer.back_until is not None:
            self._counters["transfers.ended"] += 1
            self._end(transfer, up)
            return []
        self._counters["transfers.expired"] += 1
        self._end(transfer, up)
        return [TransferExpired(number, transfer.producer, sealed=transfer.sealed)]

    def _drop_later(self, piece: Piece, times: int) -> None:
        if times < len(DROP_AGAIN_S) and len(self._drops) < DROPS_MAX:
            heappush(self._drops, (self._up + DROP_AGAIN_S[times], next(self._numbers), piece, times))

    def _drop_again(self, up: float) -> Iterator[list[Effect]]:
        while self._drops and self._drops[0][0] <= up:
            _, _, piece, times = heappop(self._drops)
            yield self._drop(piece)
            self._drop_later(piece, times + 1)
        self._dropping = False


def _check_ids(transfers: Sequence[int], field: str) -> None:
    if len(transfers) > IDS_MAX:
        raise InvalidArgumentError(field, f"at most {IDS_MAX} in one call")
    if any(not 0 < transfer < 1 << 64 for transfer in transfers):
        raise InvalidArgumentError(field, "must be from 1 to 2**64 - 1")


def _check_name(name: str, field: str) -> None:
    if len(name) > NAME_CHARS_MAX:
        raise InvalidArgumentError(field, f"must have at most {NAME_CHARS_MAX} characters")
