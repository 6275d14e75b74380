"""Why a block is not there, or where it is: an operator's question, answered in slices beside the real work.

Reads only. What the index cannot know (a block that is being written) is asked of the nodes by the server,
and taken in by ``take_probe``.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from kvpool.core.index import Index, Space
from kvpool.core.keytable import Rows, Words, as_words
from kvpool.core.master import MasterState
from kvpool.core.messages import BEING_WRITTEN, COMMITTED
from kvpool.core.removals import EVICTIONS, Removal
from kvpool.core.residency import TIER as HBM
from kvpool.errors import InvalidArgumentError
from kvpool.model import DIGEST_BYTES, KEY_BYTES, Namespace, mask_shards

KEYS_MAX = 1024
KEYS_SLICE = 16

WRITING = "writing"
"""What a node holds of a block that it has not committed: no tier yet."""


class Verdict(IntEnum):
    """In one word."""

    PRESENT = 0
    OWNER_SUSPECT = 1
    WARMING = 2
    NOT_WHOLE = 3
    BEING_WRITTEN = 4
    UNREPORTED = 5
    EVICTED = 6
    OWNER_LOST = 7
    NAMESPACE_DIFFERS = 8
    NEVER_STORED = 9
    UNKNOWN = 10


@dataclass(frozen=True, slots=True)
class Holder:
    """Who has something of a block: a node (``state`` says how it is) or, in tier hbm, an engine."""

    name: str
    tier: str
    state: str = ""
    shards: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Difference:
    """A field in which the namespace asked for and the one that has the key differ."""

    field: str
    here: str
    there: str


@dataclass(slots=True)
class Explained:
    """One block; ``namespace`` is the digest that this is about, empty when the key is known nowhere."""

    key: bytes
    verdict: Verdict = Verdict.UNKNOWN
    namespace: bytes = b""
    holders: list[Holder] = field(default_factory=list)
    missing: tuple[int, ...] = ()
    leases: int = 0
    last_use: float | None = None
    removals: list[Removal] = field(default_factory=list)
    other: bytes = b""
    differences: list[Difference] = field(default_factory=list)


def differences(here: Namespace, there: Namespace) -> list[Difference]:
    """Return the fields in which two descriptors differ, with both values."""
    ours, theirs = here.as_dict(), there.as_dict()
    return [Difference(name, str(ours[name]), str(theirs[name])) for name in here.differences(there)]


def explain(state: MasterState, namespace: bytes, keys: bytes, now: float) -> Generator[None, None, list[Explained]]:
    """Yield between slices; return each key's explanation. An empty ``namespace`` means wherever a key is known.

    Raises InvalidArgumentError.
    """
    if len(namespace) not in {0, DIGEST_BYTES}:
        raise InvalidArgumentError("namespace", f"must be {DIGEST_BYTES} bytes, not {len(namespace)}")
    if not keys or len(keys) % KEY_BYTES or len(keys) > KEYS_MAX * KEY_BYTES:
        raise InvalidArgumentError("keys", f"must be 1 to {KEYS_MAX} keys of {KEY_BYTES} bytes")
    words = as_words(keys)
    blocks = [Explained(keys[at : at + KEY_BYTES], namespace=namespace) for at in range(0, len(keys), KEY_BYTES)]
    spaces = list(state.index.spaces.values())
    asked = state.index.spaces.get(namespace)
    # A namespace that was never heard of has lost nothing, and has no number.
    number = asked.number if asked is not None else -1
    removals = yield from state.removals.search(words, number if namespace else None)
    for block, found in zip(blocks, removals, strict=True):
        _take_removals(block, found, spaces)
    yield from _elsewhere(state.index, namespace, blocks, words)
    for start in range(0, len(blocks), KEYS_SLICE):
        for block in blocks[start : start + KEYS_SLICE]:
            _judge(state, block, now)
        yield
    for _, engine, digest, at in state.residency.holders(words, {namespace} if namespace else ()):
        for i in at.tolist():
            blocks[i].namespace = blocks[i].namespace or digest
            if blocks[i].namespace == digest:
                blocks[i].holders.append(Holder(engine, HBM))
        yield
    return blocks


def _take_removals(block: Explained, found: list[Removal], spaces: list[Space]) -> None:
    """Keep those of the namespace asked for, or of the one that lost the key last."""
    if not block.namespace and found:
        block.namespace = spaces[found[0].space].digest
    block.removals = [r for r in found if spaces[r.space].digest == block.namespace]


def _elsewhere(index: Index, namespace: bytes, blocks: list[Explained], words: Words) -> Iterator[None]:
    """Find the namespaces that hold what the one asked for does not: the most similar ones first."""
    asked = index.spaces.get(namespace)
    descriptor = asked.descriptor if asked is not None else None
    others = [s for s in index.spaces.values() if s.digest != namespace and len(s.table)]
    if descriptor is not None:
        others.sort(key=lambda s: len(descriptor.differences(s.descriptor)) if s.descriptor else 1 << 10)
    left = _not_in(asked, words, np.arange(len(words))) if asked is not None else np.arange(len(words))
    for space in others:
        if not len(left):
            return
        still = _not_in(space, words, left)
        for i in np.setdiff1d(left, still).tolist():
            block = blocks[i]
            if not namespace:
                block.namespace, block.removals = space.digest, []
                continue
            block.other = space.digest
            if descriptor is not None and space.descriptor is not None:
                block.differences = differences(descriptor, space.descriptor)
        left = still
        yield


def _not_in(space: Space, words: Words, positions: Rows) -> Rows:
    missing: Rows = positions[space.table.find(words.take(positions, axis=0)) < 0]
    return missing


def _judge(state: MasterState, block: Explained, now: float) -> None:
    index = state.index
    space = index.spaces.get(block.namespace)
    row = int(space.table.find(as_words(block.key))[0]) if space is not None else -1
    if space is not None and row >= 0:
        _describe(state, block, row, now)
        if index.placements.whole[index.placement[row]]:
            block.verdict = Verdict.PRESENT
        elif any(holder.state == "warming" for holder in block.holders):
            block.verdict = Verdict.WARMING
        else:
            block.verdict = Verdict.NOT_WHOLE if block.missing else Verdict.OWNER_SUSPECT
    elif block.removals:
        evicted = block.removals[0].why in EVICTIONS
        block.verdict = Verdict.EVICTED if evicted else Verdict.OWNER_LOST
    elif block.other:
        block.verdict = Verdict.NAMESPACE_DIFFERS
    elif state.warming:
        block.verdict = Verdict.WARMING
    else:
        block.verdict = Verdict.UNKNOWN if state.removals.overflowed else Verdict.NEVER_STORED


def _describe(state: MasterState, block: Explained, row: int, now: float) -> None:
    index = state.index
    full, owners = index.placements[int(index.placement[row])]
    there = 0
    for owner in owners:
        there |= owner.shards
        node = state.owner_of(owner.incarnation)
        backend = state.backends.at(owner.incarnation)
        if backend is not None:
            name, how = backend.name, "live" if backend.live else "suspect"
        else:
            name, how = (node.address.node_id, node.state) if node is not None else ("(gone)", "dead")
        block.holders.append(Holder(name, owner.tier, how, tuple(mask_shards(owner.shards))))
    block.missing = tuple(mask_shards(full & ~there))
    block.leases = int(index.leased[row])
    block.last_use = state.ages.when(int(index.recency.stamps_of(np.array([row]))[0]), now)


def to_probe(blocks: Iterable[Explained]) -> list[Explained]:
    """Return the blocks about which the nodes may know more than the index."""
    known = {Verdict.PRESENT, Verdict.OWNER_SUSPECT}
    return [block for block in blocks if block.namespace and block.verdict not in known]


def take_probe(blocks: list[Explained], node_id: str, states: bytes) -> None:
    """Take in what a node says of these blocks, a byte each."""
    for block, state in zip(blocks, states, strict=False):
        if state & BEING_WRITTEN:
            block.holders.append(Holder(node_id, WRITING, "live"))
            block.verdict = Verdict.BEING_WRITTEN
        elif state & COMMITTED and all(holder.name != node_id for holder in block.holders):
            block.holders.append(Holder(node_id, "dram", "live"))
            if block.verdict is not Verdict.BEING_WRITTEN:
                block.verdict = Verdict.UNREPORTED


