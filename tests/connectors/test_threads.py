"""Threads that the system does not give: loads and saves are given up, the engine goes on, and later ones work."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvpool_vllm.threads import begin
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
    """A thread that is there may find the work that was refused: it leaves it."""
    done: list[str] = []
    with ThreadPoolExecutor(2, "few") as threads:
        gate = threading.Event()
        threads.submit(gate.wait, DEADLINE_S)

        NoThreads(monkeypatch, prefix="few")
        refused = begin(threads, lambda: done.append("work"), lambda: done.append("instead"))
        assert refused.done()
        assert not refused.cancel()
        monkeypatch.undo()
        gate.set()
    assert done == ["instead"]


def test_work_that_nobody_has_begun_can_be_cancelled() -> None:
    """It is not done then, and nothing instead."""
    done: list[str] = []
    with ThreadPoolExecutor(1) as threads:
        gate = threading.Event()
        threads.submit(gate.wait, DEADLINE_S)
        waiting = begin(threads, lambda: done.append("work"), lambda: done.append("instead"))
        assert waiting.cancel()
        gate.set()
    assert done == []
