"""The operators' service, without a wire: clients that go before they have their answer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from hashlib import blake2b

import pytest

from kvpool.config import MasterSettings
from kvpool.core import operators
from kvpool.core import pins as pins_module
from kvpool.core.holds import HARD
from kvpool.core.keytable import as_words
from kvpool.core.messages import BlockRun
from kvpool.model import KEY_BYTES, Namespace
from kvpool.rpc.v1 import admin_pb2
from kvpool.server.admin import AdminService
from kvpool.server.master import Pool

ONE = Namespace(model="one")
KEYS = b"".join(blake2b(number.to_bytes(8), digest_size=KEY_BYTES).digest() for number in range(50))


class Context:
    """What a servicer method wants to know of its client."""

    def peer(self) -> str:
        return "unix:"


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(pins_module, "_SLICE_BYTES", KEY_BYTES)
    pool = Pool(MasterSettings(), None)
    pool.state.announce(ONE, time.monotonic())
    return pool


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 -- the state tells nobody
            await asyncio.sleep(0)


async def cancelled(call, begun: Callable[[], bool]) -> None:
    """Go away when it has begun."""
    task = asyncio.ensure_future(call)
    await until(begun)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()


def test_pins_are_taken_and_ended_as_a_whole_when_the_client_goes(pool):
    """What has begun comes to its end: no block stays pinned for a pin that is not there."""
    admin = AdminService(pool)
    pinned = pool.state.index.holds

    async def main() -> None:
        request = admin_pb2.PinBlocksRequest(namespace=ONE.digest, keys=KEYS)
        await cancelled(admin.PinBlocks(request, Context()), lambda: bool(pinned))
        assert 0 < len(pinned) < 50
        await until(lambda: len(pinned) == 50)
        (pin,) = pool.state.pins.by_id.values()
        assert set(pinned.levels(ONE.digest, as_words(KEYS)).tolist()) == {HARD}
        request = admin_pb2.UnpinBlocksRequest(pins=[pin.id])
        await cancelled(admin.UnpinBlocks(request, Context()), lambda: len(pinned) < 50)
        assert pinned
        await until(lambda: not pinned)
        assert not pool.state.pins.by_id

    asyncio.run(main())


@pytest.mark.parametrize(("blocks", "warned"), [(95, False), (96, True)])
def test_status_warns_of_an_index_that_is_nearly_full(blocks, warned):
    """While there is time to do something about it."""
    pool = Pool(MasterSettings(max_blocks=100), None)
    pool.state.announce(ONE, time.monotonic())
    keys = b"".join(number.to_bytes(KEY_BYTES) for number in range(blocks))
    pool.state.index.add(BlockRun(ONE.digest, 1, 4096, keys), 1, "dram")
    reply = asyncio.run(AdminService(pool).Status(admin_pb2.StatusRequest(), Context()))
    assert any("--max_blocks" in warning for warning in reply.warnings) is warned


def test_files_that_wait_for_their_removal_are_listed_without_a_size(pool):
    """They are no hits any more, and not unknown either, as long as they may be there."""
    here, gone = b"b" * 16, 3 * KEY_BYTES
    pool.perform(pool.state.backends.add(BlockRun(ONE.digest, 1, 4096, KEYS, backend=here), "a"))
    lost = BlockRun(ONE.digest, 1, 4096, KEYS[:gone], backend=here)
    pool.perform(pool.state.backends.remove(lost, time.monotonic()))

    async def listed() -> list:
        request = admin_pb2.CataloguedFilesRequest(backend=here)
        return [run async for reply in AdminService(pool).CataloguedFiles(request, Context()) for run in reply.blocks]

    held, waiting = asyncio.run(listed())
    assert (held.shard_bytes, len(held.keys)) == (4096, len(KEYS) - gone)
    assert (waiting.namespace, waiting.shards, waiting.backend) == (ONE.digest, held.shards, here)
    assert (waiting.shard_bytes, waiting.keys) == (0, KEYS[:gone])


def test_others_have_their_turn_while_many_keys_are_evicted(pool, monkeypatch):
    """The loop turns between two slices of the keys that an operator names."""
    monkeypatch.setattr(operators, "ROWS_PER_SLICE", 10)
    pool.state.index.add(BlockRun(ONE.digest, 1, 4096, KEYS), 1, "dram")
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def main() -> None:
        counter = asyncio.create_task(count_turns())
        request = admin_pb2.EvictBlocksRequest(namespace=ONE.digest, keys=KEYS)
        reply = await AdminService(pool).EvictBlocks(request, Context())
        counter.cancel()
        assert (reply.blocks, reply.bytes) == (50, 50 * 4096)

    asyncio.run(main())
    assert turns >= 5


def test_namespaces_that_disagree_name_each_other(pool):
    """Those in use that differ in nothing but hashing."""
    other, third = (Namespace(model=model, hash_fingerprint="b") for model in ("one", "three"))
    for space in (other, third):
        pool.state.announce(space, time.monotonic())
    reply = asyncio.run(AdminService(pool).Namespaces(admin_pb2.NamespacesRequest(), Context()))
    found = {status.digest: list(status.disagrees_with) for status in reply.namespaces}
    assert found == {ONE.digest: [other.digest], other.digest: [ONE.digest], third.digest: []}
