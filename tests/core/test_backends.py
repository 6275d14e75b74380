"""MasterState and its storage backends: who serves them, what they hold, removal, capacity, scans."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from kvpool.core import file_removals as file_removals_module
from kvpool.core import operators as operators_module
from kvpool.core.backends import EVICTION_AGAIN_S, SCAN_RETRY_S
from kvpool.core.effects import CatalogBackend, CatalogFiles, FileChange, Received
from kvpool.core.explain import Holder, Verdict, explain
from kvpool.core.file_removals import LATE_S, REMOVE_RETRY_S
from kvpool.core.messages import (
    Ack,
    BlockRun,
    Delta,
    Evict,
    FilesRemoved,
    LookForFiles,
    RemoveFiles,
    Scan,
    Scanned,
    Storage,
    StorageLimits,
    Victims,
)
from kvpool.core.removals import Why
from kvpool.core.slots import file_bytes
from kvpool.model import Backend, BackendState, Namespace, Reason, split_keys
from kvpool.testing.checks import check_master
from tests.core.master_pool import LIMITS, ONE, SIZE, TWO, Pool, key, keys, run

HERE = bytes(range(16))
THERE = bytes(range(16, 32))
FILE = file_bytes(SIZE, ONE.shard_layers)
UP, DOWN, READ_ONLY = BackendState.UP, BackendState.DOWN, BackendState.READ_ONLY


def seen(backend: bytes = HERE, state: BackendState = UP, files: int = 1000) -> Backend:
    return Backend(backend, f"dir-{backend[0]}", files * FILE, state, "" if state is UP else "EIO")


def files(*numbers: int, namespace: Namespace = ONE, shards: int = 1, backend: bytes = HERE) -> BlockRun:
    return replace(run(*numbers, namespace=namespace, shards=shards), backend=backend)


def finish(steps):
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


class Shared(Pool):
    """A pool whose nodes have backends."""

    def serve(self, session: int, node: str, *runs: BlockRun, backends: tuple[Backend, ...] = (seen(),), **about):
        self.join(session, node, *runs, backends=backends, **about)

    def scanned(self, session: int = 1, backend: bytes = HERE) -> None:
        """End the scan that a new backend gets, with nothing found."""
        self.pass_time(0.1, session)
        assert self.told(session, Scan) == [Scan(backend)]
        self.say(session, Scanned(backend, last=True))
        self.sent.clear()
        self.kept.clear()

    def backend(self, backend: bytes = HERE):
        return self.master.backends.by_id[backend]

    def used(self, backend: bytes = HERE) -> int:
        return self.master.backends.used_bytes(self.backend(backend))

    def cataloged(self, change: FileChange) -> list[bytes]:
        told = [e for e in self.kept if isinstance(e, CatalogFiles) and e.change is change]
        return [k for effect in told for r in effect.blocks for k in split_keys(r.keys)]

    def removing(self, session: int) -> list[bytes]:
        return [k for m in self.told(session, RemoveFiles) for r in m.blocks for k in split_keys(r.keys)]

    def looking(self, session: int) -> list[bytes]:
        return [k for m in self.told(session, LookForFiles) for r in m.blocks for k in split_keys(r.keys)]

    def in_time(self, session: int, sequence: int = 0) -> None:
        """Take node a for one that tells at once what it has written, and forget what was said before."""
        self.master.backends.removing.forget("a")
        self.pass_time(0.1, session, sequence=sequence)
        for message in self.told(session, LookForFiles):
            self.say(session, FilesRemoved(message.id))
        self.sent.clear()
        self.kept.clear()

    def reach(self, *numbers: int, namespace: Namespace = ONE) -> list[tuple[str, bytes] | None]:
        (found,) = self.lookup(*numbers, namespace=namespace).runs
        reached = [self.master.reach(owner.incarnation) for owner in found[1].owners]
        return [(there[0].node_id, there[1]) if there else None for there in reached]


@pytest.fixture
def pool():
    pool = Shared()
    yield pool
    pool.work()
    check_master(pool.master)


# ---- files and who serves them -----------------------------------------------------------------------


def test_a_file_is_a_hit_at_any_live_node_that_serves_its_backend(pool):
    """Files outlive the node that wrote them; the nodes that serve their backend are named in turns."""
    pool.serve(1, "a", run(1))
    pool.serve(2, "b")
    pool.say(1, Delta(1, (files(1, 2),), (), 0))
    assert pool.prefix(1, 2) == 2
    assert {pool.reach(2)[0] for _ in range(4)} == {("a", HERE), ("b", HERE)}
    pool.close(1)
    assert pool.prefix(1, 2) == 2
    assert pool.reach(2) == [("b", HERE)]
    pool.close(2)
    assert pool.lookup(1, 2).reason is Reason.OWNER_SUSPECT
    pool.pass_time(12)
    assert pool.state("a") == "dead"
    pool.serve(3, "c")
    assert pool.prefix(1, 2) == 2


def test_a_backend_that_is_down_at_a_node_is_reached_through_another(pool):
    """A read-only backend is still read; one that is down everywhere holds no hits, and loses nothing."""
    pool.serve(1, "a")
    pool.serve(2, "b")
    pool.say(1, Delta(1, (files(1),), (), 0), Storage((seen(state=DOWN),)))
    assert [pool.reach(1) for _ in range(3)] == [[("b", HERE)]] * 3
    pool.say(2, Storage((seen(state=READ_ONLY),)))
    assert pool.prefix(1) == 1
    pool.say(2, Storage(()))
    assert pool.prefix(1) == 0
    pool.say(1, Storage((seen(),)))
    assert pool.reach(1) == [("a", HERE)]


def test_a_restarted_node_loses_its_memory_and_not_its_files(pool):
    """A new process of a node finds what the old one wrote."""
    pool.serve(1, "a", run(1, 2))
    pool.say(1, Delta(1, (files(1),), (), 0))
    pool.serve(2, "a", epoch=2)
    pool.work()
    assert [pool.prefix(1), pool.prefix(2)] == [1, 0]


def test_shards_in_files_and_shards_in_memory_make_a_block(pool):
    """A block is whole when its shards are somewhere; what is left of one that no node has whole is dropped."""
    pool.serve(1, "a", run(1, namespace=TWO, shards=1))
    pool.scanned()
    pool.say(1, Delta(1, (files(1, namespace=TWO, shards=2),), (), 0))
    assert pool.prefix(1, namespace=TWO) == 1
    pool.say(1, Delta(2, (), (run(1, namespace=TWO, shards=1),), 0))
    assert pool.cataloged(FileChange.DOOMED) == [key(1)]
    pool.pass_time(0.1, 1)
    assert pool.removing(1) == [key(1)]


def test_a_file_that_was_lost_is_no_hit_and_is_explained(pool):
    """A missing or broken file leaves index and catalog, under its own reason, with the backend's name."""
    pool.serve(1, "a", run(1))
    pool.say(1, Delta(1, (files(1, 2),), (), 0), Delta(2, (), (files(1, 2),), 0))
    assert [pool.prefix(1), pool.prefix(2)] == [1, 0]
    assert pool.cataloged(FileChange.LOST) == [key(1), key(2)]
    pool.pass_time(0.1, 1, sequence=2)
    assert pool.removing(1) == [key(1), key(2)]  # should somebody have written them again meanwhile
    block = finish(explain(pool.master, ONE.digest, key(2), pool.clock()))[0]
    assert (block.removals[0].why, block.removals[0].node_id) == (Why.FILE_LOST, "dir-0")
    assert (pool.used(), block.verdict) == (0, Verdict.OWNER_LOST)


def test_explain_names_the_backend_of_a_file(pool):
    """A holder of tier fs is a backend, with the state that lookups count on."""
    pool.serve(1, "a")
    pool.say(1, Delta(1, (files(1),), (), 0))
    block = finish(explain(pool.master, ONE.digest, key(1), pool.clock()))[0]
    assert block.holders == [Holder("dir-0", "fs", "live", (0,))]


def test_deltas_with_files_are_acknowledged_after_the_catalog_was_told(pool):
    """The effects come in that order, so that a server can hold the Ack back until the catalog has them."""
    pool.serve(1, "a")
    effects = []
    pool.perform = effects.extend
    pool.say(1, Delta(1, (files(1),), (), 0))
    kinds = [type(getattr(effect, "message", effect)) for effect in effects]
    assert kinds.index(CatalogFiles) < kinds.index(Ack)


def test_blocks_that_are_in_files_too_leave_memory_first(pool):
    """The victim list begins with blocks that stay hits without this node."""
    pool.serve(1, "a", run(1, 2, 3, 4), capacity_bytes=60 * SIZE, used_bytes=50 * SIZE)
    pool.say(1, Delta(1, (files(3),), (), 50 * SIZE))
    pool.lookup(3)
    pool.lookup(2)
    pool.lookup(1)
    pool.pass_time(1.2, 1, sequence=1, used=50 * SIZE)
    victims = [k for r in pool.told(1, Victims)[-1].blocks for k in split_keys(r.keys)]
    assert victims == [key(3), key(4), key(2)]


# ---- removal -----------------------------------------------------------------------------------------


def test_removal_is_announced_first_and_confirmed_by_a_node(pool):
    """An operator's eviction takes files out of the index at once, out of the storage when a node says so."""
    pool.serve(1, "a")
    pool.scanned()
    pool.say(1, Delta(1, (files(1, 2, 3),), (), 0))
    assert pool.used() == 3 * FILE
    pool.perform(pool.master.evictions.keys(ONE.digest, keys(1, 2))[2])
    assert (pool.prefix(1), pool.prefix(3)) == (0, 1)
    assert sorted(pool.cataloged(FileChange.DOOMED)) == sorted((key(1), key(2)))
    assert (pool.used(), pool.backend().removing_bytes) == (FILE, 2 * FILE)
    pool.pass_time(0.1, 1)
    (message,) = pool.told(1, RemoveFiles)
    pool.say(1, FilesRemoved(message.id))
    assert sorted(pool.cataloged(FileChange.REMOVED)) == sorted((key(1), key(2)))
    assert (pool.backend().removing_bytes, pool.backend().doomed) == (0, {})
    pool.say(1, FilesRemoved(message.id))


def asked_to_remove(pool: Shared) -> int:
    """Evict a block of two nodes' files; returns the session of the one that is asked first."""
    pool.serve(1, "a")
    pool.scanned()
    pool.serve(2, "b")
    pool.say(1, Delta(1, (files(1),), (), 0))
    pool.perform(pool.master.evictions.keys(ONE.digest, keys(1))[2])
    pool.pass_time(0.1, 1, 2, sequence=1)
    return 1 if pool.told(1, RemoveFiles) else 2


def test_a_removal_that_nobody_confirms_is_asked_of_another_node(pool):
    """When its node does not do it or goes, the next one gets the same files."""
    first = asked_to_remove(pool)
    pool.pass_time(REMOVE_RETRY_S + 0.2, 1, 2, sequence=1)
    assert pool.removing(3 - first) == pool.removing(first) == [key(1)]
    pool.close(3 - first)
    pool.pass_time(0.2, first, sequence=1)
    assert len(pool.told(first, RemoveFiles)) == 2
    assert pool.told(first, RemoveFiles)[1] == pool.told(3 - first, RemoveFiles)[0]
    pool.say(first, FilesRemoved(pool.told(first, RemoveFiles)[1].id))
    assert not pool.backend().doomed


def test_a_removal_that_went_to_another_node_has_its_whole_time_there(pool):
    """Who gets it later also drops it later; the next one is asked only after that."""
    first = asked_to_remove(pool)
    pool.pass_time(REMOVE_RETRY_S - 1, 1, 2, sequence=1)
    pool.close(first)
    pool.serve(3, "c")
    pool.sent.clear()
    pool.pass_time(REMOVE_RETRY_S - 1, 3 - first, 3, sequence=1)
    assert pool.removing(3 - first) + pool.removing(3) == [key(1)]


def test_files_that_cannot_be_removed_hold_up_only_themselves(pool, monkeypatch):
    """Those of their batch go in smaller ones, others beside them; they themselves go when they can be removed."""
    monkeypatch.setattr(file_removals_module, "BATCH_FILES", 32)
    pool.serve(1, "a", backends=(seen(files=10_000),))
    pool.scanned()
    fixed = {key(n) for n in range(0, 200, 25)}

    def pass_time(seconds: float) -> None:
        """Confirm every batch that has none of the files that cannot be removed."""
        for _ in range(round(seconds * 10)):
            pool.pass_time(0.1, 1, sequence=1)
            for message in pool.told(1, RemoveFiles):
                if not any(k in fixed for r in message.blocks for k in split_keys(r.keys)):
                    pool.say(1, FilesRemoved(message.id))
            pool.sent.clear()

    pool.say(1, Delta(1, (files(*range(300)),), (), 0))
    pool.perform(pool.master.evictions.keys(ONE.digest, keys(*range(200)))[2])
    pass_time(12 * REMOVE_RETRY_S)
    assert {name[-16:] for name in pool.backend().doomed} == fixed
    pool.perform(pool.master.evictions.keys(ONE.digest, keys(*range(200, 300)))[2])
    pass_time(3)
    assert {name[-16:] for name in pool.backend().doomed} == fixed
    fixed.clear()
    pass_time(4 * REMOVE_RETRY_S)
    assert not pool.backend().doomed


def test_a_slow_storage_is_asked_for_less_at_a_time(pool):
    """Else what a node has still to remove would grow; what is confirmed in time brings larger batches back."""
    pool.serve(1, "a", backends=(seen(files=10_000),))
    pool.scanned()
    pool.say(1, Delta(1, (files(*range(3000)),), (), 0))
    pool.perform(pool.master.evictions.keys(ONE.digest, keys(*range(3000)))[2])
    pool.pass_time(REMOVE_RETRY_S + 0.3, 1, sequence=1)
    sizes = [sum(map(len, message.blocks)) for message in pool.told(1, RemoveFiles)]
    assert (sizes[:4], sum(sizes[4:])) == ([256] * 4, 34)
    for _ in range(100):
        for message in pool.told(1, RemoveFiles):
            pool.say(1, FilesRemoved(message.id))
        pool.sent.clear()
        pool.pass_time(0.1, 1, sequence=1)
    assert not pool.backend().doomed
    assert pool.backend().batch_files == file_removals_module.BATCH_FILES


def test_a_file_written_again_before_anybody_was_asked_to_remove_it_is_not_removed(pool):
    """It is a hit at once, as nobody can have removed it since."""
    pool.serve(1, "a")
    pool.scanned()
    pool.say(1, Delta(1, (files(1, 2),), (), 0))
    pool.in_time(1)
    pool.perform(pool.master.evictions.keys(ONE.digest, keys(1, 2))[2])
    pool.say(1, Delta(2, (files(1),), (), 0))
    assert pool.cataloged(FileChange.REMOVED) == [key(1)]
    pool.pass_time(0.1, 1, sequence=2)
    assert pool.removing(1) == [key(2)]
    assert (pool.prefix(1), pool.used(), pool.backend().removing_bytes) == (1, FILE, FILE)
    pool.pass_time(1, 1, sequence=2)
    assert pool.looking(1) == []


@pytest.mark.parametrize("gone", [False, True])
def test_a_file_written_while_its_removal_is_under_way_is_looked_for(pool, gone):
    """Which of the two came first is not known: no hit before the removal is confirmed, and seen to after that."""
    first = asked_to_remove(pool)
    second = 3 - first
    pool.sent.clear(), pool.kept.clear()
    pool.say(second, Delta(2 if second == 1 else 1, (files(1),), (), 0))
    assert [m.sequence for m in pool.told(second, Ack)] == [2 if second == 1 else 1]
    assert (pool.prefix(1), pool.kept) == (0, [])
    pool.pass_time(0.2, first, second, sequence=1)
    (batch,) = pool.backend().batches
    pool.say(first, FilesRemoved(batch))
    assert (pool.prefix(1), pool.used(), pool.backend().removing_bytes) == (1, FILE, 0)
    assert [e.change for e in pool.kept if isinstance(e, CatalogFiles)] == [FileChange.REMOVED, FileChange.DOUBTED]
    pool.kept.clear()
    pool.pass_time(0.1, first, second, sequence=1)
    (look,) = pool.told(second, LookForFiles)
    assert look.blocks == (replace(files(1), backend=b""),)
    pool.say(second, FilesRemoved(look.id, (files(1),) if gone else ()))
    pool.sent.clear()
    pool.pass_time(1, first, second, sequence=1)
    assert pool.prefix(1) == (not gone)
    assert pool.removing(first) + pool.removing(second) == [key(1)] * gone
    assert pool.cataloged(FileChange.ADDED) == [key(1)] * (not gone)
    assert pool.looking(first) + pool.looking(second) == []


def test_what_somebody_else_may_still_remove_is_looked_for_later(pool):
    """A node that was asked first and has gone does nothing more after its time; so long the doubt lasts."""
    first = asked_to_remove(pool)
    second = 3 - first
    pool.close(first)
    pool.pass_time(0.1, second, sequence=1)
    (message,) = pool.told(second, RemoveFiles)
    pool.say(second, FilesRemoved(message.id))
    pool.say(second, Delta(2 if second == 1 else 1, (files(1),), (), 0))
    assert pool.prefix(1) == 1
    pool.pass_time(REMOVE_RETRY_S - 1, second, sequence=2)
    assert pool.looking(second) == []
    pool.pass_time(1.2, second, sequence=2)
    assert pool.looking(second) == [key(1)]


def test_a_look_that_nobody_confirms_is_asked_of_another_node(pool):
    """The node that wrote the file is asked first."""
    pool.serve(1, "a")
    pool.scanned()
    pool.serve(2, "b")
    pool.in_time(1)
    pool.backend().lately[b"".join((ONE.digest, b"\0", key(2)))] = pool.master.backends.removing.up
    pool.say(1, Delta(1, (files(2),), (), 0))
    pool.pass_time(0.1, 1, 2, sequence=1)
    assert (pool.looking(1), pool.looking(2)) == ([key(2)], [])
    pool.close(1)
    pool.pass_time(0.1, 2)
    assert pool.looking(2) == [key(2)]
    pool.pass_time(REMOVE_RETRY_S + 0.2, 2)
    assert pool.looking(2) == [key(2)] * 2


def test_what_a_node_tells_after_a_silence_is_looked_for(pool):
    """It may have been written long ago, and removed since; what it tells later is not."""
    pool.serve(1, "a")
    pool.scanned()
    pool.in_time(1)
    pool.say(1, Delta(1, (files(1),), (), 0))
    pool.pass_time(1, 1, sequence=1)
    assert pool.looking(1) == []
    pool.close(1)
    pool.serve(2, "a", sequence=1)
    pool.say(2, Delta(2, (files(2),), (), 0))
    assert pool.cataloged(FileChange.ADDED) == [key(1), key(2)]
    pool.pass_time(0.1, 2, sequence=2)
    assert (pool.looking(2), pool.prefix(2)) == ([key(2)], 1)
    pool.pass_time(LATE_S, 2, sequence=2)
    pool.say(2, Delta(3, (files(3),), (), 0))
    pool.pass_time(1, 2, sequence=3)
    assert pool.looking(2) == [key(2)]


def test_files_are_doomed_by_kind(pool):
    """Few changes for the catalog, however kinds of files alternate in the order of eviction."""
    pool.serve(1, "a", run(*range(0, 40, 3)))
    pool.scanned()
    kinds = [
        replace(files(*range(first, 40, 4), namespace=namespace), shard_bytes=size)
        for first, (namespace, size) in enumerate([(ONE, SIZE), (TWO, SIZE), (ONE, 2 * SIZE), (TWO, 2 * SIZE)])
    ]
    for number in range(10):
        told = tuple(replace(kind, keys=kind.keys[16 * number : 16 * number + 16]) for kind in kinds)
        pool.say(1, Delta(number + 1, told, (), 0))
    used = pool.used()
    pool.kept.clear()
    pool.perform(pool.master.evictions.coldest(1 << 40)[2])
    doomed = [r for e in pool.kept if isinstance(e, CatalogFiles) for r in e.blocks]
    assert len(doomed) == len(kinds)
    for kind in kinds:
        (found,) = [r for r in doomed if (r.namespace, r.shard_bytes) == (kind.namespace, kind.shard_bytes)]
        assert (found.shards, set(split_keys(found.keys))) == (1, set(split_keys(kind.keys)))
    assert (pool.used(), pool.backend().removing_bytes) == (0, used)


def test_many_files_are_doomed_a_slice_at_a_time(pool, monkeypatch):
    """What an operator wants dropped: by key whatever happens meanwhile, as coldest only if it is still cold."""
    monkeypatch.setattr(operators_module, "ROWS_PER_SLICE", 4)
    pool.serve(1, "a")
    pool.scanned()
    pool.say(1, Delta(1, (files(*range(20)),), (), 0))
    evictions = pool.master.evictions
    blocks, _, effects = evictions.keys(ONE.digest, keys(*range(10)))
    pool.perform(effects)
    assert (blocks, len(pool.backend().doomed)) == (10, 4)
    pool.perform(pool.master.work())
    assert len(pool.backend().doomed) == 8
    left = next(n for n in range(10) if key(n) not in pool.cataloged(FileChange.DOOMED))
    assert pool.prefix(left) == 1
    pool.work()
    assert set(pool.cataloged(FileChange.DOOMED)) == {key(n) for n in range(10)}
    blocks, _, effects = evictions.coldest(1 << 40)
    pool.perform(effects)
    assert (blocks, len(pool.backend().doomed)) == (10, 14)
    assert pool.prefix(10) == 1  # the hottest: it would go last
    pool.work()
    assert [n for n in range(20) if pool.prefix(n)] == [10]


def test_removals_come_in_bounded_messages(pool, monkeypatch):
    """Some files a message and some messages at once; the next ones follow confirmations."""
    monkeypatch.setattr(file_removals_module, "BATCH_FILES", 3)
    monkeypatch.setattr(file_removals_module, "BATCHES_AT_ONCE", 2)
    pool.serve(1, "a")
    pool.scanned()
    pool.say(1, Delta(1, (files(*range(10)),), (), 0))
    pool.perform(pool.master.evictions.keys(ONE.digest, keys(*range(10)))[2])
    removed: list[bytes] = []
    for _ in range(2):
        pool.pass_time(0.1, 1, sequence=1)
        assert len(pool.told(1, RemoveFiles)) == 2
        for message in pool.told(1, RemoveFiles):
            assert sum(len(r) for r in message.blocks) <= 3
            pool.say(1, FilesRemoved(message.id))
        removed += pool.removing(1)
        pool.sent.clear()
    assert sorted(removed) == sorted(key(n) for n in range(10))
    assert not pool.backend().doomed


# ---- capacity ----------------------------------------------------------------------------------------


def test_the_coldest_files_go_above_the_high_watermark(pool):
    """Least recently used first, down by the ratio; under a lease they stay; several nodes count once."""
    pool.serve(1, "a", backends=(seen(files=20),))
    pool.serve(2, "b", backends=(seen(files=20),))
    pool.say(1, Delta(1, (files(*range(19)),), (), 0))
    pool.say(2, Delta(1, (files(*range(19)),), (), 0))
    assert pool.used() == 19 * FILE
    pool.lookup(18, lease=True)  # the coldest: a put's tail
    pool.pass_time(0.1, 1, 2, sequence=1)
    assert pool.backend().doomed == {}
    pool.say(1, Delta(2, (files(19),), (), 0))
    pool.pass_time(0.2, 1, 2, sequence=1)
    assert pool.cataloged(FileChange.DOOMED) == [key(17)]
    assert [pool.prefix(n) for n in (19, 18, 17, 16)] == [1, 1, 0, 1]


def pin(pool: Shared, number: int, ttl_s: float) -> None:
    """Pin a block as an operator does."""
    pool.perform([e for part in pool.master.pins.begin(ONE.digest, key(number), ttl_s, "", 0)[1] for e in part])


def test_files_pinned_with_a_deadline_go_last_and_only_above_the_high_watermark(pool):
    """Those of leased blocks and those pinned for good stay, whatever is over."""
    pool.serve(1, "a", backends=(seen(files=20),))
    pool.scanned()
    pool.say(1, Delta(1, (files(*range(20)),), (), 0))
    for n in range(18):
        pin(pool, n, 1000)
    pin(pool, 18, 0)
    pool.lookup(*range(18))
    pool.lookup(17, lease=True)
    pool.lookup(16)
    pool.lookup(19, lease=True)
    pool.pass_time(0.3, 1, sequence=1)
    (gone,) = pool.cataloged(FileChange.DOOMED)
    assert gone in {key(n) for n in range(16)}
    assert pool.used() == 19 * FILE
    pool.say(1, Delta(2, (files(20, 21, 22),), (), 0))
    pool.pass_time(0.3, 1, sequence=2)
    assert set(pool.cataloged(FileChange.DOOMED)) == {gone, key(20), key(21), key(22)}


def test_a_backend_of_which_nothing_can_be_evicted_is_looked_through_now_and_then(pool, monkeypatch):
    """Not the whole index at every tick; what can go in the end does."""
    walks = []
    coldest = type(pool.master.index).coldest

    def counted(index, incarnation, *, leased=False):
        walks.append(leased)
        return coldest(index, incarnation, leased=leased)

    monkeypatch.setattr(type(pool.master.index), "coldest", counted)
    pool.serve(1, "a", backends=(seen(files=20),))
    pool.scanned()
    pool.say(1, Delta(1, (files(*range(20)),), (), 0))
    for n in range(20):
        pin(pool, n, 0)
    pool.pass_time(2 * EVICTION_AGAIN_S + 0.5, 1, sequence=1)
    assert walks == [False, True] * 3
    pool.perform([e for each in list(pool.master.pins.by_id.values()) for p in pool.master.pins.end(each) for e in p])
    pool.pass_time(EVICTION_AGAIN_S, 1, sequence=1)
    assert len(pool.cataloged(FileChange.DOOMED)) == 1


def test_a_file_that_is_written_makes_its_block_no_warmer(pool):
    """Else a node would drop those first that still wait to be written."""
    pool.serve(1, "a", backends=(seen(files=20),))
    pool.serve(2, "b", backends=(seen(files=20),))
    pool.say(1, Delta(1, (files(*range(19)),), (), 0))
    pool.say(2, Delta(1, (files(18),), (), 0))  # the coldest: a put's tail
    pool.say(1, Delta(2, (files(19),), (), 0))
    pool.pass_time(0.2, 1, 2, sequence=1)
    assert pool.cataloged(FileChange.DOOMED) == [key(18)]


def test_a_full_backend_is_written_no_more_until_there_is_room(pool):
    """At its capacity, files that await their removal included; all its nodes are told, later ones too."""
    pool.serve(1, "a", backends=(seen(files=10),))
    pool.say(1, Delta(1, (files(*range(10)),), (), 0))
    pool.pass_time(0.3, 1, sequence=1)
    assert pool.told(1, StorageLimits)[-1] == StorageLimits(frozenset({HERE}))
    pool.serve(2, "b", backends=(seen(files=10), seen(THERE)))
    assert pool.told(2, StorageLimits)[-1] == StorageLimits(frozenset({HERE}))
    for session in (1, 2):
        for message in pool.told(session, RemoveFiles):
            pool.say(session, FilesRemoved(message.id))
    pool.pass_time(0.3, 1, 2, sequence=1)
    assert [pool.told(s, StorageLimits)[-1].full for s in (1, 2)] == [frozenset(), frozenset()]


def test_limits_reach_nodes_that_do_not_serve_the_backend_at_the_moment(pool):
    """Those where it is down when it gets full, or has room again, and those that name it later."""
    pool.serve(1, "a", backends=(seen(files=10),))
    pool.serve(2, "b", backends=(seen(files=10),))
    pool.serve(3, "c")
    pool.say(2, Storage((seen(state=DOWN, files=10),)))
    pool.say(3, Storage(()))
    pool.say(1, Delta(1, (files(*range(10)),), (), 0))
    pool.sent.clear()
    pool.pass_time(0.1, 1, 2, 3, sequence=1)
    full = StorageLimits(frozenset({HERE}))
    assert [pool.told(s, StorageLimits) for s in (1, 2, 3)] == [[full], [full], []]
    pool.say(2, Storage((seen(files=10),)))
    pool.say(3, Storage((seen(files=10),)))
    assert [pool.told(s, StorageLimits) for s in (1, 2, 3)] == [[full], [full] * 2, [full]]
    pool.say(3, Storage((seen(state=READ_ONLY, files=10),)))
    assert pool.told(3, StorageLimits) == [full]


def test_an_index_without_free_rows_loses_the_coldest_files():
    """Until some rows are free again: nothing that memory holds too, nothing pinned, wherever its files are."""
    pool = Shared(replace(LIMITS, blocks_max=100))
    pool.serve(1, "a", run(*range(10)), backends=(seen(), seen(THERE)))
    pool.say(1, Delta(1, (files(*range(50)), files(*range(0, 50, 2), backend=THERE)), (), 0))
    pool.perform([e for part in pool.master.pins.begin(ONE.digest, key(30), 0, "", 0)[1] for e in part])
    pool.lookup(*range(20, 50))
    pool.lookup(*range(10))
    pool.say(1, Delta(2, (files(*range(50, 97)),), (), 0))
    pool.pass_time(0.2, 1, sequence=2)
    assert pool.cataloged(FileChange.DOOMED) == []
    pool.say(1, Delta(3, (files(97),), (), 0))
    pool.pass_time(0.2, 1, sequence=3)
    gone = set(pool.cataloged(FileChange.DOOMED))
    assert gone == {key(18), key(19)}
    assert pool.master.index.rows_free == 4
    check_master(pool.master)


def test_files_that_find_no_row_are_removed():
    """Whether they were written now or come from the catalog; else nobody would ever find or count them."""
    pool = Shared(replace(LIMITS, blocks_max=10))
    pool.serve(1, "a", run(*range(10)))
    pool.scanned()
    pool.say(1, Delta(1, (files(8, 9, 10, 11),), (), 0))
    assert pool.cataloged(FileChange.DOOMED) == [key(10), key(11)]
    assert (pool.used(), pool.backend().removing_bytes) == (2 * FILE, 2 * FILE)
    pool.master.backends.load(iter([(files(7, 12),)]), iter(()))
    pool.work()
    pool.pass_time(0.1, 1, sequence=1)
    assert pool.cataloged(FileChange.DOOMED) == pool.removing(1) == [key(10), key(11), key(12)]


def test_another_size_for_a_block_keeps_the_account(pool):
    """The newest report's size counts, for every backend that has it; the account comes down to zero."""
    pool.serve(1, "a", backends=(seen(), seen(THERE)))
    pool.say(1, Delta(1, (files(1), files(1, backend=THERE)), (), 0))
    larger = replace(files(1), shard_bytes=10_000)
    pool.say(1, Delta(2, (larger,), (), 0))
    assert pool.used() == pool.used(THERE) == file_bytes(10_000, ONE.shard_layers)
    pool.say(1, Delta(3, (), (files(1), files(1, backend=THERE)), 0))
    assert pool.used() == pool.used(THERE) == 0


# ---- scans -------------------------------------------------------------------------------------------


def test_a_backend_that_nobody_knows_is_scanned(pool):
    """By one node; what is found are hits at once; the end is kept, and it is not scanned again."""
    pool.serve(1, "a")
    pool.pass_time(0.1, 1)
    assert pool.told(1, Scan) == [Scan(HERE)]
    third = Namespace(model="three")
    pool.say(1, Scanned(HERE, False, 2, 9, (files(1, 2), files(1, namespace=third)), (third,)))
    backend = pool.backend()
    assert (backend.scanner, backend.scanned_files, backend.scan_expected) == ("a", 2, 9)
    assert (pool.prefix(1, 2), pool.prefix(1, namespace=third)) == (2, 1)
    pool.say(1, Scanned(HERE, True, 9, 9, (files(3),)))
    assert [e.complete for e in pool.kept if isinstance(e, CatalogBackend)][-1]
    pool.pass_time(SCAN_RETRY_S + 1, 1)
    assert (pool.prefix(1, 2, 3), len(pool.told(1, Scan)), backend.scanner) == (3, 1, "")


def test_a_scan_that_is_not_heard_of_begins_again_elsewhere(pool):
    """When its node goes, and later when it ends with an error."""
    pool.serve(1, "a")
    pool.pass_time(0.1, 1)
    pool.serve(2, "b")
    pool.close(1)
    pool.pass_time(0.2, 2)
    assert pool.told(2, Scan) == [Scan(HERE)]
    pool.say(2, Scanned(HERE, True, error="EIO"))
    pool.pass_time(0.2, 2)
    assert (len(pool.told(2, Scan)), pool.backend().complete) == (1, False)
    pool.pass_time(SCAN_RETRY_S + 1, 2)
    assert len(pool.told(2, Scan)) == 2


def test_a_scan_does_not_bring_back_what_is_about_to_be_removed(pool):
    """A file seen by a scan and doomed meanwhile stays doomed."""
    pool.serve(1, "a")
    pool.say(1, Delta(1, (files(1, 2),), (), 0))
    pool.pass_time(0.1, 1, sequence=1)
    pool.perform(pool.master.evictions.keys(ONE.digest, keys(1))[2])
    pool.say(1, Scanned(HERE, True, 2, 2, (files(1, 2),)))
    assert [pool.prefix(1), pool.prefix(2)] == [0, 1]


def test_what_the_catalog_knows_is_not_scanned(pool):
    """Files of a complete backend are loaded: hits as soon as a node serves it; warming until then."""
    backends = pool.master.backends
    pool.master.register(ONE)
    backends.load_backend(seen(), complete=True)
    backends.load(iter([(files(1),), (files(2),)]), iter(()))
    assert pool.lookup(3).reason is Reason.WARMING
    pool.serve(1, "a")
    pool.pass_time(0.2, 1)
    assert (pool.prefix(1, 2), pool.told(1, Scan)) == (2, [])
    assert not pool.told(1, Evict)


def test_doomed_files_of_an_earlier_master_are_removed(pool):
    """A master that ended between the announcement and the removal leaves that to the next one."""
    pool.master.register(ONE)
    pool.master.backends.load(iter(()), iter([(files(5),)]))
    pool.work()
    pool.serve(1, "a")
    pool.pass_time(0.1, 1)
    assert pool.removing(1) == [key(5)]
    assert pool.backend().removing_bytes == FILE


def test_what_is_told_while_the_catalog_is_read_counts_more(pool):
    """What it has is older: a file that is gone is no hit again, one that is there again is not removed."""
    backends = pool.master.backends
    pool.master.register(ONE)
    backends.load_backend(seen(), complete=True)
    backends.load(iter([(files(1, 2, 3),)]), iter([(files(5, 6),)]))
    pool.serve(1, "a")
    effects: list[object] = []
    for message in Delta(1, (files(5),), (files(2),), 0), Delta(2, (files(3),), (), 0):
        effects += pool.master.handle(Received(1, message), pool.clock())
    pool.perform(effects)
    pool.work()
    assert [pool.prefix(n) for n in (1, 2, 3, 5, 6)] == [1, 0, 1, 1, 0]
    pool.pass_time(0.1, 1, sequence=2)
    assert pool.removing(1) == [key(6)]
    assert pool.backend().told == {}
    pool.pass_time(REMOVE_RETRY_S - 1, 1, sequence=2)
    assert key(5) not in pool.looking(1)  # an earlier master's word may still be carried out
    pool.pass_time(1, 1, sequence=2)
    (look,) = [m for m in pool.told(1, LookForFiles) if key(5) in m.blocks[0].keys]
    pool.say(1, FilesRemoved(look.id))
    assert pool.cataloged(FileChange.REMOVED)[-1:] == pool.cataloged(FileChange.ADDED)[-1:] == [key(5)]


# ---- catalogs that are older than they should be -----------------------------------------------------


@pytest.mark.parametrize(
    ("kept_by", "generation", "scans"), [(5, 10, 0), (5, 11, 1), (6, 1, 1), (77, 1000, 0), (0, 0, 0)]
)
def test_what_a_node_was_told_is_kept_shows_whether_it_is(kept_by, generation, scans):
    """A catalog that was put back, lost its end, or is another one, lacks it: the backends are scanned, once."""
    pool = Shared(epoch=77)
    backends = pool.master.backends
    backends.earlier = {5: 10, 77: math.inf}
    pool.master.register(ONE)
    backends.load_backend(seen(), complete=True)
    backends.load(iter([(files(1),)]), iter(()))
    pool.work()
    pool.serve(1, "a", kept_by=kept_by, generation=generation)
    pool.serve(2, "b", kept_by=kept_by, generation=generation + scans)
    assert [e.complete for e in pool.kept if isinstance(e, CatalogBackend)][:1] == [False] * scans
    assert pool.prefix(1) == 1
    pool.pass_time(0.3, 1, 2)
    assert len(pool.told(1, Scan) + pool.told(2, Scan)) == scans
