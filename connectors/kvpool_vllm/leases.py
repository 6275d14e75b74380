"""Keeps the leases of waiting and running loads alive, off the scheduler's thread."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from kvpool.errors import KVPoolError
from kvpool_vllm import LOGGER_NAME

if TYPE_CHECKING:
    from kvpool.client import Client

logger = logging.getLogger(LOGGER_NAME)

RENEW_EVERY_S = 3.0
"""A lease lives 10 s unless the master is told otherwise; two renewals may be lost."""


class LeaseKeeper:
    """Renews what it holds, and releases what it is told to, on a thread of its own."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._changed = threading.Condition()
        self._held: set[int] = set()
        self._dropped: list[int] = []
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kvpool-leases", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Return how many leases are held or not yet released."""
        with self._changed:
            return len(self._held) + len(self._dropped)

    def hold(self, lease: int) -> None:
        """Renew this lease until it is dropped; 0 is no lease."""
        if lease:
            with self._changed:
                self._held.add(lease)

    def drop(self, lease: int) -> None:
        """Release this lease soon; harmless if it is not held."""
        with self._changed:
            if lease in self._held:
                self._held.remove(lease)
                self._dropped.append(lease)
                self._changed.notify()

    def close(self) -> None:
        """Release everything and stop."""
        with self._changed:
            self._dropped.extend(self._held)
            self._held.clear()
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        closed = False
        renew_at = time.monotonic() + RENEW_EVERY_S
        while not closed:
            with self._changed:
                # By the clock, because a busy engine drops some lease at any moment.
                self._changed.wait_for(lambda: self._dropped or self._closed, max(0.0, renew_at - time.monotonic()))
                dropped, held, closed = list(self._dropped), list(self._held), self._closed
            due = time.monotonic() >= renew_at
            if due:
                renew_at = time.monotonic() + RENEW_EVERY_S
            try:
                if dropped:
                    self._client.release(dropped)
                if due and held:
                    self._client.renew(held)
            except KVPoolError as error:  # leases are a preference, and end by themselves
                logger.debug("leases: %s", error)
            except Exception:  # whatever it was, the thread must live: nobody else renews
                logger.exception("leases")
            with self._changed:
                del self._dropped[: len(dropped)]
