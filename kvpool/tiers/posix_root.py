"""A directory's identity: who it is, made once by whoever comes first, agreed on by all that open it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from kvpool.errors import ConfigError
from kvpool.model import format_size
from kvpool.tiers import posix_io
from kvpool.tiers.layout import CAPACITY_RATIO, IDENTITY_FILE, Identity
from kvpool.tiers.store import StoreBrokenError, StoreError

log = logging.getLogger(__name__)

_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EACCES}
_HALF_WRITTEN_S = 2.0  # how long a kvpool.json that makes no sense may still be one that is being written
_POLL_S = 0.02


class Root:
    """A backend's directory. ``temporary(path)`` lends a name beside a path that nobody else uses."""

    def __init__(self, path: str, temporary: Callable[[str], AbstractContextManager[str]]) -> None:
        self.path = path
        self.identity_path = f"{path}/{IDENTITY_FILE}"
        self._temporary = temporary
        self._device = 0
        self._identity: Identity | None = None

    def open(self, capacity_bytes: int | None, used_bytes: Callable[[], int], *, create: bool = True) -> Identity:
        """Return the identity; make it, with this capacity or a share of what is free, where there is none.

        Raises ConfigError("storage_backends"), also when there is none and ``create`` is false.
        """
        try:
            identity = self._read()
            if identity is None and not create:
                raise ConfigError("storage_backends", f"{self.path} is no backend: there is no {IDENTITY_FILE}")
            if identity is None:
                os.makedirs(self.path, exist_ok=True)
                capacity = capacity_bytes or int(CAPACITY_RATIO * (self.free_bytes() + used_bytes()))
                identity = self._settle(Identity.make(capacity))
                log.warning(
                    "%s held no backend, and is one now; if a filesystem should be mounted there, stop the nodes, "
                    "mount it, and remove %s from under it", self.path, IDENTITY_FILE,
                )  # fmt: skip
            self._device = os.stat(self.path).st_dev
        except OSError as exc:
            raise ConfigError("storage_backends", f"{exc.filename or self.path}: {exc.strerror}") from exc
        except StoreError as exc:
            raise ConfigError("storage_backends", f"{self.path}: {exc}") from exc
        if capacity_bytes not in {None, identity.capacity_bytes}:
            recorded = format_size(identity.capacity_bytes)
            log.warning(
                "%s: storage_capacity is ignored, the backend was made with %s; to change that, edit capacity_bytes in "
                "its %s and restart the nodes", self.path, recorded, IDENTITY_FILE,
            )  # fmt: skip
        self._identity = identity
        return identity

    def check(self) -> None:
        """See that this is still the backend that was opened; make one again that was deleted.

        An unmounted directory looks deleted, but its place is on another filesystem: there nothing is made.
        Raises OSError, StoreError.
        """
        opened = self._identity
        if opened is None:
            return
        found = self._read()
        if found is None:
            place = self.path
            while not os.path.lexists(place):
                place = os.path.dirname(place)
            if os.stat(place).st_dev != self._device:
                raise StoreError(f"{self.path}: not mounted, or another filesystem is")
            os.makedirs(self.path, exist_ok=True)
            found = self._settle(opened)
            log.warning("%s was gone and is made again", self.path)
        if found.id != opened.id:
            raise StoreError(f"{self.path}: holds another backend now, {found.id.hex()} instead of {opened.id.hex()}")

    def present(self) -> None:
        """Raise OSError if what was opened is not there at all, as when it is not mounted."""
        if self._identity is not None:
            os.stat(self.identity_path)

    def free_bytes(self) -> int:
        """Return what the filesystem has left for us. Raises OSError."""
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize

    def _read(self) -> Identity | None:
        deadline = time.monotonic() + _HALF_WRITTEN_S
        while True:
            try:
                return Identity.parse(posix_io.read_small(self.identity_path, 1 << 16)[0])
            except FileNotFoundError:
                return None
            except StoreBrokenError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_S)

    def _settle(self, offered: Identity) -> Identity:
        """Offer an identity; return the one that came first, which may be another's. Raises OSError, StoreError."""
        with self._temporary(self.identity_path) as temporary:
            _write_new(temporary, offered.pack())
            try:
                os.link(temporary, self.identity_path)  # fails if it exists: the first one stays
            except FileExistsError:
                pass
            except OSError as exc:
                if exc.errno not in _NO_LINKS:
                    raise
                with contextlib.suppress(FileExistsError):
                    _write_new(self.identity_path, offered.pack())
            with contextlib.suppress(FileNotFoundError):  # a lost answer: it was removed by asking twice
                os.unlink(temporary)
        found = self._read()
        if found is None:
            raise StoreError(f"{self.identity_path} is gone as soon as it was made")
        return found


def _write_new(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
