"""``kvpoolctl fs verify``: every file of a backend is read again and compared with its checksums."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from kvpool.cli import fs_print, printers
from kvpool.cli.fs_catalog import Catalog
from kvpool.cli.fs_files import Checked, Verdict, check_files
from kvpool.cli.remote import RemoteError
from kvpool.model import Namespace, format_size
from kvpool.tiers.store import BlockStore, FileName, StoredFile, StoreError

UNREADABLE_MAX = 16
"""So many failures in a row are the backend's, not the files'."""


class Disposal:
    """What becomes of broken files. The master hears of it afterwards: it has what is said to be lost removed."""

    def __init__(self, store: BlockStore, catalog: Catalog | None, *, remove: bool, dry_run: bool) -> None:
        self._store = store
        self._catalog = catalog
        self._remove = remove
        self._dry_run = dry_run
        self.told = 0
        self.done = 0

    def said(self, broken: int) -> str:
        """Return what was done with so many broken files, in words."""
        if self._dry_run:
            return "left as they are"
        some = "" if self.done == broken else f"{self.done} of them "
        return some + ("removed" if self._remove else "set aside")

    def __call__(self, name: FileName) -> None:
        """Get rid of one file. Raises StoreError."""
        if self._dry_run:
            return
        if self._remove:
            self._store.remove([name])
        else:
            self._store.set_aside(name)
        self.done += 1
        if self._catalog is not None:
            try:
                self.told += self._catalog.remove([name])
            except RemoteError as error:  # a node that reads the file will notice too
                fs_print.note(f"the master could not be told: {error.message}")
                self._catalog = None


class Verification:
    """One run over one backend."""

    def __init__(
        self, store: BlockStore, catalog: Catalog | None, *, threads: int, remove: bool, dry_run: bool
    ) -> None:
        self._store = store
        self._threads = threads
        self._dispose = Disposal(store, catalog, remove=remove, dry_run=dry_run)
        self._bytes = 0
        self._seconds = 0.0
        self.found: dict[Verdict, list[Checked]] = {verdict: [] for verdict in Verdict}

    def run(self) -> None:
        """Read everything. Raises StoreError when the backend fails, not a file of it; what was found is kept."""
        store = self._store
        spaces = {space.digest: space for space in store.namespaces()}
        files = fs_print.listed(store)
        start = time.monotonic()
        try:
            self._read(files, spaces)
        finally:
            self._seconds = time.monotonic() - start

    def _read(self, files: Sequence[StoredFile], spaces: Mapping[bytes, Namespace]) -> None:
        store, in_a_row = self._store, 0
        with fs_print.reading(store.url, files) as (shown, task):
            for checked in check_files(store, files, spaces, self._threads):
                self.found[checked.verdict].append(checked)
                self._bytes += checked.file.bytes
                in_a_row = in_a_row + 1 if checked.verdict is Verdict.UNREADABLE else 0
                if in_a_row == UNREADABLE_MAX:
                    raise StoreError(f"{checked.problem}; {in_a_row} files in a row could not be read")
                if checked.verdict is Verdict.BROKEN:
                    self._dispose(checked.file.name)
                shown.advance(task, checked.file.bytes)

    @property
    def clean(self) -> bool:
        """Whether nothing was broken."""
        return not (self.found[Verdict.BROKEN] or self.found[Verdict.UNREADABLE])

    def data(self) -> dict[str, Any]:
        """Return what was found as plain data."""

        def named(verdict: Verdict) -> list[dict[str, Any]]:
            found = sorted(self.found[verdict], key=lambda each: each.file)
            return [{"file": str(each.file.name), "bytes": each.file.bytes, "reason": each.problem} for each in found]

        return {
            "id": printers.backend_id(self._store.id),
            "url": self._store.url,
            "files": sum(map(len, self.found.values())),
            "bytes": self._bytes,
            "seconds": round(self._seconds, 3),
            "whole": len(self.found[Verdict.WHOLE]),
            "gone": len(self.found[Verdict.GONE]),
            "broken": named(Verdict.BROKEN),
            "unreadable": named(Verdict.UNREADABLE),
            "disposed": self._dispose.done,
            "told_master": self._dispose.told,
        }

    def show(self) -> None:
        """Print what was found for people."""
        data = self.data()
        rows = [(each["file"], each["bytes"], each["reason"]) for each in data["broken"] + data["unreadable"]]
        fs_print.print_problems(f"Broken files in {self._store.url}", ("file", "bytes", "reason"), rows)
        rate = format_size(self._bytes / self._seconds) if self._seconds else format_size(self._bytes)
        text = f"{self._store.url}: {data['files']} files, {format_size(self._bytes)}, read at {rate}/s: "
        broken = len(data["broken"])
        text += f"{broken} broken, {self._dispose.said(broken)}" if broken else "none is broken"
        if data["unreadable"]:
            text += f"; {len(data['unreadable'])} could not be read, and were left"
        if data["gone"]:
            text += f"; {data['gone']} were removed meanwhile"
        if self._dispose.told:
            text += f"; the master was told of {self._dispose.told}"
        fs_print.say(text)
