"""Whom a client may ask: one circuit breaker for each node and one for the master, and the thread that probes.

A call to somebody who has failed several times in a row is refused at once. No caller ever probes: a
thread does, which lives while some breaker is open.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection

from kvpool.core.breaker import Breaker
from kvpool.errors import FrameError, KVPoolError, OverloadedError, UnavailableError
from kvpool.processes import start_thread

log = logging.getLogger(__name__)


class BreakerOpenError(UnavailableError):
    """Nobody was asked: the other end has failed several times in a row, and no probe has succeeded since."""


_FAILURES = (UnavailableError, FrameError)
_NO_SIGN = (UnavailableError, FrameError, OverloadedError)
"""Exceptions that are no answer; being full, here or there, is no failure either."""

START_AGAIN_S = 1.0
"""When a thread that could not be started is tried again."""


class _Call:
    """Tells a guard how the body of a ``with`` ended. A class, because every lookup passes through one."""

    __slots__ = ("_begun", "_guard", "_quick_s")

    def __init__(self, guard: Guard, quick_s: float) -> None:
        self._guard = guard
        self._quick_s = quick_s

    def __enter__(self) -> None:
        self._begun = time.monotonic()

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        self._guard.ended(exc, quick=time.monotonic() - self._begun <= self._quick_s)


class Guard:
    """The breaker of one other end, called ``name`` in the log and in the counters. Thread-safe."""

    def __init__(self, health: Health, name: str, probe: Callable[[], None], breaker: Breaker) -> None:
        self.name = name
        self.rejected = 0
        """Calls refused."""
        self.breaker = breaker
        self._health = health
        self._probe = probe
        self._lock = threading.Lock()

    @property
    def closed(self) -> bool:
        """Whether calls go through."""
        return self.breaker.closed

    def check(self) -> None:
        """Raise BreakerOpenError, and count it, unless calls go through."""
        if not self.breaker.closed:
            self.rejected += 1
            if not self._health.watching:
                self._health.opened()
            raise BreakerOpenError(f"{self.name} has failed several times in a row")

    def call(self, quick_s: float = math.inf) -> _Call:
        """Refuse a call, or let it through and count how it ends: for ``with``. Raises BreakerOpenError.

        An answer that took longer than ``quick_s`` says nothing about calls that have less time.
        """
        self.check()
        return _Call(self, quick_s)

    def ended(self, exc: BaseException | None, *, quick: bool) -> None:
        """Count a call that has ended, with an exception or without."""
        if exc is None or (isinstance(exc, KVPoolError) and not isinstance(exc, _NO_SIGN)):
            if quick and not self.breaker.calm:
                self._answered()
        elif isinstance(exc, _FAILURES):
            self._failed()

    def _failed(self) -> None:
        with self._lock:
            opened = self.breaker.failure(time.monotonic(), random.random())  # noqa: S311 -- spreads probes
        if opened:
            log.warning("%s does not answer; it is left alone until it does", self.name)
            self._health.opened()

    def _answered(self) -> None:
        with self._lock:
            closed = self.breaker.success()
        if closed:
            log.warning("%s answers again", self.name)

    def probe_if_due(self, now: float) -> None:
        """Probe, in the caller's time."""
        with self._lock:
            due = self.breaker.begin_probe(now)
        if due:
            try:
                with _Call(self, math.inf):
                    self._probe()
            except KVPoolError as exc:
                log.debug("probe of %s: %s", self.name, exc)
            except Exception:  # whatever it was, the thread must live: nobody else probes
                log.exception("probe of %s", self.name)


def _count(guard: Guard, counts: Counter[str]) -> None:
    if guard.breaker.opened:
        counts[f"breaker.open.{guard.name}"] |= not guard.closed
        counts[f"breaker.opened.{guard.name}"] += guard.breaker.opened
        counts[f"breaker.rejected.{guard.name}"] += guard.rejected


class Health:
    """All guards of a client."""

    def __init__(self, failures: int, probe_interval_s: float) -> None:
        """Open a breaker after ``failures`` in a row, probe it every ``probe_interval_s``, later less often."""
        self._failures = failures
        self._interval_s = probe_interval_s
        self._lock = threading.Lock()
        self._guards: list[Guard] = []
        self._forgotten = Counter[str]()
        self._thread: threading.Thread | None = None
        self._refused_at = 0.0  # when no thread could be started, which is tried again
        self._wake = threading.Event()
        self._closed = False

    def guard(self, name: str, probe: Callable[[], None]) -> Guard:
        """Return a new breaker; ``probe`` asks the other end something cheap, and raises when it gets no answer."""
        guard = Guard(self, name, probe, Breaker(self._failures, self._interval_s))
        with self._lock:
            self._guards.append(guard)
        return guard

    def forget(self, guards: Collection[Guard]) -> None:
        """Never probe for these again; what they have counted stays counted."""
        with self._lock:
            for guard in [guard for guard in self._guards if guard in guards]:
                self._guards.remove(guard)
                _count(guard, self._forgotten)
                if guard.breaker.opened:
                    self._forgotten[f"breaker.open.{guard.name}"] = 0

    def counters(self) -> dict[str, int]:
        """Return for each breaker that has ever opened: ``breaker.open.NAME`` (0 or 1), ``opened``, ``rejected``.

        A node that comes back at another address has another breaker of the same name: what both counted is added up.
        """
        with self._lock:
            counts = self._forgotten.copy()
            for guard in self._guards:
                _count(guard, counts)
        return dict(counts)

    @property
    def troubled(self) -> bool:
        """Whether some breaker may be open."""
        return self.watching or self._refused_at > 0

    @property
    def watching(self) -> bool:
        """Whether a thread probes."""
        return self._thread is not None

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        self._wake.set()

    def opened(self) -> None:
        """See to it that somebody probes; only for guards, which ask again as long as they are open."""
        now = time.monotonic()
        with self._lock:
            if self._thread is None and not self._closed and now - self._refused_at >= START_AGAIN_S:
                self._thread = start_thread(self._run, "kvpool-health")
                self._refused_at = 0.0 if self._thread is not None else now
        self._wake.set()

    def _run(self) -> None:
        while not self._closed:
            self._wake.clear()
            with self._lock:
                waiting = [guard for guard in self._guards if not guard.closed]
                if not waiting:
                    self._thread = None
                    return
            dues = [due for guard in waiting if (due := guard.breaker.probe_at) is not None]
            self._wake.wait(max(0.0, min(dues, default=0.0) - time.monotonic()))
            for guard in waiting:
                if not self._closed:
                    guard.probe_if_due(time.monotonic())
