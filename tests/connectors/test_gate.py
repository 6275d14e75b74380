"""The gate between loading and computing, with simulated speeds."""

from __future__ import annotations

import random

import pytest

from kvpool_vllm.gate import EXPLORE_EVERY, PREFILL_TOKENS_MIN, SAMPLES_MIN, Gate, LoadCost, StepClock

PREFILL = 1000.0
"""Tokens a second of the simulated engine."""


class Engine:
    """Steps and loads at given speeds."""

    def __init__(self, *, enabled: bool = True) -> None:
        self.gate = Gate(enabled=enabled)
        self.now = 100.0

    def prefill(self, steps: int, tokens: int = 512, speed: float = PREFILL) -> None:
        for _ in range(steps):
            self.gate.step_planned(self.now, tokens)
            self.now += tokens / speed
            self.gate.step_ended(self.now)

    def load(self, tokens: int, speed: float, fixed: float = 0.0, tier: str = "dram") -> bool:
        """Ask, and load if the gate lets us."""
        if not self.gate.allows(tier, tokens):
            return False
        self.gate.loaded(tier, tokens, fixed + tokens / speed)
        return True


@pytest.fixture
def engine() -> Engine:
    one = Engine()
    one.prefill(SAMPLES_MIN)
    return one


def test_nothing_is_skipped_before_loads_were_measured(engine: Engine) -> None:
    """However slow they turn out to be."""
    assert [engine.load(256, PREFILL / 10) for _ in range(SAMPLES_MIN)] == [True] * SAMPLES_MIN
    assert not engine.load(256, PREFILL / 10)


def test_nothing_is_skipped_before_prefill_was_measured() -> None:
    """Steps that only decode, or compute a few prompt tokens, are no measure."""
    engine = Engine()
    engine.prefill(100, tokens=0)
    engine.prefill(100, tokens=PREFILL_TOKENS_MIN - 1)
    assert all(engine.load(256, PREFILL / 100) for _ in range(50))
    assert engine.gate.estimates().keys() == {"dram"}


def test_loads_that_win_are_never_skipped(engine: Engine) -> None:
    """A pool faster than the engine is used for everything."""
    assert all(engine.load(tokens, 10 * PREFILL) for tokens in (64, 256, 1024, 4096) * 20)
    assert engine.gate.counters["gate.skipped"] == 0


def test_loads_that_lose_are_skipped_and_counted(engine: Engine) -> None:
    """All but the first, by which they were measured, and one in so many that is tried."""
    done = [engine.load(256, PREFILL / 2) for _ in range(SAMPLES_MIN + 2 * EXPLORE_EVERY)]
    assert done.count(True) == SAMPLES_MIN + 2
    assert engine.gate.counters == {
        "gate.loaded": SAMPLES_MIN,
        "gate.explored": 2,
        "gate.skipped": 2 * (EXPLORE_EVERY - 1),
        "gate.skipped_tokens": 256 * 2 * (EXPLORE_EVERY - 1),
    }


def test_fixed_cost_gates_short_loads_only(engine: Engine) -> None:
    """A pool with a long way and a wide pipe is worth it for long prompts."""
    for tokens in (128, 2048, 256, 4096, 512):
        engine.gate.loaded("dram", tokens, 0.2 + tokens / (10 * PREFILL))
    assert not engine.gate.allows("dram", 128)
    assert engine.gate.allows("dram", 1024)


def test_tiers_are_judged_apart(engine: Engine) -> None:
    """A slow disk does not keep memory from being used."""
    for _ in range(10):
        engine.load(256, PREFILL / 5, tier="fs")
        engine.load(256, PREFILL * 5, tier="dram")
    assert not engine.gate.allows("fs", 256)
    assert engine.gate.allows("dram", 256)


@pytest.mark.parametrize("enabled", [True, False])
def test_off_lets_everything_through(enabled: bool) -> None:
    """And goes on measuring."""
    engine = Engine(enabled=enabled)
    engine.prefill(SAMPLES_MIN)
    done = [engine.load(256, PREFILL / 5) for _ in range(20)]
    assert all(done) != enabled
    assert engine.gate.estimates()["prefill"] == pytest.approx(PREFILL)


def test_wrong_estimate_heals(engine: Engine) -> None:
    """A pool that was a hundred times too slow for a while is used again after a few loads were tried."""
    while engine.load(256, PREFILL / 100):
        pass
    asked = next(n for n in range(1, 1000) if not _skips(engine, 20 * PREFILL, EXPLORE_EVERY))
    assert asked <= 8
    assert all(engine.load(256, 20 * PREFILL) for _ in range(50))


def _skips(engine: Engine, speed: float, loads: int) -> bool:
    """Ask for some loads; returns whether any was skipped."""
    done = [engine.load(256, speed) for _ in range(loads)]
    return not all(done)


def test_engine_that_gets_slower_uses_the_pool(engine: Engine) -> None:
    """Prefill is measured all the time: what lost yesterday may win today."""
    while engine.load(256, PREFILL / 2):
        pass
    engine.prefill(30, speed=PREFILL / 10)
    assert engine.load(256, PREFILL / 2)


def test_noise_around_an_equal_speed_does_not_break_the_estimate(engine: Engine) -> None:
    """Whatever the noise, the estimate of a load is positive and near what was seen."""
    noise = random.Random(1)
    cost = LoadCost()
    for _ in range(500):
        tokens = noise.choice([128, 256, 512, 4096])
        cost.observe(tokens, tokens / PREFILL * noise.uniform(0.5, 2.0))
        fixed, per_token = cost.parts()
        assert fixed >= 0
        assert per_token >= 0
        assert 0.3 * 256 / PREFILL < cost.seconds(256) < 3 * 256 / PREFILL + 0.8


def test_steps_in_flight_are_timed_once() -> None:
    """Of two steps planned at once, the second has the engine from the end of the first."""
    clock = StepClock()
    clock.planned(0.0, 100)
    clock.planned(0.1, 200)
    assert clock.ended(1.0) == (100, 1.0)
    assert clock.ended(3.0) == (200, 2.0)


def test_idle_time_is_no_step() -> None:
    """An engine that had nothing to do was not slow."""
    clock = StepClock()
    clock.planned(0.0, 100)
    clock.ended(1.0)
    clock.planned(50.0, 100)
    assert clock.ended(51.0) == (100, 1.0)


def test_steps_that_never_end_do_not_pile_up() -> None:
    """What was planned long ago is forgotten rather than paired with the wrong end."""
    clock = StepClock()
    for i in range(1000):
        clock.planned(float(i), 1)
    clock.planned(2000.0, 7)
    seen = []
    while (step := clock.ended(2001.0))[0]:
        seen.append(step)
    assert len(seen) < 100
    assert clock.ended(2002.0) == (0, 0.0)
