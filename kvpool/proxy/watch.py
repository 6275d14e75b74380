"""One limit for whatever an attempt waits for at the moment."""

from __future__ import annotations

import asyncio
from enum import StrEnum
from types import TracebackType
from typing import Self

from kvpool.proxy.errors import AttemptError, ClientGoneError


class Phase(StrEnum):
    """What is waited for; the words end the sentence "... in time"."""

    FIRST_BYTE = "did not answer"
    NEXT_BYTE = "did not go on"
    CLIENT = "was not listened to"


class Watch:
    """An ``async with`` that ends what is in it when the phase named last takes too long, or ``lose`` is called.

    Raises AttemptError, or ClientGoneError where it was the client that kept it waiting.
    """

    def __init__(self, end: float) -> None:
        """``end``: the loop's time at which it must be over in any case."""
        self._end = end
        self._loop = asyncio.get_running_loop()
        self._scope = asyncio.timeout_at(end)
        self._phase = Phase.FIRST_BYTE
        self._lost = ""
        self._final = False

    def expect(self, phase: Phase, limit_s: float) -> None:
        """Wait for this from now on, so long at most."""
        self._phase = phase
        if not self._lost and not self._scope.expired():
            self._scope.reschedule(min(self._end, self._loop.time() + limit_s))

    def lose(self, why: str, *, final: bool = False) -> None:
        """End it now; ``final``: nor is it to be tried elsewhere."""
        if not self._lost and not self._scope.expired():
            self._lost, self._final = why, final
            self._scope.reschedule(self._loop.time())

    async def __aenter__(self) -> Self:
        await self._scope.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._scope.__aexit__(kind, value, trace)
        except TimeoutError:
            raise self._error() from None

    def _error(self) -> Exception:
        if self._lost:
            return AttemptError(self._lost, 503, final=self._final)
        if self._phase is Phase.CLIENT:
            return ClientGoneError("the client takes nothing more")
        if self._scope.when() == self._end:
            return AttemptError("the request took too long", 504, final=True)
        return AttemptError(f"the instance {self._phase} in time", 504)
