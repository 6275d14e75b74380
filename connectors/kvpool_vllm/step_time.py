"""How long the scheduler's thread may wait for answers of the pool in one step: all questions together."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

STEP_S = 0.002


class StepTime:
    """What is left of a step's time."""

    def __init__(self) -> None:
        self._left_s = STEP_S
        self._idle = False

    def begin(self, *, idle: bool) -> None:
        """Allow some waiting again; in an ``idle`` engine even for answers that were waited for before."""
        self._left_s = STEP_S
        self._idle = idle

    @property
    def left(self) -> bool:
        """Whether this step may ask any more."""
        return self._left_s > 0

    def for_answer(self, *, new: bool) -> float:
        """Return how long an answer may be waited for; not again if it is not ``new`` and others have work."""
        return max(0.0, self._left_s) if new or self._idle else 0.0

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Count what the body takes."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._left_s -= time.monotonic() - started
