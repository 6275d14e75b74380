"""Threads that the system may refuse to start: that costs what they were for, for a while, and raises nothing later."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from kvpool.processes import begin_thread

T = TypeVar("T")


def started_threads(count: int, name: str) -> ThreadPoolExecutor:
    """Return threads that are all there, so that ``submit`` has none to start. Raises RuntimeError, nothing started."""
    threads = ThreadPoolExecutor(count, name, begin_thread)
    together = threading.Barrier(count)
    try:
        for _ in range(count):
            threads.submit(together.wait)  # none is idle before the last one has been started
    except RuntimeError:
        together.abort()
        threads.shutdown(wait=False)
        raise
    return threads


class Threads:
    """So many threads, all started when there is something to do for the first time; if they cannot be, at the next.

    Not one after the other: where one is refused, an executor raises and has queued the work all the same.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, work: Callable[..., T], /, *arguments: Any, **named: Any) -> Future[T]:
        """Have a thread do ``work``. Raises RuntimeError, nothing queued, where there is none, or none any more."""
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{self._name} is closed")
            if self._threads is None:
                self._threads = started_threads(self._count, self._name)
            return self._threads.submit(work, *arguments, **named)

    def begin(self, work: Callable[[], None], instead: Callable[[], None]) -> Future[None]:
        """Have a thread do ``work``, or call ``instead``, now, where there is none; never both.

        ``instead`` is called while the exception that says so is handled.
        """
        try:
            return self.submit(work)
        except RuntimeError:
            instead()
            refused: Future[None] = Future()
            refused.set_result(None)
            return refused

    def close(self, *, wait: bool = True) -> None:
        """Cancel what no thread has begun, and wait for the rest."""
        with self._lock:
            self._closed = True
        if self._threads is not None:
            self._threads.shutdown(wait=wait, cancel_futures=True)
