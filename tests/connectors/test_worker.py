"""The worker's side without an engine: every job ends in one report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from kvpool.model import KEY_BYTES, Namespace
from kvpool_vllm.metadata import GroupFacts, LoadJob, Part, RankFacts, SaveJob, StepMeta, WorkerMeta
from kvpool_vllm.namespace import Place
from kvpool_vllm.settings import ConnectorSettings
from kvpool_vllm.testing import Faults, FaultyClient, MemoryClient, MemoryPool
from kvpool_vllm.worker import WorkerSide

FACTS = RankFacts((GroupFacts(2, 16, "demo"),), "")
NAMESPACE = Namespace(model="demo", layers=2)
ALONE = Place(0)
DEADLINE_S = 30.0


class Memory:
    """Eight blocks of two layers."""

    def __init__(self) -> None:
        self.bytes = np.arange(8 * 2 * 16, dtype=np.uint8).reshape(8, 2, 16)

    names = ("first", "second")

    def __len__(self) -> int:
        return 2

    def views(self, block_ids: list[int], layers: tuple[int, int] | None = None) -> list[list[np.ndarray]]:
        return [list(self.bytes[block])[slice(*layers or (None,))] for block in block_ids]

    def split(self, parts: int) -> list[Half]:
        assert parts == 2
        return [Half(self, number) for number in range(parts)]


class Half:
    """Half of the bytes of every token, four tokens to a layer."""

    def __init__(self, whole: Memory, number: int) -> None:
        self._bytes = whole.bytes.reshape(8, 2, 4, 4)[..., 2 * number : 2 * number + 2]

    def views(self, block_ids: list[int], layers: tuple[int, int] | None = None) -> list[list[np.ndarray]]:
        return [list(self._bytes[block])[slice(*layers or (None,))] for block in block_ids]


def keys(*names: int) -> bytes:
    return b"".join(bytes([name]) * KEY_BYTES for name in names)


class Harness:
    """A worker's side on a pool in memory."""

    def __init__(self, place: Place = ALONE) -> None:
        self.pool, self.faults, self.memory = MemoryPool(), Faults(), Memory()
        client = FaultyClient(MemoryClient(self.pool), self.faults)
        self.side = WorkerSide(client, ConnectorSettings(load_threads=1), place)  # type: ignore[arg-type]
        self.side.attach([self.memory], FACTS)  # type: ignore[arg-type]

    def save(self, job_id: int, names: bytes, block_ids: list[int]) -> None:
        self.side.start_saves(StepMeta(saves=[SaveJob(job_id, [Part(NAMESPACE, names, block_ids)])]))

    def load(self, request_id: str, names: bytes, block_ids: list[int]) -> None:
        self.side.start_loads(StepMeta(loads=[LoadJob(request_id, [Part(NAMESPACE, names, block_ids)])]))

    def collect(
        self, loads: int = 0, saves: int = 0, aborted: tuple[str, ...] = ()
    ) -> tuple[set[str], set[int], WorkerMeta]:
        """Step until so much was reported; return ids, failed blocks and the report."""
        ids: set[str] = set()
        failed: set[int] = set()
        total = WorkerMeta()
        deadline = time.monotonic() + DEADLINE_S
        while len(ids) < loads or len(total.saved) < saves:
            assert time.monotonic() < deadline
            self.side.wait_for_progress(0.001)
            ids |= self.side.finished_loads(())[0]
            failed |= self.side.failed_blocks()
            total = total.aggregate(self.side.report() or WorkerMeta())
        return ids, failed, total


@pytest.fixture
def harness() -> Iterator[Harness]:
    one = Harness()
    yield one
    one.faults.reset()
    one.side.close()


def test_saved_blocks_can_be_loaded(harness: Harness) -> None:
    """Bytes come back into other blocks as they were."""
    harness.save(1, keys(1, 2), [0, 1])
    assert harness.collect(saves=1)[2].saved == {1: 1}
    harness.load("a", keys(1, 2), [6, 7])
    ids, failed, meta = harness.collect(loads=1)
    assert (ids, failed, meta.loaded) == ({"a"}, set(), {"a": 2})
    assert np.array_equal(harness.memory.bytes[6:8], harness.memory.bytes[0:2])


def test_missing_tail_is_reported_with_the_request(harness: Harness) -> None:
    """Blocks from the first missing one on count as failed, those that did arrive behind it too."""
    harness.save(1, keys(1, 3), [0, 1])
    harness.collect(saves=1)
    harness.load("a", keys(1, 2, 3), [5, 6, 7])
    ids, failed, meta = harness.collect(loads=1)
    assert (ids, failed, meta.loaded) == ({"a"}, {6, 7}, {"a": 1})
    assert harness.side.failed_blocks() == set()


def test_saves_whose_step_has_no_end_begin_with_the_next(harness: Harness) -> None:
    """Once; the engine holds their blocks until they are reported."""
    first, second = (StepMeta(saves=[SaveJob(n, [Part(NAMESPACE, keys(n), [n])])]) for n in (1, 2))
    harness.side.begin_step(first)
    harness.side.begin_step(second)
    assert harness.collect(saves=1)[2].saved == {1: 1}
    harness.side.start_saves(second)
    harness.side.begin_step(StepMeta())
    assert harness.collect(saves=1)[2].saved == {2: 1}


@pytest.mark.parametrize("call", ["get", "put"])
def test_client_that_raises_ends_the_job(harness: Harness, call: str) -> None:
    """Whatever the client does, the engine gets its report."""
    harness.faults.raises = {call: RuntimeError("injected")}
    harness.save(1, keys(1), [0])
    harness.load("a", keys(1), [7])
    ids, failed, meta = harness.collect(loads=1, saves=1)
    assert ids == {"a"}
    assert failed == {7}
    assert meta.saved == {1: 1}


def test_aborted_load_that_no_thread_began_ends_at_once(harness: Harness) -> None:
    """It is reported without being read; the one that runs is reported when it ends."""
    harness.faults.get_gate.close()
    harness.load("running", keys(1), [1])
    assert harness.faults.get_gate.arrived.wait(DEADLINE_S)
    harness.load("queued", keys(2), [2])
    assert harness.side.finished_loads(["running", "queued"])[0] == {"queued"}
    assert harness.side.finished_loads([])[0] == set()
    harness.faults.get_gate.open()
    assert harness.collect(loads=1)[0] == {"running"}
    assert harness.faults.gets == 1


def test_ranks_that_hold_the_same_heads_take_turns_in_storing() -> None:
    """Each block is stored by exactly one of them, and every rank reports every job, or the engine would wait."""
    ranks = [Harness(Place(1, copy, copies=3)) for copy in range(3)]
    for rank in ranks:
        rank.save(1, keys(1, 2, 3, 4, 5, 6), [0, 1, 2, 3, 4, 5])
        rank.save(2, keys(7), [6])
        assert rank.collect(saves=2)[2].saved == {1: 1, 2: 1}
        rank.side.close()
    stored = [sorted(key[0] for _, key, _ in rank.pool.shards) for rank in ranks]
    assert stored == [[3, 6], [1, 4], [2, 5, 7]]
    assert {shard for rank in ranks for _, _, shard in rank.pool.shards} == {1}
    for rank, names in zip(ranks, stored, strict=True):
        for name in names:
            kept = rank.pool.shards[NAMESPACE.digest, keys(name), 1]
            assert kept == [bytes(layer) for layer in rank.memory.bytes[name - 1]]


def test_reports_of_ranks_add_up() -> None:
    """Saves are counted per rank; a load is as good as its worst rank."""
    one, two = WorkerMeta({1: 1, 2: 1}, {"a": 3}), WorkerMeta({1: 1}, {"a": 2, "b": 1})
    assert one.aggregate(two) == WorkerMeta({1: 2, 2: 1}, {"a": 2, "b": 1})


def test_block_counts_only_with_the_shards_of_all_stages() -> None:
    """Each stage of a pipeline stores its own layers; one stage alone is no hit."""
    space = Namespace(model="demo", layers=4, layer_groups=2)
    first, second = (Harness(Place(stage)) for stage in range(2))
    pool = MemoryClient(first.pool)
    for rank, found in ((first, 0), (second, 2)):
        rank.side._client._inner._pool = first.pool
        rank.side.start_saves(StepMeta(saves=[SaveJob(1, [Part(space, keys(1, 2), [0, 1])])]))
        rank.collect(saves=1)
        assert pool.lookup(space, keys(1, 2)).prefix == found
        rank.side.close()
    pool.close()


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_rank_with_several_shards_needs_all_of_a_block(layerwise: bool) -> None:
    """Each is stored by itself; what lacks one has not arrived, however much of it came."""
    space = Namespace(model="demo", layers=2, head_groups=4)
    harness = Harness(Place(2, shards=2))
    side, memory = harness.side, harness.memory
    if layerwise:
        side._settings = replace(side._settings, use_layerwise=True)
    kept = memory.bytes[:3].copy()
    side.start_saves(StepMeta(saves=[SaveJob(1, [Part(space, keys(1, 2, 3), [0, 1, 2])])]))
    harness.collect(saves=1)
    assert side.counters["save.stored"] == 3
    assert sorted((key[0], shard) for _, key, shard in harness.pool.shards) == [
        (block, shard) for block in (1, 2, 3) for shard in (2, 3)
    ]
    part = Part(space, keys(1, 2, 3), [5, 6, 7])
    side.start_loads(StepMeta(loads=[LoadJob("a", [part], sync=layerwise)]))
    side.wait_for_layer("second")
    assert side.finished_loads(())[1] == set() if layerwise else harness.collect(loads=1)[0] == {"a"}
    assert side.counters["load.blocks"] == 3
    assert np.array_equal(memory.bytes[5:], kept)
    for missing, (block, shard) in {2: (3, 2), 1: (2, 3), 0: (1, 3)}.items():
        del harness.pool.shards[space.digest, keys(block), shard]
        before = side.counters["load.blocks"]
        side.start_loads(StepMeta(loads=[LoadJob("b", [part], sync=layerwise)]))
        if layerwise:
            side.finished_loads(())
            side.finished_loads(())
            failed = side.failed_blocks()
        else:
            failed = harness.collect(loads=1)[1]
        assert side.counters["load.blocks"] - before == missing
        assert failed == {5 + block for block in range(missing, 3)}
    side.close()


def test_groups_have_memories_of_their_own() -> None:
    """Each part of a job is for its group's tensors; a load that lacks a block of any group fails whole."""
    harness = Harness()
    window, other = Memory(), Namespace(model="demo", layers=2, kv_group="window")
    window.bytes[:] = 255 - window.bytes
    harness.side.attach([harness.memory, window], FACTS)  # type: ignore[list-item]
    parts = [Part(NAMESPACE, keys(1, 2), [0, 1]), Part(other, keys(2), [5], group=1)]
    kept = harness.memory.bytes[:2].copy(), window.bytes[5].copy()
    harness.side.start_saves(StepMeta(saves=[SaveJob(1, parts)]))
    harness.collect(saves=1)
    target = [replace(parts[0], block_ids=[6, 7]), replace(parts[1], block_ids=[0])]
    harness.side.start_loads(StepMeta(loads=[LoadJob("a", target, whole=True)]))
    assert harness.collect(loads=1)[2].loaded == {"a": 3}
    assert (harness.memory.bytes[6:] == kept[0]).all()
    assert (window.bytes[0] == kept[1]).all()
    harness.pool.shards.pop((other.digest, keys(2), 0))
    harness.side.start_loads(StepMeta(loads=[LoadJob("b", target, whole=True)]))
    finished: set[str] = set()
    while not finished:
        harness.side.wait_for_progress(0.001)
        finished, failed = harness.side.finished_loads(())
    assert (finished, failed) == ({"b"}, {"b"})
    assert harness.side.failed_blocks() == set(), "block numbers say nothing where there are two groups"
    harness.side.close()


def test_an_empty_step_waits_for_what_ends_and_no_longer() -> None:
    """It is over when something has ended, and does not wait once nothing is under way."""
    harness = Harness()
    long_s = 100 * DEADLINE_S
    harness.save(1, keys(1), [0])
    harness.side.wait_for_progress(long_s)
    assert harness.side.finished_loads(()) == (set(), set())
    report = harness.side.report()
    assert report is not None
    assert report.saved == {1: 1}
    harness.side.wait_for_progress(long_s)
    assert harness.side.report() is None
    harness.load("a", keys(1), [5])
    harness.side.wait_for_progress(long_s)
    assert harness.side.finished_loads(())[0] == {"a"}
    harness.side.close()
