"""A store that counts what is done with it, for /metrics."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from kvpool.tiers.store import BlockStore, StoreError, StoreMissingError
from kvpool.tiers.wrapper import OPERATIONS, StoreWrapper, T


class Measured(NamedTuple):
    """What one kind of operation came to so far. ``bytes`` are those of calls that succeeded; errors are counted, too.

    ``missing``: of the errors, those that say no more than that there is no such file.
    """

    calls: int
    errors: int
    missing: int
    bytes: int
    seconds: float


class MeasuredStore(StoreWrapper):
    """Counts calls, errors, bytes and seconds of each operation. ``clock`` returns seconds."""

    def __init__(self, store: BlockStore, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(store)
        self._clock = clock
        self._lock = threading.Lock()
        self._calls: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._missing: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._seconds: dict[str, float] = dict.fromkeys(OPERATIONS, 0.0)

    def measured(self) -> dict[str, Measured]:
        """Return the figures of every operation; those of a call count when it has ended."""
        with self._lock:
            return {
                name: Measured(
                    self._calls[name], self._errors[name], self._missing[name], self._bytes[name], self._seconds[name]
                )
                for name in OPERATIONS
            }

    def around(self, operation: str, size: int, call: Callable[[], T]) -> T:
        """Make the call and count it."""
        started = self._clock()
        failed = missing = False
        try:
            return call()
        except StoreMissingError:
            failed = missing = True
            raise
        except StoreError:
            failed = True
            raise
        finally:
            took = self._clock() - started
            self.note(operation, 0 if failed else size, took, failed=failed, missing=missing)

    def note(self, operation: str, size: int, seconds: float, *, failed: bool, missing: bool) -> None:
        """Count a call, also one that was made elsewhere."""
        with self._lock:
            self._calls[operation] += 1
            self._errors[operation] += failed
            self._missing[operation] += missing
            self._bytes[operation] += size
            self._seconds[operation] += seconds
