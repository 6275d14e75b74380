"""What both daemons do around their work: logging, signals, uvloop, the exit code."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import signal
import sys
from collections.abc import Awaitable, Callable

import uvloop

log = logging.getLogger("kvpool")

YOUNG_OBJECTS = 5000


def _allow_files() -> None:
    """Open as many files as the system lets us: connections are files, the usual soft limit is for old programs."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run_daemon(main: Callable[[asyncio.Event], Awaitable[int]], log_level: str, notes: list[str]) -> int:
    """Run ``main(stop)`` on uvloop until it returns. Returns the exit code.

    SIGTERM and SIGINT set ``stop``, and SIGHUP, which says that the terminal is gone, unless it is ignored (nohup).
    """
    logging.basicConfig(
        level=log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for note in notes:
        log.info("%s", note)

    _allow_files()
    # What we keep by the million has no cycles. A full collection would walk all of it and stand still for
    # as long as half a second; young objects, where the cycles are, are still looked through.
    gc.set_threshold(YOUNG_OBJECTS, 1 << 30, 1 << 30)

    async def supervised() -> int:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
        for number in (signal.SIGTERM, signal.SIGINT, *hangup):
            loop.add_signal_handler(number, stop.set)
        return await main(stop)

    return uvloop.run(supervised())
