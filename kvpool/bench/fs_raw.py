"""Files without a pool: large ones as dd writes and reads them, one for each block, and many blocks in one.

Everything here moves bytes between files and memory that was touched before, in as many threads as the pool
has for it, and nothing else: no checksums, no index, no copies that the way of reading does not need.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kvpool.bench.limits import Walk
from kvpool.client_bytes import view
from kvpool.tiers import posix_io

PACK_BYTES = 256 << 20
"""Size of a file that holds many blocks."""

READ_ONCE = os.O_RDONLY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Mode:
    """How files are read and written: past the page cache where ``direct``, in so many threads."""

    direct: bool
    threads: int

    @property
    def flag(self) -> int:
        """What open takes."""
        return os.O_DIRECT if self.direct else 0


def can_be_direct(directory: Path) -> bool:
    """Return whether O_DIRECT works for files here."""
    path = directory / "direct"
    path.write_bytes(bytes(4096))
    try:
        return bool(posix_io.direct_unit(str(path)))
    finally:
        path.unlink()


def page_buffer(size: int) -> memoryview:
    """Return memory that O_DIRECT takes, touched; its content does not compress."""
    memory = mmap.mmap(-1, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
    memory[:] = os.urandom(len(memory))
    return memoryview(memory)[:size]


def forget(path: Path | str) -> None:
    """Write a file out and drop it from the page cache, as far as the kernel lets us."""
    fd = os.open(path, READ_ONCE)
    try:
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def forget_all(directory: Path) -> None:
    """Do so with every file below a directory."""
    for parent, _, files in os.walk(directory):
        for file in files:
            forget(os.path.join(parent, file))  # noqa: PTH118 - of a million files


def in_threads(threads: int, work: Callable[[int], None]) -> float:
    """Run ``work`` with each number below ``threads`` at once; returns seconds. Raises what it raises."""
    failed: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:  # who waits for the threads raises it
            failed.append(error)

    workers = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failed:
        raise failed[0]
    return time.perf_counter() - start


def _move(function: Callable[[int, memoryview, int], int], fd: int, view: memoryview, offset: int) -> None:
    if function(fd, view, offset) != len(view):
        raise OSError("a short read or write")


def _read(fd: int, view: memoryview, offset: int) -> int:
    return os.preadv(fd, [view], offset)


class LargeFiles:
    """One file for each thread, written and read from its beginning to its end, ``chunk`` bytes a call."""

    def __init__(self, directory: Path, size: int, chunk: int, mode: Mode) -> None:
        self._paths = [directory / f"raw-{number}" for number in range(mode.threads)]
        self._chunks = size // chunk // mode.threads
        self._buffers = [page_buffer(chunk) for _ in self._paths]
        self._mode = mode
        self.bytes = self._chunks * chunk * mode.threads

    def write(self) -> float:
        """Write new files; returns seconds."""
        self.remove()
        return in_threads(self._mode.threads, lambda n: self._walk(n, os.pwrite, os.O_WRONLY | os.O_CREAT | os.O_EXCL))

    def read(self) -> float:
        """Read them; returns seconds."""
        if not self._mode.direct:
            for path in self._paths:
                forget(path)
        return in_threads(self._mode.threads, lambda n: self._walk(n, _read, os.O_RDONLY))

    def _walk(self, number: int, function: Callable[[int, memoryview, int], int], flags: int) -> None:
        view = self._buffers[number]
        fd = os.open(self._paths[number], flags | os.O_CLOEXEC | self._mode.flag, 0o600)
        try:
            for chunk in range(self._chunks):
                _move(function, fd, view, chunk * len(view))
        finally:
            os.close(fd)

    def remove(self) -> None:
        """Give the space back."""
        for path in self._paths:
            path.unlink(missing_ok=True)


def write_files(paths: Sequence[Path], walk: Walk, mode: Mode) -> float:
    """Write new files of a walk's blocks, each by one call; returns seconds."""

    def work(first: int) -> None:
        for path in paths[first :: mode.threads]:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | mode.flag, 0o600)
            try:
                _move(os.pwrite, fd, view(walk.next()), 0)
            finally:
                os.close(fd)

    return in_threads(mode.threads, work)


def read_files(paths: Sequence[Path], walk: Walk, mode: Mode) -> float:
    """Read whole files into a walk's blocks, each by one call; returns seconds."""

    def work(first: int) -> None:
        for path in paths[first :: mode.threads]:
            fd = os.open(path, READ_ONCE | mode.flag)
            try:
                _move(_read, fd, view(walk.next()), 0)
            finally:
                os.close(fd)

    return in_threads(mode.threads, work)


class Design(Protocol):
    """A way to keep blocks in files: block ``number`` is read into memory, or written from it."""

    def write(self, number: int, view: memoryview) -> None:
        """Store a block."""

    def read(self, number: int, view: memoryview) -> None:
        """Load a block."""

    def forget(self) -> None:
        """Make the next reads cold."""


class FilePerBlock:
    """As UCM keeps blocks: a buffered file each, fanned out by three digits, temporary name and rename, no checksum."""

    def __init__(self, directory: Path, keys: Sequence[str]) -> None:
        self._directory = directory
        self._paths = [f"{directory}/{key[:3]}/{key}" for key in keys]

    def write(self, number: int, view: memoryview) -> None:
        """Write a file and rename it."""
        path = self._paths[number]
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120 - of a million files
        fd = os.open(path + ".tmp", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _move(os.pwrite, fd, view, 0)
        finally:
            os.close(fd)
        os.rename(path + ".tmp", path)  # noqa: PTH104

    def read(self, number: int, view: memoryview) -> None:
        """Read a file."""
        fd = os.open(self._paths[number], READ_ONCE)
        try:
            _move(_read, fd, view, 0)
        finally:
            os.close(fd)

    def forget(self) -> None:
        """Drop all files from the page cache."""
        forget_all(self._directory)


class PackedFiles:
    """Many blocks one after another in a file of ``PACK_BYTES``; its index is arithmetic here, and costs nothing."""

    def __init__(self, directory: Path, blocks: int, block_bytes: int, mode: Mode) -> None:
        self._directory = directory
        self._block_bytes = block_bytes
        self._each = max(1, PACK_BYTES // block_bytes)
        self._direct = mode.direct
        self._fds = [
            os.open(directory / f"pack-{n}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | mode.flag, 0o600)
            for n in range(-(-blocks // self._each))
        ]

    def _place(self, number: int) -> tuple[int, int]:
        return self._fds[number // self._each], number % self._each * self._block_bytes

    def write(self, number: int, view: memoryview) -> None:
        """Write a block at its place."""
        fd, offset = self._place(number)
        _move(os.pwrite, fd, view, offset)

    def read(self, number: int, view: memoryview) -> None:
        """Read a block from its place."""
        fd, offset = self._place(number)
        _move(_read, fd, view, offset)

    def forget(self) -> None:
        """Drop the files from the page cache where reads go through it."""
        if not self._direct:
            forget_all(self._directory)

    def close(self) -> None:
        """Close the files."""
        for fd in self._fds:
            os.close(fd)


def fill(design: Design, blocks: int, block_bytes: int, threads: int) -> float:
    """Write all blocks of a design; returns seconds."""
    view = page_buffer(block_bytes)

    def work(first: int) -> None:
        for number in range(first, blocks, threads):
            design.write(number, view)

    return in_threads(threads, work)


def latencies(design: Design, numbers: Sequence[int], block_bytes: int) -> list[float]:
    """Read blocks one by one; returns the seconds of each."""
    view = page_buffer(block_bytes)
    seconds = []
    for number in numbers:
        start = time.perf_counter()
        design.read(number, view)
        seconds.append(time.perf_counter() - start)
    return seconds


def sweep(design: Design, blocks: int, block_bytes: int, threads: int) -> float:
    """Read all blocks; returns seconds."""
    views = [page_buffer(block_bytes) for _ in range(threads)]

    def work(first: int) -> None:
        for number in range(first, blocks, threads):
            design.read(number, views[first])

    return in_threads(threads, work)
