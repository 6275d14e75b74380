"""Threads that move bytes for a caller: it waits for those that have begun, and for nobody else."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest

from kvpool.client_bytes import PART_BYTES_MIN, CopyThreads
from kvpool.client_node import CONTROL_S, PATIENCE_S, LocalNode
from kvpool.errors import UnavailableError

ITEMS = list(range(64))
LIMIT_S = 10.0


@pytest.fixture
def copies() -> Iterator[CopyThreads]:
    made = CopyThreads(2)
    yield made
    made.close()


def test_every_item_is_done_once_by_whoever_comes_first(copies: CopyThreads) -> None:
    """And a failure of any of them is the caller's."""
    done: list[int] = []
    copies.run(ITEMS, PART_BYTES_MIN, done.extend)
    assert sorted(done) == ITEMS
    caller = threading.get_ident()
    both = threading.Barrier(2)

    def fail(items: Sequence[int]) -> None:
        if 0 in items or 1 in items:
            both.wait(LIMIT_S)  # each of them has a piece
        if threading.get_ident() != caller:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        copies.run([0, 1], PART_BYTES_MIN, fail)


def test_threads_that_are_busy_with_other_work_are_not_waited_for(copies: CopyThreads) -> None:
    """Who reads from a slow host has them; the caller does all of it."""
    release = threading.Event()
    others = [copies.executor().submit(release.wait, LIMIT_S) for _ in range(2)]
    done: list[int] = []
    copies.run(ITEMS, PART_BYTES_MIN, done.extend)
    assert sorted(done) == ITEMS
    assert not any(other.done() for other in others)
    release.set()


def test_where_no_thread_can_be_started_the_caller_does_it_and_nobody_later(
    copies: CopyThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was handed over then is still in the queue when a thread comes: buffers are others' by that time."""

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    done: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        copies.run(ITEMS, PART_BYTES_MIN, done.extend)
    assert sorted(done) == ITEMS
    assert copies.executor().submit(len, ITEMS).result(LIMIT_S) == len(ITEMS)  # behind what is left in the queue
    assert len(done) == len(ITEMS)


class Pool:
    """Channels of a node that answers late, or whose connection breaks."""

    def __init__(self, late: bool) -> None:
        self._late = late

    def channel(self, timeout_s: float) -> Pool:
        if self._late:
            threading.Event().wait(timeout_s)
        raise UnavailableError("deadline exceeded" if self._late else "the connection is closed")


@pytest.mark.parametrize(
    ("late", "timeout_s", "alive"),
    [(True, 0.001, True), (True, PATIENCE_S, False), (False, 0.001, False), (False, CONTROL_S, False)],
)
def test_a_node_is_not_gone_because_its_caller_is_late(late: bool, timeout_s: float, alive: bool) -> None:
    """One that had a millisecond left learns nothing of the node; a broken connection says it at once."""
    node = object.__new__(LocalNode)
    node.alive = True
    node._pool = Pool(late)  # type: ignore[assignment]
    with pytest.raises(UnavailableError), node._channel(timeout_s):
        pass
    assert node.alive is alive
