"""Threads that the system may refuse to start: that costs what they were for, for a while, and raises nothing later."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

log = logging.getLogger(__name__)


def start_thread(work: Callable[[], object], name: str) -> threading.Thread | None:
    """Start a daemon thread; None where there can be none now: whoever needs it asks again."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as exc:
        log.warning("%s: %s", name, exc)
        return None
    return thread


def started_threads(count: int, name: str) -> ThreadPoolExecutor:
    """Return threads that are all there, so that ``submit`` has none to start. Raises RuntimeError, nothing started."""
    threads = ThreadPoolExecutor(count, name)
    together = threading.Barrier(count)
    try:
        for _ in range(count):
            threads.submit(together.wait)  # none is idle before the last one has been started
    except RuntimeError:
        together.abort()
        threads.shutdown(wait=False)
        raise
    return threads
