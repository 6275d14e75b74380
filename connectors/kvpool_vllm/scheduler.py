"""The scheduler's side: which blocks to load, which to save, and until when both are kept.

Runs in the engine's scheduler thread, which must never wait for the pool: lookups run on the
client's threads, and an answer that is not there yet is asked for again in the next step.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from kvpool.client_lookup import Also
from kvpool.model import pack_keys
from kvpool_vllm import LOGGER_NAME
from kvpool_vllm.lookups import Ask, Lookups
from kvpool_vllm.metadata import LoadJob, Part, SaveJob, StepMeta, WorkerMeta
from kvpool_vllm.names import Names
from kvpool_vllm.saves import Saves
from kvpool_vllm.transfers import Engine, Transfers
from kvpool_vllm.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kvpool.client import Client, Lookup
    from kvpool.config import ConnectorSettings
    from kvpool.model import Namespace
    from kvpool_vllm.groups import Groups
    from kvpool_vllm.keeper import Incoming, Outgoing
    from kvpool_vllm.settings import Role
    from kvpool_vllm.tally import Data

    GroupBlocks = Sequence[Sequence[int]]
    """A request's block ids, for each KV cache group."""

logger = logging.getLogger(LOGGER_NAME)

NAMESPACE_WAIT_S = 5.0
"""The workers say in their first step what they hold; requests that come earlier wait for it."""


@dataclass(slots=True)
class _Tracked:
    """One request, from its arrival to its end and the end of its load."""

    request: Any
    preemptions: int = 0
    """The state below belongs to this life of the request; a preemption starts another."""
    ask: Ask | None = None
    first: int = 0
    end: int = 0
    """The blocks to load: those from ``first`` on, before ``end``."""
    job: LoadJob | None = None
    loading: bool = False
    arrived: int | None = None
    """Leading blocks of the job that all ranks heard from so far received."""
    after: list[int] = field(default_factory=list)
    """Of a load that the step needs: all blocks of the request from the first loaded one on, and their names."""
    unsure: list[bytes] = field(default_factory=list)
    last_blocks: GroupBlocks | None = None
    """Of a request that finished in the step that it was loaded for."""
    next_save: int | None = None
    save_end: int = 0
    """Blocks that were complete when saves were last planned."""
    tail_known: bool = False
    """The prompt's partial block is in the pool, or on its way."""
    stale: bool = False  # has KV of before a reset: what follows on that is for nobody else
    outgoing: Outgoing | None = None
    """Another engine goes on with it; outlives preemptions."""
    incoming: Incoming | None = None
    """Another engine has begun it."""


class SchedulerSide:
    """Decides loads and saves for all requests of one engine."""

    def __init__(
        self,
        client: Client,
        settings: ConnectorSettings,
        namespaces: Callable[[], list[Namespace] | None],
        *,
        role: Role,
        groups: Groups,
        ranks: int,
        sync: bool = False,
        engine: Engine = Engine(),  # noqa: B008 -- cannot change
    ) -> None:
        """``namespaces``, one for each group, is asked until it answers; before, nothing is looked up or saved.

        ``sync``: loads are for the forward of the step that plans them. ``engine``: its part in transfers.
        """
        self._client = client
        self._settings = settings
        self._find_namespaces = namespaces
        self._namespaces: list[Namespace] = []
        self._namespace_by: float | None = None
        self._namespace_missed = False
        self._role = role
        self._sync = sync
        self._groups = groups
        self._block_tokens = block_tokens = groups.block_tokens
        self._names = Names(groups, discard_tails=settings.discard_partial_chunks)
        self.counters: Counter[str] = Counter()
        self._lookups = Lookups(client, settings.lookup_timeout, self.counters)
        self._saves = Saves(ranks, settings.save_queue_blocks, self.counters)
        self._transfers = Transfers(client, settings, engine, self.counters, self._lookups.step)
        self.watch = Watch(client, settings, self.counters, block_tokens)
        self._requests: dict[str, _Tracked] = {}
        self._loads: list[LoadJob] = []
        self._last_saves: list[SaveJob] = []
        self._pool: Any = None
        self._unsure: Counter[bytes] = Counter()
        """Blocks that the engine's cache offers already, while their load has yet to succeed."""

    # ---- what the engine asks ----

    def bind_block_pool(self, pool: Any) -> None:
        """Take the engine's block pool, in whose blocks saves hold references."""
        self._pool = pool
        self.watch.bind_block_pool(pool)
        self._saves.bind(pool)

    def track(self, request: Any) -> None:
        """Begin a request, whose blocks may be on their way out of files while it waits for its turn."""
        if request.request_id not in self._requests:
            state = self._requests[request.request_id] = _Tracked(request, request.num_preemptions)
            state.outgoing = self._transfers.outgoing(request, self._names) if self._role.saves else None
            state.incoming = self._transfers.incoming(request)
            tokens = request.num_prompt_tokens
            if state.incoming is None and self.watch.reads_ahead(tokens) and self._may_load(request) and self._ready():
                chain = self._names.chain(request)
                known = self.watch.cached_blocks(chain, self._groups.main)
                if known < len(chain):
                    self._lookups.read_ahead(self._namespaces[self._groups.main], chain, known)

    def matched_tokens(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """Return how many tokens after ``computed`` the pool can load, None while it is not known."""
        state = self._state(request)
        have = computed // self._block_tokens
        if self._unsure and any(name in self._unsure for name in self._names.hashes(request)[:have]):
            return None, False  # a load that fails would leave this request with what was not loaded
        if (state.incoming or state.outgoing) and not self._ready() and self._namespace_may_come():
            return None, False
        if state.incoming is not None and state.job is None:
            answer = self._transferred(state, state.incoming, computed)
            if answer is not None:
                return answer
        if state.job is not None or not self._may_load(request):
            # One load a life: what it did not bring is computed, never tried again.
            return 0, False
        if not self._ready():
            return (None, False) if self._namespace_may_come() else (0, False)
        blocks = min(self._names.full_blocks(request), self._groups.blocks_max(request.num_tokens))
        if have >= max(blocks, self._names.has_tail(request)):  # the tail alone is computed in no time
            self._drop_ask(state)
            return 0, False
        if state.ask is not None and have < state.ask.known:
            self._drop_ask(state)  # the engine lost blocks that the lookup took for granted
        if state.ask is None:
            if not self._lookups.step.left:
                return None, False
            also = [Also(self._namespaces[g.number], g.last_blocks) for g in self._groups.others]
            state.ask = self._lookups.ask(
                self._namespaces[self._groups.main],
                self._names.chain(request),
                have,
                also,
                prefetch=self.watch.reads_ahead(request.num_prompt_tokens - computed),
            )
        if not self._lookups.settle(state.ask):
            return None, False
        if state.ask.lookup is not None and state.ask.worth is None:
            state.ask.worth = self.watch.worth(state.ask.lookup, self._names.chain(request))
        found = state.ask.prefix
        if state.ask.lookup is not None and found < state.ask.lookup.prefix and not self._groups.prefixes_help:
            found = have
        tokens = (min(found, blocks) - self._groups.drop_last) * self._block_tokens
        if found > blocks:
            tokens = request.num_prompt_tokens
        if self._sync:
            tokens = min(tokens, request.num_tokens - 1)  # the forward needs something to compute
        if tokens <= computed:
            self._lookups.leases.drop(state.ask.lease)
            return 0, False
        state.first = have
        return tokens - computed, not self._sync

    def allocated(self, request: Any, block_ids: GroupBlocks, tokens: int) -> None:
        """Plan the load of ``tokens`` into the request's blocks; 0 means that nothing is loaded."""
        state = self._state(request)
        if state.job is not None:
            return
        if state.incoming is not None and tokens:
            self._plan_receive(state, state.incoming, block_ids, tokens)
            return
        self._drop_incoming(state)
        if tokens == 0 or state.ask is None or not self._ready():
            self._drop_ask(state)
            return
        end = state.end = state.first + -(-tokens // self._block_tokens)
        # An answer counts from the blocks it was told of; the engine may hold more by now.
        lookup = state.ask.lookup if state.first == state.ask.known else None
        chain = self._names.chain(request)
        state.tail_known = end > self._names.full_blocks(request)
        ranges = self._groups.load_ranges(state.first, end)
        parts = self._parts(chain[state.first : end], block_ids, state.first, ranges, lookup)
        self._begin_load(state, LoadJob(request.request_id, parts, self._sync, whole=not self._groups.prefixes_help))
        if self._sync:
            state.after, state.unsure = list(block_ids[0][state.first :]), chain[state.first :]
            self._unsure.update(state.unsure)

    def build_meta(self, scheduled: dict[str, int], block_ids_of: Callable[[str], GroupBlocks]) -> StepMeta:
        """Return this step's work, given the tokens it schedules per request."""
        self._lookups.step.begin(idle=not scheduled)
        waits = not scheduled and (bool(self._saves) or any(s.loading for s in self._requests.values()))
        wait_s = self._transfers.idle(empty=not scheduled, waits=waits, begins=bool(self._loads))
        meta = StepMeta(self._loads, self._last_saves + self._transfers.in_time(self._saves.cancel), wait_s)
        self._loads, self._last_saves = [], []
        running = [(state.request, n) for name, n in scheduled.items() if (state := self._requests.get(name))]
        self.watch.step_planned(running, self._names.hashes)
        if not self._role.saves:
            return meta
        for request_id, tokens in scheduled.items():
            state = self._requests.get(request_id)
            if state is None:
                continue
            state = self._state(state.request)
            if state.outgoing is not None and not state.outgoing.asked and self._ready():
                self._transfers.open(state.outgoing, self._namespaces)
            if not state.loading:  # what is computed behind blocks that may yet fail to load waits for the next step
                computed = state.request.num_computed_tokens + tokens
                job = self._plan_save(state, computed, partial(block_ids_of, request_id))
                if job is not None and not self._transfers.early(job):
                    meta.saves.append(replace(job, computing=True))
        return meta

    def worker_report(self, meta: WorkerMeta | None, finished_loads: Iterable[str]) -> None:
        """Take what the workers report: saves to let go of, loads that ended on every rank."""
        if meta is not None:
            self.watch.worker_report(meta)
            self._transfers.workers_nodes(meta.nodes)
            for job_id, ranks in meta.saved.items():
                stored = self._saves.report(job_id, ranks, unsaved=job_id in meta.unsaved)
                if stored is not None:
                    self.watch.saved(job_id, stored=stored)
                    self._transfers.saved(job_id)
            for request_id, arrived in meta.loaded.items():
                if (state := self._requests.get(request_id)) is None:
                    continue
                state.arrived = arrived if state.arrived is None else min(arrived, state.arrived)
                if state.job is not None and state.job.sync:  # all ranks report it with the step
                    self._end_load(state, state.job)
        for request_id in finished_loads:
            ended = self._requests.get(request_id)
            if ended is not None and ended.loading and ended.job is not None:  # else it is another connector's
                self._end_load(ended, ended.job)

    def finished(self, request: Any, block_ids: GroupBlocks, *, handed_over: bool = False) -> dict[str, Any] | None:
        """End a request; its running load, if any, is followed to its end.

        ``handed_over``: it ended where another engine may go on. Returns what that has to be told, if anything.
        """
        state = self._requests.get(request.request_id)
        self.watch.finished(request)
        if state is None:
            return None
        params = None
        if state.outgoing is not None and handed_over:
            params = self._transfers.hand_over(state.outgoing, request, self._namespaces)
        if params is None:
            self._drop_outgoing(state)
        if state.loading:  # aborted while its blocks are written, or done in one step: worker_report ends it
            state.last_blocks = block_ids
            return params
        self._drop_ask(state)
        self._drop_incoming(state, back=True)
        del self._requests[request.request_id]
        self._save_rest(state, block_ids)
        return params

    @property
    def saving(self) -> bool:
        """Whether the engine has to keep stepping so that saves are let go of."""
        return bool(self._saves)

    def step_ended(self) -> Data | None:
        """Return what to tell vLLM's metrics, with the end of each step."""
        namespace = self._namespaces[self._groups.main] if self._namespaces else None
        return self.watch.step_ended(namespace, {"save_blocks": self._saves.blocks})

    @property
    def leases(self) -> int:
        """Leases not yet given back, and transfers that are not over."""
        return len(self._lookups.leases) + len(self._transfers)

    def forget_namespace(self) -> None:
        """Find the namespace anew before anything else is looked up or saved."""
        self._namespaces = []
        self.watch.forget_namespace()
        for state in self._requests.values():
            self._drop_ask(state)
            self._drop_outgoing(state)
            state.stale = state.stale or state.loading or state.request.num_computed_tokens > 0

    def close(self) -> None:
        """Release the leases and the client."""
        self._transfers.close()
        self._lookups.close()
        self._client.close()

    # ---- loads ----

    def _begin_load(self, state: _Tracked, job: LoadJob) -> None:
        state.job = job
        state.loading = True
        self._loads.append(job)
        self.counters["load.jobs"] += 1

    def _transferred(self, state: _Tracked, incoming: Incoming, computed: int) -> tuple[int | None, bool] | None:
        """Return as ``matched_tokens`` what another engine has of the prompt; None where that is nothing any more."""
        request = state.request
        if request.skip_reading_prefix_cache:
            incoming.gone = "unread"
        elif not self._transfers.found(incoming, request, self._namespaces) and not incoming.gone:
            return None, False
        tokens = self._groups.transfer_tokens(request.num_prompt_tokens)
        if incoming.gone or min(tokens, request.num_prompt_tokens - 1) <= computed:
            self._drop_incoming(state, incoming.gone)
            return None
        state.first = computed // self._block_tokens
        return tokens - computed, True

    def _plan_receive(self, state: _Tracked, incoming: Incoming, block_ids: GroupBlocks, tokens: int) -> None:
        """Plan to take what another engine stores, as it stores it."""
        request, bt = state.request, self._block_tokens
        tokens += state.first * bt
        end = state.end = -(-tokens // bt)
        names = self._names.of_transfer(request, incoming.transfer)[0][state.first : end]
        state.tail_known = end > request.num_prompt_tokens // bt
        parts = self._parts(names, block_ids, state.first, self._groups.receive_ranges(state.first, tokens))
        nodes = incoming.found.nodes if incoming.found is not None else ()
        job = LoadJob(request.request_id, parts, False, not self._groups.prefixes_help, incoming.transfer, nodes)
        self._begin_load(state, job)
        request.kv_transfer_params["do_remote_prefill"] = False  # a preempted request must not wait again

    def _drop_incoming(self, state: _Tracked, reason: str = "", *, back: bool = False) -> None:
        if state.incoming is not None:
            self._transfers.drop(state.incoming, reason, back=back)
            state.incoming = None

    def _drop_ask(self, state: _Tracked) -> None:
        if state.ask is not None:
            self._lookups.drop(state.ask)
            state.ask = None

    def _end_load(self, state: _Tracked, job: LoadJob) -> None:
        arrived = state.arrived or 0
        missing = job.blocks - arrived
        if state.outgoing is not None:
            state.next_save = 0
        elif not missing:
            state.next_save = state.end - state.tail_known  # which generated tokens may yet fill
        elif not job.whole:
            state.next_save = state.first + arrived
        self.counters["load.arrived"] += arrived  # on every rank
        self.watch.load_ended(job, arrived)
        self._drop_ask(state)
        if job.transfer:
            self._transfers.received(arrived, job.blocks)
            self._drop_incoming(state, back=state.last_blocks is not None)  # aborted meanwhile
        state.loading = False
        self._unsure -= Counter(state.unsure)
        if missing:
            state.tail_known = False
            # The engine computes them again, but offers them to others as they are until that is done.
            self._pool.evict_blocks(set(state.after[arrived:]))
        if state.request.is_finished():
            del self._requests[state.request.request_id]
            if job.sync and not missing and state.last_blocks is not None:
                self._save_rest(state, state.last_blocks)  # freed just now, and nobody else's before the next step
            else:
                self._drop_outgoing(state)

    # ---- saves ----

    def _plan_save(self, state: _Tracked, computed: int, block_ids: Callable[[], GroupBlocks]) -> SaveJob | None:
        """Return a save of the blocks complete with ``computed`` tokens: of those that neither engine nor pool had.

        Of all, where another engine goes on: what this one has it would not find.
        """
        request, outgoing = state.request, state.outgoing
        if state.stale or (outgoing is None and not self._may_save(request)):
            return None
        hashes = self._names.hashes(request)
        private = outgoing is not None and outgoing.private
        names = outgoing.names if outgoing is not None and private else hashes
        further = self._settings.save_decode_cache and not private
        tokens = request.num_tokens if further else request.num_prompt_tokens
        state.save_end = min(min(computed, tokens) // self._block_tokens, self._names.full_blocks(request))
        if state.next_save is None:
            begun = request.num_computed_tokens // self._block_tokens
            state.next_save = 0 if outgoing is not None else self._saves.dropped_before(hashes, begun)
        # What does not fit is tried again with the next step.
        room = self._room(state)
        start, end = state.next_save, min(state.save_end, state.next_save + room)
        tail = int(
            outgoing is not None
            and (outgoing.opened or outgoing.private) and not state.tail_known
            and room > end - start
            and outgoing.tail_is_done(request, computed, end, self._block_tokens)
        )
        if start >= end + tail or not self._ready():
            return None
        state.next_save = end
        wanted = names[start:end]
        if outgoing is not None and tail:
            state.tail_known = True
            wanted = [*wanted, outgoing.names[end]]
        shared = [] if private else hashes[start:end]
        job = self._begin_save(state, wanted, shared, block_ids(), start)
        self.watch.saving(job.job_id, request, shared, start, hashes[start - 1] if start else None)
        return job

    def _begin_save(
        self, state: _Tracked, names: list[bytes], shared: list[bytes], block_ids: GroupBlocks, first: int
    ) -> SaveJob:
        outgoing = state.outgoing
        parts = self._held_parts(names, block_ids, first, first + len(names))
        job = self._saves.begin(parts, shared, outgoing.transfer if outgoing is not None else 0)
        if outgoing is not None:
            self._transfers.saving(outgoing, job.job_id)
        return job

    def _room(self, state: _Tracked) -> int:
        return self._saves.room(transfer=state.outgoing is not None) // len(self._groups.all)

    def _save_rest(self, state: _Tracked, block_ids: GroupBlocks) -> None:
        """Plan the last saves of a finished request, and give up what does not fit."""
        if self._role.saves and state.next_save is not None:  # else it never ran
            computed = state.request.num_computed_tokens
            for job in (self._plan_save(state, computed, lambda: block_ids), self._plan_tail_save(state, block_ids)):
                if job is not None and not self._transfers.early(job):
                    self._last_saves.append(job)
            self._drop_unsaved(state)
        if state.outgoing is not None:
            self._transfers.all_planned(state.outgoing)

    def _plan_tail_save(self, state: _Tracked, block_ids: GroupBlocks) -> SaveJob | None:
        """Return a save of a finished request's partial prompt block: nobody writes behind its tokens any more."""
        request, outgoing = state.request, state.outgoing
        number = request.num_prompt_tokens // self._block_tokens
        if outgoing is not None:
            names = outgoing.names[number:]
        else:
            shares = self._names.shares_tail(request) and self._may_save(request)
            names = [self._names.tail(request)] if shares else []
        computed = request.num_computed_tokens >= request.num_prompt_tokens
        if state.stale or not names or state.tail_known or not computed or not self._ready():
            return None
        if not self._room(state):
            self.counters["save.dropped_blocks"] += 1
            return None
        return self._begin_save(state, names, [], block_ids, number)

    def _drop_outgoing(self, state: _Tracked) -> None:
        if state.outgoing is not None:
            self._transfers.give_up(state.outgoing)
            state.outgoing = None

    def _drop_unsaved(self, state: _Tracked) -> None:
        if state.next_save is not None and state.next_save < state.save_end:
            self._saves.drop(self._names.hashes(state.request)[state.next_save : state.save_end])

    # ---- words ----

    def _parts(
        self,
        names: list[bytes],
        block_ids: GroupBlocks,
        first: int,
        ranges: list[tuple[int, int]],
        lookup: Lookup | None = None,
    ) -> list[Part]:
        """Return a job's parts, the main group's first: of each group the blocks in its range.

        ``names``: of the blocks from number ``first`` on. ``lookup``: the main group's answer from there on.
        """
        parts = []
        for group in (self._groups.all[self._groups.main], *self._groups.others):
            start, end = ranges[group.number]
            if start < end:
                keys, ids = pack_keys(names[start - first : end - first]), list(block_ids[group.number][start:end])
                told = lookup if group.number == self._groups.main and start == first else None
                parts.append(Part(self._namespaces[group.number], keys, ids, told, group.number))
        return parts

    def _held_parts(self, names: list[bytes], block_ids: GroupBlocks, first: int, end: int) -> list[Part]:
        """Return a job's parts with all blocks that the engine holds: those before a window have none any more."""
        none: int = self._pool.null_block.block_id
        ranges = []
        for ids in block_ids:
            start = end
            while start > first and ids[start - 1] != none:
                start -= 1
            ranges.append((start, end))
        return self._parts(names, block_ids, first, ranges)

    def _state(self, request: Any) -> _Tracked:
        """Return the state of the request's present life."""
        self.track(request)
        state = self._requests[request.request_id]
        if state.preemptions != request.num_preemptions:
            self._drop_ask(state)
            self._drop_incoming(state)
            self._drop_unsaved(state)
            outgoing = state.outgoing
            state = self._requests[request.request_id] = _Tracked(request, request.num_preemptions, outgoing=outgoing)
        return state

    def _may_load(self, request: Any) -> bool:
        return (
            self._role.loads
            and not request.skip_reading_prefix_cache
            and request.num_prompt_tokens >= self._settings.load_min_tokens
            and self._names.may_share(request)
        )

    def _may_save(self, request: Any) -> bool:
        return request.num_prompt_tokens >= self._settings.save_min_tokens and self._names.may_share(request)

    def _ready(self) -> bool:
        if not self._namespaces:
            self._namespaces = self._find_namespaces() or []
        return bool(self._namespaces)

    def _namespace_may_come(self) -> bool:
        now = time.monotonic()
        if self._namespace_by is None:
            self._namespace_by = now + NAMESPACE_WAIT_S
        if now < self._namespace_by:
            return True
        if not self._namespace_missed:
            logger.error("the workers did not say how they hold KV; nothing is loaded or saved")
            self._namespace_missed = True
        return False
