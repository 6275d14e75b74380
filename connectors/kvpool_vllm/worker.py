"""The worker's side: moves blocks between the engine's memory and the pool on its own threads.

The engine's thread only hands over jobs and collects what ended. Every job ends in a report,
whatever happened to it: a load in the request's id and the blocks that failed, a save in its number.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from kvpool_vllm import LOGGER_NAME
from kvpool_vllm.metadata import LoadJob, SaveJob, StepMeta, WorkerMeta

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvpool.client import Client
    from kvpool.config import ConnectorSettings
    from kvpool_vllm.device import KVBlocks

logger = logging.getLogger(LOGGER_NAME)

EMPTY_STEP_WAIT_S = 0.001
"""What an empty step waits for a running transfer: the engine would otherwise spin and starve the copies."""


class WorkerSide:
    """Loads and saves of one rank."""

    _kv: KVBlocks  # set by attach, which vLLM calls before any step

    def __init__(self, client: Client, settings: ConnectorSettings, *, shard: int, saves: bool) -> None:
        """``shard`` is this rank's part of a block; ``saves`` is false where another rank stores the same heads."""
        if not client.has_node() and not settings.autostart_node:  # the scheduler's side starts one only later
            logger.warning(
                "kvpool: no node runs on this host (master: %s): blocks are stored on other hosts, or not at all",
                settings.master,
            )
        self._client = client
        self._shard = shard
        self._saves = saves
        self._load_pool = ThreadPoolExecutor(settings.load_threads, "kvpool-load")
        self._save_pool = ThreadPoolExecutor(settings.save_threads, "kvpool-save")
        self._progress = threading.Condition()
        self._loading: dict[str, tuple[LoadJob, Future[None]]] = {}
        self._unreported_saves = 0
        self._loaded: list[tuple[LoadJob, int]] = []
        self._saved: list[int] = []
        self._failed_blocks: set[int] = set()
        self._report = WorkerMeta()
        self.counters: Counter[str] = Counter()

    def attach(self, kv: KVBlocks) -> None:
        """Use these tensors from now on."""
        self._kv = kv

    def start_loads(self, meta: StepMeta) -> None:
        """Hand this step's loads to the load threads."""
        for job in meta.loads:
            future = self._load_pool.submit(self._load, job)
            self._loading[job.request_id] = (job, future)

    def start_saves(self, meta: StepMeta) -> None:
        """Hand this step's saves to the save threads; call when the step's KV is in memory."""
        for job in meta.saves:
            self._unreported_saves += 1
            if self._saves:
                self._save_pool.submit(self._save, job)
            else:
                self._end_save(job)

    def finished_loads(self, aborted: Iterable[str]) -> set[str]:
        """Return the requests whose load ended, well or not, since the last call.

        A load of an ``aborted`` request that no thread has begun ends here. One that runs ends when it
        ends: its blocks may not be handed to anyone before.
        """
        for request_id in aborted:
            entry = self._loading.get(request_id)
            if entry is not None and entry[1].cancel():
                self._end_load(entry[0], 0)
        with self._progress:
            ended, self._loaded = self._loaded, []
        for job, arrived in ended:
            del self._loading[job.request_id]
            self._failed_blocks.update(job.parts[0].block_ids[arrived:])
            self._report.loaded[job.request_id] = arrived
        return {job.request_id for job, _ in ended}

    def failed_blocks(self) -> set[int]:
        """Return the blocks that the last ``finished_loads`` found unfilled, once."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def report(self) -> WorkerMeta | None:
        """Return what ended since the last call, for the scheduler's side."""
        with self._progress:
            saved, self._saved = self._saved, []
        self._unreported_saves -= len(saved)
        self._report.saved = dict.fromkeys(saved, 1)
        report, self._report = self._report, WorkerMeta()
        return report if report.saved or report.loaded else None

    def wait_for_progress(self) -> None:
        """Give running transfers a moment, when the engine has nothing to compute."""
        with self._progress:
            if (self._loading or self._unreported_saves) and not self._loaded and not self._saved:
                self._progress.wait(EMPTY_STEP_WAIT_S)

    def close(self) -> None:
        """Stop the threads after the jobs that run; drop those that do not."""
        self._load_pool.shutdown(cancel_futures=True)
        self._save_pool.shutdown(cancel_futures=True)
        self._client.close()

    def _load(self, job: LoadJob) -> None:
        arrived = 0
        try:
            part = job.parts[0]
            result = self._client.get(
                part.namespace, part.keys, self._kv.views(part.block_ids), shard=self._shard, lookup=part.lookup
            )
            arrived = result.prefix
            if arrived < job.blocks:
                logger.info(
                    "load of %s ended after %d of %d blocks: %s",
                    job.request_id,
                    arrived,
                    job.blocks,
                    result.reasons,
                )
        except Exception:  # whatever it was, it is a miss: the engine waits for this report
            logger.exception("load of %s failed, its blocks are computed instead", job.request_id)
            self.counters["load.errors"] += 1
        finally:
            self._end_load(job, arrived)

    def _save(self, job: SaveJob) -> None:
        try:
            part = job.parts[0]
            result = self._client.put(part.namespace, part.keys, self._kv.views(part.block_ids), shard=self._shard)
            self.counters["save.stored"] += result.stored
            self.counters["save.existed"] += result.existed
            self.counters["save.failed"] += result.failed
        except Exception:  # whatever it was, a later request misses; the engine waits for this report
            logger.exception("save of %d blocks failed", job.blocks)
            self.counters["save.errors"] += 1
        finally:
            self._end_save(job)

    def _end_load(self, job: LoadJob, arrived: int) -> None:
        self.counters["load.blocks"] += arrived
        self.counters["load.failed"] += job.blocks - arrived
        with self._progress:
            self._loaded.append((job, arrived))
            self._progress.notify()

    def _end_save(self, job: SaveJob) -> None:
        with self._progress:
            self._saved.append(job.job_id)
            self._progress.notify()
