"""Waiting on a loop for what its tasks do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

T = 20.0


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + T
    while not condition():
        assert time.monotonic() < end, what
        await asyncio.sleep(0.005)
