"""A client's part in moving a prompt from a prefilling engine to a decoding one: what it tells the master.

The producer opens, renews and seals; the consumer claims, renews and ends. Nothing here waits longer than a quarter
of a second, and nothing raises because the pool has trouble.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from kvpool.errors import InvalidArgumentError, KVPoolError, UnavailableError, UnknownNamespaceError
from kvpool.model import DIGEST_BYTES, KEY_BYTES, Namespace, NodeAddress
from kvpool.rpc.convert import address_from_proto
from kvpool.rpc.v1 import master_pb2, types_pb2
from kvpool.transport.channel import time_left

if TYPE_CHECKING:
    from kvpool.client_master import MasterLink
    from kvpool.client_residency import Ask

log = logging.getLogger(__name__)

CALL_S = 0.25
"""Of each call, whatever it takes."""

OPENED_MAX = 1 << 12
"""Transfers that are remembered to have been opened here, and as many that were sealed."""

AWAY_S = 60.0
"""How long a master may be away that is still told of what has expired meanwhile."""

SEALED_AGAIN_MS = 30_000
"""How long one that was sealed waits at a master that was restarted: its consumer may have had it long ago."""

WORTH_S = 0.02
"""Less time is not worth a question: one that is late costs everybody the way to the master."""

SEAL_MS_MAX = 24 * 3600 * 1000
IDS_PER_CALL = 2048

MasterFrame = master_pb2.MasterFrame


class TransferState(StrEnum):
    """What the master says of a transfer."""

    UNKNOWN = "unknown"
    OPEN = "open"
    SEALED = "sealed"
    ENDED = "ended"
    NO_MASTER = "no_master"


_STATES = {
    master_pb2.ClaimTransferResponse.OPEN: TransferState.OPEN,
    master_pb2.ClaimTransferResponse.SEALED: TransferState.SEALED,
    master_pb2.ClaimTransferResponse.ENDED: TransferState.ENDED,
}


@dataclass(frozen=True)
class Claimed:
    """A claimed transfer; ``nodes`` by shard, None for one that nobody has named or that is gone."""

    state: TransferState
    namespaces: tuple[bytes, ...] = ()
    nodes: tuple[NodeAddress | None, ...] = ()


@dataclass(frozen=True)
class TransferPart:
    """Blocks of one KV cache group, packed keys in prompt order; the last ``drop_last`` are dropped at the end."""

    namespace: Namespace | bytes
    keys: bytes
    drop_last: int = 0


@dataclass(slots=True)
class _Opened:
    """What the master was told."""

    request: master_pb2.OpenTransferRequest
    keys: bytes
    until: float = 0.0
    """How long it waits for its consumer, once it is sealed."""


class Transfers:
    """Transfers by their id, a random number above 0. Thread-safe; every call ends within a quarter of a second.

    Raises InvalidArgumentError for what cannot be, never for trouble with the pool.
    """

    def __init__(self, link: MasterLink | None) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._opened: OrderedDict[int, _Opened] = OrderedDict()  # by this client: it is their producer
        self._sealed: OrderedDict[int, _Opened] = OrderedDict()
        if link is not None:
            link.restarted = self._tell_again

    # ---- the producer --------------------------------------------------------------------------

    def open(
        self, transfer: int, parts: Sequence[TransferPart], nodes: Sequence[str], producer: str = ""
    ) -> bool:
        """Begin a transfer, or begin it anew; returns whether the master knows it now. ``nodes``: ids by shard."""
        _check_id(transfer)
        deadline = time.monotonic() + CALL_S
        request = master_pb2.OpenTransferRequest(transfer=transfer, nodes=nodes, producer=producer[:256])
        for part in parts:
            digest = part.namespace.digest if isinstance(part.namespace, Namespace) else part.namespace
            _check_part(part, digest)
            request.parts.add(namespace=digest, drop_last=part.drop_last, blocks=len(part.keys) // KEY_BYTES)
        keys = b"".join(part.keys for part in parts)
        known = {part.namespace for part in parts if isinstance(part.namespace, Namespace)}
        with self._lock:
            self._sealed.pop(transfer, None)
            _remember(self._opened, transfer, _Opened(request, keys))
        try:
            link = self._master()
            for namespace in known:
                link.register(namespace, time_left(deadline))
            try:
                link.ask(MasterFrame(open_transfer=request), keys, _worth(deadline))
            except UnknownNamespaceError:  # a master that was restarted, and is not told yet
                link.announce([part.namespace for part in request.parts], time_left(deadline))
                link.ask(MasterFrame(open_transfer=request), keys, _worth(deadline))
        except KVPoolError as exc:
            log.debug("transfer %016x is not opened: %s", transfer, exc)
            return False
        return True

    def seal(self, transfer: int, ttl_ms: int) -> bool | None:
        """Say that all is stored: it stays for ``ttl_ms`` or, once claimed, while its consumer renews.

        Returns whether the master knows it: its producer need not renew any more. None: there was no answer, and it
        must, until a later call has one.
        """
        _check_id(transfer)
        if not 0 <= ttl_ms <= SEAL_MS_MAX:
            raise InvalidArgumentError("ttl_ms", f"must be from 0 to {SEAL_MS_MAX}, not {ttl_ms}")
        request = master_pb2.SealTransferRequest(transfer=transfer, ttl_ms=int(ttl_ms))
        reply = self._ask(MasterFrame(seal_transfer=request))
        with self._lock:
            if (opened := self._opened.get(transfer)) is not None:
                opened.until = time.monotonic() + ttl_ms / 1000
                if reply is not None:
                    _remember(self._sealed, transfer, self._opened.pop(transfer))
        return None if reply is None else reply.seal_transfer.known

    # ---- the consumer --------------------------------------------------------------------------

    def claim(self, transfer: int, consumer: str = "") -> Claimed:
        """Say that it is about to be loaded here, now or when it will be opened; returns what the master knows."""
        _check_id(transfer)
        request = master_pb2.ClaimTransferRequest(transfer=transfer, consumer=consumer[:256])
        reply = self._ask(MasterFrame(claim_transfer=request))
        if reply is None:
            return Claimed(TransferState.NO_MASTER)
        claimed = reply.claim_transfer
        state = _STATES.get(claimed.state, TransferState.UNKNOWN)
        return Claimed(state, tuple(claimed.namespaces), tuple(_address(node) for node in claimed.nodes))

    # ---- both ----------------------------------------------------------------------------------

    def renew(self, transfers: Sequence[int], consumer: str = "") -> list[int]:
        """Say that they are still wanted; returns those that are over or unknown, all while the master is away.

        It speaks as the producer of those that this client has opened and not sealed, as the consumer of others, who
        must have claimed them, under this name if it has one.
        """
        for transfer in transfers:
            _check_id(transfer)
        deadline = time.monotonic() + CALL_S
        over: list[int] = []
        for at in range(0, len(transfers), IDS_PER_CALL):
            part = transfers[at : at + IDS_PER_CALL]
            with self._lock:
                produced = [transfer for transfer in part if transfer in self._opened]
                consumed = [transfer for transfer in part if transfer not in self._opened]
            request = master_pb2.TransfersRequest(transfers=produced, consumed=consumed, consumer=consumer[:256])
            reply = self._ask(MasterFrame(renew_transfers=request), deadline)
            over += part if reply is None else reply.transfers.unknown
        return over

    def end(self, transfers: Sequence[int], consumer: str = "", *, back: bool = False) -> list[int]:
        """End them: loaded, or not wanted any more. What the master does not hear expires by itself.

        ``consumer``: as they were claimed; what another one has claimed since is left to it. ``back``: they were not
        loaded, and another one may come within some seconds. Returns those that were over or unknown, all while the
        master is away.
        """
        for transfer in transfers:
            _check_id(transfer)
        deadline = time.monotonic() + CALL_S
        with self._lock:
            for transfer in transfers:
                self._opened.pop(transfer, None)
                self._sealed.pop(transfer, None)
        over: list[int] = []
        for at in range(0, len(transfers), IDS_PER_CALL):
            part = transfers[at : at + IDS_PER_CALL]
            request = master_pb2.TransfersRequest(transfers=part, consumer=consumer[:256], back=back)
            reply = self._ask(MasterFrame(end_transfers=request), deadline)
            over += part if reply is None else reply.transfers.unknown
        return over

    # ---- the master ----------------------------------------------------------------------------

    def _tell_again(self, ask: Ask) -> bool:
        """Name to a restarted master what it does not know: or nobody would drop what is of use to a transfer alone.

        Returns whether it was there for all of it.
        """
        now = time.monotonic()
        with self._lock:
            again = [*self._opened.values(), *(one for one in self._sealed.values() if one.until > now - AWAY_S)]
        for one in again:
            try:
                ask(MasterFrame(open_transfer=one.request), one.keys, CALL_S)
                if one.until:
                    ttl_ms = max(1, min(SEALED_AGAIN_MS, int(1000 * (one.until - now))))
                    seal = master_pb2.SealTransferRequest(transfer=one.request.transfer, ttl_ms=ttl_ms)
                    ask(MasterFrame(seal_transfer=seal), b"", CALL_S)
            except KVPoolError as exc:
                log.debug("transfer %016x is not opened anew: %s", one.request.transfer, exc)
                if isinstance(exc, UnavailableError):
                    return False
        return True

    def _ask(self, frame: master_pb2.MasterFrame, deadline: float | None = None) -> master_pb2.MasterFrameReply | None:
        try:
            return self._master().ask(frame, b"", CALL_S if deadline is None else _worth(deadline))
        except KVPoolError as exc:
            log.debug("%s: %s", frame.WhichOneof("body"), exc)
            return None

    def _master(self) -> MasterLink:
        if self._link is None:
            raise UnavailableError("there is no master")
        return self._link


def _remember(some: OrderedDict[int, _Opened], transfer: int, one: _Opened) -> None:
    now = time.monotonic()
    some[transfer] = one
    while len(some) > OPENED_MAX or 0 < next(iter(some.values())).until < now - AWAY_S:
        some.popitem(last=False)


def _worth(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left < WORTH_S:
        raise UnavailableError("no time is left to ask the master")
    return left


def _check_id(transfer: int) -> None:
    if not 0 < transfer < 1 << 64:
        raise InvalidArgumentError("transfer", "must be from 1 to 2**64 - 1")


def _check_part(part: TransferPart, digest: bytes) -> None:
    if len(digest) != DIGEST_BYTES:
        raise InvalidArgumentError("parts.namespace", f"a digest has {DIGEST_BYTES} bytes, not {len(digest)}")
    if not part.keys or len(part.keys) % KEY_BYTES:
        raise InvalidArgumentError("parts.keys", f"must be one or more keys of {KEY_BYTES} bytes")
    if not 0 <= part.drop_last <= len(part.keys) // KEY_BYTES:
        raise InvalidArgumentError("parts.drop_last", f"must be from 0 to {len(part.keys) // KEY_BYTES}")


def _address(node: types_pb2.NodeAddress) -> NodeAddress | None:
    return address_from_proto(node) if node.node_id else None
