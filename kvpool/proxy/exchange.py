"""One client's request, from its parsed body to the last byte of its answer."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import uuid
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from kvpool.config import ProxySettings
from kvpool.proxy import prompts
from kvpool.proxy.errors import OUR_LIMITS, AttemptError, ClientGoneError, Plain, RefusedRequestError, error_event
from kvpool.proxy.fleet import Asking, Fleet, read_all
from kvpool.proxy.prompts import Asked
from kvpool.proxy.routing import LOAD_SHARE, Held, Instance, Role, Ticket
from kvpool.proxy.streams import ABORTED, GIVEN_UP, Events
from kvpool.proxy.watch import Phase, Watch

log = logging.getLogger(__name__)

TRY_ELSEWHERE: Final = frozenset({429, 500, 502, 503, 504})
"""An instance's answers after which another one is tried."""

DONE: Final = b"[DONE]"
"""Ends every stream in OpenAI's form: one without it was cut."""

WRITE_BYTES: Final = 1 << 16
"""Of an answer that is there as a whole: a client takes so much at a time."""

ERROR_WRITE_S: Final = 1.0

TRANSFER_MAX: Final = (1 << 64) - 1
"""Of a transfer's id, which is random: who knows it may read the prompt's KV."""

_HOP_BY_HOP: Final = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding",
    "upgrade", "host", "content-length", "content-type", "accept-encoding", "expect", "proxy-connection",
})  # fmt: skip
_NOT_THEIRS: Final = _HOP_BY_HOP | {"content-encoding"}  # of the body as it came: what goes on is decoded
_OURS: Final = _HOP_BY_HOP - {"content-type"} | {"date", "server"}


def request_headers(request: web.Request, api_key: str | None) -> CIMultiDict[str]:
    """Return a client's headers as instances get them; with an id, the same one at all of them."""
    headers = _passed_on(request.headers, _NOT_THEIRS)
    headers["Accept-Encoding"] = "identity"
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    headers.setdefault("X-Request-Id", uuid.uuid4().hex)
    return headers


def answer_headers(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """Return an instance's headers as clients get them."""
    return _passed_on(headers, _OURS)


def _passed_on(headers: CIMultiDictProxy[str], without: Container[str]) -> CIMultiDict[str]:
    """Return headers but for these, and for those that are said to be of the connection alone."""
    of_connection = {name.strip().lower() for named in headers.getall("Connection", ()) for name in named.split(",")}
    kept = (item for item in headers.items() if item[0].lower() not in without)
    return CIMultiDict((name, value) for name, value in kept if name.lower() not in of_connection)


@dataclass(slots=True)
class Prefill:
    """A prompt that is computed, or being computed, for a decode instance."""

    params: Mapping[str, Any] | None = None
    """What tells the decode instance where the KV is; None: it is to compute all of it."""
    chosen: bool = False
    """Whether only instances that have announced transfers understand it."""
    task: asyncio.Task[None] | None = None
    """Of a prefill that runs beside the decode."""

    @property
    def shared(self) -> bool:
        """Whether the KV is in the pool: fetched by one decode instance, it is there for another one too."""
        return self.params is not None and bool(self.params.get("transfer_id"))

    def params_for(self, instance: Instance) -> Mapping[str, Any] | None:
        """Return what to tell a decode instance."""
        return self.params if instance.transfers or not self.chosen else None

    async def end(self) -> None:
        """End what still runs: nobody waits for it."""
        if self.task is not None:
            self.task.cancel()
            (defect,) = await asyncio.gather(self.task, return_exceptions=True)
            if isinstance(defect, Exception):  # the client has its answer, whatever this was
                log.error("a prefill ended unexpectedly: %r", defect, exc_info=defect)


class Exchange:
    """Serves one request: chooses instances, tries others before the first byte, is honest after it."""

    def __init__(
        self, fleet: Fleet, settings: ProxySettings, request: web.Request, asked: Asked, raw: bytes,
        known: Mapping[str, Held], end: float,
    ) -> None:  # fmt: skip
        """``known``: what instances hold of the prompt, by their URL, where the master has said so.

        ``end``: the loop's time at which it must be over.
        """
        self._fleet = fleet
        self._settings = settings
        self._request = request
        self._asked = asked
        self._raw = raw
        self._known = known
        models, model = fleet.router.models(), asked.body.get("model")
        self._model = model if len(models) > 1 and isinstance(model, str) and model in models else ""
        self._loop = asyncio.get_running_loop()
        self._start = self._loop.time()
        self._end = end
        self._headers = request_headers(request, settings.api_key)
        self._response: web.StreamResponse | None = None

    async def run(self) -> tuple[web.StreamResponse, str]:
        """Return the response, sent whole or in part, and how it ended for the counters.

        Raises RefusedRequestError and AttemptError while nothing was sent, ClientGoneError.
        """
        try:
            response = await (self._divided() if self._divides() else self._whole())
        except AttemptError as exc:
            if exc.answer is not None and self._response is None:
                return await self._send(exc.answer), str(exc.answer.status)
            if self._response is None:
                raise
            await self._break_off(self._response, exc)
            return self._response, "broken"
        return response, str(response.status)

    def _divides(self) -> bool:
        """Whether one instance is to prefill and another one to decode; where both would do, as they serve."""
        suiting = {role: [one for one in self._fleet.router.of(role) if one.suits(self._model)] for role in Role}
        if not suiting[Role.DECODE] or not suiting[Role.BOTH]:
            return bool(suiting[Role.DECODE])
        able = {role: any(one.serves for one in ones) for role, ones in suiting.items()}
        return able[Role.DECODE] and (able[Role.PREFILL] or not able[Role.BOTH])

    def _asking(self, role: Role, compute_share: float = 1.0) -> Asking:
        return Asking(role, self._asked.prompt, compute_share, self._known, model=self._model, end=self._end)

    # ---- instances that do everything ------------------------------------------------------------------

    async def _whole(self) -> web.StreamResponse:
        asking = self._asking(Role.BOTH)
        failed: AttemptError | None = None
        body = prompts.for_decode(self._asked.body, None)
        raw = self._raw if body == self._asked.body else json.dumps(body).encode()
        for _ in range(self._settings.attempts_max):
            ticket = await self._place(asking, failed)
            try:
                return await self._answer(ticket, raw)
            except AttemptError as exc:
                failed = self._failed(exc, asking, ticket)
            finally:
                self._fleet.end(ticket)
        raise failed or AssertionError("attempts_max is at least 1")

    # ---- prefill here, decode there --------------------------------------------------------------------

    async def _divided(self) -> web.StreamResponse:
        """Prefill, and decode. The place at the decode instance comes first: KV that was computed waits for nobody."""
        asking = self._asking(Role.DECODE, LOAD_SHARE)
        failed: AttemptError | None = None
        prefill = Prefill()
        try:
            for _ in range(self._settings.attempts_max):
                ticket = await self._place(asking, failed)
                try:
                    if prefill.params is None:
                        prefill = await self._prefill(ticket)
                    if not ticket.instance.up:
                        raise AttemptError("the instance went down", 503, reached=False)
                    body = prompts.for_decode(self._asked.body, prefill.params_for(ticket.instance))
                    return await self._answer(ticket, json.dumps(body).encode())
                except AttemptError as exc:
                    failed = self._failed(exc, asking, ticket)
                    if exc.reached and not prefill.shared:  # what an instance has begun to fetch, no other can
                        prefill = Prefill()
                finally:
                    self._fleet.end(ticket)
            raise failed or AssertionError("attempts_max is at least 1")
        finally:
            await prefill.end()

    async def _prefill(self, decode: Ticket) -> Prefill:
        """Have the prompt computed, or begin to; without parameters where the decode instance is to do it all."""
        outcomes = self._fleet.metrics.prefills
        if not self._asked.divisible:
            outcomes.labels("indivisible").inc()
            return Prefill()
        if self._skips_prefill(decode):
            outcomes.labels("skipped").inc()
            return Prefill()
        asking = self._asking(Role.PREFILL)
        ticket = await self._place_to_prefill(asking, None)
        if ticket is None:
            outcomes.labels("failed").inc()
            log.debug("the decode instance computes the prompt: no prefill instance is up")
            return Prefill()
        at_once = self._starts_at_once(ticket.instance, decode.instance)
        self._fleet.metrics.decode_starts.labels("with_prefill" if at_once else "after_prefill").inc()
        if not at_once:
            return Prefill(await self._prefill_at(ticket, asking, prompts.for_prefill(self._asked.body)))
        transfer = f"{secrets.randbelow(TRANSFER_MAX) + 1:016x}"
        asking.transfers = self._settings.decode_start == "auto"
        prefill = Prefill(prompts.fetch(transfer), chosen=asking.transfers)
        prefill.task = asyncio.create_task(self._prefill_beside(prefill, ticket, asking, transfer))
        prefill.task.add_done_callback(lambda _: self._fleet.end(ticket))  # it may never have begun
        return prefill

    def _skips_prefill(self, decode: Ticket) -> bool:
        """Whether the decode instance can load what a prefill would compute."""
        how, held, left = self._settings.skip_prefill, decode.held, decode.prompt.tokens - decode.held.pool
        if not decode.exact or how == "off":
            return False
        # The last token is computed in any case: its logits are wanted.
        return left <= 1 or (how == "blocks" and held.pool > 0 and left < held.block_tokens)

    def _starts_at_once(self, prefill: Instance, decode: Instance) -> bool:
        """Whether the decode instance is asked while the prefill runs."""
        if self._settings.decode_start != "auto":
            return self._settings.decode_start == "with_prefill"
        return all(one.transfers and one.layerwise for one in (prefill, decode))

    async def _prefill_beside(self, prefill: Prefill, ticket: Ticket, asking: Asking, transfer: str) -> None:
        """Have the prompt computed while a decode instance waits for it already, which computes it where this fails."""
        outcomes = self._fleet.metrics.prefills
        body = prompts.for_prefill(self._asked.body, transfer)
        try:
            if await self._prefill_at(ticket, asking, body) is None:
                prefill.params = None  # of no use to another decode instance
        except asyncio.CancelledError:
            outcomes.labels("left").inc()
            raise
        except (AttemptError, RefusedRequestError) as exc:
            prefill.params = None
            outcomes.labels("failed").inc()
            log.debug("the decode instance computes the prompt: %s", exc)

    async def _prefill_at(self, ticket: Ticket, asking: Asking, body: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return what a prefill instance says of the prompt's KV, the ticket's or another one; None for nothing."""
        outcomes = self._fleet.metrics.prefills
        try:
            raw = json.dumps(body).encode()
        except BaseException:  # what could be read may be nested too deeply to be written from here
            self._fleet.end(ticket)
            raise
        failed: AttemptError | None = None
        for _ in range(self._settings.attempts_max):
            if failed is not None:
                if not self._fleet.available(asking) and not failed.stale:
                    break
                place = await self._place_to_prefill(asking, failed)
                if place is None:
                    break
                ticket = place
            try:
                answer = await self._ask(ticket, raw)
            except AttemptError as exc:
                failed = self._failed(exc, asking, ticket)
            else:
                outcomes.labels("done" if answer.status == 200 else "refused").inc()
                return _params(answer)
            finally:
                self._fleet.end(ticket)
        outcomes.labels("failed").inc()
        log.debug("the decode instance computes the prompt: %s", failed)
        return None

    # ---- one attempt -----------------------------------------------------------------------------------

    async def _place(self, asking: Asking, failed: AttemptError | None) -> Ticket:
        """Return a place where it was not tried yet. Raises the last failure where there is none."""
        if failed is not None and not self._fleet.available(asking):
            if not failed.stale:
                raise failed
            asking.avoid.clear()
            failed.stale = False
        return await self._fleet.take(asking)

    async def _place_to_prefill(self, asking: Asking, failed: AttemptError | None) -> Ticket | None:
        """Return a place at a prefill instance; None where none is up, or was when it would have been its turn."""
        try:
            return await self._place(asking, failed)
        except RefusedRequestError:
            if self._fleet.available(asking):
                raise
            return None

    def _failed(self, failure: AttemptError, asking: Asking, ticket: Ticket) -> AttemptError:
        """Note that an attempt has failed; raises it where the client has bytes already, or no time is left."""
        outcome = "failed" if self._response is None or asking.role is Role.PREFILL else "broken"
        self._fleet.metrics.attempts.labels(asking.role, outcome).inc()
        log.warning("%s at %s: %s", asking.role, ticket.instance.name, failure)
        if not failure.blameless:
            self._fleet.failed(ticket, refused=not failure.reached)
        if self._response is not None or failure.final:
            raise failure
        asking.avoid.add(ticket.instance)
        return failure

    async def _ask(self, ticket: Ticket, raw: bytes) -> Plain:
        """Return a prefill instance's answer. Raises AttemptError."""
        limit_s = self._settings.first_byte_timeout / 1000
        watch = Watch(self._end)
        with self._fleet.watched(ticket.instance, watch):
            async with watch:
                try:
                    async with self._post(ticket, raw, watch, limit_s) as upstream:
                        answer = await self._plain(upstream)
                except (aiohttp.ClientError, OSError, ValueError) as exc:
                    raise _failure(exc) from exc
        self._count(ticket)
        self._fleet.router.answered(ticket)
        return answer

    async def _answer(self, ticket: Ticket, raw: bytes) -> web.StreamResponse:
        """Hand an instance's answer to the client. Raises AttemptError, ClientGoneError."""
        stream = self._asked.stream
        limit_s = (self._settings.first_byte_timeout if stream else self._settings.request_timeout) / 1000
        watch = Watch(self._end)
        with self._fleet.watched(ticket.instance, watch):
            async with watch:
                try:
                    async with self._post(ticket, raw, watch, limit_s) as upstream:
                        if upstream.status == 200 and upstream.content_type == "text/event-stream":
                            return await self._relay(upstream, ticket, watch)
                        answer = await self._plain(upstream)
                except (aiohttp.ClientError, OSError, ValueError) as exc:
                    raise _failure(exc) from exc
        self._count(ticket)
        self._fleet.router.answered(ticket)
        return await self._send(answer)

    def _post(self, ticket: Ticket, raw: bytes, watch: Watch, limit_s: float) -> Any:
        watch.expect(Phase.FIRST_BYTE, limit_s)
        headers = self._headers.copy()
        headers["Content-Type"] = "application/json"
        url = ticket.instance.name + self._request.path
        return self._fleet.session.post(url, data=raw, headers=headers, allow_redirects=False)

    async def _plain(self, upstream: aiohttp.ClientResponse) -> Plain:
        body = await read_all(upstream.content, self._settings.body_size_max)
        answer = Plain(upstream.status, answer_headers(upstream.headers), body)
        if upstream.status in TRY_ELSEWHERE:
            raise AttemptError(f"status {upstream.status}: {body[:200].decode(errors='replace')}", answer=answer)
        if not body:
            raise AttemptError(f"an empty answer with status {upstream.status}")
        if upstream.status == 200 and ABORTED.search(body):
            raise AttemptError(GIVEN_UP, 503)
        if upstream.status == 404 and not self._model and len(self._fleet.router.models()) > 1:
            # A name that no engine has announced, as an adapter's: another one may know it.
            raise AttemptError("status 404", answer=answer, blameless=True)
        return answer

    async def _relay(self, upstream: aiohttp.ClientResponse, ticket: Ticket, watch: Watch) -> web.StreamResponse:
        """Pass a stream on, byte for byte."""
        idle_s = self._settings.idle_timeout / 1000
        stream = Events(upstream.content, watch, idle_s, self._settings.body_size_max)
        events = await stream.next()
        if not events or events.lstrip().startswith(b"data: " + DONE):
            raise AttemptError("a stream without an answer", 503)
        self._count(ticket)
        response = web.StreamResponse(status=200, headers=answer_headers(upstream.headers))
        watch.expect(Phase.CLIENT, idle_s)
        await self._begin(response)
        last = events
        while events:
            watch.expect(Phase.CLIENT, idle_s)
            await _write(response, events)
            last = last if events.isspace() else events
            watch.expect(Phase.NEXT_BYTE, idle_s)
            events = await stream.next()
        if not last.rstrip().endswith(DONE):
            raise AttemptError("the stream ended before it was done")
        self._fleet.router.answered(ticket)
        watch.expect(Phase.CLIENT, idle_s)
        await _write(response, b"", last=True)
        return response

    # ---- the client ------------------------------------------------------------------------------------

    def _count(self, ticket: Ticket) -> None:
        """The prompt is computed."""
        self._fleet.first_byte(ticket)
        self._fleet.metrics.attempts.labels(ticket.instance.role, "answered").inc()
        if ticket.instance.role is not Role.PREFILL:
            seconds = self._loop.time() - self._start
            self._fleet.metrics.first_byte.labels(self._request.path).observe(seconds)

    async def _begin(self, response: web.StreamResponse) -> None:
        self._response = response
        try:
            await response.prepare(self._request)
        except ConnectionError as exc:
            raise ClientGoneError("the client has hung up") from exc

    async def _send(self, answer: Plain) -> web.StreamResponse:
        """Send an answer that is there as a whole."""
        response = web.StreamResponse(status=answer.status, headers=answer.headers)
        response.content_length = len(answer.body)
        idle_s = self._settings.idle_timeout / 1000
        watch = Watch(self._end)
        async with watch:
            watch.expect(Phase.CLIENT, idle_s)
            await self._begin(response)
            for start in range(0, len(answer.body), WRITE_BYTES):
                watch.expect(Phase.CLIENT, idle_s)
                await _write(response, answer.body[start : start + WRITE_BYTES])
            watch.expect(Phase.CLIENT, idle_s)
            await _write(response, b"", last=True)
        return response

    async def _break_off(self, response: web.StreamResponse, failure: AttemptError) -> None:
        """Say what happened, and end the connection in a way that nobody takes for an end of the answer."""
        transport = self._request.transport
        try:
            async with asyncio.timeout(ERROR_WRITE_S):
                await _write(response, error_event(failure.status, f"the stream broke: {failure}"))
        except (TimeoutError, ClientGoneError):
            if transport is not None:
                transport.abort()
        if transport is not None:
            transport.close()  # without the last chunk


async def _write(response: web.StreamResponse, data: bytes, *, last: bool = False) -> None:
    try:
        await (response.write_eof() if last else response.write(data))
    except (ConnectionError, aiohttp.ClientError) as exc:
        raise ClientGoneError("the client has hung up") from exc


def _failure(exc: Exception) -> AttemptError:
    """Return what a client library's error means for the request."""
    if isinstance(exc, aiohttp.ServerTimeoutError):
        return AttemptError("the instance could not be reached in time", 504, reached=False)
    if isinstance(exc, aiohttp.ClientConnectorError) and exc.os_error.errno in OUR_LIMITS:
        return AttemptError(f"the proxy cannot connect: {exc.os_error.strerror}", 503, final=True, blameless=True)
    if isinstance(exc, aiohttp.ClientConnectorError):
        return AttemptError("the instance takes no connections", 503, reached=False)
    stale = isinstance(exc, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError)
    return AttemptError(f"the connection broke: {str(exc) or type(exc).__name__}", stale=stale)


def _params(answer: Plain) -> Mapping[str, Any] | None:
    """Return the transfer parameters in a prefill instance's answer; None where it has none to give."""
    if answer.status != 200:
        return None
    try:
        found = json.loads(answer.body).get("kv_transfer_params")
    except (ValueError, AttributeError):
        return None
    return found if isinstance(found, dict) else None
