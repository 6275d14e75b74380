"""Bodies of requests: read as they arrive, and how much memory they take together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from kvpool.proxy.errors import RefusedRequestError

TEXT_COST: Final = 4
WIDE_COST: Final = 8
"""Memory that a body's byte takes: as it came, read, and written for the instances; wide is what is not all ASCII."""

VALUE_COST: Final = 60
"""Memory that a value in a body takes besides, a token's id or a member."""

_VALUES: Final = (b",", b":", b"[", b"{")


@dataclass(slots=True)
class _Arrived:
    """What is known of the part of a body that is there."""

    size: int = 0
    values: int = 0
    wide: bool = False
    kept: int = 0
    """The room that it has."""

    def count(self, part: bytes) -> int:
        """Return how much memory it takes with another part, about."""
        self.size += len(part)
        self.values += sum(map(part.count, _VALUES))
        self.wide = self.wide or not part.isascii() or b"\\u" in part
        return self.size * (WIDE_COST if self.wide else TEXT_COST) + self.values * VALUE_COST


class Bodies:
    """Room for the bodies that are held at once. One is let in whatever it takes."""

    def __init__(self, memory_max: int, size_max: int, idle_s: float) -> None:
        """``size_max``: bytes of each; ``idle_s``: how long one may stand still on its way."""
        self._memory_max = memory_max
        self._size_max = size_max
        self._idle_s = idle_s
        self.held = 0

    @asynccontextmanager
    async def read(self, request: web.Request, end: float) -> AsyncIterator[bytes]:
        """Read a body, which keeps its room until this is left. Raises RefusedRequestError.

        ``end``: the loop's time at which it has to be there.
        """
        if (request.content_length or 0) > self._size_max:
            raise self._too_large()
        arrived = _Arrived()
        try:
            yield await self._read(request, end, arrived)
        finally:
            self.held -= arrived.kept

    async def _read(self, request: web.Request, end: float, arrived: _Arrived) -> bytes:
        loop, parts = asyncio.get_running_loop(), []
        try:
            async with asyncio.timeout_at(min(end, loop.time() + self._idle_s)) as limit:
                while part := await request.content.readany():
                    parts.append(part)
                    self._keep(arrived, arrived.count(part))
                    limit.reschedule(min(end, loop.time() + self._idle_s))
        except TimeoutError:
            raise RefusedRequestError(408, "the request did not arrive in time") from None
        except web.RequestPayloadError:
            raise RefusedRequestError(400, "the request's body is cut, or not in the encoding that it names") from None
        return b"".join(parts)

    def _keep(self, arrived: _Arrived, cost: int) -> None:
        if arrived.size > self._size_max:
            raise self._too_large()
        others = self.held - arrived.kept
        if others and others + cost > self._memory_max:
            raise RefusedRequestError(429, f"requests that take {others} bytes of memory are being served already")
        self.held, arrived.kept = others + cost, cost

    def _too_large(self) -> RefusedRequestError:
        return RefusedRequestError(413, f"the request has more than {self._size_max} bytes")
