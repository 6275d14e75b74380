"""Circuit breaker: who has failed several times in a row is not asked again until a probe has succeeded.

The pattern is M. Nygard's ("Release It!"). Plain data: time comes in as ``now`` (seconds of any monotonic
clock), randomness as ``jitter``, and the caller does the probing.
"""

from __future__ import annotations

from enum import Enum

BACKOFF_MAX = 8
"""A probe comes at most this many intervals after the one before it."""


class BreakerState(Enum):
    """What a call may do."""

    CLOSED = "closed"
    """Calls go through."""
    OPEN = "open"
    """Calls are refused until a probe is due."""
    HALF_OPEN = "half_open"
    """Calls are refused; one probe is under way."""


class Breaker:
    """One breaker.

    Every call that ends is told to it, as ``success`` or as ``failure``; one that missed its deadline has
    failed. A call that began while the breaker was closed may end when it is open: that changes nothing.
    """

    __slots__ = ("_backoff", "_due", "_failures", "_failures_max", "_interval_s", "opened", "state")

    def __init__(self, failures: int, probe_interval_s: float) -> None:
        """Open after ``failures`` (at least 1) in a row; probe after ``probe_interval_s``, then at longer intervals."""
        self._failures_max = failures
        self._interval_s = probe_interval_s
        self._failures = 0
        self._backoff = 1
        self._due = 0.0
        self.state = BreakerState.CLOSED
        self.opened = 0
        """How often it has opened."""

    def __repr__(self) -> str:
        """Show the state and what leads to the next."""
        return f"<Breaker {self.state.value} failures {self._failures} backoff {self._backoff}>"

    @property
    def closed(self) -> bool:
        """Whether calls go through."""
        return self.state is BreakerState.CLOSED

    @property
    def calm(self) -> bool:
        """Whether a success would change nothing."""
        return self.closed and not self._failures and self._backoff == 1

    @property
    def probe_at(self) -> float | None:
        """When the next probe is due; None while calls go through."""
        return None if self.closed else self._due

    def begin_probe(self, now: float) -> bool:
        """Return whether the caller is to probe now, and then tell how it ended.

        One probe at a time; one whose prober says nothing for an interval is given up.
        """
        if self.closed or now < self._due:
            return False
        self.state = BreakerState.HALF_OPEN
        self._due = now + self._interval_s * self._backoff
        return True

    def success(self) -> bool:
        """Count a call that was answered in time; returns whether this closed the breaker."""
        self._failures = 0
        if self.state is BreakerState.HALF_OPEN:
            self.state = BreakerState.CLOSED
            return True
        if self.closed:
            self._backoff = 1  # a probe alone does not prove that real calls get through
        return False

    def failure(self, now: float, jitter: float = 0.0) -> bool:
        """Count a call that was not answered in time; returns whether this opened the breaker.

        ``jitter`` from 0 to 1 puts the next probe off by up to half, so that many clients do not probe as one.
        """
        if self.state is BreakerState.OPEN:
            return False
        self._failures += 1
        if self.closed and self._failures < self._failures_max:
            return False
        opened = self.closed
        self.opened += opened
        self.state = BreakerState.OPEN
        self._due = now + self._interval_s * self._backoff * (1 + jitter / 2)
        self._backoff = min(2 * self._backoff, BACKOFF_MAX)
        self._failures = 0
        return opened
