"""Reading a backend's files for kvpoolctl: every one of them, in threads, each compared with what it says of itself."""

from __future__ import annotations

import mmap
import queue
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from kvpool.errors import KVPoolError
from kvpool.model import Namespace
from kvpool.tiers import blockfile
from kvpool.tiers.store import (
    BlockStore,
    StoreBrokenError,
    StoredFile,
    StoreError,
    StoreMissingError,
    StoreSizeError,
)

Key = bytes

FILE_BYTES_MAX = 4 << 30
"""No block is larger: what claims to be is not read into memory."""

STALLED_S = 60.0
BUFFER_BYTES = 4 << 20


class StalledError(KVPoolError):
    """The backend does not answer any more."""


class Verdict(Enum):
    """What reading a file has shown."""

    WHOLE = "whole"
    BROKEN = "broken"
    GONE = "gone"  # removed since it was listed
    UNREADABLE = "unreadable"  # the store failed: nothing is known about the file itself


class Checked(NamedTuple):
    """A file that was read. ``shard_bytes``: payload bytes of a whole one, otherwise 0."""

    file: StoredFile
    verdict: Verdict
    problem: str = ""
    shard_bytes: int = 0


@dataclass(slots=True)
class SpaceUsage:
    """Files of one namespace: ``shards`` counts them by key."""

    files: int = 0
    bytes: int = 0
    shards: Counter[Key] = field(default_factory=Counter)

    def add(self, file: StoredFile) -> None:
        """Count a file."""
        self.files += 1
        self.bytes += file.bytes
        self.shards[file.name.key] += 1

    def whole(self, shards: int) -> int:
        """Return the number of blocks that have all of ``shards``."""
        return sum(count == shards for count in self.shards.values())


def usage(files: Sequence[StoredFile]) -> dict[bytes, SpaceUsage]:
    """Return what each namespace takes, by digest."""
    spaces: dict[bytes, SpaceUsage] = {}
    for file in files:
        spaces.setdefault(file.name.namespace, SpaceUsage()).add(file)
    return spaces


class _Buffer:
    """Memory aligned to pages, as large as the largest file so far."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, BUFFER_BYTES)

    def view(self, size: int) -> memoryview:
        if size > len(self._memory):
            self._memory = mmap.mmap(-1, size)
        return memoryview(self._memory)[:size]


def _check(store: BlockStore, file: StoredFile, layers: int | None, buffer: _Buffer) -> Checked:
    """Read one file and compare it with its name; ``layers`` a shard must have, if that is known."""
    name, size = file
    if size > FILE_BYTES_MAX:
        return Checked(file, Verdict.BROKEN, f"{size} bytes are more than any block has")
    view = buffer.view(size)
    try:
        store.read_into(name, view)
        header = blockfile.parse(view)
        blockfile.verify(view, name, header.shard_bytes, layers or header.layers)
    except StoreMissingError:
        return Checked(file, Verdict.GONE)
    except (StoreBrokenError, StoreSizeError) as error:
        return Checked(file, Verdict.BROKEN, str(error).removeprefix(f"{name}: "))
    except StoreError as error:
        return Checked(file, Verdict.UNREADABLE, str(error))
    return Checked(file, Verdict.WHOLE, "", header.shard_bytes)


def check_files(
    store: BlockStore, files: Sequence[StoredFile], spaces: Mapping[bytes, Namespace], threads: int
) -> Iterator[Checked]:
    """Read every file and yield what was found, in no order. Raises StalledError.

    The threads are daemons: one that is stuck in a hung mount does not keep the program from ending.
    """
    todo: queue.SimpleQueue[StoredFile] = queue.SimpleQueue()
    done: queue.SimpleQueue[Checked | BaseException] = queue.SimpleQueue()
    for file in files:
        todo.put(file)

    def work() -> None:
        buffer = _Buffer()
        try:
            while True:
                file = todo.get_nowait()
                space = spaces.get(file.name.namespace)
                done.put(_check(store, file, space.shard_layers if space else None, buffer))
        except queue.Empty:
            return
        except BaseException as error:  # a defect: who waits for the results raises it
            done.put(error)

    for number in range(min(threads, len(files))):
        threading.Thread(target=work, name=f"verify-{number}", daemon=True).start()
    for _ in files:
        try:
            checked = done.get(timeout=STALLED_S)
        except queue.Empty:
            raise StalledError(f"{store.url} has not answered for {STALLED_S:.0f} s: is its mount alive?") from None
        if isinstance(checked, BaseException):
            raise checked
        yield checked
