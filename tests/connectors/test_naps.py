"""Short sleeps of an engine's processes that wait for each other."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

from kvpool_vllm import naps

if TYPE_CHECKING:
    from collections.abc import Iterator


class Engine(ModuleType):
    """A module with a loop that yields; ``done`` is what was done in it."""

    def __init__(self, done: list[str]) -> None:
        super().__init__("made_up_engine")

        def sched_yield() -> None:
            done.append("yield")

        self.sched_yield = sched_yield


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    done: list[str] = []
    monkeypatch.setitem(sys.modules, "made_up_engine", Engine(done))
    monkeypatch.setattr(naps.time, "sleep", lambda seconds: done.append(f"nap {seconds}"))
    yield done
    naps.nap_for(0.0)


def test_loops_nap_only_while_told(done: list[str]) -> None:
    """As long as steps wait, for a part of that; otherwise the engine does what it always did."""
    engine = sys.modules["made_up_engine"]
    naps.install("made_up_engine")
    engine.sched_yield()
    naps.nap_for(0.004)
    engine.sched_yield()
    naps.nap_for(0.0)
    engine.sched_yield()
    assert done == ["yield", f"nap {0.004 / naps.PART}", "yield"]


def test_who_may_be_needed_at_any_moment_does_not_nap(done: list[str]) -> None:
    """Naps are for long waits: a load of some milliseconds is over before, and is not made longer."""
    engine = sys.modules["made_up_engine"]
    naps.install("made_up_engine")
    naps.nap_for(naps.FROM_S / 2)
    engine.sched_yield()
    assert done == ["yield"]


def test_loops_are_taken_once(done: list[str]) -> None:
    """Several connectors in a process do not stand in each other's way."""
    engine = sys.modules["made_up_engine"]
    naps.install("made_up_engine")
    first = engine.sched_yield
    naps.install("made_up_engine")
    assert engine.sched_yield is first
    engine.sched_yield()
    assert done == ["yield"]


def test_an_engine_without_the_loop_is_left_alone(done: list[str]) -> None:
    """One that waits in another way needs nothing of it."""
    naps.install("no_such_engine")
    del sys.modules["made_up_engine"].sched_yield  # type: ignore[attr-defined]
    naps.install("made_up_engine")
    assert not hasattr(sys.modules["made_up_engine"], "sched_yield")
    assert not done
