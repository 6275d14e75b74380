"""Streams of instances, read in whole events: one that says that the instance has failed is not passed on as an answer.

Engines answer with status 200 before they have computed anything: whatever goes wrong later is an event of the stream.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

import aiohttp
from multidict import CIMultiDict

from kvpool.proxy.errors import AttemptError, Plain
from kvpool.proxy.watch import Phase, Watch

ABORTED: Final = re.compile(rb'"finish_reason": ?"abort"')
"""An instance that shuts down, or sleeps, ends requests so, with status 200. In a text its quotes would be escaped."""

GIVEN_UP: Final = "the instance gave the request up"

_ERROR: Final = re.compile(rb'^data: ?(\{"error".*)', re.MULTILINE)
"""In a text there are no line ends: they are escaped."""

_ENDS: Final = (b"\n\n", b"\n\r\n")
"""Of events."""


class Events:
    """Reads a stream. Bytes are passed on as they are; of an event that has come in part the rest is waited for."""

    def __init__(self, content: aiohttp.StreamReader, watch: Watch, idle_s: float, bytes_max: int) -> None:
        """``idle_s``: how long the rest of an event may take; ``bytes_max``: of an event."""
        self._content = content
        self._watch = watch
        self._idle_s = idle_s
        self._bytes_max = bytes_max
        self._held = bytearray()

    async def next(self) -> bytes:
        """Return the events that are there by now, b"" at the stream's end.

        Raises AttemptError where one of them says that the instance has failed, ValueError for one that is too large,
        aiohttp.ClientError for a cut stream.
        """
        held = self._held
        while part := await self._content.readany():
            if not held and part.endswith(_ENDS):
                return _good(part)
            start = max(0, len(held) - 2)
            held += part
            if end := max((at + len(mark) for mark in _ENDS if (at := held.rfind(mark, start)) >= 0), default=0):
                events = bytes(held[:end])
                del held[:end]
                return _good(events)
            if len(held) > self._bytes_max:
                raise ValueError(f"an event of more than {self._bytes_max} bytes")
            self._watch.expect(Phase.NEXT_BYTE, self._idle_s)
        rest = bytes(held)
        held.clear()
        return _good(rest)


def _good(events: bytes) -> bytes:
    """Return events in which the instance does not say that it has failed. Raises AttemptError."""
    if ABORTED.search(events):
        raise AttemptError(GIVEN_UP, 503)
    if b'{"error"' in events:
        for found in _ERROR.finditer(events):
            _check(found[1])
    return events


def _check(data: bytes) -> None:
    """Raise AttemptError for an error that is the instance's; one that is the client's goes back as it is."""
    try:
        error: Any = json.loads(data)["error"]
    except (ValueError, RecursionError):
        return
    if not error:
        return
    told = error if isinstance(error, dict) else {"message": error}
    code = told.get("code")
    status = code if isinstance(code, int) and 400 <= code < 600 else 500
    if status < 500 and status != 429:
        return
    answer = Plain(status, CIMultiDict({"Content-Type": "application/json"}), data.strip())
    raise AttemptError(f"the instance says: {str(told.get('message'))[:200]}", answer=answer)
