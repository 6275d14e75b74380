"""What a node has to tell the master of files: kept until the master says that it will not forget it.

Pure. The catalog remembers files when their node is long gone, and no inventory names them: so a change is
told again until it is acknowledged, whatever happened to the delta that carried it. Only the last change of
a file counts.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Final

from kvpool.core.messages import BlockRun
from kvpool.model import DIGEST_BYTES

CHANGES_MAX: Final = 1 << 18
"""Changes that are kept while no master takes them; beyond, the backends are scanned."""

_Change = tuple[bytes, bytes, int]  # backend, namespace digest and key, shard
_Changes = dict[_Change, tuple[int, bool]]  # shard_bytes, added


class FileChanges:
    """The changes that are not acknowledged, told ones under the delta that told them."""

    def __init__(self, changes_max: int = CHANGES_MAX) -> None:
        """Keep at most ``changes_max``."""
        self.lost: set[bytes] = set()  # backends of which changes were given up: to be scanned
        self._changes_max = changes_max
        self._untold: _Changes = {}
        self._told: deque[tuple[int, _Changes, int]] = deque()  # delta, what it told, fence or 0
        self._told_count = 0
        self._fences = 0
        self._fence_due = False
        self.settled = 0
        """The newest fence before which all is acknowledged."""

    def __len__(self) -> int:
        """Return how many changes are not acknowledged."""
        return len(self._untold) + self._told_count

    @property
    def untold(self) -> bool:
        """Whether there is something to tell."""
        return bool(self._untold) or self._fence_due

    def fence(self) -> int:
        """Return a number: once ``settled`` is not less, all that was noted, and all that was sent, is acknowledged.

        What was sent in a session that has ended since is not meant.
        """
        self._fences += 1
        self._fence_due = True
        return self._fences

    def note(self, backend: bytes, block_key: bytes, shard: int, shard_bytes: int, added: bool) -> None:
        """Keep a change: a file is there from now on, or it is gone."""
        self._untold[backend, block_key, shard] = (shard_bytes, added)
        if len(self) > self._changes_max:
            self.lost |= {change[0] for _, told, _ in self._told for change in told}
            self.lost |= {change[0] for change in self._untold}
            self._untold.clear()
            self._told.clear()
            self._told_count = 0
            self._fence_due = self._fences > self.settled

    def take(self, changes_max: int) -> tuple[_Changes, tuple[BlockRun, ...], tuple[BlockRun, ...]]:
        """Return the oldest untold changes, and as runs: those added, those removed."""
        if len(self._untold) <= changes_max:
            taken, self._untold = self._untold, {}
        else:
            taken = {change: self._untold[change] for change in islice(self._untold, changes_max)}
            for change in taken:
                del self._untold[change]
        groups: dict[tuple[bytes, bytes, int, int, bool], list[bytes]] = {}
        for (backend, block_key, shard), (size, added) in taken.items():
            kind = (backend, block_key[:DIGEST_BYTES], shard, size, added)
            groups.setdefault(kind, []).append(block_key[DIGEST_BYTES:])
        runs: dict[bool, list[BlockRun]] = {True: [], False: []}
        for (backend, namespace, shard, size, added), keys in groups.items():
            runs[added].append(BlockRun(namespace, 1 << shard, size, b"".join(keys), backend=backend))
        return taken, tuple(runs[True]), tuple(runs[False])

    def told(self, sequence: int, changes: _Changes) -> None:
        """Say which delta carries what ``take`` has returned, or the last of several deltas that do."""
        fence = self._fences if self._fence_due and not self._untold else 0
        if fence:
            self._fence_due = False
        if changes or fence:
            self._told.append((sequence, changes, fence))
            self._told_count += len(changes)

    def acknowledged(self, sequence: int) -> None:
        """Forget what deltas up to this one have told."""
        while self._told and self._told[0][0] <= sequence:
            _, changes, fence = self._told.popleft()
            self._told_count -= len(changes)
            self.settled = max(self.settled, fence)

    def tell_again(self) -> None:
        """Count everything that is not acknowledged as not told."""
        again: _Changes = {}
        for _, changes, _ in self._told:
            again.update(changes)
        again.update(self._untold)
        self._untold = again
        self._told.clear()
        self._told_count = 0
        self._fence_due = self._fences > self.settled
