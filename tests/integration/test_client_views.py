"""Slots lent to a device: what is read is pinned and checked, what is written becomes visible only by a commit."""

from __future__ import annotations

import contextlib
import os
import signal

import numpy as np
import pytest

from kvpool import Client, Namespace, client_files
from kvpool.client_node import LocalNode
from kvpool.client_views import lend_blocks, lend_slots, shared_memory
from kvpool.errors import AllPinnedError, InvalidArgumentError
from kvpool.model import KEY_BYTES
from kvpool.rpc.v1.node_pb2 import NodeFrame
from kvpool.transport.channel import Channel
from tests.integration.pool import SPACE, Pool, wait_for

LAYER_BYTES = 1000
SHARD_BYTES = LAYER_BYTES * SPACE.layers


def shards(count: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (count, SHARD_BYTES), np.uint8)


def new_keys(count: int) -> bytes:
    return os.urandom(KEY_BYTES * count)


def stored(client: Client, count: int) -> tuple[bytes, np.ndarray]:
    keys, data = new_keys(count), shards(count)
    assert client.put(SPACE, keys, list(data)).stored == count
    return keys, data


@pytest.fixture
def client(bare_pool: Pool) -> Client:
    bare_pool.start_master()
    bare_pool.start_node("a")
    return bare_pool.client("a")


def test_leading_blocks_are_lent_to_be_read(client: Client):
    """Bytes lie in the mapped segment; the run ends at the first block that is not here."""
    keys, data = stored(client, 3)
    with lend_blocks(client, SPACE, keys + new_keys(1) + keys, LAYER_BYTES) as lent:
        assert lent.memory is shared_memory(client)
        assert [bytes(slot) for slot in lent.slots] == [bytes(shard) for shard in data]
        assert lent.intact() == 3
        lent.count_loaded(3)
    assert client.stats()["get.local_blocks"] == 3
    assert client.stats()["get.local_bytes"] == 3 * SHARD_BYTES


def test_a_range_of_layers_is_lent(client: Client):
    """With the checksums of just these layers."""
    keys, data = stored(client, 2)
    with lend_blocks(client, SPACE, keys, LAYER_BYTES, layers=(1, 3)) as lent:
        assert [bytes(slot) for slot in lent.slots] == [bytes(s[LAYER_BYTES : 3 * LAYER_BYTES]) for s in data]
        assert lent.intact() == 2
    with (
        pytest.raises(InvalidArgumentError, match="layers"),
        lend_blocks(client, SPACE, keys, LAYER_BYTES, layers=(1, 5)),
    ):
        pass


def test_corrupt_bytes_end_what_is_intact(client: Client, bare_pool: Pool):
    """A byte that changed since the commit is found, unless the client was told not to verify on this host."""
    keys, _ = stored(client, 3)
    with lend_blocks(client, SPACE, keys, LAYER_BYTES) as lent:
        lent.slots[1][SHARD_BYTES - 1] ^= 1
        assert lent.intact() == 1
        with lend_blocks(bare_pool.client("a", checksum="transfer"), SPACE, keys, LAYER_BYTES) as trusting:
            assert trusting.intact() == 3


def test_blocks_of_another_size_are_not_lent(client: Client):
    """Rather than bytes that mean something else."""
    keys, _ = stored(client, 1)
    with lend_blocks(client, SPACE, keys, LAYER_BYTES - 8) as lent:
        assert not lent.slots


def test_lent_blocks_are_pinned_until_the_end(client: Client, bare_pool: Pool):
    """However much is stored meanwhile, the slot keeps its bytes; afterwards nothing is held."""
    keys, data = stored(client, 1)
    big = np.zeros(8 << 20, np.uint8)
    with lend_blocks(client, SPACE, keys, LAYER_BYTES) as lent:
        for _ in range(10):
            assert client.put(SPACE, new_keys(1), [big]).stored == 1
        assert bytes(lent.slots[0]) == bytes(data[0])
        assert lent.intact() == 1
    bare_pool.wait_idle("a")


def test_what_is_written_to_lent_slots_is_stored_by_a_commit(client: Client):
    """Blocks that exist already are not lent; the others are found by every get, with checksums that hold."""
    known, old = stored(client, 1)
    keys, data = known + new_keys(2), np.concatenate([old, shards(3)[1:]])
    with lend_slots(client, SPACE, keys, LAYER_BYTES) as lent:
        assert lent.memory is shared_memory(client)
        assert list(lent.slots) == [1, 2]
        for number, slot in lent.slots.items():
            slot[:] = data[number]
        result = lent.commit()
    assert (result.stored, result.existed, result.failed) == (2, 1, 0)
    targets = np.zeros_like(data)
    got = client.get(SPACE, keys, list(targets))
    assert (got.prefix, got.tiers) == (3, {"local": 3})
    assert np.array_equal(targets, data)
    stats = client.stats()
    assert (stats["put.stored"], stats["put.existed"], stats["put.bytes"]) == (3, 1, 3 * SHARD_BYTES)


def test_what_is_not_committed_is_freed(client: Client, bare_pool: Pool):
    """An exception in the middle leaves no reservation, and nobody sees the block."""
    keys = new_keys(2)
    with contextlib.suppress(RuntimeError), lend_slots(client, SPACE, keys, LAYER_BYTES) as lent:
        lent.slots[0][:] = 1
        raise RuntimeError
    assert client.get(SPACE, keys, list(np.zeros((2, SHARD_BYTES), np.uint8))).prefix == 0
    bare_pool.wait_idle("a")


def test_a_full_segment_says_so(client: Client):
    """As a put does."""
    huge = (48 << 20) // SPACE.layers
    with (
        lend_slots(client, SPACE, new_keys(1), huge) as first,
        lend_slots(client, SPACE, new_keys(1), huge) as second,
    ):
        assert len(first.slots) == 1
        assert not second.slots
        result = second.commit()
    assert (result.stored, result.failed) == (0, 1)
    assert result.errors == {"no_room": 1}


def test_without_a_node_nothing_is_lent(bare_pool: Pool):
    """And nothing is raised: the caller goes another way."""
    bare_pool.start_master()
    client = bare_pool.client()
    assert shared_memory(client) is None
    with lend_blocks(client, SPACE, new_keys(2), LAYER_BYTES) as blocks:
        assert (blocks.memory, blocks.slots) == (None, [])
    with lend_slots(client, SPACE, new_keys(2), LAYER_BYTES) as slots:
        assert slots.memory is None
        assert slots.commit().errors == {"unavailable": 2}


def test_a_stopped_node_lends_nothing(client: Client, bare_pool: Pool):
    """It is left after one unanswered question, and attached again when it goes on."""
    keys, _ = stored(client, 1)
    with bare_pool.nodes["a"].stopped():
        with lend_blocks(client, SPACE, keys, LAYER_BYTES) as lent:
            assert not lent.slots
        with lend_slots(client, SPACE, new_keys(1), LAYER_BYTES) as slots:
            assert slots.memory is None
    wait_for(client.has_node, "the node is attached again")
    with lend_blocks(client, SPACE, keys, LAYER_BYTES) as lent:
        assert len(lent.slots) == 1


def frames_of(monkeypatch: pytest.MonkeyPatch, kind: str) -> list[int]:
    """Return a list that grows by the number of keys of each such question to a node."""
    call, start = Channel.call, Channel.start
    seen: list[int] = []

    def note(message: NodeFrame, payload: bytes) -> None:
        if message.WhichOneof("body") == kind:
            seen.append(len(payload) // KEY_BYTES)

    def noted_call(self, message, reply_type, payload=b"", **more):
        note(message, payload)
        return call(self, message, reply_type, payload, **more)

    def noted_start(self, message, payload=b"", **more):
        note(message, payload)
        return start(self, message, payload, **more)

    monkeypatch.setattr(Channel, "call", noted_call)
    monkeypatch.setattr(Channel, "start", noted_start)
    return seen


def test_much_is_lent_in_parts(client: Client, bare_pool: Pool, monkeypatch: pytest.MonkeyPatch):
    """No question keeps the node for long, and all of them together are one loan."""
    monkeypatch.setattr(client_files, "PART_BLOCKS_MAX", 2)
    reserves, pins = frames_of(monkeypatch, "reserve"), frames_of(monkeypatch, "pin")
    keys, data = new_keys(5), shards(5)
    stored_before = keys[2 * KEY_BYTES : 3 * KEY_BYTES]
    client.put(SPACE, stored_before, [data[2]])
    reserves.clear()
    with lend_slots(client, SPACE, keys, LAYER_BYTES) as lent:
        assert list(lent.slots) == [0, 1, 3, 4]
        for number, slot in lent.slots.items():
            slot[:] = data[number]
        result = lent.commit()
    assert (result.stored, result.existed, result.failed) == (4, 1, 0)
    assert reserves == [2, 2, 1]
    with lend_blocks(client, SPACE, keys[: 3 * KEY_BYTES] + new_keys(1) + keys, LAYER_BYTES) as blocks:
        assert [bytes(slot) for slot in blocks.slots] == [bytes(shard) for shard in data[:3]]
        assert blocks.intact() == 3
    with lend_blocks(client, SPACE, keys, LAYER_BYTES) as blocks:
        assert [bytes(slot) for slot in blocks.slots] == [bytes(shard) for shard in data]
        assert blocks.intact() == 5
    assert pins == [1, 2, 2, 2, 2, 1, 2, 2]
    bare_pool.wait_idle("a")


def test_a_part_that_fails_ends_what_is_lent(client: Client, monkeypatch: pytest.MonkeyPatch):
    """What comes before it is stored all the same."""
    monkeypatch.setattr(client_files, "PART_BLOCKS_MAX", 2)
    reserve, keys, data = LocalNode._reserve, new_keys(5), shards(5)

    def full(self, channel, namespace, part, *more):
        if part != keys[: 2 * KEY_BYTES]:
            raise AllPinnedError("all is pinned")
        return reserve(self, channel, namespace, part, *more)

    monkeypatch.setattr(LocalNode, "_reserve", full)
    with lend_slots(client, SPACE, keys, LAYER_BYTES) as lent:
        for number, slot in lent.slots.items():
            slot[:] = data[number]
        result = lent.commit()
    assert (result.stored, result.failed, result.errors) == (2, 3, {"no_room": 3})


def test_a_commit_that_is_late_loses_the_node_and_its_slots_are_freed(client: Client, bare_pool: Pool):
    """It may have come in half, and the node keeps what this process may still write to, until it is told."""
    many = Namespace("many layers", layers=4096)
    with lend_slots(client, many, new_keys(64), 8) as lent:
        assert len(lent.slots) == 64
        with bare_pool.nodes["a"].stopped():
            assert lent.commit().errors == {"unavailable": 64}
        assert not client._own.node.alive
    wait_for(client.has_node, "the node is attached again")
    bare_pool.wait_idle("a")


def test_a_node_that_dies_under_a_loan(client: Client, bare_pool: Pool):
    """The bytes stay mapped for the device that reads them; ending the loan raises nothing."""
    keys, data = stored(client, 1)
    with lend_blocks(client, SPACE, keys, LAYER_BYTES) as lent, lend_slots(client, SPACE, new_keys(1), 8) as slots:
        bare_pool.nodes["a"].send(signal.SIGKILL)
        bare_pool.nodes["a"].popen.wait(30)
        assert bytes(lent.slots[0]) == bytes(data[0])
        slots.slots[0][:] = 1
        assert slots.commit().errors == {"unavailable": 1}
