"""Short sleeps in place of yielding, while the engine's processes wait for each other and nothing is computed.

An engine whose requests all wait for KV goes on stepping. Of its two processes, the one that waits for the other
yields in a loop, which takes a core from whoever computes that KV on the same machine, and the GIL from our copies.
"""

from __future__ import annotations

import importlib
import logging
import time
from typing import TYPE_CHECKING, Any

from kvpool_vllm import LOGGER_NAME

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(LOGGER_NAME)

MODULE = "vllm.distributed.device_communicators.shm_broadcast"
NAME = "sched_yield"
"""What it calls in its loop."""

PART = 4
"""A nap is this part of what an empty step waits."""

FROM_S = 0.004
"""Where steps wait for less, the wait may be over at any moment, and who naps is late for it."""

_nap_s = 0.0


def nap_for(wait_s: float) -> None:
    """From now on, nap instead of yielding, where steps wait so long; 0 for yielding as usual."""
    global _nap_s
    _nap_s = wait_s / PART if wait_s >= FROM_S else 0.0


def napping(usual: Callable[[], Any]) -> Callable[[], None]:
    """Return ``usual``, in place of which there may be a nap."""

    def nap_or_yield() -> None:
        if _nap_s:
            time.sleep(_nap_s)
        else:
            usual()

    return nap_or_yield


def install(name: str = MODULE) -> None:
    """Let this process's loops nap; without effect where the engine waits in another way."""
    try:
        module = importlib.import_module(name)
        usual = getattr(module, NAME)
    except (ImportError, AttributeError):
        logger.debug("this engine has no loop to nap in")
        return
    if usual.__module__ != __name__:
        setattr(module, NAME, napping(usual))
