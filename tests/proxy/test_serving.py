"""The proxy in front of engines that each do everything: what clients get, whatever engines do."""

from __future__ import annotations

import asyncio
import gzip
import json
from functools import partial

import aiohttp
import pytest
from aiohttp import web

from kvpool.proxy import exchange
from kvpool.proxy.fleet import Asking
from kvpool.proxy.routing import Prompt, Role
from tests.proxy.fake import CHAT, COMPLETIONS, FakeInstance, play, staged, until

STREAM = {"prompt": "p", "stream": True, "max_tokens": 4}


def words(letter):
    """A prompt of several chunks."""
    return (letter + " ") * 1000


@pytest.fixture
def pair():
    return FakeInstance("a"), FakeInstance("b")


class TestPassingOn:
    @pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
    @pytest.mark.parametrize("stream", [False, True])
    def test_bodies_go_through_byte_for_byte(self, path, stream):
        """In both directions; only the connection's own headers differ."""

        async def story():
            fake = FakeInstance("a")
            async with staged(fake) as stage:
                body = {"model": "m", "prompt": "ä", "messages": [{"role": "user", "content": "ä"}], "stream": stream,
                        "x_unknown": {"deep": [1]}}  # fmt: skip
                through = await stage.ask(body, path, Authorization="Bearer theirs")
                async with stage.client.post(fake.url + path, json=body) as response:
                    direct = await response.read()
                    assert response.headers["Content-Type"] == through.headers["Content-Type"]
                assert (through.status, through.body, through.whole) == (200, direct, True)
                assert fake.requests == [body, body]
                assert fake.headers[0]["authorization"] == "Bearer theirs"
                assert fake.headers[0]["x-request-id"]
                assert stage.counted("kvpool_proxy_requests_total", route=path, status="200") == 1

        play(story())

    @pytest.mark.parametrize("stream", [False, True])
    def test_answers_headers_come_too(self, stream, monkeypatch):
        """Each as often as it was said, but for those that are the connection's own."""

        async def story():
            fake = FakeInstance("a")
            prepare = web.StreamResponse.prepare

            async def with_headers(response, request):
                if request.url.port == fake.port and request.path == COMPLETIONS:
                    response.headers["Connection"] = "x-hop, keep-alive"
                    for name, value in (("X-A", "1"), ("X-A", "2"), ("X-Hop", "3")):
                        response.headers.add(name, value)
                return await prepare(response, request)

            monkeypatch.setattr(web.StreamResponse, "prepare", with_headers)
            async with staged(fake) as stage:
                ask = partial(stage.client.post, json=STREAM | {"stream": stream})
                async with ask(fake.url + COMPLETIONS) as direct, ask(stage.url + COMPLETIONS) as through:
                    assert direct.headers["X-Hop"] == "3"
                    assert through.headers.getall("X-A") == direct.headers.getall("X-A") == ["1", "2"]
                    assert "X-Hop" not in through.headers

        play(story())

    def test_tokens_come_as_they_are_made(self):
        """The first one is there while the second is still computed."""

        async def story():
            fake = FakeInstance("a", hang_at=1)
            async with staged(fake) as stage, stage.client.post(stage.url + COMPLETIONS, json=STREAM) as response:
                assert b"a-0" in await response.content.readany()

        play(story())

    @pytest.mark.parametrize("status", [400, 404, 422])
    def test_a_clients_error_is_the_clients(self, pair, status):
        """It goes back as it is, and nobody else is bothered."""

        async def story():
            for fake in pair:
                fake.status = status
            async with staged(*pair) as stage:
                answer = await stage.ask(STREAM)
                assert answer.status == status
                assert f"says {status}" in answer.json["error"]["message"]
                assert len(pair[0].requests) + len(pair[1].requests) == 1

        play(story())

    @pytest.mark.parametrize(
        ("raw", "word"),
        [(b"{", "JSON"), (b"[1]", "object"), (b'{"prompt": [123456789012345678901]}', "prompt"), (b"{}", "prompt"),
         (b"[" * 100000, "JSON")],
    )  # fmt: skip
    def test_what_no_engine_could_take_is_refused(self, raw, word):
        """With the field's name, in OpenAI's form."""

        async def story():
            fake = FakeInstance("a")
            async with staged(fake) as stage:
                async with stage.client.post(stage.url + COMPLETIONS, data=raw) as response:
                    assert response.status == 400
                    assert word in (await response.json())["error"]["message"]
                assert not fake.requests

        play(story())

    def test_a_request_that_is_too_large(self):
        """Is refused with 413, before any engine sees it."""

        async def story():
            fake = FakeInstance("a")
            async with staged(fake, body_size_max=1000) as stage:
                assert (await stage.ask({"prompt": "x" * 2000})).status == 413
                assert not fake.requests

        play(story())

    def test_models_and_unknown_paths(self, pair):
        """Models come from an instance that is up; what there is not is a 404 in OpenAI's form."""

        async def story():
            async with staged(*pair) as stage:
                await pair[0].stop()
                assert (await stage.get("/v1/models", Authorization="Bearer k")).json == {"data": [{"id": "b"}]}
                assert pair[1].headers[0]["authorization"] == "Bearer k"
                missing = await stage.get("/v1/nothing")
                assert (missing.status, missing.json["error"]["code"]) == (404, 404)

        play(story())


class TestChoice:
    def test_a_conversation_stays_where_it_began(self, pair):
        """Other prompts go to the other one."""

        async def story():
            async with staged(*pair) as stage:
                first = (await stage.ask({"prompt": words("x")})).texts
                second = (await stage.ask({"prompt": words("y")})).texts
                assert first != second
                for _ in range(3):
                    assert (await stage.ask({"prompt": words("x") + "and more"})).texts == first
                    assert (await stage.ask({"prompt": words("y") + "and more"})).texts == second

        play(story())

    def test_chats_too(self, pair):
        """Whose turns are written one after the other."""

        async def story():
            async with staged(*pair) as stage:
                talks = [[{"role": "user", "content": words(letter)}] for letter in "xy"]
                first = [(await stage.ask({"messages": talk}, CHAT)).texts for talk in talks]
                for talk in talks:
                    talk += [{"role": "assistant", "content": "well"}, {"role": "user", "content": "more"}]
                assert [(await stage.ask({"messages": talk}, CHAT)).texts for talk in talks] == first

        play(story())

    def test_round_robin(self, pair):
        """Where it is asked for."""

        async def story():
            async with staged(*pair, policy="round_robin") as stage:
                for _ in range(6):
                    await stage.ask({"prompt": words("x")})
                assert [len(fake.requests) for fake in pair] == [3, 3]

        play(story())

    def test_kv_usage_is_read_from_the_instances(self):
        """As vLLM tells it."""

        async def story():
            fake = FakeInstance("a")
            fake.metrics = (
                'vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25\n'
                'vllm:cache_config_info{block_size="32",engine="0",num_gpu_blocks="100"} 1.0\n'
            )
            async with staged(fake) as stage:
                one = stage.proxy.fleet.router.instances["both", fake.url]
                await until(lambda: one.kv_tokens == 3200 and one.kv_usage == 0.25)
                assert one.memory.chunks_max == 50

        play(story())


class TestFailover:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        "trouble",
        [{"status": 500}, {"status": 429}, {"die_after": 0}, {"empty": True}, {"abort_at": 0}, {"gone": True}],
        ids=str,
    )
    def test_another_instance_before_the_first_byte(self, pair, stream, trouble):
        """Whatever goes wrong, the client never learns of it."""

        async def story():
            bad, good = pair
            async with staged(*pair, health_interval=60_000) as stage:
                if trouble.get("gone"):
                    await bad.stop()
                else:
                    for name, value in trouble.items():
                        setattr(bad, name, value)
                for _ in range(2):  # one of the two begins at the bad one
                    answer = await stage.ask({**STREAM, "stream": stream})
                    assert (answer.status, answer.whole) == (200, True)
                    assert set("".join(answer.texts).split()) <= {f"b-{n}" for n in range(4)}
                    assert answer.texts
                assert len(good.requests) == 2

        play(story())

    def test_one_that_hangs_is_left_for_another(self, pair):
        """At the deadline for a first token; and the next request does not begin there."""

        async def story():
            pair[0].hang_at = 0
            async with staged(*pair, first_byte_timeout=1000) as stage:
                for _ in range(3):
                    assert (await stage.ask(STREAM)).status == 200
                assert pair[0].aborted == 1

        play(story())

    def test_without_a_stream_only_the_whole_request_has_a_deadline(self, pair):
        """504 when it is over; nobody else is asked then."""

        async def story():
            pair[0].hang_at = pair[1].hang_at = 0
            async with staged(*pair, first_byte_timeout=10, request_timeout=1000) as stage:
                assert (await stage.ask()).status == 504
                assert sorted(len(fake.requests) for fake in pair) == [0, 1]
                await until(lambda: not pair[0].running + pair[1].running)

        play(story())

    def test_when_all_fail_the_last_answer_counts(self, pair):
        """An engine's own words are better than ours."""

        async def story():
            for fake in pair:
                fake.status = 500
            async with staged(*pair) as stage:
                answer = await stage.ask(STREAM)
                assert answer.status == 500
                assert "says 500" in answer.json["error"]["message"]
                assert all(len(fake.requests) == 1 for fake in pair)

        play(story())

    def test_when_nobody_is_there(self, pair):
        """503 at once, and when to ask again; health says so too."""

        async def story():
            async with staged(*pair, started=False) as stage:
                router = stage.proxy.fleet.router
                await until(lambda: not any(one.up for one in router.instances.values()))
                answer = await stage.ask(STREAM)
                assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
                assert (await stage.get("/health")).status == 503
                assert (await stage.get("/healthcheck")).json["status"] == "unavailable"
                assert (await stage.get("/v1/models")).status == 503

        play(story())

    def test_an_instance_that_comes_back_serves_again(self):
        """After the next check."""

        async def story():
            fake = FakeInstance("a")
            async with staged(fake) as stage:
                one = stage.proxy.fleet.router.instances["both", fake.url]
                await fake.stop()
                await until(lambda: not one.up)
                await fake.start()
                await until(lambda: one.up)
                assert (await stage.ask(STREAM)).status == 200

        play(story())

    def test_an_unhealthy_instance_gets_nothing_new(self, pair):
        """Though it would answer."""

        async def story():
            pair[0].health = 500
            async with staged(*pair) as stage:
                one = stage.proxy.fleet.router.instances["both", pair[0].url]
                await until(lambda: not one.up)
                for _ in range(4):
                    assert (await stage.ask(STREAM)).texts[0] == "b-0 "

        play(story())

    def test_a_connection_that_had_gone_stale_is_no_failure(self):
        """With one instance alone, that very one is asked again."""

        async def story():
            fake = FakeInstance("a")
            async with staged(fake, health_interval=60_000) as stage:
                assert (await stage.ask(STREAM)).status == 200
                await fake.stop()
                await fake.start()
                assert (await stage.ask(STREAM)).status == 200

        play(story())


class TestAfterTheFirstByte:
    @pytest.mark.parametrize("trouble", [{"die_after": 2}, {"end_after": 2}, {"hang_at": 2}], ids=str)
    def test_a_broken_stream_says_so(self, pair, trouble):
        """With an event, and an end that no client takes for the end of the answer."""

        async def story():
            for fake in pair:
                for name, value in trouble.items():
                    setattr(fake, name, value)
            async with staged(*pair, idle_timeout=1000) as stage:
                answer = await stage.ask(STREAM)
                assert answer.status == 200
                assert not answer.whole
                events = [line for line in answer.body.split(b"\n\n") if line]
                assert len(events) == 3
                error = json.loads(events[2].removeprefix(b"data: "))["error"]
                assert error["code"] in {502, 504}
                assert b"[DONE]" not in answer.body
                assert len(pair[0].requests) + len(pair[1].requests) == 1
                assert stage.counted("kvpool_proxy_requests_total", route=COMPLETIONS, status="broken") == 1

        play(story())

    def test_a_request_has_an_end(self):
        """Even one that goes on and on."""

        async def story():
            fake = FakeInstance("a", tokens=1 << 30)
            async with staged(fake, request_timeout=300) as stage:
                answer = await stage.ask(STREAM)
                assert not answer.whole
                assert b"too long" in answer.body
                await until(lambda: fake.running == 0)

        play(story())

    def test_one_whose_health_stays_away_is_given_up(self, pair):
        """Before any deadline of the request itself."""

        async def story():
            for fake in pair:
                fake.hang_at = 1
            async with staged(*pair, health_interval=20) as stage:
                asked = asyncio.create_task(stage.ask(STREAM))
                await until(lambda: pair[0].running + pair[1].running == 1)
                for fake in pair:
                    fake.health = 500
                answer = await asked
                assert not answer.whole
                assert b"is down" in answer.body

        play(story())


class TestClients:
    @pytest.mark.parametrize("hang_at", [0, 2])
    @pytest.mark.parametrize("stream", [False, True])
    def test_one_that_hangs_up_ends_its_request(self, hang_at, stream):
        """At the engine too: nobody computes for nobody."""
        if hang_at and not stream:
            hang_at = 0

        async def story():
            fake = FakeInstance("a", hang_at=hang_at)
            async with staged(fake) as stage:
                asked = asyncio.create_task(stage.ask({**STREAM, "stream": stream}))
                await until(lambda: fake.running == 1)
                asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)
                await until(lambda: fake.aborted == 1)
                one = stage.proxy.fleet.router.instances["both", fake.url]
                await until(lambda: one.requests == 0)
                assert stage.counted("kvpool_proxy_requests_total", route=COMPLETIONS, status="499") == 1

        play(story())

    def test_one_that_takes_nothing_is_hung_up_on(self):
        """A full socket keeps no engine computing."""

        async def story():
            fake = FakeInstance("a", tokens=1 << 30)
            async with staged(fake, idle_timeout=200) as stage:
                _, writer = await asyncio.open_connection("127.0.0.1", int(stage.url.rpartition(":")[2]), limit=1)
                body = json.dumps(STREAM).encode()
                head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n\r\n"
                writer.write(head.encode() + body)
                await until(lambda: fake.running == 1)
                await until(lambda: fake.running == 0)
                writer.close()

        play(story())

    def test_one_that_compresses(self):
        """Instances get what it meant; a body that is not what it says is its own mistake."""

        async def story():
            fake = FakeInstance("a")
            async with staged(fake, body_size_max=1000) as stage:
                headers = {"Content-Encoding": "gzip", "Connection": "close"}
                ask = partial(stage.client.post, stage.url + COMPLETIONS, headers=headers)
                for body, status in (
                    (gzip.compress(b'{"prompt": "p"}'), 200), (b"{}", 400),
                    (gzip.compress(b'{"prompt": "%s"}' % bytes(10_000)), 413),
                ):  # fmt: skip
                    async with ask(data=body) as answer:
                        assert answer.status == status
                        await answer.json()
                assert fake.requests == [{"prompt": "p"}]

        play(story())

    def test_one_that_names_a_transfer(self):
        """It could name any host, and whatever engines store for each other."""

        async def story():
            fake = FakeInstance("a")
            async with staged(fake) as stage:
                assert (await stage.ask({"prompt": "p", "kv_transfer_params": {"remote_host": "evil"}})).status == 200
                further = {"vllm_xargs": {"kv_transfer_params": "evil", "mine": 1}}
                assert (await stage.ask({"prompt": "p"} | further)).status == 200
                assert fake.requests == [{"prompt": "p"}, {"prompt": "p", "vllm_xargs": {"mine": 1}}]

        play(story())

    def test_one_that_does_not_take_the_end(self, monkeypatch):
        """Is no failure of the instance, which has done all that it was asked to."""
        write = exchange._write

        async def stuck(response, data, *, last=False):
            if last:
                await asyncio.Event().wait()
            await write(response, data, last=last)

        async def story():
            monkeypatch.setattr(exchange, "_write", stuck)
            async with staged(FakeInstance("a"), idle_timeout=100) as stage:
                assert not (await stage.ask(STREAM)).whole
                await until(lambda: stage.counted("kvpool_proxy_requests_total", route=COMPLETIONS, status="499") == 1)
                assert not stage.counted("kvpool_proxy_attempts_total", role="both", outcome="broken")

        play(story())

    def test_one_that_never_finishes_its_request(self):
        """Is told so."""

        async def story():
            fake = FakeInstance("a")
            async with staged(fake, idle_timeout=100) as stage:
                reader, writer = await asyncio.open_connection("127.0.0.1", int(stage.url.rpartition(":")[2]))
                writer.write(b"POST %s HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n{" % COMPLETIONS.encode())
                assert b" 408 " in await reader.readline()
                writer.close()

        play(story())


class TestQueue:
    def test_who_waits_is_served_in_turn(self):
        """As soon as a place is free."""

        async def story():
            fake = FakeInstance("a", gate=asyncio.Event())
            async with staged(fake, instance_requests_max=1) as stage:
                asked = []
                for number in range(4):
                    asked.append(asyncio.create_task(stage.ask({"prompt": f"p{number}"})))
                    await until(lambda n=number: stage.counted("kvpool_proxy_waiting") == n)
                await until(lambda: fake.running == 1)
                fake.gate.set()
                assert [answer.status for answer in await asyncio.gather(*asked)] == [200] * 4
                assert [request["prompt"] for request in fake.requests] == ["p0", "p1", "p2", "p3"]

        play(story())

    def test_a_full_queue_refuses(self):
        """With 429 and when to ask again."""

        async def story():
            fake = FakeInstance("a", gate=asyncio.Event())
            async with staged(fake, instance_requests_max=1, queue_max=1) as stage:
                asked = [asyncio.create_task(stage.ask()) for _ in range(2)]
                await until(lambda: stage.counted("kvpool_proxy_waiting") == 1)
                refused = await stage.ask()
                assert (refused.status, refused.headers["Retry-After"]) == (429, "1")
                assert refused.json["error"]["type"] == "rate_limit_error"
                fake.gate.set()
                assert [answer.status for answer in await asyncio.gather(*asked)] == [200, 200]

        play(story())

    def test_waiting_has_an_end(self):
        """503 at the deadline, and the place in the queue is free again."""

        async def story():
            fake = FakeInstance("a", gate=asyncio.Event())
            async with staged(fake, instance_requests_max=1, queue_timeout=100) as stage:
                first = asyncio.create_task(stage.ask())
                await until(lambda: fake.running == 1)
                late = await stage.ask()
                assert (late.status, late.headers["Retry-After"]) == (503, "1")
                assert stage.counted("kvpool_proxy_waiting") == 0
                fake.gate.set()
                assert (await first).status == 200

        play(story())

    def test_a_client_that_leaves_the_queue(self):
        """Takes no place with it."""

        async def story():
            fake = FakeInstance("a", gate=asyncio.Event())
            async with staged(fake, instance_requests_max=1) as stage:
                first = asyncio.create_task(stage.ask())
                await until(lambda: fake.running == 1)
                gone, last = asyncio.create_task(stage.ask()), asyncio.create_task(stage.ask())
                await until(lambda: stage.counted("kvpool_proxy_waiting") == 2)
                gone.cancel()
                await until(lambda: stage.counted("kvpool_proxy_waiting") == 1)
                fake.gate.set()
                assert [(await first).status, (await last).status] == [200, 200]
                assert len(fake.requests) == 2

        play(story())

    @pytest.mark.parametrize("late", [False, True])
    def test_who_wants_one_place_keeps_nobody_from_another(self, pair, late):
        """One that was tried elsewhere waits for an instance that is busy; the other one is free, or gets free."""

        async def story():
            async with staged(*pair, instance_requests_max=1) as stage:
                fleet = stage.proxy.fleet
                one, two = fleet.router.of(Role.BOTH)
                at_two = await fleet.take(Asking(Role.BOTH, Prompt(), avoid={one}))
                at_one = await fleet.take(Asking(Role.BOTH, Prompt())) if late else None
                choosy = asyncio.create_task(fleet.take(Asking(Role.BOTH, Prompt(), avoid={one})))
                plain = asyncio.create_task(fleet.take(Asking(Role.BOTH, Prompt())))
                await until(lambda: stage.counted("kvpool_proxy_waiting") >= 1 + late)
                if at_one is not None:
                    fleet.end(at_one)
                assert (await plain).instance is one
                assert not choosy.done()
                fleet.end(at_two)
                assert (await choosy).instance is two

        play(story())

    def test_nobody_waits_longer_than_a_request_may_take(self):
        """Whatever queue_timeout is."""

        async def story():
            fake = FakeInstance("a")
            async with staged(fake, instance_requests_max=1, queue_timeout="1h", request_timeout=100) as stage:
                await stage.proxy.fleet.take(Asking(Role.BOTH, Prompt()))
                assert (await stage.ask()).status == 503

        play(story())

    def test_those_who_wait_for_nobody_are_told(self):
        """When the last instance goes."""

        async def story():
            fake = FakeInstance("a", gate=asyncio.Event())
            async with staged(fake, instance_requests_max=1) as stage:
                first = asyncio.create_task(stage.ask())
                await until(lambda: fake.running == 1)
                waiting = asyncio.create_task(stage.ask())
                await until(lambda: stage.counted("kvpool_proxy_waiting") == 1)
                body = {"type": "both", "instances": fake.address}
                assert (await stage.ask(body, "/instances/drain")).status == 200
                assert (await waiting).status == 503
                fake.gate.set()
                assert (await first).status == 200

        play(story())


class TestInstances:
    def test_added_drained_and_removed(self, pair):
        """At run time, in the seeds' words; what runs there goes on."""

        async def story():
            a, b = pair
            await b.start()
            async with staged(a) as stage:
                added = await stage.ask({"type": "both", "instances": [b.address]}, "/instances/add")
                assert added.json["current_instances"] == [a.address, b.address]
                b.gate = asyncio.Event()
                asked = [asyncio.create_task(stage.ask({"prompt": str(n)})) for n in range(2)]
                await until(lambda: b.running == 1)
                removed = await stage.ask({"type": "both", "instances": b.address}, "/instances/remove")
                assert removed.json["current_instances"] == [a.address]
                for _ in range(3):
                    assert (await stage.ask()).texts == ["a-0 "]
                b.gate.set()
                assert sorted(answer.texts[0] for answer in await asyncio.gather(*asked)) == ["a-0 ", "b-0 "]
                assert ("both", b.url) not in stage.proxy.fleet.router.instances
                assert (await stage.ask({"type": "both", "instances": a.address}, "/instances/drain")).status == 200
                assert (await stage.ask()).status == 503
                assert (await stage.ask({"type": "both", "instances": a.address}, "/instances/add")).status == 200
                assert (await stage.ask()).status == 200
                assert (await stage.get("/instances")).json["both"][0]["instance"] == a.url
            await b.stop()

        play(story())

    @pytest.mark.parametrize(
        ("body", "word"),
        [
            ([], "body"),
            ({"type": "other", "instances": "h:1"}, "prefill, decode, both"),
            ({"type": ["both"], "instances": "h:1"}, "prefill, decode, both"),
            ({"type": "both"}, "instances"),
            ({"type": "both", "instances": "nowhere"}, "HOST:PORT"),
            ({"type": "both", "instances": [7]}, "HOST:PORT"),
            ({"type": "decode", "instances": "h:1"}, "do not mix"),
        ],
    )
    def test_bad_changes_name_the_field(self, body, word):
        """And change nothing."""

        async def story():
            async with staged(FakeInstance("a")) as stage:
                before = (await stage.get("/healthcheck")).json
                answer = await stage.ask(body, "/instances/add")
                assert answer.status == 400
                assert word in answer.json["error"]["message"]
                assert (await stage.get("/healthcheck")).json == before

        play(story())

    def test_removing_what_is_not_there(self):
        """Is said."""

        async def story():
            async with staged(FakeInstance("a")) as stage:
                answer = await stage.ask({"type": "both", "instances": "127.0.0.1:1"}, "/instances/remove")
                assert (answer.status, "127.0.0.1:1" in answer.json["error"]["message"]) == (400, True)

        play(story())

    def test_reset_empties_all_caches(self, pair):
        """At the engines, and what the proxy remembers of them."""

        async def story():
            async with staged(*pair) as stage:
                await stage.ask({"prompt": words("x")})
                router = stage.proxy.fleet.router
                assert any(one.memory for one in router.instances.values())
                assert (await stage.ask({}, "/reset_prefix_cache")).json == {"reset": 2, "failed": {}}
                assert not any(one.memory for one in router.instances.values())
                assert [fake.resets for fake in pair] == [1, 1]
                await pair[0].stop()
                answer = await stage.ask({}, "/reset_prefix_cache")
                assert (answer.status, list(answer.json["failed"])) == (502, [pair[0].url])

        play(story())

    def test_an_api_key(self):
        """Is asked of clients, but for health and metrics, and given to instances."""

        async def story():
            fake = FakeInstance("a")
            async with staged(fake, api_key="secret") as stage:
                assert (await stage.ask(Authorization="Bearer wrong")).status == 401
                assert (await stage.ask({}, "/instances/add")).status == 401
                assert (await stage.ask(Authorization="Bearer secret")).status == 200
                assert fake.headers[0]["authorization"] == "Bearer secret"
                for path in ("/health", "/healthcheck", "/metrics"):
                    assert (await stage.get(path)).status == 200

        play(story())

    def test_metrics_tell_of_instances_and_requests(self):
        """In Prometheus' form."""

        async def story():
            fake = FakeInstance("a")
            async with staged(fake) as stage:
                await stage.ask({"prompt": words("x")})
                await stage.ask({"prompt": words("x")})
                page = (await stage.get("/metrics")).body.decode()
                assert f'kvpool_proxy_instance_up{{instance="{fake.url}",role="both"}} 1.0' in page
                assert 'kvpool_proxy_requests_total{route="/v1/completions",status="200"} 2.0' in page
                assert stage.counted("kvpool_proxy_held_tokens_total", role="both", source="proxy") > 300

        play(story())


class TestTheEnd:
    def test_draining_lets_requests_finish(self):
        """And takes no new ones."""

        async def story():
            fake = FakeInstance("a", gate=asyncio.Event())
            async with staged(fake) as stage:
                running = asyncio.create_task(stage.ask(STREAM))
                await until(lambda: fake.running == 1)
                held = aiohttp.ClientSession()
                async with held, held.get(stage.url + "/health"):
                    drained = asyncio.create_task(stage.proxy.drain())
                    await asyncio.sleep(0)
                    with pytest.raises(aiohttp.ClientConnectorError):
                        await stage.ask(STREAM)
                fake.gate.set()
                assert (await running).whole
                await drained

        play(story())

    def test_draining_has_an_end(self):
        """What goes on is told that it ends."""

        async def story():
            fake = FakeInstance("a", hang_at=2)
            async with staged(fake, drain_timeout=100) as stage:
                running = asyncio.create_task(stage.ask(STREAM))
                await until(lambda: fake.running == 1)
                await stage.proxy.drain()
                answer = await running
                assert not answer.whole
                assert b"shutting down" in answer.body

        play(story())

    def test_nothing_is_begun_anew_at_the_end(self, pair):
        """Not elsewhere, and not out of the queue."""

        async def story():
            for fake in pair:
                fake.hang_at = 0
            async with staged(*pair, drain_timeout=100, instance_requests_max=1) as stage:
                asked = [asyncio.create_task(stage.ask(STREAM)) for _ in range(3)]
                await until(lambda: pair[0].running + pair[1].running == 2)
                await until(lambda: stage.counted("kvpool_proxy_waiting") == 1)
                await stage.proxy.drain()
                for answer in await asyncio.gather(*asked):
                    assert answer.status == 503
                    assert "shutting down" in answer.json["error"]["message"]
                assert [len(fake.requests) for fake in pair] == [1, 1]

        play(story())
