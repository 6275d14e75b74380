"""Lookups that the scheduler's thread never waits for longer than a moment."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvpool_vllm import LOGGER_NAME
from kvpool_vllm.leases import LeaseKeeper
from kvpool_vllm.step_time import StepTime

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvpool.client import Client, Lookup
    from kvpool.client_lookup import Also
    from kvpool.model import Namespace

logger = logging.getLogger(LOGGER_NAME)

READ_AHEAD_MAX = 8
"""Of read-aheads, under way at once."""

GIVE_UP = 3
"""A lookup that has not answered after this many of its own timeouts is a miss."""


@dataclass(slots=True)
class Ask:
    """One question: how much of a chain is there, behind the ``known`` blocks that the engine holds itself.

    The answer is kept, because the engine asks in every step in which it cannot place the request.
    """

    known: int
    pending: Future[Lookup] | None
    give_up_at: float
    new: bool = True
    """Not yet waited for."""
    lookup: Lookup | None = None
    """The answer; None where there was none."""
    worth: int | None = None
    """Leading blocks of the answer that are worth a load, once somebody has judged it."""

    @property
    def settled(self) -> bool:
        """Whether there is an answer, or none to come."""
        return self.pending is None

    @property
    def prefix(self) -> int:
        """Leading blocks that can be had, the known ones included."""
        if self.lookup is None:
            return self.known
        return self.lookup.prefix if self.worth is None else self.worth

    @property
    def lease(self) -> int:
        """The lease that came with the answer, or 0."""
        return self.lookup.lease if self.lookup is not None else 0


class Lookups:
    """Asks on the client's threads, and keeps the leases that come with answers."""

    def __init__(self, client: Client, lookup_timeout_ms: int, counters: Counter[str]) -> None:
        """``counters``: where "lookup.*" is counted."""
        self.leases = LeaseKeeper(client)
        self._client = client
        self._give_up_s = GIVE_UP * lookup_timeout_ms / 1000
        self._counters = counters
        self.step = StepTime()
        self._ahead: list[Future[Lookup]] = []

    def ask(
        self,
        namespace: Namespace,
        chain: list[bytes],
        known: int,
        also: Sequence[Also] = (),
        *,
        prefetch: bool = False,
    ) -> Ask:
        """Ask; ``chain`` must not change any more. ``also``: the other groups of a hybrid model."""
        started = time.monotonic()
        with self.step.taken():
            try:
                pending = self._client.lookup_async(
                    namespace, chain, known_prefix=known, lease=True, also=also, prefetch=prefetch
                )
            except RuntimeError as error:  # no thread can be started, or the client is closed: settle makes it a miss
                pending = Future()
                pending.set_exception(error)
        self._counters["lookup.asked"] += 1
        return Ask(known, pending, started + self._give_up_s)

    def read_ahead(self, namespace: Namespace, chain: list[bytes], known: int) -> None:
        """Have what only files hold of a chain brought into memory; nobody waits for that, or hears of it.

        Left out while several are under way: lookups that somebody waits for take the same threads.
        """
        self._ahead = [pending for pending in self._ahead if not pending.done()]
        if len(self._ahead) >= READ_AHEAD_MAX:
            return
        with contextlib.suppress(RuntimeError):  # as above
            self._ahead.append(self._client.lookup_async(namespace, chain, known_prefix=known, prefetch=True))
            self._counters["lookup.read_ahead"] += 1

    def settle(self, ask: Ask) -> bool:
        """Whether the answer is there; waits for it within this step's time, and once if others have work."""
        if ask.pending is None:
            return True
        wait_s = self.step.for_answer(new=ask.new)
        ask.new = False
        started = time.monotonic()
        try:
            with self.step.taken():
                ask.lookup = ask.pending.result(timeout=wait_s)
            self.leases.hold(ask.lookup.lease)
        except FutureTimeoutError:
            if started < ask.give_up_at:
                return False
            self._abandon(ask)
        except Exception as error:  # whatever it was, it is a miss
            level = logging.DEBUG if self._counters["lookup.errors"] else logging.WARNING  # once: it may be every one
            logger.log(level, "lookup failed, the request is computed: %r", error)
            self._counters["lookup.errors"] += 1
        ask.pending = None
        self._counters["lookup.hits" if ask.prefix > ask.known else "lookup.misses"] += 1
        return True

    def drop(self, ask: Ask) -> None:
        """Forget a question; gives back the lease that it brought, or may still bring."""
        self._abandon(ask)
        self.leases.drop(ask.lease)

    def close(self) -> None:
        """Release all leases."""
        self.leases.close()

    def _abandon(self, ask: Ask) -> None:
        if ask.pending is not None:
            self._counters["lookup.abandoned"] += 1
            ask.pending.add_done_callback(self._release_late)
            ask.pending = None

    def _release_late(self, future: Future[Lookup]) -> None:
        if not future.cancelled() and future.exception() is None:
            lease = future.result().lease
            self.leases.hold(lease)
            self.leases.drop(lease)
