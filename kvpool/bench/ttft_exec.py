"""Becomes another program: ``python -m kvpool.bench.ttft_exec PROGRAM ARGS``.

A child that has asked to end with its parent keeps that wish when it becomes another program, whose own
environment then needs nothing of ours.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Become the program that the command line names."""
    try:
        os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606 -- no shell is wanted
    except OSError as error:
        sys.exit(f"{sys.argv[1]}: {error.strerror}")


if __name__ == "__main__":
    main()
