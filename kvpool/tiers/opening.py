"""From the name of a backend, a directory or a URL, to its store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvpool.errors import ConfigError
from kvpool.model import directory_of
from kvpool.tiers.posix import FSYNC, PosixStore
from kvpool.tiers.store import BlockStore


def open_store(
    url: str,
    *,
    owner: str,
    capacity_bytes: int | None = None,
    options: Mapping[str, Any] | None = None,
    direct: bool = True,
    fsync: str = "off",
    create: bool = True,
) -> BlockStore:
    """Open a directory or a fsspec URL (``options`` are its) as a backend; make it one if it is none, and ``create``.

    file:// is a directory. ``owner`` is unique to this process; ``capacity_bytes`` counts for who makes the backend,
    90 % of what is free by default; ``direct`` allows O_DIRECT; ``fsync`` is off, data or full. Raises
    ConfigError("storage_backends").
    """
    if fsync not in FSYNC:
        raise ConfigError("storage_fsync", f"must be one of {', '.join(FSYNC)}, not {fsync!r}")
    directory = directory_of(url)  # nothing that fsspec does with one is better
    if directory is None:
        from kvpool.tiers.object import ObjectStore

        return ObjectStore(url, owner=owner, capacity_bytes=capacity_bytes, options=options, create=create)
    if not directory:
        raise ConfigError("storage_backends", "an empty name is no directory")
    if options:
        raise ConfigError("storage_options", f"means nothing for a directory such as {directory}")
    return PosixStore(directory, owner=owner, capacity_bytes=capacity_bytes, direct=direct, fsync=fsync, create=create)


def public(url: str) -> str:
    """Return a backend's name as it may be shown and kept: without user, password and query."""
    protocol, mark, rest = url.partition("://")
    if not mark:
        return url
    host, slash, path = rest.partition("?")[0].partition("/")
    return f"{protocol}://{host.rpartition('@')[2]}{slash}{path}"


def check_urls(urls: Iterable[str]) -> None:
    """Raise ConfigError("storage_backends") for a URL that fsspec has no filesystem for, without opening anything."""
    remote = [url for url in urls if directory_of(url) is None]
    if not remote:
        return
    from fsspec import available_protocols  # takes longer than all else here, for what most do without

    for url in remote:
        protocol = url.partition("://")[0].partition("::")[0]
        if protocol not in available_protocols():
            raise ConfigError("storage_backends", f'fsspec knows no "{protocol}://"; it knows s3, gs, abfs, and others')
