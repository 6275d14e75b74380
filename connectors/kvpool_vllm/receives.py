"""Loads of what another engine is storing meanwhile, on threads of their own: some of them wait for long."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kvpool.client_threads import Threads
from kvpool.client_transfers import TransferState

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from kvpool.client import Client
    from kvpool_vllm.metadata import LoadJob

RECEIVES_MAX = 32
"""At once; others wait for their turn, as they would for their producer."""

SILENCES_MAX = 2
"""Without an answer of the master in a row."""


class Receives:
    """Runs receiving loads, and tells each whether to wait on."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._threads = Threads(RECEIVES_MAX, "kvpool-receive")
        self._lock = threading.Lock()
        self._unwanted: set[str] = set()
        self._closed = False

    def start(self, load: Callable[[], None], instead: Callable[[], None]) -> Future[None]:
        """Have a thread run ``load``, or call ``instead`` where none can be started."""
        return self._threads.begin(load, instead)

    def unwanted(self, request_id: str) -> None:
        """Nobody wants this request any more: its load ends at its next look."""
        with self._lock:
            self._unwanted.add(request_id)

    def ended(self, job: LoadJob) -> None:
        """Forget a load."""
        with self._lock:
            self._unwanted.discard(job.request_id)

    def alive(self, job: LoadJob) -> Callable[[], bool]:
        """Return what says, after a while in which nothing came, whether anything may come."""
        silences = 0

        def ask() -> bool:
            nonlocal silences
            if self._closed or job.request_id in self._unwanted:
                return False
            state = self._client.transfers.claim(job.transfer).state
            silences = silences + 1 if state is TransferState.NO_MASTER else 0
            return state is TransferState.OPEN or 0 < silences < SILENCES_MAX

        return ask

    def close(self) -> None:
        """End the loads that wait, soon, and drop those that no thread has begun."""
        self._closed = True
        self._threads.close()
