"""Reading a whole backend to say what it holds: in a thread of its own, a piece at a time, as fast as pieces leave."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from kvpool.core.messages import BlockRun, Scanned
from kvpool.processes import start_thread
from kvpool.tiers import blockfile
from kvpool.tiers.store import (
    BlockStore,
    StoreBrokenError,
    StoredFile,
    StoreError,
    StoreMissingError,
    StoreSizeError,
)
from kvpool.tiers.wrapper import StoreWrapper, T

log = logging.getLogger(__name__)

PIECE_KEYS: Final = 8192
SEND_AGAIN_S: Final = 0.02
TRIES_MAX: Final = 8
"""Files of one length that are opened to learn how long their payload is."""


class _WatchedStore(StoreWrapper):
    """Calls ``moved`` whenever the store has done something."""

    def __init__(self, store: BlockStore, moved: Callable[[], None]) -> None:
        super().__init__(store)
        self._moved = moved

    def around(self, operation: str, size: int, call: Callable[[], T]) -> T:
        """Make the call."""
        del operation, size
        try:
            return call()
        finally:
            self._moved()

    def files(self, since: float = 0.0) -> Iterator[StoredFile]:
        """Yield what the store does."""
        for file in self.store.files(since):
            self._moved()
            yield file


class FileScan:
    """One scan, in a thread of its own; ``tell`` is called on the loop with each piece until it returns True.

    With ``since`` it is one of files written after that alone, by the storage's clock.
    """

    def __init__(
        self,
        store: BlockStore,
        loop: asyncio.AbstractEventLoop,
        tell: Callable[[FileScan, Scanned], bool],
        since: float,
        longest: int,
    ) -> None:
        """``longest``: bytes of a file that could be loaded; no other is opened."""
        self.since = since
        self.url = store.url
        self.moved = time.monotonic()
        """When it got on last."""
        self.ended = False
        self._store = _WatchedStore(store, self._get_on)
        self._loop = loop
        self._tell = tell
        self._longest = longest
        self._sent = threading.Event()
        self._stopped = False

    def stop(self) -> None:
        """End it soon; what it finds is not told."""
        self._stopped = True
        self._sent.set()

    def start(self) -> bool:
        """Begin, if a thread can be had. To be called on the loop, which is told nothing before this returns."""
        return start_thread(self._run, "kvpool-scan") is not None

    def _get_on(self) -> None:
        self.moved = time.monotonic()

    def _run(self) -> None:
        try:
            self._send_all()
        finally:
            self.ended = True

    def _send_all(self) -> None:
        """Send all pieces; the last one says when it ended early, and why."""
        files = 0
        try:
            for piece in pieces(self._store, self.since, lambda: self._stopped, self._longest):
                files = piece.files
                self._send(piece)
                if self._stopped:
                    return
        except Exception as exc:  # a thread's last resort: a scan without an end would never be asked for again
            if not isinstance(exc, StoreError):
                log.exception("the scan of %s failed", self._store.url)
            self._send(Scanned(self._store.id, True, files, error=str(exc) or repr(exc)))

    def _send(self, piece: Scanned) -> None:
        self._sent.clear()
        with contextlib.suppress(RuntimeError):  # the loop is gone
            self._loop.call_soon_threadsafe(self._post, piece)
            self._sent.wait()

    def _post(self, piece: Scanned) -> None:
        if self._stopped or self._tell(self, piece):
            self._sent.set()
        else:
            self._loop.call_later(SEND_AGAIN_S, self._post, piece)


def pieces(store: BlockStore, since: float, stopped: Callable[[], bool], longest: int) -> Iterator[Scanned]:
    """Yield what a backend holds, as far as its namespaces are known, until it is ``stopped``. Raises StoreError."""
    problem = ""
    try:
        namespaces = tuple(store.namespaces(strict=True))
    except StoreError as exc:  # what can be found is, but that is not all
        problem, namespaces = str(exc), tuple(store.namespaces())
    known = {namespace.digest for namespace in namespaces}
    yield Scanned(store.id, False, namespaces=namespaces)
    sizes = _Sizes(store, longest)
    groups: dict[tuple[bytes, int, int], list[bytes]] = {}
    files = keys = 0
    for file in store.files(since):
        if stopped():
            return
        files += 1
        shard_bytes = sizes.of(file) if file.name.namespace in known else 0
        if not shard_bytes:
            continue
        groups.setdefault((file.name.namespace, file.name.shard, shard_bytes), []).append(file.name.key)
        keys += 1
        if keys >= PIECE_KEYS:
            yield Scanned(store.id, False, files, 0, _runs(groups))
            groups, keys = {}, 0
    for file, shard_bytes in sizes.again():
        groups.setdefault((file.name.namespace, file.name.shard, shard_bytes), []).append(file.name.key)
    yield Scanned(store.id, True, files, files, _runs(groups), error=problem)


def _runs(groups: dict[tuple[bytes, int, int], list[bytes]]) -> tuple[BlockRun, ...]:
    return tuple(BlockRun(ns, 1 << shard, size, b"".join(keys)) for (ns, shard, size), keys in groups.items())


class _Sizes:
    """Payload bytes of files: their length tells it to within 512 bytes, one file of each length says it."""

    def __init__(self, store: BlockStore, longest: int) -> None:
        self._store = store
        self._longest = longest
        self._known: dict[tuple[bytes, int], int] = {}
        self._tries: dict[tuple[bytes, int], int] = {}
        self._failed: dict[tuple[bytes, int], list[StoredFile]] = {}

    def of(self, file: StoredFile) -> int:
        """Return a file's payload bytes; 0 when no file of its length could be understood.

        Raises StoreError when it is the backend that fails.
        """
        kind = (file.name.namespace, file.bytes)
        found = self._known.get(kind, 0)
        if not found and self._tries.get(kind, 0) < TRIES_MAX:
            self._tries[kind] = self._tries.get(kind, 0) + 1
            try:
                found = self._known[kind] = self._read(file)
            except StoreError:
                self._failed.setdefault(kind, []).append(file)
                if self._tries[kind] == TRIES_MAX:
                    raise
            else:
                if not found and self._tries[kind] == TRIES_MAX and kind in self._failed:
                    raise StoreError(f"{self._store.url}: no file of {file.bytes} bytes could be understood")
        return found

    def again(self) -> Iterator[tuple[StoredFile, int]]:
        """Yield those of the few files that could not be read which now can be, with their payload bytes."""
        for kind, files in self._failed.items():
            for file in files:
                try:
                    found = self._known[kind] = self._known.get(kind, 0) or self._read(file)
                except StoreError as exc:
                    log.warning("left out: %s", exc)
                    continue
                if found:
                    yield file, found

    def _read(self, file: StoredFile) -> int:
        if not 0 < file.bytes <= self._longest:
            return 0
        try:
            extent = memoryview(mmap.mmap(-1, file.bytes))  # unlike a bytearray's, nobody has to clear its bytes
            self._store.read_into(file.name, extent)
            return blockfile.parse(extent).shard_bytes
        except (StoreMissingError, StoreBrokenError, StoreSizeError, OSError, MemoryError):
            return 0
