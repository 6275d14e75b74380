"""The instances as they are: who waits for one, whether they answer, what is ended when one is lost."""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

import aiohttp

from kvpool.config import ProxySettings
from kvpool.proxy.errors import OUR_LIMITS, RefusedRequestError
from kvpool.proxy.metrics import Metrics
from kvpool.proxy.routing import CHUNK_TOKENS, Held, Instance, Policy, Prompt, Refusal, Role, Router, Ticket
from kvpool.proxy.watch import Watch

log = logging.getLogger(__name__)

DOWN_AFTER: Final = 2
"""Checks in a row that an instance may not answer before it gets nothing new; a refused connection is enough alone."""

LATE_S: Final = 0.25
"""A check that is over so much later than it should be has waited for the proxy itself."""

LOST_AFTER: Final = 5
"""Checks in a row after which what runs there is given up: a busy engine may be late with its health."""

KEEPALIVE_S: Final = 4.0
"""Idle connections to instances; uvicorn closes them after 5 s."""

METRICS_BYTES_MAX: Final = 8 << 20
_USAGE = re.compile(rb"^vllm:kv_cache_usage_perc(?:\{[^}]*\})? ([0-9.eE+-]+)", re.MULTILINE)
_CONFIG = re.compile(rb"^vllm:cache_config_info\{([^}]*)\}", re.MULTILINE)
_LABEL = re.compile(rb'(block_size|num_gpu_blocks)="(\d+)"')


@dataclass(slots=True)
class Asking:
    """What a request wants of an instance."""

    role: Role
    prompt: Prompt
    compute_share: float = 1.0
    known: Mapping[str, Held] = field(default_factory=dict)
    avoid: set[Instance] = field(default_factory=set)
    model: str = ""
    """Leave out instances that serve another; empty: all serve the same, as far as is known."""
    transfers: bool = False
    """Leave out instances that do not move prompts by the id of a transfer."""
    end: float = math.inf
    """The loop's time after which nobody waits for it any more."""

    @property
    def picky(self) -> bool:
        """Whether it would refuse places that others would take."""
        return bool(self.avoid or self.model or self.transfers)

    @property
    def taste(self) -> object:
        """What it depends on whether there is a place for it."""
        return self.model, self.transfers, frozenset(self.avoid)

    def may_take(self, one: Instance) -> bool:
        """Whether it may go there, now or later."""
        suits = one.suits(self.model) and (one.transfers or not self.transfers)
        return one.serves and one not in self.avoid and suits


@dataclass(slots=True, eq=False)
class _Waiter:
    asking: Asking
    place: asyncio.Future[Ticket]

    def goes_before(self, asking: Asking) -> bool:
        """Whether a place for this waiter would be one for the other too, which has come later."""
        mine = self.asking
        return not self.place.done() and mine.model == asking.model and not mine.avoid and not mine.transfers


async def read_all(content: aiohttp.StreamReader, bytes_max: int) -> bytes:
    """Return what is left of a body. Raises ValueError for one that is too large, aiohttp.ClientError for a cut one."""
    parts = []
    size = 0
    while part := await content.readany():
        parts.append(part)
        size += len(part)
        if size > bytes_max:
            raise ValueError(f"more than {bytes_max} bytes")
    return b"".join(parts)


class Fleet:
    """Hands out places at instances and keeps an eye on them."""

    def __init__(self, settings: ProxySettings) -> None:
        self._settings = settings
        self.router = Router(
            requests_max=settings.instance_requests_max,
            chunks_max=max(1, settings.prefix_tokens // CHUNK_TOKENS),
            policy=Policy(settings.policy),
        )
        self._waiting: dict[Role, deque[_Waiter]] = {role: deque() for role in Role}
        self.metrics = Metrics(self.router, lambda: sum(map(len, self._waiting.values())))
        self._watches: dict[Instance, set[Watch]] = {}
        self._checks: dict[Instance, asyncio.Task[None]] = {}
        self._hurry: dict[Instance, asyncio.Event] = {}
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, connect=settings.connect_timeout / 1000),
            auto_decompress=False,
            headers={"Accept-Encoding": "identity"},  # what is passed on is not unpacked, what is read is not packed
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        """End the checks and all connections."""
        checks = list(self._checks.values())
        for check in checks:
            check.cancel()
        await asyncio.gather(*checks, return_exceptions=True)
        await self.session.close()

    # ---- which instances there are -------------------------------------------------------------------

    def add(self, role: Role, name: str, *, up: bool = True) -> Instance:
        """Add an instance; with ``up`` it counts as up until it is found to be down, else the other way round."""
        instance = self.router.add(role, name, up=up)
        if instance not in self._checks:
            self._hurry[instance] = asyncio.Event()
            self._checks[instance] = asyncio.create_task(self._check(instance))
        self._serve(role)
        return instance

    def remove(self, instance: Instance) -> None:
        """Let an instance go once its requests have ended."""
        self.router.remove(instance)
        self._refuse(instance.role)
        self._gone(instance)

    def changed(self, role: Role) -> None:
        """Other requests suit an instance than before: some who wait may go there now, and some nowhere any more."""
        self._serve(role)
        self._refuse(role)

    def drain(self, instance: Instance) -> None:
        """Send an instance nothing new."""
        instance.draining = True
        self._refuse(instance.role)

    def failed(self, ticket: Ticket, *, refused: bool) -> None:
        """A request has failed: look at once; one that takes no connections gets nothing until it is up."""
        instance = ticket.instance
        self.router.failed(ticket)
        if refused and instance.up:
            log.warning("%s instance %s takes no connections", instance.role, instance.name)
            self._down(instance)
        if instance in self._hurry:
            self._hurry[instance].set()

    # ---- places ------------------------------------------------------------------------------------------

    async def take(self, asking: Asking) -> Ticket:
        """Return a place at an instance, waiting for one if need be. Raises RefusedRequestError."""
        waiting = self._waiting[asking.role]
        behind = any(waiter.goes_before(asking) for waiter in waiting)
        found = Refusal.FULL if behind else self._take(asking)
        if isinstance(found, Refusal):
            if not self.available(asking):
                raise RefusedRequestError(503, f"no instance for {asking.role} is up")
            before = sum(waiter.asking.model == asking.model for waiter in waiting)
            if before >= self._settings.queue_max:
                raise RefusedRequestError(429, f"{before} requests wait for {asking.role} already")
            found = await self._wait(_Waiter(asking, asyncio.get_running_loop().create_future()))
        self.metrics.prompt_tokens.labels(asking.role).inc(asking.prompt.tokens)
        source = "master" if found.exact else "proxy"
        self.metrics.held_tokens.labels(asking.role, source).inc(found.held.own)
        return found

    def available(self, asking: Asking) -> bool:
        """Whether any instance could take this, sooner or later."""
        return any(map(asking.may_take, self.router.of(asking.role)))

    def _take(self, asking: Asking) -> Ticket | Refusal:
        return self.router.take(
            asking.role,
            asking.prompt,
            compute_share=asking.compute_share,
            avoid={one for one in self.router.of(asking.role) if not asking.may_take(one)},
            known=asking.known,
        )

    async def _wait(self, waiter: _Waiter) -> Ticket:
        role = waiter.asking.role
        waiting = self._waiting[role]
        waiting.append(waiter)
        try:
            left_s = waiter.asking.end - asyncio.get_running_loop().time()
            async with asyncio.timeout(min(self._settings.queue_timeout / 1000, left_s)):
                return await waiter.place
        except BaseException as exc:  # cancelled or not: a place is never lost
            place = waiter.place
            if place.done() and not place.cancelled() and place.exception() is None:
                self.end(place.result())  # it came as we gave up
            if isinstance(exc, TimeoutError):
                raise RefusedRequestError(503, f"no instance for {role} was free in time") from None
            raise
        finally:
            with suppress(ValueError):
                waiting.remove(waiter)

    def first_byte(self, ticket: Ticket) -> None:
        """Its prompt is computed."""
        self.router.first_byte(ticket)

    def end(self, ticket: Ticket) -> None:
        """Give a place back, and hand it on."""
        self.router.end(ticket)
        self._gone(ticket.instance)
        self._serve(ticket.instance.role)

    def _serve(self, role: Role) -> None:
        """Give places to those who wait, in their order."""
        full: set[object] = set()  # for whom there is no place
        for waiter in list(self._waiting[role]):
            asking = waiter.asking
            if waiter.place.done() or asking.taste in full:
                continue
            found = self._take(asking)
            if not isinstance(found, Refusal):
                waiter.place.set_result(found)
            elif asking.picky:  # others may want places that it does not
                full.add(asking.taste)
            else:
                return

    def _refuse(self, role: Role) -> None:
        """Turn away those who wait for nobody."""
        for waiter in list(self._waiting[role]):
            if not waiter.place.done() and not self.available(waiter.asking):
                waiter.place.set_exception(RefusedRequestError(503, f"no instance for {role} is up"))

    # ---- what runs there -----------------------------------------------------------------------------

    @contextmanager
    def watched(self, instance: Instance, watch: Watch) -> Iterator[None]:
        """End the watch when the instance is lost."""
        watches = self._watches.setdefault(instance, set())
        watches.add(watch)
        try:
            yield
        finally:
            watches.discard(watch)
            if not watches:
                self._watches.pop(instance, None)

    def lose_all(self, why: str) -> None:
        """End everything that runs or waits."""
        for watches in list(self._watches.values()):
            for watch in list(watches):
                watch.lose(why, final=True)
        for waiter in [waiter for waiting in self._waiting.values() for waiter in waiting]:
            if not waiter.place.done():
                waiter.place.set_exception(RefusedRequestError(503, why))

    def _down(self, instance: Instance) -> None:
        self.router.down(instance)
        self._refuse(instance.role)

    def _gone(self, instance: Instance) -> None:
        if (instance.role, instance.name) not in self.router.instances and instance in self._checks:
            self._checks.pop(instance).cancel()
            self._hurry.pop(instance, None)

    # ---- checks ------------------------------------------------------------------------------------------

    async def _check(self, instance: Instance) -> None:
        """Ask an instance for its health, again and again."""
        failures = 0
        hurry = self._hurry[instance]
        while True:
            known = await self._ask_health(instance)
            problem, refused = known or ("", False)
            if problem:
                failures += 1
                if instance.up and (refused or failures >= DOWN_AFTER):
                    log.warning("%s instance %s is down: %s", instance.role, instance.name, problem)
                    self._down(instance)
                if failures >= LOST_AFTER:
                    for watch in list(self._watches.get(instance, ())):
                        watch.lose(f"the instance is down: {problem}")
            elif known is not None:
                failures = 0
                was_up = instance.up
                self.router.healthy(instance)
                if not was_up:
                    log.info("%s instance %s is up", instance.role, instance.name)
                    self._serve(instance.role)
            hurry.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.health_interval / 1000):
                    await hurry.wait()

    async def _ask_health(self, instance: Instance) -> tuple[str, bool] | None:
        """Return what is wrong, "" for nothing, and whether it does not even take connections.

        None where nothing is known of it: it was the proxy itself that could not ask, or was too late to hear.
        """
        clock, limit_s = asyncio.get_running_loop().time, self._settings.health_timeout / 1000
        end = clock() + limit_s
        try:
            async with asyncio.timeout_at(end):
                async with self.session.get(f"{instance.name}/health") as answer:
                    if answer.status != 200:
                        return f"status {answer.status}", False
        except aiohttp.ClientConnectorError as exc:
            return None if exc.os_error.errno in OUR_LIMITS else (str(exc.os_error), True)
        except TimeoutError:
            return None if clock() > end + LATE_S else ("no answer in time", False)
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            return f"{type(exc).__name__}: {exc}", False
        with suppress(aiohttp.ClientError, OSError, ValueError):  # TimeoutError is an OSError
            async with asyncio.timeout(limit_s):
                await self._ask_metrics(instance)
        return "", False

    async def _ask_metrics(self, instance: Instance) -> None:
        """Learn what an instance can hold; one that does not say is no worse."""
        async with self.session.get(f"{instance.name}/metrics") as answer:
            page = await read_all(answer.content, METRICS_BYTES_MAX) if answer.status == 200 else b""
        self._learn(instance, page)

    def _learn(self, instance: Instance, page: bytes) -> None:
        usage = [float(value) for value in _USAGE.findall(page)]
        tokens = 0
        for labels in _CONFIG.findall(page):
            config = {name: int(value) for name, value in _LABEL.findall(labels)}
            tokens += config.get(b"block_size", 0) * config.get(b"num_gpu_blocks", 0)
        self.router.learn(instance, tokens, sum(usage) / len(usage) if usage else 0.0)
