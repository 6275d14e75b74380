"""``kvpoolctl fs scrub``: what writers left behind, and where files and catalog do not agree."""

from __future__ import annotations

from typing import Any

from kvpool.cli import fs_print, printers
from kvpool.cli.fs_catalog import Catalog
from kvpool.cli.fs_files import REMOVE_MAX, Verdict, check_files
from kvpool.cli.fs_verify import Disposal
from kvpool.model import format_size
from kvpool.tiers.store import BlockStore, FileName, StoredFile, StoreError


class Scrub:
    """One run over one backend; without a catalog only the backend itself is tidied."""

    def __init__(
        self,
        store: BlockStore,
        catalog: Catalog | None,
        *,
        threads: int,
        older_than_s: float,
        remove_unknown: bool,
        keep_aside: bool,
        dry_run: bool,
    ) -> None:
        self._store = store
        self._catalog = catalog
        self._threads = threads
        self._older_than_s = older_than_s
        self._remove_unknown = remove_unknown
        self._keep_aside = keep_aside
        self._dry_run = dry_run
        self._aside: list[tuple[str, int]] = []
        self._aside_removed = False
        self._leftovers = 0
        self._files = 0
        self._unknown: list[StoredFile] = []
        self._missing: list[FileName] = []
        self._broken: dict[str, str] = {}
        self._adopted = 0
        self._removed = 0
        self._forgotten = 0

    def run(self) -> None:
        """Look at everything, and tidy up unless it is a dry run. Raises StoreError, RemoteError."""
        self._compare()
        failed: StoreError | None = None
        if not self._dry_run:
            self._agree()
            try:
                self._leftovers = self._store.clean(self._older_than_s)
            except StoreError as error:  # what was set aside takes room, too
                failed = error
        self._aside = self._store.aside_files()
        if not (self._dry_run or self._keep_aside):
            self._store.drop_aside()
            self._aside_removed = True
        if failed is not None:
            raise failed

    def _compare(self) -> None:
        """Find what only one side knows. The catalog is asked before the files are listed, and again after."""
        if self._catalog is None:
            self._files = len(fs_print.listed(self._store))
            return
        before = self._catalog.files()
        files = fs_print.listed(self._store)
        self._files = len(files)
        there = {file.name for file in files}
        missing = [name for name, size in before.items() if size and name not in there]
        unknown = [file for file in files if file.name not in before]
        if missing or unknown:  # what was written or removed meanwhile is neither
            now = self._catalog.files()
            self._missing = [name for name in missing if now.get(name)]
            self._unknown = [file for file in unknown if file.name not in now]

    def _agree(self) -> None:
        if self._catalog is None:
            return
        if self._missing:
            self._forgotten = self._catalog.remove(self._missing)
        if self._remove_unknown:
            self._remove(self._catalog)
        else:
            self._adopt(self._catalog)

    def _remove(self, catalog: Catalog) -> None:
        """Remove unknown files, but not young ones: of what a node has just written the master hears later."""
        for at in range(0, len(self._unknown), REMOVE_MAX):
            some = [file.name for file in self._unknown[at : at + REMOVE_MAX]]
            old = self._store.older_than(some, self._older_than_s)
            self._store.remove(old)
            self._removed += len(old)
            if old:
                catalog.remove(old)  # it may have heard of one at the last moment

    def _adopt(self, catalog: Catalog) -> None:
        """Tell the master of unknown files that are whole; set aside those that are not."""
        spaces = {space.digest: space for space in self._store.namespaces()}
        dispose = Disposal(self._store, None, remove=False, dry_run=False)
        whole: dict[FileName, int] = {}
        with fs_print.reading(self._store.url, self._unknown) as (shown, task):
            for checked in check_files(self._store, self._unknown, spaces, self._threads):
                name = checked.file.name
                if checked.verdict is Verdict.WHOLE and name.namespace not in spaces:
                    self._broken[str(name)] = "whole, but its namespace has no descriptor here: left as it is"
                elif checked.verdict is Verdict.WHOLE:
                    whole[name] = checked.shard_bytes
                elif checked.verdict is not Verdict.GONE:
                    self._broken[str(name)] = checked.problem
                if checked.verdict is Verdict.BROKEN:
                    dispose(name)
                shown.advance(task, checked.file.bytes)
        self._adopted = catalog.add(whole, spaces)

    @property
    def clean(self) -> bool:
        """Whether files and catalog agreed."""
        return not (self._unknown or self._missing)

    def data(self) -> dict[str, Any]:
        """Return what was found and done as plain data."""
        return {
            "id": printers.backend_id(self._store.id),
            "url": self._store.url,
            "files": self._files,
            "compared": self._catalog is not None,
            "leftovers_removed": self._leftovers,
            "aside": [{"file": name, "bytes": size} for name, size in self._aside],
            "unknown": [str(file.name) for file in sorted(self._unknown)],
            "missing": sorted(map(str, self._missing)),
            "broken": [{"file": name, "reason": reason} for name, reason in sorted(self._broken.items())],
            "adopted": self._adopted,
            "removed": self._removed,
            "forgotten": self._forgotten,
        }

    def show(self) -> None:
        """Print what was found and done for people."""
        data = self.data()
        rows = [(name, "on storage, not in the catalog") for name in data["unknown"] if name not in self._broken]
        rows += [(name, "in the catalog, not on storage") for name in data["missing"]]
        rows += [(each["file"], each["reason"]) for each in data["broken"]]
        fs_print.print_problems(f"{self._store.url} and the catalog", ("file", "what"), rows)
        aside = sum(size for _, size in self._aside)
        words = [f"{self._files} files"]
        if self._catalog is not None:
            words.append(f"{len(self._unknown)} unknown to the catalog{self._said()}")
            words.append(f"{len(self._missing)} missing{', forgotten by the master' if self._forgotten else ''}")
        if not self._dry_run:
            words.append(f"{self._leftovers} leftovers of writers removed")
        kept = "were removed" if self._aside_removed else "are kept"
        if self._dry_run and not self._keep_aside:
            kept = "would be removed"
        words.append(f"{len(self._aside)} files set aside ({format_size(aside)}) {kept}")
        fs_print.say(f"{self._store.url}: {'; '.join(words)}")

    def _said(self) -> str:
        if self._dry_run or not self._unknown:
            return ""
        if self._remove_unknown:
            young = len(self._unknown) - self._removed
            return f", {self._removed} removed, {young} too young for that" if young else ", removed"
        return f", {self._adopted} adopted, {len(self._broken)} broken"
