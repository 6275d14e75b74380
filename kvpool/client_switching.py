"""How soon threads that wait for the GIL get it while bytes move."""

from __future__ import annotations

import os
import sys
import threading

SWITCH_S = 1e-4
HELD_SWITCH_S = 5e-4
"""Long enough for some dozens of small blocks: each time that the GIL goes to and fro costs as much as ten of them."""


class _Interval:
    """Python's switch interval, which is the process's: set while anybody wants a shorter one, and put back then."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted: list[float] = []
        self._usual_s = 0.0

    def want(self, interval_s: float) -> None:
        with self._lock:
            if not self._wanted:
                self._usual_s = sys.getswitchinterval()
            self._wanted.append(interval_s)
            self._set()

    def leave(self, interval_s: float) -> None:
        with self._lock:
            self._wanted.remove(interval_s)
            self._set()

    def _set(self) -> None:
        sys.setswitchinterval(min([self._usual_s, *self._wanted]))

    def after_fork(self) -> None:
        """Begin anew in a forked child: no transfer goes on there, and nobody lets go of the lock."""
        if self._wanted:
            sys.setswitchinterval(self._usual_s)
        self._lock, self._wanted = threading.Lock(), []


_interval = _Interval()
os.register_at_fork(after_in_child=_interval.after_fork)


class Switching:
    """While bytes move, lets threads that wait for the GIL have it after this time instead of Python's 5 ms."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s

    def __enter__(self) -> None:
        """Begin a transfer."""
        _interval.want(self._interval_s)

    def __exit__(self, *exc_info: object) -> None:
        """End a transfer."""
        _interval.leave(self._interval_s)


quick_switching = Switching(SWITCH_S)
"""For copies that are dozens of C calls that give the GIL up: beside a thread that computes in Python each of them
would wait a whole interval to get it back."""

held_switching = Switching(HELD_SWITCH_S)
"""For copies of small blocks, which keep it."""
