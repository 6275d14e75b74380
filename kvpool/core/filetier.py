"""The node's file tier: what is written behind, read once for everybody who waits, removed, and by which backend.

Pure. The server takes batches of jobs for its threads (``take``) and says how each ended; ``reads`` has the
requests for blocks. A block is protected only while a thread has it in hand: making room
never waits for a disk. A backend that fails is left alone until a probe succeeds.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from kvpool.core.file_changes import FileChanges
from kvpool.core.file_jobs import (
    FILES_OWNER,
    LOOKS_MAX,
    PROBE_FIRST_S,
    PROBE_MAX_S,
    REMOVE_WITHIN_S,
    BackendWork,
    Failure,
    File,
    Job,
    Learn,
    Read,
    Remove,
    Trouble,
    Write,
    ranked,
)
from kvpool.core.file_reads import BATCH_FILES, FileReads
from kvpool.core.messages import FilesRemoved, LookForFiles, RemoveFiles, Storage, runs_of_files
from kvpool.core.segment import SegmentState, Slot
from kvpool.core.slots import block_keys
from kvpool.errors import OverloadedError
from kvpool.model import Backend, BackendState, Namespace, mask_shards

BATCH_BYTES: Final = 1 << 20
"""What a thread is given at a time at most: small files must not cost a turn of the loop each."""

REMOVE_FILES: Final = 16
"""Files removed at a time: one operation, which must not seem to hang where each takes its while."""

ERRORS_MAX: Final = 8
"""Failures in a row after which a backend is down though its probes succeed."""

WRITE_TURN: Final = 4
"""One batch in so many is of writes while reads wait, too."""

LEARN_AGAIN_S: Final = 10.0
"""Files that are missing, and errors, are a reason to look for the namespaces this often only."""

REMOVE_TURN: Final = 8
"""And one in so many is a removal: a backend that is read all the time gets full, too."""


class FileTierState:
    """Queues and backends of one node's file tier; ``segment`` is where its blocks come from and go to."""

    def __init__(
        self,
        segment: SegmentState,
        backends: Sequence[Backend],
        *,
        queue_bytes_max: int,
        write_through: bool = True,
    ) -> None:
        """Without ``write_through``, a block is written when it is used for the second time."""
        self.changes = FileChanges()
        self.counters: Counter[str] = Counter()
        self.queue_bytes = 0  # of writes
        self.storage_changed = False
        self.scans_asked: list[bytes] = []
        self.backends: list[BackendWork] = []
        self._batch_bytes = max(1, min(BATCH_BYTES, segment.capacity_bytes // 64))
        self.reads = FileReads(segment, self.backends, self._batch_bytes)
        self._segment = segment
        self._queue_bytes_max = queue_bytes_max
        self._write_through = write_through
        self._numbers: dict[bytes, int] = {}
        self._removals: dict[int, list[Remove]] = {}  # command -> jobs that have not ended
        self._gone_of: dict[int, list[File]] = {}  # command -> files that were looked for and are not there
        self._removed: list[FilesRemoved] = []
        self._moving: deque[tuple[BackendWork, OrderedDict[File, int]]] = deque()  # writes that go elsewhere
        self._unfiling: deque[Iterator[bool]] = deque()  # see ``_unfile``
        for backend in backends:
            self.add(backend)

    def __repr__(self) -> str:
        return f"<FileTierState {self.backends} {self.reads}, {self.queue_bytes} bytes to write>"

    def add(self, backend: Backend) -> None:
        """Take one more backend; it has the next number."""
        self._numbers[backend.id] = len(self.backends)
        self.backends.append(BackendWork(backend.id, backend.url, backend.capacity_bytes))
        self.storage_changed = True

    @property
    def has_news(self) -> bool:
        """Whether there is something to tell the master."""
        return self.changes.untold or self.storage_changed or bool(self._removed) or self._segment.has_changes

    @property
    def unwritten(self) -> int:
        """How many blocks wait to be written."""
        return sum(len(backend.writes) for backend in self.backends) + sum(len(writes) for _, writes in self._moving)

    def storage(self) -> Storage:
        """Return what the master is told of the backends."""
        self.storage_changed = False
        return Storage(tuple(backend.described() for backend in self.backends))

    def take_removed(self) -> list[FilesRemoved]:
        """Return what to say of the commands that were carried out since the last call."""
        removed, self._removed = self._removed, []
        return removed

    def forget_commands(self) -> None:
        """Drop what a master that is gone has asked for."""
        self._removals.clear()
        self._gone_of.clear()
        self._removed.clear()
        for backend in self.backends:
            backend.removes.clear()

    # ---- blocks that come and are used ---------------------------------------------------------------

    def committed(self, slots: Sequence[Slot]) -> None:
        """Note blocks that were put: to be written, and no longer to be read."""
        for slot in slots:
            self.reads.arrived((slot.block.key, slot.shard), slot.shard_bytes)
            if self._write_through:
                self._enqueue(slot)

    def used(self, slots: Iterable[Slot | None]) -> None:
        """Note blocks that were got, or put again: those in no file are to be written."""
        for slot in slots:
            if slot is not None and not slot.filed:
                self._enqueue(slot)

    def _enqueue(self, slot: Slot) -> None:
        file = (slot.block.key, slot.shard)
        places = ranked(file, self.backends, lambda backend: backend.writable)
        if not places:
            self.counters["dropped_no_backend"] += 1
            return
        backend = self.backends[places[0]]
        if file not in backend.writes:
            if self.queue_bytes + slot.extent_bytes > self._queue_bytes_max:
                backend.counters["dropped_queue_full"] += 1
                return
            self.queue_bytes += slot.extent_bytes
            backend.writes[file] = slot.extent_bytes
        slot.filed = True

    # ---- jobs for threads ----------------------------------------------------------------------------

    def take(self, number: int, among: int = 1) -> list[Job]:
        """Return the next jobs for one of ``among`` threads of this backend, none when there is nothing to do.

        There may be more to do though when it has ``looked`` LOOKS_MAX times.
        """
        backend = self.backends[number]
        backend.looked = 0
        if not backend.readable:
            return []
        jobs = [] if backend.learn_asked else self._take_in_turn(number, among)
        if not jobs and backend.learn_asked:
            backend.learn_asked = False
            backend.kept_before = frozenset(backend.kept)
            return [Learn(number)]
        return jobs

    def _take_in_turn(self, number: int, among: int) -> list[Job]:
        backend, take_reads = self.backends[number], self.reads.take
        backend.turn += 1
        if backend.removes and (not backend.reads or backend.turn % REMOVE_TURN == 1):
            return [backend.removes.popleft()]
        if backend.reads and backend.turn % WRITE_TURN:
            return take_reads(number, backend.reads, among) or self._take_rest(number, among)
        if backend.ahead and backend.turn % 2:  # nobody waits for what is read ahead, and nobody for writes: by turns
            return take_reads(number, backend.ahead, among) or self._take_rest(number, among)
        return self._take_rest(number, among)

    def _take_rest(self, number: int, among: int) -> list[Job]:
        backend = self.backends[number]
        return (
            self._take_writes(number)
            or self.reads.take(number, backend.reads, among)
            or self.reads.take(number, backend.ahead, among)
            or ([backend.removes.popleft()] if backend.removes else [])
        )

    def _take_writes(self, number: int) -> list[Job]:
        backend = self.backends[number]
        if not backend.writable:
            return []
        jobs: list[Job] = []
        size = 0
        while (
            backend.writes and backend.looked < LOOKS_MAX and len(jobs) < BATCH_FILES and size < self._batch_bytes
        ):
            backend.looked += 1
            file, queued_bytes = backend.writes.popitem(last=False)
            self.queue_bytes -= queued_bytes
            pin = self._segment.hold(FILES_OWNER, *file)
            slot = pin.slots[0] if pin is not None else None
            if pin is None or slot is None:
                backend.counters["dropped_evicted"] += 1
                continue
            namespace = None if slot.namespace in backend.kept else self._segment.namespace(slot.namespace)
            jobs.append(Write(number, file, slot.start, slot.extent_bytes, slot.shard_bytes, pin.id, namespace))
            size += slot.extent_bytes
        return jobs

    # ---- how jobs end --------------------------------------------------------------------------------

    def write_ended(self, job: Write, failure: Failure | None, now: float) -> None:
        """Take the end of a write: the file is there when ``failure`` is None."""
        backend = self.backends[job.backend]
        if failure is None:
            backend.errors = 0
            backend.probe_wait_s = PROBE_FIRST_S
            backend.counters["written_files"] += 1
            backend.counters["written_bytes"] += job.size
            backend.missing.pop(job.file, None)
            if job.namespace is not None:
                backend.kept.add(job.namespace.digest)
            self.changes.note(backend.id, *job.file, job.shard_bytes, added=True)
        else:
            slot = self._segment.slot(*job.file)
            if slot is not None:
                slot.filed = False
            if failure.trouble is not Trouble.GIVEN_BACK:
                backend.counters["dropped_" + failure.trouble.value] += 1
            elif slot is not None:
                self._enqueue(slot)
            if failure.trouble in {Trouble.FULL, Trouble.READ_ONLY}:
                backend.room_bytes = job.size if failure.trouble is Trouble.FULL else 0
                self._set_state(backend, BackendState.READ_ONLY, failure.text, now)
            else:
                self._error(backend, failure, now)
        self._segment.release(FILES_OWNER, job.pin)

    def read_ended(self, read: Read, shard_bytes: int, checksums: bytes) -> None:
        """Take the end of a read that has filled its slot with the right bytes."""
        self.backends[read.backend].errors = 0
        self.reads.ended(read, shard_bytes, checksums)

    def read_failed(self, read: Read, failure: Failure, now: float) -> None:
        """Take the end of a read that has brought nothing."""
        backend = self.backends[read.backend]
        if self.reads.too_large(failure):
            failure = Failure(Trouble.BROKEN, failure.text)
        self.reads.failed(read, failure)
        shard_bytes = self.reads.shard_bytes(read.file)
        if failure.trouble is Trouble.BROKEN:
            self._gone(backend, read.file, shard_bytes)
        elif failure.trouble is Trouble.MISSING:
            if read.named:
                backend.missing[read.file] = shard_bytes
                self._ask_probe(backend, now)
        elif failure.trouble is not Trouble.SIZE:
            self._error(backend, failure, now)

    def learned(self, number: int, namespaces: Iterable[Namespace], failure: Failure | None, now: float) -> None:
        """Take the namespaces that a backend keeps; what waited for them goes on.

        One that it no longer keeps has gone with its files: the backend was deleted, and made anew.
        """
        backend = self.backends[number]
        namespaces = list(namespaces)
        lost = backend.kept_before - {namespace.digest for namespace in namespaces}
        if lost and failure is None:
            backend.kept -= lost
            self._unfiling.append(self._unfile(lost))
        for namespace in namespaces:
            backend.kept.add(namespace.digest)
            try:
                self._segment.register(namespace)
            except OverloadedError:
                self.counters["namespaces_refused"] += 1
        self.reads.learned(backend)
        if failure is not None:
            backend.learn_asked |= failure.trouble is Trouble.GIVEN_BACK
            self._error(backend, failure, now)

    def removed(self, job: Remove, gone: Iterable[File], failure: Failure | None, now: float) -> None:
        """Take the end of a removal, or which files are ``gone``; its command is confirmed with its last job."""
        backend = self.backends[job.backend]
        if failure is not None:
            self._forget_removal(backend, job.id)
            if failure.trouble is Trouble.READ_ONLY:
                self._set_state(backend, BackendState.READ_ONLY, failure.text, now)
            else:
                self._error(backend, failure, now)
            return
        if job.look:
            self._gone_of.setdefault(job.id, []).extend(gone)
            for file in gone:
                self._unfiled(file)
        else:
            backend.counters["removed_files"] += len(job.files)
            for file in job.files:
                self._unfiled(file)
        jobs = self._removals.get(job.id, [])
        if job in jobs:
            jobs.remove(job)
            if not jobs:
                del self._removals[job.id]
                lost = runs_of_files(backend.id, self._gone_of.pop(job.id, []))
                self._removed.append(FilesRemoved(job.id, lost))

    def _forget_removal(self, backend: BackendWork, command: int) -> None:
        """Drop what is left of a command that will not be confirmed: the master asks somebody else."""
        self._removals.pop(command, None)
        self._gone_of.pop(command, None)
        backend.removes = deque(waiting for waiting in backend.removes if waiting.id != command)

    def _gone(self, backend: BackendWork, file: File, shard_bytes: int) -> None:
        """Tell that a file is not there; its block, if it is in memory, is to be written when it is used."""
        self.changes.note(backend.id, *file, shard_bytes, added=False)
        self._unfiled(file)

    def _unfiled(self, file: File) -> None:
        slot = self._segment.slot(*file)
        if slot is not None:
            slot.filed = False

    # ---- what is done in slices ----------------------------------------------------------------------

    def catch_up(self, now: float) -> bool:
        """Drop removals that came too long ago, and go on with what backends that failed, or were lost, have left.

        To be called all the time, and soon again when it returns True: there is more to do.
        """
        for backend in self.backends:
            for job in reversed(backend.removes):
                if job.until < math.inf:
                    break
                job.until = now + REMOVE_WITHIN_S
            while backend.removes and backend.removes[0].until <= now:
                backend.counters["removals_too_late"] += 1
                self._forget_removal(backend, backend.removes[0].id)
            if backend.learn_due and now >= backend.learned_at + LEARN_AGAIN_S:
                backend.learn_due, backend.learn_asked, backend.learned_at = False, True, now
        return self._move()

    def _move(self) -> bool:
        """Go on with LOOKS_MAX of the reads and writes of backends that failed; returns whether there are more."""
        looks = self.reads.move(LOOKS_MAX)
        while looks < LOOKS_MAX and (self._moving or self._unfiling):
            looks += 1
            if self._moving:
                self._move_write(*self._moving[0])
            elif not next(self._unfiling[0], False):
                self._unfiling.popleft()
        return looks >= LOOKS_MAX

    def _move_write(self, backend: BackendWork, writes: OrderedDict[File, int]) -> None:
        """Give one of the blocks that were to be written to another backend, if there is one."""
        file, queued_bytes = writes.popitem(last=False)
        if not writes:
            self._moving.popleft()
        self.queue_bytes -= queued_bytes
        slot = self._segment.slot(*file)
        if slot is None:
            backend.counters["dropped_evicted"] += 1
        else:
            slot.filed = False
            self._enqueue(slot)

    def _unfile(self, namespaces: frozenset[bytes]) -> Iterator[bool]:
        """Have the blocks of some namespaces written when they are used, as if they never had been: one at a time."""
        for runs in self._segment.snapshot_slices():
            for run in runs:
                for key in block_keys(run) if run.namespace in namespaces else ():
                    for shard in mask_shards(run.shards):
                        slot = self._segment.slot(key, shard)
                        if slot is not None:
                            slot.filed = False
                    yield True
            yield True

    # ---- the master's wishes -------------------------------------------------------------------------

    def remove(self, command: RemoveFiles | LookForFiles) -> None:
        """Queue the removal of files, or the look for them; what is under way already is not queued again."""
        number = self._numbers.get(command.backend)
        if number is None or command.id in self._removals or not self.backends[number].readable:
            return
        files = [(key, shard) for run in command.blocks for key in block_keys(run) for shard in mask_shards(run.shards)]
        starts = range(0, len(files), REMOVE_FILES)
        look = isinstance(command, LookForFiles)
        jobs = [Remove(number, command.id, files[at : at + REMOVE_FILES], look=look) for at in starts]
        if not jobs:
            self._removed.append(FilesRemoved(command.id))
            return
        self._removals[command.id] = jobs
        self.backends[number].removes.extend(jobs)

    def set_full(self, full: frozenset[bytes]) -> None:
        """Write nothing more to these backends, and again to all others."""
        for backend in self.backends:
            backend.full = backend.id in full
        for backend in self.backends:
            if backend.full:
                self._move_writes(backend)

    def only_write(self) -> None:
        """Forget what need not be done before the end."""
        self._removals.clear()
        self._gone_of.clear()
        for backend in self.backends:
            backend.removes.clear()
            self.reads.drop_ahead(backend)

    # ---- backends that fail and come back ------------------------------------------------------------

    def stuck(self, number: int, age_s: float, now: float) -> None:
        """Take note that an operation has not ended for so long."""
        if self.backends[number].readable:
            self._set_state(self.backends[number], BackendState.DOWN, f"no answer for {age_s:.1f} s", now)

    def due_probes(self, now: float) -> list[int]:
        """Return the backends to be probed now; ``probed`` must follow for each."""
        due = [
            number
            for number, backend in enumerate(self.backends)
            if backend.probe_at is not None and backend.probe_at <= now and not backend.probing
        ]
        for number in due:
            self.backends[number].probing = True
            self.backends[number].probe_at = None
        return due

    def probed(self, number: int, failure: Failure | None, free_bytes: int | None, now: float) -> None:
        """Take a probe's end: the backend is what it shows itself to be."""
        backend = self.backends[number]
        backend.probing = False
        if failure is None and free_bytes is not None and free_bytes < 2 * backend.room_bytes:
            failure = Failure(Trouble.FULL, backend.reason or "no space left")
        only_reads = failure is not None and failure.trouble in {Trouble.FULL, Trouble.READ_ONLY}
        if failure is None or only_reads:  # it is itself: what is not there is gone
            for file, shard_bytes in backend.missing.items():
                self._gone(backend, file, shard_bytes)
            # Was it deleted, and made anew? Then it keeps no namespaces, either.
            backend.learn_due |= bool(backend.missing or backend.errors) or not backend.readable
        backend.missing.clear()
        if failure is None:
            backend.errors = backend.room_bytes = 0
            self._set_state(backend, BackendState.UP, "", now)
            return
        self._set_state(backend, BackendState.READ_ONLY if only_reads else BackendState.DOWN, failure.text, now)
        self._probe_later(backend, now)

    @staticmethod
    def _probe_later(backend: BackendWork, now: float) -> None:
        """Probe less often the longer nothing could be written: it may come and go all the time."""
        backend.probe_at = now + backend.probe_wait_s
        backend.probe_wait_s = min(2 * backend.probe_wait_s, PROBE_MAX_S)

    @staticmethod
    def _ask_probe(backend: BackendWork, now: float) -> None:
        if backend.probe_at is None or backend.probe_at > now:
            backend.probe_at = now

    def _error(self, backend: BackendWork, failure: Failure, now: float) -> None:
        """Count a failure that may be the backend's or the file's alone: a probe tells."""
        if failure.trouble is Trouble.GIVEN_BACK:
            return
        backend.errors += 1
        backend.counters["errors"] += 1
        if backend.errors >= ERRORS_MAX:
            self._set_state(backend, BackendState.DOWN, failure.text, now)
        elif backend.readable:
            self._ask_probe(backend, now)

    def _set_state(self, backend: BackendWork, state: BackendState, reason: str, now: float) -> None:
        if state is backend.state and reason == backend.reason:
            return
        changed = state is not backend.state
        backend.state, backend.reason = state, reason
        self.storage_changed = True
        if state is BackendState.UP:
            return
        if changed:
            self._probe_later(backend, now)
            backend.counters["down" if state is BackendState.DOWN else "read_only"] += 1
            self._move_writes(backend)
        if state is BackendState.DOWN:
            self.reads.lost(backend)
            for job in backend.removes:
                self._removals.pop(job.id, None)
                self._gone_of.pop(job.id, None)
            backend.removes.clear()
            self._move()

    def _move_writes(self, backend: BackendWork) -> None:
        """Give what waits to be written to the other backends, as far as there are any: see ``catch_up``."""
        if backend.writes:
            self._moving.append((backend, backend.writes))
            backend.writes = OrderedDict()
        self._move()
