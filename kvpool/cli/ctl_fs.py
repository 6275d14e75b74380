"""``kvpoolctl fs usage | ls | verify | scrub``: the files of storage backends, looked at directly."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from kvpool.cli import fs_files, fs_print, printers
from kvpool.cli.fs_catalog import Catalog
from kvpool.cli.fs_files import BoundedStore, answered
from kvpool.cli.fs_files import usage as usage_of
from kvpool.cli.fs_scrub import Scrub
from kvpool.cli.fs_verify import Verification
from kvpool.cli.options import CONTEXT, RefusedUsage, load_settings, one_line_errors
from kvpool.cli.remote import ExitCode, Remote, RemoteError, asks_master
from kvpool.config import NodeSettings, default_pipeline
from kvpool.errors import ConfigError, KVPoolError
from kvpool.model import directory_of, parse_duration_ms
from kvpool.rpc.v1 import admin_pb2
from kvpool.tiers.opening import open_store, public
from kvpool.tiers.store import BlockStore, StoreError

F = TypeVar("F", bound=Callable[..., Any])


@click.group("fs", context_settings=CONTEXT)
def fs() -> None:
    """Look after the files of storage backends. Works without a pool; a master that answers is told.

    BACKEND is a directory or an fsspec URL, as in the nodes' --storage_backends; without any, those of --config
    or KVPOOL_STORAGE_BACKENDS are meant, and usage asks the master.

    \b
    Examples:
      kvpoolctl fs usage
      kvpoolctl fs verify /mnt/kv
      kvpoolctl fs ls s3://bucket/pool --storage_options '{"endpoint_url": "http://10.0.0.9:9000"}'
    """


def backend_options(function: F) -> F:
    """Give a command its backends, and what it takes to open them."""
    decorators = (
        click.argument("backends", nargs=-1, metavar="[BACKEND]..."),
        click.option("--storage_options", metavar="JSON", help="Options of an fsspec URL.  [KVPOOL_STORAGE_OPTIONS]"),
        click.option("--config", metavar="FILE", help="A node's YAML or JSON file.  [KVPOOL_CONFIG]"),
    )
    for decorate in reversed(decorators):
        function = decorate(function)
    return function


def threads_option(function: F) -> F:
    """Give a command its number of threads."""
    option = click.option(
        "--threads", type=click.IntRange(1, 64), default=4, show_default=True, help="Files read at once."
    )
    return option(function)


def _open(url: str, owner: str, options: Mapping[str, Any] | None) -> BlockStore:
    """Open a backend, and make none. Raises RefusedUsage for what is none, StoreError, StalledError where one fails."""
    try:
        store = answered(
            public(url), lambda: open_store(url, owner=owner, options=options, create=False), fs_files.STALLED_S
        )
    except ConfigError as error:
        why = error.__cause__
        absent = isinstance(why, (FileNotFoundError, NotADirectoryError))
        if isinstance(why, (StoreError, OSError)) and not absent:
            raise StoreError(error.problem) from None
        raise RefusedUsage(str(error)) from None
    return BoundedStore(store)


@contextmanager
def opened(backends: Sequence[str], storage_options: str | None, config: str | None) -> Iterator[list[BlockStore]]:
    """Yield the backends that are meant, opened; none of them is made. Ends the program with one line."""
    flags: dict[str, Any] = {"storage_backends": backends or None, "storage_options": storage_options}
    if backends:  # whatever is configured for a node, these are to be opened
        flags["pipeline"] = default_pipeline(backends)
        if storage_options is None and all(directory_of(backend) is not None for backend in backends):
            flags["storage_options"] = {}  # those of a file or the environment are for URLs
    settings = load_settings(NodeSettings, flags, config).settings
    if not settings.storage_backends:
        raise click.UsageError("name a BACKEND: a directory, or a URL; or set KVPOOL_STORAGE_BACKENDS")
    owner = f"kvpoolctl-{socket.gethostname()}-{os.getpid()}"
    stores: list[BlockStore] = []
    try:
        for url in settings.storage_backends:
            options = settings.storage_options if directory_of(url) is None else None
            stores.append(_open(url, owner, options))
        yield stores
    except StoreError as error:
        raise RemoteError(ExitCode.UNREACHABLE, f"the backend fails: {error}") from None
    except KVPoolError as error:
        raise RemoteError(ExitCode.UNREACHABLE, str(error)) from None
    finally:
        for store in stores:
            store.close()


def find_catalog(remote: Remote, store: BlockStore) -> Catalog | None:
    """Return the master's side of a backend; without one, say on standard error why and what that means."""
    catalog, why = Catalog.find(remote, store.id)
    if catalog is None:
        click.echo(printers.plain(f"note: {store.url}: only the files are looked at: {why}").plain, err=True)
    return catalog


@fs.command("usage", context_settings=CONTEXT)
@backend_options
@asks_master
def usage(remote: Remote, backends: tuple[str, ...], storage_options: str | None, config: str | None) -> None:
    """How much is stored: in every backend, as the master counts it; or in BACKEND, by looking. Exit code 1: none.

    \b
    Examples:
      kvpoolctl fs usage
      kvpoolctl fs usage /mnt/kv --json | jq .backends[0].used_bytes
    """
    if not backends:
        reply = remote.call("Backends", admin_pb2.BackendsRequest())
        known = [printers.backend_data(backend) for backend in reply.backends]
        if remote.as_json:
            printers.print_json({"backends": known})
        elif known:
            printers.print_backends(known)
        else:
            click.echo("no node has announced a storage backend; start one with --storage_backends DIR")
        if not known:
            raise click.exceptions.Exit(ExitCode.NOTHING)
        return
    with opened(backends, storage_options, config) as stores:
        seen = []
        for store in stores:
            files = fs_print.listed(store)
            seen.append(fs_print.usage_data(store, usage_of(files), fs_print.used_bytes(files)))
    if remote.as_json:
        printers.print_json({"backends": seen})
    else:
        fs_print.print_usage(seen)


@fs.command("ls", context_settings=CONTEXT)
@backend_options
@click.option("--namespace", metavar="HEX", help="Only of namespaces whose digest begins so.")
@click.option("--blocks", is_flag=True, help="Every file: its bytes and name.")
@asks_master
def ls(
    remote: Remote,
    backends: tuple[str, ...],
    storage_options: str | None,
    config: str | None,
    namespace: str | None,
    blocks: bool,
) -> None:
    """List what a backend holds: its namespaces, or with --blocks its files. Exit code 1 when that is nothing.

    \b
    Examples:
      kvpoolctl fs ls /mnt/kv
      kvpoolctl fs ls /mnt/kv --blocks --namespace 4be1
    """
    prefix = (namespace or "").lower()
    found = 0
    with opened(backends, storage_options, config) as stores:
        data = []
        for store in stores:
            if blocks and not remote.as_json:
                for file in store.files():
                    if str(file.name).startswith(prefix):
                        found += 1
                        click.echo(f"{file.bytes:>12} {file.name}")
                continue
            files = [file for file in fs_print.listed(store) if str(file.name).startswith(prefix)]
            found += len(files)
            data.append(fs_print.files_data(store, files) if blocks else fs_print.spaces_data(store, usage_of(files)))
    if remote.as_json:
        printers.print_json({"backends": data})
    elif not blocks:
        fs_print.print_spaces(data)
    if not found:
        raise click.exceptions.Exit(ExitCode.NOTHING)


@contextmanager
def shown(remote: Remote) -> Iterator[list[Verification | Scrub]]:
    """Take runs, and show what they found, even if an error ends them; end with exit code 1 if that is something."""
    runs: list[Verification | Scrub] = []
    try:
        yield runs
    finally:
        if runs and remote.as_json:
            printers.print_json({"backends": [run.data() for run in runs]})
        elif runs:
            for run in runs:
                run.show()
    if not all(run.clean for run in runs):
        raise click.exceptions.Exit(ExitCode.NOTHING)


@fs.command("verify", context_settings=CONTEXT)
@backend_options
@threads_option
@click.option("--remove", is_flag=True, help="Remove what is broken instead of setting it aside.")
@click.option("--dry_run", is_flag=True, help="Only report.")
@asks_master
def verify(
    remote: Remote,
    backends: tuple[str, ...],
    storage_options: str | None,
    config: str | None,
    threads: int,
    remove: bool,
    dry_run: bool,
) -> None:
    """Read every file again and compare its checksums. What is broken is set aside, and the master is told.

    Exit code 1 when something was broken or could not be read.

    \b
    Examples:
      kvpoolctl fs verify /mnt/kv
      kvpoolctl fs verify /mnt/kv --dry_run --json | jq -r '.backends[].broken[].file'
    """
    if remove and dry_run:
        raise click.UsageError("--remove and --dry_run exclude each other")
    with opened(backends, storage_options, config) as stores, shown(remote) as runs:
        for store in stores:
            catalog = None if dry_run else find_catalog(remote, store)
            run = Verification(store, catalog, threads=threads, remove=remove, dry_run=dry_run)
            runs.append(run)
            run.run()


def _must_know_all(catalog: Catalog | None) -> None:
    """Raise RemoteError unless a file that the master does not know is nobody's."""
    if catalog is None or not catalog.settled():
        raise RemoteError(
            ExitCode.UNREACHABLE,
            "remove_unknown: needs a master that knows the backend and has read its catalog: "
            "without one every file is unknown",
        )
    if away := catalog.away():
        raise RemoteError(
            ExitCode.UNREACHABLE,
            f"remove_unknown: the master hears nothing of {', '.join(away)}: what is written there may be unknown",
        )


@fs.command("scrub", context_settings=CONTEXT)
@backend_options
@threads_option
@click.option(
    "--older_than", metavar="DURATION", default="1h", show_default=True,
    help="Temporary files of others, this old, were left behind; younger unknown files are not removed.",
)  # fmt: skip
@click.option(
    "--remove_unknown", is_flag=True, help="Remove files that the catalog does not know; else they are adopted."
)
@click.option("--keep_aside", is_flag=True, help="Keep the broken files that were set aside.")
@click.option("--dry_run", is_flag=True, help="Only report.")
@asks_master
def scrub(
    remote: Remote,
    backends: tuple[str, ...],
    storage_options: str | None,
    config: str | None,
    threads: int,
    older_than: str,
    remove_unknown: bool,
    keep_aside: bool,
    dry_run: bool,
) -> None:
    """Tidy up: leftovers of writers that died, files set aside, and what files and catalog do not agree about.

    Exit code 1 when something did not agree, or was broken.

    \b
    Examples:
      kvpoolctl fs scrub /mnt/kv --dry_run
      kvpoolctl fs scrub /mnt/kv --older_than 10m
      kvpoolctl fs scrub /mnt/kv --remove_unknown
    """
    with one_line_errors():
        older_than_s = parse_duration_ms(older_than, "older_than") / 1000
    with opened(backends, storage_options, config) as stores, shown(remote) as runs:
        for store in stores:
            catalog = find_catalog(remote, store)
            if remove_unknown:
                _must_know_all(catalog)
            run = Scrub(
                store, catalog, threads=threads, older_than_s=older_than_s,
                remove_unknown=remove_unknown, keep_aside=keep_aside, dry_run=dry_run,
            )  # fmt: skip
            runs.append(run)
            run.run()
