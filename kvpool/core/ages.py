"""When a row was last used: the order of uses has stamps, no times, so some stamps' times are kept."""

from __future__ import annotations

from bisect import bisect_left

MARKS_MAX = 4096
EVERY_S = 1.0


class Ages:
    """Times of some stamps: to the second for the last half hour at least, coarser further back."""

    def __init__(self) -> None:
        self._stamps: list[int] = []
        self._times: list[float] = []

    def note(self, stamp: int, now: float) -> None:
        """Remember that ``stamp`` was the newest one at ``now``. Call it every now and then, in order."""
        if self._times and (stamp == self._stamps[-1] or now - self._times[-1] < EVERY_S):
            return
        self._stamps.append(stamp)
        self._times.append(now)
        if len(self._stamps) >= MARKS_MAX:
            half = MARKS_MAX // 2
            self._stamps[:half] = self._stamps[:half:2]
            self._times[:half] = self._times[:half:2]

    def when(self, stamp: int, now: float) -> float:
        """Return a time by which a row with this stamp had been used; ``now`` if no earlier one is known."""
        i = bisect_left(self._stamps, stamp)
        return self._times[i] if i < len(self._times) else now
