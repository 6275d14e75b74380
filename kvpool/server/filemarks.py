"""A node's mark in a directory that it writes into: kept up to date, and those of the dead taken over.

Between its rename and the master's word that it is catalogued, a file is known to its node alone. If the node dies
then, its mark stays behind, and says from when on files have to be looked for: by the node itself when it is back, or
else by whoever finds that nobody touches the mark any more. What a mark says moves on while its node lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Final

from kvpool.core.file_changes import FileChanges
from kvpool.processes import start_thread
from kvpool.server.fileworker import Batch
from kvpool.tiers.writers import Seen, Writers

log = logging.getLogger(__name__)

REFRESH_S: Final = 10.0
"""How often a mark is touched."""

STALE_S: Final = 60.0
"""A mark that was not touched for so long is its owner's no more. It may be wrong: that costs a scan.

Only the time of looks that succeed counts: while a filesystem is away, nobody can touch anything.
"""

CLOCK_S: Final = 5.0
"""How far a filesystem's timestamps may be from the order of events."""


class FileMark:
    """One directory's mark, and what is known of the others'; all methods belong to the loop's thread.

    ``since``: what we wrote later by the filesystem's clock may not be known to the master, None while we have no
    mark. ``batches`` are those given to threads, ``lost`` is called when there is something to scan for.
    """

    def __init__(
        self,
        writers: Writers,
        since: float | None,
        batches: set[Batch],
        changes: FileChanges,
        lost: Callable[[], None],
    ) -> None:
        self.since = since
        self._writers = writers
        self._batches = batches
        self._changes = changes
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._due = 0.0
        self._busy = False
        self._first = True
        self._taken: list[str] = []  # marks of which ours has taken the task
        self._seen: dict[str, tuple[int, int]] = {}  # touched, and how many looks ago we saw that first
        self._next: float | None = None  # ``since`` once all that is older is acknowledged
        self._waiting: set[Batch] = set()
        self._fence = 0

    @property
    def scan_since(self) -> float:
        """From when on files have to be looked for; 0.0: all."""
        return max(0.0, self.since - CLOCK_S) if self.since is not None else 0.0

    def tick(self, now: float, *, whole: bool) -> None:
        """Touch the mark when it is time. ``whole``: nothing has to be scanned for."""
        if now >= self._due and not self._busy:
            self._due = now + REFRESH_S
            taken, self._taken, self._busy = self._taken, [], True
            if start_thread(self._touch, "kvpool-mark", self.since, taken) is None:
                self._taken, self._busy = taken, False
        if self._next is None:
            return
        self._waiting &= self._batches
        if self._waiting:
            return
        if not self._fence:
            self._fence = self._changes.fence()
        if self._changes.settled >= self._fence:
            if whole:
                self.since = self._next
            self._next = None

    def settled(self) -> bool:
        """Whether the master knows of all that we have written, as far as changes tell."""
        return not self._batches and not self._changes

    def leave(self) -> None:
        """Remove the mark; blocks."""
        with contextlib.suppress(OSError):
            self._writers.leave()

    def _touch(self, since: float | None, taken: list[str]) -> None:
        """Keep our mark, then remove those whose task it names by now."""
        now: float | None = None
        others: dict[str, Seen] | None = None
        left = taken
        try:
            now = self._writers.keep(since)
            if now is not None:
                self._writers.drop(taken)
                left = []
                if not taken:  # that is between two looks
                    others = self._writers.others()
        except OSError as exc:
            log.debug("no mark can be kept: %s", exc)  # nor, then, can files be written
        with contextlib.suppress(RuntimeError):  # the loop is gone
            self._loop.call_soon_threadsafe(self._touched, now, others, left)

    def _touched(self, now: float | None, others: dict[str, Seen] | None, left: list[str]) -> None:
        self._busy = False
        self._taken = left
        if now is None:
            return
        if self.since is None:
            self.since = now
        if self._next is None:
            self._next, self._waiting, self._fence = now, set(self._batches), 0
        if others is not None and (dead := self._dead(others)):
            log.warning("%s did not end in order: what it wrote last is looked for", ", ".join(sorted(dead)))
            self.since = min(self.since, *(others[name].since for name in dead))
            self._taken, self._due = dead, 0.0
            self._lost()

    def _dead(self, others: dict[str, Seen]) -> list[str]:
        """Return the marks whose owners are gone: at first an earlier process of this node, later whoever is silent."""
        dead = [name for name in others if self._first and self._writers.ours(name)]
        self._first = False
        seen = self._seen
        self._seen = {}
        for name, mark in others.items():
            touched, looks = seen.get(name, (None, 0))
            looks = looks + 1 if touched == mark.touched else 0
            self._seen[name] = (mark.touched, looks)
            if looks * REFRESH_S >= STALE_S and name not in dead:
                dead.append(name)
        return dead
