"""MasterState by its messages: sessions, liveness, inventories, eviction, leases."""

from __future__ import annotations

import random

import pytest

from kvpool.core import index as index_module
from kvpool.core import master as master_module
from kvpool.core import nodes as nodes_module
from kvpool.core import operators as operators_module
from kvpool.core import placement as placement_module
from kvpool.core import recency as recency_module
from kvpool.core.effects import Received, Remember, Tick
from kvpool.core.messages import (
    Ack,
    Delta,
    Evict,
    Heartbeat,
    Inventory,
    SendInventory,
    Superseded,
    Victims,
    Welcome,
)
from kvpool.core.nodes import FORGET_DEAD_S
from kvpool.errors import OverloadedError, UnknownNamespaceError
from kvpool.model import Namespace, Reason, split_keys
from kvpool.testing.checks import check_master
from tests.core.master_pool import ONE, SIZE, TWO, Pool, key, keys, run


@pytest.fixture
def pool():
    pool = Pool()
    yield pool
    pool.work()
    check_master(pool.master)


# ---- sessions and reports --------------------------------------------------------------------------


def test_a_node_is_live_once_it_has_reported(pool):
    """Welcome asks for the inventory; until it is complete lookups say warming; then its blocks are hits."""
    pool.hello(1)
    assert pool.told(1, Welcome) == [Welcome(77, 0, inventory=True)]
    assert pool.lookup(1).reason is Reason.WARMING
    pool.say(1, Inventory(5, 0, last=False, added=(run(1, 2),)))
    assert pool.state() == "warming"
    assert pool.prefix(1, 2, 3) == 2
    pool.say(1, Inventory(5, 1, last=True, added=(run(3),)))
    assert pool.state() == "live"
    assert pool.told(1, Ack) == [Ack(5)]
    assert pool.prefix(1, 2, 3) == 3
    assert pool.lookup(4).reason is Reason.NOT_STORED


def test_deltas_are_applied_in_order_and_once(pool):
    """A doubled delta changes nothing; within one delta what went and came again is there."""
    pool.join(1, "a", run(1, 2))
    pool.say(1, Delta(1, (run(2, 3),), (run(1, 2),), 200))
    pool.say(1, Delta(1, (), (run(3),), 100))
    assert [pool.prefix(n) for n in (1, 2, 3)] == [0, 1, 1]
    assert pool.told(1, Ack) == [Ack(0), Ack(1)]
    assert pool.master.nodes["a"].used_bytes == 200


def test_a_missing_delta_asks_for_everything(pool):
    """Old blocks stay findable no more than they can be trusted; the inventory replaces them."""
    pool.join(1, "a", run(1))
    pool.say(1, Delta(2, (run(3),), (), 100))
    assert pool.told(1, SendInventory) == [SendInventory()]
    assert (pool.state(), pool.prefix(1)) == ("warming", 0)
    pool.say(1, Inventory(3, 0, last=True, added=(run(4),)))
    pool.work()
    assert [pool.prefix(n) for n in (1, 3, 4)] == [0, 0, 1]
    assert len(pool.master.index) == 1


def test_a_lost_last_delta_is_noticed(pool):
    """A heartbeat that speaks of a delta nobody saw leads to an inventory."""
    pool.join(1)
    pool.pass_time(1.9, 1, sequence=1)
    assert pool.told(1, SendInventory) == []
    pool.pass_time(0.5, 1, sequence=1)
    assert pool.told(1, SendInventory) == [SendInventory()]


def test_a_short_disconnect_resumes(pool):
    """The same process with the same master goes on after the last delta; its blocks are skipped meanwhile."""
    pool.join(1, "a", run(1))
    pool.say(1, Delta(1, (run(2),), (), 200))
    pool.close(1)
    assert (pool.state(), pool.lookup(1).reason) == ("suspect", Reason.OWNER_SUSPECT)
    pool.hello(2, sequence=3, master_epoch=77)
    assert pool.told(2, Welcome) == [Welcome(77, 1, inventory=False)]
    assert (pool.state(), pool.prefix(1, 2)) == ("live", 2)


@pytest.mark.parametrize("about", [{"master_epoch": 76, "sequence": 3}, {"master_epoch": 77, "sequence": 0}])
def test_what_cannot_be_resumed_is_reported_anew(pool, about):
    """Another master's node, or one that knows fewer deltas than we saw, sends its inventory."""
    pool.join(1)
    pool.say(1, Delta(1, (run(2),), (), 200))
    pool.close(1)
    pool.hello(2, **about)
    assert pool.told(2, Welcome) == [Welcome(77, 0, inventory=True)]


def test_a_delta_cut_short_is_never_taken_for_applied(pool, monkeypatch):
    """A session that ends between two slices of a delta leads to an inventory, not to a resumed session."""
    monkeypatch.setattr(nodes_module, "ROWS_PER_SLICE", 1)
    pool.join(1)
    taking = pool.master.ingest(Received(1, Delta(1, (run(1, 2, 3),), (), 300)), pool.clock())
    for _ in range(3):
        pool.perform(next(taking))
    del taking
    pool.close(1)
    pool.hello(2, sequence=1, master_epoch=77)
    assert pool.told(2, Welcome) == [Welcome(77, 0, inventory=True)]
    pool.say(2, Inventory(2, 0, last=True, added=(run(1, 2, 3),)))
    assert pool.prefix(1, 2, 3) == 3


@pytest.mark.parametrize("added", [(), (run(1, 2),)], ids=["empty", "blocks"])
def test_an_inventory_of_a_replaced_process_counts_for_nothing(pool, added):
    """A new process says Hello between two slices of the old one's inventory: only its own is awaited."""
    pool.hello(1, epoch=1)
    taking = pool.master.ingest(Received(1, Inventory(5, 0, last=True, added=added)), pool.clock())
    pool.perform(next(taking))
    pool.hello(2, epoch=2)
    for effects in taking:
        pool.perform(effects)
    assert pool.state() == "warming"
    pool.say(2, Inventory(0, 0, last=True, added=(run(7),)))
    assert (pool.state(), pool.prefix(7), pool.prefix(1)) == ("live", 1, 0)


def test_a_message_taken_in_late_does_not_speak_for_a_new_session(pool):
    """A delta that was begun before the node came back on a new session is counted once."""
    pool.join(1)
    taking = pool.master.ingest(Received(1, Delta(1, (run(1),), (), 100)), pool.clock())
    pool.perform(next(taking))
    pool.hello(2, sequence=1, master_epoch=77)
    pool.say(2, Inventory(2, 0, last=True, added=()))
    for effects in taking:
        pool.perform(effects)
    assert pool.prefix(1) == 0


def test_a_chunk_that_is_lost_or_doubled_makes_no_half_inventory(pool):
    """Chunks count only in order; what does not become complete is asked for again."""
    pool.hello(1)
    pool.say(1, Inventory(5, 0, last=False, added=(run(1),)), Inventory(5, 2, last=True, added=(run(3),)))
    pool.say(1, Inventory(5, 0, last=False, added=(run(1),)), Inventory(5, 0, last=False, added=(run(1),)))
    assert pool.state() == "warming"
    pool.pass_time(2.5, 1)
    assert pool.told(1, SendInventory) == [SendInventory()]
    pool.say(1, Inventory(6, 0, last=False, added=(run(1),)), Inventory(6, 1, last=True, added=(run(2),)))
    assert (pool.state(), pool.prefix(1, 2)) == ("live", 2)


@pytest.mark.parametrize("by_delta", [True, False])
def test_blocks_of_a_namespace_that_was_never_told_are_asked_for_again(pool, by_delta):
    """The message that names a namespace may be lost: its blocks are not dropped in silence."""
    pool.join(1, "a", namespaces=())
    message = Delta(1, (run(1),), (), 100) if by_delta else Inventory(1, 0, last=True, added=(run(1),))
    if not by_delta:
        pool.say(1, Delta(2, (), (), 100))
    pool.say(1, message)
    assert pool.state() == "warming"
    pool.pass_time(2.5, 1)
    assert SendInventory() in pool.told(1, SendInventory)
    pool.say(1, Delta(3, (), (), 100, namespaces=(ONE,)), Inventory(3, 0, last=True, added=(run(1),)))
    assert (pool.state(), pool.prefix(1)) == ("live", 1)


def test_shards_outside_the_namespace_are_counted_not_stored(pool):
    """A node that claims shards that do not exist harms only itself."""
    pool.join(1, "a", run(1, shards=2), run(2))
    assert pool.master.counters["blocks_with_bad_shards"] == 1
    assert (pool.state(), pool.prefix(1), pool.prefix(2)) == ("live", 0, 1)


def test_a_new_epoch_supersedes(pool):
    """The newer process wins at once, the older one is told so, now and whenever it comes back."""
    pool.join(1, "a", run(1), epoch=1)
    pool.join(2, "a", run(2), epoch=2)
    pool.work()
    assert pool.told(1, Superseded) == [Superseded()]
    assert 1 in pool.closed
    assert [pool.prefix(n) for n in (1, 2)] == [0, 1]
    pool.say(1, Delta(1, (run(3),), (), 100))
    pool.hello(3, epoch=1)
    assert (pool.told(3, Superseded), 3 in pool.closed) == ([Superseded()], True)
    assert [pool.prefix(n) for n in (2, 3)] == [1, 0]
    assert len(pool.master.index) == 1


def test_namespaces_are_remembered_once_and_bounded(pool, monkeypatch):
    """A new descriptor is an effect; too many are refused, and a node's blocks of those are left out."""
    monkeypatch.setattr(master_module, "NAMESPACES_MAX", 2)
    assert pool.master.register(ONE) == [Remember(ONE)]
    assert pool.master.register(ONE) == []
    pool.master.register(TWO)
    third = Namespace(model="three")
    with pytest.raises(OverloadedError):
        pool.master.register(third)
    pool.join(1, "a", run(1), run(2, namespace=third), namespaces=(ONE, TWO, third))
    assert (pool.state(), pool.prefix(1), len(pool.master.index)) == ("live", 1, 1)


# ---- liveness --------------------------------------------------------------------------------------


def test_silence_makes_suspect_then_dead_then_forgotten(pool):
    """Blocks leave lookups first and the index later; a node that speaks again must report again."""
    pool.join(1, "a", run(1))
    pool.pass_time(1.0)
    assert (pool.state(), pool.prefix(1), len(pool.master.index)) == ("suspect", 0, 1)
    pool.say(1, Heartbeat(0, 0))
    assert (pool.state(), pool.prefix(1)) == ("live", 1)
    pool.pass_time(10.5)
    assert (pool.state(), len(pool.master.index)) == ("dead", 0)
    assert not pool.master.warming
    assert pool.told(1, SendInventory) == []
    pool.pass_time(0.5, 1)
    assert pool.told(1, SendInventory) == [SendInventory()]
    pool.say(1, Inventory(0, 0, last=True, added=(run(1),)))
    assert (pool.state(), pool.prefix(1)) == ("live", 1)


def test_a_session_is_of_one_node(pool):
    """Whoever says another name on it is sent away, and the master goes on when both are forgotten."""
    pool.join(1, "a", run(1))
    pool.hello(1, "b")
    assert pool.closed == [1]
    assert list(pool.master.nodes) == ["a"]
    pool.close(1)
    for _ in range(round(FORGET_DEAD_S) + 12):
        pool.clock.advance(0.99)
        pool.perform(pool.master.handle(Tick(), pool.clock()))
    assert pool.master.nodes == {}
    pool.join(2, "b", run(1))
    assert pool.state("b") == "live"


def test_a_forgotten_node_begins_anew(pool):
    """A session that was silent for very long is closed, so that its node says Hello again."""
    pool.join(1)
    pool.clock.advance(0.1)
    for _ in range(round(FORGET_DEAD_S) + 12):
        pool.clock.advance(0.99)
        pool.perform(pool.master.handle(Tick(), pool.clock()))
    assert pool.master.nodes == {}
    assert pool.closed == [1]
    pool.say(1, Heartbeat(0, 0))
    assert pool.master.nodes == {}
    pool.join(2, "a", run(1))
    assert (pool.state(), pool.prefix(1)) == ("live", 1)


@pytest.mark.parametrize("first", ["tick", "lookup", "heartbeat"])
def test_a_stall_of_the_master_expires_nobody(pool, first):
    """After standing still for a minute, every node and every lease is as it was."""
    pool.join(1, "a", run(1))
    pool.join(2, "b", run(2))
    lease = pool.lookup(1, lease=True).lease
    pool.pass_time(0.5, 1, 2)
    pool.clock.advance(60)
    if first == "lookup":
        pool.lookup(1, lease=True)
    elif first == "heartbeat":
        pool.say(1, Heartbeat(0, 0))
    pool.pass_time(0.3)
    assert (pool.state("a"), pool.state("b")) == ("live", "live")
    pool.pass_time(8.0, 1, 2)
    assert pool.master.renew([lease], pool.clock()) == []
    assert pool.prefix(1) == pool.prefix(2) == 1
    assert pool.master.counters["stalls"] == 1


def test_leases_end_with_their_time(pool):
    """A lease that nobody renews is over after its TTL; a renewed one lasts."""
    pool.join(1, "a", run(1, 2))
    short, long = pool.lookup(1, lease=True).lease, pool.lookup(2, lease=True).lease
    pool.pass_time(6, 1)
    assert pool.master.renew([long, 12345], pool.clock()) == [12345]
    pool.pass_time(6, 1)
    assert pool.master.release([short, long]) == [short]
    assert pool.master.leases.blocks == 0


# ---- placements ------------------------------------------------------------------------------------


def test_placements_that_are_over_are_freed_a_slice_at_a_time(monkeypatch):
    """Blocks whose copies come and go at varying nodes do not fill the table, while all nodes live on."""
    monkeypatch.setattr(placement_module, "CROWDED_FROM", 8)
    monkeypatch.setattr(placement_module, "_STEPS_PER_SLICE", 4)
    monkeypatch.setattr(placement_module, "_FREED_PER_SLICE", 4)
    monkeypatch.setattr(index_module, "ROWS_MARKED_PER_SLICE", 2)
    pool = Pool()
    for session in range(1, 13):
        pool.join(session, str(session))
    held = dict.fromkeys(range(6), 0)  # masks of nodes
    told = dict.fromkeys(range(1, 13), 0)
    slices, choose = 0, random.Random(1)
    for _ in range(1000):
        block, session = choose.randrange(6), choose.randrange(1, 13)
        held[block] ^= 1 << session
        told[session] += 1
        there, gone = ((run(block),), ()) if held[block] >> session & 1 else ((), (run(block),))
        pool.say(session, Delta(told[session], there, gone, 0))
        pool.perform(pool.master.handle(Tick(), pool.clock()))
        slices += pool.master.busy
        pool.perform(pool.master.work())
    pool.work()
    assert slices > 100
    assert len(pool.master.index.placements) < 300
    assert [block for block in held if pool.prefix(block)] == [block for block, mask in held.items() if mask]
    check_master(pool.master)


# ---- eviction --------------------------------------------------------------------------------------


def fill(pool: Pool, blocks: int = 10) -> None:
    """A node of 1000 bytes with blocks 0, 1, ...: block 0 is the coldest."""
    pool.join(1, "a", *[run(n) for n in range(blocks)])


def test_over_the_watermark_the_coldest_go(pool):
    """As many bytes as it takes to be under the mark, at least the eviction ratio, in LRU order."""
    fill(pool)
    pool.prefix(0)
    pool.say(1, Heartbeat(1000, 0))
    pool.work()
    assert pool.evicted(1) == [key(1)]
    pool.pass_time(1, 1, used=1000)
    assert pool.evicted(1) == [key(1)], "not asked for again while it is under way"
    pool.pass_time(1.5, 1, used=1000)
    assert len(pool.evicted(1)) == 2, "asked for again when nothing happens"


def test_an_eviction_that_was_done_may_be_followed_by_another(pool):
    """The node confirms, is still over the mark, and the next ones go."""
    fill(pool)
    pool.say(1, Heartbeat(1000, 0))
    pool.work()
    (evict,) = pool.told(1, Evict)
    pool.say(1, Delta(1, (), evict.blocks, 950, evictions_done=evict.id))
    pool.work()
    assert pool.evicted(1) == [key(0), key(1)]


def test_an_eviction_comes_in_messages_that_a_node_is_soon_done_with(pool, monkeypatch):
    """However long the slices are in which blocks are found."""
    monkeypatch.setattr(master_module, "EVICT_BLOCKS_MAX", 3)
    pool.join(1, "a", run(*range(10)))
    pool.say(1, Heartbeat(1600, 0))
    pool.work()
    sizes = [sum(len(r) for r in evict.blocks) for evict in pool.told(1, Evict)]
    assert sizes == [3, 3, 1]
    assert [evict.id for evict in pool.told(1, Evict)] == [1, 2, 3]
    assert pool.master.nodes["a"].evict_sent == 3


def test_leased_blocks_go_last_and_are_counted(pool):
    """Under a lease a block outlives every other, however cold; when only leased ones are left they go too."""
    fill(pool)
    pool.lookup(0, 1, 2, lease=True)
    for n in range(3, 10):
        pool.prefix(n)
    pool.say(1, Heartbeat(1600, 0))
    pool.work()
    assert pool.evicted(1) == [key(n) for n in range(3, 10)]
    assert pool.master.counters["leased_blocks_evicted"] == 0
    pool.say(1, Delta(1, (), (run(*range(3, 10)),), 1100, evictions_done=99))
    pool.work()
    assert pool.evicted(1)[7:] == [key(2), key(1)], "the tail of the chain before its head"
    assert pool.master.counters["leased_blocks_evicted"] == 2


def test_the_victim_list_is_the_cold_end_without_leased_blocks(pool):
    """A node over half full gets its coldest blocks, and a new list when one of them is leased."""
    fill(pool)
    pool.pass_time(0.1, 1, used=600)
    assert [k for r in pool.told(1, Victims)[-1].blocks for k in split_keys(r.keys)] == [key(0)]
    pool.lookup(0, lease=True)
    pool.pass_time(0.2, 1, used=600)
    assert [k for r in pool.told(1, Victims)[-1].blocks for k in split_keys(r.keys)] == [key(1)]


def test_victims_prefer_copies_that_exist_elsewhere():
    """Of the coldest blocks those that stay whole without this node come first."""
    pool = Pool()
    pool.join(1, "a", *[run(n) for n in range(10)], capacity_bytes=4000)
    pool.join(2, "b", run(1))
    pool.join(1, "a", *[run(n) for n in (0, 1, 2)], capacity_bytes=4000, epoch=5)
    pool.pass_time(0.1, 1, 2, used=3000)
    assert split_keys(pool.told(1, Victims)[-1].blocks[0].keys) == [key(1)]


def test_a_victim_list_holds_nothing_that_changed_while_it_was_made(pool, monkeypatch):
    """Between slices a picked block is touched, and another's row goes to a new block: neither is a victim."""
    monkeypatch.setattr("kvpool.core.recency.SEGMENT", 2)
    pool = Pool()
    pool.join(1, "a", *[run(n) for n in range(8)], capacity_bytes=10_000)
    pool.say(1, Heartbeat(6_000, 0))
    pool.perform(pool.master.handle(Tick(), pool.clock()))
    pool.perform(pool.master.work())
    pool.perform(pool.master.work())
    pool.prefix(0)
    pool.say(1, Delta(1, (run(50),), (run(1),), 6_000))
    pool.work()
    listed = [k for r in pool.told(1, Victims)[-1].blocks for k in split_keys(r.keys)]
    assert listed == [key(2), key(3), key(4)]


def test_what_remains_of_a_broken_block_goes_too(pool):
    """When one node loses its shard, the others are told to drop theirs; a copy that is whole stays."""
    pool.join(1, "a", run(1, 2, namespace=TWO, shards=1))
    pool.join(2, "b", run(1, 2, namespace=TWO, shards=2))
    pool.join(3, "c", run(2, namespace=TWO))
    assert pool.prefix(1, 2, namespace=TWO) == 2
    pool.say(1, Delta(1, (), (run(1, 2, namespace=TWO, shards=1),), 0))
    assert pool.evicted(2) == [key(1)]
    assert pool.evicted(3) == []
    assert [pool.prefix(n, namespace=TWO) for n in (1, 2)] == [0, 1]


def test_what_a_dead_node_breaks_goes_too(pool):
    """The sweep after a death asks the others for what can never be a hit again."""
    pool.join(1, "a", run(1, 2, namespace=TWO, shards=1))
    pool.join(2, "b", run(1, 2, 3, namespace=TWO, shards=2))
    pool.pass_time(11, 2)
    assert pool.state("a") == "dead"
    assert sorted(pool.evicted(2)) == sorted([key(1), key(2)])


# ---- operators -------------------------------------------------------------------------------------


def test_keys_are_evicted_wherever_they_are(pool):
    """Every owner is asked; unknown keys count for nothing; an unknown namespace is an error."""
    pool.join(1, "a", run(1, 2))
    pool.join(2, "b", run(2))
    blocks, size, effects = pool.master.evictions.keys(ONE.digest, keys(2, 2, 9))
    pool.perform(effects)
    assert (blocks, size) == (1, 2 * SIZE)
    assert pool.evicted(1) == pool.evicted(2) == [key(2)]
    assert pool.master.evictions.keys(ONE.digest, b"") == (0, 0, [])
    with pytest.raises(UnknownNamespaceError):
        pool.master.evictions.keys(b"x" * 16, keys(1))


def test_a_namespace_is_evicted_and_nothing_else(monkeypatch):
    """Rows that come to hold another namespace's blocks while the job runs are left alone."""
    monkeypatch.setattr(operators_module, "ROWS_PER_SLICE", 2)
    monkeypatch.setattr(index_module, "ROWS_PER_SLICE", 2)
    pool = Pool()
    pool.join(1, "a", run(*range(8)), run(100, namespace=TWO))
    assert pool.master.evictions.namespace(ONE.digest) == (8, 8 * SIZE)
    pool.perform(pool.master.work())
    pool.say(1, Delta(1, (), (run(*range(8)),), 0))
    pool.say(1, Delta(2, (run(*range(200, 208), namespace=TWO),), (), 0))
    pool.work()
    evicted = {k for evict in pool.told(1, Evict) for r in evict.blocks for k in split_keys(r.keys)}
    assert evicted <= {key(n) for n in range(8)}
    assert {r.namespace for evict in pool.told(1, Evict) for r in evict.blocks} == {ONE.digest}
    with pytest.raises(UnknownNamespaceError):
        pool.master.evictions.namespace(b"x" * 16)


def test_the_coldest_are_evicted_up_to_a_size(pool):
    """About so many bytes over all nodes, copies counted, leased blocks spared."""
    pool.join(1, "a", *[run(n) for n in range(6)])
    pool.join(2, "b", run(1))
    pool.prefix(1)
    pool.lookup(0, lease=True)
    blocks, size, effects = pool.master.evictions.coldest(2 * SIZE)
    pool.perform(effects)
    assert (blocks, size, pool.evicted(1)) == (2, 2 * SIZE, [key(2), key(3)])
    assert pool.master.evictions.coldest(0) == (0, 0, [])
    blocks, size, effects = pool.master.evictions.coldest(1 << 40)
    assert (blocks, size) == (5, 6 * SIZE)


def test_the_coldest_are_searched_a_slice_at_a_time(monkeypatch):
    """What is used during the search is cold no more; what was used since it was found stays."""
    monkeypatch.setattr(recency_module, "SEGMENT", 4)
    monkeypatch.setattr(operators_module, "ROWS_PER_SLICE", 2)
    pool = Pool()
    pool.join(1, "a", *[run(n) for n in range(20)])
    search = pool.master.evictions.search_coldest(1 << 40)
    slices = 0
    while True:
        try:
            next(search)
        except StopIteration as end:
            blocks, size, effects = end.value
            break
        slices += 1
        pool.prefix(0)
        pool.prefix(19 - slices % 3)
    assert slices == 5
    assert (blocks, size) == (17, 17 * SIZE)
    pool.perform(effects)
    assert pool.evicted(1) == [key(1)]
    pool.perform(pool.master.work())
    assert pool.evicted(1) == [key(n) for n in range(1, 4)]
    pool.prefix(5)
    pool.work()
    assert pool.evicted(1) == [key(n) for n in range(1, 17) if n != 5]
    check_master(pool.master)


def test_placing_takes_turns_among_nodes_that_are_large_enough(pool):
    """A client without a node is sent to each live node in turn."""
    assert pool.master.place(1) is None
    pool.join(1, "a")
    pool.join(2, "b", capacity_bytes=500)
    assert {pool.master.place(100).address.node_id for _ in range(4)} == {"a", "b"}
    assert {pool.master.place(600).address.node_id for _ in range(4)} == {"a"}
    assert pool.master.place(5000) is None


def test_an_answer_names_live_owners_only(pool):
    """A copy at a suspect node is no place to read from."""
    pool.join(1, "a", run(1))
    pool.join(2, "b", run(1))
    pool.close(1)
    ((_, placement),) = pool.lookup(1).runs
    named = [pool.master.node_of(owner.incarnation) for owner in placement.owners]
    assert [node.address.node_id for node in named if node is not None] == ["b"]
