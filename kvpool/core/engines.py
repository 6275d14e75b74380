"""Engines that have announced themselves: where requests reach them, and what they do. For routers and people.

An engine announces itself again and again; one that falls silent is forgotten. Nothing of it is kept
over a restart of the master: engines that live say it again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvpool.errors import InvalidArgumentError, OverloadedError
from kvpool.model import DIGEST_BYTES

ENGINES_MAX = 1024
ROLES = ("kv_both", "kv_producer", "kv_consumer")
NAME_CHARS_MAX = 256
BOOT_ID_CHARS_MAX = 64
NAMESPACES_MAX = 16
PARALLEL_MAX = 1 << 16
DEVICES_MAX = 4096
DEVICE_CHARS_MAX = 128


@dataclass(frozen=True, slots=True)
class Announcement:
    """What an engine says of itself; the meaning of each field is in proto/kvpool/v1/master.proto."""

    owner: int
    engine: str
    role: str
    address: str = ""
    model: str = ""
    namespaces: tuple[bytes, ...] = ()
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel_rank: int = 0
    host: str = ""
    boot_id: str = ""
    devices: tuple[str, ...] = ()
    transfers: bool = False
    layerwise: bool = False
    loads: bool = False
    residency: bool = False


@dataclass(slots=True)
class Engine:
    """An engine process that announces itself, and when it did so last."""

    said: Announcement
    last_seen: float


class Engines:
    """All engines that have announced themselves, by owner. Times are the master's uptime, in seconds."""

    def __init__(self, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        self.engines: dict[int, Engine] = {}

    def __len__(self) -> int:
        return len(self.engines)

    def announce(self, said: Announcement, now: float) -> None:
        """Take in what an engine says of itself. Raises InvalidArgumentError, OverloadedError."""
        check(said)
        if said.owner not in self.engines and len(self.engines) >= ENGINES_MAX:
            raise OverloadedError(f"{ENGINES_MAX} engines have announced themselves already")
        self.engines[said.owner] = Engine(said, now)

    def leave(self, owner: int) -> None:
        """Forget an engine that ends. Idempotent. Raises InvalidArgumentError."""
        _check_owner(owner)
        self.engines.pop(owner, None)

    def expire(self, now: float) -> None:
        """Forget engines that were not heard of for too long."""
        for owner in [owner for owner, engine in self.engines.items() if now - engine.last_seen > self.ttl_s]:
            del self.engines[owner]


def check(said: Announcement) -> None:
    """Raise InvalidArgumentError, naming the field, for what no engine would say."""
    _check_owner(said.owner)
    _check_text("engine", said.engine, least=1)
    if said.role not in ROLES:
        raise InvalidArgumentError("role", f"must be one of {', '.join(ROLES)}, not {said.role[:NAME_CHARS_MAX]!r}")
    _check_text("address", said.address)
    if said.address and not _is_address(said.address):
        raise InvalidArgumentError("address", f"must be HOST:PORT, or empty, not {said.address!r}")
    _check_text("model", said.model)
    _check_text("host", said.host)
    _check_text("boot_id", said.boot_id, most=BOOT_ID_CHARS_MAX)
    if len(said.namespaces) > NAMESPACES_MAX or any(len(digest) != DIGEST_BYTES for digest in said.namespaces):
        raise InvalidArgumentError("namespaces", f"must be {DIGEST_BYTES} bytes each, at most {NAMESPACES_MAX} of them")
    for name, least in (("tensor_parallel", 1), ("pipeline_parallel", 1), ("data_parallel_rank", 0)):
        value = getattr(said, name)
        if not least <= value <= PARALLEL_MAX:
            raise InvalidArgumentError(name, f"must be from {least} to {PARALLEL_MAX}, not {value}")
    if len(said.devices) > DEVICES_MAX:
        raise InvalidArgumentError("devices", f"must be at most {DEVICES_MAX}, not {len(said.devices)}")
    _check_texts("devices", said.devices, DEVICE_CHARS_MAX)


def _check_owner(owner: int) -> None:
    if not owner:
        raise InvalidArgumentError("owner", "must not be 0")


def _check_text(name: str, text: str, *, least: int = 0, most: int = NAME_CHARS_MAX) -> None:
    if not least <= len(text) <= most or not text.isprintable():
        raise InvalidArgumentError(name, f"must have {least} to {most} printable characters")


def _check_texts(name: str, texts: Iterable[str], most: int) -> None:
    for text in texts:
        _check_text(name, text, least=1, most=most)


def _is_address(text: str) -> bool:
    """Whether it is HOST:PORT; an IPv6 host stands in brackets."""
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1].replace(":", "")
    plain = bool(host) and not any(c in host for c in "/:[]@?# ")
    return plain and port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 1 << 16
