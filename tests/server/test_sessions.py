"""Nodes' sessions without a wire: what a server that ends does to them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc
import pytest

from kvpool.config import MasterSettings
from kvpool.errors import KVPoolError
from kvpool.rpc.v1 import node_pb2
from kvpool.server.master import NodeSessionService, Pool


class Context:
    """What a session wants to know of its node."""

    def peer(self) -> str:
        return "unix:"

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise grpc.aio.AbortError(code, details)


async def silent() -> AsyncIterator[node_pb2.NodeMessage]:
    await asyncio.Event().wait()
    yield node_pb2.NodeMessage()


async def stopped_while_read() -> AsyncIterator[node_pb2.NodeMessage]:
    """What grpc does to a stream that is read while its server stops."""
    raise grpc.aio.BaseError("Server already stopped")
    yield node_pb2.NodeMessage()


async def run_session(pool: Pool, messages: AsyncIterator[node_pb2.NodeMessage]) -> None:
    async with asyncio.timeout(10):
        async for _ in NodeSessionService(pool).Session(messages, Context()):
            pass


def test_sessions_end_in_order_before_the_server_does():
    """Those that are open, and one that was opened meanwhile."""

    async def main() -> None:
        pool = Pool(MasterSettings(), None)
        session = asyncio.create_task(run_session(pool, silent()))
        async with asyncio.timeout(10):
            while not pool._queues:  # noqa: ASYNC110 -- it tells nobody
                await asyncio.sleep(0)
        pool.close_sessions()
        await session
        await run_session(pool, silent())
        assert not pool._queues

    asyncio.run(main())


@pytest.mark.parametrize("closing", [True, False])
def test_a_stream_that_ends_with_its_server_is_no_defect(closing: bool, caplog: pytest.LogCaptureFixture):
    """Unless the server was not about to end: then the log says so, and the node hears of it."""
    caplog.set_level(logging.DEBUG)
    pool = Pool(MasterSettings(), None)
    if closing:
        pool.close_sessions()

    async def main() -> KVPoolError | None:
        return await NodeSessionService(pool)._read(1, stopped_while_read(), asyncio.Queue())

    error = asyncio.run(main())
    defects = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert (error is None, not defects) == (closing, closing)
