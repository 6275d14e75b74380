"""Work for threads that the system may refuse to start: then it counts as failed, and the engine goes on."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import ThreadPoolExecutor


def begin(threads: ThreadPoolExecutor, work: Callable[[], None], instead: Callable[[], None]) -> Future[None]:
    """Have a thread do ``work``, or call ``instead``, now, where none can be started; never both.

    ``instead`` is called while the exception that says so is handled. ``work`` must not raise. The future can be
    cancelled while no thread has begun.
    """
    done: Future[None] = Future()
    mine = threading.Lock()  # whoever gets it decides

    def run() -> None:
        if mine.acquire(blocking=False) and done.set_running_or_notify_cancel():
            try:
                work()
            finally:
                done.set_result(None)

    try:
        threads.submit(run)
    except RuntimeError:  # which may have been queued all the same, for a thread that is there
        if mine.acquire(blocking=False) and done.set_running_or_notify_cancel():
            instead()
            done.set_result(None)
    return done
