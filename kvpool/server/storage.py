"""A node's storage backends: opened as the settings say, and shown to those who collect metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from pathlib import Path
from typing import NamedTuple

from kvpool.config import NodeSettings
from kvpool.core.filetier import FileTierState
from kvpool.core.segment import SegmentState
from kvpool.errors import ConfigError, KVPoolError
from kvpool.model import directory_of, format_size
from kvpool.processes import start_thread
from kvpool.server.filehelper import Opening
from kvpool.server.filetier import PATIENCE_S_MAX, FileTier
from kvpool.server.metrics import Value
from kvpool.tiers.dram import Segment
from kvpool.tiers.measured import Measured, MeasuredStore
from kvpool.tiers.opening import open_store, public
from kvpool.tiers.store import BlockStore
from kvpool.tiers.writers import Writers

log = logging.getLogger(__name__)

OPEN_S = 10.0
"""How long a backend may take to be opened."""

REOPEN_S = 5.0
"""How often one that could not be opened is tried again."""


class Opened(NamedTuple):
    """A backend, and of a directory its marks, and what ours says; None while we have none."""

    store: MeasuredStore
    writers: Writers | None
    since: float | None


async def open_tier(settings: NodeSettings, state: SegmentState, segment: Segment, owner: str) -> FileTier | None:
    """Return the file tier that the settings ask for, None for none.

    A backend that cannot be opened is tried again, if this node has used it before or there is another one; a new
    one that cannot be is a mistake. Raises ConfigError.
    """
    if not settings.storage_backends:
        return None
    known = Known(settings.data_dir)
    opened: dict[str, Opened] = {}
    failed: dict[str, ConfigError] = {}
    for url, found in zip(
        settings.storage_backends,
        await asyncio.gather(*(_open_soon(settings, url, owner, known) for url in settings.storage_backends)),
        strict=True,
    ):
        if isinstance(found, ConfigError):
            failed[url] = found
            continue
        if any(found.store.id == other.store.id for other in opened.values()):
            raise ConfigError("storage_backends", f"{public(url)} is the same backend as another one")
        opened[url] = found
    if not opened and (new := [error for url, error in failed.items() if not known.has(url)]):
        raise new[0]
    tier = FileTierState(
        state, [], queue_bytes_max=settings.storage_queue_size,
        write_through=settings.storage_write_policy == "write_through",
    )  # fmt: skip
    files = FileTier(
        tier, segment, threads=settings.storage_threads, timeout_s=settings.storage_timeout / 1000,
        processes=settings.storage_processes,
    )  # fmt: skip
    for url, found in opened.items():
        _add(files, found, _opening(settings, url, found.store, owner))
    for url, error in failed.items():
        before = f" (it was one before: is it mounted? to begin anew, remove {known.path})" if known.has(url) else ""
        log.warning("%s%s; trying again", error.problem, before)
        files.background(_open_later(settings, url, owner, known, files))
    return files


def _add(files: FileTier, opened: Opened, opening: Opening | None) -> None:
    store = opened.store
    log.info("storage %s: backend %s of %s", store.url, store.id.hex(), format_size(store.capacity_bytes))
    files.add(store, opening, opened.writers, opened.since)


def _opening(settings: NodeSettings, url: str, store: BlockStore, owner: str) -> Opening | None:
    """Return how a process beside the node opens a directory; None for what is none."""
    if directory_of(url) is None:
        return None
    return Opening(store.url, owner, settings.storage_direct == "auto", settings.storage_fsync)


class Known:
    """The backends that this node has used, by name: what was there once and is not is away, not to be made anew.

    Names are without secrets: they are kept in a file.
    """

    def __init__(self, data_dir: str | None) -> None:
        self.path = Path(data_dir) / "backends.json" if data_dir is not None else None
        self.ids: dict[str, str] = {}
        self.writers: dict[str, Writers] = {}  # of directories, each for all attempts to open it
        if self.path is not None:
            with contextlib.suppress(OSError, ValueError, TypeError):  # nothing is remembered, as at first
                found = json.loads(self.path.read_text())
                self.ids = {public(str(url)): str(name) for url, name in dict(found).items()}

    def has(self, url: str) -> bool:
        """Whether it was used before."""
        return public(url) in self.ids

    def remember(self, url: str, store: BlockStore) -> None:
        """Note a backend that was opened."""
        name, shown = store.id.hex(), public(url)
        if self.path is None or self.ids.get(shown) == name:
            return
        if shown in self.ids:
            log.warning("%s holds another backend than before: %s instead of %s", shown, name, self.ids[shown])
        self.ids[shown] = name
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.ids, indent=1) + "\n")
            temporary.replace(self.path)
        except OSError as exc:
            log.warning("cannot remember the backends in %s: %s", self.path, exc.strerror)


async def _open_soon(settings: NodeSettings, url: str, owner: str, known: Known) -> Opened | ConfigError:
    """Open a backend within bounds; returns why it cannot be."""
    try:
        return await asyncio.wait_for(_open(settings, url, owner, known), OPEN_S)
    except TimeoutError:
        return ConfigError("storage_backends", f"{public(url)} does not answer within {OPEN_S:g} s")
    except ConfigError as exc:
        return exc


async def _open_later(settings: NodeSettings, url: str, owner: str, known: Known, files: FileTier) -> None:
    """Open a backend whenever that may be. A try that hangs does so in a mount that another one may replace."""
    patience_s = OPEN_S
    while True:
        await asyncio.sleep(REOPEN_S)
        try:
            opened = await asyncio.wait_for(_open(settings, url, owner, known), patience_s)
        except TimeoutError:
            patience_s = min(2 * patience_s, PATIENCE_S_MAX)  # each costs a thread
            continue
        except ConfigError as exc:
            log.debug("%s", exc)
            continue
        except Exception:  # whatever it is, the next try may succeed
            log.exception("storage %s cannot be opened; trying again", public(url))
            continue
        if any(opened.store.id == other.id for other in files.stores):
            log.error("%s is the same backend as another one: not used", public(url))
        else:
            _add(files, opened, _opening(settings, url, opened.store, owner))
        return


def _open(settings: NodeSettings, url: str, owner: str, known: Known) -> asyncio.Future[Opened]:
    """Open one backend in a thread that may never return."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Opened] = loop.create_future()

    def done(opened: Opened | None, error: Exception | None) -> None:
        if result.done():
            return  # nobody waits any more; its mark, if there is one, is the next attempt's
        if opened is not None:
            known.remember(url, opened.store)
            result.set_result(opened)
        else:
            result.set_exception(error or KVPoolError("cannot be opened"))

    def work() -> None:
        opened: Opened | None = None
        error: Exception | None = None
        try:
            store = open_store(
                url,
                owner=owner,
                capacity_bytes=settings.storage_capacity,
                options=settings.storage_options,
                direct=settings.storage_direct == "auto",
                fsync=settings.storage_fsync,
                create=not known.has(url),
            )
            opened = Opened(MeasuredStore(store), *_marked(url, store, owner, known))
        except Exception as exc:  # the loop's to hear, whatever it is
            error = exc
        with contextlib.suppress(RuntimeError):  # the loop is gone
            loop.call_soon_threadsafe(done, opened, error)

    if start_thread(work, "kvpool-open") is None:
        done(None, ConfigError("storage_backends", f"{public(url)}: no thread can be started to open it"))
    return result


def _marked(url: str, store: BlockStore, owner: str, known: Known) -> tuple[Writers | None, float | None]:
    """Say in a directory that we write there, before we do; objects have no marks: looking for them costs money."""
    if directory_of(url) is None:
        return None, None
    writers = known.writers.setdefault(url, Writers(store.url, owner))
    try:
        return writers, writers.keep(None)
    except OSError as exc:
        log.warning("%s: no mark can be kept: %s", store.url, exc.strerror)
        return writers, None


def storage_values(tier: FileTier) -> list[Value]:
    """Return the metrics of a node's file tier."""
    state = tier.state
    events: dict[tuple[str, ...], float] = {
        (backend.url, event): count for backend in state.backends for event, count in backend.counters.items()
    }
    events |= {("", event): count for event, count in (state.counters + state.reads.counters).items()}
    done: dict[tuple[str, ...], Measured] = {
        (store.url, name): figures
        for store in tier.stores
        if isinstance(store, MeasuredStore)
        for name, figures in store.measured().items()
        if figures.calls
    }
    kind = "backend operation"
    return [
        Value("gauge", "kvpool_storage_state", "0 up, 1 down, 2 read-only", {b.url: b.state for b in state.backends},
              "backend"),
        Value("gauge", "kvpool_storage_queue_bytes", "Bytes that wait to be written", state.queue_bytes),
        Value("gauge", "kvpool_storage_reads", "Files that are read or wait to be", len(state.reads)),
        Value("gauge", "kvpool_storage_unacknowledged", "Changes of files that the master has not acknowledged",
              len(state.changes)),
        Value("counter", "kvpool_storage_events", "What became of files", events, "backend event"),
        Value("counter", "kvpool_storage_operations", "Calls", {k: v.calls for k, v in done.items()}, kind),
        Value("counter", "kvpool_storage_errors", "Calls that failed", {k: v.errors for k, v in done.items()}, kind),
        Value("counter", "kvpool_storage_bytes", "Bytes moved", {k: v.bytes for k, v in done.items()}, kind),
        Value("counter", "kvpool_storage_seconds", "Time in calls", {k: v.seconds for k, v in done.items()}, kind),
    ]  # fmt: skip
