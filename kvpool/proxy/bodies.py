"""Bodies of requests: how many bytes of them are held at once, read or still to come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    def room(self, request: web.Request) -> Iterator[Callable[[int], None]]:
        """Keep room for a request's body while it is served; yields what is told its size when that is known.

        Raises RefusedRequestError.
        """
        size = request.content_length
        if size is None or request.headers.get("Content-Encoding"):
            size = self._each_max
        size = min(size, self._each_max)
        if self.held and self.held + size > self._bytes_max:
            raise RefusedRequestError(429, f"requests of {self.held} bytes are being served already")
        kept = 0

        def keep(size: int) -> None:
            nonlocal kept
            self.held += size - kept
            kept = size

        keep(size)
        try:
            yield keep
        finally:
            keep(0)
