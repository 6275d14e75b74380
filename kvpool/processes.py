"""How other processes of ours are started, and threads that the system may refuse."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
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


def start_thread(work: Callable[..., object], name: str, *arguments: object) -> threading.Thread | None:
    """Start a daemon thread; None where there can be none now: whoever needs it asks again, which is said once."""
    thread = threading.Thread(target=work, name=name, args=arguments, daemon=True)
    try:
        thread.start()
    except RuntimeError as exc:
        if name not in _refused:
            _refused.add(name)
            log.warning("%s: %s", name, exc)
        return None
    _refused.discard(name)
    return thread
