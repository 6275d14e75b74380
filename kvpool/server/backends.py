"""What operators ask about storage backends: how they fare, what they hold, and corrections of that."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING

import numpy as np

from kvpool.core.index import ROWS_PER_SLICE
from kvpool.core.messages import BlockRun, runs_of_files
from kvpool.core.nodes import slices_of
from kvpool.core.storage import StorageBackend, file_of
from kvpool.errors import InvalidArgumentError, UnavailableError
from kvpool.model import Backend, BackendState, mask_shards
from kvpool.rpc import convert
from kvpool.rpc.v1 import admin_pb2
from kvpool.server import wire

if TYPE_CHECKING:
    from kvpool.server.master import Pool

RUNS_MAX = 256
"""Runs in one piece of a list."""

_BEST_FIRST = (BackendState.UP, BackendState.READ_ONLY, BackendState.DOWN)


def statuses(pool: Pool) -> list[admin_pb2.BackendStatus]:
    """Return how every backend fares, by name."""
    backends = pool.state.backends
    return [_status(pool, backend) for backend in sorted(backends.by_id.values(), key=lambda b: b.name)]


def _status(pool: Pool, backend: StorageBackend) -> admin_pb2.BackendStatus:
    backends = pool.state.backends
    serving = {node.address.node_id for node in backends.serving(backend)}
    present = {n.address.node_id for n in pool.state.nodes.values() if n.state in {"live", "warming"}}
    seen = {node: how for node, how in backend.servers.items() if node in present}
    best = min(seen.values(), key=lambda how: _BEST_FIRST.index(how.state), default=None)
    reason = "no live node has it" if best is None else best.reason
    status = admin_pb2.BackendStatus(
        id=backend.id,
        url=backend.url,
        state=convert.STATES[best.state if best is not None and (serving or best.reason) else BackendState.DOWN],
        reason=reason,
        capacity_bytes=backend.capacity_bytes,
        used_bytes=backends.used_bytes(backend),
        blocks=backends.blocks(backend),
        removing_bytes=backend.removing_bytes,
        full=backend.full,
        scanning=bool(backend.scanner),
        scanned_files=backend.scanned_files,
        scan_expected=backend.scan_expected,
        complete=backend.complete,
    )
    for node, how in sorted(backend.servers.items()):
        shown = how if node in present else Backend(how.id, how.url, how.capacity_bytes, BackendState.DOWN, "node gone")
        status.servers.add(node=node, backend=convert.backend_to_proto(shown))
    return status


def _known(pool: Pool, backend_id: bytes) -> StorageBackend:
    backend = pool.state.backends.by_id.get(wire.backend_id(backend_id))
    if backend is None:
        raise InvalidArgumentError("backend", f"{backend_id.hex()} is not known to the master")
    return backend


async def files(pool: Pool, backend_id: bytes) -> AsyncIterator[admin_pb2.CataloguedFilesResponse]:
    """Yield what a backend holds, in runs of one shard, then what is to be removed. Raises InvalidArgumentError."""
    backend = _known(pool, backend_id)
    index = pool.state.index
    start = 0
    while start < index.rows_used:
        rows = np.arange(start, min(start + ROWS_PER_SLICE, index.rows_used))
        start += len(rows)
        runs = [
            BlockRun(run.namespace, 1 << shard, run.shard_bytes, run.keys, backend=backend.id)
            for run in index.runs_on(rows, backend.incarnation)
            for shard in mask_shards(run.shards)
        ]
        for at in range(0, len(runs), RUNS_MAX):
            yield admin_pb2.CataloguedFilesResponse(blocks=wire.runs_to_proto(runs[at : at + RUNS_MAX]))
        await asyncio.sleep(0)
    doomed = list(backend.doomed)
    for start in range(0, len(doomed), ROWS_PER_SLICE):
        part = runs_of_files(backend.id, map(file_of, doomed[start : start + ROWS_PER_SLICE]))
        yield admin_pb2.CataloguedFilesResponse(blocks=wire.runs_to_proto(part))
        await asyncio.sleep(0)


async def correct(pool: Pool, request: admin_pb2.CorrectCatalogRequest) -> admin_pb2.CorrectCatalogResponse:
    """Take in what somebody has found who looked at the files. Raises InvalidArgumentError."""
    backend = _known(pool, request.backend)
    state = pool.state
    for descriptor in request.namespaces:
        pool.perform(state.register(convert.namespace_from_proto(descriptor)))
    counts = [0, 0]
    for which, runs in enumerate((request.removed, request.added)):
        for piece in _pieces(wire.runs_from_proto(runs), backend):
            before = state.index.shards_on(piece, backend.incarnation)
            if which == 0:
                pool.perform(state.backends.remove(piece, time.monotonic()))
            elif state.usable(piece):
                pool.perform(state.backends.found(piece))
            counts[which] += abs(state.index.shards_on(piece, backend.incarnation) - before)
            await asyncio.sleep(0)
    return admin_pb2.CorrectCatalogResponse(removed=counts[0], added=counts[1])


def _pieces(runs: tuple[BlockRun, ...], backend: StorageBackend) -> Iterable[BlockRun]:
    for piece in slices_of(runs):
        yield BlockRun(piece.namespace, piece.shards, piece.shard_bytes, piece.keys, backend=backend.id)


def scan(pool: Pool, backend_id: bytes) -> str:
    """Ask a node to scan a backend; returns its name. Raises InvalidArgumentError, UnavailableError."""
    backend = _known(pool, backend_id)
    effects = pool.state.backends.scan(backend, pool.state.uptime(time.monotonic()))
    if not effects:
        raise UnavailableError(f"no live node serves {backend.name}")
    pool.perform(effects)
    return backend.scanner


def warnings(pool: Pool, now: float) -> list[str]:
    """Return what an operator should know about the catalog and the backends."""
    keeper, found = pool.keeper, []
    if keeper is None:
        if pool.state.backends.by_id:
            found.append("without --data_dir every start of the master scans all storage backends")
        return found
    if keeper.problem:
        found.append(keeper.problem)
    if now - pool.state.started > pool.settings.client_ttl / 1000:
        found += [f"node {name} was here before the master was restarted, and has not come back"
                  for name in sorted(keeper.absent)]  # fmt: skip
    return found
