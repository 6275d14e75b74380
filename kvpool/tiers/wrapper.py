"""What every wrapper around a store has in common: each call goes through one place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from kvpool.model import Namespace
from kvpool.tiers.store import BlockStore, FileName, StoredFile

T = TypeVar("T")

OPERATIONS = (
    "write",
    "read",
    "remove",
    "set_aside",
    "aside_files",
    "drop_aside",
    "files",
    "namespaces",
    "keep_namespace",
    "clean",
    "probe",
    "free_bytes",
)


class StoreWrapper:
    """A store that does what another one does; a subclass says what happens around each call."""

    def __init__(self, store: BlockStore) -> None:
        self.store = store

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.store!r}>"

    def around(self, operation: str, size: int, call: Callable[[], T]) -> T:
        """Make the call. ``operation`` is one of OPERATIONS, ``size`` the bytes that it moves."""
        del operation, size
        return call()

    @property
    def id(self) -> bytes:
        """The backend's id."""
        return self.store.id

    @property
    def url(self) -> str:
        """Where it is."""
        return self.store.url

    @property
    def capacity_bytes(self) -> int:
        """The backend's capacity."""
        return self.store.capacity_bytes

    def write(self, name: FileName, data: memoryview) -> None:
        """See BlockStore."""
        self.around("write", len(data), lambda: self.store.write(name, data))

    def read_into(self, name: FileName, target: memoryview) -> None:
        """See BlockStore."""
        self.around("read", len(target), lambda: self.store.read_into(name, target))

    def remove(self, names: Sequence[FileName]) -> None:
        """See BlockStore."""
        self.around("remove", 0, lambda: self.store.remove(names))

    def set_aside(self, name: FileName) -> None:
        """See BlockStore."""
        self.around("set_aside", 0, lambda: self.store.set_aside(name))

    def aside_files(self) -> list[tuple[str, int]]:
        """See BlockStore."""
        return self.around("aside_files", 0, self.store.aside_files)

    def drop_aside(self) -> None:
        """See BlockStore."""
        self.around("drop_aside", 0, self.store.drop_aside)

    def files(self, since: float = 0.0) -> Iterator[StoredFile]:
        """See BlockStore; ``around`` sees the first step only, as the rest is up to who asks."""
        found = self.store.files(since)
        first = self.around("files", 0, lambda: next(found, None))
        if first is not None:
            yield first
            yield from found

    def older_than(self, names: Sequence[FileName], age_s: float) -> list[FileName]:
        """See BlockStore; it counts as a step of ``files``."""
        return self.around("files", 0, lambda: self.store.older_than(names, age_s))

    def namespaces(self, *, strict: bool = False) -> list[Namespace]:
        """See BlockStore."""
        return self.around("namespaces", 0, lambda: self.store.namespaces(strict=strict))

    def keep_namespace(self, namespace: Namespace) -> None:
        """See BlockStore."""
        self.around("keep_namespace", 0, lambda: self.store.keep_namespace(namespace))

    def clean(self, older_than_s: float) -> int:
        """See BlockStore."""
        return self.around("clean", 0, lambda: self.store.clean(older_than_s))

    def probe(self) -> None:
        """See BlockStore."""
        self.around("probe", 0, self.store.probe)

    def free_bytes(self) -> int | None:
        """See BlockStore."""
        return self.around("free_bytes", 0, self.store.free_bytes)

    def close(self) -> None:
        """Close the store; nothing is around that."""
        self.store.close()
