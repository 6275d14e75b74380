"""The words everything else is written in: namespace, key, shard mask.

No I/O, no other kvpool module but ``errors``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import Enum, IntEnum
from typing import Any

from kvpool.errors import InvalidArgumentError

KEY_BYTES = 16
"""A block key is the first 16 bytes of the engine's prefix hash."""

DIGEST_BYTES = 16
"""A namespace digest."""

SHARDS_MAX = 256
"""Shards one block can have (layer groups x head groups)."""

SHARD_BYTES_MAX = 1 << 40
"""Payload bytes of one shard that any message may claim; a segment's size is the real limit."""

LAYERS_MAX = 4096
"""Checksums (layers) one shard can have."""

KEYS_PER_CALL_MAX = 1 << 20
"""Keys one request may carry."""

NODE_ITEMS_MAX = 1 << 16
"""Items (keys x shards) of one request that a node has to look at one by one: it answers nobody else meanwhile."""

RESERVE_ITEMS_MAX = 1 << 13
"""Of one that it has to find room for."""

BACKEND_BYTES = 16
"""A storage backend's id."""

CHECKSUM_BYTES = 8
"""xxh3-64."""

FORMAT_VERSION = 1
"""Of slots, files and keys; part of every namespace digest."""

# Cryptographic, so that two prompts cannot be made to share a key.
SAFE_HASHES = frozenset({"sha256", "sha256_cbor", "blake3", "sha512", "blake2b"})


@dataclass(frozen=True, slots=True)
class Namespace:
    """Everything that must agree before KV bytes are interchangeable.

    Never the TP of one engine: ``layer_groups`` and ``head_groups`` are the *stored* geometry. The
    digest of all fields is part of every key. Every field has a default so that a program that is no
    LLM engine can write ``Namespace(model="demo")``.
    """

    model: str
    revision: str = ""
    dtype: str = "bfloat16"
    kv_quant: str = ""
    block_tokens: int = 16
    layers: int = 1
    kv_heads: int = 1
    head_size: int = 128
    layout: str = ""
    isa: str = ""
    kv_group: str = ""
    layer_groups: int = 1
    head_groups: int = 1
    hash_algorithm: str = "sha256"
    hash_fingerprint: str = ""
    format_version: int = FORMAT_VERSION
    digest: bytes = field(init=False, repr=False, compare=False)
    """Sixteen bytes that stand for all other fields."""

    def __post_init__(self) -> None:
        """Raise InvalidArgumentError for a value that no engine can mean."""
        if not self.model:
            raise InvalidArgumentError("namespace.model", "must not be empty")
        for name in ("block_tokens", "layers", "kv_heads", "head_size", "layer_groups", "head_groups"):
            value = getattr(self, name)
            if not 1 <= value < 1 << 32:
                raise InvalidArgumentError(f"namespace.{name}", f"must be from 1 to 2**32 - 1, not {value}")
        for name, value in self.as_dict().items():
            if isinstance(value, str) and len(value) > 1024:
                raise InvalidArgumentError(f"namespace.{name}", "must be at most 1024 characters")
        if self.shards > SHARDS_MAX:
            raise InvalidArgumentError(
                "namespace.layer_groups", f"layer_groups x head_groups must be at most {SHARDS_MAX}, not {self.shards}"
            )
        if self.layers % self.layer_groups:
            raise InvalidArgumentError(
                "namespace.layer_groups", f"must divide layers ({self.layers}), {self.layer_groups} does not"
            )
        if self.format_version != FORMAT_VERSION:
            raise InvalidArgumentError("namespace.format_version", f"must be {FORMAT_VERSION}")
        text = json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"))
        digest = hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()
        object.__setattr__(self, "digest", digest)

    @property
    def shards(self) -> int:
        """How many shards a whole block has."""
        return self.layer_groups * self.head_groups

    @property
    def shard_layers(self) -> int:
        """Layers in one shard: each has its own checksum."""
        return self.layers // self.layer_groups

    def differences(self, other: Namespace) -> list[str]:
        """Return the names of the fields in which the two differ."""
        theirs = other.as_dict()
        return [name for name, value in self.as_dict().items() if value != theirs[name]]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields (not the digest) as a plain dict."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}


@dataclass(frozen=True, slots=True)
class NodeAddress:
    """How to reach a node's bytes: TCP for everybody, the unix socket on the same host."""

    node_id: str
    host: str = ""
    port: int = 0
    socket_path: str = ""
    boot_id: str = ""

    @property
    def place(self) -> str:
        """What tells it from itself at another address: a node that starts again has another port, unless told."""
        return f"{self.node_id}@{self.host}:{self.port}"


class BackendState(IntEnum):
    """What a node can do with a storage backend."""

    UP = 0
    DOWN = 1
    READ_ONLY = 2


@dataclass(frozen=True, slots=True)
class Backend:
    """One shared directory or object store as a node sees it; ``id`` (16 bytes) is kept in the backend itself."""

    id: bytes
    url: str = ""
    capacity_bytes: int = 0
    state: BackendState = BackendState.UP
    reason: str = ""


_DIRECTORY_URLS = ("file://", "local://")


def directory_of(backend: str) -> str | None:
    """Return the directory that a storage backend's name means, with ``file://`` or without; None for any other URL."""
    if backend.startswith(_DIRECTORY_URLS):
        return backend.partition("://")[2]
    return None if "://" in backend else backend


class Reason(Enum):
    """Why a looked-up prefix ends where it does."""

    COMPLETE = "complete"
    NOT_STORED = "not_stored"
    NOT_WHOLE = "not_whole"
    OWNER_SUSPECT = "owner_suspect"
    WARMING = "warming"
    NAMESPACE_UNKNOWN = "namespace_unknown"
    NAMESPACE_MISMATCH = "namespace_mismatch"
    MASTER_UNREACHABLE = "master_unreachable"
    BREAKER_OPEN = "breaker_open"
    """Nobody was asked: who would know has failed several times in a row. Said by clients only."""


def pack_keys(hashes: bytes | bytearray | memoryview | Sequence[bytes], field: str = "hashes") -> bytes:
    """Return the keys of a chain as one bytes object, 16 bytes a block.

    Takes packed keys as they are, or a sequence of hashes of at least 16 bytes each (the first 16
    count). Raises InvalidArgumentError for odd lengths, a hash that is too short, or too many keys.
    """
    if isinstance(hashes, (bytes, bytearray, memoryview)):
        packed = bytes(hashes)
        if len(packed) % KEY_BYTES:
            raise InvalidArgumentError(field, f"packed keys must be a multiple of 16 bytes, not {len(packed)}")
    else:
        short = next((h for h in hashes if len(h) < KEY_BYTES), None)
        if short is not None:
            raise InvalidArgumentError(field, f"each hash must have at least 16 bytes, one has {len(short)}")
        packed = b"".join([h[:KEY_BYTES] for h in hashes])
    if len(packed) > KEYS_PER_CALL_MAX * KEY_BYTES:
        raise InvalidArgumentError(field, f"at most {KEYS_PER_CALL_MAX} keys a call")
    return packed


def split_keys(packed: bytes) -> list[bytes]:
    """Return packed keys one by one."""
    return [packed[i : i + KEY_BYTES] for i in range(0, len(packed), KEY_BYTES)]


def mask_shards(mask: int) -> list[int]:
    """Return the shard numbers of a bit mask, ascending."""
    return [s for s in range(mask.bit_length()) if mask >> s & 1]


_TEXT_CHARS_MAX = 64  # longer numbers are no sizes, and int() refuses them in its own words

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])I?)?B?\s*", re.IGNORECASE)
_SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(value: int | str, field: str) -> int:
    """Return bytes: ``107374182400``, ``"1GB"``, ``"1024MB"``, ``"1048576KB"``, ``"1.5GiB"``.

    Units are powers of 1024, as in Mooncake. Raises InvalidArgumentError naming ``field``.
    """
    allowed = 'bytes, or a number with KB, MB, GB or TB (powers of 1024), from 1 to 2**62, for example "1GB"'
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise InvalidArgumentError(field, f"{value!r} is not a size; allowed: {allowed}")
    if isinstance(value, int):
        size = value
    else:
        match = _SIZE.fullmatch(value) if len(value) <= _TEXT_CHARS_MAX else None
        if match is None:
            raise InvalidArgumentError(field, f"{value!r} is not a size; allowed: {allowed}")
        number, unit = match.groups()
        scale = _SIZE_UNITS[(unit or "").upper()]
        size = int(float(number) * scale) if "." in number else int(number) * scale
    if not 0 < size <= 1 << 62:
        raise InvalidArgumentError(field, f"{value!r} is out of range; allowed: {allowed}")
    return size


_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|min|h|d)?\s*", re.IGNORECASE)
_DURATION_MS = {"ms": 1, "s": 1000, "m": 60_000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}


def parse_duration_ms(value: float | str, field: str) -> int:
    """Return milliseconds: ``11000``, ``"11000"``, ``"5s"``, ``"1h"``, ``"250ms"``.

    A bare number is milliseconds, as in Mooncake. Raises InvalidArgumentError naming ``field``.
    """
    allowed = 'milliseconds, or a number with ms, s, m, h or d, from 1ms to 365d, for example "5s"'
    text = "" if isinstance(value, bool) else str(value)
    match = _DURATION.fullmatch(text) if len(text) <= _TEXT_CHARS_MAX else None
    if match is None:
        raise InvalidArgumentError(field, f"{value!r} is not a duration; allowed: {allowed}")
    number, unit = match.groups()
    ms = int(float(number) * _DURATION_MS[(unit or "ms").lower()])
    if not 0 < ms <= 365 * 86_400_000:
        raise InvalidArgumentError(field, f"{value!r} is out of range; allowed: {allowed}")
    return ms


def format_size(size: float) -> str:
    """Return bytes for people: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
