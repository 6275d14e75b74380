"""The circuit breaker: when it opens, who may probe, how it closes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.core.breaker import BACKOFF_MAX, Breaker, BreakerState

INTERVAL = 1.0


def opened(failures: int = 2, now: float = 0.0) -> Breaker:
    breaker = Breaker(failures, INTERVAL)
    for _ in range(failures):
        breaker.failure(now)
    return breaker


@pytest.mark.parametrize("failures", [1, 2, 5])
def test_opens_after_failures_in_a_row(failures: int) -> None:
    """The last failure of the row opens it, and says so once."""
    breaker = Breaker(failures, INTERVAL)
    assert [breaker.failure(0.0) for _ in range(failures + 2)] == [False] * (failures - 1) + [True, False, False]
    assert not breaker.closed
    assert breaker.opened == 1


def test_a_success_in_between_begins_the_row_anew() -> None:
    """Single failures among successes never open it."""
    breaker = Breaker(2, INTERVAL)
    for _ in range(10):
        breaker.failure(0.0)
        breaker.success()
    assert breaker.closed


def test_one_probe_at_a_time_after_the_interval() -> None:
    """Nobody probes early; of those who ask when it is due, one does."""
    breaker = opened()
    assert breaker.probe_at == INTERVAL
    assert not breaker.begin_probe(0.99)
    assert [breaker.begin_probe(1.0) for _ in range(3)] == [True, False, False]
    assert not breaker.closed


def test_probe_that_succeeds_closes_it() -> None:
    """Calls go through again, and it takes a whole row to open it."""
    breaker = opened()
    breaker.begin_probe(1.0)
    assert breaker.success()
    assert breaker.closed
    assert breaker.probe_at is None
    assert not breaker.failure(1.0)
    assert breaker.closed


def test_probes_that_fail_come_at_longer_intervals() -> None:
    """The interval doubles up to a limit, and returns to the first after a real call has succeeded."""
    breaker, now, waits = opened(), 0.0, []
    for _ in range(6):
        due = breaker.probe_at
        assert due is not None
        waits.append(due - now)
        now = due
        assert breaker.begin_probe(now)
        breaker.failure(now)
    assert waits == [1, 2, 4, BACKOFF_MAX, BACKOFF_MAX, BACKOFF_MAX]
    assert breaker.begin_probe(now + BACKOFF_MAX)
    breaker.success()
    breaker.success()
    breaker.failure(100.0)
    breaker.failure(100.0)
    assert breaker.probe_at == 101.0


def test_reopened_right_after_a_probe_it_waits_longer() -> None:
    """A probe that succeeds while real calls fail does not make it flap at the first interval."""
    breaker = opened()
    breaker.begin_probe(1.0)
    breaker.success()
    breaker.failure(1.0)
    breaker.failure(1.0)
    assert breaker.probe_at == 3.0


def test_jitter_puts_the_probe_off() -> None:
    """By half an interval at most."""
    breaker = Breaker(1, INTERVAL)
    breaker.failure(0.0, jitter=1.0)
    assert breaker.probe_at == 1.5


def test_late_answers_of_older_calls_change_nothing_while_open() -> None:
    """Only a probe closes it, and no late failure puts the probe off."""
    breaker = opened()
    assert not breaker.success()
    assert not breaker.failure(0.9)
    assert breaker.state is BreakerState.OPEN
    assert breaker.begin_probe(1.0)


def test_probe_without_an_answer_is_given_up() -> None:
    """A prober that died does not keep it half open for good."""
    breaker = opened()
    assert breaker.begin_probe(1.0)
    due = breaker.probe_at
    assert due is not None
    assert breaker.begin_probe(due)


@given(
    failures=st.integers(1, 4),
    events=st.lists(
        st.tuples(st.sampled_from(["success", "failure", "probe"]), st.floats(0, 5), st.floats(0, 1)), max_size=60
    ),
)
def test_whatever_happens(failures: int, events: list[tuple[str, float, float]]) -> None:
    """It opens by a full row of failures only and closes by a probe only, and a probe is always due some time."""
    breaker, now, row = Breaker(failures, INTERVAL), 0.0, 0
    for name, pause, jitter in events:
        now += pause
        before = breaker.state
        if name == "success":
            breaker.success()
            row = 0
        elif name == "failure":
            breaker.failure(now, jitter)
            row = row + 1 if before is BreakerState.CLOSED else 0
        else:
            due = breaker.probe_at
            assert breaker.begin_probe(now) == (due is not None and now >= due)
        after = breaker.state
        if before is BreakerState.CLOSED and after is not BreakerState.CLOSED:
            assert name == "failure"
            assert row == failures
            row = 0
        if before is not BreakerState.CLOSED and after is BreakerState.CLOSED:
            assert (name, before) == ("success", BreakerState.HALF_OPEN)
            row = 0
        assert row < failures
        if not breaker.closed:
            due = breaker.probe_at
            assert due is not None
            assert due <= now + 1.5 * BACKOFF_MAX * INTERVAL
