"""The worker's side: moves blocks between the engine's memory and the pool on its own threads.

The engine's thread only hands over jobs and collects what ended, except for loads that its next forward
needs. Every job ends in a report, whatever happened to it: a load in the request's id and the blocks that
failed, a save in its number.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from kvpool.client_threads import Threads
from kvpool.model import KEY_BYTES
from kvpool_vllm import LOGGER_NAME
from kvpool_vllm.device import HostDevice, Way
from kvpool_vllm.layer_saves import Forward, LayerSaves
from kvpool_vllm.layers import LayerLoads
from kvpool_vllm.metadata import LoadJob, LoadSeen, RankFacts, SaveJob, StepMeta, WorkerMeta
from kvpool_vllm.receives import Receives
from kvpool_vllm.tally import Data, Tally, say_once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from concurrent.futures import Future

    from kvpool.client import Client, GetResult, PutResult
    from kvpool.config import ConnectorSettings
    from kvpool.model import NodeAddress
    from kvpool_vllm.device import Device, KVBlocks
    from kvpool_vllm.metadata import Part
    from kvpool_vllm.namespace import Place

logger = logging.getLogger(LOGGER_NAME)


class WorkerSide:
    """Loads and saves of one rank."""

    _kv: list[KVBlocks]  # one a group; set by attach, which vLLM calls before any step
    _shards: list[list[tuple[int, KVBlocks]]]  # the same cut into what is stored, by shard

    def __init__(self, client: Client, settings: ConnectorSettings, place: Place) -> None:
        """``place``: what this rank holds of each block."""
        if not client.has_node() and not settings.autostart_node:  # the scheduler's side starts one only later
            logger.warning(
                "kvpool: no node runs on this host (master: %s): blocks are stored on other hosts, or not at all",
                settings.master,
            )
        self._client = client
        self._settings = settings
        self._place = place
        self._device: Device = HostDevice()
        self._fence: Any = None  # a job may find a later one than its own, which comes no sooner
        self._load_pool = Threads(settings.load_threads, "kvpool-load")
        self._save_pool = Threads(settings.save_threads, "kvpool-save")
        self._receives = Receives(client)
        self._layer_saves = LayerSaves(client)
        self._unstarted: StepMeta | None = None  # the running step, whose saves have not begun
        self._forward: Forward | None = None  # of the running step, where layers of it are saved
        self._progress = threading.Condition()
        self._loading: dict[str, tuple[LoadJob, Future[None]]] = {}
        self._layer_loads: LayerLoads | None = None
        self._unreported_saves = 0
        self._loaded: list[tuple[LoadJob, int]] = []
        self._saved: list[int] = []
        self._unsaved: set[int] = set()
        self._failed_blocks: set[int] = set()
        self._report = WorkerMeta()
        self._seen: dict[str, LoadSeen] = {}
        self._rank = secrets.randbits(63)
        self._unusable: frozenset[str] = frozenset()
        self._node: NodeAddress | None = None
        self._tally = Tally(f"rank {self._rank}")
        self.counters: Counter[str] = Counter()

    def attach(self, kv: list[KVBlocks], facts: RankFacts, device: Device | None = None) -> None:
        """Use these tensors, one set for each group, from now on, and tell the scheduler what they are.

        ``device``: what holds them, host memory by default.
        """
        self._kv = kv
        first, shards = self._place.shard, self._place.shards
        self._shards = [
            list(enumerate(blocks.split(shards), first)) if shards > 1 else [(first, blocks)] for blocks in kv
        ]
        if device is not None:
            self._device = device
        self._layer_numbers = {name: number for number, name in enumerate(kv[0].names)}
        self._layer_places = {name: (g, n) for g, blocks in enumerate(kv) for n, name in enumerate(blocks.names)}
        self._report.facts = frozenset({facts})

    # ---- loads ----

    def start_loads(self, meta: StepMeta) -> None:
        """Hand this step's loads to the load threads; wait for those that its forward needs."""
        needed = []
        if meta.loads:
            self._fence = self._device.fence()
        for job in meta.loads:
            if job.sync:
                needed.append(job)
            elif job.transfer:
                receiving = self._receives.start(partial(self._receive, job), partial(self._refuse_load, job))
                self._loading[job.request_id] = (job, receiving)
            else:
                self._loading[job.request_id] = (job, self._begin_load(job, None))
        timeout_s = self._settings.transfer_timeout / 1000
        if needed and self._settings.use_layerwise:
            ahead = self._settings.layerwise_prefetch_layers
            self._layer_loads = LayerLoads(needed, len(self._kv[0]), ahead, timeout_s, self._fetch_layers)
        elif needed:
            deadline = time.monotonic() + timeout_s
            # To their ends, which the deadline brings: what is given up must not be written any more.
            for load in [self._begin_load(job, deadline) for job in needed]:
                load.result()

    def _begin_load(self, job: LoadJob, deadline: float | None) -> Future[None]:
        return self._load_pool.begin(partial(self._load, job, deadline), partial(self._refuse_load, job))

    def _refuse_load(self, job: LoadJob) -> None:
        say_once(self.counters, "load.errors", "no thread for a load, its blocks are computed instead")
        self._end_load(job, 0)

    def wait_for_layer(self, name: str) -> None:
        """Wait until a layer of the blocks that the running forward needs is there, or given up."""
        number = self._layer_numbers.get(name)
        if self._layer_loads is not None and number is not None:  # else it reads the cache of another layer
            self._layer_loads.wait(number)

    def finished_loads(self, aborted: Iterable[str]) -> tuple[set[str], set[str]]:
        """Return the requests whose load ended, well or not, since the last call, and those that failed whole.

        A load of an ``aborted`` request that no thread has begun ends here. One that runs ends when it
        ends: its blocks may not be handed to anyone before. Loads of the running step are in neither set.
        """
        if self._layer_loads is not None:
            for job, arrived in self._layer_loads.finish():
                self._end_load(job, arrived)
            self._layer_loads = None
        for request_id in aborted:
            entry = self._loading.get(request_id)
            if entry is not None and entry[1].cancel():
                self._end_load(entry[0], 0)
            elif entry is not None and entry[0].transfer:
                self._receives.unwanted(request_id)
        with self._progress:
            ended, self._loaded = self._loaded, []
        finished, failed = set(), set()
        for job, arrived in ended:
            self._report.loaded[job.request_id] = arrived
            if job.transfer:
                self._receives.ended(job)
            if not job.sync:
                del self._loading[job.request_id]
                finished.add(job.request_id)
            if not job.whole:
                self._failed_blocks.update(job.parts[0].block_ids[arrived:])
            elif arrived < job.blocks:
                failed.add(job.request_id)
        return finished, failed

    def failed_blocks(self) -> set[int]:
        """Return the blocks that the last ``finished_loads`` found unfilled, once."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def _load(self, job: LoadJob, deadline: float | None) -> None:
        def fetch(part: Part) -> GetResult:
            left_s = None if deadline is None else deadline - time.monotonic()
            return self._fetch(part, len(part.block_ids), None, left_s)

        self._fill(job, fetch)

    def _receive(self, job: LoadJob) -> None:
        deadline = time.monotonic() + self._settings.transfer_ttl / 1000
        alive = self._receives.alive(job)

        def load(part: Part, shard: int, kv: KVBlocks) -> GetResult:
            node = job.nodes[shard]
            assert node is not None  # noqa: S101 -- the scheduler's side has looked
            left_ms = max(1.0, (deadline - time.monotonic()) * 1000)
            way = Way(job.transfer, node, alive)
            return self._device.receive(self._client, part, kv, way, shard=shard, timeout_ms=left_ms, after=self._fence)

        self._fill(job, lambda part: self._each_shard(part, len(part.block_ids), load))

    def _fill(self, job: LoadJob, fetch: Callable[[Part], GetResult]) -> None:
        arrived = 0
        started, tiers = time.monotonic(), Counter[str]()
        try:
            for part in job.parts:
                result = fetch(part)
                arrived += result.prefix
                tiers.update(result.tiers)
                if result.prefix < len(part.block_ids):
                    level = logging.DEBUG if self.counters["load.failed"] else logging.WARNING
                    logger.log(level, "a load lacks blocks (%s), they are computed instead", result.reasons)
                    break
        except Exception:  # whatever it was, it is a miss: the engine waits for this report
            say_once(self.counters, "load.errors", "a load failed, its blocks are computed instead")
            arrived = 0
        finally:
            self._end_load(job, arrived, LoadSeen(time.monotonic() - started, dict(tiers)))

    def _fetch_layers(self, job: LoadJob, blocks: int, layers: tuple[int, int], timeout_s: float) -> int:
        return self._fetch(job.parts[0], blocks, layers, timeout_s).prefix

    def _end_load(self, job: LoadJob, arrived: int, seen: LoadSeen | None = None) -> None:
        with self._progress:
            self.counters["load.blocks"] += arrived
            self.counters["load.failed"] += job.blocks - arrived
            if seen is not None:
                self.counters["load.us"] += round(seen.seconds * 1e6)
                self._seen[job.request_id] = seen
            self._loaded.append((job, arrived))
            self._progress.notify()

    # ---- saves ----

    def begin_step(self, meta: StepMeta) -> None:
        """Prepare saves whose layers go out while the step computes them; call before its forward.

        Saves of the last step that were not begun, because its end was not told, begin now: it is over. (vLLM 0.32
        does not tell ranks other than the last one of a pipeline, when tokens are guessed ahead.)
        """
        if self._unstarted is not None:
            self.start_saves(self._unstarted)
        self._unstarted = meta if meta.saves else None
        if not self._settings.use_layerwise or not self._device.saves_layers or self._place.copy:
            return
        jobs = [job for job in meta.saves if job.transfer and job.computing]
        if jobs:
            forward = Forward([len(kv) for kv in self._kv])
            if self._layer_saves.start(forward, jobs, self._shards, self._layers_saved):
                self._forward = forward

    def layer_done(self, name: str) -> None:
        """The running forward has a layer's KV in memory."""
        if self._forward is not None and name in self._layer_places:  # else it is in another one's
            self._forward.layer_done(*self._layer_places[name])

    def _layers_saved(self, job: SaveJob, results: list[PutResult] | None) -> None:
        if results is None:
            self._begin_save(job)
            return
        stored = max((result.stored for result in results), default=0)
        self._end_save(job, {"layerwise": 1, "stored": stored}, whole=not any(result.failed for result in results))

    def start_saves(self, meta: StepMeta) -> None:
        """Hand this step's saves to the save threads; call when the step's KV is in memory."""
        self._unstarted = None
        if meta.saves:
            self._fence = self._device.fence()
        by_layers, self._forward = self._forward, None
        for job in meta.saves:
            self._unreported_saves += 1
            if by_layers is None or not (job.transfer and job.computing):
                self._begin_save(job)
        if by_layers is not None:
            by_layers.end()

    def _begin_save(self, job: SaveJob) -> None:
        self._save_pool.begin(partial(self._save, job), partial(self._refuse_save, job))

    def _refuse_save(self, job: SaveJob) -> None:
        say_once(self.counters, "save.errors", "no thread for a save, its blocks are not stored")
        self._end_save(job, {}, whole=False)

    def _save(self, job: SaveJob) -> None:
        whole, stored, started = False, 0, time.monotonic()
        try:
            results = [self._store(part, job.transfer) for part in self._own_parts(job)]
            whole = not any(result.failed for shards in results for result in shards)
            stored = sum(max(result.stored for result in shards) for shards in results)
        except Exception:  # whatever it was, a later request misses; the engine waits for this report
            say_once(self.counters, "save.errors", "a save failed, its blocks are not stored")
        finally:
            us = round((time.monotonic() - started) * 1e6)
            self._end_save(job, {"stored": stored, "us": us}, whole=whole)

    def _end_save(self, job: SaveJob, counted: Mapping[str, int], *, whole: bool) -> None:
        with self._progress:
            for name, count in counted.items():
                self.counters[f"save.{name}"] += count
            self._saved.append(job.job_id)
            if not whole:
                self._unsaved.add(job.job_id)
            self._progress.notify()

    # ---- reports ----

    def report(self) -> WorkerMeta | None:
        """Return what ended since the last call, for the scheduler's side."""
        with self._progress:
            saved, self._saved = self._saved, []
            self._report.unsaved, self._unsaved = self._unsaved, set()
            self._report.seen, self._seen = self._seen, {}
        self._unreported_saves -= len(saved)
        self._report.saved = dict.fromkeys(saved, 1)
        unusable = frozenset(self._client.unusable_nodes())
        if unusable != self._unusable:
            self._unusable = unusable
            self._report.unusable = {self._rank: unusable}
        node = self._client.own_node
        if node != self._node:
            self._node = node
            if node is not None and self._place.copy == 0:
                self._report.nodes = {shard: node for shard, _ in self._shards[0]}
        report, self._report = self._report, WorkerMeta()
        return report if report != WorkerMeta() else None

    def stats(self) -> Data | None:
        """Return what to tell vLLM's metrics: what was counted since the last call."""
        gauges = {"queue_depth.load_jobs": len(self._loading), "queue_depth.save_jobs": self._unreported_saves}
        return self._tally.take({**self.counters, **self._client.stats()}, gauges)

    def wait_for_progress(self, wait_s: float) -> None:
        """Give running transfers so long, when the engine has nothing to compute, or until one of them ends."""
        with self._progress:
            if (self._loading or self._unreported_saves) and not self._loaded and not self._saved:
                self._progress.wait(wait_s)

    def close(self) -> None:
        """Stop the threads after the jobs that run; drop those that do not."""
        self._device.close()  # first, as it ends waits
        self._receives.close()
        if self._forward is not None:
            self._forward.end()
        self._layer_saves.close()
        self._load_pool.close()
        self._save_pool.close()
        self._client.close()

    # ---- the engine's memory ----

    def _fetch(self, part: Part, blocks: int, layers: tuple[int, int] | None, timeout_s: float | None) -> GetResult:
        """Fill a part's leading blocks, or some layers of them; one has arrived when all its shards have."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s

        def load(part: Part, shard: int, kv: KVBlocks) -> GetResult:
            left_ms = None if deadline is None else max(1.0, (deadline - time.monotonic()) * 1000)
            return self._device.load(
                self._client, part, kv, shard=shard, layers=layers, timeout_ms=left_ms, after=self._fence
            )

        return self._each_shard(part, blocks, load)

    def _each_shard(
        self, part: Part, blocks: int, load: Callable[[Part, int, KVBlocks], GetResult]
    ) -> GetResult:
        """Load all shards of a part's leading blocks; returns the result of the worst."""
        results: list[GetResult] = []
        for shard, kv in self._shards[part.group]:
            if blocks < len(part.block_ids):
                part = replace(part, keys=part.keys[: blocks * KEY_BYTES], block_ids=part.block_ids[:blocks])
            result = load(part, shard, kv)
            results.append(result)
            blocks = min(blocks, result.prefix)
            if not blocks:
                break
        return min(results, key=lambda result: result.prefix)

    def _own_parts(self, job: SaveJob) -> list[Part]:
        """Return what is this rank's to store: ranks that hold the same take turns, block by block."""
        if self._place.copies == 1:
            return job.parts
        if job.transfer:  # whose blocks are looked for in one place
            return job.parts if self._place.copy == 0 else []
        own = []
        for part in job.parts:
            numbers = [i for i in range(len(part.block_ids)) if self._place.stores(job.job_id + i)]
            keys = b"".join(part.keys[i * KEY_BYTES : (i + 1) * KEY_BYTES] for i in numbers)
            own.append(replace(part, keys=keys, block_ids=[part.block_ids[i] for i in numbers]))
        return [part for part in own if part.block_ids]

    def _store(self, part: Part, transfer: int) -> list[PutResult]:
        """Store all shards of a part; a block counts as stored with the first of them."""
        return [
            self._device.save(self._client, part, kv, shard=shard, after=self._fence, transfer=transfer)
            for shard, kv in self._shards[part.group]
        ]
