"""A storage backend of a simulated cluster, and the catalog of its master.

Nodes write what they have to it, one file at a time; files get lost; a node that dies leaves a file that it has
told nobody of. The catalog is as a thread would write it: a little later, in order, and lost when the master dies
before; what a node is told to be acknowledged waits for it.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from kvpool.core import file_removals
from kvpool.core.effects import CatalogBackend, CatalogFiles, CatalogPin, Effect, FileChange, PinEnded, Remember
from kvpool.core.file_jobs import Failure, File, Job, Learn, Remove, Trouble, Write
from kvpool.core.master import MasterState
from kvpool.core.messages import Ack, BlockRun, MasterMessage, RemoveFiles, Scanned
from kvpool.core.slots import file_bytes
from kvpool.core.storage import file_of
from kvpool.model import Backend, Namespace, mask_shards, split_keys

if TYPE_CHECKING:
    from kvpool.testing.cluster import Cluster, NodeProcess

BACKEND = b"simulated backen"
CAPACITY_FILES = 40
IO_S = 0.05
TOO_LATE = Failure(Trouble.GIVEN_BACK, "too late")
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
        self.stolen: set[File] = set()
        """Files that may be gone without the master's knowledge, until somebody reads them or writes them again."""
        self._gone: Counter[File] = Counter()
        """How often each was removed, or got lost: what is acknowledged late may be there again, by another's write."""
        self._asked: dict[int, float] = {}
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
            done = [self._perform(node, job) for job in jobs] if early else []
            self._cluster.after(2 * IO_S * self._random.random(), node, self._done, node, jobs, done)
        for backend in tier.scans_asked:
            if backend == BACKEND:
                self._cluster.after(IO_S, node, self._scan, node, node.session, list(self.files.items()))
        tier.scans_asked.clear()

    def sent(self, message: MasterMessage) -> MasterMessage:
        """Note when a removal is asked for, and say what the catalog has that keeps what is acknowledged."""
        if isinstance(message, RemoveFiles):
            self._asked[message.id] = self._cluster.clock()
        return replace(message, generation=self._cluster.catalog.generation) if isinstance(message, Ack) else message

    def _perform(self, node: NodeProcess, job: Job) -> list[File] | None:
        """Do a job, unless it is a removal of long ago; returns the files that were looked for and are not there."""
        if isinstance(job, Write):
            self.files[job.file] = job.shard_bytes
            self.stolen.discard(job.file)
            self._written[node.name, job.file] = self._gone[job.file]
            if job.namespace is not None:
                self.namespaces[job.namespace.digest] = job.namespace
        elif isinstance(job, Remove) and job.look:
            return [file for file in job.files if file not in self.files]
        elif isinstance(job, Remove):
            if self._cluster.clock() - self._asked[job.id] > file_removals.REMOVE_RETRY_S:
                return None
            for file in job.files:
                self._lose(file)
        return []

    def _done(self, node: NodeProcess, jobs: list[Job], early: list[list[File] | None]) -> None:
        node.storing = False
        now = self._cluster.clock()
        for job, gone in zip(jobs, early or [self._perform(node, job) for job in jobs], strict=True):
            if isinstance(job, Write):
                self._noted[node.name, job.file] = self._written[node.name, job.file]
                slot = node.segment.slot(*job.file)
                assert slot is not None, "what is being written stays"
                assert slot.start == job.start, "what is being written stays where it is"
                node.tier.write_ended(job, None, now)
            elif isinstance(job, Remove):
                node.tier.removed(job, gone or (), None if gone is not None else TOO_LATE, now)
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
            self.stolen.add(file)
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

    def master_died(self, state: MasterState) -> None:
        """Take in that it had files looked for: whether they are there, its successor does not ask."""
        backend = state.backends.by_id.get(BACKEND)
        self.stolen |= {file_of(name) for name in backend.doubtful} if backend is not None else set()

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
        problems += ["files are looked for"] if backend.doubtful or backend.looks else []
        indexed = self.indexed(state)
        doomed = set(map(file_of, backend.doomed))
        forgotten = self.acknowledged & self.files.keys() - indexed - doomed
        imagined = indexed - self.files.keys() - self.stolen
        problems += [f"file {key.hex()[32:40]}.{shard} is forgotten" for key, shard in sorted(forgotten)]
        return problems + [f"file {key.hex()[32:40]}.{shard} is not there" for key, shard in sorted(imagined)]

    def indexed(self, state: MasterState) -> set[File]:
        """Return the files in the index."""
        backend = state.backends.by_id[BACKEND]
        found: set[File] = set()
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
        self.generation = 1
        self.runs: list[tuple[int, int]] = []  # masters that have used it, and the generation at which each began
        self.waiting: deque[Effect] = deque()

    def copied(self) -> SimulatedCatalog:
        """Return what there is now."""
        copy = SimulatedCatalog()
        for name, value in vars(self).items():
            setattr(copy, name, value if isinstance(value, int) else type(value)(value))
        copy.waiting.clear()
        return copy

    def write(self, effect: Effect) -> None:
        """Keep one effect."""
        self.generation += 1
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
        elif change is FileChange.DOUBTED:
            self.files.pop(file, None)
            self.doomed[file] = size
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
        self.generation += 1
        ends = [*(begun for _, begun in self.runs[1:]), self.generation]
        state.backends.earlier = {epoch: end for (epoch, _), end in zip(self.runs, ends, strict=False)}
        state.backends.earlier[state.epoch] = math.inf
        self.runs.append((state.epoch, self.generation))
        for known in self.backends.values():
            state.backends.load_backend(known.backend, complete=known.complete)
        for pin in self.pins.values():
            state.pins.load(pin.id, pin.label, pin.namespace, pin.until, pin.keys)
        state.backends.load(_pieces(self.files), _pieces(self.doomed))


def _pieces(files: dict[File, int]) -> Iterator[tuple[BlockRun, ...]]:
    """One file at a time, as they were when this is called."""
    runs = [BlockRun(key[:16], 1 << shard, size, key[16:], backend=BACKEND) for (key, shard), size in files.items()]
    return iter([(run,) for run in runs])
