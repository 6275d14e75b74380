"""Threads that the system does not give: loads and saves are given up, the engine goes on, and later ones work."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError

import pytest

from kvpool.client_threads import Threads
from tests.connectors.test_transfers import BOTH, DEADLINE_S, MODES, Pair, pair  # noqa: F401 -- a fixture


class NoThreads:
    """Refuses to start our threads while ``on``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, prefix: str | tuple[str, ...] = "kvpool-") -> None:
        self.on, self.refused = True, 0
        start = threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if self.on and thread.name.startswith(prefix):
                self.refused += 1
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sync", [False, True])
def test_an_engine_without_threads_computes(
    pair: Pair,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    sync: bool,
) -> None:
    """Tokens are right, every request ends, nothing is stored or held; with threads all is as it was."""
    options = MODES[mode] | {"sync": sync}
    one, other = pair.engine(BOTH, **options), pair.engine(BOTH, **options)
    first, second = list(range(26)), list(range(100, 126))
    pair.decode(one, first, None)
    none = NoThreads(monkeypatch)
    pair.decode(other, first, None)  # a hit that is not loaded
    pair.decode(other, second, None)  # and blocks that are not stored
    params = pair.prefill(other, list(range(200, 226))).returned
    pair.decode(one, list(range(200, 226)), params, other)
    assert none.refused
    assert other.worker.counters["load.failed"]
    assert other.worker.counters["save.errors"]
    assert not other.worker.counters["load.blocks"]
    none.on = False
    later = list(range(300, 326))
    pair.decode(other, later, None)
    before = one.worker.counters["load.blocks"]
    pair.decode(one, later, None)
    assert one.worker.counters["load.blocks"] > before


def test_either_the_work_or_what_is_done_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one of the threads is refused none is used; when there are all, all are, however much was refused."""
    done: list[str] = []
    threads = Threads(3, "few")
    none = NoThreads(monkeypatch, prefix="few_2")
    for _ in range(9):
        assert threads.begin(lambda: done.append("work"), lambda: done.append("instead")).done()
    assert done == ["instead"] * 9
    none.on = False
    together = threading.Barrier(3)
    for waiting in [threads.begin(lambda: together.wait(DEADLINE_S) and None, pytest.fail) for _ in range(3)]:
        waiting.result(DEADLINE_S)
    threads.close()
    threads.begin(pytest.fail, lambda: done.append("closed"))
    assert done[9:] == ["closed"]


def test_work_that_nobody_has_begun_can_be_cancelled() -> None:
    """It is not done then, and nothing instead; nobody waits for ever for what is dropped at the end."""
    threads, begun, gate = Threads(1, "few"), threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        gate.wait(DEADLINE_S)

    busy = threads.begin(wait, pytest.fail)
    assert begun.wait(DEADLINE_S)
    cancelled, dropped = [threads.begin(pytest.fail, pytest.fail) for _ in range(2)]
    assert cancelled.cancel()
    closing = threading.Thread(target=threads.close)
    closing.start()
    with pytest.raises(CancelledError):
        dropped.result(DEADLINE_S)
    gate.set()
    busy.result(DEADLINE_S)
    closing.join(DEADLINE_S)
