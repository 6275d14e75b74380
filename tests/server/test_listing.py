"""What the node lists for clients to find by themselves, and what becomes of it where the file tier makes room."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import xxhash

from kvpool.core.segment import SegmentState
from kvpool.core.slot_table import SlotTable, table_bytes
from kvpool.model import CHECKSUM_BYTES, Namespace
from kvpool.rpc.v1 import node_pb2
from kvpool.server.dataplane import DataPlane
from kvpool.server.peers import Guard
from kvpool.tiers.dram import Segment

SPACE = Namespace(model="listed", head_groups=2)
SIZE = 8192
SLOTS = 6
KEY = bytes(range(16))
DIGEST = xxhash.xxh3_64_intdigest(bytes(SIZE)).to_bytes(CHECKSUM_BYTES, "little")


class Connection:
    """A client that hears its answers."""

    id = 1
    is_open = True

    def __init__(self) -> None:
        self.replies: list[Any] = []

    def reply(self, message: Any, payload: bytes = b"") -> None:
        assert not payload
        self.replies.append(message)


class Tier:
    """A file tier that, given the chance, fills all memory with blocks of files."""

    def __init__(self, segment: SegmentState, blocks: int) -> None:
        self._segment, self._blocks = segment, blocks
        self.state = SimpleNamespace(committed=lambda slots: None)

    def pump(self) -> None:
        """Reserve slots."""
        for number in range(self._blocks):
            self._segment.reserve(9, SPACE.digest, (0,), bytes(15) + bytes([number]), SIZE, 1)


@pytest.fixture
def plane() -> DataPlane:
    capacity = SLOTS * (SIZE + 512)
    state = SegmentState(capacity)
    segment = Segment.create(capacity, tail_bytes=table_bytes(state.capacity_bytes), lock=False)
    state.table = SlotTable(segment.view, state.capacity_bytes)
    state.register(SPACE)
    return DataPlane(segment, state, "a", 1, Guard("node", insecure=True))


def commit(plane: DataPlane, shard: int, transfer: int) -> None:
    state, conn = plane._state, Connection()
    held = state.reserve(conn.id, SPACE.digest, (shard,), KEY, SIZE, 1, transfer)
    frame = node_pb2.NodeFrame(id=1, commit=node_pb2.Commit(reservation=held.id))
    plane._commit(conn, frame, memoryview(DIGEST))  # type: ignore[arg-type]
    assert [reply.committed.stored for reply in conn.replies] == [1]


@pytest.mark.parametrize(("transfer", "listed"), [(0, 0), (7, 2)])
def test_what_a_transfer_stores_is_listed_at_once(plane: DataPlane, transfer: int, listed: int) -> None:
    """Other blocks are when somebody reads them."""
    for shard in (0, 1):
        commit(plane, shard, transfer)
    state = plane._state
    state.check()
    assert state.table is not None
    assert len(state.table.listed()) == listed


def test_what_the_tier_evicts_right_after_a_commit_is_not_listed(plane: DataPlane) -> None:
    """Or its place in the table would lead to another block's bytes, with that block's own checksums."""
    state = plane._state
    commit(plane, 0, 7)
    plane.tier = Tier(state, SLOTS)  # type: ignore[assignment]
    commit(plane, 1, 7)
    assert state.slot(SPACE.digest + KEY, 0) is state.slot(SPACE.digest + KEY, 1) is None
    assert state.table is not None
    assert state.table.listed() == {}
    state.check()


def test_what_is_evicted_is_listed_no_more(plane: DataPlane) -> None:
    """Whoever comes late with it."""
    state = plane._state
    for shard in (0, 1):
        commit(plane, shard, 0)
    slots = [state.slot(SPACE.digest + KEY, shard) for shard in (0, 1)]
    Tier(state, SLOTS).pump()
    assert state.table is not None
    state.table.add(slots)
    assert state.table.listed() == {}
