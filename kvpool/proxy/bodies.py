"""Bodies of requests: how many bytes of them are held at once, read or still to come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web

from kvpool.proxy.errors import RefusedRequestError


class Bodies:
    """Room for so many bytes. One request is let in whatever its size."""

    def __init__(self, bytes_max: int, each_max: int) -> None:
        """``each_max``: of one whose size nobody knows before it is there."""
        self._bytes_max = bytes_max
        self._each_max = each_max
        self.held = 0

    @contextmanager
    def room(self, request: web.Request) -> Iterator[Room]:
        """Keep room for a request's body while it is served. Raises RefusedRequestError."""
        size = request.content_length
        if size is None or request.headers.get("Content-Encoding"):
            size = self._each_max
        size = min(size, self._each_max)
        if self.held and self.held + size > self._bytes_max:
            raise RefusedRequestError(429, f"requests of {self.held} bytes are being served already")
        room = Room(self)
        room.resize(size)
        try:
            yield room
        finally:
            room.resize(0)


class Room:
    """What one request has of it."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._size = 0

    def resize(self, size: int) -> None:
        """Keep so much from now on: its size is known."""
        self._bodies.held += size - self._size
        self._size = size
