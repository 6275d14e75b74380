"""A backend's files for kvpoolctl: every one of them read, in threads, and compared with what it says of itself.

Any call into a store may hang for ever: each is made in a daemon thread, and given up when nothing comes of it.
"""

from __future__ import annotations

import mmap
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, TypeVar

from kvpool.errors import KVPoolError
from kvpool.model import Namespace
from kvpool.tiers import blockfile
from kvpool.tiers.store import (
    BlockStore,
    FileName,
    StoreBrokenError,
    StoredFile,
    StoreError,
    StoreMissingError,
    StoreSizeError,
)
from kvpool.tiers.wrapper import StoreWrapper

T = TypeVar("T")
Key = bytes

FILE_BYTES_MAX = 4 << 30
"""No block is larger: what claims to be is not read into memory."""

STALLED_S = 60.0
"""A backend of which nothing comes for so long does not answer."""

CLEAN_S = 3600.0
"""The same of a call that looks at every directory, or reads every descriptor, before it says anything."""

REMOVE_MAX = 100
"""Files removed in one call: each may be a round trip."""

PIECE = 1000
PIECE_S = 1.0
PIECES_MAX = 8
"""What a thread lists is handed over in pieces of so many, or after this time; so many pieces may wait."""

BUFFER_BYTES = 4 << 20


class StalledError(KVPoolError):
    """The backend does not answer any more."""


@dataclass(frozen=True, slots=True)
class _Ended:
    error: BaseException | None


def streamed(url: str, items: Callable[[], Iterable[T]], stalled_s: float) -> Iterator[T]:
    """Yield what ``items()`` yields, in a thread of its own; raise whatever it raises.

    Raises StalledError when nothing comes for ``stalled_s``; the thread is then left behind.
    """
    pieces: queue.Queue[list[T] | _Ended] = queue.Queue(PIECES_MAX)
    unwanted = threading.Event()

    def give(piece: list[T] | _Ended) -> None:
        while not unwanted.is_set():
            try:
                pieces.put(piece, timeout=PIECE_S)
            except queue.Full:
                continue
            return

    def work() -> None:
        piece: list[T] = []
        given, error = time.monotonic(), None
        try:
            for item in items():
                piece.append(item)
                if len(piece) == PIECE or time.monotonic() - given > PIECE_S:
                    give(piece)
                    piece, given = [], time.monotonic()
                    if unwanted.is_set():
                        return
        except BaseException as exc:  # whoever waits for the items raises it
            error = exc
        give(piece)
        give(_Ended(error))

    threading.Thread(target=work, name="kvpoolctl-store", daemon=True).start()
    try:
        while not isinstance(piece := _next(pieces, url, stalled_s), _Ended):
            yield from piece
        if piece.error is not None:
            raise piece.error
    finally:
        unwanted.set()


def _next(pieces: queue.Queue[T], url: str, stalled_s: float) -> T:
    try:
        return pieces.get(timeout=stalled_s)
    except queue.Empty:
        raise StalledError(f"{url} has not answered for {stalled_s:.0f} s: is its mount alive?") from None


def answered(url: str, call: Callable[[], T], stalled_s: float) -> T:
    """Return what a call returns, as ``streamed`` does. Raises StalledError, and whatever the call raises."""
    (result,) = streamed(url, lambda: [call()], stalled_s)
    return result


class BoundedStore(StoreWrapper):
    """A store of which no call lasts for ever, but for those that read a file: ``check_files`` has threads for these.

    All others may raise StalledError.
    """

    def around(self, operation: str, size: int, call: Callable[[], T]) -> T:
        """Make the call in a thread of its own."""
        del size
        if operation == "read":
            return call()
        return answered(self.url, call, CLEAN_S if operation in {"clean", "namespaces"} else STALLED_S)

    def remove(self, names: Sequence[FileName]) -> None:
        """See BlockStore; many names are many calls."""
        failed: StoreError | None = None
        for at in range(0, len(names), REMOVE_MAX):
            try:
                super().remove(names[at : at + REMOVE_MAX])
            except StoreError as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def files(self, since: float = 0.0) -> Iterator[StoredFile]:
        """See BlockStore."""
        return streamed(self.url, lambda: self.store.files(since), STALLED_S)


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
    done: queue.Queue[Checked | BaseException] = queue.Queue()
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
        checked = _next(done, store.url, STALLED_S)
        if isinstance(checked, BaseException):
            raise checked
        yield checked
