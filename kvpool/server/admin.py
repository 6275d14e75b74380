"""The operators' service: what kvpoolctl shows and asks for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from kvpool import __version__
from kvpool.core.agreement import groups, warnings
from kvpool.core.effects import Effect
from kvpool.core.index import Index
from kvpool.core.keytable import Rows, as_words
from kvpool.core.residency import TIER as HBM
from kvpool.errors import InvalidArgumentError
from kvpool.model import KEY_BYTES
from kvpool.rpc import convert
from kvpool.rpc.v1 import admin_pb2, admin_pb2_grpc, master_pb2
from kvpool.server import backends, explain, wire
from kvpool.server.peers import rpc, rpc_stream

if TYPE_CHECKING:
    from kvpool.server.master import Pool

T = TypeVar("T")

RESIDENTS_SLICE = 4096
ROWS_FREE_LEAST = 0.05
"""Below this share of free rows an operator is told: a little later files are dropped for want of rows."""


def _index_warnings(index: Index) -> list[str]:
    if index.rows_free >= ROWS_FREE_LEAST * index.rows_max:
        return []
    left = f"the index has room for {index.rows_free} more of at most {index.rows_max} blocks"
    return [f"{left}, and drops files before it has none: start the master with a larger --max_blocks"]


class AdminService(admin_pb2_grpc.AdminServicer):
    """Reads the state; changes it only by what operators ask for."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._changes: set[asyncio.Task[None]] = set()

    @rpc
    async def Status(self, request: admin_pb2.StatusRequest, context: Any) -> admin_pb2.StatusResponse:
        """Return one page about the pool."""
        state = self.pool.state
        now = time.monotonic()
        present = [n for n in state.nodes.values() if n.state in {"live", "warming"}]
        counters = dict(state.counters)
        counters["leases_expired"] = state.leases.expired
        counters["leases_refused"] = state.leases.refused
        counters["blocks_refused_index_full"] = state.index.refused
        settings = self.pool.settings
        return admin_pb2.StatusResponse(
            version=__version__,
            master_epoch=self.pool.epoch,
            uptime_s=now - state.started,
            blocks=len(state.index),
            leases=len(state.leases),
            leased_blocks=state.leases.blocks,
            nodes_live=len([n for n in present if n.state == "live"]),
            nodes_known=len(state.nodes),
            capacity_bytes=sum(n.capacity_bytes for n in present),
            used_bytes=sum(n.used_bytes for n in present),
            warming=state.warming,
            counters=counters,
            settings={name: str(getattr(settings, name)) for name in settings.__dataclass_fields__},
            warnings=[
                *warnings(state.index.spaces.values(), now),
                *backends.warnings(self.pool, now),
                *_index_warnings(state.index),
            ],
            removals=len(state.removals),
            removals_max=state.removals.entries_max,
            transfers=len(state.transfers.by_id),
            transfer_blocks=state.transfers.blocks,
            engines=len(state.residency.engines),
            engine_blocks=len(state.residency),
            engines_announced=len(state.engines),
            backends=backends.statuses(self.pool),
        )

    @rpc
    async def Nodes(self, request: admin_pb2.NodesRequest, context: Any) -> admin_pb2.NodesResponse:
        """Return every node."""
        state = self.pool.state
        up = state.uptime(time.monotonic())
        return admin_pb2.NodesResponse(
            nodes=[
                admin_pb2.NodeStatus(
                    address=convert.address_to_proto(node.address),
                    state=node.state,
                    capacity_bytes=node.capacity_bytes,
                    used_bytes=node.used_bytes,
                    blocks=state.index.blocks_on.get(node.incarnation or node.pending, 0),
                    last_seen_s=max(0.0, up - node.last_seen),
                    epoch=node.epoch,
                )
                for node in state.nodes.values()
            ]
        )

    @rpc
    async def Namespaces(self, request: admin_pb2.NamespacesRequest, context: Any) -> admin_pb2.NamespacesResponse:
        """Return every namespace."""
        spaces = self.pool.state.index.spaces.values()
        disagreeing = {s.number: group for group in groups(spaces, time.monotonic()) for s in group}
        return admin_pb2.NamespacesResponse(
            namespaces=[
                admin_pb2.NamespaceStatus(
                    digest=space.digest,
                    descriptor=convert.namespace_to_proto(space.descriptor),
                    blocks=len(space.table),
                    bytes=space.stored_bytes,
                    disagrees_with=[o.digest for o in disagreeing.get(space.number, ()) if o is not space],
                )
                for space in spaces
                if space.descriptor is not None
            ]
        )

    @rpc
    async def Inspect(self, request: master_pb2.LookupRequest, context: Any) -> master_pb2.LookupResponse:
        """Look up without touching or leasing."""
        request.lease = False
        answer = self.pool.state.lookup(wire.query_from_proto(request, request.hashes))
        response = wire.answer_to_proto(answer, self.pool.state.reach)
        await self._add_residents(request, response)
        return response

    async def _add_residents(self, request: master_pb2.LookupRequest, response: master_pb2.LookupResponse) -> None:
        """Say which of the blocks engines hold themselves, a slice at a time."""
        keys = as_words(request.hashes)
        namespaces = {request.namespace, *(group.namespace for group in request.groups)}
        found: dict[tuple[int, str], list[Rows]] = {}
        for start in range(0, len(keys), RESIDENTS_SLICE):
            part = keys[start : start + RESIDENTS_SLICE]
            for owner, engine, _, at in self.pool.state.residency.holders(part, namespaces):
                if len(at):
                    found.setdefault((owner, engine), []).append(at + start)
                await asyncio.sleep(0)
        for (owner, engine), parts in found.items():
            await asyncio.sleep(0)
            positions = np.concatenate(parts)
            if len(namespaces) > 1:
                positions = np.unique(positions)
            resident = response.residents.add(engine=engine, tier=HBM, owner=owner)
            for run in np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1):
                resident.ranges.add(first=int(run[0]), blocks=len(run))

    @rpc
    async def Explain(self, request: admin_pb2.ExplainRequest, context: Any) -> admin_pb2.ExplainResponse:
        """Say why blocks are not there."""
        return await explain.answer(self.pool, request)

    @rpc
    async def EvictBlocks(self, request: admin_pb2.EvictBlocksRequest, context: Any) -> admin_pb2.EvictBlocksResponse:
        """Ask the nodes to drop blocks."""
        state = self.pool.state
        if request.coldest_bytes:
            if request.namespace or request.keys:
                raise InvalidArgumentError("coldest_bytes", "goes alone, without namespace or keys")
            blocks, size, effects = await _in_slices(state.evictions.search_coldest(request.coldest_bytes))
            self.pool.perform(effects)
        elif request.keys:
            keys = request.keys
            if len(keys) % KEY_BYTES:
                raise InvalidArgumentError("keys", f"must be a multiple of {KEY_BYTES} bytes, not {len(keys)}")
            blocks, size, effects = await _in_slices(state.evictions.search_keys(request.namespace, keys))
            self.pool.perform(effects)
        elif request.namespace:
            blocks, size = state.evictions.namespace(request.namespace)
            self.pool.perform([])
        else:
            raise InvalidArgumentError("namespace", "give keys, a namespace or coldest_bytes")
        return admin_pb2.EvictBlocksResponse(blocks=blocks, bytes=size)

    # ---- storage backends ----------------------------------------------------------------------

    @rpc
    async def Backends(self, request: admin_pb2.BackendsRequest, context: Any) -> admin_pb2.BackendsResponse:
        """Return how every storage backend fares."""
        return admin_pb2.BackendsResponse(backends=backends.statuses(self.pool))

    @rpc_stream
    async def CataloguedFiles(
        self, request: admin_pb2.CataloguedFilesRequest, context: Any
    ) -> AsyncIterator[admin_pb2.CataloguedFilesResponse]:
        """Return what a backend holds."""
        async for piece in backends.files(self.pool, request.backend):
            yield piece

    @rpc
    async def CorrectCatalog(
        self, request: admin_pb2.CorrectCatalogRequest, context: Any
    ) -> admin_pb2.CorrectCatalogResponse:
        """Take in what somebody has found who looked at the files."""
        return await backends.correct(self.pool, request)

    @rpc
    async def ScanBackend(self, request: admin_pb2.ScanBackendRequest, context: Any) -> admin_pb2.ScanBackendResponse:
        """Ask a node to say what a backend holds."""
        return admin_pb2.ScanBackendResponse(node=backends.scan(self.pool, request.backend))

    # ---- pins ----------------------------------------------------------------------------------

    @rpc
    async def PinBlocks(self, request: admin_pb2.PinBlocksRequest, context: Any) -> admin_pb2.PinBlocksResponse:
        """Pin blocks, a slice at a time."""
        pin, slices = self.pool.state.pins.begin(
            request.namespace, request.keys, request.ttl_ms / 1000, request.label, time.monotonic()
        )
        await self._perform([slices])
        await self._kept()
        return admin_pb2.PinBlocksResponse(pin=pin.id, blocks=pin.present)

    @rpc
    async def UnpinBlocks(self, request: admin_pb2.UnpinBlocksRequest, context: Any) -> admin_pb2.UnpinBlocksResponse:
        """End pins."""
        if not (request.pins or request.label or request.all):
            raise InvalidArgumentError("pins", "give pins, a label or all")
        pins = self.pool.state.pins
        chosen = pins.chosen(set(request.pins), request.label, every=request.all)
        blocks = sum(len(pin) for pin in chosen)
        await self._perform(pins.end(pin) for pin in chosen)
        await self._kept()
        return admin_pb2.UnpinBlocksResponse(pins=len(chosen), blocks=blocks)

    @rpc
    async def Pins(self, request: admin_pb2.PinsRequest, context: Any) -> admin_pb2.PinsResponse:
        """Return the pins that stand."""
        pins, now = self.pool.state.pins, time.monotonic()
        response = admin_pb2.PinsResponse()
        for pin in list(pins.by_id.values()):
            present = 0
            for found in pins.present(pin):
                present += found
                await asyncio.sleep(0)
            response.pins.add(
                pin=pin.id,
                label=pin.label,
                namespace=pin.namespace,
                blocks=len(pin),
                present=present,
                left_s=max(0.001, pin.until - now) if pin.until is not None else 0.0,
            )
        return response

    async def _perform(self, works: Iterable[Iterator[list[Effect]]]) -> None:
        """Do it all, a slice at a time, whether or not the client waits: half a pin would never end."""
        task = asyncio.create_task(self._perform_all(works))
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        await asyncio.shield(task)

    async def _perform_all(self, works: Iterable[Iterator[list[Effect]]]) -> None:
        for slices in works:
            for effects in slices:
                self.pool.perform(effects)
                await asyncio.sleep(0)

    async def _kept(self) -> None:
        if self.pool.keeper is not None:
            await self.pool.keeper.kept()


async def _in_slices(work: Generator[None, None, T]) -> T:
    """Return what long work returns; others have their turn between its slices."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            found: T = end.value
            return found
        await asyncio.sleep(0)
