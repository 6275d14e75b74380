"""Marks of those who write into a directory: one that is left behind tells that its owner did not end in order.

``writers/<owner>`` says since when, by the filesystem's clock, its owner may have written files that no master has
been told of. It is touched while its owner lives, and removed at an end in order. Who finds one that nobody touches
any more has only what is younger to look at.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from kvpool.tiers import posix_io
from kvpool.tiers.layout import IDENTITY_FILE, WRITERS

LOCK_S = 5.0
"""How long one call waits for another one."""

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.-]")


class Seen(NamedTuple):
    """Another's mark: ``since`` when what it wrote may not be known (0: unknown), and when it was touched (ns)."""

    since: float
    touched: int


class Writers:
    """The marks in one directory, and our own among them. ``owner`` is "NODE-EPOCH", unique to this process.

    All methods block and raise OSError; any thread may call them.
    """

    def __init__(self, directory: str, owner: str) -> None:
        self.name = "_" + _NOT_IN_NAMES.sub("_", owner)[-120:]
        self._identity = Path(directory, IDENTITY_FILE)
        self._directory = Path(directory, WRITERS)
        self._path = self._directory / self.name
        self._kept: float | None = None
        self._left = False
        self._lock = threading.Lock()

    def keep(self, since: float | None) -> float | None:
        """Touch our mark, or make it; returns the filesystem's time, None after ``leave``.

        ``since``: None leaves what it says, or has a new one count from now on. Nothing is made where the backend
        itself is away, as when its filesystem is not mounted.
        """
        with self._locked():
            if self._left:
                return None
            self._identity.stat()
            if since is None:
                since = self._kept  # an attempt to open that nobody waits for: another one has begun to write
            if since is not None and since == self._kept:
                with contextlib.suppress(FileNotFoundError):  # taken by somebody who believed us dead
                    return self._touch()
            self._directory.mkdir(exist_ok=True)
            try:
                return self._write(since)
            except OSError:
                if since is None or self._kept is None:
                    raise
                now = self._touch()  # no room for what is new: what it says still holds
                if since < self._kept:
                    raise  # but it does not say all
                return now

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Raises OSError where another call hangs: it may do so for ever."""
        if not self._lock.acquire(timeout=LOCK_S):
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), str(self._path))
        try:
            yield
        finally:
            self._lock.release()

    def _touch(self) -> float:
        os.utime(self._path)
        return self._path.stat().st_mtime

    def _write(self, since: float | None) -> float:
        temporary = self._directory / f".{self.name}.{self.name}.1.tmp"
        try:
            with temporary.open("w", encoding="ascii") as file:
                now = os.fstat(file.fileno()).st_mtime
                since = now if since is None else since
                file.write(f"{since!r}\n")
            temporary.replace(self._path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        self._kept = since
        return now

    def others(self) -> dict[str, Seen]:
        """Return the marks of all others that can be read, by name."""
        found = {}
        try:
            paths = list(self._directory.iterdir())
        except FileNotFoundError:
            return {}
        for path in paths:
            if path.name.startswith(".") or path.name == self.name:
                continue
            with contextlib.suppress(OSError):
                said, status = posix_io.read_small(str(path), 64)
                found[path.name] = Seen(_since(said), status.st_mtime_ns)
        return found

    def ours(self, name: str) -> bool:
        """Whether a mark is of an earlier process of the same node."""
        return name != self.name and name.rpartition("-")[0] == self.name.rpartition("-")[0]

    def drop(self, names: Iterable[str]) -> None:
        """Remove marks of others whose task is ours by now."""
        for name in names:
            (self._directory / name).unlink(missing_ok=True)

    def leave(self) -> None:
        """Remove our mark for good: all that we have written is known."""
        with self._locked():
            self._left = True
            self._path.unlink(missing_ok=True)


def _since(data: bytes) -> float:
    try:
        since = float(data)
    except ValueError:
        return 0.0
    return since if math.isfinite(since) else 0.0
