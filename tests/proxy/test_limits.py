"""What the proxy lacks itself, or instances say besides: no instance is given up for it."""

from __future__ import annotations

import asyncio
import errno
import json
import tracemalloc
from pathlib import Path

import aiohttp
import pytest
import yaml

from kvpool.config import ProxySettings
from kvpool.errors import InvalidArgumentError
from kvpool.proxy import exchange, prompts
from kvpool.proxy.bodies import VALUE_COST, WIDE_COST, Bodies, _Arrived
from kvpool.proxy.errors import RefusedRequestError
from kvpool.proxy.fleet import LOST_AFTER
from tests.proxy.fake import COMPLETIONS, FakeInstance, PoolInstance, play, staged, until
from tests.proxy.test_discovery import pool, up  # noqa: F401 -- a fixture
from tests.proxy.test_serving import STREAM

ROOT = Path(__file__).parents[2]


def test_an_answer_that_is_given_up_on_the_way_is_broken():
    """An engine that is shut down says so with status 200: its client is not to take that for an end."""

    async def story():
        async with staged(FakeInstance("a", abort_at=2)) as stage:
            answer = await stage.ask(STREAM)
            assert (answer.status, answer.whole) == (200, False)
            assert b"gave the request up" in answer.body
            assert b"abort" not in answer.body

    play(story())


def test_what_a_client_says_is_no_sign(monkeypatch):
    """In a text the same words have other quotes."""

    async def story():
        fake = FakeInstance("a")
        text = '"finish_reason":"abort" "finish_reason": "abort"'
        monkeypatch.setattr(fake, "answer", lambda number, request: {"choices": [{"text": text}]})
        async with staged(fake) as stage:
            for stream in (False, True):
                answer = await stage.ask({**STREAM, "stream": stream})
                assert (answer.status, answer.whole) == (200, True)
                assert set(answer.texts) == {text}

    play(story())


def test_an_instance_without_metrics_is_well():
    """Only its health decides."""

    async def story():
        fake = FakeInstance("a", metrics_gate=asyncio.Event(), gate=asyncio.Event())
        async with staged(fake, health_timeout=300, health_interval=10) as stage:
            asked = asyncio.create_task(stage.ask(STREAM))
            await until(lambda: fake.running == 1)
            before = fake.checks
            await until(lambda: fake.checks > before + LOST_AFTER + 1)
            fake.gate.set()
            assert (await asked).whole
            assert all(one.up for one in stage.proxy.fleet.router.instances.values())

    play(story())


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EADDRNOTAVAIL])
def test_a_proxy_without_sockets_blames_nobody(number, monkeypatch):
    """It says so; what runs goes on, and the next request works."""

    async def story():
        fake = FakeInstance("a", gate=asyncio.Event())
        async with staged(fake, health_interval=10) as stage:
            running = asyncio.create_task(stage.ask(STREAM))
            await until(lambda: fake.running == 1)
            tried = 0

            async def refuse(*args, **kwargs):
                nonlocal tried
                tried += 1
                raise aiohttp.ClientConnectorError(None, OSError(number, "no more"))

            with monkeypatch.context() as patch:
                patch.setattr(aiohttp.TCPConnector, "connect", refuse)
                session = stage.proxy.fleet.session
                await until(lambda: tried > LOST_AFTER + 1)
                with pytest.raises(aiohttp.ClientConnectorError):
                    await session.get(fake.url)
            (one,) = stage.proxy.fleet.router.instances.values()
            assert one.up
            fake.gate.set()
            assert (await running).whole
            assert (await stage.ask()).status == 200

    play(story())


def test_a_request_that_cannot_be_sent_for_that_is_refused(monkeypatch):
    """At once, and the instance stays up."""

    async def story():
        fake = FakeInstance("a")
        async with staged(fake, health_interval=60_000) as stage:
            assert (await stage.ask()).status == 200

            def post(*args, **kwargs):
                raise aiohttp.ClientConnectorError(None, OSError(errno.EMFILE, "too many open files"))

            with monkeypatch.context() as patch:
                patch.setattr(stage.proxy.fleet.session, "post", post)
                answer = await stage.ask()
                assert answer.status == 503
                assert b"too many open files" in answer.body.lower()
            assert (await stage.ask()).status == 200

    play(story())


def test_bodies_have_so_much_room_together():
    """One more is refused while others are served, whatever they say of their length; then there is room again."""

    async def story():
        fake = FakeInstance("a", gate=asyncio.Event())
        async with staged(fake, bodies_size_max=4 << 20) as stage:
            large = {"prompt": "p" * 700_000}
            first = asyncio.create_task(stage.ask(large))
            await until(lambda: fake.running == 1)
            refused = await stage.ask(large)
            assert (refused.status, refused.headers["Retry-After"]) == (429, "1")

            async def parts(body):
                yield json.dumps(body).encode()

            async with stage.client.post(stage.url + COMPLETIONS, data=parts(large)) as unsized:
                assert unsized.status == 429
            small = asyncio.create_task(stage.ask({"prompt": "p"}))
            await until(lambda: fake.running == 2)
            fake.gate.set()
            assert [(await one).status for one in (first, small)] == [200, 200]
            await until(lambda: not stage.proxy._bodies.held)
            async with stage.client.post(stage.url + COMPLETIONS, data=parts({"prompt": "p"})) as unsized:
                assert unsized.status == 200

    play(story())


HEAD = b"POST %s HTTP/1.1\r\nHost: h\r\n" % COMPLETIONS.encode()


@pytest.mark.parametrize("head", [b"Content-Length: 500000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"], ids=str)
def test_who_has_sent_nothing_takes_no_room(head):
    """However much is to come: others are served."""

    async def story():
        async with staged(FakeInstance("a"), body_size_max=500_000, bodies_size_max=500_000) as stage:
            port = int(stage.url.rpartition(":")[2])
            connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]
            for _, writer in connections:
                writer.write(HEAD + head)
            await until(lambda: stage.proxy._running == len(connections))
            assert (await stage.ask()).status == 200
            for _, writer in connections:
                writer.close()

    play(story())


def test_one_that_says_that_it_is_too_large_is_not_waited_for():
    """Its header is enough."""

    async def story():
        async with staged(FakeInstance("a"), body_size_max=1000) as stage:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(stage.url.rpartition(":")[2]))
            writer.write(HEAD + b"Content-Length: 1001\r\n\r\n")
            assert b" 413 " in await reader.readline()
            writer.close()

    play(story())


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [100_000 + number for number in range(20_000)]},
        {"prompt": "x" * 200_000},
        {"prompt": "x" * 200_000 + "\N{GRINNING FACE}"},
        {"prompt": "\u4e2d" * 100_000},
        {"prompt": "p", "stop": [f"s{number}" for number in range(20_000)]},
    ],
    ids=["tokens", "text", "one wide character", "wide characters", "strings"],
)
@pytest.mark.parametrize("ascii_only", [False, True])
def test_a_body_counts_for_what_it_takes(body, ascii_only):
    """As it came, read, and written for two instances: never less than that, and not far more."""
    raw = json.dumps(body, ensure_ascii=ascii_only, separators=(",", ":")).encode()
    tracemalloc.start()
    try:
        held = [bytearray(raw), prompts.read(COMPLETIONS, raw)]
        for write in (prompts.for_prefill, lambda body: prompts.for_decode(body, None)):
            held.append(json.dumps(write(held[1].body)).encode())
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    half = len(raw) // 2
    arrived = _Arrived()
    arrived.count(raw[:half])
    assert taken <= 1.1 * arrived.count(raw[half:]) <= 4 * taken


class Slowly:
    """A body whose parts take so long each, by the loop's clock, which no machine can make late."""

    content_length = None

    def __init__(self, parts, part_s):
        self._parts, self._part_s, self._passed = parts, part_s, 0.0
        loop = asyncio.get_running_loop()
        start = loop.time()
        loop.time = lambda: start + self._passed

    @property
    def content(self):
        return self

    async def readany(self):
        self._passed += self._part_s
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # a timer that is due has its turn
        self._parts -= 1
        return b"x" if self._parts >= 0 else b""


@pytest.mark.parametrize(
    ("part_s", "end_s", "status"), [(0.9, 100.0, 200), (1.1, 100.0, 408), (0.9, 5.0, 408)], ids=str
)
def test_a_body_may_be_slow_and_not_stand_still(part_s, end_s, status):
    """Each part begins the time anew; a request's own end stays."""

    async def read():
        bodies = Bodies(1 << 20, 1 << 20, idle_s=1.0)
        end = asyncio.get_running_loop().time() + end_s
        try:
            async with bodies.read(Slowly(10, part_s), end) as raw:
                assert raw == b"x" * 10
                assert bodies.held > 0
        finally:
            assert not bodies.held

    try:
        asyncio.run(read())
    except RefusedRequestError as exc:
        assert exc.status == status
    else:
        assert status == 200


def test_a_client_may_take_an_answer_slowly(monkeypatch):
    """Not only a stream: whatever it takes begins the time anew."""
    write = exchange._write
    waits_s = 3.0

    async def story():
        loop = asyncio.get_running_loop()
        passed, clock = 0.0, loop.time
        monkeypatch.setattr(loop, "time", lambda: clock() + passed)

        async def slowly(response, data, *, last=False):
            nonlocal passed
            passed += waits_s
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # a timer that is due has its turn
            await write(response, data, last=last)

        monkeypatch.setattr(exchange, "_write", slowly)
        fake = FakeInstance("a")
        monkeypatch.setattr(fake, "answer", lambda number, request: {"text": "x" * 4 * exchange.WRITE_BYTES})
        async with staged(fake, idle_timeout=4000, health_interval=60_000) as stage:
            answer = await stage.ask()
            assert answer.whole
            assert len(answer.json["text"]) == 4 * exchange.WRITE_BYTES
            assert passed >= 5 * waits_s

    play(story())


def test_the_example_for_kubernetes_has_memory_for_its_requests():
    """Those that it lets in together, and the largest alone."""
    files = yaml.safe_load_all((ROOT / "deploy/kubernetes/examples/pd.yaml").read_text(encoding="utf-8"))
    (proxy,) = [one for one in files if one["kind"] == "Deployment" and one["metadata"]["name"] == "pd-proxy"]
    (container,) = proxy["spec"]["template"]["spec"]["containers"]
    flags = dict(word.removeprefix("--").split("=") for word in container["command"][1:])
    settings = ProxySettings(**{name.replace("-", "_"): value for name, value in flags.items()})
    assert container["resources"]["limits"]["memory"] == "1Gi"
    alone = settings.body_size_max * WIDE_COST + prompts.PARTS_MAX * VALUE_COST
    assert max(settings.bodies_size_max, alone) <= (1 << 30) // 2


def test_a_body_of_too_many_values_is_refused_unread(monkeypatch):
    """Each value takes much more memory than its bytes."""
    monkeypatch.setattr(prompts, "PARTS_MAX", 100)
    with pytest.raises(InvalidArgumentError, match="body: must have at most 100 values"):
        prompts.read(COMPLETIONS, json.dumps({"prompt": "p", "x": [[]] * 100}).encode())
    assert prompts.read(COMPLETIONS, json.dumps({"prompt": list(range(90))}).encode()).prompt.tokens == 90


def test_queues_of_models_are_as_long_as_one(pool):  # noqa: F811
    """Who waits for one model takes no place in the queue for another; nor is it asked about for each who waits."""

    async def story():
        fakes = [PoolInstance(name, master=pool.address, model=name, gate=asyncio.Event()) for name in ("one", "two")]
        async with staged(*fakes, named=False, master=pool.address, instance_requests_max=1, queue_max=2) as stage:
            await until(lambda: len(up(stage, "both")) == 2)
            await until(lambda: stage.proxy.fleet.router.models() == {"one", "two"})
            asked = [asyncio.create_task(stage.ask({"prompt": "p", "model": "one"})) for _ in range(3)]
            await until(lambda: stage.counted("kvpool_proxy_waiting") == 2)
            assert (await stage.ask({"prompt": "p", "model": "one"})).status == 429
            asked += [asyncio.create_task(stage.ask({"prompt": "p", "model": "two"})) for _ in range(3)]
            await until(lambda: stage.counted("kvpool_proxy_waiting") == 4)
            for fake in fakes:
                fake.gate.set()
            assert [answer.status for answer in await asyncio.gather(*asked)] == [200] * 6

    play(story())


def test_a_name_that_was_not_announced_is_tried_everywhere(pool):  # noqa: F811
    """As an adapter's, which one engine serves and another one has never heard of."""

    async def story():
        fakes = [PoolInstance(name, master=pool.address, model=name) for name in ("one", "two")]
        async with staged(*fakes, named=False, master=pool.address) as stage:
            await until(lambda: len(up(stage, "both")) == 2)
            await until(lambda: stage.proxy.fleet.router.models() == {"one", "two"})
            fakes[0].status = 404
            for _ in range(4):
                answer = await stage.ask({"prompt": "p", "model": "adapter"})
                assert (answer.status, answer.texts) == (200, ["two-0 "])
            assert all(one.up and not one.trouble for one in stage.proxy.fleet.router.instances.values())
            fakes[1].status = 404
            assert (await stage.ask({"prompt": "p", "model": "adapter"})).status == 404

    play(story())
