"""The file tier as a client sees it: a node's codes, how long it may wait for storage, which storage is left alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from kvpool.client_health import Guard, Health
from kvpool.client_results import Lookup
from kvpool.core.file_jobs import Miss
from kvpool.errors import UnavailableError
from kvpool.model import KEY_BYTES

PART_BLOCKS_MAX = 512
"""A node has to look at each block that it is asked for, and answers nobody else meanwhile."""

PART_BYTES = 16 << 20
"""What is asked of storage at a time: while one part is copied, the next ones are read."""

ANSWER_S_MAX = 0.1
"""Of a call's time, what is kept for the node's answer and the copying after it has waited for storage."""

REASONS: dict[int, str] = {
    Miss.FILE_MISSING: "file_missing",
    Miss.FILE_BROKEN: "file_corrupt",
    Miss.STORAGE_DOWN: "storage_down",
    Miss.NOT_IN_TIME: "storage_timeout",
    Miss.NO_ROOM: "no_room",
}
"""Miss reasons by the code that a node answers instead of a size or an offset."""

TROUBLE = frozenset({"storage_down", "storage_timeout", "owner_lost"})
"""Reasons for which a node's storage, several times in a row, is left alone."""

ANSWERS = frozenset({"", "file_missing", "file_corrupt", "corrupt", "wrong_size"})
"""Reasons that show that storage answers."""


def reason_of(code: int) -> str:
    """Return "" for a size or an offset, or the miss reason that a node's code stands for."""
    return "" if code >= 0 else REASONS.get(code, "not_here")


def fetch_ms(left_s: float) -> int:
    """Return how long a node may wait for storage, so that its answer is of use before the call's time is over."""
    return max(1, int(1000 * (left_s - min(ANSWER_S_MAX, left_s / 4))))


def part_blocks(blocks: int, block_bytes: int, part_bytes: int) -> int:
    """Return how many of so many blocks, at least one, make a part; parts are of much the same size."""
    parts = -(-blocks // max(1, min(PART_BLOCKS_MAX, part_bytes // block_bytes)))
    return -(-blocks // parts)


def key_parts(keys: bytes, shards: int = 1) -> list[bytes]:
    """Return keys, packed, in parts that a node does not have to look at for long, with so many shards of each."""
    size = max(1, PART_BLOCKS_MAX // shards) * KEY_BYTES
    return [keys[at : at + size] for at in range(0, len(keys), size)]


def storage_name(node: str, backend: bytes) -> str:
    """Return what a node's way to a backend is called: by its id in the log and in counters, by its place elsewhere."""
    return f"{node}:fs:{backend.hex()[:8]}"


class StorageGuards:
    """A breaker for each node and backend: storage that hangs is no reason to leave the node's memory alone."""

    def __init__(self, health: Health) -> None:
        self._health = health
        self._lock = threading.Lock()
        self._guards: dict[tuple[str, bytes], Guard] = {}

    def of(self, node_id: str, backend: bytes, probe: Callable[[], None], place: str = "") -> Guard:
        """Return the breaker; ``probe`` asks for a file, and raises when the storage does not answer.

        ``place``: of the node, unless it is this host's.
        """
        key = (place or node_id, backend)
        with self._lock:
            guard = self._guards.get(key)
            if guard is None:
                guard = self._guards[key] = self._health.guard(storage_name(node_id, backend), probe)
            return guard

    def keep(self, node_id: str) -> None:
        """Forget the breakers of this host's nodes of before."""
        with self._lock:
            others = [key for key in self._guards if key[0] != node_id]
            self._health.forget([self._guards.pop(key) for key in others])

    def all(self) -> list[Guard]:
        """Return all breakers."""
        with self._lock:
            return list(self._guards.values())

    def unusable(self) -> set[str]:
        """Return the names of what is left alone: by the nodes' places, this host's by its id."""
        with self._lock:
            return {storage_name(*key) for key, guard in self._guards.items() if not guard.closed}


def judge(guard: Guard, reasons: Sequence[str]) -> None:
    """Count how a call to storage went, as a whole: its parts fail together, and are one failure."""
    if any(reason in ANSWERS for reason in reasons):
        guard.ended(None, quick=True)
    elif any(reason in TROUBLE for reason in reasons):
        guard.ended(UnavailableError("storage does not answer"), quick=True)


def check_probe(code: int) -> None:
    """Raise UnavailableError when a probe's answer says that storage does not answer."""
    if reason_of(code) in TROUBLE:
        raise UnavailableError(reason_of(code))


def only_in_files(lookup: Lookup) -> dict[tuple[bytes, str, tuple[int, ...]], list[int]]:
    """Return the blocks' shards that no node has in memory: (backend, a node that serves it, shards) to block numbers.

    Blocks are numbered within the chain that the lookup was asked for.
    """
    found: dict[tuple[bytes, str, tuple[int, ...]], list[int]] = {}
    number = lookup.known_prefix
    for run in lookup.runs:
        rest = {shard for _, _, shards, backend in run.owners if backend for shard in shards}
        rest.difference_update(*(shards for _, _, shards, backend in run.owners if not backend))
        for address, _, shards, backend in run.owners:
            wanted = tuple(shard for shard in shards if shard in rest)
            if backend and wanted:
                found.setdefault((backend, address.node_id, wanted), []).extend(range(number, number + run.blocks))
                rest.difference_update(wanted)
        number += run.blocks
    return found
