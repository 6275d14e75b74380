"""What must hold of a master between any two calls, and what it must agree on with its nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from kvpool.core.index import Index, Space
from kvpool.core.keytable import Rows
from kvpool.core.master import MasterState
from kvpool.core.placement import NOWHERE
from kvpool.core.segment import SegmentState
from kvpool.core.slots import file_bytes
from kvpool.model import mask_shards

Held = dict[tuple[bytes, bytes], dict[str, int]]
"""(namespace, key) -> node id -> mask of shards."""


def check_index(index: Index) -> None:
    """Raise AssertionError unless every account, order and row of the index agrees with its placements."""
    used = index.rows_used
    in_use = np.zeros(used, bool)
    blocks_on: Counter[int] = Counter()
    in_files: Counter[int] = Counter()
    for space in index.spaces.values():
        rows = _rows(index, space)
        in_use[rows] = True
        assert len(space.table) == len(rows), "a namespace's table has its rows"
        assert (space.table.find(index.keys[rows]) == rows).all(), "every row is found by its key"
        held = index.holds.levels(space.digest, index.keys[rows])
        assert (index.pinned[rows] == held).all(), "a row knows how its key is held"
        stored = 0
        for row in rows.tolist():
            owners = index.placements[int(index.placement[row])].owners
            assert owners, "a block lies somewhere"
            stored += sum(owner.shards.bit_count() for owner in owners) * int(index.shard_bytes[row])
            blocks_on.update({owner.incarnation for owner in owners})
            for owner in owners:
                size = file_bytes(int(index.shard_bytes[row]), index._layers(space))
                in_files[owner.incarnation] += owner.shards.bit_count() * size * (owner.incarnation in index.file_bytes)
        assert space.stored_bytes == stored, "stored bytes are counted"
    assert {i: n for i, n in index.blocks_on.items() if n} == dict(blocks_on), "a node's blocks are counted"
    assert all(size == in_files[i] for i, size in index.file_bytes.items()), "bytes of files are counted"
    assert (index.placement[:used][~in_use] == NOWHERE).all(), "what is not stored lies nowhere"
    free = index._free[: index._free_count]
    assert len(set(free.tolist())) == len(free), "a row is free once"
    assert sorted(free.tolist()) == np.flatnonzero(~in_use & (index.leased[:used] == 0)).tolist(), "no row is lost"
    order: list[int] = []
    position = 0
    while (piece := index.recency.after(position)) is not None:
        order += piece[0].tolist()
        position = piece[1]
    assert sorted(order) == np.flatnonzero(in_use).tolist(), "the order has every block once"
    _check_placements(index)


def _rows(index: Index, space: Space) -> Rows:
    return np.flatnonzero(index.space_of[: index.rows_used] == space.number)


def _check_placements(index: Index) -> None:
    table = index.placements
    for number in np.unique(index.placement[: index.rows_used]).tolist():
        full, owners = table[number]
        everywhere = live = 0
        for owner in owners:
            everywhere |= owner.shards
            live |= owner.shards if table.is_live(owner.incarnation) else 0
            assert table.held_by(owner.incarnation)[number], "a holder is known as one"
        assert table.whole[number] == (full != 0 and live == full), "whole: all shards at live nodes"
        assert table.complete[number] == (full != 0 and everywhere == full), "complete: all shards somewhere"


def check_master(state: MasterState) -> None:
    """Raise AssertionError unless the index and the leases agree with themselves and with each other."""
    index = state.index
    check_index(index)
    for backend in state.backends.by_id.values():
        assert backend.removing_bytes == sum(size for _, size in backend.doomed.values()), "bytes to be removed"
    leased = np.zeros(index.rows_used, np.int64)
    for rows, _ in state.leases._leases.values():
        assert len(np.unique(rows)) == len(rows), "a lease names a row once"
        leased[rows] += 1
    assert (index.leased[: index.rows_used] == leased).all(), "leases are counted by row"
    assert state.leases.blocks == leased.sum(), "leased blocks are counted"


def held_by_index(state: MasterState) -> Held:
    """Return what the master believes its nodes hold."""
    index = state.index
    held: Held = {}
    for space in index.spaces.values():
        for row in _rows(index, space).tolist():
            at: dict[str, int] = {}
            for owner in index.placements[int(index.placement[row])].owners:
                if state.backends.at(owner.incarnation) is not None:
                    continue
                node = state.node_of(owner.incarnation)
                name = node.address.node_id if node is not None else f"incarnation {owner.incarnation}"
                at[name] = at.get(name, 0) | owner.shards
            if at:  # or it is in files alone
                held[space.digest, index.keys[row].tobytes()] = at
    return held


def held_by_nodes(segments: Iterable[tuple[str, SegmentState]]) -> Held:
    """Return what these nodes really hold."""
    held: Held = {}
    for node_id, segment in segments:
        for run in segment.snapshot():
            for at in range(0, len(run.keys), 16):
                nodes = held.setdefault((run.namespace, run.keys[at : at + 16]), {})
                nodes[node_id] = nodes.get(node_id, 0) | run.shards
    return held


def differences(believed: Held, real: Held) -> list[str]:
    """Return, for people, where the master's belief and the nodes' blocks differ."""
    return [
        f"block {key.hex()[:8]} of {namespace.hex()[:8]}: index has {_shards(believed.get((namespace, key)))}, "
        f"nodes have {_shards(real.get((namespace, key)))}"
        for namespace, key in sorted(believed.keys() | real.keys())
        if believed.get((namespace, key)) != real.get((namespace, key))
    ]


def _shards(at: dict[str, int] | None) -> str:
    return ", ".join(f"{name}:{mask_shards(mask)}" for name, mask in sorted((at or {}).items())) or "nothing"
