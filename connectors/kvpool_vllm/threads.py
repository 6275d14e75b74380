"""Threads for loads and saves, which the system may refuse: then work counts as failed, and the engine goes on."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

from kvpool.client_threads import started_threads

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import ThreadPoolExecutor


class Threads:
    """So many threads, all started when there is something to do for the first time; if they cannot be, at the next.

    Not one after the other: where one is refused, ``submit`` raises and has queued the work all the same.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._closed = False

    def begin(self, work: Callable[[], None], instead: Callable[[], None]) -> Future[None]:
        """Have a thread do ``work``, or call ``instead``, now, where there is none; never both.

        ``instead`` is called while the exception that says so is handled.
        """
        try:
            with self._lock:
                if self._closed:
                    raise RuntimeError(f"{self._name} is closed")
                if self._threads is None:
                    self._threads = started_threads(self._count, self._name)
                return self._threads.submit(work)
        except RuntimeError:
            instead()
            refused: Future[None] = Future()
            refused.set_result(None)
            return refused

    def close(self) -> None:
        """Cancel what no thread has begun, and wait for the rest."""
        with self._lock:
            self._closed = True
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
