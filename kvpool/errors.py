"""The error tree: one base class, translated once at each edge (gRPC status, frame, exit code)."""

from __future__ import annotations


class KVPoolError(Exception):
    """Base of everything that kvpool raises on purpose."""


class InvalidArgumentError(KVPoolError):
    """A value from outside is not allowed; names the field and what is."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class ConfigError(InvalidArgumentError):
    """A setting on the command line, in a file or in the environment is not allowed."""


class UnknownNamespaceError(KVPoolError):
    """The namespace was never registered here."""


class UnknownIdError(KVPoolError):
    """A reservation or pin id that this connection does not hold."""


class NoRoomError(KVPoolError):
    """A put cannot be served: see the two subclasses for the only two reasons."""


class TooLargeError(NoRoomError):
    """The block is larger than the segment."""


class AllPinnedError(NoRoomError):
    """Everything that is left in the segment is pinned or being written."""


class OverloadedError(KVPoolError):
    """A bounded queue is full; try again later."""


class RefusedError(KVPoolError):
    """Protected mode: the peer is not on this host and the server was not told to trust others."""


class FrameError(KVPoolError):
    """Bytes on a socket that are not a frame, or a frame over its limits. Closes that connection."""


class UnavailableError(KVPoolError):
    """The other end is gone, or did not answer before the deadline."""
