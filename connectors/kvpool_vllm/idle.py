"""How long an engine that has nothing to compute waits in its steps, so that it does not take a core from others."""

from __future__ import annotations

import time

STEPS_BEFORE = 2
"""Empty steps in a row before the first in which its scheduler waits: what was computed may be on its way back."""

FIRST_S = 0.0005
MAX_S = 0.005

IN_STEP_MAX_S = 0.001
"""Where all ranks of data parallelism compute in step: an empty step of one is waited for by all."""

GROWTH = 0.05
"""Of the time that was waited already: so much later it may be seen that the wait is over."""


class Idle:
    """The empty steps of one engine, in its scheduler's thread."""

    def __init__(self, most_s: float = MAX_S) -> None:
        self._most_s = most_s
        self._empty = 0
        self._since = 0.0

    @property
    def quiet(self) -> bool:
        """Whether nothing that was computed can be under way any more."""
        return self._empty > STEPS_BEFORE

    def wait_s(self, *, empty: bool, begins: bool) -> float:
        """Return how long to wait in this step, 0 for not at all.

        ``empty``: nothing is computed, and something of ours is waited for; ``begins``: from this step on.
        """
        if not empty:
            self._empty = 0
            return 0.0
        now = time.monotonic()
        if begins or not self._empty:
            self._since = now
        self._empty += 1
        return min(self._most_s, max(FIRST_S, GROWTH * (now - self._since)))
