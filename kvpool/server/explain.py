"""Explain: the index's own account in slices, and what the nodes know beyond it, asked with a deadline."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from kvpool.core.explain import Explained, explain, take_probe, to_probe
from kvpool.core.nodes import Node
from kvpool.rpc.v1 import admin_pb2

if TYPE_CHECKING:
    from kvpool.server.master import Pool

PROBE_S = 0.5
WRITTEN_SLICE = 64

ExplainedBlock = admin_pb2.ExplainedBlock


async def answer(pool: Pool, request: admin_pb2.ExplainRequest) -> admin_pb2.ExplainResponse:
    """Explain the keys asked for, each as often as it is asked. Raises InvalidArgumentError."""
    now = time.monotonic()
    steps = explain(pool.state, request.namespace, request.keys, now)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            blocks: list[Explained] = end.value
            break
        await asyncio.sleep(0)
    silent = await _probe(pool, to_probe(blocks))
    removals = pool.state.removals
    response = admin_pb2.ExplainResponse(
        memory_s=now - removals.since,
        overflowed=removals.overflowed,
        silent=silent,
    )
    for start in range(0, len(blocks), WRITTEN_SLICE):
        response.blocks.extend(_to_proto(block, now) for block in blocks[start : start + WRITTEN_SLICE])
        await asyncio.sleep(0)
    return response


async def _probe(pool: Pool, blocks: list[Explained]) -> list[str]:
    """Ask every node about these blocks, all at once; returns the nodes that did not answer in time."""
    by_namespace: dict[bytes, list[Explained]] = {}
    for block in blocks:
        by_namespace.setdefault(block.namespace, []).append(block)
    nodes = [n for n in pool.state.nodes.values() if n.state != "dead"]
    asked: dict[asyncio.Future[bytes], tuple[Node, list[Explained]]] = {}
    silent = set()
    for node in nodes if blocks else []:
        for namespace, part in by_namespace.items():
            if node.session is None:
                silent.add(node.address.node_id)
                continue
            keys = b"".join(block.key for block in part)
            asked[pool.probe(node.session, namespace, keys)] = (node, part)
    if asked:
        await asyncio.wait(asked, timeout=PROBE_S)
    for future, (node, part) in asked.items():
        if future.done():
            take_probe(part, node.address.node_id, future.result())
        else:
            silent.add(node.address.node_id)
            future.cancel()
    return sorted(silent)


def _to_proto(block: Explained, now: float) -> ExplainedBlock:
    message = ExplainedBlock(
        verdict=block.verdict.name,
        namespace=block.namespace,
        missing=block.missing,
        leases=block.leases,
        last_use_s=None if block.last_use is None else max(0.0, now - block.last_use),
        other=block.other,
    )
    for holder in block.holders:
        message.holders.add(name=holder.name, tier=holder.tier, state=holder.state, shards=holder.shards)
    for removal in block.removals:
        message.removals.add(why=removal.why.name, node=removal.node_id, age_s=max(0.0, now - removal.at))
    for difference in block.differences:
        message.differences.add(field=difference.field, here=difference.here, there=difference.there)
    return message
