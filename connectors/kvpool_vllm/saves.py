"""Saves on their way: which of the engine's blocks they hold, how many they may hold, what was dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvpool_vllm.metadata import SaveJob

if TYPE_CHECKING:
    from collections import Counter

    from kvpool_vllm.metadata import Part

SHARE = 4
"""Unless told otherwise one in this many of the engine's blocks may be held for saving."""

SHARE_MAX = 2
"""Whatever the setting says: an engine without free blocks computes nothing."""

DROPPED_MAX = 1 << 16


@dataclass(slots=True)
class _Saving:
    job: SaveJob
    hashes: list[bytes]
    blocks: list[Any]
    ranks_left: int
    whole: bool = True


class Saves:
    """Holds references on the engine's blocks until every rank has stored them."""

    def __init__(self, ranks: int, queue_blocks: int, counters: Counter[str]) -> None:
        """``queue_blocks``: how many blocks may be held, 0 for a share of the engine's."""
        self._ranks = ranks
        self._queue_blocks = queue_blocks
        self._counters = counters
        self._pool: Any = None
        self._saving: dict[int, _Saving] = {}
        self._jobs = 0
        self._dropped: dict[bytes, None] = {}  # in the order of dropping
        self.blocks = 0
        """Held now."""

    def __len__(self) -> int:
        """Return how many jobs are on their way."""
        return len(self._saving)

    def bind(self, pool: Any) -> None:
        """Take the engine's block pool."""
        self._pool = pool

    def room(self, *, transfer: bool = False) -> int:
        """Return how many more blocks may be held; more of those for a ``transfer``: somebody waits for them."""
        limit: int = self._pool.num_gpu_blocks // SHARE
        if transfer:
            limit = self._pool.num_gpu_blocks // SHARE_MAX
        elif self._queue_blocks:
            limit = min(self._queue_blocks, self._pool.num_gpu_blocks // SHARE_MAX)
        return max(0, limit - self.blocks)

    def begin(self, parts: list[Part], hashes: list[bytes], transfer: int = 0) -> SaveJob:
        """Return a job for blocks that are held from now on; ``hashes`` name the full ones among them."""
        self._jobs += 1
        job = SaveJob(self._jobs, parts, transfer)
        blocks = [self._pool.blocks[block_id] for part in parts for block_id in part.block_ids]
        self._pool.touch(blocks)
        self._saving[job.job_id] = _Saving(job, hashes, blocks, self._ranks)
        self.blocks += len(blocks)
        self._counters["save.jobs"] += 1
        for name in hashes:
            self._dropped.pop(name, None)
        return job

    def report(self, job_id: int, ranks: int, *, unsaved: bool) -> bool | None:
        """Take the report of some ranks; the last one's lets go of the blocks.

        Returns whether every block is stored on every rank, None while some have not reported.
        """
        saving = self._saving[job_id]
        saving.ranks_left -= ranks
        if unsaved:
            saving.whole = False
            self._remember(saving.hashes)
        if not saving.ranks_left:
            del self._saving[job_id]
            self.blocks -= len(saving.blocks)
            self._pool.free_blocks(reversed(saving.blocks))  # so that a chain's tail is evicted before its head
        return None if saving.ranks_left else saving.whole

    def cancel(self, job_id: int) -> None:
        """Let go of the blocks of a save that no rank has begun."""
        self._counters["save.dropped_blocks"] += len(self._saving[job_id].blocks)
        self.report(job_id, self._saving[job_id].ranks_left, unsaved=True)

    def drop(self, hashes: list[bytes]) -> None:
        """Count blocks that nobody will save, until a request finds them in the engine's own cache."""
        self._counters["save.dropped_blocks"] += len(hashes)
        self._remember(hashes)

    def dropped_before(self, hashes: list[bytes], end: int) -> int:
        """Return where the dropped blocks begin that end at ``end``: the engine holds them, the pool does not."""
        while end and hashes[end - 1] in self._dropped:
            end -= 1
        return end

    def _remember(self, hashes: list[bytes]) -> None:
        self._dropped.update(dict.fromkeys(hashes))
        while len(self._dropped) > DROPPED_MAX:
            del self._dropped[next(iter(self._dropped))]
