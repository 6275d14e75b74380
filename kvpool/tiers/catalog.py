"""What the master remembers across restarts: an LMDB file on local disk (never on a network filesystem).

Changes are handed over in order and written by a thread of the catalog's own, so that the master's loop never
waits for a disk. A change is kept when a transaction has been committed; nothing is synced, so the end of the
process loses nothing, the end of the machine may lose the last seconds. Trouble costs the memory of what was
not written, nothing else: the catalog says so, and is told everything again when it can write.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import numpy as np
from numpy.typing import NDArray

from kvpool.errors import ConfigError, InvalidArgumentError
from kvpool.model import (
    BACKEND_BYTES,
    DIGEST_BYTES,
    KEY_BYTES,
    SHARD_BYTES_MAX,
    SHARDS_MAX,
    Backend,
    Namespace,
    mask_shards,
)
from kvpool.tiers import lmdb_file

log = logging.getLogger(__name__)

HELD_KEYS_MAX = 1 << 20
"""Keys of changes that are kept in memory while the file cannot be written."""

RETRY_S = 1.0
READ_CHUNK = 1 << 14
CLOSE_S = 10.0

_BATCH_CHANGES = 256
_ENTRY_BYTES = 4 + KEY_BYTES
_NO_TIME = bytes(4)
_RUNS, _GENERATION = b"runs", b"generation"
_GROUP = struct.Struct(f">{BACKEND_BYTES}s{DIGEST_BYTES}sHQ")  # backend, namespace, shard, shard_bytes

# What says that the file is not ours, or broken; everything else is trouble with the disk or with rights.
_BROKEN = (
    lmdb.InvalidError,
    lmdb.CorruptedError,
    lmdb.VersionMismatchError,
    lmdb.PageNotFoundError,
    lmdb.IncompatibleError,
)


class Files(NamedTuple):
    """Files of one backend that share namespace, shards (bit mask) and size; ``keys`` has 16 bytes a block."""

    backend: bytes
    namespace: bytes
    shards: int
    shard_bytes: int
    keys: bytes


class KnownBackend(NamedTuple):
    """A backend; ``complete``: a scan of it has come to its end, once."""

    backend: Backend
    complete: bool


class KnownPin(NamedTuple):
    """An operator's pin: hard if ``until`` (unix time) is 0."""

    id: int
    label: str
    namespace: bytes
    until: float
    keys: bytes


class KnownRun(NamedTuple):
    """A master that has used the catalog: at which generation it began, on which boot, "" if it ended in order."""

    epoch: int
    generation: int
    boot: str


class FileList:
    """Files that the catalog had when it was opened."""

    def __init__(self, groups: dict[int, Files], entries: bytes, times: bytes) -> None:
        """``entries``: group number and key of each file; ``times``: when it was written (unix, big-endian).

        Raises ValueError when they have odd lengths.
        """
        if len(entries) * len(_NO_TIME) != len(times) * _ENTRY_BYTES:
            raise ValueError("a file without a key, or without a time")
        columns = np.frombuffer(entries, np.uint8).reshape(-1, _ENTRY_BYTES)
        self._keys: NDArray[np.uint8] = columns[:, 4:]
        self._numbers = columns[:, :4].copy().view(">u4").ravel()
        self._groups = groups
        self._order = np.argsort(np.frombuffer(times, ">u4"), kind="stable")

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self._order)

    def slices(self, files_max: int) -> Iterator[list[Files]]:
        """Yield everything, oldest first; within one Files the newest is first."""
        for start in range(0, len(self._order), files_max):
            part = self._order[start : start + files_max][::-1]
            numbers = self._numbers.take(part)
            found = []
            for number in np.unique(numbers).tolist():
                group = self._groups.get(number)
                if group is not None:
                    found.append(group._replace(keys=self._keys[part[numbers == number]].tobytes()))
            yield found


_Change = Callable[[lmdb.Transaction], None]


class Catalog:
    """Namespaces, backends, files, pins and nodes. Raises ConfigError naming ``data_dir`` if it cannot be opened.

    Everything public is called from one thread; what is read is what was there at the start.
    """

    def __init__(self, data_dir: str) -> None:
        self._path = Path(data_dir) / "catalog.lmdb"
        self._reading = Path(data_dir) / "catalog.lmdb.reading"  # there until all of the file was read once
        self.problem = ""  # why nothing is kept at the moment
        self.namespaces: list[Namespace] = []
        self.backends: list[KnownBackend] = []
        self.pins: list[KnownPin] = []
        self.nodes: list[str] = []
        self.runs: list[KnownRun] = []
        self.generation = 0  # how often something was kept: a file that was put back, or has lost its end, has less
        self._lost = False  # changes were given up; the writer's
        self._shut = False  # there is no environment, or one that LMDB has given up; the writer's
        self._submitted = 0
        self._done = 0
        self._queue: queue.SimpleQueue[tuple[int, _Change | None, Callable[[], None] | None]] = queue.SimpleQueue()
        self._held: list[tuple[int, _Change]] = []
        self._held_keys = 0
        self._groups: dict[int, Files] = {}
        self._numbers: dict[tuple[bytes, bytes, int], list[int]] = {}  # by backend, namespace, shard
        self._env: lmdb.Environment
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._check()
            self._open()
            self._read_small()
        except _BROKEN as exc:
            self._start_anew(exc)
        except (OSError, lmdb.Error) as exc:
            raise ConfigError("data_dir", f"cannot keep the catalog in {data_dir}: {exc}") from exc
        self._thread = threading.Thread(target=self._write_for_ever, name="catalog", daemon=True)
        self._thread.start()

    # ---- changes: handed over, in order --------------------------------------------------------

    def keep_namespace(self, namespace: Namespace) -> None:
        """Keep a descriptor."""
        text = json.dumps(namespace.as_dict()).encode()
        self._submit(1, lambda txn: _put(txn, namespace.digest, text, self._namespaces))

    def keep_backend(self, known: KnownBackend) -> None:
        """Keep what is known of a backend."""
        about = {"url": known.backend.url, "capacity_bytes": known.backend.capacity_bytes, "complete": known.complete}
        text = json.dumps(about).encode()
        self._submit(1, lambda txn: _put(txn, known.backend.id, text, self._backends))

    def keep_pin(self, pin: KnownPin) -> None:
        """Keep a pin."""
        head = json.dumps({"label": pin.label, "until": pin.until}).encode()
        value = struct.pack(">H", len(head)) + head + pin.namespace + pin.keys
        self._submit(len(pin.keys) // KEY_BYTES, lambda txn: _put(txn, struct.pack(">Q", pin.id), value, self._pins))

    def drop_pin(self, pin_id: int) -> None:
        """Forget a pin."""
        self._submit(1, lambda txn: _delete(txn, struct.pack(">Q", pin_id), self._pins))

    def keep_node(self, node_id: str) -> None:
        """Keep a node's id."""
        self._submit(1, lambda txn: _put(txn, node_id.encode()[:256], b"", self._nodes))

    def drop_node(self, node_id: str) -> None:
        """Forget a node."""
        self._submit(1, lambda txn: _delete(txn, node_id.encode()[:256], self._nodes))

    def keep_runs(self, runs: Sequence[KnownRun]) -> None:
        """Keep who has used the catalog, oldest first."""
        text = json.dumps(runs).encode()
        self._submit(1, lambda txn: _put(txn, _RUNS, text, self._runs))

    def files_added(self, files: Files) -> None:
        """Keep files that were written or found."""
        now = struct.pack(">I", int(time.time()))
        self._submit(_count(files), lambda txn: self._add(txn, files, now))

    def files_lost(self, files: Files) -> None:
        """Forget files that are not there."""
        self._submit(_count(files), lambda txn: self._drop(txn, files, self._files))

    def files_doomed(self, files: Files) -> None:
        """Remember that files are to be removed, and are to be found no more."""
        self._submit(_count(files), lambda txn: self._doom(txn, files))

    def files_removed(self, files: Files) -> None:
        """Forget doomed files."""
        self._submit(_count(files), lambda txn: self._drop(txn, files, self._doomed))

    def read_files(self, take: Callable[[FileList, FileList], None]) -> None:
        """Call ``take``, in the catalog's thread, with the files and the doomed ones that it has now."""
        self._submit(0, lambda txn: self._read_all(txn, take))

    def when_kept(self, call: Callable[[], None]) -> bool:
        """Call ``call``, in the catalog's thread, when all that was handed over is kept or given up.

        Returns False, and never calls, if that is so already.
        """
        if self._done == self._submitted:
            return False
        self._queue.put((0, None, call))
        return True

    def take_lost(self) -> bool:
        """Return whether changes were given up since the last call, and the file can be written again."""
        if self._lost and not self.problem:
            self._lost = False
            return True
        return False

    def close(self) -> None:
        """Write what was handed over, all of it to the disk, and close the file."""
        self._queue.put((0, None, None))
        self._thread.join(CLOSE_S)
        if not self._thread.is_alive():
            with contextlib.suppress(lmdb.Error):
                self._env.sync(True)
            self._env.close()

    def _submit(self, keys: int, change: _Change) -> None:
        self._submitted += 1
        self._queue.put((keys, change, None))

    # ---- the writer ----------------------------------------------------------------------------

    def _write_for_ever(self) -> None:
        going = True
        calls: list[Callable[[], None]] = []  # for when all that came before them is kept or given up
        done = 0
        while going:
            taken = 0
            try:
                item = self._queue.get(timeout=RETRY_S if self._held else None)
                while True:
                    keys, change, call = item
                    if change is not None:
                        self._held.append((keys, change))
                        self._held_keys += keys
                        taken += 1
                    elif call is not None:
                        calls.append(call)
                    else:
                        going = False
                    if taken >= _BATCH_CHANGES:
                        break
                    item = self._queue.get_nowait()
            except queue.Empty:
                pass
            self._write()
            done += taken
            if not self._held:
                self._done = done
                for call in calls:
                    call()
                calls.clear()

    def _write(self) -> None:
        """Write all that is held, in one transaction; on trouble hold it, within bounds."""
        if not self._held:
            return
        changes = [change for _, change in self._held]
        try:
            try:
                self._open_again()
                self._transact(changes)
            except _BROKEN as exc:
                self._env.close()
                self._lost = self._shut = True
                self._start_anew(exc)
                self._shut = False
                self._transact(changes)
        except Exception as exc:  # whatever it is, the thread must live: nodes wait for what it acknowledges
            self._shut = self._shut or isinstance(exc, lmdb.PanicError)
            if not self.problem:
                foreign = not isinstance(exc, (OSError, lmdb.Error, ConfigError))
                log.warning("the catalog %s cannot be written: %s", self._path, exc, exc_info=foreign)
            self.problem = f"the catalog cannot be written ({exc}): what changes now may be forgotten at a restart"
            if self._held_keys <= HELD_KEYS_MAX:
                return
            self._lost = True
        else:
            if self.problem:
                log.warning("the catalog %s is written again", self._path)
            self.problem = ""
        self._held, self._held_keys = [], 0

    def _open_again(self) -> None:
        """Open the file again after an error that ends an environment: of the disk, at the worst moment."""
        if self._shut:
            self._env.close()
            self._lost = True
            self._open()
            self._read_small()
            self._shut = False

    def _transact(self, changes: list[_Change]) -> None:
        known = dict(self._groups), {name: list(numbers) for name, numbers in self._numbers.items()}
        generation = self.generation + 1
        try:
            with self._env.begin(write=True) as txn:
                for change in changes:
                    change(txn)
                _put(txn, _GENERATION, struct.pack(">Q", generation), self._runs)
            self.generation = generation
        except Exception:
            self._groups, self._numbers = known  # those of the transaction are gone with it
            raise

    def _add(self, txn: lmdb.Transaction, files: Files, now: bytes) -> None:
        for shard in mask_shards(files.shards):
            name = (files.backend, files.namespace, shard)
            numbers = self._numbers.get(name, [])
            number = next((n for n in numbers if self._groups[n].shard_bytes == files.shard_bytes), None)
            if number is None:
                number = self._new_group(txn, files, shard)
            head = struct.pack(">I", number)
            _cursor(txn, self._files).putmulti([(head + key, now) for key in _split(files.keys)])
            for other in numbers:
                if other != number:
                    self._delete_all(txn, other, files.keys, self._files)

    def _doom(self, txn: lmdb.Transaction, files: Files) -> None:
        for shard in mask_shards(files.shards):
            for number in self._numbers.get((files.backend, files.namespace, shard), ()):
                head = struct.pack(">I", number)
                keys = [head + key for key in _split(files.keys)]
                there = [(key, b"") for key in keys if txn.delete(key, db=self._files)]
                _cursor(txn, self._doomed).putmulti(there)

    def _drop(self, txn: lmdb.Transaction, files: Files, db: Any) -> None:
        for shard in mask_shards(files.shards):
            for number in self._numbers.get((files.backend, files.namespace, shard), ()):
                self._delete_all(txn, number, files.keys, db)

    @staticmethod
    def _delete_all(txn: lmdb.Transaction, number: int, keys: bytes, db: Any) -> None:
        head = struct.pack(">I", number)
        for key in _split(keys):
            txn.delete(head + key, db=db)

    def _new_group(self, txn: lmdb.Transaction, files: Files, shard: int) -> int:
        number = max(self._groups, default=0) + 1
        value = _GROUP.pack(files.backend, files.namespace, shard, files.shard_bytes)
        _put(txn, struct.pack(">I", number), value, self._group_db)
        self._know_group(number, value)
        return number

    def _know_group(self, number: int, value: bytes) -> None:
        backend, namespace, shard, shard_bytes = _GROUP.unpack(value)
        if shard >= SHARDS_MAX or not 1 <= shard_bytes <= SHARD_BYTES_MAX:
            raise struct.error(f"a group of shard {shard} with {shard_bytes} bytes")
        self._groups[number] = Files(backend, namespace, 1 << shard, shard_bytes, b"")
        self._numbers.setdefault((backend, namespace, shard), []).append(number)

    # ---- the file ------------------------------------------------------------------------------

    def _check(self) -> None:
        """See whether who read the file last was killed by it, rather than by somebody; mark that we read it.

        Raises lmdb.CorruptedError, OSError.
        """
        why = lmdb_file.deadly(self._path) if self._reading.exists() and self._path.exists() else ""
        self._reading.touch()
        if why:
            raise lmdb.CorruptedError(why)

    def _open(self) -> None:
        self._groups, self._numbers = {}, {}
        self._env = lmdb_file.open_file(self._path)
        try:
            self._env.reader_check()  # readers that were killed
            names = (b"namespaces", b"backends", b"groups", b"files", b"doomed", b"pins", b"nodes", b"runs")
            opened = [self._env.open_db(name) for name in names]
        except lmdb.Error:
            self._env.close()
            raise
        (self._namespaces, self._backends, self._group_db, self._files,
         self._doomed, self._pins, self._nodes, self._runs) = opened  # fmt: skip

    def _start_anew(self, why: Exception) -> None:
        """Set a file that cannot be read aside, and go on with an empty one."""
        aside = self._path.with_name(f"{self._path.name}.broken-{time.time_ns()}")
        log.warning(
            "the catalog %s cannot be read (%s): it is set aside as %s, and made anew from scans of the files",
            self._path, why, aside.name,
        )  # fmt: skip
        try:
            self._path.rename(aside)
            self._path.with_name(f"{self._path.name}-lock").unlink(missing_ok=True)
            self._open()
        except (OSError, lmdb.Error) as exc:
            raise ConfigError("data_dir", f"cannot keep the catalog in {self._path.parent}: {exc}") from exc
        self.namespaces, self.backends, self.pins, self.nodes, self.runs = [], [], [], [], []

    def _read_small(self) -> None:
        try:
            # Written, so that a file whose list of free pages is broken is known to be.
            with self._env.begin(write=True) as txn:
                _put(txn, b"\0", b"", self._nodes)
                _delete(txn, b"\0", self._nodes)
                for key, value in txn.cursor(self._group_db):
                    self._know_group(struct.unpack(">I", key)[0], value)
                self.namespaces = list(_namespaces(txn.cursor(self._namespaces)))
                self.backends = list(_backends(txn.cursor(self._backends)))
                self.pins = list(_pins(txn.cursor(self._pins)))
                self.nodes = [bytes(key).decode(errors="replace") for key, _ in txn.cursor(self._nodes)]
                self.runs = list(_runs(txn.get(_RUNS, b"[]", db=self._runs)))
                (self.generation,) = struct.unpack(">Q", txn.get(_GENERATION, bytes(8), db=self._runs))
        except struct.error as exc:
            self._env.close()
            raise lmdb.CorruptedError(str(exc)) from exc
        except lmdb.Error:
            self._env.close()
            raise

    def _read_all(self, txn: lmdb.Transaction, take: Callable[[FileList, FileList], None]) -> None:
        files, doomed = self._list(txn, self._files), self._list(txn, self._doomed)
        with contextlib.suppress(OSError):  # then the next start looks once more
            self._reading.unlink()
        take(files, doomed)

    def _list(self, txn: lmdb.Transaction, db: Any) -> FileList:
        entries, times = [], []
        cursor = iter(txn.cursor(db))
        while chunk := list(islice(cursor, READ_CHUNK)):
            entries.append(b"".join([key for key, _ in chunk]))
            times.append(b"".join([value or _NO_TIME for _, value in chunk]))
        try:
            return FileList(dict(self._groups), b"".join(entries), b"".join(times))
        except ValueError as exc:
            raise lmdb.CorruptedError(str(exc)) from exc


def _put(txn: lmdb.Transaction, key: bytes, value: bytes, db: Any) -> None:
    txn.put(key, value, db=db)


def _delete(txn: lmdb.Transaction, key: bytes, db: Any) -> None:
    txn.delete(key, db=db)


def _cursor(txn: lmdb.Transaction, db: Any) -> lmdb.Cursor:
    return txn.cursor(db)


def _split(keys: bytes) -> list[bytes]:
    return [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]


def _count(files: Files) -> int:
    return len(files.keys) // KEY_BYTES


def _namespaces(records: Any) -> Iterator[Namespace]:
    for digest, text in records:
        try:
            namespace = Namespace(**json.loads(text))
        except (ValueError, TypeError, InvalidArgumentError) as exc:
            log.warning("the catalog has a namespace that cannot be read (%s): %s", bytes(digest).hex(), exc)
            continue
        if namespace.digest == bytes(digest):
            yield namespace


def _backends(records: Any) -> Iterator[KnownBackend]:
    for backend_id, text in records:
        try:
            about = json.loads(text)
            backend = Backend(bytes(backend_id), str(about["url"]), int(about["capacity_bytes"]))
            yield KnownBackend(backend, bool(about["complete"]))
        except (ValueError, TypeError, KeyError) as exc:
            log.warning("the catalog has a backend that cannot be read (%s): %s", bytes(backend_id).hex(), exc)


def _runs(text: bytes) -> Iterator[KnownRun]:
    try:
        for epoch, generation, boot in json.loads(text):
            yield KnownRun(int(epoch), int(generation), str(boot))
    except (ValueError, TypeError) as exc:
        log.warning("the catalog does not say who has used it (%s)", exc)


def _pins(records: Any) -> Iterator[KnownPin]:
    for number, value in records:
        try:
            end = 2 + struct.unpack_from(">H", value)[0]
            about = json.loads(value[2:end])
            namespace, keys = value[end : end + DIGEST_BYTES], value[end + DIGEST_BYTES :]
            if len(namespace) != DIGEST_BYTES or len(keys) % KEY_BYTES:
                raise ValueError("its keys are cut")
            yield KnownPin(struct.unpack(">Q", number)[0], str(about["label"]), namespace, float(about["until"]), keys)
        except (ValueError, TypeError, KeyError, struct.error) as exc:
            log.warning("the catalog has a pin that cannot be read (%s): %s", bytes(number).hex(), exc)
