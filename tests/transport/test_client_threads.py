"""Threads of a client that the system refuses: calls answer all the same, and threads come when there are some."""

from __future__ import annotations

import threading

import pytest

from kvpool import client_health
from kvpool.client import Client
from kvpool.client_health import BreakerOpenError, Health
from kvpool.client_master import MasterLink
from kvpool.client_threads import started_threads
from kvpool.errors import UnavailableError
from kvpool.model import KEY_BYTES, Namespace
from kvpool.processes import start_thread
from tests.connectors.test_threads import NoThreads

SPACE = Namespace(model="demo")


@pytest.mark.parametrize("given", range(4))
def test_all_threads_or_none(monkeypatch: pytest.MonkeyPatch, given: int) -> None:
    """Those that were started before one was refused end."""
    none = NoThreads(monkeypatch, prefix=tuple(f"few_{number}" for number in range(given, 4)))
    with pytest.raises(RuntimeError):
        started_threads(4, "few")
    for thread in threading.enumerate():
        if thread.name.startswith("few_"):
            thread.join(10)
    assert not any(thread.name.startswith("few_") for thread in threading.enumerate())
    none.on = False
    with started_threads(4, "few") as threads:
        none.on = True
        assert [threads.submit(pow, 2, n).result(10) for n in range(9)] == [2**n for n in range(9)]
    assert none.refused == 1


def test_a_client_without_threads_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """To who calls, not later; then it has them, and none when it is closed."""
    with Client("127.0.0.1:1") as client:
        none = NoThreads(monkeypatch)
        digest = client.register(SPACE)
        with pytest.raises(RuntimeError):
            client.lookup_async(digest, bytes(KEY_BYTES))
        none.on = False
        assert client.lookup_async(digest, bytes(KEY_BYTES)).result(10).reason
    with pytest.raises(RuntimeError):
        client.lookup_async(digest, bytes(KEY_BYTES))


def test_nothing_ends_the_thread_that_looks_for_the_master() -> None:
    """Without it the master would be away for ever."""
    calls = threading.Semaphore(0)

    def changed() -> None:
        calls.release()
        raise OSError("too many open files")

    link = MasterLink("127.0.0.1:1", "test", changed, Health(3, 1.0), 0.1)
    assert link.wait_tried(10)
    for _ in range(2):
        assert calls.acquire(timeout=10)
    link.close()


def test_a_breaker_that_nobody_watches_is_watched_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be open for ever otherwise."""
    monkeypatch.setattr(client_health, "START_AGAIN_S", 0.0)
    health = Health(1, 0.001)
    answers = threading.Event()
    guard = health.guard("other", answers.set)
    none = NoThreads(monkeypatch)
    with pytest.raises(UnavailableError), guard.call():
        raise UnavailableError("gone")
    assert not guard.closed
    assert health.troubled
    with pytest.raises(BreakerOpenError):
        guard.check()
    assert none.refused == 2
    none.on = False
    with pytest.raises(BreakerOpenError):
        guard.check()
    assert answers.wait(10)
    health.close()


def test_a_thread_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asked for it is told."""
    done = threading.Event()
    none = NoThreads(monkeypatch, prefix="one")
    assert start_thread(done.set, "one") is None
    none.on = False
    assert start_thread(done.set, "one") is not None
    assert done.wait(10)
