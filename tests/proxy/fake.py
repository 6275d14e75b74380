"""Engines' HTTP servers that compute nothing and do what they are told, and a proxy in front of them, on one loop."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from kvpool import Client, Namespace
from kvpool.client_transfers import TransferPart, Transfers, TransferState
from kvpool.config import ProxySettings
from kvpool.proxy.prompts import Asked, read
from kvpool.proxy.server import Proxy

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
LIMIT_S = 30.0


@dataclass
class FakeInstance:
    """One engine: what it was asked, and what it does with the next requests."""

    name: str
    tokens: int = 4
    token_s: float = 0.0
    status: int = 200
    """Of completions; another one than 200 comes with an error."""
    die_after: int | None = None
    """Cuts the connection after so many tokens."""
    end_after: int | None = None
    """Ends the stream in order after so many tokens, without [DONE]."""
    abort_at: int | None = None
    """Gives requests up at this token, as an engine does that is shut down."""
    error_at: int | None = None
    """Says ``error`` in place of this token of a stream, and ends it as always."""
    error: Any = None
    hang_at: int | None = None
    """Waits forever before this token."""
    gate: asyncio.Event | None = None
    """Waits for it before the first token."""
    health: int = 200
    empty: bool = False
    metrics: str = ""
    metrics_gate: asyncio.Event | None = None
    transfer: str = ""
    """What it names a prompt's KV by where it is not told."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    running: int = 0
    checks: int = 0
    aborted: int = 0
    resets: int = 0
    port: int = 0
    _runner: web.AppRunner | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 26)
        app.add_routes([
            web.post(COMPLETIONS, self._complete), web.post(CHAT, self._complete), web.get("/health", self._health),
            web.get("/v1/models", self._models), web.get("/metrics", self._metrics),
            web.post("/reset_prefix_cache", self._reset), *self.routes(),
        ])  # fmt: skip
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """End it as a dying process does: no more connections, and those there are cut."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            for site in list(runner.sites):
                await site.stop()
            assert runner.server is not None
            for protocol in list(runner.server.connections):
                if protocol.transport is not None:
                    protocol.transport.abort()
            await runner.cleanup()

    def answer(self, number: int, request: dict[str, Any]) -> dict[str, Any]:
        return {"id": "x", "choices": [{"text": f"{self.name}-{number} "}], "model": request.get("model")}

    def routes(self) -> list[web.RouteDef]:
        """Return more of them."""
        return []

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.running += 1
        try:
            return await self._answer(request, body)
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        except ConnectionError:
            self.aborted += 1
            return web.Response(status=499)
        finally:
            self.running -= 1

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if self.status != 200:
            return web.json_response({"error": {"message": f"{self.name} says {self.status}"}}, status=self.status)
        if not body.get("stream"):
            await self._pause(0)
            if self.die_after is not None:
                return await self._cut(request, web.StreamResponse(headers={"Content-Length": "1000"}), b"{")
            answer = self.answer(0, body)
            if self.abort_at == 0:
                answer["choices"] = [{"text": "", "finish_reason": "abort"}]
            asked = body.get("kv_transfer_params") or {}
            if asked.get("do_remote_decode"):
                params = {"do_remote_prefill": True, "remote_engine_id": self.name}
                if transfer := asked.get("transfer_id", self.transfer):
                    params["transfer_id"] = transfer
                answer["kv_transfer_params"] = params
            data = b"" if self.empty else json.dumps(answer).encode()
            return web.Response(body=data, content_type="application/json")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for number in range(self.tokens):
            await self._pause(number)
            if self.empty or number == self.end_after:
                return response
            if number == self.abort_at:
                if number:  # of a stream without tokens there is no such event
                    last = {"id": "x", "choices": [{"text": "", "finish_reason": "abort"}]}
                    await response.write(b"data: " + json.dumps(last, separators=(",", ":")).encode() + b"\n\n")
                break
            if number == self.error_at:
                await response.write(b"data: " + json.dumps({"error": self.error}).encode() + b"\n\n")
                break
            if number == self.die_after:
                return await self._cut(request, response, b"")
            await response.write(b"data: " + json.dumps(self.answer(number, body)).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _pause(self, number: int) -> None:
        if self.gate is not None:
            await self.gate.wait()
        if number == self.hang_at:
            await asyncio.Event().wait()
        await asyncio.sleep(self.token_s)

    async def _cut(self, request: web.Request, response: web.StreamResponse, last: bytes) -> web.StreamResponse:
        if not response.prepared:
            await response.prepare(request)
        if last:
            await response.write(last)
        assert request.transport is not None
        request.transport.close()
        return response

    async def _health(self, _: web.Request) -> web.StreamResponse:
        self.checks += 1
        return web.Response(status=self.health)

    async def _metrics(self, _: web.Request) -> web.StreamResponse:
        if self.metrics_gate is not None:
            await self.metrics_gate.wait()
        return web.Response(text=self.metrics)

    async def _models(self, request: web.Request) -> web.StreamResponse:
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        return web.json_response({"data": [{"id": self.name}]}, status=self.status)

    async def _reset(self, _: web.Request) -> web.StreamResponse:
        self.resets += 1
        return web.Response()


@dataclass
class Answer:
    """What a client got: ``whole`` is whether HTTP says that this was all."""

    status: int
    body: bytes
    headers: dict[str, str]
    whole: bool = True

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def texts(self) -> list[str]:
        """The texts of a stream's or a plain answer's choices."""
        lines = [line[6:] for line in self.body.split(b"\n\n") if line.startswith(b"data: ")] or [self.body]
        events = [json.loads(line) for line in lines if line != b"[DONE]"]
        return [choice["text"] for event in events for choice in event.get("choices", ())]


@dataclass
class Stage:
    """A proxy, its instances, and a client."""

    proxy: Proxy
    url: str
    client: aiohttp.ClientSession
    fakes: list[FakeInstance]

    async def ask(self, body: Any = None, path: str = COMPLETIONS, **headers: str) -> Answer:
        """Post a request; of a broken answer, return what came of it."""
        body = {"prompt": "p"} if body is None else body
        async with self.client.post(self.url + path, json=body, headers=headers) as response:
            got = b""
            whole = True
            try:
                async for part in response.content.iter_any():
                    got += part
            except aiohttp.ClientError:
                whole = False
            return Answer(response.status, got, dict(response.headers), whole)

    async def get(self, path: str, **headers: str) -> Answer:
        async with self.client.get(self.url + path, headers=headers) as response:
            return Answer(response.status, await response.read(), dict(response.headers))

    def proxy_read(self, body: Any, path: str = COMPLETIONS) -> Asked:
        """Return a request as the proxy reads it."""
        return read(path, json.dumps(body).encode())

    def counted(self, name: str, **labels: str) -> float:
        return self.proxy.fleet.metrics.registry.get_sample_value(name, labels) or 0.0


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something to become true."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # conditions of other tasks' plain data
            await asyncio.sleep(0.002)


@asynccontextmanager
async def staged(
    *fakes: FakeInstance, prefill: int = 0, started: bool = True, named: bool = True, **settings: Any
) -> AsyncIterator[Stage]:
    """Run instances and a proxy; the first ``prefill`` instances prefill for the others, 0: each does both.

    ``named``: whether the proxy is told of them.
    """
    for fake in fakes:
        await fake.start()
    sides: dict[str, Any] = {"instances": [fake.url for fake in fakes]} if fakes else {}
    if prefill:
        sides = {
            "prefiller_ports": [fake.port for fake in fakes[:prefill]],
            "decoder_ports": [fake.port for fake in fakes[prefill:]],
        }
    sides = sides if named else {}
    defaults = {"host": "127.0.0.1", "port": 0, "health_interval": 50, "drain_timeout": 1000}
    if not started:
        for fake in fakes:
            await fake.stop()
    proxy = Proxy(ProxySettings(**(defaults | sides | settings)))
    port = await proxy.start()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
        try:
            yield Stage(proxy, f"http://127.0.0.1:{port}", client, list(fakes))
        finally:
            await proxy.close()
            for fake in fakes:
                await fake.stop()


def play(story: Coroutine[Any, Any, None]) -> None:
    """Run a test's story, with an end."""

    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S):
            await story

    asyncio.run(limited())


SPACE = Namespace(model="fake")
CLAIM_S = 2.0


@dataclass
class PoolInstance(FakeInstance):
    """An engine that announces itself to a master, and moves transfers there, without any KV."""

    master: str = ""
    role: str = "kv_both"
    model: str = "m"
    client: Client | None = None

    async def start(self) -> None:
        await super().start()
        client = self.client = await asyncio.to_thread(Client, self.master, node="/nowhere", name=self.name)
        client.announce_engine(
            engine=self.name, address=self.address, role=self.role, model=self.model, tensor_parallel=1,
            pipeline_parallel=1, transfers=True, layerwise=True,
        )  # fmt: skip

    async def stop(self) -> None:
        if self.client is not None:
            await asyncio.to_thread(self.client.close)
        await super().stop()

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        asked = body.get("kv_transfer_params") or {}
        transfer = int(asked.get("transfer_id") or "0", 16)
        if not transfer or self.client is None:
            return await super()._answer(request, body)
        transfers = self.client.transfers
        if asked.get("do_remote_prefill"):
            try:
                await self._fetch(transfers, transfer)
                return await super()._answer(request, body)
            finally:
                await asyncio.to_thread(transfers.end, [transfer])
        part = TransferPart(SPACE, transfer.to_bytes(16))
        await asyncio.to_thread(transfers.open, transfer, [part], [""], self.name)
        try:
            answer = await super()._answer(request, body)
        except BaseException:
            await asyncio.to_thread(transfers.end, [transfer])
            raise
        await asyncio.to_thread(transfers.seal, transfer, 2000)
        return answer

    async def _fetch(self, transfers: Transfers, transfer: int) -> None:
        """Wait for the prefill's end, as long as it may still come."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CLAIM_S):
                while True:
                    claimed = await asyncio.to_thread(transfers.claim, transfer, self.name)
                    if claimed.state not in {TransferState.OPEN, TransferState.UNKNOWN}:
                        return
                    await asyncio.sleep(0.01)


async def _serve_alone(name: str, *in_pool: str) -> None:
    """Serve until the input ends: an engine that can be killed. ``in_pool``: a master, and a role."""
    about: dict[str, Any] = {"tokens": 20, "token_s": 0.005}
    fake = PoolInstance(name, **about, master=in_pool[0], role=in_pool[1]) if in_pool else FakeInstance(name, **about)
    await fake.start()
    sys.stdout.write(f"{fake.port}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await fake.stop()


if __name__ == "__main__":
    asyncio.run(_serve_alone(*sys.argv[1:]))
