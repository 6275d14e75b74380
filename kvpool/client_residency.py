"""Tells the master what an engine holds in its own memory, from a thread: nobody waits for it.

The thread keeps the whole set, so that a master that was restarted, or missed something, is told everything
anew. It is news for people and routers: where it piles up, all of it is forgotten, and the engine is said to
hold nothing but what comes after.
"""

from __future__ import annotations

import logging
import secrets
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from kvpool.errors import InvalidArgumentError, KVPoolError
from kvpool.model import DIGEST_BYTES, KEY_BYTES, Namespace, split_keys
from kvpool.processes import start_thread
from kvpool.rpc.v1.master_pb2 import MasterFrame, MasterFrameReply, ResidencyRequest

log = logging.getLogger(__name__)

Ask = Callable[[MasterFrame, bytes, float], MasterFrameReply]
"""Frame, payload and seconds to the master's answer; raises KVPoolError."""

KEYS_PER_REPORT = 2048
CHANGES_MAX = 1 << 20
"""Keys that may wait for the thread."""

BLOCKS_MAX = 1 << 20
"""Of one namespace: as many as the master keeps."""

ASK_S = 1.0
GATHER_S = 0.1
"""What comes within this time goes in one report."""

ALIVE_S = 2.0
"""How often an engine with nothing to say says that it is there."""

BYE_S = 0.2


@dataclass(slots=True)
class _Changes:
    """What has happened in one namespace: the last word on each key, after ``cleared``."""

    cleared: bool = False
    held: dict[bytes, bool] = field(default_factory=dict)

    def requests(self, namespace: bytes) -> Iterator[tuple[ResidencyRequest, bytes]]:
        """Yield it as reports of bounded size."""
        gone = [key for key, held in self.held.items() if not held]
        keys = gone + [key for key, held in self.held.items() if held]
        for start in range(0, max(len(keys), 1), KEYS_PER_REPORT):
            part = keys[start : start + KEYS_PER_REPORT]
            removed = min(max(len(gone) - start, 0), len(part))
            cleared = self.cleared and not start
            yield ResidencyRequest(namespace=namespace, cleared=cleared, removed=removed), b"".join(part)


class ResidencyReporter:
    """What one engine process holds: ``report`` queues, a thread (from the first report on) tells the master."""

    def __init__(self, ask: Ask, name: str) -> None:
        self._master = ask
        self._engine = f"{name}@{socket.gethostname()}"[:256]
        self.owner = secrets.randbits(63) | 1
        """Names this process to the master."""
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._changes: dict[bytes, _Changes] = {}
        self._waiting = 0  # keys in _changes, at most
        self._sequence = 0
        self._anew = True  # the master must be told everything
        self._held: dict[bytes, set[bytes]] = {}
        self.dropped = 0
        """How often too much waited, and was forgotten."""
        self._thread: threading.Thread | None = None

    def report(self, namespace: Namespace | bytes, added: bytes, removed: bytes, *, cleared: bool) -> None:
        """Queue a change: cleared first, then removed, then added. Raises InvalidArgumentError for odd lengths."""
        digest = namespace.digest if isinstance(namespace, Namespace) else namespace
        if len(digest) != DIGEST_BYTES:
            raise InvalidArgumentError("namespace", f"a digest has {DIGEST_BYTES} bytes, not {len(digest)}")
        for name, keys in (("added", added), ("removed", removed)):
            if len(keys) % KEY_BYTES:
                raise InvalidArgumentError(name, f"must be {KEY_BYTES} bytes a block, not {len(keys)}")
        with self._lock:
            changes = self._changes.setdefault(digest, _Changes())
            if cleared:
                changes.cleared, changes.held = True, {}
            changes.held.update(dict.fromkeys(split_keys(removed), False))
            changes.held.update(dict.fromkeys(split_keys(added), True))
            self._waiting += (len(added) + len(removed)) // KEY_BYTES
            if self._waiting > CHANGES_MAX:
                self.dropped += 1
                self._waiting = 0
                self._changes = {known: _Changes(cleared=True) for known in {*self._changes, *self._held}}
            if self._thread is None and not self._closing.is_set():
                self._thread = start_thread(self._run, "kvpool-residency")
        self._wake.set()

    def close(self) -> None:
        """End the thread, after a word to the master if it is there."""
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(2 * BYE_S)

    # ---- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing.is_set():
            self._wake.wait(ALIVE_S)
            self._wake.clear()
            self._closing.wait(GATHER_S)
            try:
                again = self._tell(self._take())
            except KVPoolError as exc:
                log.debug("what the engine holds is not reported: %s", exc)
                again = True
            if again and self._anew:
                self._closing.wait(ALIVE_S)  # twice in a row: the master cannot take it at the moment
            self._anew = again
            if again:
                self._wake.set()
        try:
            self._ask(ResidencyRequest(bye=True), b"", BYE_S)
        except KVPoolError as exc:
            log.debug("the end of the engine is not reported: %s", exc)

    def _take(self) -> dict[bytes, _Changes]:
        with self._lock:
            changes, self._changes, self._waiting = self._changes, {}, 0
        for namespace, change in changes.items():
            held = self._held.setdefault(namespace, set())
            if change.cleared:
                held.clear()
            held.difference_update(key for key, there in change.held.items() if not there)
            held.update(key for key, there in change.held.items() if there)
            while len(held) > BLOCKS_MAX:
                held.pop()
        return changes

    def _tell(self, changes: dict[bytes, _Changes]) -> bool:
        """Report; returns whether the master wants everything anew. Raises KVPoolError."""
        if self._anew:
            requests: Iterable[tuple[ResidencyRequest, bytes]] = self._everything()
        elif changes:
            requests = (request for namespace, change in changes.items() for request in change.requests(namespace))
        else:
            requests = [(ResidencyRequest(), b"")]
        return any(self._ask(request, keys, ASK_S) for request, keys in requests)

    def _everything(self) -> Iterator[tuple[ResidencyRequest, bytes]]:
        yield ResidencyRequest(first=True), b""
        for namespace, held in self._held.items():
            keys = iter(held)
            while part := b"".join(islice(keys, KEYS_PER_REPORT)):
                yield ResidencyRequest(namespace=namespace), part

    def _ask(self, request: ResidencyRequest, keys: bytes, timeout_s: float) -> bool:
        self._sequence += 1
        request.owner, request.engine, request.sequence = self.owner, self._engine, self._sequence
        return self._master(MasterFrame(residency=request), keys, timeout_s).residency.again
