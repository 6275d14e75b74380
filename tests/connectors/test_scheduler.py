"""The scheduler's side without an engine: what it answers, plans and holds."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from kvpool.model import KEY_BYTES, Namespace, pack_keys
from kvpool_vllm import step_time
from kvpool_vllm.groups import FULL, SLIDING_WINDOW, Group, Groups
from kvpool_vllm.metadata import StepMeta, WorkerMeta
from kvpool_vllm.saves import SHARE
from kvpool_vllm.scheduler import SchedulerSide
from kvpool_vllm.settings import ConnectorSettings, Role
from kvpool_vllm.testing import Faults, FaultyClient, MemoryClient, MemoryPool

TOKENS = 4
BOTH = Role(loads=True, saves=True)
NAMESPACE = Namespace(model="demo", block_tokens=TOKENS)
WINDOW = Namespace(model="demo", block_tokens=TOKENS, kv_group="window")
GROUPS = Groups((Group(0, FULL, TOKENS),), TOKENS, hashes_per_block=1)


def hashes_of(prompt: str, blocks: int) -> list[bytes]:
    return [hashlib.sha256(f"{prompt}/{i}".encode()).digest() for i in range(blocks)]


@dataclass
class Request:
    request_id: str
    num_prompt_tokens: int
    block_hashes: list[bytes]
    num_computed_tokens: int = 0
    num_preemptions: int = 0
    lora_request: Any = None
    skip_reading_prefix_cache: bool = False
    mm_features: Any = ()
    prompt_embeds: Any = None
    cache_salt: str | None = None
    kv_transfer_params: dict[str, Any] | None = None
    max_tokens: int = 16
    all_token_ids: list[int] = field(default_factory=list)
    over: bool = False

    def __post_init__(self) -> None:
        self.all_token_ids = self.all_token_ids or list(range(self.num_prompt_tokens))

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    def is_finished(self) -> bool:
        return self.over


def request_of(name: str, tokens: int, prompt: str = "p") -> Request:
    return Request(name, tokens, hashes_of(prompt, tokens // TOKENS))


@dataclass
class Block:
    block_id: int
    ref_cnt: int = 0


@dataclass
class BlockPool:
    num_gpu_blocks: int = 100
    blocks: list[Block] = field(default_factory=lambda: [Block(i) for i in range(100)])
    evicted: set[int] = field(default_factory=set)
    cached: set[bytes] = field(default_factory=set)
    null_block: Block = field(default_factory=lambda: Block(-1))

    def touch(self, blocks: list[Block]) -> None:
        for block in blocks:
            block.ref_cnt += 1

    def free_blocks(self, blocks: Iterator[Block]) -> None:
        for block in blocks:
            block.ref_cnt -= 1

    def get_cached_block(self, block_hash: bytes, groups: list[int]) -> list[Block] | None:
        assert groups == [0]
        return [self.blocks[0]] if block_hash in self.cached else None

    def evict_blocks(self, block_ids: set[int]) -> None:
        self.evicted |= block_ids

    @property
    def held(self) -> int:
        return sum(block.ref_cnt for block in self.blocks)


class Harness:
    """A scheduler's side on a pool in memory; it waits for lookups unless a gate holds them."""

    def __init__(self, *, role: Role = BOTH, sync: bool = False, groups: Groups = GROUPS, **settings: Any) -> None:
        self.pool, self.faults, self.blocks = MemoryPool(), Faults(), BlockPool()
        self.client = MemoryClient(self.pool)
        self.side = SchedulerSide(
            FaultyClient(self.client, self.faults),  # type: ignore[arg-type]  # stands in for Client
            ConnectorSettings(**({"lookup_timeout": "20s"} | settings)),  # however busy the machine is
            lambda: [NAMESPACE, WINDOW],
            role=role,
            groups=groups,
            ranks=2,
            sync=sync,
        )
        self.side.bind_block_pool(self.blocks)

    def store(self, hashes: list[bytes]) -> None:
        self.client.put(NAMESPACE, hashes, [b"x"] * len(hashes))

    def matched(self, request: Request, computed: int = 0) -> tuple[int | None, bool]:
        """Ask as the engine does, step by step, until there is an answer."""
        for _ in range(5000):
            answer = self.side.matched_tokens(request, computed)
            if answer[0] is not None:
                return answer
            self.side.build_meta({}, lambda _: ([],))
        raise AssertionError("no answer")

    def step(self, **scheduled: int) -> StepMeta:
        return self.side.build_meta(scheduled, lambda _: (list(range(50)),))

    def settle_leases(self) -> None:
        """Wait until the keeper has released what it was told to."""
        done = threading.Event()
        for _ in range(1000):
            if self.side.leases == len(self.side._lookups.leases._held):
                return
            done.wait(0.005)
        raise AssertionError("leases were not released")


@pytest.fixture
def harness() -> Iterator[Harness]:
    one = Harness()
    yield one
    one.faults.reset()
    one.side.close()


def test_miss_is_no_load(harness: Harness) -> None:
    """An empty pool offers nothing."""
    assert harness.matched(request_of("a", 12)) == (0, False)


def test_hit_is_offered_once_asked_and_remembered(harness: Harness) -> None:
    """The engine may ask in every step; the pool is asked once."""
    request = request_of("a", 14)
    harness.store(request.block_hashes[:2])
    assert harness.matched(request) == (8, True)
    for _ in range(10):
        assert harness.side.matched_tokens(request, 0) == (8, True)
    assert harness.faults.lookups == 1


def test_engine_hit_is_subtracted(harness: Harness) -> None:
    """Only what the engine lacks is loaded, into the blocks behind its own."""
    request = request_of("a", 12)
    harness.store(request.block_hashes)
    assert harness.matched(request, 4) == (8, True)
    harness.side.allocated(request, [[10, 11, 12]], 8)
    (job,) = harness.step().loads
    assert job.parts[0].block_ids == [11, 12]
    assert job.parts[0].keys == b"".join(h[:KEY_BYTES] for h in request.block_hashes[1:])


def test_lookup_that_takes_long_is_asked_for_later(harness: Harness) -> None:
    """The scheduler's thread gets None and goes on."""
    harness.faults.lookup_gate.close()
    request = request_of("a", 12)
    harness.store(request.block_hashes)
    assert harness.side.matched_tokens(request, 0) == (None, False)
    assert harness.side.matched_tokens(request, 0) == (None, False)
    harness.faults.lookup_gate.open()
    assert harness.matched(request) == (12, True)
    assert harness.faults.lookups == 1


def test_lookup_that_never_answers_is_a_miss() -> None:
    """After a few of its own timeouts the request is computed, and a late lease is given back."""
    harness = Harness(lookup_timeout=1)
    harness.faults.lookup_gate.close()
    request = request_of("a", 12)
    harness.store(request.block_hashes)
    assert harness.matched(request) == (0, False)
    assert harness.side.counters["lookup.abandoned"] == 1
    harness.faults.lookup_gate.open()
    harness.side._client.close()  # waits for the lookup
    harness.settle_leases()
    assert harness.pool.leases_given == 1
    assert not harness.pool.leases
    harness.side.close()


def test_lookup_that_fails_is_a_miss(harness: Harness) -> None:
    """An exception of the client is a miss, once."""
    harness.faults.raises = {"lookup": RuntimeError("injected")}
    request = request_of("a", 12)
    assert harness.matched(request) == (0, False)
    assert harness.matched(request) == (0, False)
    assert harness.faults.lookups == 1


def test_lookup_that_cannot_be_asked_is_a_miss(harness: Harness) -> None:
    """A client that is closed, or can start no thread, raises at once: no exception reaches the engine."""
    harness.client.close()
    harness.side._lookups._client._threads.shutdown()  # type: ignore[attr-defined]  # the faulty client's own
    assert harness.matched(request_of("a", 12)) == (0, False)
    assert harness.side.counters["lookup.errors"] == 1


def test_report_about_nobody_is_passed_over(harness: Harness) -> None:
    """A worker may report a load of which the scheduler knows nothing (any more)."""
    harness.side.worker_report(WorkerMeta(loaded={"stranger": 3}), ["stranger"])
    assert harness.side.leases == 0


def test_engine_that_lost_blocks_asks_again(harness: Harness) -> None:
    """An answer that took blocks of the engine for granted does not outlive them."""
    request = request_of("a", 12)
    harness.store(request.block_hashes[2:])
    assert harness.matched(request, 8) == (4, True)
    assert harness.matched(request, 0) == (0, False)
    assert harness.faults.lookups == 2


def test_lease_lives_as_long_as_the_load(harness: Harness) -> None:
    """Taken by the lookup, kept while the load waits and runs, released when all ranks are done."""
    request = request_of("a", 12)
    harness.store(request.block_hashes)
    harness.matched(request)
    assert len(harness.pool.leases) == 1
    harness.side.allocated(request, [[1, 2, 3]], 12)
    harness.step()
    harness.side.worker_report(WorkerMeta(loaded={"a": 3}), [])
    assert len(harness.pool.leases) == 1
    harness.side.worker_report(WorkerMeta(loaded={"a": 3}), ["a"])
    harness.settle_leases()
    assert not harness.pool.leases


def test_load_is_tried_once(harness: Harness) -> None:
    """After a load that failed the request is computed: it would otherwise fail for ever."""
    request = request_of("a", 12)
    harness.store(request.block_hashes)
    harness.matched(request)
    harness.side.allocated(request, [[1, 2, 3]], 12)
    harness.step()
    harness.side.worker_report(WorkerMeta(loaded={"a": 0}), ["a"])
    assert harness.matched(request) == (0, False)


def test_preempted_request_may_load_again(harness: Harness) -> None:
    """A preemption takes the request's blocks, so it asks the pool anew."""
    request = request_of("a", 12)
    harness.store(request.block_hashes)
    harness.matched(request)
    harness.side.allocated(request, [[1, 2, 3]], 12)
    harness.step()
    harness.side.worker_report(WorkerMeta(loaded={"a": 3}), ["a"])
    request.num_preemptions = 1
    assert harness.matched(request) == (12, True)


def test_aborted_load_is_followed_to_its_end(harness: Harness) -> None:
    """The lease of an aborted request stays while its load still reads, and no longer."""
    request = request_of("a", 12)
    harness.store(request.block_hashes)
    harness.matched(request)
    harness.side.allocated(request, [[1, 2, 3]], 12)
    harness.step()
    request.over = True
    harness.side.finished(request, [list(range(50))])
    assert harness.side.leases == 1
    harness.side.worker_report(WorkerMeta(loaded={"a": 3}), ["a"])
    harness.settle_leases()
    assert harness.side.leases == 0
    assert not harness.side._requests


def test_load_refused_by_the_engine_releases_the_lease(harness: Harness) -> None:
    """Another connector was chosen: nothing is loaded here."""
    request = request_of("a", 12)
    harness.store(request.block_hashes)
    harness.matched(request)
    harness.side.allocated(request, [[1, 2, 3]], 0)
    harness.settle_leases()
    assert not harness.pool.leases
    assert harness.step().loads == []


def test_full_blocks_of_the_prompt_are_saved_as_they_fill(harness: Harness) -> None:
    """Chunks save what they complete; the partial block and generated tokens are not saved."""
    request = request_of("a", 14)
    request.block_hashes += hashes_of("generated", 3)
    harness.matched(request)
    harness.side.allocated(request, [list(range(50))], 0)
    saved: list[list[int]] = []
    for tokens in (6, 6, 2, 1, 1, 8):
        saved.extend(job.parts[0].block_ids for job in harness.step(a=tokens).saves)
        request.num_computed_tokens += tokens
    assert saved == [[0], [1, 2]]


def test_nothing_known_is_saved_again(harness: Harness) -> None:
    """Blocks that the engine or the pool had are not saved; blocks that failed to load are."""
    request = request_of("a", 20)
    harness.store(request.block_hashes)
    harness.matched(request, 4)
    harness.side.allocated(request, [list(range(50))], 16)
    harness.step()
    harness.side.worker_report(WorkerMeta(loaded={"a": 2}), ["a"])
    request.num_computed_tokens = 12
    (job,) = harness.step(a=8).saves
    assert job.parts[0].block_ids == [3, 4]


def test_saved_blocks_are_held_until_all_ranks_report(harness: Harness) -> None:
    """The engine may free a request at once: saves hold references of their own."""
    request = request_of("a", 12)
    harness.side.track(request)
    (job,) = harness.step(a=12).saves
    request.over = True
    harness.side.finished(request, [list(range(50))])
    assert (harness.blocks.held, harness.side.saving) == (3, True)
    harness.side.worker_report(WorkerMeta(saved={job.job_id: 1}), [])
    assert (harness.blocks.held, harness.side.saving) == (3, True)
    harness.side.worker_report(WorkerMeta(saved={job.job_id: 1}), [])
    assert (harness.blocks.held, harness.side.saving) == (0, False)


def test_saves_hold_a_bounded_share_of_the_engine(harness: Harness) -> None:
    """A pool that takes nothing costs misses later, not room now."""
    limit = harness.blocks.num_gpu_blocks // SHARE
    for i in range(5):
        request = request_of(f"r{i}", 10 * TOKENS, f"p{i}")
        harness.side.track(request)
        harness.step(**{f"r{i}": 10 * TOKENS})
        request.num_computed_tokens = 10 * TOKENS
        harness.side.finished(request, [list(range(50))])
    assert harness.blocks.held <= limit
    assert harness.side.counters["save.dropped_blocks"] == 50 - harness.blocks.held


def test_adapters_and_unread_requests(harness: Harness) -> None:
    """An adapter's KV is neither loaded nor saved; a request that must be computed is still saved."""
    adapter = request_of("a", 12)
    adapter.lora_request = object()
    unread = request_of("b", 12)
    unread.skip_reading_prefix_cache = True
    harness.store(adapter.block_hashes)
    assert harness.matched(adapter) == harness.matched(unread) == (0, False)
    assert harness.faults.lookups == 0
    assert [job.job_id for job in harness.step(a=12, b=12).saves] == [1]


def test_hashes_finer_than_blocks() -> None:
    """Each hash covers all before it, so the last one in a block names the block."""
    harness = Harness(groups=replace(GROUPS, hashes_per_block=2))
    request = request_of("a", 12)
    request.block_hashes = hashes_of("fine", 7)
    assert harness.side._names.hashes(request) == [request.block_hashes[i] for i in (1, 3, 5)]
    harness.side.close()


HYBRID = Groups((Group(0, SLIDING_WINDOW, TOKENS, 9), Group(1, FULL, TOKENS)), TOKENS, hashes_per_block=1)
"""Two blocks of window."""


class HybridHarness(Harness):
    def __init__(self) -> None:
        super().__init__(groups=HYBRID)
        self.side._find_namespaces = lambda: [WINDOW, NAMESPACE]

    def store_window(self, hashes: list[bytes]) -> None:
        self.client.put(WINDOW, hashes, [b"x"] * len(hashes))


@pytest.fixture
def hybrid() -> Iterator[HybridHarness]:
    harness = HybridHarness()
    yield harness
    harness.settle_leases()
    assert harness.side.leases == 0
    harness.side.close()


def test_hybrid_loads_all_of_one_group_and_the_window_of_the_other(hybrid: HybridHarness) -> None:
    """A load has a part for each group, the main one first; the window's blocks before it have no place to go."""
    request = request_of("a", 33)
    hybrid.store(request.block_hashes)
    hybrid.store_window(request.block_hashes[3:7])
    assert hybrid.matched(request) == (7 * TOKENS, True)
    window = [-1] * 5 + [60, 61, 62]
    hybrid.side.allocated(request, (window, list(range(10, 18))), 7 * TOKENS)
    (job,) = hybrid.step().loads
    assert job.whole
    assert [(part.group, part.namespace, part.block_ids) for part in job.parts] == [
        (1, NAMESPACE, list(range(10, 17))),
        (0, WINDOW, [60, 61]),
    ]
    assert job.parts[1].keys == pack_keys(request.block_hashes[5:7])
    hybrid.side.worker_report(WorkerMeta(loaded={"a": job.blocks}), ["a"])
    assert hybrid.side._requests["a"].next_save == 7


def test_hybrid_prefix_ends_where_a_window_does(hybrid: HybridHarness) -> None:
    """What the engine holds counts as there; a window with a gap shortens the prefix."""
    request = request_of("a", 40)
    hybrid.store(request.block_hashes)
    assert hybrid.matched(request, 2 * TOKENS) == (0, False)
    hybrid.side.finished(request, ([], []))
    request = request_of("b", 40)
    hybrid.store_window(request.block_hashes[2:5] + request.block_hashes[6:])
    assert hybrid.matched(request, 2 * TOKENS) == (7 * TOKENS, True), "not the last block: its last token is computed"
    hybrid.pool.shards.pop((WINDOW.digest, request.block_hashes[8][:16], 0))
    hybrid.side.finished(request, ([], []))
    request = request_of("c", 40)
    assert hybrid.matched(request, 2 * TOKENS) == (6 * TOKENS, True)
    hybrid.side.finished(request, ([], []))


def test_hybrid_load_that_fails_is_computed_from_the_start(hybrid: HybridHarness) -> None:
    """The engine begins anew; what it computes is saved from where it then stands."""
    request = request_of("a", 33)
    hybrid.store(request.block_hashes)
    hybrid.store_window(request.block_hashes)
    tokens, _ = hybrid.matched(request)
    assert tokens == 8 * TOKENS
    blocks = ([-1] * 6 + [60, 61, 62], list(range(10, 19)))
    hybrid.side.allocated(request, blocks, tokens)
    hybrid.step()
    hybrid.side.worker_report(WorkerMeta(loaded={"a": 9}), ["a"])
    assert hybrid.matched(request) == (0, False), "one load a life"
    meta = hybrid.side.build_meta({"a": 33}, lambda _: (list(range(60, 69)), list(range(10, 19))))
    assert [(part.group, len(part.block_ids)) for part in meta.saves[0].parts] == [(1, 8), (0, 8)]
    hybrid.side.worker_report(WorkerMeta(saved={1: 2}), [])
    hybrid.side.finished(request, ([], []))


def test_hybrid_saves_what_the_engine_still_holds(hybrid: HybridHarness) -> None:
    """Blocks that slid out of a window are gone; those of the other group are stored all the same."""
    request = request_of("a", 33)
    assert hybrid.matched(request) == (0, False)
    hybrid.side.allocated(request, ([], []), 0)
    meta = hybrid.side.build_meta({"a": 33}, lambda _: ([-1] * 5 + [60, 61, 62, 63], list(range(10, 19))))
    (job,) = meta.saves
    assert [(part.group, part.block_ids) for part in job.parts] == [(1, list(range(10, 18))), (0, [60, 61, 62])]
    assert job.parts[1].keys == pack_keys(request.block_hashes[5:8])
    assert hybrid.blocks.held == 11
    hybrid.side.worker_report(WorkerMeta(saved={job.job_id: 2}), [])
    assert hybrid.blocks.held == 0
    hybrid.side.finished(request, ([], []))


def test_draft_model_gives_up_the_last_block() -> None:
    """What it keeps for a block's last token depends on the token behind it, which the block's hash does not name."""
    harness = Harness(groups=replace(GROUPS, drop_last=True))
    request = request_of("a", 33)
    harness.store(request.block_hashes)
    assert harness.matched(request) == (7 * TOKENS, True)
    harness.side.finished(request, ([],))
    harness.settle_leases()
    harness.side.close()


def test_lookups_share_the_time_of_a_step(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes long uses it up: others are asked in later steps, and the first one is not waited for again."""
    monkeypatch.setattr(step_time, "STEP_S", 0.2)  # of which a busy machine does not take all for nothing
    harness.faults.lookup_gate.close()
    harness.step(c=1)
    first, second = request_of("a", 12), request_of("b", 12, "q")
    assert harness.side.matched_tokens(first, 0) == (None, False)
    assert harness.side.matched_tokens(second, 0) == (None, False)
    assert harness.side.counters["lookup.asked"] == 1
    harness.step(c=1)
    assert harness.side.matched_tokens(first, 0) == (None, False)
    assert harness.side._lookups.step.left, "the engine has work, and no time for one answer twice"
    assert harness.side.matched_tokens(second, 0) == (None, False)
    assert harness.side.counters["lookup.asked"] == 2


def test_request_waits_until_the_workers_said_what_they_hold(harness: Harness) -> None:
    """The engine's first request is no miss; but if nothing comes it is computed."""
    found: list[Any] = []
    harness.side._find_namespaces = lambda: list(found)
    request = request_of("a", 12)
    harness.store(request.block_hashes)
    assert harness.side.matched_tokens(request, 0) == (None, False)
    harness.side._namespace_by = 0.0
    assert harness.side.matched_tokens(request, 0) == (0, False)
    found += [NAMESPACE, WINDOW]
    assert harness.matched(request) == (12, True)


@pytest.mark.parametrize(("loads", "saves"), [(False, True), (True, False), (False, False)])
def test_role_that_does_half(loads: bool, saves: bool) -> None:
    """A producer asks for nothing, a consumer saves nothing."""
    harness = Harness(role=Role(loads=loads, saves=saves))
    request = request_of("a", 12)
    harness.store(request.block_hashes)
    assert harness.matched(request) == ((12, True) if loads else (0, False))
    assert harness.faults.lookups == loads
    harness.side.allocated(request, [list(range(50))], 0)
    assert bool(harness.step(a=12).saves) == saves
    harness.side.finished(request, [list(range(50))])
    harness.settle_leases()
    harness.side.close()


def test_load_of_another_connector_is_none_of_ours(harness: Harness) -> None:
    """Beside others all hear of every load that ended."""
    request = request_of("a", 12)
    harness.store(request.block_hashes)
    harness.matched(request)
    harness.side.allocated(request, [list(range(50))], 0)
    harness.side.worker_report(None, ["a", "unheard of"])
    request.num_computed_tokens = 8
    (job,) = harness.step(a=4).saves
    assert job.parts[0].block_ids == [2]


@pytest.mark.parametrize("request_has", [{"mm_features": ("image",)}, {"prompt_embeds": object()}])
def test_partial_block_that_tokens_do_not_name(request_has: dict[str, Any]) -> None:
    """Where more than tokens went into it, a partial block is neither looked up nor saved."""
    harness = Harness(discard_partial_chunks=False)
    plain, other = request_of("a", 14), request_of("b", 14)
    for name, value in request_has.items():
        setattr(other, name, value)
    assert len(harness.side._names.chain(plain)) == 4
    assert len(harness.side._names.chain(other)) == 3
    salted = request_of("c", 3)
    salted.cache_salt = "secret"
    assert harness.side._names.chain(salted) != harness.side._names.chain(request_of("d", 3))
    harness.side.close()


class ReadingAhead(Harness):
    """A pool with storage behind it; ``asked`` collects (first block, blocks, lease) of lookups that read ahead."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.asked: list[tuple[int, int, bool]] = []
        self.client.reads_files = lambda: True  # type: ignore[method-assign]
        lookup = self.client.lookup

        def spied(namespace: Namespace, chain: list[bytes], *, prefetch: bool = False, **options: Any) -> Any:
            if prefetch:
                self.asked.append((options["known_prefix"], len(chain), options.get("lease", False)))
            return lookup(namespace, chain, **options)

        self.client.lookup = spied  # type: ignore[method-assign]

    def idle(self) -> None:
        """Wait for what was asked."""
        self.side._client._threads.submit(lambda: None).result()
        self.side._client._threads.submit(lambda: None).result()


@pytest.mark.parametrize("cached", [0, 2, 5])
def test_files_are_read_while_a_request_waits(cached: int) -> None:
    """From its arrival on, but for what the engine holds itself; without a lease, and once."""
    harness, request = ReadingAhead(), request_of("a", 20)
    try:
        assert harness.side._ready()
        harness.blocks.cached = set(request.block_hashes[:cached])
        harness.side.track(request)
        harness.side.track(request)
        wanted = [(cached, 5, False)] if cached < 5 else []
        deadline = time.monotonic() + 30
        harness.idle()
        while len(harness.asked) < len(wanted) and time.monotonic() < deadline:
            harness.idle()
        assert harness.asked == wanted
    finally:
        harness.side.close()


def test_the_lookup_before_a_load_reads_ahead_too() -> None:
    """For the request may yet wait for room."""
    harness, request = ReadingAhead(), request_of("a", 20)
    try:
        harness.store(request.block_hashes)
        assert harness.matched(request) == (20, True)
        assert (0, 5, True) in harness.asked
    finally:
        harness.side.close()


@pytest.mark.parametrize(
    "options",
    [
        {"role": Role(loads=False, saves=True)},
        {"prefetch": False},
        {"load_min_tokens": 100},
    ],
)
def test_who_does_not_load_does_not_read_ahead(options: dict[str, Any]) -> None:
    """Nor who was told not to."""
    harness = ReadingAhead(**options)
    try:
        assert harness.side._ready()
        harness.side.track(request_of("a", 20))
        harness.idle()
        assert harness.asked == []
        assert not harness.side.counters["lookup.read_ahead"]
    finally:
        harness.side.close()
