"""A directory as a backend: local disks, NFS and other shared filesystems, opened by any number of nodes.

One file for each shard of a block, named by its content. A file appears under its name by a rename, whole; who
renames later replaces it by the same bytes. Nothing here relies on locks, on access times, or on what another
host's page cache knows: what cannot be had is missing, and readers verify the rest.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from kvpool.model import Namespace
from kvpool.tiers import posix_io
from kvpool.tiers.layout import (
    ASIDE,
    ASIDE_MAX,
    BLOCKS,
    NAMESPACES,
    TEMPORARY,
    WRITERS,
    namespace_path,
    owner_name,
    pack_namespace,
    parse_namespace,
)
from kvpool.tiers.posix_root import Root
from kvpool.tiers.store import (
    FileName,
    StoreBrokenError,
    StoredFile,
    StoreError,
    StoreFullError,
    StoreMissingError,
    StoreReadOnlyError,
    StoreSizeError,
)

log = logging.getLogger(__name__)

FSYNC: Final = ("off", "data", "full")
"""Await the disk for nothing, for each file's data, or for its name too."""

_ATTEMPTS = 5  # a directory that has to be made, a handle that went stale again
_FULL = {errno.ENOSPC, errno.EDQUOT}
_AGAIN = {errno.ENOENT, errno.ESTALE, errno.EEXIST}  # no directory, an old handle, a rename done and undone by others
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_NO_DESCRIPTOR = {errno.ENOENT, errno.EINVAL, errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EACCES}  # it never will be
_HEX_NAMESPACE = re.compile(r"[0-9a-f]{32}")
_HEX_FAN = re.compile(r"[0-9a-f]{3}")

_counter = itertools.count(1)  # of all stores in this process: they may share an owner
_writing: set[str] = set()  # temporary files that are being written right now


class PosixStore:
    """Block files in a directory. ``owner`` is unique to this process and part of temporary names.

    ``capacity_bytes`` counts only for who makes the backend. Raises ConfigError("storage_backends") when the
    directory cannot be one.
    """

    def __init__(
        self,
        directory: str,
        *,
        owner: str,
        capacity_bytes: int | None = None,
        direct: bool = True,
        fsync: str = "off",
        create: bool = True,
    ) -> None:
        self._owner = owner_name(owner)
        self._root = Root(os.path.abspath(directory), self._temporary)
        self.url = self._root.path
        self._blocks = f"{self.url}/{BLOCKS}"
        self._aside = f"{self.url}/{ASIDE}"
        identity = self._root.open(capacity_bytes, lambda: sum(file.bytes for file in self.files()), create=create)
        self.id = identity.id
        self.capacity_bytes = identity.capacity_bytes
        self.direct_unit = posix_io.direct_unit(self._root.identity_path) if direct else 0
        self._sync = fsync != "off"
        self._sync_directory = fsync == "full"

    def __repr__(self) -> str:
        mode = f"direct in {self.direct_unit}" if self.direct_unit else "buffered"
        return f"<PosixStore {self.url}, {mode}>"

    # ---- blocks ------------------------------------------------------------------------------------

    def write(self, name: FileName, data: memoryview) -> None:
        """Write a temporary file beside the place and rename it. Raises StoreError."""
        self._replace(f"{self._blocks}/{name}", data)

    def read_into(self, name: FileName, target: memoryview) -> None:
        """Read a file of exactly the target's length. Raises StoreMissingError, StoreSizeError, StoreError."""
        path = f"{self._blocks}/{name}"
        try:
            self._retried(path, posix_io.fill, path, target, self.direct_unit)
        except posix_io.LengthError as exc:
            raise StoreSizeError(name, exc.actual) from None
        except posix_io.NotAFileError:
            raise StoreBrokenError(f"{path}: not a regular file") from None
        except OSError as exc:
            if exc.errno == errno.ELOOP:
                raise StoreBrokenError(f"{path}: a symbolic link") from None
            raise self._error(exc, path, writing=False) from exc

    def try_read(self, names: Sequence[FileName], targets: Sequence[memoryview], until: float) -> list[bool]:
        """Read several files, quickly if nothing is wrong with them: returns for which of the first that was so.

        Of the others ``read_into`` says what is wrong. At least one is tried, none is begun after ``until``.
        """
        if self.direct_unit > min(posix_io.DIRECT_UNITS):  # goes through a buffer
            return [False]
        return posix_io.fill_all([f"{self._blocks}/{name}" for name in names], targets, self.direct_unit, until)

    def remove(self, names: Sequence[FileName]) -> None:
        """Unlink files, all that can be. Raises the first StoreError at the end."""
        failed: StoreError | None = None
        for name in names:
            path = f"{self._blocks}/{name}"
            try:
                self._retried(path, _unlink, path)
            except OSError as exc:
                failed = failed or self._error(exc, path, writing=True)
        if failed:
            raise failed

    def set_aside(self, name: FileName) -> None:
        """Move a file to ``aside``, of which the oldest go. Raises StoreError."""
        path = f"{self._blocks}/{name}"
        kept = f"{self._aside}/{time.time_ns():020d}.{name.namespace.hex()}.{name.key.hex()}.{name.shard}"
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self._aside)
            try:
                os.rename(path, kept)
            except FileExistsError:  # no other file has that name: it was done, and its answer lost
                _unlink(path)
        except (FileNotFoundError, NotADirectoryError):
            return  # somebody was faster
        except OSError as exc:
            raise self._error(exc, path, writing=True) from exc
        self._drop_aside(ASIDE_MAX)

    def aside_files(self) -> list[tuple[str, int]]:
        """Return name and length of what was set aside, oldest first. Raises StoreError."""
        found = []
        for entry in self._entries(self._aside):
            with contextlib.suppress(OSError):  # gone meanwhile
                found.append((entry.name, entry.stat(follow_symlinks=False).st_size))
        return sorted(found)

    def drop_aside(self) -> None:
        """Remove what was set aside. Raises StoreError."""
        self._drop_aside(0)

    def files(self, since: float = 0.0) -> Iterator[StoredFile]:
        """Yield every block's file; others come and go meanwhile. Raises StoreError.

        With ``since`` only directories are listed in which something has come or gone after it.
        """
        for namespace, fan in self._directories():
            prefix = f"{namespace}/{fan}/"
            if since and not _changed(f"{self._blocks}/{prefix}", since):
                continue
            for entry in self._entries(f"{self._blocks}/{prefix}"):
                name = FileName.parse(prefix + entry.name)
                if name is None:
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:  # gone, or stale: then it is not there for us
                    continue
                if stat.S_ISREG(status.st_mode) and max(status.st_mtime, status.st_ctime) >= since:
                    yield StoredFile(name, status.st_size)

    def older_than(self, names: Sequence[FileName], age_s: float) -> list[FileName]:
        """Return those of these files that are there, and came to their place that long ago. Raises StoreError."""
        if not names:
            return []
        youngest = self._now() - age_s
        found = []
        for name in names:
            with contextlib.suppress(OSError):  # gone, or not ours to look at
                status = _status(f"{self._blocks}/{name}")
                if max(status.st_mtime, status.st_ctime) < youngest:
                    found.append(name)
        return found

    # ---- beside the blocks -------------------------------------------------------------------------

    def namespaces(self, *, strict: bool = False) -> list[Namespace]:
        """Return the descriptors. Raises StoreError; if ``strict`` also where one may be there and cannot be read."""
        found = []
        for entry in self._entries(f"{self.url}/{NAMESPACES}"):
            if entry.name.startswith("."):
                continue
            try:
                said, _ = posix_io.read_small(entry.path, 1 << 16)
            except OSError as exc:
                if strict and exc.errno not in _NO_DESCRIPTOR:
                    raise self._error(exc, entry.path, writing=False) from exc
                log.warning("%s cannot be read: %s", entry.path, exc.strerror)
                continue
            namespace = parse_namespace(entry.name, said)
            if namespace is not None:
                found.append(namespace)
        return found

    def keep_namespace(self, namespace: Namespace) -> None:
        """Write a descriptor unless it is there. Raises StoreError."""
        path = f"{self.url}/{namespace_path(namespace.digest)}"
        with contextlib.suppress(OSError):
            said, _ = posix_io.read_small(path, 1 << 16)
            if parse_namespace(os.path.basename(path), said) == namespace:
                return
        self._replace(path, memoryview(pack_namespace(namespace)))

    def clean(self, older_than_s: float) -> int:
        """Remove temporary files that nobody writes any more, and empty directories. Raises StoreError."""
        now = self._now()
        removed = 0
        blocks = (f"{self._blocks}/{namespace}/{fan}" for namespace, fan in self._directories())
        beside = (f"{self.url}/{NAMESPACES}", f"{self.url}/{WRITERS}")
        for directory in itertools.chain((self.url, self._blocks, *beside), blocks):
            for entry in self._entries(directory):
                match = TEMPORARY.fullmatch(entry.name)
                if match is None or entry.path in _writing:
                    continue
                with contextlib.suppress(OSError):  # its owner was faster, or it is not ours to remove
                    if match[1] == self._owner or now - entry.stat(follow_symlinks=False).st_mtime > older_than_s:
                        os.unlink(entry.path)
                        removed += 1
        self._remove_empty()
        return removed

    def _remove_empty(self) -> None:
        """Remove directories without files; a writer that finds its own gone makes it again."""
        for namespace, fan in list(self._directories()):
            with contextlib.suppress(OSError):  # not empty
                os.rmdir(f"{self._blocks}/{namespace}/{fan}")
                os.rmdir(f"{self._blocks}/{namespace}")

    def probe(self) -> None:
        """Write, read back and remove a small file; a root that was deleted is made again. Raises StoreError."""
        path = ""
        try:
            self._root.check()
            with self._temporary(f"{self.url}/probe") as path:
                unit = max(self.direct_unit, 512)
                data = memoryview(os.urandom(unit))
                posix_io.create(path, data, unit=self.direct_unit, sync=self._sync)
                back = memoryview(bytearray(unit))
                posix_io.fill(path, back, unit=self.direct_unit)
                _unlink(path)
        except OSError as exc:
            raise self._error(exc, path or self.url, writing=True) from exc
        except (posix_io.LengthError, posix_io.NotAFileError) as exc:
            raise StoreError(f"{self.url}: what is written is not there: {exc}") from exc
        if back != data:
            raise StoreError(f"{self.url}: what is read is not what was written")

    def free_bytes(self) -> int | None:
        """Return what the filesystem has for us. Raises StoreError."""
        try:
            return self._root.free_bytes()
        except OSError as exc:
            raise self._error(exc, self.url, writing=False) from exc

    def close(self) -> None:
        """Nothing is held."""

    # ---- parts -------------------------------------------------------------------------------------

    def _drop_aside(self, kept: int) -> None:
        names = sorted(entry.name for entry in self._entries(self._aside))
        for name in names[: max(0, len(names) - kept)]:
            path = f"{self._aside}/{name}"
            try:
                _unlink(path)
            except IsADirectoryError:  # stood where a block belongs
                shutil.rmtree(path, ignore_errors=True)
            except OSError as exc:
                raise self._error(exc, path, writing=True) from exc

    def _replace(self, path: str, data: memoryview) -> None:
        try:
            self._retried(path, self._replace_once, path, data, make=True)
        except OSError as exc:
            raise self._error(exc, path, writing=True) from exc

    def _replace_once(self, path: str, data: memoryview) -> None:
        temporary = self._temporary_name(path)
        try:
            posix_io.create(temporary, data, unit=self.direct_unit, sync=self._sync)
            try:
                os.rename(temporary, path)
            except OSError as exc:
                # It may have been done: where answers get lost, a client asks twice, or gives up.
                done = _has_length(path, len(data)) or (
                    exc.errno == errno.EEXIST and not os.path.lexists(temporary)  # and undone by others since
                )
                if not done:
                    raise
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        finally:
            _writing.discard(temporary)
        if self._sync_directory:
            _sync_directory(os.path.dirname(path))

    def _temporary_name(self, path: str) -> str:
        """Return a name beside a path that nobody else uses; it has to be taken out of ``_writing``."""
        directory, _, file = path.rpartition("/")
        temporary = f"{directory}/.{file}.{self._owner}.{next(_counter)}.tmp"
        _writing.add(temporary)
        return temporary

    @contextlib.contextmanager
    def _temporary(self, path: str) -> Iterator[str]:
        """Yield such a name; what fails leaves nothing there."""
        temporary = self._temporary_name(path)
        try:
            yield temporary
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        finally:
            _writing.discard(temporary)

    def _retried(self, path: str, action: Callable[..., None], *arguments: Any, make: bool = False) -> None:
        """Do something with a file, again if what we know of the directory was old, or there is none yet."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                action(*arguments)
            except OSError as exc:
                if exc.errno not in _AGAIN or attempt == _ATTEMPTS:
                    raise
                if exc.errno == errno.ENOENT and not make and attempt > 1:
                    raise
                self._refresh(os.path.dirname(path), make=make)
            else:
                return

    def _refresh(self, directory: str, *, make: bool) -> None:
        """Have a network filesystem look at a directory again, which opening it does; make it if wanted."""
        try:
            os.close(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        except OSError as exc:
            if exc.errno not in {errno.ENOENT, errno.ESTALE}:
                raise
            if make:
                self._root.check()
                self._make(directory)

    def _make(self, directory: str) -> None:
        """Make a directory. Those of a namespace are to lie anywhere on the disk, see ``posix_io.spread``.

        Who removes empty directories may take its parent away meanwhile: it is then not there, and to be made again.
        """
        parent = os.path.dirname(directory)
        with contextlib.suppress(FileNotFoundError):
            if os.path.dirname(parent) == self._blocks and not os.path.lexists(parent):
                os.makedirs(parent, exist_ok=True)
                posix_io.spread(parent)
            os.makedirs(directory, exist_ok=True)

    def _directories(self) -> Iterator[tuple[str, str]]:
        for namespace in self._entries(self._blocks):
            if _HEX_NAMESPACE.fullmatch(namespace.name):
                for fan in self._entries(namespace.path):
                    if _HEX_FAN.fullmatch(fan.name):
                        yield namespace.name, fan.name

    def _entries(self, directory: str) -> Iterator[os.DirEntry[str]]:
        """Yield what lies in a directory, nothing for one that is gone, or a file. Raises StoreError."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with os.scandir(directory) as opened:
                    found = list(opened)  # all of it: what is listed in part cannot be listed again
            except (FileNotFoundError, NotADirectoryError):
                self._present(directory)
                return
            except OSError as exc:
                if exc.errno != errno.ESTALE or attempt == _ATTEMPTS:
                    raise self._error(exc, directory, writing=False) from exc
            else:
                yield from found
                return

    def _present(self, path: str) -> None:
        """Raise StoreError if the whole backend is away: then nothing is known of what it holds."""
        try:
            self._root.present()
        except OSError as exc:
            raise StoreError(f"{path}: {self._root.identity_path}: {exc.strerror}") from exc

    def _now(self) -> float:
        """Return the time by the clock that stamps this filesystem's files, also where there is no room for one.

        Raises StoreError.
        """
        path = ""
        try:
            try:
                with self._temporary(f"{self.url}/clock") as path:
                    posix_io.create(path, memoryview(b""), unit=0, sync=False)
                    now = os.stat(path).st_mtime
                    _unlink(path)
            except OSError as exc:
                if exc.errno not in _FULL:
                    raise
                os.utime(self.url)
                now = os.stat(self.url).st_mtime
        except OSError as exc:
            raise self._error(exc, path, writing=True) from exc
        return now

    def _error(self, exc: OSError, path: str, *, writing: bool) -> StoreError:
        text = f"{path}: {exc.strerror or exc}"
        if writing and exc.errno in _FULL:
            return StoreFullError(text)
        if writing and exc.errno in _READ_ONLY:
            return StoreReadOnlyError(text)
        if writing and exc.errno in {errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY}:
            return StoreBrokenError(text)  # something foreign lies where a file or a directory belongs
        if not writing and exc.errno in {errno.ENOENT, errno.ENOTDIR}:
            self._present(path)
            return StoreMissingError(text)
        return StoreError(text)


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError as exc:
        if exc.errno not in {errno.ENOENT, errno.ENOTDIR}:
            raise


def _changed(directory: str, since: float) -> bool:
    """Whether something may have come or gone in a directory since then."""
    try:
        # By opening, as only that asks a server what is there now.
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return os.fstat(fd).st_mtime >= since
        finally:
            os.close(fd)
    except OSError:
        return True  # whoever lists it finds out why


def _has_length(path: str, length: int) -> bool:
    try:
        return _status(path).st_size == length
    except OSError:  # somebody may have removed it since it was opened, too
        return False


def _status(path: str) -> os.stat_result:
    """Return what is there now: by opening it, as only that asks a server."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
