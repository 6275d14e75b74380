"""An engine in a few lines: schedules, caches prefixes, preempts and recomputes as vLLM 0.32 does, without a model.

Its "KV" of a token is a digest of everything before it, read from the block memory, so that a block with wrong
bytes shows in every token that is generated behind it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvpool.model import Namespace
from kvpool_vllm.groups import FULL, Group, Groups
from kvpool_vllm.metadata import GroupFacts, RankFacts, StepMeta
from kvpool_vllm.namespace import Place
from kvpool_vllm.scheduler import SchedulerSide
from kvpool_vllm.settings import ConnectorSettings, Role
from kvpool_vllm.testing import Faults, FaultyClient, MemoryClient, MemoryPool
from kvpool_vllm.transfers import Engine
from kvpool_vllm.worker import WorkerSide

TOKENS = 4
LAYERS = 3
ENTRY = 4
NAMESPACE = Namespace(model="model-engine", block_tokens=TOKENS, layers=LAYERS)
FACTS = RankFacts((GroupFacts(LAYERS, TOKENS * ENTRY, "model"),), "")
GROUPS = Groups((Group(0, FULL, TOKENS),), TOKENS, hashes_per_block=1)


def digest(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"|".join(parts), digest_size=ENTRY).digest()


def expected(prompt: list[int], tokens: int) -> list[int]:
    """Return what any engine must answer, whatever was cached or loaded."""
    layers = [b""] * LAYERS
    ids = list(prompt)
    for position in range(len(prompt) + tokens - 1):
        below = ids[position].to_bytes(4, "little")
        for layer in range(LAYERS):
            below = digest(layers[layer], below)
            layers[layer] += below
        if position >= len(prompt) - 1:
            ids.append(next_token(layers[-1]))
    return ids[len(prompt) :]


def next_token(last_layer: bytes) -> int:
    return int.from_bytes(digest(last_layer), "little") % 1000


@dataclass(eq=False)
class Block:
    block_id: int
    ref_cnt: int = 0
    name: bytes | None = None


class Pool:
    """The engine's blocks, and the prefix cache among them."""

    def __init__(self, blocks: int) -> None:
        self.num_gpu_blocks = blocks
        self.null_block = Block(-1)
        self.blocks = [Block(i) for i in range(blocks)]
        self.free = list(self.blocks)  # the first one is taken next
        self.cached: dict[bytes, Block] = {}

    def touch(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            if not block.ref_cnt:
                self.free.remove(block)
            block.ref_cnt += 1

    def free_blocks(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            assert block.ref_cnt > 0
            block.ref_cnt -= 1
            if not block.ref_cnt:
                self.free.append(block)

    def take(self, count: int) -> list[Block]:
        taken = self.free[:count]
        self.evict_blocks({block.block_id for block in taken})
        self.touch(taken)
        return taken

    def evict_blocks(self, block_ids: set[int]) -> None:
        for block_id in block_ids:
            block = self.blocks[block_id]
            if block.name is not None and self.cached.get(block.name) is block:
                del self.cached[block.name]
            block.name = None

    def cache(self, blocks: Iterable[Block], names: Iterable[bytes]) -> None:
        for block, name in zip(blocks, names, strict=False):
            if block.name is None and name not in self.cached:
                block.name = name
                self.cached[name] = block


@dataclass(eq=False)
class Request:
    request_id: str
    prompt: list[int]
    max_tokens: int
    all_token_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_preemptions: int = 0
    cached_blocks: int = 0
    status: str = "waiting"
    mm_features: tuple[()] = ()
    prompt_embeds: None = None
    cache_salt: None = None
    lora_request: Any = None
    skip_reading_prefix_cache: bool = False
    kv_transfer_params: dict[str, Any] | None = None
    returned: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.append(self.prompt)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt)

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    @property
    def answer(self) -> list[int]:
        return self.all_token_ids[len(self.prompt) :]

    def append(self, ids: list[int]) -> None:
        self.all_token_ids = self.all_token_ids + ids
        while (len(self.block_hashes) + 1) * TOKENS <= self.num_tokens:
            start = len(self.block_hashes) * TOKENS
            parent = self.block_hashes[-1] if self.block_hashes else b""
            text = repr(self.all_token_ids[start : start + TOKENS]).encode()
            self.block_hashes.append(hashlib.sha256(parent + text).digest())

    def is_finished(self) -> bool:
        return self.status == "finished"


class Memory:
    """The KV of all blocks, as ``KVBlocks`` shows it."""

    names = tuple(f"layer.{i}" for i in range(LAYERS))
    layer_block_bytes = TOKENS * ENTRY

    def __init__(self, blocks: int) -> None:
        self.bytes = np.zeros((LAYERS, blocks, TOKENS * ENTRY), np.uint8)

    def __len__(self) -> int:
        return LAYERS

    def views(self, block_ids: list[int], layers: tuple[int, int] | None = None) -> list[list[np.ndarray]]:
        first, end = layers or (0, LAYERS)
        return [[self.bytes[layer, block] for layer in range(first, end)] for block in block_ids]


class ModelEngine:
    """One engine with both sides of the connector; the caller steps it."""

    def __init__(
        self,
        pool: MemoryPool,
        faults: Faults,
        *,
        blocks: int = 40,
        budget: int = 16,
        sync: bool = False,
        role: Role = Role(loads=True, saves=True),  # noqa: B008 -- cannot change
        engine: Engine = Engine(),  # noqa: B008 -- as above
        **settings: Any,
    ) -> None:
        self.pool, self.memory, self.budget = Pool(blocks), Memory(blocks), budget
        patient: dict[str, Any] = {"lookup_timeout": "20s", "transfer_timeout": "20s"}  # however busy the machine is
        parsed = ConnectorSettings(gate="off", **(patient | settings))  # what a test stored is what it loads
        self.side = SchedulerSide(
            FaultyClient(MemoryClient(pool), faults),  # type: ignore[arg-type]  # stands in for Client
            parsed,
            lambda: [NAMESPACE],
            role=role,
            groups=GROUPS,
            ranks=1,
            sync=sync,
            engine=engine,
        )
        self.worker = WorkerSide(FaultyClient(MemoryClient(pool), faults), parsed, Place(0))  # type: ignore[arg-type]
        self.worker.attach([self.memory], FACTS)  # type: ignore[arg-type]
        self.side.bind_block_pool(self.pool)
        self.requests: dict[str, Request] = {}
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.received: set[str] = set()
        self.failed: set[str] = set()
        self.just_finished: set[str] = set()
        self.loaded_tokens = self.preemptions = 0
        self.on_layer: Callable[[int], None] = lambda layer: None  # when a forward has computed one

    # ---- what a test does ----

    def submit(
        self, name: str, prompt: list[int], max_tokens: int, params: dict[str, Any] | None = None
    ) -> Request:
        request = self.requests[name] = Request(name, prompt, max_tokens, kv_transfer_params=params)
        self.side.track(request)
        self.waiting.append(request)
        return request

    def abort(self, request: Request) -> None:
        if request.status != "finished":
            self._finish(request)

    @property
    def busy(self) -> bool:
        return bool(self.requests) or self.side.saving

    def forget(self) -> None:
        """Empty the prefix cache."""
        self.pool.evict_blocks({block.block_id for block in self.pool.blocks})

    def close(self) -> None:
        self.side._client._threads.shutdown()  # lookups that nobody waits for any more may still bring a lease
        self.worker.close()
        self.side.close()

    def step(self) -> None:
        scheduled: dict[str, int] = {}
        budget = self._schedule_running(scheduled, self.budget)
        needs_load = self._schedule_waiting(scheduled, budget)
        meta = self.side.build_meta(scheduled, lambda name: [[b.block_id for b in self.requests[name].blocks]])
        finished, self.just_finished = self.just_finished, set()
        outputs = self._execute(scheduled, meta, needs_load)
        for name, tokens in scheduled.items():
            self.requests[name].num_computed_tokens += tokens
        if meta.wait_s:
            self.worker.wait_for_progress(meta.wait_s)
        ended, failed = self.worker.finished_loads(finished)
        assert not failed, "one group of blocks: these are named one by one"
        invalid = self.worker.failed_blocks()
        report = self.worker.report()
        skipped = self._recompute(invalid, scheduled)
        for name, token in outputs.items():
            if name not in skipped:
                self._append(self.requests[name], token)
        self.side.worker_report(report, ended)
        for name in ended:
            if self.requests[name].status == "loading":
                self.received.add(name)
            else:
                self._free(self.requests.pop(name))

    # ---- scheduling ----

    def _schedule_running(self, scheduled: dict[str, int], budget: int) -> int:
        for request in list(self.running):
            tokens = min(request.num_tokens - request.num_computed_tokens, budget)
            if request not in self.running or tokens <= 0:
                continue
            while not self._grow(request, request.num_computed_tokens + tokens):
                victim = self.running.pop()
                budget += scheduled.pop(victim.request_id, 0)
                self._free(victim)
                victim.num_computed_tokens = 0
                victim.num_preemptions += 1
                self.preemptions += 1
                victim.status = "waiting"
                self.waiting.insert(0, victim)
                if victim is request:
                    break
            else:
                scheduled[request.request_id] = tokens
                budget -= tokens
        return budget

    def _schedule_waiting(self, scheduled: dict[str, int], budget: int) -> bool:
        needs_load = False
        for request in list(self.waiting):
            if budget <= 0:
                break
            if request.status == "loading":
                if request.request_id not in self.received:
                    continue
                self._received(request)
            local: list[Block] = []
            external, later = 0, False
            if request.num_computed_tokens == 0:
                local = self._hit(request)
                answer, later = self.side.matched_tokens(request, len(local) * TOKENS)
                if answer is None:
                    continue
                external = answer
                assert later or len(local) * TOKENS + external < request.num_tokens
            computed = request.num_computed_tokens or len(local) * TOKENS + external
            tokens = 0 if later else min(request.num_tokens - computed, budget)
            self.pool.touch(local)
            request.blocks += local
            spare = self._reserved() if later else 0
            if not self._grow(request, computed + tokens, spare):
                if local:
                    self._free(request)
                continue  # those behind it may hold what it waits for
            self.side.allocated(request, [[block.block_id for block in request.blocks]], external)
            self.loaded_tokens += external
            request.num_computed_tokens = computed
            if later:
                request.status = "loading"
                continue
            self._cache(request, computed + tokens)
            needs_load = needs_load or external > 0
            self.waiting.remove(request)
            self.running.append(request)
            request.status = "running"
            scheduled[request.request_id] = tokens
            budget -= tokens
        return needs_load

    def _hit(self, request: Request) -> list[Block]:
        found = []
        for name in request.block_hashes[: (request.num_tokens - 1) // TOKENS]:
            if name not in self.pool.cached:
                break
            found.append(self.pool.cached[name])
        return found

    def _reserved(self) -> int:
        loading = [r for r in self.waiting if r.status in ("loading", "loaded")]
        return sum(-(-(r.num_tokens + 1) // TOKENS) - len(r.blocks) for r in (*loading, *self.running)) + 4

    def _grow(self, request: Request, tokens: int, spare: int = 0) -> bool:
        need = -(-tokens // TOKENS) - len(request.blocks)
        if need > max(0, len(self.pool.free) - spare):
            return False
        if need > 0:
            request.blocks += self.pool.take(need)
        if request.status == "running":
            self._cache(request, tokens)
        return True

    def _cache(self, request: Request, tokens: int) -> None:
        full = min(tokens // TOKENS, len(request.block_hashes))
        if full > request.cached_blocks:
            span = slice(request.cached_blocks, full)
            self.pool.cache(request.blocks[span], request.block_hashes[span])
            request.cached_blocks = full

    def _free(self, request: Request) -> None:
        self.pool.free_blocks(reversed(request.blocks))
        request.blocks, request.cached_blocks = [], 0

    def _received(self, request: Request) -> None:
        self.received.remove(request.request_id)
        if request.request_id in self.failed and not request.num_computed_tokens:
            self._free(request)
        else:
            self._cache(request, request.num_computed_tokens)
        self.failed.discard(request.request_id)
        if request.num_computed_tokens == request.num_tokens:
            request.num_computed_tokens -= 1
        request.status = "loaded"

    # ---- computing ----

    def _execute(self, scheduled: dict[str, int], meta: StepMeta, needs_load: bool) -> dict[str, int]:
        self.worker.begin_step(meta)
        if needs_load:
            self.worker.start_loads(meta)
        below = {
            name: [token.to_bytes(4, "little") for token in request.all_token_ids[start : start + tokens]]
            for name, tokens in scheduled.items()
            for request in [self.requests[name]]
            for start in [request.num_computed_tokens]
        }
        last = dict.fromkeys(scheduled, b"")
        for layer, layer_name in enumerate(Memory.names if scheduled else ()):
            self.worker.wait_for_layer(layer_name)
            for name in scheduled:
                last[name] = self._compute(self.requests[name], layer, below[name])
            self.worker.layer_done(layer_name)
            self.on_layer(layer)
        if not needs_load:
            self.worker.start_loads(meta)
        self.worker.start_saves(meta)
        return {
            name: next_token(last[name])
            for name, tokens in scheduled.items()
            if self.requests[name].num_computed_tokens + tokens == self.requests[name].num_tokens
        }

    def _compute(self, request: Request, layer: int, below: list[bytes]) -> bytes:
        """Compute some tokens in one layer; ``below`` goes in as what the layer below gave, and out as its own."""
        start = request.num_computed_tokens
        rows = self.memory.bytes[layer, [block.block_id for block in request.blocks]]
        before = rows.tobytes()[: start * ENTRY]
        for i, given in enumerate(below):
            below[i] = digest(before, given)
            before += below[i]
            block, slot = divmod(start + i, TOKENS)
            where = self.memory.bytes[layer, request.blocks[block].block_id]
            where[slot * ENTRY : (slot + 1) * ENTRY] = np.frombuffer(below[i], np.uint8)
        return before

    # ---- afterwards ----

    def _recompute(self, invalid: set[int], scheduled: dict[str, int]) -> set[str]:
        """Set requests back to before their first invalid block; returns those whose output does not count."""
        skipped = set()
        for request in [r for r in self.waiting if r.status == "loading"] + self.running:
            before = request.num_computed_tokens - scheduled.get(request.request_id, 0)
            blocks = request.blocks[: -(-before // TOKENS)]
            first = next((i for i, block in enumerate(blocks) if block.block_id in invalid), None)
            if first is None:
                continue
            request.num_computed_tokens = first * TOKENS
            if request.status == "loading":
                self.failed.add(request.request_id)
            else:
                skipped.add(request.request_id)
        return skipped

    def _append(self, request: Request, token: int) -> None:
        request.append([token])
        if len(request.answer) == request.max_tokens:
            self._finish(request)

    def _finish(self, request: Request) -> None:
        loading = request.status == "loading" and request.request_id not in self.received
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)
        request.status = "finished"
        self.received.discard(request.request_id)
        self.failed.discard(request.request_id)
        self.just_finished.add(request.request_id)
        blocks = [[block.block_id for block in request.blocks]]
        by_length = len(request.answer) == request.max_tokens
        request.returned = self.side.finished(request, blocks, handed_over=by_length)
        if not loading:
            self._free(request)
            del self.requests[request.request_id]
