"""Stores that fail, hang, tear and dawdle, on command: what the file tier is tested against."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection

from kvpool.tiers.store import BlockStore, FileName, StoreError
from kvpool.tiers.wrapper import OPERATIONS, StoreWrapper, T

HANG_S_MAX = 60.0
"""A hanging call ends by itself after so long, so that a test that forgot it ends as well."""


class FaultyStore(StoreWrapper):
    """Does what it is told to do wrong; otherwise what the store does.

    ``operations`` are names of ``wrapper.OPERATIONS``, all of them by default.
    """

    def __init__(self, store: BlockStore) -> None:
        super().__init__(store)
        self.hanging = 0
        """Calls that hang at this moment."""
        self.calls: list[str] = []
        """Every operation that was asked for, in order."""
        self._changed = threading.Condition()
        self._errors: dict[str, StoreError] = {}
        self._once: dict[str, deque[StoreError]] = {}
        self._hangs: dict[str, threading.Event] = {}
        self._torn: deque[int] = deque()

    def fail(self, error: StoreError | None = None, operations: Collection[str] = OPERATIONS) -> None:
        """Raise this error in every call from now on, until ``heal``."""
        for operation in operations:
            self._errors[operation] = error or StoreError("Input/output error")

    def fail_once(self, error: StoreError, operation: str) -> None:
        """Raise this error in one of the next calls of an operation; several are raised one after the other."""
        self._once.setdefault(operation, deque()).append(error)

    def hang(self, operations: Collection[str] = OPERATIONS) -> threading.Event:
        """Let calls from now on wait for the event that is returned; they fail when it is set."""
        event = threading.Event()
        for operation in operations:
            self._hangs[operation] = event
        return event

    def tear(self, kept_bytes: int) -> None:
        """Let the next write be acknowledged with only so many of its bytes in the file, as if the power had gone."""
        self._torn.append(kept_bytes)

    def heal(self) -> None:
        """Do everything right again; calls that hang still hang until their event is set."""
        self._errors.clear()
        self._once.clear()
        self._hangs.clear()
        self._torn.clear()

    def wait_hanging(self, calls: int = 1, timeout_s: float = 10.0) -> None:
        """Wait until so many calls hang. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.hanging >= calls, timeout_s):
                raise TimeoutError(f"{self.hanging} calls hang, not {calls}")

    def write(self, name: FileName, data: memoryview) -> None:
        """Write all of it, or less if the next write is to be torn."""
        kept = self._torn.popleft() if self._torn else len(data)
        super().write(name, data[:kept])

    def around(self, operation: str, size: int, call: Callable[[], T]) -> T:
        """Hang, fail, or make the call."""
        del size
        self.calls.append(operation)
        event = self._hangs.get(operation)
        if event is not None:
            self._hang(event)
            raise StoreError(f"{operation}: it hung")
        errors = self._once.get(operation)
        error = errors.popleft() if errors else self._errors.get(operation)
        if error is not None:
            raise error
        return call()

    def _hang(self, event: threading.Event) -> None:
        with self._changed:
            self.hanging += 1
            self._changed.notify_all()
        try:
            event.wait(HANG_S_MAX)
        finally:
            with self._changed:
                self.hanging -= 1
                self._changed.notify_all()


class SlowStore(StoreWrapper):
    """A store far away: ``latency_s`` for each call, and a line of ``bytes_per_s`` that all calls share."""

    def __init__(
        self,
        store: BlockStore,
        *,
        latency_s: float = 0.0,
        bytes_per_s: float = 0.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(store)
        self._latency_s = latency_s
        self._bytes_per_s = bytes_per_s
        self._sleep = sleep
        self._line = threading.Lock()

    def around(self, operation: str, size: int, call: Callable[[], T]) -> T:
        """Wait as long as the way takes, then make the call."""
        del operation
        self._sleep(self._latency_s)
        if size and self._bytes_per_s:
            with self._line:
                self._sleep(size / self._bytes_per_s)
        return call()
