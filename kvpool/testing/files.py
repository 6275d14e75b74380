"""A storage backend of a simulated cluster, and the catalog of its master.

Nodes write what they have to it, one file at a time; files get lost; a node that dies leaves a file that it has
told nobody of. The catalog is as a thread would write it: a little later, in order, and lost when the master dies
before; what a node is told to be acknowledged waits for it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvpool.core.effects import CatalogBackend, CatalogFiles, CatalogPin, Effect, FileChange, PinEnded, Remember
from kvpool.core.file_jobs import File, Job, Learn, Remove, Write
from kvpool.core.master import MasterState
from kvpool.core.messages import BlockRun, Scanned
from kvpool.core.slots import file_bytes
from kvpool.model import Backend, Namespace, mask_shards, split_keys

if TYPE_CHECKING:
    from kvpool.testing.cluster import Cluster, NodeProcess

BACKEND = b"simulated backen"
CAPACITY_FILES = 40
IO_S = 0.05
SCAN_FILES = 3
"""Files in one piece of a scan."""


def names(run: BlockRun) -> Iterator[File]:
    """Name the files of a run."""
    for shard in mask_shards(run.shards):
        for key in split_keys(run.keys):
            yield run.namespace + key, shard


class SharedFiles:
    """What is in the backend, and what nodes do with it."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._random = cluster.random
        self.described = Backend(BACKEND, "shared", CAPACITY_FILES * file_bytes(700, 1))
        self.files: dict[File, int] = {}  # payload bytes
        self.namespaces: dict[bytes, Namespace] = {}
        self.acknowledged: set[File] = set()
        """Files that a node was told the master will not forget; those found missing since are not among them."""
        self._gone: Counter[File] = Counter()
        """How often each was removed, or got lost: what is acknowledged late may be there again, by another's write."""
        self._written: dict[tuple[str, File], int] = {}
        self._noted: dict[tuple[str, File], int] = {}
        """How often a file had gone when a node wrote it; of the write that it tells of."""

    def pump(self, node: NodeProcess) -> None:
        """Let a node do what it has to do: one job after another, each in its own time."""
        tier = node.tier
        if tier.catch_up(self._cluster.clock()):
            self._cluster.after(0.0, node, self.pump, node)
        for number in tier.due_probes(self._cluster.clock()):
            self._cluster.after(IO_S, node, self._probed, node, number)
        if node.storing:
            return
        jobs = tier.take(0)
        if jobs:
            node.storing = True
            early = self._random.random() < 0.5  # is the file there when its node dies now?
            for job in jobs if early else ():
                self._perform(node, job)
            self._cluster.after(2 * IO_S * self._random.random(), node, self._done, node, jobs, early)
        for backend in tier.scans_asked:
            if backend == BACKEND:
                self._cluster.after(IO_S, node, self._scan, node, node.session, list(self.files.items()))
        tier.scans_asked.clear()

    def _perform(self, node: NodeProcess, job: Job) -> None:
        if isinstance(job, Write):
            self.files[job.file] = job.shard_bytes
            self._written[node.name, job.file] = self._gone[job.file]
            if job.namespace is not None:
                self.namespaces[job.namespace.digest] = job.namespace
        elif isinstance(job, Remove):
            for file in job.files:
                self._lose(file)

    def _done(self, node: NodeProcess, jobs: list[Job], early: bool) -> None:
        node.storing = False
        now = self._cluster.clock()
        for job in jobs:
            if not early:
                self._perform(node, job)
            if isinstance(job, Write):
                self._noted[node.name, job.file] = self._written[node.name, job.file]
                slot = node.segment.slot(*job.file)
                assert slot is not None, "what is being written stays"
                assert slot.start == job.start, "what is being written stays where it is"
                node.tier.write_ended(job, None, now)
            elif isinstance(job, Remove):
                node.tier.removed(job, None, now)
            elif isinstance(job, Learn):
                node.tier.learned(job.backend, list(self.namespaces.values()), None, now)
        self._cluster.changed(node)
        self.pump(node)

    def _lose(self, file: File) -> int:
        self._gone[file] += 1
        self.acknowledged.discard(file)
        return self.files.pop(file, 0)

    def _probed(self, node: NodeProcess, number: int) -> None:
        node.tier.probed(number, None, None, self._cluster.clock())
        self._cluster.changed(node)
        self.pump(node)

    def _scan(self, node: NodeProcess, session: object, left: list[tuple[File, int]]) -> None:
        if session is None or node.session is not session:
            return  # who asked is gone
        part, left = left[:SCAN_FILES], left[SCAN_FILES:]
        runs = tuple(
            BlockRun(key[:16], 1 << shard, size, key[16:], backend=BACKEND) for (key, shard), size in part
        )
        known = tuple(self.namespaces.values())
        self._cluster.tell_surely(node, Scanned(BACKEND, not left, added=runs, namespaces=known))
        if left:
            self._cluster.after(IO_S * self._random.random(), node, self._scan, node, session, left)

    # ---- faults --------------------------------------------------------------------------------

    def lose_file(self) -> None:
        """Somebody removes a file, and some node finds out when it wants to read it."""
        readers = [node for node in self._cluster.nodes if node.tier.backends[0].readable]
        if self.files and readers:
            file = self._random.choice(list(self.files))
            size = self._lose(file)
            node = self._random.choice(readers)
            node.tier.changes.note(BACKEND, *file, size, added=False)
            self._cluster.changed(node)

    def hang(self) -> None:
        """The backend answers one node no more, for a while."""
        if self._cluster.nodes:
            node = self._random.choice(self._cluster.nodes)
            node.tier.stuck(0, 1.0, self._cluster.clock())
            self._cluster.changed(node)

    def note_acknowledged(self, node: NodeProcess, before: dict[File, bool]) -> None:
        """Take in which of the changes told before are told no more."""
        after = told(node)
        for file, added in before.items():
            if file in after:
                continue
            if added and file in self.files and self._noted[node.name, file] == self._gone[file]:
                self.acknowledged.add(file)
            elif not added:
                self.acknowledged.discard(file)

    # ---- what must hold ------------------------------------------------------------------------

    def problems(self, state: MasterState) -> list[str]:
        """Return, for people, what a master at rest has forgotten or not done."""
        backend = state.backends.by_id.get(BACKEND)
        if backend is None:
            return ["the backend is unknown"] if self._cluster.nodes else []
        problems = [f"{len(backend.doomed)} files are not removed"] if backend.doomed else []
        problems += ["a scan has not ended"] if backend.scanner or backend.scan_wanted else []
        problems += ["the catalog is being read"] if state.backends.loading else []
        untold = [node.name for node in self._cluster.nodes if node.tier.changes.untold]
        problems += [f"{name} has told nobody of files" for name in untold]
        known = self.known(state)
        forgotten = self.acknowledged & self.files.keys() - known
        return problems + [f"file {key.hex()[32:40]}.{shard} is forgotten" for key, shard in sorted(forgotten)]

    def known(self, state: MasterState) -> set[File]:
        """Return the files in the index, and those that wait for their removal."""
        backend = state.backends.by_id[BACKEND]
        found: set[File] = {(name[:16] + name[17:], name[16]) for name in backend.doomed}
        for space in state.index.spaces.values():
            for row in range(state.index.rows_used):
                if state.index.space_of[row] == space.number:
                    mask = state.index.placements.shards_of(int(state.index.placement[row]), backend.incarnation)
                    key = space.digest + state.index.keys[row].tobytes()
                    found |= {(key, shard) for shard in mask_shards(mask)}
        return found


def told(node: NodeProcess) -> dict[File, bool]:
    """Return the changes that a node has told and not seen acknowledged."""
    return {
        (key, shard): added
        for _, changes, _ in node.tier.changes._told
        for (_, key, shard), (_, added) in changes.items()
    }


class SimulatedCatalog:
    """What a master remembers. ``waiting``: not written yet."""

    def __init__(self) -> None:
        self.namespaces: dict[bytes, Namespace] = {}
        self.backends: dict[bytes, CatalogBackend] = {}
        self.pins: dict[int, CatalogPin] = {}
        self.files: dict[File, int] = {}
        self.doomed: dict[File, int] = {}
        self.waiting: deque[Effect] = deque()

    def write(self, effect: Effect) -> None:
        """Keep one effect."""
        if isinstance(effect, Remember):
            self.namespaces[effect.namespace.digest] = effect.namespace
        elif isinstance(effect, CatalogBackend):
            self.backends[effect.backend.id] = effect
        elif isinstance(effect, CatalogPin):
            self.pins[effect.id] = effect
        elif isinstance(effect, PinEnded):
            self.pins.pop(effect.id, None)
        elif isinstance(effect, CatalogFiles):
            for run in effect.blocks:
                for file in names(run):
                    self._write_file(file, run.shard_bytes, effect.change)

    def _write_file(self, file: File, size: int, change: FileChange) -> None:
        if change is FileChange.ADDED:
            self.files[file] = size
        elif change is FileChange.LOST:
            self.files.pop(file, None)
        elif change is FileChange.DOOMED:
            if file in self.files:
                self.doomed[file] = self.files.pop(file)
        else:
            self.doomed.pop(file, None)

    def load(self, state: MasterState) -> None:
        """Give a new master what there is."""
        for namespace in self.namespaces.values():
            state.register(namespace)
        for known in self.backends.values():
            state.backends.load_backend(known.backend, complete=known.complete)
        for pin in self.pins.values():
            state.pins.load(pin.id, pin.label, pin.namespace, pin.until, pin.keys)
        state.backends.load(_pieces(self.files), _pieces(self.doomed))


def _pieces(files: dict[File, int]) -> Iterator[tuple[BlockRun, ...]]:
    """One file at a time, as they were when this is called."""
    runs = [BlockRun(key[:16], 1 << shard, size, key[16:], backend=BACKEND) for (key, shard), size in files.items()]
    return iter([(run,) for run in runs])
