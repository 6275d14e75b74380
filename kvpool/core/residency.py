"""What engines hold in their own memory (tier ``hbm``), as they say themselves: for routing and for people.

Apart from the index on purpose: nobody else can read these blocks, so they are never a hit. Each engine and
namespace has a table of its own, about 40 bytes a block; what ends, or is cleared, is thrown away as a whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import numpy as np

from kvpool.core.columns import zeros
from kvpool.core.keytable import KeyTable, Rows, Words, as_words
from kvpool.errors import InvalidArgumentError, OverloadedError
from kvpool.model import DIGEST_BYTES, KEY_BYTES

TIER = "hbm"
ENGINES_MAX = 1024
NAMESPACES_MAX = 16
"""Of one engine: a hybrid model has a few."""

BLOCKS_MAX = 1 << 20
"""Of one engine and namespace."""

KEYS_MAX = 4096
"""In one report."""

NAME_CHARS_MAX = 256


@dataclass(frozen=True, slots=True)
class Report:
    """An engine's report; its first ``removed`` keys (16 bytes each) are gone, the rest has come."""

    owner: int
    engine: str
    sequence: int
    first: bool
    namespace: bytes
    cleared: bool
    removed: int
    bye: bool
    keys: bytes | memoryview


class _Blocks:
    """Keys of one engine and namespace."""

    def __init__(self) -> None:
        self._table = KeyTable(zeros((BLOCKS_MAX, 2), np.uint64))
        self._free: list[int] = []
        self._used = 0

    def __len__(self) -> int:
        return len(self._table)

    def add(self, keys: Words) -> None:
        self._table.insert(keys, self._take)

    def _take(self, count: int) -> Rows:
        old = [self._free.pop() for _ in range(min(count, len(self._free)))]
        new = min(count - len(old), BLOCKS_MAX - self._used)
        self._used += new
        return np.concatenate((np.array(old, np.int64), np.arange(self._used - new, self._used)))

    def remove(self, keys: Words) -> None:
        rows = self._table.find(keys)
        rows = np.unique(rows[rows >= 0])
        if len(rows):
            self._table.remove(rows)
            self._free += rows.tolist()

    def find(self, keys: Words) -> Rows:
        return self._table.find(keys)


@dataclass(slots=True)
class Engine:
    """An engine process that reports."""

    name: str
    sequence: int
    last_seen: float
    spaces: dict[bytes, _Blocks] = field(default_factory=dict)


class Residency:
    """All engines' own blocks. Times are the master's uptime, in seconds."""

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self.engines: dict[int, Engine] = {}

    def __len__(self) -> int:
        """Return the number of blocks, counted once an engine."""
        return sum(len(blocks) for engine in self.engines.values() for blocks in engine.spaces.values())

    def blocks_of(self, owner: int) -> int:
        """Return the number of an engine's blocks; 0 for one that reports none."""
        engine = self.engines.get(owner)
        return 0 if engine is None else sum(map(len, engine.spaces.values()))

    def report(self, report: Report, now: float) -> bool:
        """Take in a report; returns whether an inventory is needed. Raises InvalidArgumentError, OverloadedError."""
        keys = _checked(report)
        if report.bye:
            self.engines.pop(report.owner, None)
            return False
        engine = self.engines.get(report.owner)
        if report.first:
            if engine is None and len(self.engines) >= ENGINES_MAX:
                raise OverloadedError(f"{ENGINES_MAX} engines report what they hold already")
            engine = self.engines[report.owner] = Engine(report.engine, report.sequence - 1, now)
        if engine is None:
            return True
        engine.last_seen = now
        if report.sequence <= engine.sequence:
            return False  # came twice
        if report.sequence != engine.sequence + 1:
            engine.spaces.clear()
            return True
        if report.namespace:
            self._apply(engine, report, keys)
        engine.sequence = report.sequence
        return False

    def _apply(self, engine: Engine, report: Report, keys: Words) -> None:
        if report.cleared:
            engine.spaces.pop(report.namespace, None)
        blocks = engine.spaces.get(report.namespace)
        if blocks is None:
            if len(keys) == report.removed:
                return
            if len(engine.spaces) >= NAMESPACES_MAX:
                raise OverloadedError(f"engine {engine.name} reports {NAMESPACES_MAX} namespaces already")
            blocks = engine.spaces[report.namespace] = _Blocks()
        blocks.remove(keys[: report.removed])
        blocks.add(keys[report.removed :])

    def expire(self, now: float) -> None:
        """Forget engines that were not heard of for too long."""
        for owner in [o for o, e in self.engines.items() if now - e.last_seen > self._ttl_s]:
            del self.engines[owner]

    def holders(self, keys: Words, namespaces: Collection[bytes] = ()) -> Iterator[tuple[int, str, bytes, Rows]]:
        """Yield (owner, engine, namespace, the positions of the keys that it holds), those that hold none too.

        One engine and namespace at a time; with ``namespaces`` only those.
        """
        for owner, engine in list(self.engines.items()):
            for namespace, blocks in list(engine.spaces.items()):
                if not namespaces or namespace in namespaces:
                    yield owner, engine.name, namespace, np.flatnonzero(blocks.find(keys) >= 0)


def _checked(report: Report) -> Words:
    if not report.owner or not report.sequence:
        raise InvalidArgumentError("owner" if not report.owner else "sequence", "must not be 0")
    if not 0 < len(report.engine) <= NAME_CHARS_MAX:
        raise InvalidArgumentError("engine", f"must have 1 to {NAME_CHARS_MAX} characters")
    if len(report.keys) % KEY_BYTES or len(report.keys) > KEYS_MAX * KEY_BYTES:
        raise InvalidArgumentError("keys", f"must be {KEY_BYTES} bytes each, at most {KEYS_MAX} of them")
    if len(report.namespace) not in ({DIGEST_BYTES} if report.keys or report.cleared else {0, DIGEST_BYTES}):
        raise InvalidArgumentError("namespace", f"must be {DIGEST_BYTES} bytes, not {len(report.namespace)}")
    keys = as_words(report.keys)
    if report.removed > len(keys):
        raise InvalidArgumentError("removed", f"must be at most the number of keys ({len(keys)})")
    return keys
