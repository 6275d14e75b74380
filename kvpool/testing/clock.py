"""Time that passes when a test says so."""

from __future__ import annotations


class ManualClock:
    """A clock that stands still until it is moved; call it for the time in seconds."""

    def __init__(self, now: float = 0.0) -> None:
        self._now = now

    def __call__(self) -> float:
        """Return the time."""
        return self._now

    def advance(self, seconds: float) -> float:
        """Let time pass and return the new time."""
        return self.move_to(self._now + seconds)

    def move_to(self, now: float) -> float:
        """Let it be ``now``; time never goes back."""
        if now < self._now:
            raise ValueError(f"time does not go back: {now} is before {self._now}")
        self._now = now
        return now
