"""Engines that announce themselves: between the wire's words and the core's."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kvpool.core.engines import Announcement, Engine
from kvpool.rpc.v1 import master_pb2

if TYPE_CHECKING:
    from kvpool.server.master import Pool


def announce(pool: Pool, request: master_pb2.EngineAnnouncement) -> master_pb2.AnnounceEngineResponse:
    """Take in what an engine says of itself, or that it ends. Raises InvalidArgumentError, OverloadedError."""
    engines = pool.state.engines
    if request.bye:
        engines.leave(request.owner)
    else:
        engines.announce(_announcement_from_proto(request), pool.state.uptime(time.monotonic()))
    return master_pb2.AnnounceEngineResponse(ttl_ms=round(engines.ttl_s * 1000))


def engines(pool: Pool) -> master_pb2.EnginesResponse:
    """Return every engine that has announced itself, with the blocks that the same process reports as its own."""
    state = pool.state
    up = state.uptime(time.monotonic())
    response = master_pb2.EnginesResponse()
    for engine in state.engines.engines.values():
        response.engines.add(
            engine=_announcement_to_proto(engine),
            last_seen_s=max(0.0, up - engine.last_seen),
            blocks=state.residency.blocks_of(engine.said.owner),
        )
    return response


def _announcement_from_proto(message: master_pb2.EngineAnnouncement) -> Announcement:
    return Announcement(
        owner=message.owner,
        engine=message.engine,
        role=message.role,
        address=message.address,
        model=message.model,
        namespaces=tuple(message.namespaces),
        tensor_parallel=message.tensor_parallel,
        pipeline_parallel=message.pipeline_parallel,
        data_parallel_rank=message.data_parallel_rank,
        host=message.host,
        boot_id=message.boot_id,
        devices=tuple(message.devices),
        transfers=message.transfers,
        layerwise=message.layerwise,
        loads=message.loads,
        residency=message.residency,
    )


def _announcement_to_proto(engine: Engine) -> master_pb2.EngineAnnouncement:
    said = engine.said
    return master_pb2.EngineAnnouncement(**{name: getattr(said, name) for name in said.__dataclass_fields__})
