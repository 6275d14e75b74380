"""Transfers from prefilling to decoding engines: between the wire's words and the core's."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvpool.core.transfers import Part
from kvpool.errors import InvalidArgumentError
from kvpool.model import KEY_BYTES, NodeAddress
from kvpool.rpc import convert
from kvpool.rpc.v1 import master_pb2, types_pb2

if TYPE_CHECKING:
    from kvpool.server.master import Pool

log = logging.getLogger(__name__)


def open_transfer(pool: Pool, request: master_pb2.OpenTransferRequest) -> master_pb2.OpenTransferResponse:
    """Open one. Raises InvalidArgumentError, UnknownNamespaceError, OverloadedError."""
    parts = [Part(part.namespace, part.keys, part.drop_last) for part in request.parts]
    transfers = pool.state.transfers
    transfers.open(request.transfer, parts, list(request.nodes), request.producer, _uptime(pool))
    pool.perform([])
    log.debug("transfer %016x is opened by %s", request.transfer, request.producer)
    return master_pb2.OpenTransferResponse(ttl_ms=round(1000 * transfers.ttl_s))


def seal_transfer(pool: Pool, request: master_pb2.SealTransferRequest) -> master_pb2.SealTransferResponse:
    """Seal one. Raises InvalidArgumentError."""
    known = pool.state.transfers.seal(request.transfer, request.ttl_ms, _uptime(pool))
    return master_pb2.SealTransferResponse(known=known)


def claim_transfer(pool: Pool, request: master_pb2.ClaimTransferRequest) -> master_pb2.ClaimTransferResponse:
    """Claim one. Raises InvalidArgumentError."""
    transfers = pool.state.transfers
    claimed = transfers.claim(request.transfer, request.consumer, _uptime(pool))
    log.debug("transfer %016x is claimed by %s: %s", request.transfer, request.consumer, claimed.state.name)
    return master_pb2.ClaimTransferResponse(
        state=master_pb2.ClaimTransferResponse.State.Name(claimed.state),
        namespaces=claimed.namespaces,
        nodes=[_address_to_proto(node) for node in claimed.nodes],
        ttl_ms=round(1000 * transfers.ttl_s),
    )


def renew_transfers(pool: Pool, request: master_pb2.TransfersRequest) -> master_pb2.TransfersResponse:
    """Renew some. Raises InvalidArgumentError."""
    unknown = pool.state.transfers.renew(request.transfers, request.consumed, _uptime(pool), request.consumer)
    return master_pb2.TransfersResponse(unknown=unknown)


def end_transfers(pool: Pool, request: master_pb2.TransfersRequest) -> master_pb2.TransfersResponse:
    """End some. Raises InvalidArgumentError."""
    unknown = pool.state.transfers.end(request.transfers, _uptime(pool), request.consumer, back=request.back)
    pool.perform([])
    return master_pb2.TransfersResponse(unknown=unknown)


_ANSWERS: dict[str, tuple[str, Callable[[Pool, Any], Any]]] = {
    "open_transfer": ("open_transfer", open_transfer),
    "seal_transfer": ("seal_transfer", seal_transfer),
    "claim_transfer": ("claim_transfer", claim_transfer),
    "renew_transfers": ("transfers", renew_transfers),
    "end_transfers": ("transfers", end_transfers),
}
FRAMES = frozenset(_ANSWERS)
"""Bodies of frames that are answered here."""


def frame(pool: Pool, request: master_pb2.MasterFrame, payload: memoryview) -> master_pb2.MasterFrameReply:
    """Answer a frame of ``FRAMES``. Raises InvalidArgumentError, UnknownNamespaceError, OverloadedError."""
    body = request.WhichOneof("body") or ""
    if body == "open_transfer":
        _take_keys(request.open_transfer, payload)
    name, answer = _ANSWERS[body]
    return master_pb2.MasterFrameReply(**{name: answer(pool, getattr(request, body))})


def _take_keys(request: master_pb2.OpenTransferRequest, payload: memoryview) -> None:
    """Give each part its keys from the payload."""
    if sum(part.blocks for part in request.parts) * KEY_BYTES != len(payload):
        raise InvalidArgumentError("parts.blocks", f"must be as many as the payload has keys of {KEY_BYTES} bytes")
    at = 0
    for part in request.parts:
        part.keys = bytes(payload[at : at + part.blocks * KEY_BYTES])
        at += part.blocks * KEY_BYTES


def _uptime(pool: Pool) -> float:
    return pool.state.uptime(time.monotonic())


def _address_to_proto(address: NodeAddress | None) -> types_pb2.NodeAddress:
    return convert.address_to_proto(address) if address is not None else types_pb2.NodeAddress()
