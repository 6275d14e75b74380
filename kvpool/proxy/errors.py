"""What can go wrong with a request, and how clients are told: in OpenAI's form."""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web
from multidict import CIMultiDict

RETRY_AFTER_S: Final = 1


class RefusedRequestError(Exception):
    """The proxy itself answers; ``status`` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


OUR_LIMITS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})
"""Why no connection can be made, whoever is to be reached."""


class ClientGoneError(Exception):
    """The client has hung up, or takes nothing more."""


@dataclass(frozen=True, slots=True)
class Plain:
    """An instance's answer that is no stream."""

    status: int
    headers: CIMultiDict[str]
    body: bytes


class AttemptError(Exception):
    """A request did not succeed at one instance.

    ``status``: what the client is told when there is no other. ``reached``: the instance may have begun with
    it. ``stale``: the connection had been idle, and ended as it was used again. ``final``: there is no time left
    for another attempt. ``answer``: what the instance said, where it said something. ``blameless``: it is none of
    the instance's making.
    """

    def __init__(
        self, reason: str, status: int = 502, *, reached: bool = True, stale: bool = False, final: bool = False,
        answer: Plain | None = None, blameless: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(reason)
        self.status = status
        self.reached = reached
        self.stale = stale
        self.final = final
        self.answer = answer
        self.blameless = blameless


def error_body(status: int, message: str) -> bytes:
    """Return an error as OpenAI's clients read it."""
    kinds = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
             413: "invalid_request_error", 429: "rate_limit_error"}  # fmt: skip
    error: dict[str, Any] = {"message": message, "type": kinds.get(status, "server_error"), "param": None}
    return json.dumps({"error": error | {"code": status}}).encode()


def error_response(status: int, message: str) -> web.Response:
    """Return an error; one that may be over soon says when to ask again."""
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status in {429, 503} else {}
    return web.Response(
        status=status, body=error_body(status, message), content_type="application/json", headers=headers
    )


def error_event(status: int, message: str) -> bytes:
    """Return the event that ends a stream which has begun and cannot go on."""
    return b"data: " + error_body(status, message) + b"\n\n"
