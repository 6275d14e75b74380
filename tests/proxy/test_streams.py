"""Streams in whole events, and those in which an engine says that it has failed."""

from __future__ import annotations

import asyncio
import json

import pytest

from kvpool.proxy.errors import AttemptError
from kvpool.proxy.streams import Events
from kvpool.proxy.watch import Watch
from tests.proxy.fake import COMPLETIONS, FakeInstance, play, staged

STREAM = {"prompt": "p", "stream": True, "max_tokens": 4}
TOKEN = b'data: {"choices": [{"text": "{\\"error\\": 1}"}]}\n\n'
ERROR = b'data: {"error": {"message": "out of order", "code": 500}}\n\n'
DONE = b"data: [DONE]\n\n"


class Parts:
    """A stream that comes in these parts."""

    def __init__(self, *parts):
        self._parts = [part for part in parts if part]

    async def readany(self):
        return self._parts.pop(0) if self._parts else b""


def events_of(*parts, bytes_max=1 << 20):
    """Return what was read of a stream until it ended or failed, and the failure."""
    found = []

    async def read():
        watch = Watch(asyncio.get_running_loop().time() + 60)
        async with watch:
            events = Events(Parts(*parts), watch, 60.0, bytes_max)
            while event := await events.next():
                found.append(event)

    try:
        asyncio.run(read())
    except (AttemptError, ValueError) as exc:
        return found, exc
    return found, None


class TestEvents:
    @pytest.mark.parametrize("ends", [b"\n\n", b"\r\n\r\n"])
    @pytest.mark.parametrize("event", [ERROR, ERROR.replace(b": ", b":"), b"event: error\n" + ERROR])
    def test_an_error_is_found_wherever_it_is_cut(self, event, ends):
        """None of it is passed on, and all that came before."""
        whole = (TOKEN + event + DONE).replace(b"\n", ends[: len(ends) // 2])
        before = len(TOKEN.replace(b"\n", ends[: len(ends) // 2]))
        for cut in range(1, len(whole)):
            found, failure = events_of(whole[:cut], whole[cut:])
            assert isinstance(failure, AttemptError)
            assert "out of order" in str(failure)
            assert b"".join(found) in (b"", whole[:before])
            if cut == before:
                assert found == [whole[:before]]

    @pytest.mark.parametrize(
        "stream",
        [
            TOKEN + DONE,
            TOKEN + b"data: [DONE]",
            b": wait\n\n" + TOKEN.replace(b"\n", b"\r\n") + DONE,
            b'data: {"error": {"message": "too long", "code": 400}}\n\n' + DONE,
            b'data: {"error": null, "choices": []}\n\n' + DONE,
            b'data: {"error" is what it says\n\n' + DONE,
            b'data: {"error": %s\n\n' % (b"[" * 100_000),
        ],
    )
    def test_all_else_is_passed_on_as_it_is(self, stream):
        """Byte for byte: tokens that look alike, and what is the client's own mistake."""
        for cut in range(1, min(len(stream), 200)):
            found, failure = events_of(stream[:cut], stream[cut:])
            assert (b"".join(found), failure) == (stream, None)

    def test_an_event_is_not_waited_for_without_end(self):
        """It may have so many bytes."""
        found, failure = events_of(TOKEN, *[b"data: x"] * 100, bytes_max=500)
        assert (found, str(failure)) == ([TOKEN], "an event of more than 500 bytes")


class TestTheFirstEvent:
    @pytest.mark.parametrize(
        "error", [{"code": 500}, {"code": 429}, {"code": 503}, {"code": None}, {}, "words"], ids=str
    )
    def test_another_instance_answers(self, error):
        """As for any failure before the first byte."""
        error = {"message": "out of order"} | error if isinstance(error, dict) else error

        async def story():
            bad, good = FakeInstance("bad", error_at=0, error=error), FakeInstance("good")
            async with staged(bad, good, policy="round_robin") as stage:
                for _ in range(2):
                    answer = await stage.ask(STREAM)
                    assert (answer.status, answer.whole, answer.texts[0]) == (200, True, "good-0 ")
                assert len(bad.requests) == 2
                assert stage.counted("kvpool_proxy_attempts_total", role="both", outcome="failed") == 2
                assert stage.counted("kvpool_proxy_attempts_total", role="both", outcome="answered") == 2

        play(story())

    def test_where_all_fail_it_is_the_answer(self):
        """With the engine's own words, and a status that says so."""

        async def story():
            fake = FakeInstance("a", error_at=0, error={"message": "out of order", "code": 500})
            async with staged(fake) as stage:
                answer = await stage.ask(STREAM)
                assert (answer.status, answer.headers["Content-Type"]) == (500, "application/json")
                assert answer.json == {"error": fake.error}

        play(story())

    @pytest.mark.parametrize("error_at", [0, 2])
    def test_a_clients_mistake_goes_back(self, error_at):
        """As it is: no other instance would know better."""

        async def story():
            fakes = [FakeInstance(n, error_at=error_at, error={"message": "too long", "code": 400}) for n in "ab"]
            async with staged(*fakes) as stage:
                answer = await stage.ask(STREAM)
                assert (answer.status, answer.whole) == (200, True)
                events = answer.body.split(b"\n\n")
                assert json.loads(events[error_at].removeprefix(b"data: "))["error"] == fakes[0].error
                assert sum(len(fake.requests) for fake in fakes) == 1
                assert not any(one.trouble for one in stage.proxy.fleet.router.instances.values())

        play(story())


def test_an_error_after_the_first_byte_breaks_the_answer():
    """Its client is told, and its instance has failed."""

    async def story():
        fake = FakeInstance("a", error_at=2, error={"message": "out of order", "code": 500})
        async with staged(fake) as stage:
            answer = await stage.ask(STREAM)
            assert (answer.status, answer.whole) == (200, False)
            assert b"out of order" in answer.body
            assert b"[DONE]" not in answer.body
            assert stage.counted("kvpool_proxy_requests_total", route=COMPLETIONS, status="broken") == 1
            assert stage.counted("kvpool_proxy_attempts_total", role="both", outcome="broken") == 1

    play(story())
