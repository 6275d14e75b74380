"""An accelerator's blocks to and from a real node: straight where its memory is page-locked, else through a buffer.

The accelerator's memory is an array and its copy engine a thread that can be held up: what it copies, when,
and from where is the connector's own doing.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from kvpool import Client, client_master
from kvpool.client_views import lend_blocks
from kvpool.model import KEY_BYTES
from kvpool_vllm import device_accelerator
from kvpool_vllm.device import Way
from kvpool_vllm.device_accelerator import Accelerator
from kvpool_vllm.device_pinning import Pinning
from kvpool_vllm.metadata import Part
from tests.integration.pool import SEGMENT, SPACE, Pool, wait_for

LAYER_BYTES = 4096
BLOCK_BYTES = LAYER_BYTES * SPACE.layers
WAIT_S = 30.0


class Blocks:
    """Sixty-four blocks out of the host's reach."""

    layer_block_bytes = LAYER_BYTES

    def __init__(self) -> None:
        self.bytes = np.random.default_rng(5).integers(0, 256, (64, SPACE.layers, LAYER_BYTES), np.uint8)

    def __len__(self) -> int:
        return SPACE.layers


class Under:
    """Copies that were handed over."""

    def __init__(self, done: Any) -> None:
        self.done = done

    def wait(self, timeout_s: float) -> bool:
        try:
            self.done.result(timeout_s)
        except TimeoutError:
            return False
        return True


class CopyEngine:
    """One thread that copies in order, while the gate is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.fences = 0
        self.after: list[Any] = []
        self.pieces: list[int] = []
        self._thread = ThreadPoolExecutor(1)

    def fence(self) -> int:
        self.fences += 1
        return self.fences

    def host_buffer(self, size: int) -> np.ndarray:
        return np.zeros(size, np.uint8)

    def load(self, kv: Blocks, block_ids, sources, *, layers=None, after=None) -> Under:
        return self._hand_over(kv, block_ids, sources, layers, after, inwards=True)

    def store(self, kv: Blocks, block_ids, targets, *, after=None) -> Under:
        return self._hand_over(kv, block_ids, targets, None, after, inwards=False)

    def _hand_over(self, kv: Blocks, block_ids, runs, layers, after, *, inwards: bool) -> Under:
        assert len(block_ids) == len(runs)
        self.after.append(after)
        self.pieces += [len(pieces) for pieces in runs]
        first, end = layers or (0, SPACE.layers)

        def copy() -> None:
            assert self.gate.wait(WAIT_S)
            for block, pieces in zip(block_ids, runs, strict=True):
                flat = kv.bytes[block, first:end].reshape(-1)
                at = 0
                for piece in pieces:
                    if inwards:
                        flat[at : at + len(piece)] = piece
                    else:
                        piece[:] = flat[at : at + len(piece)]
                    at += len(piece)
                assert at == len(flat)

        return Under(self._thread.submit(copy))

    def close(self) -> None:
        self._thread.shutdown()


class Driver:
    """Page-locks anything, once its gate is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.locked: set[int] = set()

    def register(self, address: int, size: int) -> str:
        assert self.gate.wait(WAIT_S)
        self.locked.add(address)
        return ""

    def unregister(self, address: int) -> None:
        self.locked.remove(address)


class Rank:
    """A worker's memory, its device, its client."""

    def __init__(self, client: Client, driver: Driver | None, chunk_bytes: int = SEGMENT) -> None:
        self.client = client
        self.kv = Blocks()
        self.copies = CopyEngine()
        self.driver = driver
        self.pinning = Pinning(driver, chunk_bytes=chunk_bytes)
        self.device = Accelerator(self.copies, self.pinning, BLOCK_BYTES, half_bytes=3 * BLOCK_BYTES)

    def pinned(self) -> None:
        """Have the node's memory page-locked."""
        from kvpool.client_views import shared_memory

        segment = self.pinning.segment(shared_memory(self.client))
        assert segment is not None
        assert segment.wait(WAIT_S)

    def save(self, keys: bytes, block_ids: list[int], **more: Any) -> Any:
        return self.device.save(self.client, Part(SPACE, keys, block_ids), self.kv, **more)

    def load(self, keys: bytes, block_ids: list[int], **more: Any) -> Any:
        return self.device.load(self.client, Part(SPACE, keys, block_ids), self.kv, **more)

    def close(self) -> None:
        self.device.close()
        self.copies.close()


def new_keys(count: int) -> bytes:
    return os.urandom(KEY_BYTES * count)


@pytest.fixture
def client(bare_pool: Pool) -> Client:
    bare_pool.start_master()
    bare_pool.start_node("a")
    return bare_pool.client("a")


@pytest.fixture(params=["direct", "buffered"])
def rank(client: Client, request: pytest.FixtureRequest):
    rank = Rank(client, Driver() if request.param == "direct" else None, chunk_bytes=24 * 1024)
    if request.param == "direct":
        rank.pinned()
    rank.way = request.param
    yield rank
    rank.close()


def test_blocks_are_saved_and_loaded(rank: Rank, bare_pool: Pool):
    """Bytes are the blocks' own on either way, in the node's one format, and nothing stays pinned or reserved."""
    keys, ids = new_keys(8), [3, 1, 4, 15, 9, 2, 6, 5]
    saved = rank.kv.bytes[ids].copy()
    result = rank.save(keys, ids)
    assert (result.stored, result.existed, result.failed) == (8, 0, 0)
    target = np.zeros((8, BLOCK_BYTES), np.uint8)
    assert rank.client.get(SPACE, keys, list(target)).prefix == 8
    assert np.array_equal(target.reshape(saved.shape), saved)
    rest = rank.kv.bytes[30:].copy()
    rank.kv.bytes[20:28] = 0
    result = rank.load(keys, list(range(20, 28)))
    assert (result.prefix, result.ok, result.tiers) == (8, [True] * 8, {"local": 8})
    assert np.array_equal(rank.kv.bytes[20:28], saved)
    assert np.array_equal(rank.kv.bytes[30:], rest)
    assert +rank.device.counters == {f"save.{rank.way}": 8, f"load.{rank.way}": 8}
    if rank.way == "direct":
        assert max(rank.copies.pieces) > 1  # some block lies across two chunks
    bare_pool.wait_idle("a")


def test_a_load_ends_where_the_pool_does(rank: Rank):
    """Blocks behind the gap keep what they have."""
    keys = new_keys(5)
    assert rank.save(keys, [0, 1, 2, 3, 4]).stored == 5
    wanted = keys[: 4 * KEY_BYTES] + new_keys(1) + keys[4 * KEY_BYTES :]
    before = rank.kv.bytes[14:16].copy()
    result = rank.load(wanted, [10, 11, 12, 13, 14, 15])
    assert (result.prefix, sum(result.ok)) == (4, 4)
    assert result.reasons
    assert np.array_equal(rank.kv.bytes[10:14], rank.kv.bytes[0:4])
    assert np.array_equal(rank.kv.bytes[14:16], before)


def test_blocks_are_received_as_they_are_stored(rank: Rank, bare_pool: Pool):
    """Through the buffer, half after half, each waited for while somebody may yet store it."""
    keys, ids = new_keys(8), [3, 1, 4, 15, 9, 2, 6, 5]
    saved = rank.kv.bytes[ids].copy()
    here = rank.client.own_node
    assert here is not None
    asked = threading.Event()

    def alive() -> bool:
        asked.set()
        return True

    def receive(wanted: bytes, block_ids: list[int], way: Way) -> Any:
        return rank.device.receive(rank.client, Part(SPACE, wanted, block_ids), rank.kv, way, timeout_ms=1e3 * WAIT_S)

    with ThreadPoolExecutor(1) as threads:
        receiving = threads.submit(receive, keys, list(range(20, 28)), Way(7, here, alive))
        assert asked.wait(WAIT_S)
        assert rank.save(keys, ids, transfer=7).stored == 8
        result = receiving.result(WAIT_S)
    assert (result.prefix, result.ok, result.tiers) == (8, [True] * 8, {"local": 8})
    assert np.array_equal(rank.kv.bytes[20:28], saved)
    gone = receive(keys[: 4 * KEY_BYTES] + new_keys(2), list(range(30, 36)), Way(7, here, lambda: False))
    assert (gone.prefix, gone.reasons) == (4, {"not_here": 2})
    assert np.array_equal(rank.kv.bytes[30:34], saved[:4])
    bare_pool.wait_idle("a")


def test_layers_are_loaded_alone(rank: Rank):
    """The others keep what they have."""
    keys = new_keys(4)
    rank.save(keys, [0, 1, 2, 3])
    rank.kv.bytes[10:14] = 0
    assert rank.load(keys, [10, 11, 12, 13], layers=(1, 3)).prefix == 4
    assert np.array_equal(rank.kv.bytes[10:14, 1:3], rank.kv.bytes[0:4, 1:3])
    assert not rank.kv.bytes[10:14, [0, 3]].any()


def test_what_exists_is_not_written_again(rank: Rank):
    """It is counted as such."""
    keys = new_keys(3)
    rank.save(keys[:KEY_BYTES], [0])
    result = rank.save(keys, [0, 1, 2])
    assert (result.stored, result.existed, result.failed) == (2, 1, 0)


def test_every_copy_waits_for_the_engine(rank: Rank):
    """The fence of the engine's thread goes with all copies of the job."""
    keys = new_keys(8)
    fence = rank.device.fence()
    rank.save(keys, list(range(8)), after=fence)
    rank.load(keys, list(range(8)), after=fence)
    assert set(rank.copies.after) == {fence}


def test_corrupt_bytes_are_a_miss(rank: Rank):
    """The block, and what is behind it, is reported as not there."""
    keys = new_keys(3)
    rank.save(keys, [0, 1, 2])
    with lend_blocks(rank.client, SPACE, keys, LAYER_BYTES) as lent:
        lent.slots[1][0] ^= 1
    result = rank.load(keys, [10, 11, 12])
    assert result.prefix == 1
    assert result.reasons["corrupt"] == 1


def test_a_buffer_serves_until_the_memory_is_page_locked(client: Client):
    """Nobody waits for the driver; from then on bytes go straight."""
    driver = Driver()
    driver.gate.clear()
    rank = Rank(client, driver)
    keys = new_keys(4)
    assert rank.save(keys[: 2 * KEY_BYTES], [0, 1]).stored == 2
    driver.gate.set()
    rank.pinned()
    assert rank.save(keys[2 * KEY_BYTES :], [2, 3]).stored == 2
    assert rank.load(keys, [10, 11, 12, 13]).prefix == 4
    assert +rank.device.counters == {"save.buffered": 2, "save.direct": 2, "load.direct": 4}
    assert np.array_equal(rank.kv.bytes[10:14], rank.kv.bytes[0:4])
    rank.close()
    assert not driver.locked


def test_blocks_of_another_host_follow_the_local_ones(pool: Pool):
    """One load, two ways: leading blocks straight out of this host's node, the rest from its owner by a buffer."""
    keys = new_keys(9)
    here, there = Rank(pool.client("a"), Driver()), Rank(pool.client("b"), None)
    here.pinned()
    there.kv = here.kv
    assert here.save(keys[: 4 * KEY_BYTES], [0, 1, 2, 3]).stored == 4
    assert there.save(keys[4 * KEY_BYTES :], [4, 5, 6, 7, 8]).stored == 5
    wait_for(lambda: here.client.lookup(SPACE, keys).prefix == 9, "the master knows all blocks")
    part = Part(SPACE, keys, list(range(20, 29)), here.client.lookup(SPACE, keys, timeout_ms=1000 * WAIT_S))
    result = here.device.load(here.client, part, here.kv)
    assert (result.prefix, result.tiers) == (9, {"local": 4, "remote": 5})
    assert np.array_equal(here.kv.bytes[20:29], here.kv.bytes[0:9])
    here.close()
    there.close()


def test_without_a_node_saves_go_to_another_host(bare_pool: Pool):
    """Through a buffer, as there is nothing to page-lock."""
    bare_pool.start_master()
    bare_pool.start_node("a")
    rank = Rank(bare_pool.client(), Driver())
    keys = new_keys(4)
    assert rank.save(keys, [0, 1, 2, 3]).stored == 4
    wait_for(lambda: rank.client.lookup(SPACE, keys).prefix == 4, "the master knows all blocks")
    assert rank.load(keys, [10, 11, 12, 13]).tiers == {"remote": 4}
    assert np.array_equal(rank.kv.bytes[10:14], rank.kv.bytes[0:4])
    rank.close()


def test_nothing_is_let_go_of_before_the_device_is_done(rank: Rank, monkeypatch: pytest.MonkeyPatch):
    """A device that hangs keeps its job, whatever is pinned for it, and gets no other until it goes on."""
    monkeypatch.setattr(device_accelerator, "OVERDUE_S", 0.01)
    keys = new_keys(2)
    rank.save(keys, [0, 1])
    rank.copies.gate.clear()
    with ThreadPoolExecutor(1) as thread:
        load = thread.submit(rank.load, keys, [10, 11])
        wait_for(lambda: rank.device.stuck, "the device counts as stuck")
        assert rank.load(keys, [12, 13]).reasons == {"device_stuck": 2}
        assert rank.save(new_keys(1), [0]).errors == {"device_stuck": 1}
        assert not load.done()
        rank.copies.gate.set()
        assert load.result(WAIT_S).prefix == 2
    assert rank.load(keys, [12, 13]).prefix == 2


def test_closing_ends_the_wait_for_a_device_that_hangs(rank: Rank, monkeypatch: pytest.MonkeyPatch):
    """The job fails; the process can end."""
    monkeypatch.setattr(device_accelerator, "OVERDUE_S", 0.01)
    monkeypatch.setattr("kvpool_vllm.device_pinning.CLOSE_S", 0.01)
    keys = new_keys(1)
    rank.save(keys, [0])
    rank.copies.gate.clear()
    with ThreadPoolExecutor(1) as thread:
        load = thread.submit(rank.load, keys, [10])
        wait_for(lambda: rank.device.stuck, "the device counts as stuck")
        rank.device.close()
        with pytest.raises(Exception, match="closed"):
            load.result(WAIT_S)
        rank.copies.gate.set()


def test_an_idle_engine_lets_go_of_a_node_that_dies(
    client: Client, bare_pool: Pool, monkeypatch: pytest.MonkeyPatch
):
    """Its memory is page-locked no longer, though no job looks for it."""
    monkeypatch.setattr(client_master, "REFRESH_S", 0.1)
    client._link._wake.set()
    rank = Rank(client, Driver())
    rank.pinned()
    assert rank.save(new_keys(1), [0]).stored == 1
    segment = rank.pinning.segment(client._own.node._memory)
    bare_pool.nodes["a"].kill()
    wait_for(lambda: not rank.driver.locked and segment.memory is None, "the memory is let go of")
    rank.close()


def test_the_node_goes_and_comes_back(rank: Rank, bare_pool: Pool):
    """Its death is a miss; the new one's memory is page-locked anew."""
    keys = new_keys(2)
    rank.save(keys, [0, 1])
    bare_pool.nodes["a"].kill()
    assert rank.load(keys, [10, 11]).prefix == 0
    bare_pool.start_node("a")
    wait_for(rank.client.has_node, "the new node is attached")
    if rank.way == "direct":
        rank.pinned()
    assert rank.save(keys, [0, 1]).stored == 2
    assert rank.load(keys, [10, 11]).prefix == 2
    assert rank.device.counters[f"load.{rank.way}"] == 2
