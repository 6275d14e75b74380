"""The scheduler's side: which blocks to load, which to save, and until when both are kept.

Runs in the engine's scheduler thread, which must never wait for the pool: lookups run on the
client's threads, and an answer that is not there yet is asked for again in the next step.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvpool.model import pack_keys
from kvpool_vllm import LOGGER_NAME
from kvpool_vllm.leases import LeaseKeeper
from kvpool_vllm.metadata import LoadJob, Part, SaveJob, StepMeta, WorkerMeta

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kvpool.client import Client, Lookup
    from kvpool.config import ConnectorSettings
    from kvpool.model import Namespace

logger = logging.getLogger(LOGGER_NAME)

LOOKUP_WAIT_S = 0.002
"""What all lookups of one step together may hold up the scheduler."""

LOOKUP_GIVE_UP = 3
"""A lookup that has not answered after this many of its own timeouts is a miss."""

SAVING_SHARE_MAX = 4
"""At most one in this many of the engine's blocks is held for saving; further saves are dropped."""


@dataclass(slots=True)
class _Answer:
    """What a lookup said; remembered, because the engine asks in every step that it cannot place the request."""

    prefix: int = 0
    lease: int = 0
    lookup: Lookup | None = None


@dataclass(slots=True)
class _Tracked:
    """One request, from its arrival to its end and the end of its load."""

    request: Any
    preemptions: int = 0
    """The state below belongs to this life of the request; a preemption starts another."""
    known: int = 0
    """Blocks that the engine held itself when it asked."""
    pending: Future[Lookup] | None = None
    give_up_at: float = 0.0
    answer: _Answer | None = None
    first: int = 0
    """The first block to load."""
    job: LoadJob | None = None
    loading: bool = False
    arrived: int | None = None
    """Leading blocks of the job that all ranks heard from so far received."""
    next_save: int | None = None


@dataclass(slots=True)
class _Saving:
    blocks: list[Any]
    ranks_left: int


class SchedulerSide:
    """Decides loads and saves for all requests of one engine."""

    def __init__(
        self,
        client: Client,
        settings: ConnectorSettings,
        namespace: Callable[[], Namespace | None],
        *,
        block_tokens: int,
        hashes_per_block: int,
        ranks: int,
    ) -> None:
        """``namespace`` is asked until it answers; while it gives None, nothing is looked up or saved."""
        self._client = client
        self._find_namespace = namespace
        self._namespace: Namespace | None = None
        self._block_tokens = block_tokens
        self._hashes_per_block = hashes_per_block
        self._ranks = ranks
        self._give_up_s = LOOKUP_GIVE_UP * settings.lookup_timeout / 1000
        self._leases = LeaseKeeper(client)
        self._requests: dict[str, _Tracked] = {}
        self._pool: Any = None
        self._loads: list[LoadJob] = []
        self._saving: dict[int, _Saving] = {}
        self._saving_blocks = 0
        self._save_jobs = 0
        self._wait_left_s = LOOKUP_WAIT_S
        self.counters: Counter[str] = Counter()

    # ---- what the engine asks ----

    def bind_block_pool(self, pool: Any) -> None:
        """Take the engine's block pool, in whose blocks saves hold references."""
        self._pool = pool

    def track(self, request: Any) -> None:
        """Begin a request."""
        self._requests.setdefault(request.request_id, _Tracked(request, request.num_preemptions))

    def matched_tokens(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """Return how many tokens after ``computed`` the pool can load, None while it is not known."""
        state = self._state(request)
        unread = request.skip_reading_prefix_cache or not self._may_share(request)
        namespace = self._ready_namespace()
        if unread or state.job is not None or namespace is None:
            # One load a life: what it did not bring is computed, never tried again.
            return 0, False
        have, blocks = computed // self._block_tokens, len(self._hashes(request))
        if have >= blocks:
            self._drop_answer(state)
            return 0, False
        if (state.answer or state.pending) and have < state.known:
            self._drop_answer(state)  # the engine lost blocks that the lookup took for granted
        answer = self._answer(state, namespace, have)
        if answer is None:
            return None, False
        found = min(answer.prefix, blocks) * self._block_tokens - computed
        if found <= 0:
            self._leases.drop(answer.lease)
            return 0, False
        state.first = have
        return found, True

    def allocated(self, request: Any, block_ids: Sequence[int], tokens: int) -> None:
        """Plan the load of ``tokens`` into the request's blocks; 0 means that nothing is loaded."""
        state = self._state(request)
        if state.job is not None:
            return
        namespace = self._ready_namespace()
        if tokens == 0 or state.answer is None or namespace is None:
            self._drop_answer(state)
            return
        end = state.first + -(-tokens // self._block_tokens)
        keys = pack_keys(self._hashes(request)[state.first : end])
        # An answer counts from the blocks it was told of; the engine may hold more by now.
        lookup = state.answer.lookup if state.first == state.known else None
        part = Part(namespace, keys, list(block_ids[state.first : end]), lookup)
        state.job = LoadJob(request.request_id, [part])
        state.loading = True
        self._loads.append(state.job)
        self.counters["load.jobs"] += 1

    def build_meta(self, scheduled: dict[str, int], block_ids_of: Callable[[str], Sequence[int]]) -> StepMeta:
        """Return this step's work, given the tokens it schedules per request."""
        self._wait_left_s = LOOKUP_WAIT_S
        meta = StepMeta(empty=not scheduled)
        meta.loads, self._loads = self._loads, []
        namespace = self._ready_namespace() if scheduled else None
        if namespace is None:
            return meta
        for request_id, tokens in scheduled.items():
            state = self._requests.get(request_id)
            if state is not None and self._may_share(state.request):
                job = self._plan_save(namespace, self._state(state.request), tokens, block_ids_of)
                if job is not None:
                    meta.saves.append(job)
        return meta

    def worker_report(self, meta: WorkerMeta | None, finished_loads: Iterable[str]) -> None:
        """Take what the workers report: saves to let go of, loads that ended on every rank."""
        for job_id, ranks in (meta.saved if meta else {}).items():
            saving = self._saving[job_id]
            saving.ranks_left -= ranks
            if not saving.ranks_left:
                self._let_go(job_id)
        for request_id, arrived in (meta.loaded if meta else {}).items():
            state = self._requests[request_id]
            state.arrived = arrived if state.arrived is None else min(arrived, state.arrived)
        for request_id in finished_loads:
            self._end_load(request_id)

    def finished(self, request: Any) -> None:
        """End a request; its running load, if any, is followed to its end."""
        state = self._requests.get(request.request_id)
        if state is None:
            return
        if state.loading:
            return  # aborted while its blocks are written: worker_report ends it
        self._drop_answer(state)
        del self._requests[request.request_id]

    @property
    def saving(self) -> bool:
        """Whether the engine has to keep stepping so that saves are let go of."""
        return bool(self._saving)

    @property
    def leases(self) -> int:
        """Leases not yet given back."""
        return len(self._leases)

    def close(self) -> None:
        """Release the leases and the client."""
        self._leases.close()
        self._client.close()

    # ---- lookups ----

    def _answer(self, state: _Tracked, namespace: Namespace, have: int) -> _Answer | None:
        """Return the remembered answer; ask, or wait within this step's budget, where there is none."""
        if state.answer is not None:
            return state.answer
        if state.pending is None:
            state.known = have
            state.pending = self._client.lookup_async(
                namespace, pack_keys(self._hashes(state.request)), known_prefix=have, lease=True
            )
            state.give_up_at = time.monotonic() + self._give_up_s
            self.counters["lookup.asked"] += 1
        started = time.monotonic()
        try:
            lookup = state.pending.result(timeout=max(0.0, self._wait_left_s))
            state.answer = _Answer(lookup.prefix, lookup.lease, lookup)
            self._leases.hold(lookup.lease)
        except FutureTimeoutError:
            if started < state.give_up_at:
                return None
            self._abandon(state)
            state.answer = _Answer()
        except Exception as error:  # whatever it was, it is a miss
            logger.warning("lookup failed, the request is computed: %r", error)
            self.counters["lookup.errors"] += 1
            state.answer = _Answer()
        finally:
            self._wait_left_s -= time.monotonic() - started
        state.pending = None
        self.counters["lookup.hits" if state.answer.prefix > state.known else "lookup.misses"] += 1
        return state.answer

    def _abandon(self, state: _Tracked) -> None:
        """Forget a lookup that runs; give back the lease that it may still bring."""
        if state.pending is not None:
            self.counters["lookup.abandoned"] += 1
            state.pending.add_done_callback(self._release_late)
            state.pending = None

    def _release_late(self, future: Future[Lookup]) -> None:
        if not future.cancelled() and future.exception() is None:
            lease = future.result().lease
            self._leases.hold(lease)
            self._leases.drop(lease)

    def _drop_answer(self, state: _Tracked) -> None:
        self._abandon(state)
        if state.answer is not None:
            self._leases.drop(state.answer.lease)
            state.answer = None

    def _end_load(self, request_id: str) -> None:
        state = self._requests[request_id]
        arrived = state.arrived or 0
        state.next_save = state.first + arrived
        self.counters["load.arrived"] += arrived  # on every rank
        self._drop_answer(state)
        state.loading = False
        if state.request.is_finished():
            del self._requests[request_id]

    # ---- saves ----

    def _plan_save(
        self, namespace: Namespace, state: _Tracked, tokens: int, block_ids_of: Callable[[str], Sequence[int]]
    ) -> SaveJob | None:
        """Return a save of the prompt blocks that this step completes and that neither engine nor pool had."""
        request = state.request
        if state.next_save is None:
            state.next_save = request.num_computed_tokens // self._block_tokens
        computed = min(request.num_computed_tokens + tokens, request.num_prompt_tokens)
        hashed = len(request.block_hashes) // self._hashes_per_block
        start, end = state.next_save, min(computed // self._block_tokens, hashed)
        if start >= end:
            return None
        state.next_save = end
        if (self._saving_blocks + end - start) * SAVING_SHARE_MAX > self._pool.num_gpu_blocks:
            self.counters["save.dropped_blocks"] += end - start
            return None
        block_ids = list(block_ids_of(request.request_id)[start:end])
        blocks = [self._pool.blocks[block_id] for block_id in block_ids]
        self._pool.touch(blocks)
        self._save_jobs += 1
        self._saving[self._save_jobs] = _Saving(blocks, self._ranks)
        self._saving_blocks += len(blocks)
        self.counters["save.jobs"] += 1
        keys = pack_keys(self._hashes(request)[start:end])
        return SaveJob(self._save_jobs, [Part(namespace, keys, block_ids)])

    def _let_go(self, job_id: int) -> None:
        saving = self._saving.pop(job_id)
        self._saving_blocks -= len(saving.blocks)
        self._pool.free_blocks(reversed(saving.blocks))  # so that a chain's tail is evicted before its head

    # ---- words ----

    def _state(self, request: Any) -> _Tracked:
        """Return the state of the request's present life."""
        self.track(request)
        state = self._requests[request.request_id]
        if state.preemptions != request.num_preemptions:
            self._drop_answer(state)
            state = self._requests[request.request_id] = _Tracked(request, request.num_preemptions)
        return state

    def _hashes(self, request: Any) -> list[bytes]:
        """Return one hash per full block; each covers all tokens before it."""
        step = self._hashes_per_block
        hashes: list[bytes] = request.block_hashes
        return hashes if step == 1 else hashes[step - 1 :: step]

    @staticmethod
    def _may_share(request: Any) -> bool:
        """Whether the request's hashes name its KV: a LoRA adapter is hashed by its name alone."""
        return request.lora_request is None

    def _ready_namespace(self) -> Namespace | None:
        if self._namespace is None:
            self._namespace = self._find_namespace()
        return self._namespace
