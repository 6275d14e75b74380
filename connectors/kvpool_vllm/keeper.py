"""What the scheduler's side says to the master of prompts that move between engines, on a thread of its own."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvpool.client_transfers import Claimed, TransferPart, TransferState
from kvpool_vllm import LOGGER_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvpool.client import Client

logger = logging.getLogger(LOGGER_NAME)

RENEW_EVERY_S = 3.0
"""An open or claimed transfer lives 10 s unless the master is told otherwise; two renewals may be lost."""

POLL_FIRST_S = 0.004
POLL_MAX_S = 0.064
"""How often a transfer that has not been opened is asked for."""

LOOK_EVERY_S = 1.0
"""How often it is looked whether a transfer has been opened that nobody here waits for any more."""

UNWANTED_MAX = 512
"""So many of those are remembered, the latest."""

SILENCES_MAX = 2
"""Without an answer of the master in a row: nobody knows of the transfer then, unless its request says where it is."""


@dataclass(eq=False, slots=True)
class Outgoing:
    """A prompt that this engine computes for another one."""

    transfer: int
    names: list[bytes]
    """Of all its blocks, the partial one too where that can be moved."""
    own_names: int
    """So many of the last are of no use to anybody else."""
    private: bool = False
    """Nobody else knows any of them."""
    asked: bool = False
    """The master was, or is about to be, asked to open it."""
    opened: bool = False
    """It has: what is of use to this transfer alone will be dropped with it. Set by the keeper's thread."""
    refused: bool = False
    """It did not; set by the keeper's thread."""
    jobs: set[int] = field(default_factory=set)
    """Saves that some rank has not reported."""
    planned: bool = False
    """There will be no more of them."""

    def tail_is_done(self, request: Any, computed: int, end: int, block_tokens: int) -> bool:
        """Whether the partial block that follows ``end`` is computed with so many tokens: nobody writes behind it."""
        whole, prompt = request.num_prompt_tokens // block_tokens, request.num_prompt_tokens
        return bool(end == whole < len(self.names) and computed >= prompt and request.max_tokens == 1)


@dataclass(eq=False, slots=True)
class Incoming:
    """A prompt that another engine computes, or has computed, for this one; for several requests, if samples of one."""

    transfer: int
    told: Claimed | None = None
    """Where it is by the request. Anybody may have written that: no node is asked that the master does not name, unless
    there is no master."""
    tokens: int | None = None
    """Of the prompt, where the other engine says it."""
    found: Claimed | None = None
    """Where it is; set by the keeper's thread."""
    answered: bool = False
    """It is found, or was asked for in vain; set by the keeper's thread."""
    new: bool = True
    """The answer was not waited for yet."""
    give_up_at: float | None = None
    gone: str = ""
    """Why it will not come; set by the keeper's thread."""
    silences: int = 0
    """Questions in a row to which the master gave no answer."""
    requests: int = 0

    @property
    def settled(self) -> bool:
        """Whether there is nothing to wait for any more."""
        return self.found is not None or bool(self.gone)


class Keeper:
    """Asks the pool for what the scheduler's thread may not wait for, in order, and keeps transfers alive."""

    def __init__(self, client: Client, name: str) -> None:
        """``name``: this engine's, for people."""
        self._client = client
        self._name = name
        self._consumer = f"{name[:200]}#{secrets.token_hex(4)}"
        """Another engine may have the same name."""
        self._changed = threading.Condition()
        self._news = threading.Event()
        self._calls: deque[Callable[[], object]] = deque()
        self._busy = False
        self._produced: dict[int, tuple[int, float] | None] = {}  # (ttl_ms, until when) of those that are to be sealed
        self._consumed: set[int] = set()
        self._claiming: dict[int, tuple[Incoming, float, float]] = {}  # (.., when next, pause then)
        self._unwanted: dict[int, float] = {}  # until when; if they are opened after all, they are ended
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kvpool-transfers", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Return how many transfers are kept alive, or have something left to be said of them."""
        with self._changed:
            return len(self._calls) + self._busy + len(self._produced.keys() | self._consumed | self._claiming.keys())

    def open(self, outgoing: Outgoing, parts: Sequence[TransferPart], nodes: Sequence[str]) -> None:
        """Open a transfer, and renew it until it is sealed or ended."""

        def call() -> None:
            try:
                outgoing.opened = self._client.transfers.open(outgoing.transfer, parts, nodes, self._name)
            finally:
                outgoing.refused = not outgoing.opened

        with self._changed:
            self._produced[outgoing.transfer] = None
            self._call(call)

    def claim(self, incoming: Incoming) -> None:
        """Ask for a transfer until it is there, and renew it from then on, until it is ended."""
        with self._changed:
            self._unwanted.pop(incoming.transfer, None)
            self._claiming[incoming.transfer] = (incoming, 0.0, POLL_FIRST_S)
            self._changed.notify()

    def seal(self, transfer: int, ttl_ms: int) -> None:
        """Say that all is stored; the other engine has so much time to come for it."""
        with self._changed:
            self._produced[transfer] = ttl_ms, time.monotonic() + ttl_ms / 1000
            self._call(lambda: self._seal(transfer))

    def end(self, transfer: int) -> None:
        """End a transfer that was opened here."""
        with self._changed:
            self._produced.pop(transfer, None)
            self._call(lambda: self._client.transfers.end([transfer]))

    def leave(self, transfer: int, until_s: float, *, back: bool) -> None:
        """End a transfer that was claimed here; one that was never seen, whenever it is opened within ``until_s``.

        ``back``: it was not loaded, and another engine may come for it.
        """
        with self._changed:
            self._consumed.discard(transfer)
            claimed = self._claiming.pop(transfer, None)
            if claimed is not None and claimed[0].gone != "ended":
                self._unwanted[transfer] = time.monotonic() + until_s
                if len(self._unwanted) > UNWANTED_MAX:
                    del self._unwanted[next(iter(self._unwanted))]
            self._call(lambda: self._client.transfers.end([transfer], self._consumer, back=back))

    def close(self) -> None:
        """End what was not handed over, and stop."""
        with self._changed:
            produced, consumed = sorted(self._produced), sorted(self._consumed | self._claiming.keys())
            self._produced.clear()
            self._consumed.clear()
            self._claiming.clear()
            if produced:
                self._call(lambda: self._client.transfers.end(produced))
            if consumed:
                self._call(lambda: self._client.transfers.end(consumed, self._consumer, back=True))
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=5)

    def wait_for_news(self, timeout_s: float) -> None:
        """Wait until something is known of some transfer that is being claimed."""
        if self._news.wait(timeout_s):
            self._news.clear()

    def wait_for_answer(self, incoming: Incoming, timeout_s: float) -> None:
        """Wait until this transfer was asked for."""
        until = time.monotonic() + timeout_s
        while not incoming.answered and (left_s := until - time.monotonic()) > 0:
            self.wait_for_news(left_s)

    def _call(self, call: Callable[[], object]) -> None:
        self._calls.append(call)
        self._changed.notify()

    def _run(self) -> None:
        renew_at = look_at = time.monotonic() + RENEW_EVERY_S
        while True:
            with self._changed:
                self._busy = False
                looks = [look_at] if self._unwanted else []
                wake_at = min([renew_at, *looks, *(due for _, due, _ in self._claiming.values())])
                self._changed.wait_for(
                    lambda: self._calls or self._closed or any(not due for _, due, _ in self._claiming.values()),
                    max(0.0, wake_at - time.monotonic()),
                )
                if self._closed and not self._calls:
                    return
                calls, self._busy = list(self._calls), True
                self._calls.clear()
                now = time.monotonic()
                due = [entry for entry in self._claiming.values() if entry[1] <= now]
            for call in calls:
                self._try(call)
            for incoming, _, pause_s in due:
                self._try(self._claim, incoming, pause_s)
            if self._unwanted and time.monotonic() >= look_at:
                look_at = time.monotonic() + LOOK_EVERY_S
                self._try(self._end_unwanted)
            if time.monotonic() >= renew_at:
                renew_at = time.monotonic() + RENEW_EVERY_S
                with self._changed:
                    held = sorted(self._produced.keys() | self._consumed)
                    unsealed = [transfer for transfer, sealing in self._produced.items() if sealing is not None]
                for transfer in unsealed:
                    self._try(self._seal, transfer)
                if held:
                    self._try(self._client.transfers.renew, held, self._consumer)

    @staticmethod
    def _try(call: Callable[..., object], *arguments: object) -> None:
        """Whatever becomes of it, the others are said, too: nobody else says these things."""
        try:
            call(*arguments)
        except Exception:  # whatever it was, the thread must live
            logger.exception("transfers")

    def _end_unwanted(self) -> None:
        with self._changed:
            now = time.monotonic()
            self._unwanted = {transfer: until for transfer, until in self._unwanted.items() if until > now}
            unwanted = list(self._unwanted)
        over = set(self._client.transfers.end(unwanted, self._consumer, back=True))
        with self._changed:
            for transfer in unwanted:
                if transfer not in over:
                    self._unwanted.pop(transfer, None)

    def _seal(self, transfer: int) -> None:
        """Seal a transfer, and again with the next renewal if nobody answers."""
        with self._changed:
            sealing = self._produced.get(transfer)
        if sealing is None:
            return  # ended meanwhile
        ttl_ms, until = sealing
        answer = self._client.transfers.seal(transfer, ttl_ms)
        if answer is not None or time.monotonic() > until:
            with self._changed:
                self._produced.pop(transfer, None)

    def _claim(self, incoming: Incoming, pause_s: float) -> None:
        found = self._client.transfers.claim(incoming.transfer, self._consumer)
        there = found.state in {TransferState.OPEN, TransferState.SEALED}
        incoming.silences = incoming.silences + 1 if found.state is TransferState.NO_MASTER else 0
        if there and incoming.found is None:
            incoming.found = found
        elif found.state is TransferState.ENDED:
            incoming.gone = "ended"
        elif incoming.silences >= SILENCES_MAX and incoming.found is None:
            incoming.found = incoming.told
            incoming.gone = "" if incoming.told is not None else "no_master"
        first, incoming.answered = not incoming.answered, True
        if first or incoming.settled:
            self._news.set()
        with self._changed:
            claiming = self._claiming.get(incoming.transfer)
            if claiming is None or claiming[0] is not incoming:
                return  # ended meanwhile; what was claimed just now is ended by the call that waits
            if there:
                del self._claiming[incoming.transfer]
                self._consumed.add(incoming.transfer)
            else:
                due = time.monotonic() + pause_s
                self._claiming[incoming.transfer] = (incoming, due, min(2 * pause_s, POLL_MAX_S))
