"""Between the master's state and its catalog: what is kept, what is read back at the start, what has to wait."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator

from kvpool.config import boot_id
from kvpool.core.effects import (
    CatalogBackend,
    CatalogFiles,
    CatalogPin,
    Effect,
    FileChange,
    NodeChanged,
    PinEnded,
    Remember,
)
from kvpool.core.index import ROWS_PER_SLICE
from kvpool.core.master import MasterState
from kvpool.core.messages import BlockRun
from kvpool.core.nodes import FORGET_DEAD_S
from kvpool.tiers.catalog import Catalog, FileList, Files, KnownBackend, KnownPin, KnownRun

log = logging.getLogger(__name__)


KEPT_S = 5.0
"""How long an operator waits for the disk at most."""

RUNS_MAX = 64
"""Masters that the catalog remembers. Who has heard of none later has backends scanned."""


class Keeper:
    """Performs the effects that are about the catalog. Everything runs on the loop, nothing waits for a disk."""

    def __init__(self, catalog: Catalog, state: MasterState, now: float) -> None:
        """Tell ``state`` what is small at once; its files come in slices after ``load``."""
        self._catalog = catalog
        self._state = state
        self._nodes = set(catalog.nodes)
        self._started = now
        self.absent = set(catalog.nodes)
        """Nodes of an earlier master that have not been heard of yet."""
        for namespace in catalog.namespaces:
            state.register(namespace)
        self._begin(catalog, state)
        for pin in catalog.pins:
            until = now + pin.until - time.time() if pin.until else None
            state.pins.load(pin.id, pin.label, pin.namespace, until, pin.keys)
        state.backends.loading = True

    def _begin(self, catalog: Catalog, state: MasterState) -> None:
        """Take in the backends, and what can be told of how up to date the catalog is."""
        runs = catalog.runs
        cut = bool(runs) and runs[-1].boot not in {"", boot_id()}
        if cut:
            log.warning("the machine went down with the catalog in use: it may lack changes, and backends are scanned")
        for known in catalog.backends:
            if cut:
                catalog.keep_backend(KnownBackend(known.backend, complete=False))
            state.backends.load_backend(known.backend, complete=known.complete and not cut)
        ends = [*(run.generation for run in runs[1:]), catalog.generation]
        state.backends.earlier = {run.epoch: end for run, end in zip(runs, ends, strict=False)}
        state.backends.earlier[state.epoch] = math.inf
        self._runs = [*runs[1 - RUNS_MAX :], KnownRun(state.epoch, catalog.generation, boot_id())]
        catalog.keep_runs(self._runs)

    @property
    def generation(self) -> int:
        """The generation of what is kept."""
        return self._catalog.generation

    @property
    def problem(self) -> str:
        """Why nothing is kept at the moment; empty if all is well."""
        return self._catalog.problem

    def perform(self, effect: Effect) -> None:
        """Hand over what is about the catalog."""
        catalog = self._catalog
        if isinstance(effect, CatalogFiles):
            self._perform_files(effect)
        elif isinstance(effect, Remember):
            catalog.keep_namespace(effect.namespace)
        elif isinstance(effect, CatalogBackend):
            catalog.keep_backend(KnownBackend(effect.backend, effect.complete))
        elif isinstance(effect, CatalogPin):
            until = effect.until - time.monotonic() + time.time() if effect.until is not None else 0.0
            catalog.keep_pin(KnownPin(effect.id, effect.label, effect.namespace, until, effect.keys))
        elif isinstance(effect, PinEnded):
            catalog.drop_pin(effect.id)
        elif isinstance(effect, NodeChanged):
            self.absent.discard(effect.node_id)
            if effect.node_id not in self._nodes:
                self._nodes.add(effect.node_id)
                catalog.keep_node(effect.node_id)

    def _perform_files(self, effect: CatalogFiles) -> None:
        catalog = self._catalog
        changes = {
            FileChange.ADDED: (catalog.files_added,),
            FileChange.DOUBTED: (catalog.files_added, catalog.files_doomed),
            FileChange.LOST: (catalog.files_lost,),
            FileChange.DOOMED: (catalog.files_doomed,),
            FileChange.REMOVED: (catalog.files_removed,),
        }[effect.change]
        for run in effect.blocks:
            for change in changes:
                change(Files(effect.backend, run.namespace, run.shards, run.shard_bytes, run.keys))

    def after(self, call: Callable[[], None]) -> None:
        """Call when everything handed over so far is kept or given up; at once if it is."""
        loop = asyncio.get_running_loop()
        if not self._catalog.when_kept(lambda: _call(loop, call)):
            call()

    async def kept(self) -> None:
        """Wait until everything handed over so far is kept or given up, but not for ever."""
        done = asyncio.Event()
        self.after(done.set)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(done.wait(), KEPT_S)

    # ---- reading back --------------------------------------------------------------------------

    def load(self) -> None:
        """Read the files back, as long work of the state: lookups say ``warming`` until it is done."""
        loop = asyncio.get_running_loop()
        waiting = [True]

        def start(files: FileList, doomed: FileList) -> None:
            if waiting:  # a transaction that fails is tried again
                waiting.clear()
                log.info("the catalog has %d files, %d of them to be removed", len(files) + len(doomed), len(doomed))
                self._state.backends.load(_runs(files), _runs(doomed))

        self._catalog.read_files(lambda files, doomed: _call(loop, lambda: start(files, doomed)))

    def tick(self, now: float) -> list[Effect]:
        """See how the catalog fares; returns what it must be told again."""
        if now - self._started > FORGET_DEAD_S:
            for node_id in self.absent:
                self._catalog.drop_node(node_id)
                self._nodes.discard(node_id)
            self.absent = set()
        if not self._catalog.take_lost():
            return []
        log.warning("the catalog has lost something: it is told everything again, and backends are scanned")
        for node_id in self._nodes:
            self._catalog.keep_node(node_id)
        self._catalog.keep_runs(self._runs)
        return self._state.tell_catalog()

    def close(self) -> None:
        """Write what was handed over, and that this is an end in order."""
        self._catalog.keep_runs([*self._runs[:-1], self._runs[-1]._replace(boot="")])
        self._catalog.close()


def _run(files: Files) -> BlockRun:
    return BlockRun(files.namespace, files.shards, files.shard_bytes, files.keys, backend=files.backend)


def _runs(files: FileList) -> Iterator[tuple[BlockRun, ...]]:
    return (tuple(_run(piece) for piece in pieces) for pieces in files.slices(ROWS_PER_SLICE))


def _call(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> None:
    """Call on the loop; when it has ended meanwhile, nobody waits any more."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call)
