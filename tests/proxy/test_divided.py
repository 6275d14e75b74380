"""Prefill here, decode there: what each side is asked, and what happens when one of them is not there."""

from __future__ import annotations

import asyncio

import pytest

from kvpool.proxy.fleet import Asking
from kvpool.proxy.routing import Prompt, Role
from tests.proxy.fake import CHAT, COMPLETIONS, FakeInstance, play, staged, until

STREAM = {"model": "m", "prompt": "p", "stream": True, "max_tokens": 4, "stream_options": {"include_usage": True}}


@pytest.fixture
def sides():
    return FakeInstance("p0"), FakeInstance("p1"), FakeInstance("d0"), FakeInstance("d1")


def asked(*fakes):
    return [request for fake in fakes for request in fake.requests]


class TestTheTwoRequests:
    @pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
    def test_the_prefill_computes_and_the_decode_is_told_where(self, path):
        """One token, no stream; what the prefill instance says goes to the decode instance as it is."""

        async def story():
            prefill, decode = FakeInstance("p"), FakeInstance("d")
            async with staged(prefill, decode, prefill=1) as stage:
                body = {**STREAM, "messages": [], "max_completion_tokens": 9, "min_tokens": 3, "temperature": 0}
                answer = await stage.ask(body, path)
                assert answer.texts == [f"d-{n} " for n in range(4)]
                sent, got = prefill.requests[0], decode.requests[0]
                assert (sent["max_tokens"], sent["max_completion_tokens"], sent["stream"]) == (1, 1, False)
                assert not {"stream_options", "min_tokens"} & sent.keys()
                assert sent["temperature"] == 0
                assert sent["kv_transfer_params"]["do_remote_decode"] is True
                assert sent["kv_transfer_params"]["do_remote_prefill"] is False
                assert got == body | {"kv_transfer_params": {"do_remote_prefill": True, "remote_engine_id": "p"}}
                assert prefill.headers[0]["x-request-id"] == decode.headers[0]["x-request-id"]
                assert stage.counted("kvpool_proxy_prefills_total", outcome="done") == 1

        play(story())

    @pytest.mark.parametrize("start", ["after_prefill", "with_prefill"])
    def test_what_can_be_read_and_not_be_written_keeps_no_place(self, start):
        """Somewhere below the interpreter's limit lie requests that are nested too deeply to be passed on."""

        async def story():
            prefill, decode = FakeInstance("p"), FakeInstance("d")
            async with staged(prefill, decode, prefill=1, decode_start=start) as stage:
                seen = set()
                for depth in range(860, 1000, 2):
                    raw = b'{"prompt": "p", "x": ' + b"[" * depth + b"]" * depth + b"}"
                    async with stage.client.post(stage.url + COMPLETIONS, data=raw) as response:
                        await response.read()
                        seen.add(response.status)
                assert seen == {200, 400}
                every = stage.proxy.fleet.router.instances.values()
                await until(lambda: not any(one.requests for one in every))

        play(story())

    @pytest.mark.parametrize("more", [{"n": 2}, {"prompt": ["a", "b"]}, {"echo": True, "logprobs": 1},
                                      {"prompt_logprobs": 1}, {"prompt_logprobs": 0}], ids=str)  # fmt: skip
    def test_what_cannot_be_divided_is_not(self, more):
        """The decode instance does all of it."""

        async def story():
            prefill, decode = FakeInstance("p"), FakeInstance("d")
            async with staged(prefill, decode, prefill=1) as stage:
                assert (await stage.ask({"prompt": "p", **more})).status == 200
                assert not prefill.requests
                assert "kv_transfer_params" not in decode.requests[0]

        play(story())

    @pytest.mark.parametrize("prompt", [["p"], [[1, 2, 3]]], ids=str)
    def test_a_list_of_one_prompt_is_divided(self, prompt):
        """Some clients send nothing else; it goes on as it came."""

        async def story():
            prefill, decode = FakeInstance("p"), FakeInstance("d")
            async with staged(prefill, decode, prefill=1) as stage:
                assert (await stage.ask({"prompt": prompt})).status == 200
                assert [request["prompt"] for request in asked(prefill, decode)] == [prompt, prompt]
                assert "kv_transfer_params" in decode.requests[0]

        play(story())

    def test_a_client_names_no_transfer(self):
        """It could name any host."""

        async def story():
            prefill, decode = FakeInstance("p", status=400), FakeInstance("d")
            async with staged(prefill, decode, prefill=1) as stage:
                await stage.ask({"prompt": "p", "kv_transfer_params": {"remote_host": "evil"}})
                assert prefill.requests[0]["kv_transfer_params"]["remote_host"] is None
                assert "kv_transfer_params" not in decode.requests[0]

        play(story())


class TestFailover:
    @pytest.mark.parametrize("trouble", [{"status": 500}, {"die_after": 0}, {"gone": True}], ids=str)
    def test_another_prefill_instance(self, sides, trouble):
        """When the first one fails."""

        async def story():
            bad, good, *decode = sides
            async with staged(*sides, prefill=2, health_interval=60_000) as stage:
                if trouble.get("gone"):
                    await bad.stop()
                else:
                    for name, value in trouble.items():
                        setattr(bad, name, value)
                for number in range(2):
                    assert (await stage.ask(STREAM)).whole
                    params = asked(*decode)[number]["kv_transfer_params"]
                    assert params["remote_engine_id"] == good.name

        play(story())

    @pytest.mark.parametrize("status", [400, 500])
    def test_without_prefill_the_decode_instance_computes(self, sides, status):
        """Slower is better than not at all; what is the client's fault the decode instance will say."""

        async def story():
            for fake in sides[:2]:
                fake.status = status
            async with staged(*sides, prefill=2) as stage:
                assert (await stage.ask(STREAM)).whole
                assert "kv_transfer_params" not in asked(*sides[2:])[0]
                outcome = "refused" if status == 400 else "failed"
                assert stage.counted("kvpool_proxy_prefills_total", outcome=outcome) == 1
                for fake in sides[:2]:
                    await fake.stop()
                router = stage.proxy.fleet.router
                await until(lambda: not any(one.up for one in router.of("prefill")))
                assert (await stage.ask(STREAM)).whole
                assert (await stage.get("/health")).status == 200

        play(story())

    @pytest.mark.parametrize("failed_before", [False, True])
    def test_without_prefill_while_it_was_waited_for(self, failed_before):
        """The last prefill instance that is up goes down before it is this request's turn."""

        async def story():
            busy, bad, decode = FakeInstance("p0"), FakeInstance("p1", status=500), FakeInstance("d")
            async with staged(busy, bad, decode, prefill=2, instance_requests_max=1) as stage:
                fleet = stage.proxy.fleet
                two = fleet.router.of(Role.PREFILL)[1]
                await fleet.take(Asking(Role.PREFILL, Prompt(), avoid={two}))
                if not failed_before:
                    fleet.drain(two)
                asking = asyncio.create_task(stage.ask(STREAM))
                await until(lambda: stage.counted("kvpool_proxy_waiting") == 1)
                assert len(bad.requests) == failed_before
                await busy.stop()
                assert (await asking).whole
                assert stage.counted("kvpool_proxy_prefills_total", outcome="failed") == 1

        play(story())

    def test_another_decode_instance_gets_kv_of_its_own(self, sides):
        """What one instance may have begun to fetch, no other can."""

        async def story():
            sides[2].status = 500
            async with staged(*sides, prefill=2) as stage:
                for _ in range(2):
                    assert (await stage.ask(STREAM)).texts[0] == "d1-0 "
                assert len(asked(*sides[:2])) == len(asked(*sides[2:])) == 3

        play(story())

    def test_kv_that_nobody_has_touched_is_used(self, sides):
        """A decode instance that takes no connections has fetched nothing."""

        async def story():
            async with staged(*sides, prefill=2, health_interval=60_000) as stage:
                await sides[2].stop()
                for _ in range(2):
                    assert (await stage.ask(STREAM)).texts[0] == "d1-0 "
                assert len(asked(*sides[:2])) == len(asked(*sides[2:])) == 2

        play(story())

    def test_without_decode_instances_nothing_is_computed(self, sides):
        """503, and no prefill whose KV nobody fetches."""

        async def story():
            async with staged(*sides, prefill=2) as stage:
                for fake in sides[2:]:
                    await fake.stop()
                router = stage.proxy.fleet.router
                await until(lambda: not any(one.up for one in router.of("decode")))
                assert (await stage.ask(STREAM)).status == 503
                assert (await stage.get("/health")).status == 503
                assert not asked(*sides[:2])

        play(story())

    def test_a_broken_decode_says_so(self, sides):
        """After the first byte there is no other."""

        async def story():
            for fake in sides[2:]:
                fake.die_after = 2
            async with staged(*sides, prefill=2) as stage:
                answer = await stage.ask(STREAM)
                assert not answer.whole
                assert b'"error"' in answer.body

        play(story())


class TestClients:
    @pytest.mark.parametrize("side", ["prefill", "decode"])
    def test_one_that_hangs_up_ends_its_request_on_either_side(self, side):
        """Wherever it is at that moment."""

        async def story():
            prefill, decode = FakeInstance("p"), FakeInstance("d")
            slow = prefill if side == "prefill" else decode
            slow.hang_at = 0
            async with staged(prefill, decode, prefill=1) as stage:
                running = asyncio.create_task(stage.ask(STREAM))
                await until(lambda: slow.running == 1)
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
                await until(lambda: slow.aborted == 1)
                instances = stage.proxy.fleet.router.instances.values()
                await until(lambda: not any(one.requests for one in instances))
                assert len(decode.requests) == (side == "decode")

        play(story())


class TestPlaces:
    def test_no_prefill_before_there_is_a_place_to_decode(self):
        """KV that was computed would lie about."""

        async def story():
            prefill, decode = FakeInstance("p"), FakeInstance("d", gate=asyncio.Event())
            async with staged(prefill, decode, prefill=1, instance_requests_max=1) as stage:
                both = [asyncio.create_task(stage.ask(STREAM)) for _ in range(2)]
                await until(lambda: decode.running == 1 and stage.counted("kvpool_proxy_waiting") == 1)
                assert len(prefill.requests) == 1
                decode.gate.set()
                assert all(answer.whole for answer in await asyncio.gather(*both))
                assert len(prefill.requests) == 2

        play(story())

    def test_the_seeds_healthcheck(self, sides):
        """Counts of either side, of those that answer."""

        async def story():
            async with staged(*sides, prefill=1) as stage:
                told = (await stage.get("/healthcheck")).json
                assert (told["status"], told["prefill_instances"], told["decode_instances"]) == ("ok", 1, 3)
                added = await stage.ask({"type": "prefill", "instances": "127.0.0.1:1"}, "/instances/add")
                assert added.json["current_prefill_instances"] == [sides[0].address, "127.0.0.1:1"]
                assert added.json["current_decode_instances"] == [fake.address for fake in sides[1:]]

        play(story())
