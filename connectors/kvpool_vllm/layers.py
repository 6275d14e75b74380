"""Loads that the running step's forward needs, a few layers ahead of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvpool.processes import start_thread
from kvpool_vllm import LOGGER_NAME

if TYPE_CHECKING:
    from kvpool_vllm.metadata import LoadJob

logger = logging.getLogger(LOGGER_NAME)

Fetch = Callable[["LoadJob", int, tuple[int, int], float], int]
"""(job, its leading blocks that are still wanted, layers, seconds) -> leading blocks that arrived."""


class LayerLoads:
    """Loads layer after layer, never further ahead of the computing one than told.

    A block that misses a layer is given up, with all behind it: the forward goes on over whatever is in
    there, and the step's output of its request is thrown away once the block is reported. What is given
    up is never written again, so each fetch is waited for; its own deadline ends it.
    """

    def __init__(self, jobs: list[LoadJob], layers: int, ahead: int, timeout_s: float, fetch: Fetch) -> None:
        """``timeout_s``: what all fetches together may take; time spent waiting for the forward is not counted."""
        self._jobs = jobs
        self._layers = layers
        self._ahead = ahead
        self._left_s = timeout_s
        self._fetch = fetch
        self._changed = threading.Condition()
        self._computing = 0
        self._ready = 0
        self._ended = False
        self._arrived = [job.blocks for job in jobs]
        self._thread = start_thread(self._run, "kvpool-layers")
        if self._thread is None:  # blocks are computed instead
            self._arrived = [0] * len(jobs)
            self._ended = True

    def wait(self, layer: int) -> None:
        """Wait until this layer is there, or given up."""
        with self._changed:
            self._computing = max(self._computing, layer)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ready > layer or self._ended)

    def finish(self) -> list[tuple[LoadJob, int]]:
        """Return each job with its leading blocks that arrived in all layers."""
        with self._changed:
            self._computing = self._layers
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended)
        if self._thread is not None:
            self._thread.join()
        return list(zip(self._jobs, self._arrived, strict=True))

    def _run(self) -> None:
        done = False
        try:
            while self._ready < self._layers:
                with self._changed:
                    self._changed.wait_for(lambda: self._ready <= self._computing + self._ahead)
                    # The first layer alone: the forward waits for it.
                    end = min(self._layers, self._computing + self._ahead + 1) if self._ready else 1
                self._load((self._ready, end))
                with self._changed:
                    self._ready = end
                    self._changed.notify_all()
            done = True
        except Exception:  # whatever it was, it is a miss: the forward waits for this thread
            logger.exception("loading layer %d failed, its blocks are computed instead", self._ready)
        finally:
            with self._changed:
                if not done:
                    self._arrived = [0] * len(self._jobs)
                self._ended = True
                self._changed.notify_all()

    def _load(self, layers: tuple[int, int]) -> None:
        for i, job in enumerate(self._jobs):
            if not self._arrived[i]:
                continue
            if self._left_s <= 0:
                self._arrived[i] = 0
                continue
            started = time.monotonic()
            self._arrived[i] = self._fetch(job, self._arrived[i], layers, self._left_s)
            self._left_s -= time.monotonic() - started
