"""Which answers are worth a load, and what the scheduler's side tells."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

from kvpool.client_results import Lookup, Run
from kvpool.config import ConnectorSettings, boot_id
from kvpool.model import Namespace, NodeAddress
from kvpool_vllm.gate import SAMPLES_MIN
from kvpool_vllm.metadata import LoadJob, LoadSeen, Part, WorkerMeta
from kvpool_vllm.tally import empty, merge
from kvpool_vllm.watch import Watch, farthest

TOKENS = 16
SPACE = Namespace(model="demo", block_tokens=TOKENS)
CHAIN = [bytes([i]) * 32 for i in range(10)]
NEAR = NodeAddress("near", "127.0.0.1", 1, "/sock", boot_id())
FAR = NodeAddress("far", "10.0.0.2", 1, "/sock", "another")


BACKEND = b"0123456789abcdef"
THERE, HERE = ("far", "far:fs:30313233"), ("near", "near:fs:30313233")


class Client:
    def __init__(self) -> None:
        self.unusable: set[str] = set()
        self.files = False

    def storages(self, address: NodeAddress, backend: bytes) -> list[tuple[str, ...]]:
        assert backend == BACKEND
        return [HERE, THERE] if address is FAR else [HERE]

    def reads_files(self) -> bool:
        return self.files

    def unusable_nodes(self) -> set[str]:
        return self.unusable

    def stats(self) -> dict[str, int]:
        return {}


class Side:
    def __init__(self, **settings: str) -> None:
        self.client, self.counters = Client(), Counter[str]()
        self.watch = Watch(self.client, ConnectorSettings(**settings), self.counters, TOKENS)  # type: ignore[arg-type]

    def worth(self, *runs: tuple[int, tuple[NodeAddress, ...]], reason: str = "complete", known: int = 0) -> int:
        """Judge an answer; ``runs``: blocks and who has them."""
        found = [Run(blocks, [(owner, "dram", (0,), b"") for owner in owners]) for blocks, owners in runs]
        return self.judge(found, reason, known)

    def judge(self, found: list[Run], reason: str = "complete", known: int = 0) -> int:
        return self.watch.worth(Lookup(known + sum(run.blocks for run in found), reason, "", 0, known, found), CHAIN)

    def loaded(self, name: str, blocks: int, seconds: float, tiers: dict[str, int], arrived: int | None = None) -> None:
        self.watch.worker_report(WorkerMeta(seen={name: LoadSeen(seconds, tiers)}))
        job = LoadJob(name, [Part(SPACE, b"", list(range(blocks)))])
        self.watch.load_ended(job, blocks if arrived is None else arrived)


@pytest.fixture
def side() -> Side:
    return Side()


def test_answers_are_used_whole_as_long_as_owners_answer(side: Side) -> None:
    """With known blocks in front too; what is missing is counted by reason."""
    assert side.worth((4, (NEAR,)), (6, (FAR,))) == 10
    assert side.worth((3, (FAR,)), reason="not_stored", known=2) == 5
    assert side.counters == {"miss.not_stored": 5}


def test_blocks_whose_owners_are_left_alone_end_the_prefix(side: Side) -> None:
    """Told by any rank; another owner that answers will do."""
    side.watch.worker_report(WorkerMeta(unusable={7: frozenset({"far"})}))
    assert side.worth((4, (NEAR,)), (3, (FAR,)), (3, (NEAR,))) == 4
    assert side.counters == {"miss.breaker_open": 6}
    assert side.worth((4, (NEAR,)), (6, (FAR, NEAR))) == 10
    side.watch.worker_report(WorkerMeta(unusable={8: frozenset({"far"}), 7: frozenset()}))
    assert side.worth((10, (FAR,))) == 0
    side.watch.worker_report(WorkerMeta(unusable={8: frozenset()}))
    assert side.worth((10, (FAR,))) == 10


def test_a_node_that_is_back_elsewhere_is_used(side: Side) -> None:
    """Its old address is left alone for good: nobody answers there any more."""
    side.client.unusable = {FAR.place}
    assert side.worth((10, (FAR,))) == 0
    assert side.worth((10, (replace(FAR, port=2),))) == 10


def test_nodes_that_the_scheduler_misses_itself_count_too(side: Side) -> None:
    """Its own client may notice first."""
    side.client.unusable = {"near"}
    assert side.worth((10, (NEAR,))) == 0


@pytest.mark.parametrize("gate", ["auto", "off"])
def test_loads_slower_than_computing_are_left_out(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From what loads and steps took; each distance is judged by itself."""
    now = 0.0
    monkeypatch.setattr("kvpool_vllm.watch.time.monotonic", lambda: now)
    side, told = Side(gate=gate), empty()

    def tell() -> None:
        data = side.watch.step_ended(SPACE, {})
        if data is not None:
            merge(told, data)

    for i in range(SAMPLES_MIN):
        request = type("Request", (), {"num_computed_tokens": 0, "num_prompt_tokens": 100, "request_id": str(i)})
        side.watch.step_planned([(request, 100)], lambda _: [])
        now += 0.1
        tell()
        side.loaded(f"slow {i}", 10, 1.0, {"remote": 10})
        side.loaded(f"quick {i}", 10, 0.01, {"local": 10})
    assert side.worth((10, (FAR,))) == (0 if gate == "auto" else 10)
    assert side.worth((10, (NEAR,))) == 10
    assert side.worth((5, (NEAR,)), (5, (FAR,))) == (0 if gate == "auto" else 10), "the farthest part rules"
    tell()
    assert told["gauges"]["scheduler"] == {
        "tokens_per_second.prefill": 1000,
        "tokens_per_second.remote": 160,
        "tokens_per_second.local": 16000,
    }
    assert told["counters"].get("gate.skipped", 0) == (2 if gate == "auto" else 0)


def memory(blocks: int, owner: NodeAddress = NEAR) -> Run:
    return Run(blocks, [(owner, "dram", (0,), b"")])


def files(blocks: int, server: NodeAddress = NEAR) -> Run:
    return Run(blocks, [(server, "fs", (0,), BACKEND)])


def test_files_that_somebody_can_read_count(side: Side) -> None:
    """Storage that every node's way to is left alone ends the prefix; the nodes' memory does not."""
    assert side.judge([memory(3), files(4, FAR), memory(3, FAR)]) == 10
    side.client.unusable = {HERE[1]}
    assert side.judge([memory(3), files(4, FAR)]) == 7, "the other node still reads them"
    assert side.judge([memory(3), files(4, NEAR)]) == 3
    side.watch.worker_report(WorkerMeta(unusable={7: frozenset({THERE[1]})}))
    assert side.judge([memory(3), files(4, FAR)]) == 3
    assert side.judge([memory(3), memory(4, FAR)]) == 7
    both = Run(4, [*files(4).owners, *memory(4, FAR).owners])
    assert side.judge([memory(3), both]) == 7, "memory has them too"


def test_files_slower_than_computing_are_left_out_alone(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    """What memory holds before them is loaded all the same; then nothing is read ahead, either."""
    now = 0.0
    monkeypatch.setattr("kvpool_vllm.watch.time.monotonic", lambda: now)
    side.client.files = True
    assert side.watch.reads_ahead(100)
    for i in range(SAMPLES_MIN):
        request = type("Request", (), {"num_computed_tokens": 0, "num_prompt_tokens": 100, "request_id": str(i)})
        side.watch.step_planned([(request, 100)], lambda _: [])
        now += 0.1
        side.watch.step_ended(SPACE, {})
        side.loaded(f"slow {i}", 10, 1.0, {"local": 5, "fs": 2}, arrived=7)  # cut short by its deadline
        side.loaded(f"quick {i}", 10, 0.01, {"local": 10})
    assert side.judge([memory(4), files(6)]) == 4
    assert side.judge([files(10)]) == 0
    assert side.judge([memory(4)]) == 4
    assert side.judge([memory(4), files(2), memory(4)]) == 4
    assert side.watch._gate.counters["gate.skipped_tokens"] == (6 + 10 + 6) * TOKENS
    assert not side.watch.reads_ahead(100)


@pytest.mark.parametrize(("setting", "storage"), [("true", False), ("false", True)])
def test_reading_ahead_is_for_nodes_with_storage(setting: str, storage: bool) -> None:
    """And for engines that want it."""
    side = Side(prefetch=setting)
    side.client.files = storage
    assert not side.watch.reads_ahead(100)


def test_hits_are_counted_in_tokens_by_tier(side: Side) -> None:
    """In the shares that they came in, and only as far as they arrived on every rank."""
    side.loaded("a", 10, 1.0, {"local": 6, "remote": 4})
    side.loaded("b", 10, 1.0, {"local": 10}, arrived=5)
    side.loaded("c", 10, 1.0, {"local": 10}, arrived=0)
    assert side.counters == {"hit_tokens.local": 6 * TOKENS + 5 * TOKENS, "hit_tokens.remote": 4 * TOKENS}


def test_farthest_tier() -> None:
    """It rules how long a load takes."""
    assert farthest({"local": 3, "remote": 1}) == "remote"
    assert farthest({"local": 3, "remote": 0}) == "local"
    assert farthest({}) == "pool"


def test_the_slowest_rank_of_a_load_counts() -> None:
    """A load is over when its last rank is."""
    one = WorkerMeta(seen={"a": LoadSeen(1.0, {"local": 1}), "b": LoadSeen(3.0, {})}, unusable={1: frozenset({"x"})})
    two = WorkerMeta(seen={"a": LoadSeen(2.0, {"remote": 1}), "c": LoadSeen(1.0, {})}, unusable={2: frozenset()})
    for both in (one.aggregate(two), two.aggregate(one)):
        assert {name: seen.seconds for name, seen in both.seen.items()} == {"a": 2.0, "b": 3.0, "c": 1.0}
        assert both.seen["a"].tiers == {"remote": 1}
        assert both.unusable == {1: frozenset({"x"}), 2: frozenset()}


def test_what_the_engine_holds_is_not_piled_up_without_a_namespace(side: Side) -> None:
    """It may never come, where the ranks hold KV in different ways."""

    class BlockStored:
        def __init__(self, name: bytes) -> None:
            self.block_hashes, self.group_idx = [name], None

    pool = SimpleNamespace(kv_event_queue=[])
    side.watch.bind_block_pool(pool)
    side.watch.report_residency()
    assert side.watch.residency is not None
    for number, name in enumerate(CHAIN):
        side.watch.residency.scheduled(f"{number}", [name])
        pool.kv_event_queue = [BlockStored(name)]
        side.watch.step_ended(None, {})
    assert not side.watch.residency._changes
    assert len(side.watch.residency._resident) == len(CHAIN)
