"""Load or recompute: a load that would take longer than computing the same tokens is skipped.

Both sides are measured in this engine, in tokens: bytes per token do not change while it runs. What was
seen counts the less the older it is. Nothing is skipped before both sides have been seen several times,
and now and then a load that would be skipped is tried, so that a wrong estimate heals.
"""

from __future__ import annotations

from collections import Counter, deque

KEEP = 0.8
"""Weight of the past against one new sample."""

KEEP_PROVEN_WRONG = 0.3
"""The same where a load that would have been skipped was quicker than computing."""

SAMPLES_MIN = 3
"""Fewer loads of a tier, or steps, tell nothing: the first ones meet cold caches."""

EXPLORE_EVERY = 16
"""One in so many loads that would be skipped is tried."""

PREFILL_TOKENS_MIN = 64
"""A step with fewer prompt tokens is ruled by its fixed cost."""

STEPS_MAX = 64
"""More steps planned and not ended than any engine keeps in flight: what is planned has lost its pairing."""

SPREAD_MIN = 0.05
"""Relative variance of the sizes seen below which they say nothing about the fixed cost."""


class LoadCost:
    """Seconds of a load as a fixed part plus a part per token: least squares over what was seen, the older the less."""

    def __init__(self) -> None:
        self.samples = 0
        self._weight = self._tokens = self._seconds = self._squares = self._products = 0.0

    def observe(self, tokens: int, seconds: float, keep: float = KEEP) -> None:
        """Count a load."""
        self.samples += 1
        self._weight = keep * self._weight + 1
        self._tokens = keep * self._tokens + tokens
        self._seconds = keep * self._seconds + seconds
        self._squares = keep * self._squares + tokens * tokens
        self._products = keep * self._products + tokens * seconds

    def parts(self) -> tuple[float, float]:
        """Return (fixed seconds, seconds per token); call it after a load was seen."""
        variance = self._squares * self._weight - self._tokens**2
        if variance > SPREAD_MIN * self._tokens**2:
            slope = (self._products * self._weight - self._tokens * self._seconds) / variance
            fixed = (self._seconds - slope * self._tokens) / self._weight
            if slope >= 0 and fixed >= 0:
                return fixed, slope
        # All of one size, or too noisy for a line that makes sense: in proportion.
        return 0.0, self._seconds / self._tokens

    def seconds(self, tokens: int) -> float:
        """Return what a load of so many tokens takes."""
        fixed, per_token = self.parts()
        return fixed + per_token * tokens


class PrefillSpeed:
    """Prompt tokens per second of this engine, from steps that computed some; decoding beside them is included."""

    def __init__(self) -> None:
        self.samples = 0
        self._tokens = self._seconds = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """Count a step."""
        self.samples += 1
        self._tokens = KEEP * self._tokens + tokens
        self._seconds = KEEP * self._seconds + seconds

    def seconds(self, tokens: int) -> float:
        """Return what computing so many tokens takes; call it after a step was seen."""
        return tokens * self._seconds / self._tokens

    @property
    def per_second(self) -> float:
        """Tokens a second; 0 before any step was seen."""
        return self._tokens / self._seconds if self._seconds else 0.0


class StepClock:
    """How long steps take, in an engine that may keep several in flight: they end in the order they were planned."""

    def __init__(self) -> None:
        self._planned: deque[tuple[float, int]] = deque()
        self._ended_at = 0.0

    def planned(self, now: float, prefill_tokens: int) -> None:
        """Begin a step."""
        if len(self._planned) >= STEPS_MAX:
            self._planned.clear()
        self._planned.append((now, prefill_tokens))

    def ended(self, now: float) -> tuple[int, float]:
        """End the oldest step; returns its prompt tokens and the seconds it had the engine for itself."""
        if not self._planned:
            return 0, 0.0
        begun_at, tokens = self._planned.popleft()
        seconds = now - max(begun_at, self._ended_at)
        self._ended_at = now
        return tokens, seconds


class Gate:
    """Decides for one engine; ``tier`` is whatever names where blocks come from."""

    def __init__(self, *, enabled: bool) -> None:
        """A gate that is not ``enabled`` measures, and lets every load through."""
        self._enabled = enabled
        self._clock = StepClock()
        self._prefill = PrefillSpeed()
        self._loads: dict[str, LoadCost] = {}
        self._refused: Counter[str] = Counter()
        self.counters: Counter[str] = Counter()
        """Loads ``gate.loaded``, ``gate.skipped``, ``gate.explored``; ``gate.skipped_tokens``."""

    # ---- measuring -------------------------------------------------------------------------------

    def step_planned(self, now: float, prefill_tokens: int) -> None:
        """A step was planned that computes so many prompt tokens."""
        self._clock.planned(now, prefill_tokens)

    def step_ended(self, now: float) -> None:
        """The oldest planned step has ended."""
        tokens, seconds = self._clock.ended(now)
        if tokens >= PREFILL_TOKENS_MIN and seconds > 0:
            self._prefill.observe(tokens, seconds)

    def loaded(self, tier: str, tokens: int, seconds: float) -> None:
        """A whole load has ended; ``seconds`` without the time that it waited for others."""
        if tokens <= 0 or seconds <= 0:
            return
        cost = self._loads.setdefault(tier, LoadCost())
        wrong = self._loses(tier, tokens) and seconds < self._prefill.seconds(tokens)
        cost.observe(tokens, seconds, KEEP_PROVEN_WRONG if wrong else KEEP)

    # ---- deciding --------------------------------------------------------------------------------

    def allows(self, tier: str, tokens: int) -> bool:
        """Return whether to load; ask once a load, for every answer is counted."""
        if not self.loses(tier, tokens):
            self.counters["gate.loaded"] += 1
            return True
        self._refused[tier] += 1
        if self._refused[tier] % EXPLORE_EVERY == 0:
            self.counters["gate.explored"] += 1
            return True
        self.counters["gate.skipped"] += 1
        self.counters["gate.skipped_tokens"] += tokens
        return False

    def loses(self, tier: str, tokens: int) -> bool:
        """Return whether a load would be skipped, or tried as an exception; counts nothing."""
        return self._enabled and self._loses(tier, tokens)

    def estimates(self) -> dict[str, float]:
        """Return tokens a second: ``prefill``, and each tier that was seen; 0 for a tier with no time per token."""
        found = {"prefill": self._prefill.per_second} if self._prefill.samples else {}
        for tier, cost in self._loads.items():
            _, per_token = cost.parts()
            found[tier] = 1 / per_token if per_token else 0.0
        return found

    def _loses(self, tier: str, tokens: int) -> bool:
        cost = self._loads.get(tier)
        if cost is None or cost.samples < SAMPLES_MIN or self._prefill.samples < SAMPLES_MIN:
            return False
        return cost.seconds(tokens) > self._prefill.seconds(tokens)
