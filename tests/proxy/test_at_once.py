"""The decode instance is asked while the prefill runs: what each is told, and what happens when one of them fails."""

from __future__ import annotations

import asyncio
import re
from contextlib import asynccontextmanager

import pytest

from tests.proxy.fake import FakeInstance, play, staged, until

STREAM = {"model": "m", "prompt": "p", "stream": True, "max_tokens": 4}
TRANSFER = re.compile(r"[0-9a-f]{16}")


@pytest.fixture
def sides():
    return FakeInstance("p0"), FakeInstance("p1"), FakeInstance("d0"), FakeInstance("d1")


def params(fake, number=0):
    return fake.requests[number].get("kv_transfer_params")


def asked(*fakes):
    return [request for fake in fakes for request in fake.requests]


@asynccontextmanager
async def announced(*fakes, prefill=2, without=(), **settings):
    """A proxy to which all instances, but for some, have said that they transfer layer by layer."""
    async with staged(*fakes, prefill=prefill, **settings) as stage:
        for one in stage.proxy.fleet.router.instances.values():
            one.transfers = one.layerwise = one.name not in {fake.url for fake in without}
        yield stage


def nothing_is_left(stage):
    fleet = stage.proxy.fleet
    return not fleet._watches and not any(one.requests or one.tokens for one in fleet.router.instances.values())


class TestTheTwoRequests:
    def test_both_are_asked_at_the_same_time_and_told_of_the_same_transfer(self):
        """The decode instance waits for what the prefill instance computes; nothing else is said to either."""

        async def story():
            prefill, decode = FakeInstance("p", gate=asyncio.Event()), FakeInstance("d", gate=asyncio.Event())
            async with announced(prefill, decode, prefill=1) as stage:
                asking = asyncio.create_task(stage.ask(STREAM))
                await until(lambda: prefill.running == decode.running == 1)
                transfer = params(prefill)["transfer_id"]
                assert TRANSFER.fullmatch(transfer)
                assert params(prefill)["do_remote_decode"] is True
                assert params(prefill)["do_remote_prefill"] is False
                assert params(decode) == {
                    "do_remote_prefill": True, "do_remote_decode": False, "transfer_id": transfer,
                }  # fmt: skip
                assert prefill.requests[0]["max_tokens"] == 1
                prefill.gate.set()
                await until(lambda: stage.counted("kvpool_proxy_prefills_total", outcome="done") == 1)
                decode.gate.set()
                assert (await asking).texts == [f"d-{n} " for n in range(4)]
                await stage.ask(STREAM)
                assert params(prefill, 1)["transfer_id"] != transfer
                assert stage.counted("kvpool_proxy_decode_starts_total", when="with_prefill") == 2
                await until(lambda: nothing_is_left(stage))

        play(story())

    @pytest.mark.parametrize("side", [0, 1])
    @pytest.mark.parametrize("lacks", ["transfers", "layerwise"])
    def test_one_that_cannot_is_asked_afterwards(self, side, lacks):
        """By itself the proxy asks both at once only where both have said that they can."""

        async def story():
            pair = FakeInstance("p"), FakeInstance("d")
            async with announced(*pair, prefill=1) as stage:
                one = next(i for i in stage.proxy.fleet.router.instances.values() if i.name == pair[side].url)
                setattr(one, lacks, False)
                assert (await stage.ask(STREAM)).whole
                assert "transfer_id" not in params(pair[0])
                assert params(pair[1]) == {"do_remote_prefill": True, "remote_engine_id": "p"}
                assert stage.counted("kvpool_proxy_decode_starts_total", when="after_prefill") == 1

        play(story())

    @pytest.mark.parametrize("start", ["with_prefill", "after_prefill"])
    def test_what_the_operator_says_goes(self, start):
        """Whatever instances have announced."""

        async def story():
            pair = prefill, decode = FakeInstance("p"), FakeInstance("d")
            without = pair if start == "with_prefill" else ()
            async with announced(*pair, prefill=1, without=without, decode_start=start) as stage:
                assert (await stage.ask(STREAM)).whole
                at_once = "transfer_id" in params(prefill)
                assert at_once == ("transfer_id" in params(decode)) == (start == "with_prefill")

        play(story())


class TestFailover:
    @pytest.mark.parametrize("trouble", [{"status": 500}, {"die_after": 0}, {"gone": True}], ids=str)
    def test_another_prefill_instance_takes_over_the_transfer(self, sides, trouble):
        """The decode instance notices nothing."""

        async def story():
            bad, good, *decode = sides
            for fake in decode:
                fake.gate = asyncio.Event()
            async with announced(*sides, health_interval=60_000) as stage:
                if trouble.get("gone"):
                    await bad.stop()
                for name, value in trouble.items():
                    setattr(bad, name, value)
                for number in range(2):
                    asking = asyncio.create_task(stage.ask(STREAM))
                    await until(lambda: stage.counted("kvpool_proxy_prefills_total", outcome="done") > number)  # noqa: B023
                    for fake in decode:
                        fake.gate.set()
                    assert (await asking).whole
                ids = [request["kv_transfer_params"]["transfer_id"] for request in asked(*decode)]
                assert sorted(request["kv_transfer_params"]["transfer_id"] for request in good.requests) == sorted(ids)
                assert len(set(ids)) == 2

        play(story())

    def test_one_that_knows_no_transfers_takes_over_none(self, sides):
        """What it computed, nobody would find."""

        async def story():
            bad, other, *decode = sides
            bad.status = 500
            async with announced(*sides, without=[other]) as stage:
                for one in stage.proxy.fleet.router.instances.values():
                    one.turn = one.name == other.url  # the first choice falls on the one that fails
                for fake in decode:
                    fake.gate = asyncio.Event()
                asking = asyncio.create_task(stage.ask(STREAM))
                await until(lambda: stage.counted("kvpool_proxy_prefills_total", outcome="failed") == 1)
                for fake in decode:
                    fake.gate.set()
                assert (await asking).whole
                assert not other.requests

        play(story())

    @pytest.mark.parametrize("status", [400, 500])
    def test_without_prefill_the_decode_instance_goes_on_alone(self, sides, status):
        """It is not asked anew."""

        async def story():
            for fake in sides[:2]:
                fake.status = status
            for fake in sides[2:]:
                fake.gate = asyncio.Event()
            async with announced(*sides) as stage:
                asking = asyncio.create_task(stage.ask(STREAM))
                outcome = "refused" if status == 400 else "failed"
                await until(lambda: stage.counted("kvpool_proxy_prefills_total", outcome=outcome) == 1)
                for fake in sides[2:]:
                    fake.gate.set()
                assert (await asking).whole
                assert len(asked(*sides[2:])) == 1
                assert len(asked(*sides[:2])) == (1 if status == 400 else 2)

        play(story())

    @pytest.mark.parametrize("trouble", [{"status": 500}, {"die_after": 0}, {"gone": True}], ids=str)
    def test_another_decode_instance_fetches_the_same_transfer(self, sides, trouble):
        """The pool has it: nothing is computed twice."""

        async def story():
            *prefill, bad, good = sides
            async with announced(*sides, health_interval=60_000) as stage:
                if trouble.get("gone"):
                    await bad.stop()
                for name, value in trouble.items():
                    setattr(bad, name, value)
                for _ in range(2):
                    assert (await stage.ask(STREAM)).texts[0] == "d1-0 "
                given = {request["kv_transfer_params"]["transfer_id"] for request in asked(*prefill)}
                fetched = [request["kv_transfer_params"]["transfer_id"] for request in good.requests]
                assert sorted(given) == sorted(fetched)
                assert len(asked(*prefill)) == 2

        play(story())

    def test_another_decode_instance_that_knows_no_transfers_computes(self, sides):
        """It is told of none."""

        async def story():
            *_, bad, other = sides
            bad.status = 500
            async with announced(*sides, without=[other]) as stage:
                for one in stage.proxy.fleet.router.instances.values():
                    one.turn = one.name == other.url
                assert (await stage.ask(STREAM)).texts[0] == "d1-0 "
                assert params(bad)["transfer_id"]
                assert params(other) is None

        play(story())

    def test_kv_in_the_pool_is_fetched_twice_afterwards_too(self, sides):
        """Where the prefill instance has named it by a transfer."""

        async def story():
            for fake in sides:
                fake.transfer = "00000000000000aa"
            sides[2].status = 500
            async with staged(*sides, prefill=2) as stage:
                for _ in range(2):
                    assert (await stage.ask(STREAM)).texts[0] == "d1-0 "
                assert len(asked(*sides[:2])) == 2
                assert [request["kv_transfer_params"]["transfer_id"] for request in asked(*sides[2:])] == [
                    "00000000000000aa"
                ] * 3

        play(story())

    def test_a_prefill_that_nobody_waits_for_is_ended(self, sides):
        """The decode instance had to do without it."""

        async def story():
            for fake in sides[:2]:
                fake.hang_at = 0
            async with announced(*sides) as stage:
                assert (await stage.ask(STREAM)).whole
                await until(lambda: sum(fake.aborted for fake in sides[:2]) == 1)
                await until(lambda: nothing_is_left(stage))
                assert stage.counted("kvpool_proxy_prefills_total", outcome="left") == 1

        play(story())

    def test_a_broken_decode_ends_the_prefill(self, sides):
        """After the first byte there is no other."""

        async def story():
            for fake in sides[:2]:
                fake.hang_at = 0
            for fake in sides[2:]:
                fake.die_after = 2
            async with announced(*sides) as stage:
                answer = await stage.ask(STREAM)
                assert not answer.whole
                assert b'"error"' in answer.body
                await until(lambda: sum(fake.aborted for fake in sides[:2]) == 1)
                await until(lambda: nothing_is_left(stage))

        play(story())


def test_a_client_that_hangs_up_ends_both():
    """Wherever they are."""

    async def story():
        prefill, decode = FakeInstance("p", hang_at=0), FakeInstance("d", hang_at=0)
        async with announced(prefill, decode, prefill=1) as stage:
            asking = asyncio.create_task(stage.ask(STREAM))
            await until(lambda: prefill.running == decode.running == 1)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await until(lambda: prefill.aborted == decode.aborted == 1)
            await until(lambda: nothing_is_left(stage))

    play(story())


def test_a_request_that_waits_for_a_prefill_instance_keeps_no_decode_instance_waiting():
    """It is asked when the prefill begins: what it waits for would not come sooner."""

    async def story():
        prefill, *decode = FakeInstance("p", gate=asyncio.Event()), FakeInstance("d0"), FakeInstance("d1")
        async with announced(prefill, *decode, prefill=1, instance_requests_max=1) as stage:
            for fake in decode:
                fake.gate = asyncio.Event()
            both = [asyncio.create_task(stage.ask(STREAM)) for _ in range(2)]
            await until(lambda: prefill.running == 1 and stage.counted("kvpool_proxy_waiting") == 1)
            await until(lambda: len(asked(*decode)) == 1)
            prefill.gate.set()
            await until(lambda: len(asked(*decode)) == 2)
            for fake in decode:
                fake.gate.set()
            assert all(answer.whole for answer in await asyncio.gather(*both))

    play(story())
