"""What must hold of a segment between any two calls; tests and the simulation ask all the time."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from kvpool.core.allocator import require
from kvpool.core.slot_table import shown
from kvpool.core.slots import header_bytes

if TYPE_CHECKING:
    from kvpool.core.segment import SegmentState


def check_segment(state: SegmentState) -> None:
    """Raise AssertionError unless every count, order and index agrees with the slots themselves."""
    allocator, blocks, owners = state._allocator, state._blocks, state._owners.values()
    allocator.check()
    slots = [slot for block in blocks.values() for slot in block.shards.values()]
    used = {offset: size for offset, size, taken in allocator.extents() if taken}
    require({slot.start: slot.extent_bytes for slot in slots} == used, "slots are the used extents: no overlap")
    require(dict(state._slot_at.items()) == {slot.start: slot for slot in slots}, "every slot is found by its address")
    heads = all(s.offset == s.start + header_bytes(s.layers) for s in slots)
    fits = all(s.offset + s.shard_bytes <= s.start + s.extent_bytes for s in slots)
    require(heads and fits, "a slot has room for its header and its payload")
    require(state.payload_bytes == sum(s.shard_bytes for s in slots if not s.reserved), "payload is counted")

    pins = Counter(slot for owner in owners for pinned in owner.pins.values() for slot in pinned)
    require(all(slot.pins == pins[slot] for slot in slots), "pins are counted")
    require(state.pinned == len(pins) == sum(slot in pins for slot in slots), "nothing pinned is gone")
    writing = [slot for owner in owners for put in owner.reservations.values() for slot in put.slots]
    writing += [slot for kept in state._quarantine.values() for slot in kept]
    writing += state._orphans
    require(all(slot.pins for slot in state._orphans), "what nobody writes any more is there for its readers")
    committed = [slot for slot in slots if not slot.reserved]
    require(all(not slot.transfer and not slot.partial for slot in committed), "a commit ends progress")
    given_up = {*state._orphans, *(slot for kept in state._quarantine.values() for slot in kept)}
    require(all(not slot.transfer for slot in given_up), "what nobody goes on with finds no new readers")
    for owner in owners:
        for put in owner.reservations.values():
            require({slot.transfer for slot in put.slots} == {put.transfer}, "a transfer's slots name it")
            require(len({len(slot.partial) for slot in put.slots}) == 1, "they advance together")
    require({slot for slot in slots if slot.reserved} == set(writing), "what is reserved belongs to somebody")
    require(state.reserved == len(writing) == len(set(writing)), "reserved slots are counted")

    keyed = [item for part in blocks.parts for item in part.items()]
    require(len(blocks) == len(keyed), "blocks are counted")
    for key, block in keyed:
        held = block.shards.values()
        require(block.key == key and bool(held), "a block has a key and a slot")
        require(all(slot.block is block for slot in held), "a slot knows its block")
        busy = sum(slot.pins + slot.reserved for slot in held) + block.kept
        require(block.busy == busy, "busy = pins + reserved, and one more while it is kept")
        require(not block.kept or key in state._keep, "only what is to be kept is")
        require(block.bytes == sum(slot.extent_bytes for slot in held), "a block's bytes are its slots'")
        require(block.committed == sum(1 << s.shard for s in held if not s.reserved), "committed shards are known")
    if state.table is not None:
        listed = {slot.entry: slot for slot in slots if slot.entry >= 0}
        require(not any(slot.reserved for slot in listed.values()), "only committed slots are listed")
        require(state.table.listed() == {entry: shown(slot) for entry, slot in listed.items()}, "the table is right")
    order = list(blocks)
    require(all(block.newer.older is block for block in order if block.newer is not None), "the order leads both ways")
    require({*order} == {block for block in blocks.values() if not block.kept}, "what is not kept has its turn")
    require(len(order) == len({*order}), "and one only")
    stamps = [block.stamp for block in order if not block.busy]
    require(stamps == sorted(stamps), "the eviction order is that of the stamps")
    require(state._kept_bytes == sum(b.bytes for b in blocks.values() if b.kept), "kept bytes are counted")
    require(state._busy_bytes == sum(b.bytes for b in blocks.values() if b.busy), "busy bytes are counted")
