"""What an engine waits in steps in which it has nothing to compute."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvpool_vllm import idle
from kvpool_vllm.idle import FIRST_S, GROWTH, IN_STEP_MAX_S, MAX_S, STEPS_BEFORE, Idle

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def pass_s(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let time pass only when told."""
    now = 1000.0

    def advance(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(idle.time, "monotonic", lambda: now)
    return advance


def empty_steps(steps: Idle, count: int) -> list[float]:
    return [steps.wait_s(empty=True, begins=False) for _ in range(count)]


def test_only_behind_empty_steps_is_it_quiet(pass_s: Callable[[float], None]) -> None:
    """What was computed may still be on its way back in the first ones; a step with work begins anew."""
    steps = Idle()
    for _ in range(2):
        assert empty_steps(steps, STEPS_BEFORE) == [FIRST_S] * STEPS_BEFORE
        assert not steps.quiet
        assert empty_steps(steps, 1) == [FIRST_S]
        assert steps.quiet
        assert steps.wait_s(empty=False, begins=False) == 0.0
        assert not steps.quiet
        pass_s(60.0)


def test_the_wait_grows_with_what_was_waited(pass_s: Callable[[float], None]) -> None:
    """A short transfer is noticed at once, a long one a little later; but never much later."""
    steps = Idle()
    seen = []
    for _ in range(20):
        seen += empty_steps(steps, 1)
        pass_s(0.01)
    assert seen == sorted(seen)
    assert seen[0] == FIRST_S
    assert seen[6] == pytest.approx(GROWTH * 0.06)
    assert seen[-1] == MAX_S


def test_what_begins_is_waited_for_anew(pass_s: Callable[[float], None]) -> None:
    """A load is noticed at once though its request was waited for long."""
    steps = Idle()
    empty_steps(steps, 1)
    pass_s(30.0)
    assert empty_steps(steps, 1) == [MAX_S]
    assert steps.wait_s(empty=True, begins=True) == FIRST_S
    assert empty_steps(steps, 1) == [FIRST_S]


def test_where_all_ranks_compute_in_step_it_waits_a_moment_at_most(pass_s: Callable[[float], None]) -> None:
    """Each empty step of one is waited for by the others, which may have work."""
    steps = Idle(IN_STEP_MAX_S)
    empty_steps(steps, 1)
    pass_s(30.0)
    assert empty_steps(steps, 1) == [IN_STEP_MAX_S]
