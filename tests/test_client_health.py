"""Whom a client may ask: refusals, and the thread that probes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from kvpool.client_health import BreakerOpenError, Guard, Health
from kvpool.client_peers import Peers
from kvpool.errors import FrameError, InvalidArgumentError, OverloadedError, UnavailableError
from kvpool.model import NodeAddress

PROBE_S = 0.01
T = 10.0


class Other:
    """The other end: answers or does not."""

    def __init__(self) -> None:
        self.error: Exception | None = UnavailableError("gone")
        self.probes = 0
        self.probed = threading.Event()

    def probe(self) -> None:
        self.probes += 1
        self.probed.set()
        if self.error is not None:
            raise self.error


@pytest.fixture
def health() -> Iterator[Health]:
    one = Health(2, PROBE_S)
    yield one
    one.close()


def fail(guard: Guard, error: Exception) -> None:
    with pytest.raises(type(error)), guard.call():
        raise error


def wait_closed(guard: Guard) -> None:
    deadline = time.monotonic() + T
    while not guard.closed:
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("error", [UnavailableError("gone"), FrameError("garbage")])
def test_calls_are_refused_after_failures_until_a_probe_succeeds(health: Health, error: Exception) -> None:
    """Refused calls are counted, and never reach the other end; one that answers again is asked again."""
    other = Other()
    guard = health.guard("b", other.probe)
    assert health.counters() == {}
    fail(guard, error)
    fail(guard, error)
    for _ in range(3):
        with pytest.raises(BreakerOpenError), guard.call():
            pytest.fail("the call went through")
    assert other.probed.wait(T)
    assert not guard.closed
    assert health.counters() == {"breaker.open.b": 1, "breaker.opened.b": 1, "breaker.rejected.b": 3}
    other.error = None
    wait_closed(guard)
    with guard.call():
        pass
    assert health.counters()["breaker.open.b"] == 0


def test_an_answer_that_refuses_is_an_answer(health: Health) -> None:
    """So it ends a row of failures, and a probe that is refused has succeeded."""
    other = Other()
    guard = health.guard("b", other.probe)
    for _ in range(5):
        fail(guard, UnavailableError("gone"))
        fail(guard, InvalidArgumentError("x", "must not"))
    assert guard.closed
    other.error = InvalidArgumentError("x", "must not")
    fail(guard, UnavailableError("gone"))
    fail(guard, UnavailableError("gone"))
    wait_closed(guard)
    assert other.probes


def test_full_queues_and_slow_answers_say_nothing(health: Health) -> None:
    """They neither open a breaker nor end a row of failures."""
    guard = health.guard("b", Other().probe)
    for _ in range(10):
        fail(guard, OverloadedError("full"))
    assert guard.closed
    fail(guard, UnavailableError("gone"))
    fail(guard, OverloadedError("full"))
    with guard.call(quick_s=-1.0):
        pass
    fail(guard, UnavailableError("gone"))
    assert not guard.closed


def test_thread_ends_when_all_are_closed_and_comes_back(health: Health) -> None:
    """A pool that is well costs nothing."""
    for _ in range(2):
        other = Other()
        guard = health.guard("b", other.probe)
        fail(guard, UnavailableError("gone"))
        fail(guard, UnavailableError("gone"))
        assert health.troubled
        other.error = None
        wait_closed(guard)
        deadline = time.monotonic() + T
        while health.troubled:
            assert time.monotonic() < deadline
            time.sleep(0.001)


def test_each_is_left_alone_for_itself(health: Health) -> None:
    """One that fails does not keep others from being asked."""
    bad, good = health.guard("bad", Other().probe), health.guard("good", Other().probe)
    fail(bad, UnavailableError("gone"))
    fail(bad, UnavailableError("gone"))
    with good.call():
        pass
    assert (bad.closed, good.closed) == (False, True)


def test_counts_of_a_name_never_fall(health: Health) -> None:
    """A node that is back at another address has a new breaker: what its old one counted stays counted."""
    for _ in range(2):
        guard = health.guard("b", Other().probe)
        fail(guard, UnavailableError("gone"))
        fail(guard, UnavailableError("gone"))
        for _ in range(3):
            fail(guard, BreakerOpenError(""))
    counters = health.counters()
    assert counters["breaker.opened.b"] == 2
    assert counters["breaker.rejected.b"] == 6


def test_a_node_that_moves_is_not_missed_where_it_was(health: Health) -> None:
    """However often, and back again too: only where it was seen last counts, and only what failed is forgotten."""
    places = [NodeAddress("b", "127.0.0.1", port) for port in (1, 2)]
    peers = Peers(health, 0.1)
    for moves in range(4):
        peer = peers.at(places[moves % 2])
        assert peer.usable
        assert peers.unusable() == set()
        assert health.counters().get("breaker.open.b", 0) == 0
        fail(peer.guard, UnavailableError("gone"))
        fail(peer.guard, UnavailableError("gone"))
        assert peers.unusable() == {peer.address.place}
        counts = {"breaker.open.b": 1, "breaker.opened.b": moves + 1, "breaker.rejected.b": 0}
        assert health.counters() == counts
    well = peers.at(places[0])
    peers.at(places[1])
    assert peers.at(places[0]) is well
    deadline = time.monotonic() + T
    while health.troubled:
        assert time.monotonic() < deadline, "somebody still probes"
        time.sleep(0.001)
    peers.close()
