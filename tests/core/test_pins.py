"""Pins of operators: what is never evicted, or last, whether it is there or comes later."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvpool.core import pins as pins_module
from kvpool.core.effects import CatalogPin, PinEnded
from kvpool.core.messages import Delta, Evict, Keep, RemoveFiles, Victims, Welcome
from kvpool.core.slots import file_bytes
from kvpool.errors import InvalidArgumentError, OverloadedError, UnknownNamespaceError
from kvpool.model import Backend, split_keys
from kvpool.testing.checks import check_master
from tests.core.master_pool import LIMITS, ONE, SIZE, TWO, Pool, key, keys, run

HERE = bytes(range(16))


class Pinning(Pool):
    def pin(self, *numbers: int, ttl_s: float = 0, label: str = ""):
        pin, slices = self.master.pins.begin(ONE.digest, keys(*numbers), ttl_s, label, self.clock())
        for effects in slices:
            self.perform(effects)
        return pin

    def end(self, pin) -> None:
        for effects in self.master.pins.end(pin):
            self.perform(effects)

    def kept_by(self, session: int) -> set[bytes]:
        """What a node keeps after all that it was told."""
        kept: set[bytes] = set()
        for message in self.told(session, Keep):
            kept |= {k for r in message.keep for k in split_keys(r.keys)}
            kept -= {k for r in message.release for k in split_keys(r.keys)}
        return kept

    def evict_all(self) -> list[bytes]:
        """What an eviction of far more than there is takes from node "a"."""
        self.master.limits = replace(LIMITS, eviction_ratio=1.0)
        self.pass_time(2.1, 1)  # one eviction at a time
        self.sent.clear()
        self.pass_time(0.1, 1, used=2000)
        return [k for m in self.told(1, Evict) for r in m.blocks for k in split_keys(r.keys)]


@pytest.fixture
def pool():
    pool = Pinning()
    yield pool
    pool.work()
    check_master(pool.master)


def test_what_is_pinned_hard_is_never_evicted(pool):
    """Not by the watermark, not by an operator; it is on no victim list; nodes are told to spare it themselves."""
    pool.join(1, "a", run(1, 2, 3), used_bytes=800)
    pool.pin(2)
    assert pool.kept_by(1) == {key(2)}
    pool.pass_time(1.2, 1, used=800)
    assert {k for m in pool.told(1, Victims)[-1:] for r in m.blocks for k in split_keys(r.keys)} == {key(3)}
    assert sorted(pool.evict_all()) == sorted([key(1), key(3)])
    pool.sent.clear()
    assert pool.master.evictions.keys(ONE.digest, keys(2))[:2] == (0, 0)
    assert pool.master.evictions.coldest(10 * SIZE)[0] == 2


def test_what_is_pinned_softly_goes_last_and_until_its_time(pool):
    """As long as anything else can go, it stays; after its time it is like everything else."""
    pool.join(1, "a", run(1, 2, 3))
    pin = pool.pin(3, ttl_s=5)
    assert pool.kept_by(1) == set()
    assert pool.evict_all() == [key(2), key(1), key(3)]
    pool.pass_time(5.1, 1)
    assert pool.master.pins.by_id == {}
    assert [e.id for e in pool.kept if isinstance(e, PinEnded)] == [pin.id]
    assert pool.evict_all() == [key(3), key(2), key(1)]


def test_blocks_that_come_later_are_pinned_when_they_come(pool):
    """And when they went and come again; what was there when the pin was taken is counted."""
    pool.join(1, "a", run(1))
    pin = pool.pin(1, 2)
    assert (pin.present, sum(pool.master.pins.present(pin))) == (1, 1)
    pool.say(1, Delta(1, (run(2),), (run(1),), 0))
    assert sum(pool.master.pins.present(pin)) == 1
    pool.say(1, Delta(2, (run(1, 3),), (), 0))
    assert pool.evict_all() == [key(3)]


def test_pins_of_the_same_block_end_one_by_one(pool):
    """The strongest that stands counts; a node is told when the last hard one ends."""
    pool.join(1, "a", run(1, 2))
    hard, other, soft = pool.pin(1), pool.pin(1, 2), pool.pin(1, ttl_s=60)
    pool.end(other)
    pool.end(other)
    assert pool.kept_by(1) == {key(1)}
    assert pool.evict_all() == [key(2)]
    pool.end(hard)
    pool.sent.clear()
    assert pool.evict_all() == [key(2), key(1)]
    pool.end(soft)
    assert len(pool.master.index.holds) == 0


def test_a_hard_pin_ends_at_the_nodes_too(pool):
    """What no hard pin names any more is released."""
    pool.join(1, "a", run(1, 2))
    first, _ = pool.pin(1, 2), pool.pin(2)
    pool.end(first)
    assert pool.kept_by(1) == {key(2)}


def test_a_node_that_says_hello_is_told_what_to_keep(pool, monkeypatch):
    """After the Welcome, with which it forgets what it kept; in messages of a bounded size."""
    monkeypatch.setattr(pins_module, "GREETING_KEYS_MAX", 16)
    pool.join(1, "a", run(*range(40)))
    pool.pin(*range(40))
    pool.join(2, "b")
    pool.work()
    kinds = [type(message) for to, message in pool.sent if to == 2]
    assert kinds.index(Welcome) < kinds.index(Keep)
    assert [sum(map(len, m.keep)) for m in pool.told(2, Keep)] == [16, 16, 8]
    assert pool.kept_by(2) == pool.kept_by(1) == {key(n) for n in range(40)}


def test_a_node_is_greeted_a_message_at_a_time(pool, monkeypatch):
    """Lookups go between two of them. What is pinned or ends meanwhile is told, too; it ends with the session."""
    monkeypatch.setattr(pins_module, "GREETING_KEYS_MAX", 4)
    pool.join(1, "a")
    first, second, third = pool.pin(*range(8)), pool.pin(*range(6, 12)), pool.pin(*range(20, 30))
    pool.hello(2, "b")
    assert pool.told(2, Keep) == []
    pool.perform(pool.master.work())
    assert [sum(map(len, m.keep)) for m in pool.told(2, Keep)] == [4]
    pool.end(first)
    pool.pin(40)
    pool.perform(pool.master.work())
    pool.end(third)
    pool.work()
    assert pool.kept_by(2) == pool.kept_by(1) == {key(n) for n in (*range(6, 12), 40)}
    assert len(second) == 6
    pool.hello(3, "c")
    pool.perform(pool.master.work())
    pool.close(3)
    pool.hello(4, "c")
    pool.work()
    assert len(pool.told(3, Keep)) == 1
    assert pool.kept_by(4) == pool.kept_by(1)


def test_thousands_of_pins_are_told_in_few_messages(pool):
    """A node's session takes only so many messages at once; soft pins are not the node's business."""
    pool.join(1, "a")
    for number in range(1500):
        pool.pin(number)
    pool.pin(2000, ttl_s=60)
    pin, slices = pool.master.pins.begin(TWO.digest, key(1), 0, "", pool.clock())
    for effects in slices:
        pool.perform(effects)
    pool.join(2, "b")
    pool.work()
    first, last = pool.told(2, Keep)
    assert [(r.namespace, r.shards, len(r)) for r in first.keep] == [(ONE.digest, 1, 1024)]
    assert {(r.namespace, r.shards, len(r)) for r in last.keep} == {(ONE.digest, 1, 476), (TWO.digest, 3, 1)}
    assert pool.kept_by(2) == {key(n) for n in range(1500)}
    assert pin.present == 0


def test_large_pins_are_taken_and_counted_in_slices(pool, monkeypatch):
    """No slice costs more because of those before it: what has been taken is not copied."""
    monkeypatch.setattr(pins_module, "_SLICE_BYTES", 16 * 10)
    pool.join(1, "a", run(*range(25, 40)))
    pin, slices = pool.master.pins.begin(ONE.digest, keys(*range(40)), 0, "", pool.clock())
    taken = pin.keys
    for effects in slices:
        pool.perform(effects)
        assert pin.keys is taken
    assert (taken, pin.present) == (keys(*range(40)), 15)
    assert list(pool.master.pins.present(pin)) == [0, 0, 5, 10]
    (kept,) = [e for e in pool.kept if isinstance(e, CatalogPin)]
    pool.end(pin)
    assert kept.keys == keys(*range(40))


def test_pinned_files_are_spared(pool):
    """A backend that is too full loses others; then those pinned for some time, never those pinned for good."""
    size = file_bytes(SIZE, ONE.shard_layers)
    pool.join(1, "a", backends=(Backend(HERE, "dir", 10 * size),))
    pool.pin(7)
    pool.pin(6, ttl_s=600)
    pool.say(1, Delta(1, (replace(run(*range(8)), backend=HERE),), (), 0))
    pool.master.limits = replace(LIMITS)
    backend = pool.master.backends.by_id[HERE]

    def removed() -> list[bytes]:
        return sorted(k for m in pool.told(1, RemoveFiles) for r in m.blocks for k in split_keys(r.keys))

    backend.capacity_bytes = 3 * size
    pool.pass_time(0.3, 1, sequence=1)
    assert removed() == sorted(key(n) for n in range(6))
    assert pool.master.backends.used_bytes(backend) == 2 * size
    backend.capacity_bytes = size
    pool.pass_time(10, 1, sequence=1)
    assert removed() == sorted(key(n) for n in range(7))
    assert pool.master.backends.used_bytes(backend) == size


def test_pins_are_kept_and_come_back(pool):
    """The catalog has all of a pin; a new master that is given it spares the block and gives out other numbers."""
    pool.join(1, "a", run(1))
    pool.pin(1, label="system prompt")
    (kept,) = [e for e in pool.kept if isinstance(e, CatalogPin)]
    assert (kept.label, kept.namespace, kept.until, kept.keys) == ("system prompt", ONE.digest, None, key(1))
    successor = Pinning(epoch=99)
    successor.master.pins.load(kept.id, kept.label, kept.namespace, kept.until, kept.keys)
    successor.join(1, "a", run(1, 2))
    successor.work()
    assert successor.kept_by(1) == {key(1)}
    assert successor.evict_all() == [key(2)]
    assert successor.pin(2).id != kept.id
    ended, unfinished = successor.pin(3), successor.master.pins.begin(ONE.digest, keys(4, 5), 0, "", 0)[1]
    successor.kept.clear()
    assert not [e for e in successor.master.tell_catalog() if isinstance(e, CatalogPin)], "each is work of its own"
    successor.end(ended)
    successor.work()
    assert [e.keys for e in successor.kept if isinstance(e, CatalogPin)] == [key(1), key(2)]
    successor.kept.clear()
    for effects in unfinished:
        successor.perform(effects)
    assert [e.keys for e in successor.kept if isinstance(e, CatalogPin)] == [keys(4, 5)]


def test_pins_are_chosen_by_number_label_or_all(pool):
    """A label names all that have it; an empty one none."""
    pool.join(1)
    pins = pool.master.pins
    first, second, third = pool.pin(1, label="x"), pool.pin(2, label="x"), pool.pin(3)
    assert pins.chosen({third.id, 12345}, "", every=False) == [third]
    assert pins.chosen(set(), "x", every=False) == [first, second]
    assert pins.chosen(set(), "", every=False) == []
    assert pins.chosen(set(), "", every=True) == [first, second, third]


def test_pins_are_bounded_and_well_formed(pool, monkeypatch):
    """Each refusal names what is wrong."""
    pool.join(1, namespaces=(ONE,))
    monkeypatch.setattr(pins_module, "KEYS_MAX", 2)
    begin = pool.master.pins.begin
    pool.pin(1, 2)
    with pytest.raises(OverloadedError):
        begin(ONE.digest, key(3), 0, "", 0)
    monkeypatch.setattr(pins_module, "KEYS_MAX", 5)
    _, slices = begin(ONE.digest, keys(3, 4), 0, "", 0)
    with pytest.raises(OverloadedError):  # what is begun counts
        begin(ONE.digest, keys(5, 6), 0, "", 0)
    pool.end(pool.master.pins.chosen(set(), "", every=True)[1])
    assert list(slices) == []
    pool.pin(5, 6)
    with pytest.raises(InvalidArgumentError, match="keys"):
        begin(ONE.digest, b"short", 0, "", 0)
    with pytest.raises(InvalidArgumentError, match="keys"):
        begin(ONE.digest, b"", 0, "", 0)
    with pytest.raises(InvalidArgumentError, match="label"):
        begin(ONE.digest, key(3), 0, "x" * 300, 0)
    with pytest.raises(UnknownNamespaceError):
        begin(TWO.digest, key(3), 0, "", 0)
