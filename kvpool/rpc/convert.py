"""Between the wire's messages and the words of ``kvpool.model``, in both directions."""

from __future__ import annotations

import dataclasses

from kvpool.errors import InvalidArgumentError
from kvpool.model import BACKEND_BYTES, SHARDS_MAX, Backend, BackendState, Namespace, NodeAddress, Reason
from kvpool.rpc.v1 import master_pb2, types_pb2

_DESCRIPTOR_FIELDS = tuple(f.name for f in dataclasses.fields(Namespace) if f.init)

REASONS = {
    Reason.COMPLETE: master_pb2.LookupResponse.COMPLETE,
    Reason.NOT_STORED: master_pb2.LookupResponse.NOT_STORED,
    Reason.NOT_WHOLE: master_pb2.LookupResponse.NOT_WHOLE,
    Reason.OWNER_SUSPECT: master_pb2.LookupResponse.OWNER_SUSPECT,
    Reason.WARMING: master_pb2.LookupResponse.WARMING,
    Reason.NAMESPACE_UNKNOWN: master_pb2.LookupResponse.NAMESPACE_UNKNOWN,
    Reason.NAMESPACE_MISMATCH: master_pb2.LookupResponse.NAMESPACE_MISMATCH,
    Reason.MASTER_UNREACHABLE: master_pb2.LookupResponse.MASTER_UNREACHABLE,
}
REASON_OF = {wire: reason for reason, wire in REASONS.items()}


STATES = {
    BackendState.UP: types_pb2.Backend.UP,
    BackendState.DOWN: types_pb2.Backend.DOWN,
    BackendState.READ_ONLY: types_pb2.Backend.READ_ONLY,
}


def mask_to_bytes(mask: int) -> bytes:
    """Return a shard mask as the wire has it."""
    return mask.to_bytes((mask.bit_length() + 7) // 8, "little")


def mask_from_bytes(data: bytes) -> int:
    """Return a shard mask. Raises InvalidArgumentError when it is longer than a block can have shards."""
    mask = int.from_bytes(data, "little")
    if mask.bit_length() > SHARDS_MAX:
        raise InvalidArgumentError("shards", f"at most {SHARDS_MAX} shards a block")
    return mask


# ---- types -------------------------------------------------------------------------------------------


def namespace_to_proto(namespace: Namespace) -> types_pb2.NamespaceDescriptor:
    """Return the descriptor as a message."""
    return types_pb2.NamespaceDescriptor(**namespace.as_dict())


def namespace_from_proto(message: types_pb2.NamespaceDescriptor) -> Namespace:
    """Return the descriptor. Raises InvalidArgumentError naming the field that is not allowed."""
    return Namespace(**{name: getattr(message, name) for name in _DESCRIPTOR_FIELDS})


def address_to_proto(address: NodeAddress) -> types_pb2.NodeAddress:
    """Return an address as a message."""
    return types_pb2.NodeAddress(
        node_id=address.node_id,
        host=address.host,
        port=address.port,
        socket_path=address.socket_path,
        boot_id=address.boot_id,
    )


def address_from_proto(message: types_pb2.NodeAddress) -> NodeAddress:
    """Return an address. Raises InvalidArgumentError."""
    if not 0 < len(message.node_id) <= 256:
        raise InvalidArgumentError("node_id", "must have 1 to 256 characters")
    if message.port > 65535:
        raise InvalidArgumentError("port", f"must be from 0 to 65535, not {message.port}")
    return NodeAddress(message.node_id, message.host, message.port, message.socket_path, message.boot_id)


def backend_to_proto(backend: Backend) -> types_pb2.Backend:
    """Return a backend as a message."""
    return types_pb2.Backend(
        id=backend.id,
        url=backend.url,
        capacity_bytes=backend.capacity_bytes,
        state=STATES[backend.state],
        reason=backend.reason,
    )


def backend_from_proto(message: types_pb2.Backend) -> Backend:
    """Return a backend. Raises InvalidArgumentError."""
    if len(message.id) != BACKEND_BYTES:
        raise InvalidArgumentError("backend.id", f"must be {BACKEND_BYTES} bytes, not {len(message.id)}")
    if message.capacity_bytes >= 1 << 63:
        raise InvalidArgumentError("backend.capacity_bytes", "must be below 2**63")
    try:
        state = BackendState(message.state)
    except ValueError as exc:
        raise InvalidArgumentError("backend.state", "must be UP, DOWN or READ_ONLY") from exc
    return Backend(message.id, message.url[:1024], message.capacity_bytes, state, message.reason[:1024])
