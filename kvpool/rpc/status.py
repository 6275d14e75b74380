"""kvpool's errors as gRPC statuses, in both directions: the one table for that edge."""

from __future__ import annotations

from typing import Any

import grpc

from kvpool.errors import (
    FrameError,
    InvalidArgumentError,
    KVPoolError,
    NoRoomError,
    OverloadedError,
    RefusedError,
    TooLargeError,
    UnavailableError,
    UnknownIdError,
    UnknownNamespaceError,
)

_TABLE: tuple[tuple[type[KVPoolError], grpc.StatusCode], ...] = (
    (InvalidArgumentError, grpc.StatusCode.INVALID_ARGUMENT),
    (FrameError, grpc.StatusCode.INVALID_ARGUMENT),
    (UnknownNamespaceError, grpc.StatusCode.NOT_FOUND),
    (UnknownIdError, grpc.StatusCode.NOT_FOUND),
    (TooLargeError, grpc.StatusCode.OUT_OF_RANGE),
    (NoRoomError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (RefusedError, grpc.StatusCode.PERMISSION_DENIED),
    (UnavailableError, grpc.StatusCode.UNAVAILABLE),
)


def status_of(exc: KVPoolError) -> grpc.StatusCode:
    """Return the status that stands for an error."""
    return next((code for kind, code in _TABLE if isinstance(exc, kind)), grpc.StatusCode.INTERNAL)


def error_of(exc: grpc.RpcError) -> KVPoolError:
    """Return what a failed call means to a client."""
    call: Any = exc  # a failed call is an RpcError and a Call at once, which the stubs do not say
    code = call.code()
    details = call.details() or str(code)
    if code is grpc.StatusCode.PERMISSION_DENIED:
        return RefusedError(details)
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        field, _, problem = details.partition(": ")
        return InvalidArgumentError(field, problem or details)
    if code is grpc.StatusCode.OUT_OF_RANGE:
        return TooLargeError(details)
    if code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}:
        return UnavailableError(details)
    return KVPoolError(details)
