"""Some thousand simulated clusters: whatever happens, bytes read are bytes stored, and all agree in the end."""

from __future__ import annotations

import pytest

from kvpool.core.explain import Verdict, explain
from kvpool.core.index import Index
from kvpool.core.removals import Why
from kvpool.model import split_keys
from kvpool.testing.checks import held_by_index
from kvpool.testing.cluster import Cluster, simulate
from kvpool.testing.files import BACKEND
from kvpool.testing.slices import small_slices

CHUNKS = 40
SEEDS_PER_CHUNK = 50
STEPS = 80


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_seeds(chunk):
    """Faults of every kind, then peace: the index equals what the nodes hold. A failure names its seed."""
    for seed in range(chunk * SEEDS_PER_CHUNK, (chunk + 1) * SEEDS_PER_CHUNK):
        simulate(seed, STEPS)


@pytest.mark.parametrize("seed", range(100_000, 100_008))
def test_long_runs(seed):
    """The same for longer."""
    simulate(seed, 600)


@pytest.mark.parametrize("seed", range(200_000, 200_040))
def test_accounts_come_down_to_zero(seed):
    """When everything is evicted, no byte is accounted, no removal is owed, and no file is left that was told of."""
    cluster = simulate(seed, STEPS)
    state = cluster.master.state
    with small_slices():
        for pin_id in list(state.pins.by_id):
            cluster.workload.unpin(pin_id)
        for _ in range(3):  # what is written while others go is new
            for digest in list(state.index.spaces):
                state.evictions.namespace(digest)
            cluster.perform([])
            cluster.advance(3)
        cluster.settle()
    backend = state.backends.by_id[BACKEND]
    assert (len(state.index), state.backends.used_bytes(backend), backend.removing_bytes) == (0, 0, 0)
    assert len(state.index.holds) == 0
    assert not cluster.storage.acknowledged


@pytest.mark.parametrize("seed", range(300_000, 300_012))
def test_a_catalog_that_was_put_back_is_noticed(seed, monkeypatch):
    """A master with an older catalog hears of that from its nodes, and has the files of which it lacks some scanned."""
    monkeypatch.setattr(Cluster, "_fault", lambda self: self._cut())  # who has heard of it must be there
    with small_slices():
        cluster = Cluster(seed)
        cluster.run(40)
        cluster.settle()
        older = cluster.catalog.copied()
        before = set(cluster.storage.acknowledged)
        cluster.run(150)
        cluster.settle()
        cluster.storage.stolen |= older.files.keys() - cluster.storage.files.keys()
        cluster.restart_master(0.5, older)
        cluster.advance(1)
        cluster.settle()
        assert cluster.storage.acknowledged - before
        assert cluster.master.state.counters["scans_asked"] == 1


def test_a_seed_replays_exactly():
    """The same seed gives the same events at the same times, so that a failure can be looked at again."""
    first, second = simulate(7, 150), simulate(7, 150)
    assert list(first.happened) == list(second.happened)
    assert first.happened != simulate(8, 150).happened


def test_the_simulation_reaches_what_it_is_for():
    """Over a few seeds everything that can go wrong did, and clients still found blocks."""
    totals: dict[str, int] = {}
    for seed in range(80):
        cluster = simulate(seed, STEPS)
        segments = [node.segment.counters for node in cluster.nodes]
        for counters in [cluster.master.state.counters, *segments, {"read_units": cluster.workload.read_units}]:
            for name, value in counters.items():
                totals[name] = totals.get(name, 0) + value
    wanted = {
        *("blocks_added", "blocks_removed", "blocks_asked_to_evict", "inventories_asked", "stalls"),
        *("lookup_hit_blocks", "lookup_end_warming", "lookup_end_owner_suspect", "lookup_end_not_whole"),
        *("files_added", "files_lost", "files_doomed", "files_removed", "scans_asked"),
        *(f"transfers.{what}" for what in ("opened", "sealed", "claimed", "ended", "expired")),
        *("evictions", "commanded_evictions", "victim_hits", "window_evictions", "quarantined", "read_units"),
    }
    assert {name for name in wanted if not totals.get(name)} == set()


def test_every_block_that_is_gone_can_be_explained(monkeypatch):
    """Whatever happened: what the index has had and lost has a removal, what it has is where it says."""
    had: dict[Index, set[tuple[bytes, bytes]]] = {}
    add = Index.add

    def spied(index, run, incarnation, tier, *, touch=True):
        had.setdefault(index, set()).update((run.namespace, key) for key in split_keys(run.keys))
        return add(index, run, incarnation, tier, touch=touch)

    monkeypatch.setattr(Index, "add", spied)
    seen: set[Verdict] = set()
    whys: set[Why] = set()
    for seed in range(40):
        cluster = simulate(seed, STEPS)
        state = cluster.master.state
        held = held_by_index(state)
        for namespace, key in had.pop(state.index):
            (block,) = explained(state, namespace, key, cluster.clock())
            in_files = [holder for holder in block.holders if holder.tier == "fs"]
            if in_files and (namespace, key) not in held:
                assert block.verdict in {Verdict.PRESENT, Verdict.NOT_WHOLE}, seed
                continue
            seen.add(block.verdict)
            whys.update(removal.why for removal in block.removals)
            if (namespace, key) in held:
                names = {holder.name for holder in block.holders if holder not in in_files}
                assert names == set(held[namespace, key]), seed
                assert block.verdict in {Verdict.PRESENT, Verdict.NOT_WHOLE}, seed
            else:
                assert block.verdict in {Verdict.EVICTED, Verdict.OWNER_LOST}, (seed, block)
        had.clear()
    assert {Verdict.PRESENT, Verdict.EVICTED, Verdict.OWNER_LOST} <= seen
    assert whys >= {Why.ROOM, Why.OPERATOR, Why.WATERMARK, Why.INCOMPLETE}
    assert whys >= {Why.NODE_LOST, Why.NODE_RESTARTED, Why.FILE_LOST}


def explained(state, namespace, key, now):
    """Explain one key at once."""
    steps = explain(state, namespace, key, now)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def test_a_failure_names_its_seed(monkeypatch):
    """An invariant that breaks says how to see it again."""
    monkeypatch.setattr(Cluster, "settle", lambda self: (_ for _ in ()).throw(AssertionError("broken")))
    with pytest.raises(AssertionError) as caught:
        simulate(3, 5)
    assert "kvpool.testing.cluster 3 --steps 5" in caught.value.__notes__[0]


def test_disagreements_are_seen():
    """A block that the master missed, and one that it only imagines, both count."""
    with small_slices():
        cluster = Cluster(11)
        cluster.run(60)
        cluster.settle()
        assert cluster.disagreements() == []
        node = next(node for node in cluster.nodes if len(node.segment))
        node.segment.evict(node.segment.snapshot())
        assert cluster.disagreements()
