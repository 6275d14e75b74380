"""The one table between kvpool's errors and those on the wire."""

from __future__ import annotations

from kvpool.errors import (
    AllPinnedError,
    FrameError,
    InvalidArgumentError,
    KVPoolError,
    OverloadedError,
    RefusedError,
    TooLargeError,
    UnknownIdError,
    UnknownNamespaceError,
)
from kvpool.rpc.v1 import types_pb2

MESSAGE_CHARS_MAX = 4096
"""Text of an error that is sent; the rest is cut off."""

_TABLE: tuple[tuple[type[KVPoolError], types_pb2.ErrorCode], ...] = (
    (UnknownNamespaceError, types_pb2.UNKNOWN_NAMESPACE),
    (TooLargeError, types_pb2.TOO_LARGE),
    (AllPinnedError, types_pb2.ALL_PINNED),
    (UnknownIdError, types_pb2.UNKNOWN_ID),
    (OverloadedError, types_pb2.OVERLOADED),
    (RefusedError, types_pb2.REFUSED),
)
_BY_CODE = {code: kind for kind, code in _TABLE}

_FRAME_FIELD = "frame"


def to_proto(exc: BaseException) -> types_pb2.Error:
    """Return the wire form of an exception; what is not in the table is INTERNAL."""
    if isinstance(exc, InvalidArgumentError):
        return types_pb2.Error(
            code=types_pb2.INVALID_ARGUMENT,
            field=exc.field[:MESSAGE_CHARS_MAX],
            message=exc.problem[:MESSAGE_CHARS_MAX],
        )
    text = str(exc)[:MESSAGE_CHARS_MAX]
    if isinstance(exc, FrameError):
        return types_pb2.Error(code=types_pb2.INVALID_ARGUMENT, field=_FRAME_FIELD, message=text)
    code = next((code for kind, code in _TABLE if isinstance(exc, kind)), types_pb2.INTERNAL)
    return types_pb2.Error(code=code, message=text or type(exc).__name__)


def from_proto(error: types_pb2.Error) -> KVPoolError:
    """Return the exception that an Error stands for; an unknown code is a plain KVPoolError."""
    if error.code == types_pb2.INVALID_ARGUMENT:
        if error.field == _FRAME_FIELD:
            return FrameError(error.message)
        return InvalidArgumentError(error.field, error.message)
    return _BY_CODE.get(error.code, KVPoolError)(error.message)
