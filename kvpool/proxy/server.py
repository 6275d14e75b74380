"""kvpool-proxy: the routes, and the life of the process."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import gc
import hmac
import ipaddress
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import aiohttp
import grpc
from aiohttp import web

from kvpool.config import ProxySettings
from kvpool.config_kinds import URL
from kvpool.errors import InvalidArgumentError
from kvpool.proxy import prompts
from kvpool.proxy.bodies import Bodies
from kvpool.proxy.discovery import Discovery
from kvpool.proxy.errors import AttemptError, ClientGoneError, RefusedRequestError, error_response
from kvpool.proxy.exchange import Exchange, answer_headers, request_headers
from kvpool.proxy.fleet import Fleet, read_all
from kvpool.proxy.index import PoolIndex
from kvpool.proxy.routing import Held, Instance, Role
from kvpool.server.daemon import run_daemon

log = logging.getLogger(__name__)

ASK_S: Final = 10.0
"""For what is asked of instances besides completions."""

BROKEN_OFF_S: Final = 2.0
"""After ``drain_timeout``: for telling clients that their streams end."""

CLIENT_IDLE_S: Final = 75.0
"""A client's connection on which nothing is asked for so long is closed: each is one of the files we may have open."""

CLIENT_LEFT: Final = 499

RECONNECT_MS_MAX: Final = 2000
"""How long a master that is back may wait to be asked again."""

GC_THRESHOLDS: Final = (2000, 10, 10)
"""Unlike blocks, requests have cycles and live long enough to be old: all generations are looked through."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Proxy:
    """The routes over a fleet. ``start`` and ``close`` belong to the loop that it serves on."""

    def __init__(self, settings: ProxySettings) -> None:
        self._settings = settings
        self.fleet = Fleet(settings)
        self._channel: grpc.aio.Channel | None = None
        self._discovery: Discovery | None = None
        self._index: PoolIndex | None = None
        self._bodies = Bodies(settings.bodies_size_max, settings.body_size_max, settings.idle_timeout / 1000)
        self._ending = False
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._runner = web.AppRunner(
            self._application(), access_log=None, handler_cancellation=True, shutdown_timeout=BROKEN_OFF_S,
            keepalive_timeout=CLIENT_IDLE_S,
        )
        self._site: web.TCPSite | None = None

    def _application(self) -> web.Application:
        app = web.Application(client_max_size=self._settings.body_size_max, middlewares=[self._guard])
        app.add_routes([
            web.post(prompts.COMPLETIONS, self._complete),
            web.post(prompts.CHAT, self._complete),
            web.get("/v1/models", self._models),
            web.get("/health", self._health),
            web.get("/healthcheck", self._healthcheck),
            web.get("/metrics", self._metrics),
            web.get("/instances", self._instances),
            web.post("/instances/{change:add|remove|drain}", self._change),
            web.post("/reset_prefix_cache", self._reset),
        ])
        return app

    async def start(self) -> int:
        """Listen; returns the port. Raises InvalidArgumentError for one that is taken, or a host that is not ours."""
        settings = self._settings
        for url in settings.instances or ():
            self.fleet.add(Role.BOTH, url)
        for url in settings.urls("prefiller"):
            self.fleet.add(Role.PREFILL, url)
        for url in settings.urls("decoder"):
            self.fleet.add(Role.DECODE, url)
        if settings.master is not None:
            options = [("grpc.enable_http_proxy", 0), ("grpc.max_reconnect_backoff_ms", RECONNECT_MS_MAX)]
            self._channel = grpc.aio.insecure_channel(settings.master, options=options)
            self._discovery = Discovery(self.fleet, self._channel, adds=settings.discovers)
            self._index = PoolIndex(self.fleet, settings, self._channel, self._discovery)
            await self._discovery.start()
            await self._index.start()
        await self._runner.setup()
        self._site = web.TCPSite(self._runner, settings.host, settings.port)
        try:
            await self._site.start()
        except OSError as exc:
            field = "port" if exc.errno in {errno.EADDRINUSE, errno.EACCES} else "host"
            raise InvalidArgumentError(
                field, f"cannot listen on {settings.host}:{settings.port}: {exc.strerror or exc}"
            ) from exc
        port: int = self._runner.addresses[0][1]
        return port

    async def drain(self) -> None:
        """Take nothing new, let what runs go on within ``drain_timeout``, then end it."""
        self._ending = True
        if self._site is not None:
            await self._site.stop()
        for limit_s in (self._settings.drain_timeout / 1000, BROKEN_OFF_S):
            try:
                async with asyncio.timeout(limit_s):
                    await self._idle.wait()
                return
            except TimeoutError:
                log.warning("%d requests did not end in time", self._running)
                self.fleet.lose_all("the proxy is shutting down")

    async def close(self) -> None:
        """End everything."""
        await self._runner.cleanup()
        if self._index is not None and self._discovery is not None and self._channel is not None:
            await self._discovery.close()
            await self._index.close()
            await self._channel.close(None)
        await self.fleet.close()

    # ---- who may ask ---------------------------------------------------------------------------------

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            self._admit(request)
            return await handler(request)
        except RefusedRequestError as exc:
            return error_response(exc.status, str(exc))
        except InvalidArgumentError as exc:
            return error_response(400, str(exc))
        except web.HTTPException as exc:
            return error_response(exc.status, exc.reason)

    def _admit(self, request: web.Request) -> None:
        path = request.path
        if self._settings.api_key is not None:
            if not path.startswith(("/health", "/metrics")):
                given = request.headers.get("Authorization", "").removeprefix("Bearer ")
                if not hmac.compare_digest(given.encode(errors="replace"), self._settings.api_key.encode()):
                    raise RefusedRequestError(401, "the api key is missing or wrong")
        elif path.startswith(("/instances", "/reset")) and not self._settings.insecure and not _is_local(request):
            raise RefusedRequestError(403, "other hosts may do this with --api_key, or with --insecure")

    # ---- completions ---------------------------------------------------------------------------------

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        status = str(CLIENT_LEFT)
        self._running += 1
        self._idle.clear()
        try:
            response, status = await self._answered(request)
            return response
        except RefusedRequestError as exc:
            status = str(exc.status)
            return error_response(exc.status, str(exc))
        except InvalidArgumentError as exc:
            status = "400"
            return error_response(400, str(exc))
        except RecursionError:
            status = "400"
            return error_response(400, "the request is nested too deeply")
        except web.HTTPException as exc:
            status = str(exc.status)
            raise
        except AttemptError as exc:
            status = str(exc.status)
            return error_response(exc.status, f"no instance has answered; the last one: {exc}")
        except ClientGoneError as exc:
            log.debug("%s", exc)
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=CLIENT_LEFT)
        finally:
            self.fleet.metrics.requests.labels(request.path, status).inc()
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def _answered(self, request: web.Request) -> tuple[web.StreamResponse, str]:
        if self._ending:
            raise RefusedRequestError(503, "the proxy is shutting down")
        end = self._end()
        async with self._bodies.read(request, end) as raw:
            asked = prompts.read(request.path, raw)
            known: Mapping[str, Held] = {}
            if self._index is not None and (found := await self._index.find(request.path, asked)) is not None:
                known = found.held
                asked = dataclasses.replace(asked, prompt=dataclasses.replace(asked.prompt, tokens=found.tokens))
            return await Exchange(self.fleet, self._settings, request, asked, raw, known, end).run()

    def _end(self) -> float:
        """Return the loop's time at which a request that has come now must be over."""
        return asyncio.get_running_loop().time() + self._settings.request_timeout / 1000

    # ---- other questions -----------------------------------------------------------------------------

    async def _models(self, request: web.Request) -> web.StreamResponse:
        """Ask one instance after the other."""
        headers = request_headers(request, self._settings.api_key)
        for one in self._everybody():
            if not one.up:
                continue
            try:
                async with asyncio.timeout(ASK_S):
                    async with self.fleet.session.get(f"{one.name}/v1/models", headers=headers) as answer:
                        body = await read_all(answer.content, self._settings.body_size_max)
                        if answer.status < 500:
                            return web.Response(
                                status=answer.status, body=body, headers=answer_headers(answer.headers)
                            )
            except (aiohttp.ClientError, OSError, ValueError) as exc:
                log.warning("%s does not tell its models: %s", one.name, exc)
        raise RefusedRequestError(503, "no instance is up")

    async def _health(self, _: web.Request) -> web.StreamResponse:
        """200 while requests can be served."""
        able = any(one.serves for role in (Role.DECODE, Role.BOTH) for one in self.fleet.router.of(role))
        if self._ending or not able:
            raise RefusedRequestError(503, "shutting down" if self._ending else "no instance is up")
        return web.Response()

    async def _healthcheck(self, _: web.Request) -> web.StreamResponse:
        count = {role: sum(one.up for one in self.fleet.router.of(role)) for role in Role}
        return web.json_response({
            "status": "ok" if count[Role.DECODE] + count[Role.BOTH] and not self._ending else "unavailable",
            "prefill_instances": count[Role.PREFILL],
            "decode_instances": count[Role.DECODE],
            "instances": count[Role.BOTH],
            "request_num": self._running,
        })

    async def _metrics(self, _: web.Request) -> web.StreamResponse:
        return web.Response(body=self.fleet.metrics.page(), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _reset(self, request: web.Request) -> web.StreamResponse:
        """Empty the prefix caches of all instances."""
        everybody = self._everybody()

        async def reset(one: Instance) -> str:
            headers = request_headers(request, self._settings.api_key)
            try:
                async with asyncio.timeout(ASK_S):
                    async with self.fleet.session.post(f"{one.name}/reset_prefix_cache", headers=headers) as answer:
                        await answer.read()
            except (aiohttp.ClientError, OSError) as exc:
                return str(exc) or type(exc).__name__
            return "" if answer.status == 200 else f"status {answer.status}"

        problems = await asyncio.gather(*map(reset, everybody))
        failed = {one.name: problem for one, problem in zip(everybody, problems, strict=True) if problem}
        for one in self.fleet.router.instances.values():
            if one.name not in failed:
                one.memory.clear()
        status = 502 if failed else 200
        return web.json_response({"reset": len(problems) - len(failed), "failed": failed}, status=status)

    def _everybody(self) -> list[Instance]:
        """Return the instances, each once: one may have two roles."""
        return list({one.name: one for role in Role for one in self.fleet.router.of(role)}.values())

    # ---- instances -----------------------------------------------------------------------------------

    async def _instances(self, _: web.Request) -> web.StreamResponse:
        return web.json_response({
            role: [
                {"instance": one.name, "up": one.up, "draining": one.draining, "requests": one.requests,
                 "backlog_tokens": round(one.backlog), "kv_tokens": one.kv_tokens, "kv_usage": one.kv_usage,
                 "model": one.model, "transfers": one.transfers, "layerwise": one.layerwise,
                 "discovered": self._discovery is not None and self._discovery.found(one)}
                for one in self.fleet.router.of(role)
            ]
            for role in Role
        })  # fmt: skip

    async def _change(self, request: web.Request) -> web.StreamResponse:
        """Add, remove or drain: {"type": "prefill" | "decode" | "both", "instances": "HOST:PORT" or a list}."""
        change = request.match_info["change"]
        async with self._bodies.read(request, self._end()) as raw:
            role, urls = _read_change(raw)
        fleet = self.fleet
        divided = bool(fleet.router.of(Role.PREFILL) or fleet.router.of(Role.DECODE))
        if change == "add" and (divided if role is Role.BOTH else bool(fleet.router.of(Role.BOTH))):
            raise InvalidArgumentError("type", "instances that do both, and those that prefill or decode, do not mix")
        known = {one.name: one for one in fleet.router.of(role)}
        if change != "add" and (unknown := [url for url in urls if url not in known]):
            raise InvalidArgumentError("instances", f"not among those of type {role}: {', '.join(unknown)}")
        for url in urls:
            if change == "add":
                fleet.add(role, url)
            elif change == "remove":
                fleet.remove(known[url])
            else:
                fleet.drain(known[url])
        log.info("instances of type %s: %s %s", role, change, ", ".join(urls))
        current = {kind: [one.name.partition("://")[2] for one in fleet.router.of(kind)] for kind in Role}
        return web.json_response({
            "message": f"{change}: {', '.join(urls)}",
            "current_prefill_instances": current[Role.PREFILL],
            "current_decode_instances": current[Role.DECODE],
            "current_instances": current[Role.BOTH],
        })


def _read_change(raw: bytes) -> tuple[Role, list[str]]:
    """Return role and URLs in a request to change instances. Raises InvalidArgumentError."""
    try:
        body: Any = json.loads(raw)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise InvalidArgumentError("body", "must be a JSON object")
    if body.get("type") not in list(Role):  # which what cannot be hashed may be asked of
        raise InvalidArgumentError("type", f"{body.get('type')!r} is not allowed; allowed: {', '.join(Role)}")
    named = body.get("instances")
    named = [named] if isinstance(named, str) else named
    if not isinstance(named, list) or not named:
        raise InvalidArgumentError("instances", 'must be "HOST:PORT", or a list of them')
    return Role(body["type"]), [URL.parse(one, "instances") for one in named]


def _is_local(request: web.Request) -> bool:
    try:
        return ipaddress.ip_address((request.remote or "").partition("%")[0]).is_loopback
    except ValueError:
        return False


def run(settings: ProxySettings, notes: list[str]) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code."""

    async def main(stop: asyncio.Event) -> int:
        gc.set_threshold(*GC_THRESHOLDS)
        proxy = Proxy(settings)
        try:
            port = await proxy.start()
            count = {role: len(proxy.fleet.router.of(role)) for role in Role}
            told = ", ".join(f"{number} {role}" for role, number in count.items() if number)
            log.info("listening on %s:%d; instances: %s", settings.host, port, told or "none yet")
            await stop.wait()
            await proxy.drain()
        finally:
            await proxy.close()
        return 0

    return run_daemon(main, settings.log_level, notes)


