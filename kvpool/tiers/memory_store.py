"""A backend in this process's memory: the reference that other stores are compared with, and what tests use."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator, Sequence

from kvpool.model import Namespace
from kvpool.tiers.layout import ASIDE_MAX
from kvpool.tiers.store import FileName, StoredFile, StoreFullError, StoreMissingError, StoreSizeError


class MemoryStore:
    """Block files in a dict. More than ``capacity_bytes`` does not fit, as on a full disk."""

    def __init__(self, *, id: bytes | None = None, capacity_bytes: int = 1 << 40) -> None:  # noqa: A002
        self.id = id or uuid.uuid4().bytes
        self.url = f"memory:{self.id.hex()[:8]}"
        self.capacity_bytes = capacity_bytes
        self.aside: dict[FileName, bytes] = {}
        self._files: dict[FileName, bytes] = {}
        self._namespaces: dict[bytes, Namespace] = {}
        self._used = 0
        self._lock = threading.Lock()

    def write(self, name: FileName, data: memoryview) -> None:
        """Keep a copy. Raises StoreFullError."""
        copy = bytes(data)
        with self._lock:
            used = self._used + len(copy) - len(self._files.get(name, b""))
            if used > self.capacity_bytes:
                raise StoreFullError(f"{self.url}: {self._used} of {self.capacity_bytes} bytes are used")
            self._files[name], self._used = copy, used

    def read_into(self, name: FileName, target: memoryview) -> None:
        """Copy a file out. Raises StoreMissingError, StoreSizeError."""
        data = self._files.get(name)
        if data is None:
            raise StoreMissingError(f"{self.url}: no {name}")
        if len(data) != len(target):
            raise StoreSizeError(name, len(data))
        target[:] = data

    def remove(self, names: Sequence[FileName]) -> None:
        """Forget files."""
        with self._lock:
            for name in names:
                self._used -= len(self._files.pop(name, b""))

    def set_aside(self, name: FileName) -> None:
        """Move a broken file to ``aside``."""
        with self._lock:
            data = self._files.pop(name, None)
            if data is None:
                return
            self._used -= len(data)
            self.aside[name] = data
            while len(self.aside) > ASIDE_MAX:
                del self.aside[next(iter(self.aside))]

    def aside_files(self) -> list[tuple[str, int]]:
        """Return what was set aside, oldest first."""
        return [(str(name), len(data)) for name, data in list(self.aside.items())]

    def drop_aside(self) -> None:
        """Forget what was set aside."""
        self.aside.clear()

    def files(self, since: float = 0.0) -> Iterator[StoredFile]:
        """Yield what is there now."""
        del since
        with self._lock:
            found = [StoredFile(name, len(data)) for name, data in self._files.items()]
        yield from found

    def older_than(self, names: Sequence[FileName], age_s: float) -> list[FileName]:
        """Return those of these files that are there; none of them is older than now."""
        there = {file.name for file in self.files()}
        return [name for name in names if name in there and age_s < 0]

    def namespaces(self, *, strict: bool = False) -> list[Namespace]:
        """Return the descriptors."""
        del strict
        return list(self._namespaces.values())

    def keep_namespace(self, namespace: Namespace) -> None:
        """Keep a descriptor."""
        self._namespaces[namespace.digest] = namespace

    def clean(self, older_than_s: float) -> int:  # noqa: ARG002 - there are no half-written files
        """Return 0: a write is all or nothing."""
        return 0

    def probe(self) -> None:
        """Memory works."""

    def free_bytes(self) -> int | None:
        """Return what is left of the capacity."""
        return self.capacity_bytes - self._used

    def close(self) -> None:
        """Nothing is held."""
