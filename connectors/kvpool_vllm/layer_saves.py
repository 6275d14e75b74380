"""Saves that another engine waits for, layer by layer while a forward computes them."""

from __future__ import annotations

import logging
import threading
from functools import partial
from typing import TYPE_CHECKING

from kvpool.client_threads import Threads
from kvpool_vllm import LOGGER_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvpool.client import Client, PutResult
    from kvpool.client_layers import LayeredPut
    from kvpool_vllm.device import KVBlocks
    from kvpool_vllm.metadata import Part, SaveJob

    Shards = Sequence[Sequence[tuple[int, KVBlocks]]]
    """By group: each shard that this rank holds of it."""

logger = logging.getLogger(LOGGER_NAME)

PUTS_MAX = 8
"""At once: each keeps a channel to the node for as long as the forward takes. Other blocks are saved whole."""


class Forward:
    """How far a forward is: layers of each group, in the order in which they are stored."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = list(layers)
        self._changed = threading.Condition()
        self._done: list[set[int]] = [set() for _ in layers]
        self._ready = [0] * len(layers)

    def layer_done(self, group: int, layer: int) -> None:
        """A layer is in memory."""
        with self._changed:
            done = self._done[group]
            done.add(layer)
            while self._ready[group] in done:
                self._ready[group] += 1
            self._changed.notify()

    def end(self) -> None:
        """All that this forward will compute is in memory."""
        with self._changed:
            self._ready = list(self.layers)
            self._changed.notify()

    def wait_end(self) -> None:
        """Wait until it is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready == self.layers)

    def wait(self, seen: Sequence[int]) -> list[int]:
        """Return how many leading layers of each group are in memory, once these are others than ``seen``."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready != list(seen))
            return list(self._ready)


class _Put:
    """One shard of a job's part."""

    def __init__(self, client: Client, job: SaveJob, part: Part, shard: int, kv: KVBlocks) -> None:
        self.job, self.part, self._kv = job, part, kv
        shard_bytes = len(kv) * kv.layer_block_bytes
        self.layered: LayeredPut | None = client.put_layers(
            part.namespace, part.keys, shard=shard, shard_bytes=shard_bytes, transfer=job.transfer
        )
        self._ids = [part.block_ids[number] for number in self.layered.wanted] if self.layered is not None else []
        self._written = 0

    def write(self, ready: int) -> None:
        if self.layered is not None and self._ids and self._written < ready:
            self.layered.write(self._written, ready, self._kv.views(self._ids, (self._written, ready)))
            self._written = ready


class LayerSaves:
    """Writes layers on a thread of its own, one forward after the other."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._threads = Threads(1, "kvpool-layer-saves")

    def start(
        self,
        forward: Forward,
        jobs: Sequence[SaveJob],
        shards: Shards,
        ended: Callable[[SaveJob, list[PutResult] | None], None],
    ) -> bool:
        """Reserve room for these jobs' blocks, and write them as the forward goes on; False where no thread can be had.

        Otherwise ``ended`` is called for each job, on the thread, when the forward is over: with what became of its
        shards, or None where it has to be saved whole.
        """
        refused: list[bool] = []
        self._threads.begin(partial(self._run, forward, jobs, shards, ended), lambda: refused.append(True))
        return not refused

    def close(self) -> None:
        """Wait for the forward that runs."""
        self._threads.close()

    def _run(
        self,
        forward: Forward,
        jobs: Sequence[SaveJob],
        shards: Shards,
        ended: Callable[[SaveJob, list[PutResult] | None], None],
    ) -> None:
        puts: list[_Put] = []
        results: dict[int, list[PutResult] | None] = {job.job_id: [] for job in jobs}
        try:
            for job in jobs:
                own = [(part, *each) for part in job.parts for each in shards[part.group]]
                if len(puts) + len(own) <= PUTS_MAX:
                    # One by one, so that what has begun is ended below, whatever comes of the next.
                    puts.extend(_Put(self._client, job, part, shard, kv) for part, shard, kv in own)
                else:
                    results[job.job_id] = None
            ready = [0] * len(forward.layers)
            while ready != forward.layers:
                ready = forward.wait(ready)
                for put in puts:
                    put.write(ready[put.part.group])
            for put in puts:
                known = results[put.job.job_id]
                if put.layered is None or known is None:
                    results[put.job.job_id] = None
                else:
                    known.append(put.layered.commit())
        except Exception:  # whatever it was, the engine waits for these saves
            logger.exception("kvpool: saving layer by layer failed, blocks are saved whole")
            results = dict.fromkeys(results)
            forward.wait_end()
        for put in puts:
            if put.layered is not None:
                put.layered.abort()  # nothing where it was committed
        for job in jobs:
            ended(job, results[job.job_id])
