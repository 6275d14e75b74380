"""The segment's state machine: single rules first, then random calls beside a dumb oracle."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvpool.core import segment as segment_module
from kvpool.core.messages import BlockRun
from kvpool.core.segment import BEING_WRITTEN, NAMESPACES_MAX, NO_ROOM, STORED, SegmentState, header_bytes
from kvpool.errors import (
    AllPinnedError,
    InvalidArgumentError,
    KVPoolError,
    OverloadedError,
    TooLargeError,
    UnknownIdError,
    UnknownNamespaceError,
)
from kvpool.model import Namespace, mask_shards, split_keys

KIB = 1 << 10
MIB = 1 << 20
SMALL = Namespace(model="small")
WIDE = Namespace(model="wide", head_groups=3)
PAIR = Namespace(model="two layers", layers=2)
WIDE_PAIR = Namespace(model="wide, two layers", layers=2, head_groups=3)
DEEP = Namespace(model="many layers", layers=64)
OWNER = 1


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def keys(*numbers: int) -> bytes:
    return b"".join(key(n) for n in numbers)


def run(digest: bytes, *numbers: int, shard_bytes: int = 512, shards: int = 1) -> BlockRun:
    return BlockRun(digest, shards, shard_bytes, keys(*numbers))


def segment(slots: int, shard_bytes: int = 512) -> SegmentState:
    state = SegmentState(slots * (512 + shard_bytes))
    state.register(SMALL)
    for namespace in (WIDE, PAIR, WIDE_PAIR, DEEP):
        state.register(namespace)
    return state


def test_namespaces_are_so_many() -> None:
    """Each report names all of them; those that are known stay welcome."""
    state = SegmentState(MIB)
    for number in range(NAMESPACES_MAX):
        state.register(Namespace(model=str(number)))
    with pytest.raises(OverloadedError, match="namespaces already"):
        state.register(Namespace(model="one more"))
    assert state.register(Namespace(model="0")) in {known.digest for known in state.namespaces}


def put(state: SegmentState, *numbers: int, shard_bytes: int = 512, owner: int = OWNER) -> list[int]:
    held = state.reserve(owner, SMALL.digest, (0,), keys(*numbers), shard_bytes, 1)
    if held.id:
        state.commit(owner, held.id, b"".join(slot.key[-8:] for slot in held.slots))
    return held.offsets


def stored(state: SegmentState, numbers: Iterable[int]) -> set[int]:
    return {n for n in numbers if state.local_prefix(SMALL.digest, 1, key(n))}


# ---- put and get -----------------------------------------------------------------------------------


def test_a_header_has_a_checksum_for_each_layer():
    """The payload follows a header area of whole units."""
    assert header_bytes(1) == 512
    assert header_bytes(52) == 512
    assert header_bytes(53) == 1024


def test_committed_is_the_first_moment_anyone_sees_it():
    """A reserved slot is neither pinned nor counted as stored; a committed one is both."""
    state = segment(4)
    held = state.reserve(OWNER, SMALL.digest, (0,), keys(1, 2), 512, 1)
    assert held.offsets == [slot.offset for slot in held.slots]
    assert all(offset % 512 == 0 for offset in held.offsets)
    assert state.pin(2, SMALL.digest, (0,), keys(1)).id == 0
    assert stored(state, (1, 2)) == set()
    assert not state.has_changes
    slots = state.commit(OWNER, held.id, b"a" * 8 + b"b" * 8)
    assert [(s.namespace, s.key, s.shard, s.shard_bytes, s.layers, s.checksums) for s in slots] == [
        (SMALL.digest, key(1), 0, 512, 1, b"a" * 8),
        (SMALL.digest, key(2), 0, 512, 1, b"b" * 8),
    ]
    assert slots[0].generation != slots[1].generation
    pinned = state.pin(2, SMALL.digest, (0,), keys(3, 1)).slots
    assert pinned == [None, slots[0]]
    assert state.take_changes() == ((run(SMALL.digest, 1, 2),), ())
    state.check()


def test_an_item_that_is_there_or_on_its_way_is_not_reserved_again():
    """A batch answers each item by itself, a duplicate inside the batch too, whatever its size."""
    state = segment(4)
    put(state, 1)
    held = state.reserve(OWNER, SMALL.digest, (0,), keys(1, 2, 2), 512, 1)
    assert held.offsets[0] == STORED
    assert held.offsets[1] >= 0
    assert held.offsets[2] == BEING_WRITTEN
    assert state.reserve(2, SMALL.digest, (0,), keys(1, 2), 1024, 1).offsets == [STORED, BEING_WRITTEN]


def test_items_are_key_major():
    """All shards of the first key come first."""
    state = segment(8)
    held = state.reserve(OWNER, WIDE.digest, (2, 0), keys(1, 2), 512, 1)
    assert [(s.key, s.shard) for s in held.slots] == [(key(1), 2), (key(1), 0), (key(2), 2), (key(2), 0)]
    state.commit(OWNER, held.id, bytes(32))
    found = state.pin(OWNER, WIDE.digest, (0, 1), keys(2)).slots
    assert [slot and slot.shard for slot in found] == [0, None]
    assert state.local_prefix(WIDE.digest, 3, keys(1)) == 0
    rest = state.reserve(OWNER, WIDE.digest, (1,), keys(1, 2), 512, 1)
    state.commit(OWNER, rest.id, bytes(16))
    assert state.local_prefix(WIDE.digest, 3, keys(1, 2, 3)) == 2
    assert state.take_changes() == ((run(WIDE.digest, 1, 2, shards=7),), ())


def test_keep_frees_the_items_that_were_not_written():
    """A clear bit gives the slot back; the others become visible."""
    state = segment(4)
    held = state.reserve(OWNER, SMALL.digest, (0,), keys(1, 2, 3), 512, 1)
    slots = state.commit(OWNER, held.id, bytes(24), b"\x01\x00\x01")
    assert [slot.key for slot in slots] == [key(1), key(3)]
    assert stored(state, (1, 2, 3)) == {1, 3}
    assert state.used_bytes == 2 * 1024
    state.check()


def test_a_bad_commit_changes_nothing():
    """Wrong lengths, wrong flags, a wrong owner or id are refused and the reservation stays."""
    state = segment(4)
    held = state.reserve(OWNER, PAIR.digest, (0,), keys(1, 2), 512, 2)
    for checksums, keep, field in (
        (bytes(16), None, "checksums"),
        (bytes(32), b"\x01", "keep"),
        (bytes(32), b"\x01\x02", "keep"),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            state.commit(OWNER, held.id, checksums, keep)
        assert caught.value.field == field
    for owner, reservation in ((2, held.id), (OWNER, held.id + 1)):
        with pytest.raises(UnknownIdError):
            state.commit(owner, reservation, bytes(32))
        with pytest.raises(UnknownIdError):
            state.abort(owner, reservation)
    state.check()
    assert len(state.commit(OWNER, held.id, bytes(32))) == 2
    with pytest.raises(UnknownIdError):
        state.reservation(OWNER, held.id)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"namespace": b"short"}, "namespace"),
        ({"keys": bytes(17)}, "keys"),
        ({"keys": bytes(16 << 20), "shards": (0, 1)}, "keys"),
        ({"shards": ()}, "shards"),
        ({"shards": (0, 0)}, "shards"),
        ({"shards": (-1,)}, "shards"),
        ({"shards": (3,)}, "shards"),
        ({"shards": (256,)}, "shards"),
        ({"shard_bytes": 0}, "shard_bytes"),
        ({"shard_bytes": 1 << 63}, "shard_bytes"),
        ({"layers": 0}, "layers"),
        ({"layers": 5000}, "layers"),
        ({"layers": 3}, "layers"),
    ],
)
def test_arguments_are_checked_by_name(change, field):
    """An argument that cannot be meant is refused before anything changes."""
    state = segment(4)
    call = {"namespace": WIDE.digest, "shards": (0,), "keys": keys(1), "shard_bytes": 512, "layers": 1} | change
    with pytest.raises(InvalidArgumentError) as caught:
        state.reserve(OWNER, **call)
    assert caught.value.field == field
    assert state.used_bytes == 0


def test_a_namespace_must_be_registered_to_store_not_to_ask():
    """Unknown namespaces hold nothing, and nothing can be put under them."""
    state = segment(4)
    stranger = Namespace(model="stranger").digest
    with pytest.raises(UnknownNamespaceError):
        state.reserve(OWNER, stranger, (0,), keys(1), 512, 1)
    assert state.pin(OWNER, stranger, (0,), keys(1)).slots == [None]
    assert state.local_prefix(stranger, 1, keys(1)) == 0
    assert stranger not in {namespace.digest for namespace in state.namespaces}


# ---- owners ----------------------------------------------------------------------------------------


def test_pins_nest_and_die_with_their_owner():
    """A slot is protected until its last pin is released or its owner has gone; unknown ids are ignored."""
    state = segment(1)
    put(state, 1)
    first, second = (state.pin(OWNER, SMALL.digest, (0,), keys(1)) for _ in range(2))
    other = state.pin(2, SMALL.digest, (0,), keys(1, 1))
    state.release(2, first.id)
    state.release(OWNER, first.id)
    state.release(OWNER, first.id)
    state.release(OWNER, second.id)
    assert state.pinned == 1
    with pytest.raises(AllPinnedError):
        put(state, 2)
    assert state.evict([run(SMALL.digest, 1)]) == 0
    assert other.slots[0] is not None
    state.disconnect(2)
    assert state.pinned == 0
    assert put(state, 2)[0] >= 0
    state.check()


def test_a_touch_is_a_use_and_protects_nothing():
    """Blocks that were read without a pin go last, their chain's tail before its head; what is not here is ignored."""
    state = segment(4)
    put(state, 0, 1, 2, 3)
    touched = state.touch(SMALL.digest, [0], keys(2, 3, 99))
    assert [slot.key for slot in touched] == [key(2), key(3)]
    for number, left in enumerate(({0, 2, 3}, {2, 3}, {2}, set())):
        put(state, 100 + number)
        assert stored(state, range(4)) == left
    state.check()


def test_a_dead_writer_leaves_nothing_behind():
    """Without quarantine its reservations are free at once."""
    state = segment(2)
    state.reserve(OWNER, SMALL.digest, (0,), keys(1, 2), 512, 1)
    state.disconnect(OWNER)
    assert state.used_bytes == 0
    assert put(state, 1, owner=2)[0] >= 0


def test_quarantine_lasts_until_the_process_is_gone():
    """Nobody can use the memory or write the key while the process may still be copying into it."""
    state = segment(2)
    held = state.reserve(OWNER, SMALL.digest, (0,), keys(1), 512, 1)
    put(state, 2, 3)
    state.disconnect(OWNER, quarantine=True)
    with pytest.raises(UnknownIdError):
        state.commit(OWNER, held.id, bytes(8))
    assert state.reserve(2, SMALL.digest, (0,), keys(1), 512, 1).offsets == [BEING_WRITTEN]
    assert put(state, 4, 5, owner=2).count(held.offsets[0]) == 0
    state.check()
    state.process_gone(OWNER)
    state.check()
    assert state.reserved == 0
    assert put(state, 1, owner=2)[0] >= 0


def test_process_gone_ends_the_connection_too():
    """Whichever is noticed first, the end of the process or of its connection, frees everything once."""
    state = segment(2)
    state.reserve(OWNER, SMALL.digest, (0,), keys(1), 512, 1)
    state.process_gone(OWNER)
    state.disconnect(OWNER, quarantine=True)
    assert state.used_bytes == 0
    state.check()


# ---- transfers -------------------------------------------------------------------------------------


def begin(state: SegmentState, *numbers: int, transfer: int = 7, owner: int = OWNER) -> int:
    """Reserve blocks of two layers for a transfer; returns the reservation."""
    return state.reserve(owner, PAIR.digest, (0,), keys(*numbers), 512, 2, transfer).id


def here(state: SegmentState, *numbers: int, transfer: int = 7, layer: int = 0, reader: int = 2) -> list[bool]:
    """Return which blocks a reader of the transfer may read from this layer on."""
    pin = state.pin_ready(reader, PAIR.digest, (0,), keys(*numbers), transfer, layer)
    state.release(reader, pin.id)
    return [slot is not None for slot in pin.slots]


def test_layers_are_seen_by_readers_of_the_same_transfer_only():
    """As many as were told; by nobody else, by no other call, and not a moment before."""
    state = segment(4)
    held = begin(state, 1, 2)
    assert here(state, 1, 2) == [False, False]
    slots = state.progress(OWNER, held, 1, b"a" * 8 + b"b" * 8)
    assert [slot.partial for slot in slots] == [b"a" * 8, b"b" * 8]
    assert here(state, 1, 2) == [True, True]
    assert here(state, 1, 2, layer=1) == [False, False]
    assert here(state, 1, 2, transfer=8) == here(state, 1, 2, transfer=0) == [False, False]
    assert state.layers_ready(PAIR.digest + key(1), 0, 7) == 1
    assert state.layers_ready(PAIR.digest + key(1), 0, 8) == state.layers_ready(PAIR.digest + key(3), 0, 7) == 0
    assert state.pin(2, PAIR.digest, (0,), keys(1)).id == 0
    assert state.slot(PAIR.digest + key(1), 0) is None
    assert state.local_prefix(PAIR.digest, 1, keys(1)) == 0
    assert not state.has_changes
    state.progress(OWNER, held, 2, b"c" * 8 + b"d" * 8)
    assert here(state, 1, 2, layer=1) == [True, True]
    state.check()
    slots = state.commit(OWNER, held, b"a" * 8 + b"c" * 8 + b"b" * 8 + b"d" * 8)
    assert [slot.checksums for slot in slots] == [b"a" * 8 + b"c" * 8, b"b" * 8 + b"d" * 8]
    assert here(state, 1, 2, transfer=8, layer=1) == [True, True]
    state.check()


def test_only_the_leading_run_of_what_is_there_is_pinned():
    """What comes after the first item that lacks the layer is of no use to who reads in order."""
    state = segment(8)
    state.progress(OWNER, begin(state, 1), 2, bytes(16))
    state.progress(OWNER, begin(state, 3), 1, bytes(8))
    assert here(state, 1, 3, 2, 1) == [True, True, False, False]
    assert here(state, 1, 3, 1, layer=1) == [True, False, False]
    assert here(state, 2, 1) == [False, False]
    assert state.pinned == 0
    wide = state.reserve(OWNER, WIDE_PAIR.digest, (2,), keys(1), 512, 2, 7)
    state.progress(OWNER, wide.id, 1, bytes(8))
    pin = state.pin_ready(2, WIDE_PAIR.digest, (2, 1), keys(1), 7, 0)
    assert [slot is not None for slot in pin.slots] == [True, False]
    state.check()


def test_progress_only_goes_forward():
    """What cannot be meant is refused by name, and changes nothing."""
    state = segment(4)
    held, plain = begin(state, 1, 2), begin(state, 3, transfer=0)
    state.progress(OWNER, held, 1, bytes(16))
    for call, field in (
        ((held, 1, b""), "layers"),
        ((held, 0, b""), "layers"),
        ((held, 3, bytes(32)), "layers"),
        ((held, 2, bytes(8)), "checksums"),
        ((held, 2, bytes(32)), "checksums"),
        ((plain, 1, bytes(8)), "reservation"),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            state.progress(OWNER, *call)
        assert caught.value.field == field
    for owner, reservation in ((2, held), (OWNER, 99)):
        with pytest.raises(UnknownIdError):
            state.progress(owner, reservation, 2, bytes(16))
    with pytest.raises(InvalidArgumentError) as caught:
        state.commit(OWNER, held, bytes(8) + b"x" * 8 + b"other..." + b"x" * 8)
    assert caught.value.field == "checksums"
    assert here(state, 1, 2) == [True, True]
    assert here(state, 1, layer=1) == [False]
    state.check()


@pytest.mark.parametrize("end", ["abort", "drop", "die", "quarantine"])
def test_a_slot_that_a_reader_has_pinned_stays_when_its_writer_is_gone(end):
    """Its place is given to nobody and its key not written anew until it is released; new readers find nothing."""
    state = segment(2)
    held = begin(state, 1, 2)
    state.progress(OWNER, held, 1, bytes(16))
    pins = [state.pin_ready(reader, PAIR.digest, (0,), keys(1), 7, 0) for reader in (2, 3)]
    if end == "abort":
        state.abort(OWNER, held)
    elif end == "drop":
        state.commit(OWNER, held, bytes(32), bytes(2))
    else:
        state.disconnect(OWNER, quarantine=end == "quarantine")
        state.check()
        assert here(state, 1) == [False]
        state.process_gone(OWNER)
    state.check()
    assert (state.reserved, state.pinned) == (1, 1)
    assert here(state, 1) == [False]
    assert state.reserve(4, PAIR.digest, (0,), keys(1), 512, 2, 9).offsets == [BEING_WRITTEN]
    assert put(state, 5, owner=4)[0] >= 0
    with pytest.raises(AllPinnedError):
        put(state, 6, 7, shard_bytes=1024, owner=4)
    state.release(2, pins[0].id)
    state.check()
    assert state.reserved == 1
    state.disconnect(3)
    state.check()
    assert (state.reserved, state.pinned) == (0, 0)
    assert begin(state, 1, owner=4)


def test_a_pin_of_a_slot_outlasts_its_commit():
    """A reader that began before the commit has an ordinary pin after it."""
    state = segment(1)
    held = begin(state, 1)
    state.progress(OWNER, held, 1, bytes(8))
    pin = state.pin_ready(2, PAIR.digest, (0,), keys(1), 7, 0)
    state.commit(OWNER, held, bytes(16))
    with pytest.raises(AllPinnedError):
        put(state, 2)
    state.release(2, pin.id)
    assert put(state, 2)[0] >= 0
    state.check()


def test_of_two_transfers_that_write_a_block_the_first_is_read_early():
    """The second is told that it is being written; its readers see it when it is committed."""
    state = segment(2)
    held = begin(state, 1)
    assert state.reserve(3, PAIR.digest, (0,), keys(1), 512, 2, 8).offsets == [BEING_WRITTEN]
    state.progress(OWNER, held, 2, bytes(16))
    assert (here(state, 1, transfer=7), here(state, 1, transfer=8)) == ([True], [False])
    state.commit(OWNER, held, bytes(16))
    assert (here(state, 1, transfer=7), here(state, 1, transfer=8)) == ([True], [True])


def test_whoever_listens_is_told_of_layers_and_commits():
    """Of the slots in question, after they can be seen."""
    state = segment(4)
    told = []
    state.arrived = lambda slots: told.append([(slot.key, slot.ready(7)) for slot in slots])
    held = begin(state, 1, 2)
    state.progress(OWNER, held, 1, bytes(16))
    state.commit(OWNER, held, bytes(32), b"\x00\x01")
    assert told == [[(key(1), 1), (key(2), 1)], [(key(2), 2)]]


# ---- eviction --------------------------------------------------------------------------------------


def test_the_coldest_goes_first():
    """A put into a full segment takes the least recently committed or pinned block."""
    state = segment(3)
    put(state, 1)
    put(state, 2)
    put(state, 3)
    state.release(OWNER, state.pin(OWNER, SMALL.digest, (0,), keys(1)).id)
    put(state, 4)
    assert stored(state, range(9)) == {1, 3, 4}
    put(state, 3)  # already there: that somebody wanted it again counts as use
    put(state, 5)
    assert stored(state, range(9)) == {3, 4, 5}


def test_a_recycled_place_gets_a_header_of_the_new_shape():
    """More layers and fewer bytes can fill the very same extent; the payload then begins elsewhere."""
    state = segment(1, shard_bytes=1024)
    (narrow,) = put(state, 1, shard_bytes=1024)
    held = state.reserve(OWNER, DEEP.digest, (0,), keys(2), 512, 64)
    assert held.offsets == [narrow + 512]
    state.check()
    assert [slot.layers for slot in state.commit(OWNER, held.id, bytes(512))] == [64]


def test_the_tail_of_a_chain_goes_before_its_head():
    """One commit or pin touches its blocks last to first."""
    state = segment(4)
    put(state, 1, 2, 3, 4)
    put(state, 5)
    assert stored(state, range(9)) == {1, 2, 3, 5}
    state.release(OWNER, state.pin(OWNER, SMALL.digest, (0,), keys(1, 2, 3)).id)
    put(state, 6)
    put(state, 7)
    assert stored(state, range(9)) == {1, 2, 6, 7}


def test_the_masters_list_comes_before_our_own_order():
    """Listed blocks go first, in the list's order, except those used or written since it arrived."""
    state = segment(4)
    for number in (1, 2, 3, 4):
        put(state, number)
    state.set_victims([run(SMALL.digest, 9, 4, 2), run(SMALL.digest, 3)])
    state.release(OWNER, state.pin(OWNER, SMALL.digest, (0,), keys(2)).id)
    put(state, 5)
    assert stored(state, range(9)) == {1, 2, 3, 5}
    put(state, 6)
    assert stored(state, range(9)) == {1, 2, 5, 6}
    put(state, 7)
    assert stored(state, range(9)) == {2, 5, 6, 7}
    assert state.counters["victim_hits"] == 2
    state.set_victims([run(SMALL.digest, 7)])
    state.set_victims([])
    put(state, 8)
    assert stored(state, range(9)) == {5, 6, 7, 8}


def test_what_an_operator_has_pinned_is_spared_up_to_half_of_the_memory():
    """Whether it was there or comes later; whatever the master lists or asks; until it is let go."""
    state = segment(4)
    put(state, 1)
    state.keep([run(SMALL.digest, 1, 2, 3)])
    for number in (2, 3, 4, 5, 6):
        put(state, number)
    state.set_victims([run(SMALL.digest, 1, 2)])
    state.evict([run(SMALL.digest, 1)])
    put(state, 7)
    assert stored(state, range(9)) == {1, 2, 6, 7}  # 3 was too much
    state.let_go([run(SMALL.digest, 2)])
    state.evict([run(SMALL.digest, 1, 2)])
    assert stored(state, range(9)) == {1, 6, 7}
    state.let_all_go()
    state.evict([run(SMALL.digest, 1)])
    assert stored(state, range(9)) == {6, 7}
    state.check()


def test_letting_all_go_takes_as_long_as_there_are_blocks_kept(monkeypatch):
    """A session begins with it: a million keys without blocks must not hold up the loop."""
    state = segment(8)
    put(state, *range(4))
    state.keep([run(SMALL.digest, *range(2, 10_000))])
    looked: list[bytes] = []
    monkeypatch.setattr(segment_module, "block_keys", lambda run: looked.append(run.keys) or [])
    state.let_all_go()
    assert looked == []
    state.check()
    monkeypatch.undo()
    assert state.evict([run(SMALL.digest, *range(4))]) == 4 * KIB
    state.let_all_go()


def test_a_prefix_is_looked_for_as_far_as_one_call_may_go(monkeypatch):
    """What lies behind is not looked at: the answer is a shorter prefix."""
    monkeypatch.setattr(segment_module, "LOCAL_PREFIX_KEYS_MAX", 3)
    state = segment(8)
    put(state, *range(5))
    assert state.local_prefix(SMALL.digest, 1, keys(*range(5))) == 3
    assert state.local_prefix(SMALL.digest, 1, keys(*range(3))) == 3
    assert state.local_prefix(SMALL.digest, 1, keys(0, 1, 9, 2)) == 2


def test_a_victim_is_a_whole_block():
    """All shards of a block on this node go together, and only unpinned blocks go at all."""
    state = segment(6)
    held = state.reserve(OWNER, WIDE.digest, (0, 1, 2), keys(1, 2), 512, 1)
    state.commit(OWNER, held.id, bytes(48))
    state.pin(OWNER, WIDE.digest, (1,), keys(2))
    put(state, 3)
    assert state.pin(OWNER, WIDE.digest, (0, 1, 2), keys(1)).slots == [None] * 3
    assert None not in state.pin(OWNER, WIDE.digest, (0, 1, 2), keys(2)).slots
    state.check()


def test_making_room_for_a_shard_spares_its_own_block():
    """The shards already stored of the block being written are not what makes room for the next one."""
    state = segment(2)
    first = state.reserve(OWNER, WIDE.digest, (0,), keys(1), 512, 1)
    state.commit(OWNER, first.id, bytes(8))
    put(state, 2)
    second = state.reserve(OWNER, WIDE.digest, (1,), keys(1), 512, 1)
    state.commit(OWNER, second.id, bytes(8))
    assert None not in state.pin(OWNER, WIDE.digest, (0, 1), keys(1)).slots
    assert stored(state, (2,)) == set()


def test_the_masters_eviction_spares_what_is_in_use():
    """A command drops whole blocks and says how many bytes it freed."""
    state = segment(4)
    put(state, 1, 2)
    state.pin(OWNER, SMALL.digest, (0,), keys(2))
    state.reserve(OWNER, SMALL.digest, (0,), keys(3), 512, 1)
    assert state.evict([run(SMALL.digest, 1, 2, 3, 4)]) == 1024
    assert stored(state, range(9)) == {2}
    state.check()


def test_a_put_fails_only_for_two_reasons():
    """Too large for the segment, or nothing left that may be evicted; both are counted."""
    state = segment(2)
    with pytest.raises(TooLargeError):
        put(state, 1, shard_bytes=2048)
    put(state, 1, 2)
    state.pin(OWNER, SMALL.digest, (0,), keys(1, 2))
    for _ in range(2):
        with pytest.raises(AllPinnedError):
            put(state, 3)
    assert (state.counters["too_large"], state.counters["all_pinned"]) == (1, 2)
    assert put(state, 1, 3) == [STORED, NO_ROOM]
    state.disconnect(OWNER)
    assert put(state, 3)[0] >= 0


def test_a_batch_keeps_what_found_room():
    """Items before the one that fails stay reserved, the others say why not."""
    state = segment(3)
    put(state, 1)
    state.pin(OWNER, SMALL.digest, (0,), keys(1))
    held = state.reserve(OWNER, SMALL.digest, (0,), keys(2, 3, 4, 1, 5), 512, 1)
    assert [min(offset, 0) for offset in held.offsets] == [0, 0, NO_ROOM, STORED, NO_ROOM]
    assert len(held.slots) == 2
    state.check()


def test_neighbours_make_room_for_a_larger_slot():
    """Small blocks that lie together are evicted together, around whatever is pinned."""
    state = segment(16)
    put(state, *range(16))
    pinned = state.pin(OWNER, SMALL.digest, (0,), keys(*range(3, 16, 4)))
    assert put(state, 100, shard_bytes=2560)[0] >= 0
    assert state.counters["evictions"] == 3
    with pytest.raises(AllPinnedError):
        put(state, 101, shard_bytes=3584)
    state.release(OWNER, pinned.id)
    assert put(state, 101, shard_bytes=3584)[0] >= 0
    state.check()


def test_a_window_far_from_the_coldest_is_found():
    """When pins box in all of the coldest blocks, the whole segment is searched before a put fails."""
    state = segment(40)
    for number in range(40):
        put(state, number)
    pinned = state.pin(OWNER, SMALL.digest, (0,), keys(*range(1, 32, 2)))
    assert put(state, 100, shard_bytes=2560)[0] >= 0
    assert state.counters["window_scans"] == 1
    assert stored(state, range(0, 32, 2)) == set(range(0, 32, 2))
    with pytest.raises(AllPinnedError):
        put(state, 101, shard_bytes=8 * KIB)
    with pytest.raises(AllPinnedError):
        put(state, 101, shard_bytes=8 * KIB)
    assert state.counters["window_scans"] == 2, "nothing has changed, so the search was not repeated"
    state.release(OWNER, pinned.id)
    assert put(state, 101, shard_bytes=8 * KIB)[0] >= 0
    state.check()


@pytest.mark.parametrize("end", ["commit", "abort", "drop"])
def test_room_that_a_writer_kept_is_found_when_it_ends(end):
    """A put that failed beside a reservation works once that is committed or freed."""
    state = segment(7)
    held = [state.reserve(OWNER, SMALL.digest, (0,), keys(n), 512, 1).id for n in range(7)]
    for n in (0, 1, 2, 4, 5, 6):
        state.commit(OWNER, held[n], bytes(8))
    with pytest.raises(AllPinnedError):
        put(state, 100, shard_bytes=3 * KIB)
    if end == "commit":
        state.commit(OWNER, held[3], bytes(8))
    elif end == "abort":
        state.abort(OWNER, held[3])
    else:
        state.commit(OWNER, held[3], bytes(8), b"\x00")
    assert put(state, 100, shard_bytes=3 * KIB)[0] >= 0
    state.check()


# ---- how full it gets ------------------------------------------------------------------------------


def usage(sizes: list[int], weights: list[float] | None = None) -> tuple[float, float]:
    """Return (least, mean) share of 64 MiB that holds payload once it has filled, over 5x as much again."""
    rng = random.Random(7)
    state = SegmentState(64 * MIB)
    digest = state.register(SMALL)
    written, number, seen = 0, 0, []
    while written < 6 * state.capacity_bytes:
        (size,) = rng.choices(sizes, weights)
        held = state.reserve(OWNER, digest, (0,), key(number), size, 1)
        state.commit(OWNER, held.id, bytes(8))
        number, written = number + 1, written + size
        if written > state.capacity_bytes:
            seen.append(state.payload_bytes / state.capacity_bytes)
    state.check()
    return min(seen), sum(seen) / len(seen)


@pytest.mark.parametrize("size", [64 * KIB, 2 * MIB])
def test_one_size_fills_96_percent(size):
    """Under churn, payload alone."""
    assert usage([size])[0] >= 0.96


@pytest.mark.parametrize("by_bytes", [False, True])
def test_four_sizes_fill_90_percent(by_bytes):
    """At any moment of five times oversubscribed churn, with equal counts or equal bytes of each size."""
    sizes = [64 * KIB, 128 * KIB, 512 * KIB, 2 * MIB]
    least, mean = usage(sizes, [1 / size for size in sizes] if by_bytes else None)
    assert least >= 0.90
    assert mean >= 0.95


# ---- beside a dumb oracle --------------------------------------------------------------------------

UNITS = 24
OWNERS = st.integers(1, 3)
NUMBERS = st.lists(st.integers(0, 11), min_size=1, max_size=4)
SIZES = st.sampled_from([2, 512, 1000, 2048, 4096])
TRANSFERS = st.integers(0, 2)


def checksums(items: Iterable[tuple[bytes, int]], first: int = 0, end: int = 2) -> bytes:
    """Return what a writer would say of these layers of these items."""
    return b"".join(block[-6:] + bytes([shard, layer]) for block, shard in items for layer in range(first, end))


class SegmentMachine(RuleBasedStateMachine):
    """Random calls; the oracle knows by plain dicts who holds what where, and what may not move."""

    @initialize()
    def start(self):
        self.state = SegmentState(UNITS * 512)
        for namespace in (PAIR, WIDE_PAIR):
            self.state.register(namespace)
        self.reserved: dict[tuple[bytes, int], tuple[int, int]] = {}  # item -> offset, bytes
        self.ready: dict[tuple[bytes, int], tuple[int, int]] = {}  # item of a transfer -> which, layers
        self.orphans: set[tuple[bytes, int]] = set()  # given up by the writer, but not by a reader
        self.writes: dict[int, tuple[int, list[tuple[bytes, int]]]] = {}  # id -> owner, items
        self.ghosts: dict[int, list[tuple[bytes, int]]] = {}
        self.pins: dict[int, tuple[int, list[tuple[bytes, int, int]]]] = {}  # id -> owner, items with offset
        self.replica: dict[tuple[bytes, int], int] = {}  # what somebody who only reads the changes knows
        self.wanted: set[bytes] = set()  # by operators
        self.safe: set[bytes] = set()  # blocks that nothing may evict any more, because operators want them

    def kept(self) -> set[bytes]:
        return {block.key for block in self.state._blocks.values() if block.kept}

    def occupied(self) -> bytearray:
        """Return a map of units that nothing may evict: by pin, by reservation, or by a busy or kept block."""
        busy = {item[0] for item in self.reserved} | {k for _, items in self.pins.values() for k, _, _ in items}
        busy |= self.kept()
        taken = bytearray(UNITS)
        for slot in self.state._slot_at.values():
            if slot.block.key in busy:
                taken[slot.start // 512 : (slot.start + slot.extent_bytes) // 512] = b"\x01" * (
                    slot.extent_bytes // 512
                )
        return taken

    def give_up(self, items):
        """Note that nobody goes on writing these; what is pinned stays where it is."""
        pinned = {item[:2] for _, found in self.pins.values() for item in found}
        for item in items:
            self.ready.pop(item, None)
            if item in pinned:
                self.orphans.add(item)
            else:
                self.orphans.discard(item)
                del self.reserved[item]

    def unpin(self, gone):
        """Note that these pins have ended."""
        for pin in gone:
            del self.pins[pin]
        self.give_up(set(self.orphans))

    @rule(owner=OWNERS, wide=st.booleans(), shard=st.integers(0, 2), numbers=NUMBERS, size=SIZES, transfer=TRANSFERS)
    def reserve(self, owner, wide, shard, numbers, size, transfer):
        namespace, shard = (WIDE_PAIR, shard) if wide else (PAIR, 0)
        units = (512 + size + 511) // 512
        items = [(namespace.digest + key(n), shard) for n in numbers]
        own = {item[0] for item in items}
        try:
            held = self.state.reserve(owner, namespace.digest, (shard,), keys(*numbers), size, 2, transfer)
        except AllPinnedError:
            offsets = [NO_ROOM] * len(items)
        else:
            offsets = held.offsets
            if held.id:
                self.writes[held.id] = (owner, [i for i, o in zip(items, offsets, strict=True) if o >= 0])
        for item, offset in zip(items, offsets, strict=True):
            assert (offset == BEING_WRITTEN) == (item in self.reserved)
            if offset >= 0:
                assert offset % 512 == 0
                assert 512 <= offset <= UNITS * 512 - size
                self.reserved[item] = (offset, size)
                if transfer:
                    self.ready[item] = (transfer, 0)
        if NO_ROOM in offsets:
            # No window was left, but for one through a block of this very call.
            taken = self.occupied()
            for slot in self.state._slot_at.values():
                if slot.block.key in own:
                    taken[slot.start // 512 : (slot.start + slot.extent_bytes) // 512] = b"\x01" * (
                        slot.extent_bytes // 512
                    )
            assert max(map(len, bytes(taken).split(b"\x01"))) < units

    @precondition(lambda self: self.writes)
    @rule(data=st.data(), keep=st.booleans())
    def commit(self, data, keep):
        reservation = data.draw(st.sampled_from(sorted(self.writes)))
        owner, items = self.writes.pop(reservation)
        bits = bytes(data.draw(st.lists(st.integers(0, 1), min_size=len(items), max_size=len(items)))) if keep else b""
        slots = self.state.commit(owner, reservation, checksums(items), bits)
        wanted = [item for at, item in enumerate(items) if not bits or bits[at]]
        assert [(s.namespace + s.key, s.shard) for s in slots] == wanted
        assert [(s.offset, s.shard_bytes) for s in slots] == [self.reserved[item] for item in wanted]
        for item in wanted:
            self.ready.pop(item, None)
            del self.reserved[item]
        self.give_up(set(items) - set(wanted))

    def advance(self, reservation, layers):
        owner, items = self.writes[reservation]
        transfer, done = self.ready[items[0]]
        self.state.progress(owner, reservation, layers, checksums(items, done, layers))
        self.ready.update(dict.fromkeys(items, (transfer, layers)))

    @rule(writer=OWNERS, reader=OWNERS, numbers=NUMBERS, size=SIZES, layers=st.integers(1, 2))
    def write_and_read_early(self, writer, reader, numbers, size, layers):
        self.reserve(writer, False, 0, numbers, size, 1)
        mine = [held for held, (owner, items) in self.writes.items() if owner == writer and self.ready.get(items[0])]
        if mine:
            reservation = max(mine)
            block, shard = item = self.writes[reservation][1][-1]
            transfer, done = self.ready[item]
            if done < layers:
                self.advance(reservation, layers)
            pin = self.state.pin_ready(reader, block[:16], (shard,), block[16:], transfer, 0)
            assert pin.slots[0].partial == checksums([item], 0, max(done, layers))
            self.pins[pin.id] = (reader, [(*item, self.reserved[item][0])])

    @precondition(lambda self: self.writes)
    @rule(data=st.data())
    def progress(self, data):
        reservation = data.draw(st.sampled_from(sorted(self.writes)))
        owner, items = self.writes[reservation]
        transfer, done = self.ready.get(items[0], (0, 0))
        layers = data.draw(st.integers(1, 2))
        if transfer and layers > done:
            self.advance(reservation, layers)
        else:
            with pytest.raises(InvalidArgumentError):
                self.state.progress(owner, reservation, layers, bytes(8 * len(items)))

    @precondition(lambda self: self.writes)
    @rule(data=st.data())
    def abort(self, data):
        reservation = data.draw(st.sampled_from(sorted(self.writes)))
        owner, items = self.writes.pop(reservation)
        self.state.abort(owner, reservation)
        self.give_up(items)

    @rule(owner=OWNERS, wide=st.booleans(), numbers=NUMBERS, transfer=TRANSFERS, layer=st.integers(0, 1))
    def pin_ready(self, owner, wide, numbers, transfer, layer):
        namespace, shards = (WIDE_PAIR, (2, 0, 1)) if wide else (PAIR, (0,))
        asked = [(namespace.digest + key(n), shard) for n in numbers for shard in shards]
        there = []
        for item in asked:
            if item in self.reserved:
                named, layers = self.ready.get(item, (0, 0))
                there.append(bool(transfer) and named == transfer and layers > layer)
            else:
                there.append(self.state.slot(*item) is not None)
        run_length = [*there, False].index(False)
        pin = self.state.pin_ready(owner, namespace.digest, shards, keys(*numbers), transfer, layer)
        assert [slot is not None for slot in pin.slots] == [at < run_length for at in range(len(asked))]
        found = [(*item, slot.offset) for item, slot in zip(asked, pin.slots, strict=True) if slot is not None]
        for item, slot in zip(asked, pin.slots[:run_length], strict=False):
            known = slot.partial if slot.checksums is None else slot.checksums
            assert known == checksums([item], 0, len(known) // 8)
            assert len(known) > 8 * layer
        assert bool(pin.id) == bool(found)
        if found:
            self.pins[pin.id] = (owner, found)

    @rule(owner=OWNERS, wide=st.booleans(), numbers=NUMBERS)
    def pin(self, owner, wide, numbers):
        namespace, shards = (WIDE_PAIR, (2, 0, 1)) if wide else (PAIR, (0,))
        pin = self.state.pin(owner, namespace.digest, shards, keys(*numbers))
        asked = [(namespace.digest + key(n), shard) for n in numbers for shard in shards]
        assert not any(slot and item in self.reserved for item, slot in zip(asked, pin.slots, strict=True))
        found = [(*item, slot.offset) for item, slot in zip(asked, pin.slots, strict=True) if slot is not None]
        assert bool(pin.id) == bool(found)
        if found:
            self.pins[pin.id] = (owner, found)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def release(self, data):
        pin = data.draw(st.sampled_from(sorted(self.pins)))
        owner, _ = self.pins[pin]
        self.state.release(owner + 1, pin)
        self.state.release(owner, pin)
        self.unpin([pin])

    @rule(owner=OWNERS, quarantine=st.booleans())
    def disconnect(self, owner, quarantine):
        self.state.disconnect(owner, quarantine)
        self.unpin([pin for pin, held in self.pins.items() if held[0] == owner])
        for reservation in [r for r, (o, _) in self.writes.items() if o == owner]:
            items = self.writes.pop(reservation)[1]
            if quarantine:
                self.ghosts.setdefault(owner, []).extend(items)
                for item in items:
                    self.ready.pop(item, None)
            else:
                self.give_up(items)

    @rule(owner=OWNERS)
    def process_gone(self, owner):
        self.disconnect(owner, quarantine=False)
        self.state.process_gone(owner)
        self.give_up(self.ghosts.pop(owner, []))

    @rule(wide=st.booleans(), numbers=NUMBERS)
    def evict(self, wide, numbers):
        before = self.state.used_bytes
        freed = self.state.evict([run((WIDE_PAIR if wide else PAIR).digest, *numbers)])
        assert before - self.state.used_bytes == freed

    @rule(wide=st.booleans(), numbers=NUMBERS)
    def set_victims(self, wide, numbers):
        self.state.set_victims([run((WIDE_PAIR if wide else PAIR).digest, *numbers)])

    @rule(wide=st.booleans(), numbers=NUMBERS)
    def keep(self, wide, numbers):
        digest = (WIDE_PAIR if wide else PAIR).digest
        self.state.keep([run(digest, *numbers)])
        self.wanted |= {digest + key(n) for n in numbers}

    @rule(wide=st.booleans(), numbers=NUMBERS, every=st.booleans())
    def let_go(self, wide, numbers, every):
        digest = (WIDE_PAIR if wide else PAIR).digest
        if every:
            self.state.let_all_go()
            self.wanted.clear()
        else:
            self.state.let_go([run(digest, *numbers)])
            self.wanted -= {digest + key(n) for n in numbers}

    @rule()
    def report(self):
        added, removed = self.state.take_changes()
        for runs, present in ((removed, True), (added, False)):
            for part in runs:
                for item in [(part.namespace + k, s) for k in split_keys(part.keys) for s in mask_shards(part.shards)]:
                    assert (item in self.replica) == present
                    if present:
                        assert self.replica.pop(item) == part.shard_bytes
                    else:
                        self.replica[item] = part.shard_bytes
        assert not self.state.has_changes
        assert self.replica == {
            (part.namespace + k, s): part.shard_bytes
            for part in self.state.snapshot()
            for k in split_keys(part.keys)
            for s in mask_shards(part.shards)
        }

    @invariant()
    def holds(self):
        state = self.state
        state.check()
        self.safe &= self.wanted
        assert self.safe <= self.kept() <= self.wanted
        self.safe = self.kept()
        assert {block.key for block in state._kept} == self.safe
        assert state.reserved == len(self.reserved)
        where = {(s.block.key, s.shard): s for s in state._slot_at.values()}
        for item, (offset, size) in self.reserved.items():
            assert (where[item].offset, where[item].shard_bytes) == (offset, size)
            assert where[item].reserved
        for _, items in self.pins.values():
            for block, shard, offset in items:
                assert where[block, shard].offset == offset


SegmentMachine.TestCase.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)
test_random_calls_agree_with_the_oracle = SegmentMachine.TestCase


@pytest.mark.parametrize("seed", range(4))
def test_sustained_random_load_keeps_every_invariant(seed):
    """Thousands of calls with mixed sizes, pins and deaths on a larger segment."""
    rng = random.Random(seed)
    state = SegmentState(8 * MIB)
    digest = state.register(SMALL)
    pins: list[tuple[int, int]] = []
    for step in range(1500):
        owner = rng.randrange(1, 4)
        numbers = [rng.randrange(400) for _ in range(rng.randrange(1, 6))]
        size = rng.choice((4 * KIB, 64 * KIB, 200 * KIB, MIB))
        try:
            held = state.reserve(owner, digest, (0,), keys(*numbers), size, 1)
        except KVPoolError:
            assert pins
        else:
            if held.id and rng.random() < 0.9:
                state.commit(owner, held.id, bytes(8 * len(held.slots)))
        pin = state.pin(owner, digest, (0,), keys(*numbers[:1]))
        pins.append((owner, pin.id))
        while len(pins) > 12:
            state.release(*pins.pop(rng.randrange(len(pins))))
        if rng.random() < 0.03:
            state.disconnect(owner, quarantine=rng.random() < 0.5)
            state.process_gone(owner)
        if not step % 50:
            state.check()
    for owner in (1, 2, 3):
        state.process_gone(owner)
    assert (state.pinned, state.reserved) == (0, 0)
    state.check()
    assert state.evict(state.snapshot()) > 0
    assert state.used_bytes == 0
