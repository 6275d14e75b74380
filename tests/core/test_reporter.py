"""The node's side of the session: single rules, then a lossy link to a master that knows only the protocol."""

from __future__ import annotations

import random

import pytest

from kvpool.core.messages import (
    Ack,
    BlockRun,
    Delta,
    Evict,
    Heartbeat,
    Hello,
    Inventory,
    MasterMessage,
    NodeAddress,
    NodeMessage,
    SendInventory,
    Superseded,
    Victims,
    Welcome,
)
from kvpool.core.reporter import DELTA_KEYS_MAX, INVENTORY_KEYS_MAX, SPARED_MAX, Reporter
from kvpool.core.segment import SegmentState
from kvpool.model import Namespace, mask_shards, split_keys

SPACE = Namespace(model="demo")
ADDRESS = NodeAddress("node-a", "127.0.0.1", 7000)
FRESH = Welcome(master_epoch=5, resume_after=0, inventory=True)


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def put(segment: SegmentState, *numbers: int, size: int = 512) -> None:
    held = segment.reserve(1, SPACE.digest, (0,), b"".join(map(key, numbers)), size, 1)
    if held.id:
        segment.commit(1, held.id, bytes(8 * len(held.slots)))


def run(*numbers: int) -> BlockRun:
    return BlockRun(SPACE.digest, 1, 512, b"".join(map(key, numbers)))


def gone(*numbers):
    """Blocks that went because the master said so."""
    return BlockRun(SPACE.digest, 1, 512, b"".join(map(key, numbers)), commanded=True)


def new(slots: int = 64) -> tuple[SegmentState, Reporter]:
    segment = SegmentState(slots * 1024)
    segment.register(SPACE)
    return segment, Reporter(segment, ADDRESS, epoch=77)


def live(slots: int = 64) -> tuple[SegmentState, Reporter]:
    segment, reporter = new(slots)
    reporter.connected()
    answers(reporter, FRESH)
    return segment, reporter


def answers(reporter, message):
    """What a message brings, the whole inventory included."""
    found = list(reporter.handle(message))
    while reporter.reporting:
        found += reporter.more()
    return found


def reported(chunks):
    """The blocks of an inventory's chunks, which are numbered and end with a last one."""
    assert [(c.chunk, c.last) for c in chunks] == [(at, at == len(chunks) - 1) for at in range(len(chunks))]
    return tuple(part for chunk in chunks for part in chunk.added)


def test_hello_says_who_and_how_much():
    """It carries identity, capacity, the newest delta, the last master and every namespace."""
    segment, reporter = live()
    put(segment, 1)
    reporter.flush()
    reporter.disconnected()
    assert reporter.connected() == [Hello(ADDRESS, 77, 64 * 1024, 1024, reporter.sequence, 5, (SPACE,))]


def test_hello_says_who_has_acknowledged_last():
    """Also after another master's Welcome, until that acknowledges something itself."""
    segment, reporter = live()
    put(segment, 1)
    reporter.flush()
    reporter.handle(Ack(reporter.sequence, generation=40))
    reporter.disconnected()
    (hello,) = reporter.connected()
    assert (hello.kept_by, hello.generation) == (5, 40)
    reporter.handle(Welcome(6, 0, inventory=True))
    reporter.disconnected()
    (hello,) = reporter.connected()
    assert (hello.master_epoch, hello.kept_by, hello.generation) == (6, 5, 40)


def test_nothing_is_sent_before_the_welcome():
    """Changes wait until the master has answered Hello."""
    segment, reporter = new()
    put(segment, 1)
    assert reporter.flush() == []
    assert reporter.handle(FRESH) == []
    reporter.connected()
    assert reporter.flush() == []
    told, *chunks = answers(reporter, FRESH)
    assert isinstance(told, Delta)
    assert reported(chunks) == (run(1),)
    assert {chunk.sequence for chunk in chunks} == {told.sequence}
    assert reporter.flush() == []


def test_many_changes_are_noted_while_nobody_is_told():
    """Some at a time: neither the next session nor the next inventory begins with the work of all of them."""
    segment, reporter = live(8)
    put(segment, 1)
    (known,) = reporter.flush()
    reporter.disconnected()
    for number in range(2, 3 * SPARED_MAX):
        put(segment, number)
        assert reporter.flush() == []
        assert segment.changes <= SPARED_MAX
    reporter.connected()
    missed = answers(reporter, Welcome(master_epoch=5, resume_after=known.sequence, inventory=False))
    there = {1}
    assert [delta.sequence for delta in missed] == list(range(known.sequence + 1, reporter.sequence + 1))
    for delta in missed:
        there -= {int.from_bytes(key) for run in delta.removed for key in split_keys(run.keys)}
        there |= {int.from_bytes(key) for run in delta.added for key in split_keys(run.keys)}
    assert there == set(range(3 * SPARED_MAX - 8, 3 * SPARED_MAX))


def test_an_empty_node_sends_one_empty_chunk():
    """The end of an inventory is always said."""
    _, reporter = new()
    reporter.connected()
    assert answers(reporter, FRESH)[1:] == [Inventory(reporter.sequence, 0, True, ())]


def test_deltas_are_numbered_and_follow_the_inventory():
    """Numbers go up by one; a heartbeat names the newest."""
    segment, reporter = live()
    start = reporter.sequence
    put(segment, 1, 2)
    assert reporter.flush() == [Delta(start + 1, (run(1, 2),), (), 2048)]
    segment.evict([run(1)])
    assert reporter.flush() == [Delta(start + 2, (), (gone(1),), 1024)]
    assert reporter.flush() == []
    assert reporter.heartbeat() == Heartbeat(1024, start + 2)


def test_a_namespace_is_told_once_and_before_its_blocks():
    """One registered during the session travels in the next delta."""
    segment, reporter = live()
    other = Namespace(model="other")
    segment.register(other)
    (delta,) = reporter.flush()
    assert isinstance(delta, Delta)
    assert delta.namespaces == (other,)
    assert reporter.flush() == []


def test_a_short_disconnect_resumes_where_it_was():
    """Only what the master has not seen is sent again, then what happened meanwhile."""
    segment, reporter = live()
    put(segment, 1)
    reporter.flush()
    seen = reporter.sequence
    put(segment, 2)
    (lost,) = reporter.flush()
    reporter.disconnected()
    put(segment, 3)
    assert reporter.flush() == []
    (hello,) = reporter.connected()
    assert isinstance(hello, Hello)
    assert hello.sequence == seen + 1
    assert reporter.handle(Welcome(5, seen, inventory=False)) == [lost, Delta(seen + 2, (run(3),), (), 3072)]


@pytest.mark.parametrize("resume_after", [0, 99])
def test_what_the_journal_does_not_cover_is_reported_anew(resume_after):
    """Acknowledged deltas are gone, later ones do not exist: both mean an inventory."""
    segment, reporter = live()
    put(segment, 1)
    reporter.flush()
    reporter.handle(Ack(reporter.sequence))
    reporter.handle(Ack(10_000))
    reporter.disconnected()
    reporter.connected()
    _, *chunks = answers(reporter, Welcome(5, resume_after, inventory=False))
    assert reported(chunks) == (run(1),)


def test_what_changes_during_an_inventory_follows_it():
    """Deltas wait for the inventory's end, and complete what its slices may have missed or told too much."""
    segment, reporter = live(slots=4000)
    put(segment, *range(3000))
    reporter.flush()
    messages = reporter.handle(SendInventory())
    messages += reporter.more()
    segment.evict([run(*range(500, 1500))])
    put(segment, 5000)
    assert reporter.flush() == []
    while reporter.reporting:
        messages += reporter.more()
    master = DumbMaster(5)
    for message in messages:
        master.receive(message)
    assert master.known == items(segment.snapshot())
    assert master.sequence == reporter.sequence


def test_the_journal_is_bounded(monkeypatch):
    """A master that never acknowledges costs a bounded amount of memory and an inventory later."""
    monkeypatch.setattr("kvpool.core.reporter.JOURNAL_DELTAS_MAX", 100)
    segment, reporter = live()
    start = reporter.sequence
    for number in range(100 + 5):
        put(segment, number % 100)
        segment.evict([run(number % 100)])
        put(segment, number % 100)
        segment.register(Namespace(model=f"m{number}"))
        reporter.flush()
    assert len(reporter._journal) == 100
    reporter.connected()
    assert isinstance(answers(reporter, Welcome(5, start, inventory=False))[-1], Inventory)


def test_an_eviction_is_confirmed_in_the_next_delta():
    """Also when there was nothing to evict; a second copy of the command is harmless."""
    segment, reporter = live()
    put(segment, 1, 2)
    reporter.flush()
    assert reporter.handle(Evict(7, (run(1),))) == []
    start = reporter.sequence
    assert reporter.flush() == [Delta(start + 1, (), (gone(1),), 1024, evictions_done=7)]
    reporter.handle(Evict(7, (run(1),)))
    assert reporter.flush() == []
    reporter.handle(Evict(8, (run(9),)))
    assert reporter.flush() == [Delta(start + 2, (), (), 1024, evictions_done=8)]


def test_another_masters_eviction_ids_are_forgotten():
    """A new master counts from its own start."""
    segment, reporter = live()
    reporter.handle(Evict(7, ()))
    reporter.flush()
    reporter.connected()
    answers(reporter, Welcome(6, 0, inventory=True))
    put(segment, 1)
    (delta,) = reporter.flush()
    assert isinstance(delta, Delta)
    assert delta.evictions_done == 0


def test_victims_reach_the_segment():
    """A put that needs room takes them first."""
    segment, reporter = live(slots=2)
    put(segment, 1)
    put(segment, 2)
    reporter.handle(Victims((run(2),)))
    put(segment, 3)
    assert segment.local_prefix(SPACE.digest, 1, key(1)) == 1
    assert segment.counters["victim_hits"] == 1


def test_superseded_is_the_end():
    """Another process has this node's id: nothing is said any more."""
    segment, reporter = live()
    reporter.handle(Superseded())
    put(segment, 1)
    assert reporter.superseded
    assert reporter.flush() == []
    assert reporter.handle(FRESH) == []
    assert reporter.handle(SendInventory()) == []


def test_large_reports_come_in_bounded_pieces():
    """Neither a delta nor a chunk of an inventory exceeds its keys or 1 MiB."""
    count = 70_000
    segment, reporter = live(slots=count)
    start = reporter.sequence
    for first in range(0, count, 7_000):
        put(segment, *range(first, first + 7_000))
    deltas = reporter.flush()
    assert [delta.sequence for delta in deltas] == list(range(start + 1, start + 1 + len(deltas)))
    assert sum(keys_of(delta) for delta in deltas) == count
    assert max(keys_of(delta) for delta in deltas) <= DELTA_KEYS_MAX
    told, *chunks = answers(reporter, SendInventory())
    assert isinstance(told, Delta)
    assert told.namespaces == (SPACE,)
    assert [(c.chunk, c.last, c.sequence) for c in chunks] == [
        (at, at == len(chunks) - 1, told.sequence) for at in range(len(chunks))
    ]
    assert sum(keys_of(chunk) for chunk in chunks) == count
    assert max(keys_of(chunk) for chunk in chunks) <= INVENTORY_KEYS_MAX


def test_short_runs_are_bounded_by_bytes():
    """A node where every block has another size still sends messages under 1 MiB."""
    segment = SegmentState(1 << 30)
    segment.register(SPACE)
    reporter = Reporter(segment, ADDRESS, 77)
    for number in range(12_000):
        put(segment, number, size=1 + number)
    reporter.connected()
    _, *chunks = answers(reporter, FRESH)
    assert len(chunks) > 1
    for chunk in chunks:
        assert isinstance(chunk, Inventory)
        assert sum(len(part.keys) + 80 for part in chunk.added) < 1 << 20


def keys_of(message: NodeMessage) -> int:
    assert isinstance(message, (Delta, Inventory))
    return sum(map(len, message.added)) + (sum(map(len, message.removed)) if isinstance(message, Delta) else 0)


# ---- a lossy link ----------------------------------------------------------------------------------

Replica = dict[tuple[bytes, int], int]


def items(runs: tuple[BlockRun, ...]) -> Replica:
    return {
        (part.namespace + k, shard): part.shard_bytes
        for part in runs
        for k in split_keys(part.keys)
        for shard in mask_shards(part.shards)
    }


class DumbMaster:
    """Applies deltas in order, asks for an inventory at any gap, and knows nothing else."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.sequence = 0
        self.awaiting = True
        self.known: Replica = {}
        self.spaces: set[bytes] = set()
        self.pending: Replica = {}
        self.pending_at = (0, 0)

    def receive(self, message: NodeMessage) -> list[MasterMessage]:
        if isinstance(message, (Hello, Delta)):
            self.spaces |= {space.digest for space in message.namespaces}
        if isinstance(message, Hello):
            resume = not self.awaiting and message.master_epoch == self.epoch and self.sequence <= message.sequence
            self.awaiting = not resume
            return [Welcome(self.epoch, self.sequence if resume else 0, inventory=not resume)]
        if isinstance(message, Heartbeat):
            return self.gap() if self.awaiting or message.sequence > self.sequence else []
        if isinstance(message, Inventory):
            return self.inventory(message)
        if self.awaiting or message.sequence <= self.sequence:
            return []
        if message.sequence != self.sequence + 1:
            return self.gap()
        for item in items(message.removed):
            self.known.pop(item, None)  # an inventory's later slices knew already
        assert self.readable(message.added), "blocks of a namespace that was never told"
        self.known |= items(message.added)
        self.sequence = message.sequence
        return [Ack(self.sequence)]

    def readable(self, runs: tuple[BlockRun, ...]) -> bool:
        return {part.namespace for part in runs} <= self.spaces

    def inventory(self, message: Inventory) -> list[MasterMessage]:
        if message.chunk == 0 and message.sequence > self.sequence:
            self.awaiting, self.pending, self.pending_at = True, {}, (message.sequence, 0)
        if not self.awaiting or self.pending_at != (message.sequence, message.chunk):
            return []
        if not self.readable(message.added):
            return self.gap()  # what told its namespace was lost
        self.pending |= items(message.added)
        self.pending_at = (message.sequence, message.chunk + 1)
        if not message.last:
            return []
        self.known, self.sequence, self.awaiting = self.pending, message.sequence, False
        return [Ack(self.sequence)]

    def gap(self) -> list[MasterMessage]:
        self.awaiting = True
        return [SendInventory()]


@pytest.mark.parametrize("seed", range(60))
def test_a_lossy_link_ends_in_agreement(seed):
    """Drops, copies, delays, disconnects and master restarts: once the link is good, the master knows all."""
    rng = random.Random(seed)
    segment, reporter = new(slots=24)
    master = DumbMaster(1)
    up: list[NodeMessage] = list(reporter.connected())
    down: list[MasterMessage] = []

    def step(fault: float) -> None:
        if up:
            message = up.pop(rng.randrange(len(up)) if rng.random() < fault else 0)
            down.extend(master.receive(message) if rng.random() >= fault / 2 else [])
            up.extend([message] if rng.random() < fault / 2 else [])
        if reporter.reporting and rng.random() >= fault:
            up.extend(reporter.more())
        if down:
            order = down.pop(rng.randrange(len(down)) if rng.random() < fault else 0)
            up.extend(reporter.handle(order) if rng.random() >= fault / 2 else [])
            down.extend([order] if rng.random() < fault / 2 else [])

    for turn in range(300):
        numbers = [rng.randrange(60) for _ in range(rng.randrange(1, 5))]
        put(segment, *numbers, size=rng.choice((512, 512, 2048)))
        if rng.random() < 0.1:
            down.append(Evict(turn, (run(*numbers), run(rng.randrange(60)))))
        if rng.random() < 0.03:
            segment.register(Namespace(model=f"model-{turn}"))
        if rng.random() < 0.03:
            reporter.disconnected()
            if rng.random() < 0.5:
                up.clear()
                down.clear()
            master = DumbMaster(turn + 2) if rng.random() < 0.3 else master
            up.extend(reporter.connected())
        up.extend(reporter.flush())
        if rng.random() < 0.3 and reporter.welcomed:
            up.append(reporter.heartbeat())
        for _ in range(rng.randrange(4)):
            step(0.2)
        segment.check()

    reporter.disconnected()
    up[:], down[:] = reporter.connected(), []
    for _ in range(4):
        while up or down or reporter.reporting:
            step(0)
        up.extend(reporter.flush())
        up.append(reporter.heartbeat())
    assert not master.awaiting
    assert master.known == items(segment.snapshot())
    assert master.sequence == reporter.sequence
