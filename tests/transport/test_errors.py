"""The error table: what is raised at one end is raised at the other."""

from __future__ import annotations

import pytest

from kvpool import errors
from kvpool.rpc.errors import from_proto, to_proto
from kvpool.rpc.v1 import types_pb2


@pytest.mark.parametrize(
    "exc",
    [
        errors.InvalidArgumentError("size", "must be small"),
        errors.UnknownNamespaceError("n"),
        errors.UnknownIdError("7"),
        errors.TooLargeError("t"),
        errors.AllPinnedError("p"),
        errors.OverloadedError("o"),
        errors.RefusedError("r"),
        errors.FrameError("f"),
    ],
)
def test_errors_survive_the_wire(exc: errors.KVPoolError) -> None:
    """Class and text are the same at the other end."""
    back = from_proto(to_proto(exc))
    assert type(back) is type(exc)
    assert str(back) == str(exc)


def test_everything_else_is_internal() -> None:
    """An unknown exception or code is a plain KVPoolError."""
    assert to_proto(ValueError("x")).code == types_pb2.INTERNAL
    assert type(from_proto(to_proto(ValueError("x")))) is errors.KVPoolError
    assert type(from_proto(types_pb2.Error(code=99, message="m"))) is errors.KVPoolError  # type: ignore[arg-type]
    assert len(to_proto(ValueError("x" * 100_000)).message) <= 4096
