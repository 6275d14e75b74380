"""What kvpoolctl fs prints: progress on standard error, and what was found as plain data and as tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from kvpool.cli import printers
from kvpool.cli.fs_files import SpaceUsage
from kvpool.core.allocator import round_up
from kvpool.model import Namespace, format_size
from kvpool.tiers.store import BlockStore, StoredFile

DISK_UNIT_BYTES = 4096
"""Files are counted in these, as the master does."""

ROWS_SHOWN = 200
LISTED_STEP = 1000


@contextmanager
def progress(*columns: Any) -> Iterator[Progress]:
    """Show progress on standard error if that is a terminal."""
    console = Console(stderr=True)
    with Progress(TextColumn("{task.description}"), *columns, console=console, transient=True,
                  disable=not sys.stderr.isatty()) as shown:  # fmt: skip
        yield shown


@contextmanager
def reading(url: str, files: Sequence[StoredFile]) -> Iterator[tuple[Progress, TaskID]]:
    """Show how many of the files' bytes have been read, and how fast."""
    with progress(BarColumn(), DownloadColumn(True), TransferSpeedColumn(), TimeRemainingColumn()) as shown:
        yield shown, shown.add_task(f"reading {url}", total=sum(file.bytes for file in files))


def listed(store: BlockStore) -> list[StoredFile]:
    """Return every file of a backend, and show how many there are meanwhile. Raises StoreError."""
    files: list[StoredFile] = []
    with progress(TextColumn("{task.completed:,.0f} files")) as shown:
        task = shown.add_task(f"listing {store.url}", total=None)
        for file in store.files():
            files.append(file)
            if len(files) % LISTED_STEP == 0:
                shown.update(task, completed=len(files))
    return files


def _spaces(store: BlockStore, usage: Mapping[bytes, SpaceUsage]) -> list[dict[str, Any]]:
    known: dict[bytes, Namespace] = {space.digest: space for space in store.namespaces()}
    found = []
    for digest, space in sorted(usage.items()):
        descriptor = known.get(digest)
        found.append(
            {
                "namespace": digest.hex(),
                "descriptor": descriptor.as_dict() if descriptor else None,
                "files": space.files,
                "bytes": space.bytes,
                "blocks": len(space.shards),
                "whole_blocks": space.whole(descriptor.shards) if descriptor else None,
            }
        )
    return found


def usage_data(store: BlockStore, usage: Mapping[bytes, SpaceUsage], used_bytes: int) -> dict[str, Any]:
    """Return what a backend holds and has left as plain data."""
    return {
        "id": printers.backend_id(store.id),
        "url": store.url,
        "capacity_bytes": store.capacity_bytes,
        "used_bytes": used_bytes,
        "free_bytes": store.free_bytes(),
        "files": sum(space.files for space in usage.values()),
        "namespaces": _spaces(store, usage),
    }


def used_bytes(files: Sequence[StoredFile]) -> int:
    """Return what files count against a backend's capacity."""
    return sum(round_up(file.bytes, DISK_UNIT_BYTES) for file in files)


def print_usage(backends: Sequence[Mapping[str, Any]]) -> None:
    """Print what backends hold and have left for people."""
    rows = [
        (
            each["url"],
            each["id"],
            printers.share(each["used_bytes"], each["capacity_bytes"]),
            "" if each["free_bytes"] is None else format_size(each["free_bytes"]),
            each["files"],
            len(each["namespaces"]),
        )
        for each in backends
    ]
    printers.print_table(
        "Storage, as its files say", ("backend", "id", "files' bytes", "free", "files", "namespaces"), rows
    )


def spaces_data(store: BlockStore, usage: Mapping[bytes, SpaceUsage]) -> dict[str, Any]:
    """Return the namespaces of a backend as plain data."""
    return {"id": printers.backend_id(store.id), "url": store.url, "namespaces": _spaces(store, usage)}


def print_spaces(backends: Sequence[Mapping[str, Any]]) -> None:
    """Print the namespaces of backends for people."""
    rows = []
    for backend in backends:
        for each in backend["namespaces"]:
            descriptor = each["descriptor"] or {"model": "(no descriptor)", "dtype": ""}
            whole = "" if each["whole_blocks"] is None else f"{each['whole_blocks']} of {each['blocks']}"
            rows.append(
                (
                    backend["url"],
                    each["namespace"],
                    descriptor["model"],
                    descriptor["dtype"],
                    each["files"],
                    whole or each["blocks"],
                    format_size(each["bytes"]),
                )
            )
    if rows:
        printers.print_table(
            "Namespaces", ("backend", "namespace", "model", "dtype", "files", "whole blocks", "bytes"), rows
        )
    else:
        click.echo("there are no files")


def files_data(store: BlockStore, files: Sequence[StoredFile]) -> dict[str, Any]:
    """Return files as plain data."""
    return {
        "id": printers.backend_id(store.id),
        "url": store.url,
        "files": [
            {
                "namespace": name.namespace.hex(),
                "key": name.key.hex(),
                "shard": name.shard,
                "bytes": size,
            }
            for name, size in sorted(files)
        ],
    }


def print_problems(title: str, headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print some rows for people; how many more there are is said below."""
    if not rows:
        return
    printers.print_table(title, headings, rows[:ROWS_SHOWN])
    if len(rows) > ROWS_SHOWN:
        click.echo(f"{len(rows) - ROWS_SHOWN} more are not shown; --json has all")


def say(text: str) -> None:
    """Print a line that has names from elsewhere in it."""
    click.echo(printers.plain(text).plain)


def note(text: str) -> None:
    """Print a line that is no result, on standard error."""
    click.echo(printers.plain(f"note: {text}").plain, err=True)
