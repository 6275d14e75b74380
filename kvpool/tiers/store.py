"""What a place for block files has to do: the contract of the file tier's stores.

A file is one shard of one block, named by its content: whoever writes the same name writes the same bytes.
What is written is a slot's whole extent (header area, payload, rounding), so that every file says itself
whose bytes it holds. Calls block, and are made from threads; a store is shared by all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from kvpool.errors import KVPoolError
from kvpool.model import SHARDS_MAX, Namespace


class StoreError(KVPoolError):
    """A store cannot do what it was asked; this one does not tell more than its text does."""


class StoreMissingError(StoreError):
    """There is no such file."""


class StoreBrokenError(StoreError):
    """There is such a file, but it does not hold what its name says: torn, changed, foreign."""


class StoreSizeError(StoreError):
    """A file is whole as far as its length tells, but it is not as long as was expected: ``actual`` bytes."""

    def __init__(self, name: FileName, actual: int) -> None:
        super().__init__(f"{name} has {actual} bytes")
        self.actual = actual


class StoreFullError(StoreError):
    """No space, or no quota, is left."""


class StoreReadOnlyError(StoreError):
    """Nothing can be written; reading goes on."""


_NAME = re.compile(r"(?:.*/)?([0-9a-f]{32})/[0-9a-f]{3}/([0-9a-f]{32})\.(\d{1,3})")


class FileName(NamedTuple):
    """A shard of a block: 16 bytes of namespace digest, 16 of key, the shard's number."""

    namespace: bytes
    key: bytes
    shard: int

    def __str__(self) -> str:
        """Return the path below the backend's ``blocks``: namespace, three digits of the key, key and shard."""
        key = self.key.hex()
        return f"{self.namespace.hex()}/{key[:3]}/{key}.{self.shard}"

    @classmethod
    def parse(cls, path: str) -> FileName | None:
        """Return the name that a path stands for, None for a foreign one."""
        match = _NAME.fullmatch(path)
        if match is None or int(match[3]) >= SHARDS_MAX or str(int(match[3])) != match[3]:
            return None
        name = cls(bytes.fromhex(match[1]), bytes.fromhex(match[2]), int(match[3]))
        return name if path.endswith(str(name)) else None


class StoredFile(NamedTuple):
    """A file that a store lists, with its length in bytes."""

    name: FileName
    bytes: int


class BlockStore(Protocol):
    """Files of blocks in one backend. All errors are StoreError; one that is none of its kinds means: down."""

    @property
    def id(self) -> bytes:
        """The backend's own id, 16 bytes, the same for everybody who opens it."""

    @property
    def url(self) -> str:
        """Where it is, for people: no secrets."""

    @property
    def capacity_bytes(self) -> int:
        """Bytes of files it may hold, as recorded in it by who made it."""

    def write(self, name: FileName, data: memoryview) -> None:
        """Store a file, all of it or nothing; one that exists already is left or replaced. Raises StoreError."""

    def read_into(self, name: FileName, target: memoryview) -> None:
        """Fill ``target`` with a whole file of exactly its length.

        Raises StoreMissingError, StoreSizeError when the lengths differ, StoreError. The bytes are not verified.
        """

    def remove(self, names: Sequence[FileName]) -> None:
        """Remove files; those that are not there are removed. Raises StoreError after it has tried all."""

    def set_aside(self, name: FileName) -> None:
        """Take a broken file out of the way, so that nobody reads it again; some are kept for people to look at."""

    def aside_files(self) -> list[tuple[str, int]]:
        """Return name and length of the broken files that were kept, oldest first. Raises StoreError."""

    def drop_aside(self) -> None:
        """Remove the broken files that were kept. Raises StoreError."""

    def files(self, since: float = 0.0) -> Iterator[StoredFile]:
        """Yield every file in no order, while others write and remove. Raises StoreError.

        Those that were last written before ``since``, by the storage's own clock, may be left out.
        """

    def older_than(self, names: Sequence[FileName], age_s: float) -> list[FileName]:
        """Return those of these files that are there, and were last written longer ago. Raises StoreError.

        By the storage's own clock where it tells; what says nothing of its age is young.
        """

    def namespaces(self, *, strict: bool = False) -> list[Namespace]:
        """Return the descriptors kept beside the files; those that cannot be read are left out. Raises StoreError.

        ``strict``: also where one may be there and cannot be read.
        """

    def keep_namespace(self, namespace: Namespace) -> None:
        """Keep a descriptor beside the files; idempotent. Raises StoreError."""

    def clean(self, older_than_s: float) -> int:
        """Remove what interrupted writers left behind, if it is older than that or our own; return how many.

        Directories that have become empty go too.
        """

    def probe(self) -> None:
        """Write, read back and remove something small. Raises StoreError when that does not work."""

    def free_bytes(self) -> int | None:
        """Return what the filesystem has left, None where that has no meaning. Raises StoreError."""

    def close(self) -> None:
        """Let go of what is held."""
