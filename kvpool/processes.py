"""How other processes of ours are started, and threads that the system may refuse."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Collection
from pathlib import Path

log = logging.getLogger(__name__)

_refused: set[str] = set()
"""Names of threads whose refusal was said."""


def module_command(module: str) -> list[str]:
    """Return the command that runs a module as a program, with this interpreter.

    It imports nothing that happens to lie in the working directory, unless this process would, too.
    """
    try:
        ours = str(Path.cwd()) in sys.path
    except OSError:  # it was deleted
        ours = False
    return [sys.executable, *([] if ours or "" in sys.path else ["-P"]), "-m", module]


_cpus: set[int] = set()


def run_threads_on(cpus: Collection[int]) -> None:
    """Have threads of ours that start from now on run on these processors, if any are named.

    Else a thread runs where the one that starts it may run, which some engines bind to a single core.
    """
    _cpus.clear()
    _cpus.update(cpus)


def cpu_count() -> int:
    """Return on how many processors our threads may run."""
    return len(_cpus or os.sched_getaffinity(0))


def begin_thread() -> None:
    """Take a thread of ours to the processors that it may run on: the first that it does."""
    if _cpus:
        with contextlib.suppress(OSError):  # they are no longer ours: it stays where it is
            os.sched_setaffinity(0, _cpus)


def start_thread(work: Callable[..., object], name: str, *arguments: object) -> threading.Thread | None:
    """Start a daemon thread; None where there can be none now: whoever needs it asks again, which is said once."""

    def run() -> None:
        begin_thread()
        work(*arguments)

    thread = threading.Thread(target=run, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as exc:
        if name not in _refused:
            _refused.add(name)
            log.warning("%s: %s", name, exc)
        return None
    _refused.discard(name)
    return thread
