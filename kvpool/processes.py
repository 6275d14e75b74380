"""How other processes of ours are started."""

from __future__ import annotations

import sys
from pathlib import Path


def module_command(module: str) -> list[str]:
    """Return the command that runs a module as a program, with this interpreter.

    It imports nothing that happens to lie in the working directory, unless this process would, too.
    """
    try:
        ours = str(Path.cwd()) in sys.path
    except OSError:  # it was deleted
        ours = False
    return [sys.executable, *([] if ours or "" in sys.path else ["-P"]), "-m", module]
