"""What the proxy lacks itself, or instances say besides: no instance is given up for it."""

from __future__ import annotations

import asyncio
import errno
import json

import aiohttp
import pytest

from kvpool.errors import InvalidArgumentError
from kvpool.proxy import prompts
from kvpool.proxy.fleet import LOST_AFTER
from tests.proxy.fake import COMPLETIONS, FakeInstance, PoolInstance, play, staged, until
from tests.proxy.test_discovery import pool, up  # noqa: F401 -- a fixture
from tests.proxy.test_serving import STREAM


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
        async with staged(fake, health_timeout=30, health_interval=10) as stage:
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
        async with staged(fake, bodies_size_max=1 << 20) as stage:
            large = {"prompt": "p" * 700_000}
            first = asyncio.create_task(stage.ask(large))
            await until(lambda: fake.running == 1)
            refused = await stage.ask(large)
            assert (refused.status, refused.headers["Retry-After"]) == (429, "1")

            async def parts():
                yield json.dumps({"prompt": "p"}).encode()

            async with stage.client.post(stage.url + COMPLETIONS, data=parts()) as unsized:
                assert unsized.status == 429
            small = asyncio.create_task(stage.ask({"prompt": "p"}))
            await until(lambda: fake.running == 2)
            fake.gate.set()
            assert [(await one).status for one in (first, small)] == [200, 200]
            await until(lambda: not stage.proxy._bodies.held)
            async with stage.client.post(stage.url + COMPLETIONS, data=parts()) as unsized:
                assert unsized.status == 200

    play(story())


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
