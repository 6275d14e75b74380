"""What lies in a backend beside its blocks, the same in a directory and in an object store.

``kvpool.json`` says whose files these are, ``namespaces/<digest>.json`` what they mean; broken files go to
``aside/``, blocks lie in ``blocks/`` under the names of ``kvpool/tiers/store.py``. In a directory,
``writers/`` has a mark of each who writes, see ``kvpool/tiers/writers.py``.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from dataclasses import dataclass
from typing import Final

from kvpool.errors import InvalidArgumentError
from kvpool.model import DIGEST_BYTES, Namespace
from kvpool.tiers.store import StoreBrokenError

IDENTITY_FILE: Final = "kvpool.json"
BLOCKS: Final = "blocks"
NAMESPACES: Final = "namespaces"
ASIDE: Final = "aside"
WRITERS: Final = "writers"

ASIDE_MAX: Final = 64
"""Broken files kept for people to look at; the oldest go."""

CAPACITY_RATIO: Final = 0.9
"""Of what is free and what the pool has already: the capacity of a backend whose maker was not told one."""

TEMPORARY: Final = re.compile(r"\..+\.([A-Za-z0-9_-]+)\.\d+\.tmp")
"""Names of files that are being written, and in them who writes."""

CAPACITY_MAX: Final = 1 << 62
"""As in settings."""

_FORMAT: Final = 1
_NOT_IN_OWNERS = re.compile(r"[^A-Za-z0-9_-]")
_OWNER_MAX = 64


@dataclass(frozen=True, slots=True)
class Identity:
    """A backend's own id (16 bytes) and the bytes of files it may hold, recorded once by who made it."""

    id: bytes
    capacity_bytes: int

    @classmethod
    def make(cls, capacity_bytes: int) -> Identity:
        """Return a new one."""
        return cls(uuid.uuid4().bytes, min(max(1, capacity_bytes), CAPACITY_MAX))

    def pack(self) -> bytes:
        """Return the text of ``kvpool.json``."""
        fields = {"format": _FORMAT, "id": str(uuid.UUID(bytes=self.id)), "capacity_bytes": self.capacity_bytes}
        return (json.dumps(fields, indent=1) + "\n").encode()

    @classmethod
    def parse(cls, data: bytes) -> Identity:
        """Return what a ``kvpool.json`` says. Raises StoreBrokenError for one that was not written by a pool."""
        try:
            fields = json.loads(data)
            number, text, capacity = fields["format"], fields["id"], fields["capacity_bytes"]
            if number != _FORMAT:
                raise StoreBrokenError(f"{IDENTITY_FILE} has format {number}, this version knows {_FORMAT}")
            if isinstance(capacity, bool) or not isinstance(capacity, int) or not 1 <= capacity <= CAPACITY_MAX:
                raise StoreBrokenError(
                    f"{IDENTITY_FILE} has capacity_bytes {capacity!r}; allowed: a whole number of bytes from 1 to 2**62"
                )
            return cls(uuid.UUID(text).bytes, capacity)
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise StoreBrokenError(f"{IDENTITY_FILE} cannot be understood: {type(exc).__name__}: {exc}") from exc


def owner_name(owner: str) -> str:
    """Return what is unique to a process as temporary names have it; unique, too, where it was too long for them."""
    name = _NOT_IN_OWNERS.sub("_", owner) or "nobody"
    if len(name) <= _OWNER_MAX:
        return name
    return hashlib.blake2b(owner.encode(), digest_size=_OWNER_MAX // 2).hexdigest()


def namespace_path(digest: bytes) -> str:
    """Return where a descriptor is kept, below the backend's root."""
    return f"{NAMESPACES}/{digest.hex()}.json"


def pack_namespace(namespace: Namespace) -> bytes:
    """Return the text of a descriptor's file."""
    return (json.dumps(namespace.as_dict(), sort_keys=True, indent=1) + "\n").encode()


def parse_namespace(file: str, data: bytes) -> Namespace | None:
    """Return the descriptor in a file of this name (without its directory), None for what is none, or another's."""
    try:
        digest = bytes.fromhex(file.removesuffix(".json"))
        namespace = Namespace(**json.loads(data))
    except (ValueError, TypeError, InvalidArgumentError):
        return None
    return namespace if len(digest) == DIGEST_BYTES and namespace.digest == digest else None
