"""Engines that fail and clients that leave at random: every request ends honestly, and nothing is left over."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from tests.proxy.fake import Answer, FakeInstance, Stage, play, staged, until

CALM = {"status": 200, "die_after": None, "end_after": None, "hang_at": None, "health": 200, "empty": False}
TROUBLES = [{"status": 500}, {"status": 503}, {"die_after": 0}, {"die_after": 2}, {"end_after": 1}, {"hang_at": 0},
            {"hang_at": 2}, {"health": 500}, {"empty": True}, {}, {}, {}]  # fmt: skip


def honest(answer: Answer, stream: bool) -> str:
    """Return how a request ended; an answer that only looks whole is a lie."""
    if answer.status != 200:
        assert answer.json["error"]["message"]
        assert answer.status in {429, 500, 502, 503, 504}
        return "error"
    if not answer.whole:
        assert b'"error"' in answer.body
        return "broken"
    assert answer.body.endswith(b"data: [DONE]\n\n") if stream else answer.json["choices"]
    assert len({text.partition("-")[0] for text in answer.texts}) == 1
    return "whole"


async def one_request(stage: Stage, rng: random.Random) -> str:
    stream = rng.random() < 0.7
    asked = asyncio.create_task(stage.ask({"prompt": f"{rng.randrange(5)} " * 400, "stream": stream}))
    if rng.random() < 0.2:
        await asyncio.wait([asked], timeout=rng.random() * 0.05)
        if not asked.done():
            asked.cancel()
            await asyncio.wait([asked])
            return "left"
    answer = await asked
    if "Retry-After" in answer.headers:
        await asyncio.sleep(0.05)
    return honest(answer, stream)


@pytest.mark.parametrize(("prefill", "start"), [(0, "auto"), (2, "after_prefill"), (2, "with_prefill")])
@pytest.mark.parametrize("seed", range(4))
def test_a_storm(seed, prefill, start, caplog):
    """300 requests, 24 at a time, while engines change their behaviour, die and come back."""

    async def story():
        rng = random.Random(seed)
        fakes = [FakeInstance(name, token_s=0.001) for name in "abcd"]
        limits = {"first_byte_timeout": 300, "idle_timeout": 300, "request_timeout": 1500, "queue_timeout": 300}
        more = {"instance_requests_max": 5, "queue_max": 8, "decode_start": start}
        async with staged(*fakes, prefill=prefill, **more, **limits) as stage:
            over = asyncio.Event()

            async def weather():
                while not over.is_set():
                    await asyncio.sleep(0.03)
                    fake = rng.choice(fakes)
                    for name, value in (CALM | rng.choice(TROUBLES)).items():
                        setattr(fake, name, value)
                    if rng.random() < 0.1:
                        await fake.stop()
                        await fake.start()

            changing = asyncio.create_task(weather())
            ends: Counter[str] = Counter()
            gate = asyncio.Semaphore(24)

            async def one(number):
                async with gate:
                    ends[await one_request(stage, random.Random(seed * 1000 + number))] += 1

            await asyncio.gather(*(one(number) for number in range(300)))
            over.set()
            await changing
            assert sum(ends.values()) == 300
            assert ends["whole"] > 10
            for fake in fakes:
                for name, value in CALM.items():
                    setattr(fake, name, value)
            fleet = stage.proxy.fleet
            instances = fleet.router.instances.values()
            await until(lambda: all(one.up and not one.requests and not one.tokens for one in instances))
            await until(lambda: not any(fake.running for fake in fakes))
            assert not fleet._watches
            assert not any(fleet._waiting.values())
            assert all(one.backlog == 0 for one in instances)
            for number in range(8):
                assert honest(await stage.ask({"prompt": str(number), "stream": True}), True) == "whole"

    play(story())
    assert [record for record in caplog.records if record.levelname in {"ERROR", "CRITICAL"}] == []
