"""What the master knows of storage backends: who serves them, what they hold, what must be removed.

A backend is an incarnation of tier ``fs`` in the index. Its files stay when nodes come and go; they can be
hits while some node that is alive serves it. What is evicted from it is *doomed* first, which takes it out
of the index and is kept in the catalog, then removed by one of its nodes, and forgotten when that is confirmed.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from kvpool.core.effects import BackendChanged, CatalogBackend, CatalogFiles, Effect, FileChange, Send
from kvpool.core.file_removals import FileRemovals
from kvpool.core.index import Index
from kvpool.core.keytable import Rows
from kvpool.core.messages import BlockRun, FilesRemoved, Hello, Scan, Scanned, StorageLimits
from kvpool.core.nodes import MasterLimits, Node, slices_of
from kvpool.core.removals import Removals, Why
from kvpool.core.storage import StorageBackend, named, names
from kvpool.model import Backend, BackendState, NodeAddress, mask_shards

TIER = "fs"

DOOMED_MAX = 16384
"""Files that may await their removal before more are evicted to make room."""

SCAN_RETRY_S = 60.0
EVICTION_AGAIN_S = 5.0  # after a walk through the whole index that has not found enough

_PRESENT = frozenset({"live", "warming"})


class Backends:
    """Every backend. ``drop_rest`` asks other owners to drop blocks that are whole no more."""

    def __init__(
        self, index: Index, nodes: dict[str, Node], limits: MasterLimits, counters: Counter[str],
        removals: Removals, jobs: deque[Iterator[list[Effect]]], number: Callable[[], int],
        drop_rest: Callable[[Rows], list[Effect]],
    ) -> None:  # fmt: skip
        self.by_id: dict[bytes, StorageBackend] = {}
        self.loading = False  # the catalog is still being read
        self.earlier: dict[int, float] | None = None
        """To which generation the catalog has what a master has acknowledged, by epoch; None: there is no catalog."""
        self.removing = FileRemovals(index, counters)
        self._index = index
        self._nodes = nodes
        self._limits = limits
        self._counters = counters
        self._removals = removals
        self._jobs = jobs
        self._number = number
        self._drop_rest = drop_rest
        self._by_incarnation: dict[int, StorageBackend] = {}

    # ---- who serves it -------------------------------------------------------------------------

    def of(self, backend_id: bytes) -> StorageBackend:
        """Return a backend, made on first sight."""
        backend = self.by_id.get(backend_id)
        if backend is None:
            backend = self.by_id[backend_id] = StorageBackend(backend_id, self._number())
            self._by_incarnation[backend.incarnation] = backend
            self._index.file_bytes[backend.incarnation] = 0
        return backend

    def at(self, incarnation: int) -> StorageBackend | None:
        """Return the backend that an incarnation is, None for a node's."""
        return self._by_incarnation.get(incarnation)

    def used_bytes(self, backend: StorageBackend) -> int:
        """Return what its files take, without those that are to be removed."""
        return self._index.file_bytes[backend.incarnation]

    def blocks(self, backend: StorageBackend) -> int:
        """Return how many blocks it has something of."""
        return self._index.blocks_on.get(backend.incarnation, 0)

    def hello(self, node: Node, hello: Hello) -> list[Effect]:
        """Take in the backends of a node that begins a session, and tell it which of them are full."""
        self._forget_scans(node)
        self.removing.late(node.address.node_id)
        effects = self._compare(hello.kept_by, hello.generation) + self.announce(node, hello.backends)
        return effects + self._limits_of(node) if hello.backends else effects

    def _compare(self, epoch: int, generation: int) -> list[Effect]:
        """Have all backends scanned if a master has acknowledged what this catalog does not have.

        It was put back, or has lost its end, or that master had another one.
        """
        if self.earlier is None or generation <= self.earlier.get(epoch, 0):
            return []
        self.earlier[epoch] = math.inf
        what = "is to be scanned: the catalog lacks what a master has acknowledged"
        return self.tell_again() + [BackendChanged(b.name, what, bad=True) for b in self.by_id.values()]

    def announce(self, node: Node, seen: tuple[Backend, ...]) -> list[Effect]:
        """Take in how a node sees its backends: all of them, whatever it said before."""
        effects: list[Effect] = []
        news = False
        named = {backend.id for backend in seen}
        for backend in self.by_id.values():
            if backend.id not in named and backend.servers.pop(node.address.node_id, None) is not None:
                self._judge(backend)
        for told in seen:
            backend = self.of(told.id)
            before = backend.servers.get(node.address.node_id)
            backend.servers[node.address.node_id] = told
            if told.capacity_bytes and (told.capacity_bytes != backend.capacity_bytes or told.url != backend.url):
                backend.url, backend.capacity_bytes = told.url or backend.url, told.capacity_bytes
                effects.append(self._keep(backend))
            self._judge(backend)
            if (before.state if before else BackendState.UP) is not told.state:
                what = f"is {told.state.name.lower()} at node {node.address.node_id}"
                bad = told.state is not BackendState.UP
                effects.append(BackendChanged(backend.name, f"{what}: {told.reason}" if bad else what, bad))
            news |= before is None or (before.state is not told.state and told.state is BackendState.UP)
        return effects + self._limits_of(node) if news else effects

    def judge(self, node: Node) -> None:
        """Bring what lookups may count on in line with a node's new state."""
        for backend in self.by_id.values():
            if node.address.node_id in backend.servers:
                self._judge(backend)
        if node.state != "live":
            self.removing.late(node.address.node_id)
        if node.session is None:
            self._forget_scans(node)

    def _forget_scans(self, node: Node) -> None:
        """A scan ends with its session: what it has found meanwhile is lost, so it begins again."""
        for backend in self.by_id.values():
            if backend.scanner == node.address.node_id:
                backend.scanner, backend.scan_wanted = "", True

    def forget(self, node: Node) -> None:
        """Forget a node that is gone for long."""
        self.removing.forget(node.address.node_id)
        for backend in self.by_id.values():
            backend.servers.pop(node.address.node_id, None)

    def _judge(self, backend: StorageBackend) -> None:
        backend.live = bool(self.serving(backend))
        self._index.placements.set_live(backend.incarnation, live=backend.live)

    def serving(self, backend: StorageBackend) -> list[Node]:
        """Return the nodes that can read it now."""
        return [
            node
            for node_id, seen in backend.servers.items()
            if seen.state is not BackendState.DOWN
            and (node := self._nodes.get(node_id)) is not None
            and node.state in _PRESENT
            and node.session is not None
        ]

    def reach(self, incarnation: int) -> tuple[NodeAddress, bytes] | None:
        """Return a node that reads a backend's files for others, in turns, and the backend's id."""
        backend = self._by_incarnation.get(incarnation)
        nodes = self.serving(backend) if backend is not None and backend.live else []
        if backend is None or not nodes:
            return None
        backend.turn += 1
        return nodes[backend.turn % len(nodes)].address, backend.id

    # ---- what it holds -------------------------------------------------------------------------

    def add(self, piece: BlockRun, node_id: str) -> list[Effect]:
        """Files were written, or seen, by a node: of a known namespace, with shards that it has.

        That is no use of a block: blocks whose files still wait to be written must not be colder than the others.
        """
        backend = self.of(piece.backend)
        self._note_told(backend, piece, node_id)
        runs, effects = self.removing.there(backend, piece, node_id)
        for run in runs:
            self._counters["files_added"] += len(run)
            effects += self._enter(backend, run)
        return effects

    def _enter(self, backend: StorageBackend, piece: BlockRun) -> list[Effect]:
        """Put files into the index; those that find no room there are of no use, and are removed."""
        refused = self._index.add(piece, backend.incarnation, TIER, touch=False)
        run = BlockRun(piece.namespace, piece.shards, piece.shard_bytes, refused)
        return self.removing.doom(backend, run) if refused else []

    def remove(self, piece: BlockRun, now: float) -> list[Effect]:
        """Files are missing or broken, as somebody says.

        Another node may have written them again since, and may have been faster to say so: what is in the index
        no more must not be in the storage either, so they are removed like evicted ones.
        """
        backend = self.of(piece.backend)
        self._note_told(backend, piece, None)
        rows, broken = self._index.remove(piece, backend.incarnation, TIER)
        self._counters["files_lost"] += len(rows)
        effects: list[Effect] = []
        if len(rows):
            keys = self._index.keys.take(rows, axis=0).tobytes()
            size = int(self._index.shard_bytes.take(rows).max())
            effects = self.removing.doom(backend, BlockRun(piece.namespace, piece.shards, size, keys))
        self._note(backend, piece.namespace, rows, Why.FILE_LOST, now)
        return [*effects, CatalogFiles(backend.id, FileChange.LOST, (piece,)), *self._drop_rest(broken)]

    def _note(self, backend: StorageBackend, namespace: bytes, rows: Rows, why: Why, now: float) -> None:
        keys = self._index.keys.take(rows, axis=0)
        self._removals.push(keys, self._index.spaces[namespace].number if len(rows) else 0, why, backend.name, now)

    def load(self, files: Iterator[tuple[BlockRun, ...]], doomed: Iterator[tuple[BlockRun, ...]]) -> None:
        """Take in, as long work, the files that the catalog has, and those that it has as doomed."""
        self.loading = True
        self._jobs.append(self._load(files, doomed))

    def _load(
        self, files: Iterator[tuple[BlockRun, ...]], doomed: Iterator[tuple[BlockRun, ...]]
    ) -> Iterator[list[Effect]]:
        """Take in what was so when the catalog was opened, unless somebody has told better since."""
        for runs in doomed:
            yield [effect for run in runs for effect in self._load_doomed(self.of(run.backend), run)]
        for runs in files:
            effects: list[Effect] = []
            for run in runs:
                backend = self.of(run.backend)
                news = named(run, (name for name in names(run) if name not in backend.told))
                effects += self._enter(backend, news) if len(news) else []
            yield effects
        for backend in self.by_id.values():
            backend.told.clear()
        self.loading = False

    def _load_doomed(self, backend: StorageBackend, run: BlockRun) -> list[Effect]:
        """What was written again meanwhile is to be removed no more; but somebody may be removing it."""
        again = [name for name in names(run) if backend.told.get(name) is not None]
        self.removing.load(backend, run, again)
        effects: list[Effect] = []
        for name in again:
            if name not in backend.doomed:
                effects += self.removing.doubt(backend, named(run, [name]), backend.told[name] or "")
        return effects

    def _note_told(self, backend: StorageBackend, piece: BlockRun, node_id: str | None) -> None:
        if self.loading:
            for shard in mask_shards(piece.shards):
                backend.told.update(dict.fromkeys(names(replace(piece, shards=1 << shard)), node_id))

    def load_backend(self, known: Backend, *, complete: bool) -> None:
        """Take in what the catalog knows of a backend."""
        backend = self.of(known.id)
        backend.url, backend.capacity_bytes, backend.complete = known.url, known.capacity_bytes, complete

    # ---- removal -------------------------------------------------------------------------------

    def doom(self, incarnation: int, rows: Rows, why: Why, now: float) -> list[Effect]:
        """Take blocks out of a backend: no hits any more from now on, their files removed later."""
        backend = self._by_incarnation[incarnation]
        effects: list[Effect] = []
        for run in self._index.files_on(rows, incarnation):
            effects += self.removing.doom(backend, run)
            gone, broken = self._index.remove(run, incarnation, TIER)
            self._note(backend, run.namespace, gone, why, now)
            self._counters["files_doomed"] += len(gone)
            effects += self._drop_rest(broken)
        return effects

    def confirm(self, message: FilesRemoved, now: float) -> list[Effect]:
        """A node has removed the files of a batch, or looked for them; those that are there again count from now on."""
        effects = [effect for piece in slices_of(message.gone) for effect in self.remove(piece, now)]
        for backend in self.by_id.values():
            removed, again = self.removing.confirm(backend, message.id)
            effects += removed
            for node_id, run in again:
                effects += self.add(run, node_id)
        return effects

    # ---- capacity ------------------------------------------------------------------------------

    def tick(self, up: float, now: float) -> list[Effect]:
        """Send what is due: removals, limits, scans; start evictions where too much is stored."""
        effects: list[Effect] = []
        self.removing.up = up
        for backend in self.by_id.values():
            effects += self.removing.tick(backend, self.serving(backend), up, loading=self.loading)
            effects += self._judge_room(backend)
            if not self.loading:
                self._relieve(backend, up, now)
                effects += self._scan_if_due(backend, up)
        return effects

    def _judge_room(self, backend: StorageBackend) -> list[Effect]:
        taken = self.used_bytes(backend) + backend.removing_bytes
        least = self._limits.storage_high_watermark_ratio * backend.capacity_bytes
        full = backend.capacity_bytes > 0 and (taken >= backend.capacity_bytes or (backend.full and taken > least))
        if full == backend.full:
            return []
        backend.full = full
        effects: list[Effect] = [BackendChanged(backend.name, "is full" if full else "has room again", full)]
        for node_id in backend.servers:  # also where it is down or unheard of at the moment: it comes back
            if (node := self._nodes.get(node_id)) is not None:
                effects += self._limits_of(node)
        return effects

    def _limits_of(self, node: Node) -> list[Effect]:
        served = [b for b in self.by_id.values() if node.address.node_id in b.servers]
        full = frozenset(b.id for b in served if b.full)
        return [Send(node.session, StorageLimits(full))] if node.session is not None else []

    def _over(self, backend: StorageBackend) -> float:
        """Return how many bytes it is over its high watermark, 0 or less if it is not."""
        return self.used_bytes(backend) - self._limits.storage_high_watermark_ratio * backend.capacity_bytes

    def _relieve(self, backend: StorageBackend, up: float, now: float) -> None:
        """Start an eviction if the backend is over its high watermark and removals keep up."""
        capacity = backend.capacity_bytes
        over = self._over(backend)
        if over <= 0 or not capacity or backend.job or not backend.live or len(backend.doomed) >= DOOMED_MAX:
            return
        if up < backend.relieve_at:
            return
        backend.job = True
        target = max(over, self._limits.storage_eviction_ratio * capacity)
        self._jobs.append(self._eviction(backend, int(target), up, now))

    def _eviction(self, backend: StorageBackend, target: int, up: float, now: float) -> Iterator[list[Effect]]:
        """Evict ``target`` bytes, coldest first; those pinned softly last, and only what is over the high watermark."""
        index, wanted = self._index, target
        try:
            for soft in (False, True):
                if soft and (wanted := math.ceil(self._over(backend))) <= 0:
                    return
                for found in index.coldest(backend.incarnation, leased=soft):
                    rows = found[index.leased.take(found) == 0]
                    sizes = np.cumsum(index.file_bytes_on(rows, backend.incarnation))
                    enough = int(np.searchsorted(sizes, wanted)) + 1
                    wanted -= int(sizes[:enough].max(initial=0))
                    yield self.doom(backend.incarnation, rows[:enough], Why.CAPACITY, now)
                    if wanted <= 0 or len(backend.doomed) >= DOOMED_MAX:
                        return
            backend.relieve_at = up + EVICTION_AGAIN_S
        finally:
            backend.job = False

    # ---- scans ---------------------------------------------------------------------------------

    def scan(self, backend: StorageBackend, up: float) -> list[Effect]:
        """Ask a node to say what a backend holds; returns nothing when none can."""
        nodes = self.serving(backend)
        if not nodes:
            return []
        backend.turn += 1
        node = nodes[backend.turn % len(nodes)]
        backend.scanner, backend.scan_heard, backend.scan_wanted = node.address.node_id, up, False
        backend.scanned_files = backend.scan_expected = 0
        self._counters["scans_asked"] += 1
        what = f"is scanned by node {node.address.node_id}"
        return [Send(node.session or 0, Scan(backend.id)), BackendChanged(backend.name, what)]

    def _scan_if_due(self, backend: StorageBackend, up: float) -> list[Effect]:
        """Scan what the catalog does not know; begin again elsewhere when nothing is heard of a scan."""
        if backend.scanner:
            serving = any(node.address.node_id == backend.scanner for node in self.serving(backend))
            if serving and up - backend.scan_heard < SCAN_RETRY_S:
                return []
            backend.scanner, backend.scan_wanted = "", True
        if up < backend.scan_not_before:
            return []
        if backend.scan_wanted and backend.complete and self.blocks(backend):
            backend.scan_wanted = False
        return self.scan(backend, up) if backend.scan_wanted else []

    def scanned(
        self, node: Node, message: Scanned, up: float, known: Callable[[BlockRun], bool]
    ) -> Iterator[list[Effect]]:
        """Take in a piece of what a scan has found; ``known`` says whether a run can be taken in."""
        backend = self.of(message.backend)
        ours = backend.scanner == node.address.node_id
        if ours:
            backend.scan_heard = up
            backend.scanned_files, backend.scan_expected = message.files, message.files_expected
        for piece in slices_of(message.added):
            if known(piece):
                yield self.found(replace(piece, backend=backend.id), node.address.node_id)
        if not message.last or not ours:
            return
        backend.scanner = ""
        if message.error:
            backend.scan_wanted, backend.scan_not_before = True, up + SCAN_RETRY_S
            yield [BackendChanged(backend.name, f"could not be scanned: {message.error}", bad=True)]
            return
        backend.complete = True
        yield [self._keep(backend), BackendChanged(backend.name, f"is scanned: {message.files} files")]

    def found(self, piece: BlockRun, node_id: str = "") -> list[Effect]:
        """Take in files that somebody has seen, less those that are about to be removed."""
        backend = self.of(piece.backend)
        effects: list[Effect] = []
        for shard in mask_shards(piece.shards):
            run = replace(piece, shards=1 << shard)
            if backend.doomed:
                run = named(run, (name for name in names(run) if name not in backend.doomed))
            effects += self.add(run, node_id) if len(run) else []
        return effects

    def tell_again(self) -> list[Effect]:
        """Say everything of backends again, to a catalog that has lost some of it; their files come from new scans."""
        for backend in self.by_id.values():
            backend.complete, backend.scan_wanted = False, True
        return [self._keep(backend) for backend in self.by_id.values()]

    @staticmethod
    def _keep(backend: StorageBackend) -> Effect:
        return CatalogBackend(Backend(backend.id, backend.url, backend.capacity_bytes), backend.complete)
