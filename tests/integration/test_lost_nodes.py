"""Nodes that this host's clients lose hold of: what is left of them, here and there."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest

from kvpool import Client, client_master, client_puts
from kvpool.client_node import LocalNode
from kvpool.errors import AllPinnedError, UnavailableError
from kvpool.rpc.v1 import node_pb2, node_pb2_grpc, types_pb2
from kvpool_vllm import device_accelerator, device_pinning
from tests.integration.pool import SEGMENT, SPACE, Pool, T, chain_of, content_of, get_chain, put_chain, wait_for
from tests.integration.test_device import Driver, Rank

SIZE = 64 << 10
KEYS = chain_of(3, 8)


def memory_files() -> set[str]:
    """Return the inodes of memfds that this process has mapped or open."""
    maps = re.findall(r" (\d+) +/memfd:", Path("/proc/self/maps").read_text())
    found = {*maps}
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # another thread has closed it
            if str(path.readlink()).startswith("/memfd:"):
                found.add(str(path.stat().st_ino))
    return found


def test_memory_of_a_dead_node_is_free_though_nobody_calls(bare_pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle engine would else keep it from the next node, which then may not have enough to start."""
    monkeypatch.setattr(client_master, "REFRESH_S", 0.2)
    bare_pool.start_master()
    bare_pool.start_node("a")
    before = memory_files()
    client = bare_pool.client("a")
    put_chain(client, SPACE, KEYS, SIZE)
    assert get_chain(client, SPACE, KEYS, SIZE).prefix == len(KEYS)
    (mapped,) = memory_files() - before
    bare_pool.nodes["a"].kill()
    wait_for(lambda: mapped not in memory_files(), "the segment is unmapped")
    bare_pool.start_node("a")
    wait_for(lambda: client._own.node is not None, "the next one is attached without a call")
    put_chain(client, SPACE, KEYS, SIZE)


@pytest.mark.parametrize("unpinned", [True, False])
def test_calls_that_lose_the_node_under_way_are_misses(pool: Pool, unpinned: bool) -> None:
    """Its memory is unmapped once nobody copies; whoever comes later is told so."""
    client = pool.client("a")
    put_chain(client, SPACE, KEYS, SIZE)
    assert get_chain(client, SPACE, KEYS, SIZE).prefix == len(KEYS)
    layers = client.put_layers(SPACE, chain_of(4, 2), shard=0, shard_bytes=SIZE, transfer=1)
    node = client._own.node
    assert layers is not None
    assert node is not None
    if not unpinned:
        node._unpinned = None
    held = node.memory()
    sum_before = int(held.sum(dtype=np.uint64))
    find = node._unpinned
    node.close()
    node._unpinned, node.alive = find, True  # as for a call that began before
    assert get_chain(client, SPACE, KEYS, SIZE).tiers.get("local", 0) == 0
    node.alive = True
    assert client.put(SPACE, chain_of(5, 2), [content_of(key, SIZE) for key in chain_of(5, 2)]).stored == 0
    layers.write(0, 1, [np.zeros(SIZE // SPACE.shard_layers, np.uint8)] * 2)
    assert layers.commit().errors == {"unavailable": 2}
    assert int(held.sum(dtype=np.uint64)) == sum_before


def test_slots_that_a_put_in_a_hurry_reserved_are_freed(bare_pool: Pool) -> None:
    """The answer comes too late for it, and the node keeps them until it is told that nobody writes there."""
    bare_pool.start_master()
    bare_pool.start_node("a")
    client = bare_pool.client("a")
    put_chain(client, SPACE, KEYS, SIZE)  # a channel is open
    others = chain_of(6, 8)
    with bare_pool.nodes["a"].stopped():
        assert client.put(SPACE, others, [content_of(key, SIZE) for key in others], timeout_ms=5).stored == 0
    wait_for(client.has_node, "the node is attached again")
    bare_pool.wait_idle("a")


def test_parts_of_a_put_whose_time_is_over_are_not_begun(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They could not be written in time."""
    monkeypatch.setattr(client_puts, "PART_BLOCKS_MAX", 3)
    client: Client = pool.client("a")
    client.register(SPACE)
    put, asked = LocalNode.put, []

    def slow_put(self: LocalNode, *arguments: object) -> dict[str, int]:
        asked.append(arguments)
        counts = put(self, *arguments)  # type: ignore[arg-type]
        time.sleep(1.1)  # from here it is later than the deadline, whenever that was taken
        return counts

    monkeypatch.setattr(LocalNode, "put", slow_put)
    result = client.put(SPACE, KEYS, [content_of(key, SIZE) for key in KEYS], timeout_ms=1000)
    assert (len(asked), result.stored, result.errors) == (1, 3, {"unavailable": 5})


def test_sessions_end_in_order_when_the_master_does(bare_pool: Pool) -> None:
    """None is broken off in the middle of what it says: that would be an error without a fault."""
    bare_pool.start_master()
    hello = node_pb2.NodeMessage(hello=node_pb2.Hello(address=types_pb2.NodeAddress(node_id="x"), epoch=1))
    with bare_pool.channel() as channel:
        ended = threading.Event()

        def messages() -> Iterator[node_pb2.NodeMessage]:
            yield hello
            while not ended.wait(0.001):
                yield node_pb2.NodeMessage(heartbeat=node_pb2.Heartbeat())

        call = node_pb2_grpc.NodeSessionStub(channel).Session(messages(), timeout=T)
        try:
            assert next(call).WhichOneof("body") == "welcome"
            assert bare_pool.master.end() == 0
            for _ in call:
                pass
            assert call.code() is grpc.StatusCode.OK
        finally:
            ended.set()


def test_a_client_that_closes_keeps_no_node_that_is_being_attached(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own thread looks whether the node is there, loses it because of that, and attaches it anew."""
    before = memory_files()
    client = pool.client("a")
    node = client._own.node
    assert node is not None
    look = node.look

    def look_late() -> None:
        client.close()
        look()

    monkeypatch.setattr(node, "look", look_late)
    client._own.attach()
    wait_for(lambda: memory_files() == before, "its memory is let go of")


@pytest.mark.parametrize("direction", ["save", "load"])
def test_what_a_closed_device_may_still_use_is_nobody_elses(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    """A device that hangs is not waited for as an engine ends; it may go on at any time until the process has ended."""
    kept: list[object] = []
    monkeypatch.setattr(device_accelerator, "_unfinished", kept)
    monkeypatch.setattr(device_accelerator, "OVERDUE_S", 0.01)
    monkeypatch.setattr(device_pinning, "CLOSE_S", 0.01)
    client, driver = pool.client("a"), Driver()
    rank = Rank(client, driver)
    rank.pinned()
    keys = b"".join(KEYS[:2])
    if direction == "load":
        assert rank.save(keys, [0, 1]).stored == 2
    rank.copies.gate.clear()
    with ThreadPoolExecutor(1) as thread:
        job = thread.submit(getattr(rank, direction), keys, [2, 3])
        wait_for(lambda: rank.device.stuck, "the device counts as stuck")
        node = client._own.node
        rank.device.close()
        with pytest.raises(UnavailableError, match="closed before its copies were done"):
            job.result(T)
    assert driver.locked
    assert node is not None
    node.alive = False
    wait_for(client.has_node, "the node is attached anew, and told who writes no more")
    others = chain_of(7, SEGMENT // SIZE // 2)
    put_chain(pool.client("a"), SPACE, others, SIZE)
    for _ in range(2):
        with pytest.raises(AllPinnedError):
            pool.raw("a").reserve(SPACE, [b"whole segment!!!"], SEGMENT - 4096)
        client.close()
    before = rank.kv.bytes[2:4].copy()
    rank.copies.gate.set()
    rank.copies.close()
    assert np.array_equal(rank.kv.bytes[2:4], before if direction == "save" else rank.kv.bytes[:2])
    assert get_chain(pool.client("a"), SPACE, others, SIZE).prefix == len(others)
    assert kept
