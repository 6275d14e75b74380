"""Threads of a client that the system refuses: calls answer all the same, and threads come when there are some."""

from __future__ import annotations

import threading

import pytest

from kvpool.client import Client
from kvpool.client_threads import start_thread, started_threads
from kvpool.model import KEY_BYTES, Namespace
from tests.connectors.test_threads import NoThreads

SPACE = Namespace(model="demo")


@pytest.mark.parametrize("given", range(4))
def test_all_threads_or_none(monkeypatch: pytest.MonkeyPatch, given: int) -> None:
    """Those that were started before one was refused end."""
    none = NoThreads(monkeypatch, prefix=tuple(f"few_{number}" for number in range(given, 4)))
    before = threading.active_count()
    with pytest.raises(RuntimeError):
        started_threads(4, "few")
    for thread in threading.enumerate():
        if thread.name.startswith("few_"):
            thread.join(10)
    assert threading.active_count() == before
    none.on = False
    with started_threads(4, "few") as threads:
        none.on = True
        assert [threads.submit(pow, 2, n).result(10) for n in range(9)] == [2**n for n in range(9)]
    assert none.refused == 1


def test_a_client_without_threads_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A miss with a reason, as from any client without a pool; later it has threads."""
    with Client("127.0.0.1:1") as client:
        none = NoThreads(monkeypatch)
        digest = client.register(SPACE)
        asked = client.lookup_async(digest, bytes(KEY_BYTES))
        assert asked.done()
        assert asked.result().reason
        assert none.refused
        none.on = False
        caller = threading.current_thread()
        seen = client._submit(threading.current_thread).result(10)
        assert seen is not caller


def test_a_thread_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asked for it is told."""
    done = threading.Event()
    none = NoThreads(monkeypatch, prefix="one")
    assert start_thread(done.set, "one") is None
    none.on = False
    assert start_thread(done.set, "one") is not None
    assert done.wait(10)
