"""Reads of the file tier: one for each file, whoever waits for it, straight into a reserved slot.

Pure. A request (``Wait``) is answered when each of its blocks has come or cannot come, or at its deadline; a read
that a thread has in hand goes on without it, and its block is there for the next one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final

from kvpool.core.file_jobs import (
    FILES_OWNER,
    LOOKS_MAX,
    BackendWork,
    Failure,
    File,
    Job,
    Miss,
    Read,
    ReadQueue,
    Trouble,
    Wait,
    order,
    ranked,
)
from kvpool.core.segment import BEING_WRITTEN, STORED, SegmentState, header_bytes
from kvpool.errors import InvalidArgumentError, NoRoomError, TooLargeError
from kvpool.model import DIGEST_BYTES, Namespace

BATCH_FILES: Final = 32
"""What a thread is given at a time at most: small files must not cost a turn of the loop each."""

READS_MAX: Final = 1 << 17
AHEAD_MAX: Final = 1 << 14
"""Files that may wait to be read, all of them, and those that nobody waits for."""

_MISSES: Final = {Trouble.MISSING: Miss.FILE_MISSING, Trouble.BROKEN: Miss.FILE_BROKEN}


class FileReads:
    """The reads of all backends, queued there, and the requests that wait for them."""

    def __init__(self, segment: SegmentState, backends: Sequence[BackendWork], batch_bytes: int) -> None:
        """Reserve slots of ``segment``; a batch of jobs is at most about ``batch_bytes``."""
        self.counters: Counter[str] = Counter()
        self._segment = segment
        self._backends = backends
        self._batch_bytes = batch_bytes
        self._reads: dict[File, Read] = {}
        self._waits: dict[Wait, None] = {}
        self._finished: list[Wait] = []
        self._given_up: list[ReadQueue] = []  # of backends that went down: their reads are to be done elsewhere
        self._shard_bytes: dict[bytes, int] = {}  # the usual size, by namespace

    def __repr__(self) -> str:
        return f"<FileReads {len(self._reads)} reads, {len(self._waits)} waits>"

    def __len__(self) -> int:
        """Return how many files are read or are to be."""
        return len(self._reads)

    # ---- requests for blocks -------------------------------------------------------------------------

    def fetch(self, files: Iterable[File], backend: bytes, deadline: float, token: Any = None) -> Wait:
        """Have blocks brought into memory; the wait comes out of ``take_finished`` when that is done or can't be.

        ``backend`` is where they lie; empty: wherever this node would have put them.
        """
        wait = Wait(deadline, token)
        for file in dict.fromkeys(files):
            read = self._reads.get(file)
            if read is not None and read.queue in self._given_up:
                self._unqueue(read)
                self._next_place(read, Miss.STORAGE_DOWN)
                read = self._reads.get(file)
            if read is None:
                if len(self._reads) >= READS_MAX:
                    wait.misses[file] = Miss.NOT_IN_TIME
                    continue
                read = self._new_read(file, backend)
                if read is None:
                    wait.misses[file] = Miss.STORAGE_DOWN
                    continue
            elif read.backend >= 0 and not self._backends[read.backend].readable:
                wait.misses[file] = Miss.STORAGE_DOWN
                continue
            self._hurry(read, deadline)
            wait.reads[file] = read
            read.waits[wait] = None
        if wait.reads:
            self._waits[wait] = None
        else:
            self._finished.append(wait)
        return wait

    def ahead(self, files: Iterable[File], backend: bytes) -> None:
        """Have blocks brought into memory when nothing more urgent is to be done."""
        for file in files:
            if file in self._reads:
                continue
            read = self._new_read(file, backend)
            if read is None or len(self._backends[read.places[0]].ahead) >= AHEAD_MAX:
                self._reads.pop(file, None)
                self.counters["prefetch_dropped"] += 1
                continue
            self._queue(read, self._backends[read.places[0]].ahead)
            self.counters["prefetch_asked"] += 1

    def drop_ahead(self, backend: BackendWork) -> None:
        """Forget what is to be read ahead: nobody waits for it."""
        self.counters["prefetch_dropped"] += len(backend.ahead)
        while backend.ahead:
            del self._reads[backend.ahead.pop().file]

    def cancel(self, wait: Wait) -> None:
        """Forget a request: nobody is there to be answered."""
        self._waits.pop(wait, None)
        for read in wait.reads.values():
            read.waits.pop(wait, None)
            self._drop_unwanted(read)
        wait.reads.clear()
        self.close(wait)

    def expire(self, now: float) -> None:
        """Finish the requests whose deadline has come."""
        for wait in [wait for wait in self._waits if wait.deadline <= now]:
            for file, read in wait.reads.items():
                read.waits.pop(wait, None)
                wait.misses[file] = Miss.NOT_IN_TIME
                self._drop_unwanted(read)
            wait.reads.clear()
            self._finish(wait)

    def take_finished(self) -> list[Wait]:
        """Return requests to be answered; ``close`` each when it is: until then its blocks stay."""
        finished, self._finished = self._finished, []
        return finished

    def close(self, wait: Wait) -> None:
        """Let go of an answered request's blocks."""
        for pin in wait.pins:
            self._segment.release(FILES_OWNER, pin)
        wait.pins.clear()

    def _new_read(self, file: File, backend: bytes) -> Read | None:
        if backend:
            places = [n for n, work in enumerate(self._backends) if work.id == backend and work.readable]
        else:
            places = ranked(file, self._backends, lambda work: work.readable)
        if not places:
            return None
        read = self._reads[file] = Read(file, places, bool(backend))
        return read

    def _hurry(self, read: Read, deadline: float) -> None:
        """Have a read done by a deadline: a new one, one that waits for its turn, or for a put that may be given up.

        One in hand, or that waits for its namespace or for a backend that is down, has it for when it is queued next.
        """
        sooner = order(deadline) < order(read.deadline)
        read.deadline = min(read.deadline, deadline)
        backend = self._backends[read.places[0]]
        if read.backend >= 0 or read.queue is backend.learning:
            return
        if (sooner or read.queue is not backend.reads) and (read.queue is not None or backend.readable):
            self._queue(read, backend.reads)

    def _queue(self, read: Read, queue: ReadQueue, *, first: bool = False) -> None:
        self._unqueue(read)
        queue.add(read, first=first)

    @staticmethod
    def _unqueue(read: Read) -> None:
        if read.queue is not None:
            read.queue.remove(read)

    def _drop_unwanted(self, read: Read) -> None:
        """Forget a read that nobody waits for any more, unless a thread has it in hand."""
        if not read.waits and read.backend < 0:
            self._unqueue(read)
            if self._reads.get(read.file) is read:
                del self._reads[read.file]

    def _finish(self, wait: Wait) -> None:
        self._waits.pop(wait, None)
        self._finished.append(wait)

    def arrived(self, file: File, shard_bytes: int) -> None:
        """Take a block that somebody else has committed."""
        self._shard_bytes[file[0][:DIGEST_BYTES]] = shard_bytes
        read = self._reads.get(file)
        if read is not None:
            self._arrived(read)

    def _arrived(self, read: Read) -> None:
        """Give a block that is committed to everybody who waits for it."""
        for wait in read.waits:
            del wait.reads[read.file]
            pin = self._segment.hold(FILES_OWNER, *read.file)
            if pin is not None:
                wait.pins.append(pin.id)
            if not wait.reads:
                self._finish(wait)
        read.waits.clear()
        self._drop_unwanted(read)

    def _failed(self, read: Read, miss: Miss) -> None:
        """Tell everybody who waits for a block that it cannot be had."""
        for wait in read.waits:
            del wait.reads[read.file]
            wait.misses[read.file] = miss
            if not wait.reads:
                self._finish(wait)
        read.waits.clear()
        self._drop_unwanted(read)

    # ---- jobs for threads ----------------------------------------------------------------------------

    def take(self, number: int, queue: ReadQueue, among: int = 1) -> list[Job]:
        """Return the next reads of a backend's queue, with slots reserved for them: a share of the few there are."""
        backend = self._backends[number]
        files_max = min(BATCH_FILES, -(-len(queue) // among))
        jobs: list[Job] = []
        size = 0
        while queue and backend.looked < LOOKS_MAX and len(jobs) < files_max and size < self._batch_bytes:
            backend.looked += 1
            read = queue.pop()
            namespace = self._segment.namespace(read.file[0][:DIGEST_BYTES])
            if namespace is None:
                if read.learned:
                    self._failed(read, Miss.FILE_MISSING)
                else:
                    read.learned = True
                    self._queue(read, backend.learning)
                    backend.learn_asked = True
            elif self._reserve(read, namespace):
                read.backend = number
                backend.running[read.file] = read
                jobs.append(read)
                size += read.size
        return jobs

    def _reserve(self, read: Read, namespace: Namespace) -> bool:
        """Find room for a block, evicting as a put does; False when there is none, or the block has come otherwise."""
        block_key, shard = read.file
        read.layers = namespace.shard_layers
        if not read.sized:
            read.shard_bytes = self._shard_bytes.get(namespace.digest, read.layers)
        digest, key = block_key[:DIGEST_BYTES], block_key[DIGEST_BYTES:]
        try:
            held = self._segment.reserve(FILES_OWNER, digest, (shard,), key, read.shard_bytes, read.layers)
        except NoRoomError as exc:
            self.counters["no_room"] += 1
            if not read.waits and not isinstance(exc, TooLargeError):  # nor is there any for what else is read ahead
                self.drop_ahead(self._backends[read.places[0]])
            self._failed(read, Miss.NO_ROOM)
            return False
        except InvalidArgumentError:  # no such shard in this namespace
            self._failed(read, Miss.FILE_MISSING)
            return False
        if held.offsets[0] == STORED:
            self._arrived(read)
        elif held.offsets[0] == BEING_WRITTEN:
            self._drop_unwanted(read)  # who still waits is told by that put's commit
        if not held.slots:
            return False
        read.reservation, read.start, read.size = held.id, held.slots[0].start, held.slots[0].extent_bytes
        return True

    def ended(self, read: Read, shard_bytes: int, checksums: bytes) -> None:
        """Take the end of a read that has filled its slot with the right bytes."""
        backend = self._backends[read.backend]
        del backend.running[read.file]
        read.backend = -1
        backend.errors = 0
        backend.counters["read_files"] += 1
        backend.counters["read_bytes"] += read.size
        slot = self._segment.reservation(FILES_OWNER, read.reservation).slots[0]
        slot.shard_bytes = shard_bytes
        self._segment.commit(FILES_OWNER, read.reservation, checksums)
        slot.filed = True
        self._shard_bytes[slot.namespace] = shard_bytes
        self._arrived(read)

    def failed(self, read: Read, failure: Failure) -> None:
        """Take the end of a read that has brought nothing: try again, or elsewhere, or tell who waits."""
        backend = self._backends[read.backend]
        del backend.running[read.file]
        read.backend = -1
        self._segment.abort(FILES_OWNER, read.reservation)
        if failure.trouble is not Trouble.SIZE:
            backend.counters["read_" + failure.trouble.value] += 1
            self._next_place(read, _MISSES.get(failure.trouble, Miss.STORAGE_DOWN))
        elif backend.readable:
            read.sized = True
            payload = failure.actual_bytes - header_bytes(read.layers)
            read.shard_bytes = payload // read.layers * read.layers
            self._queue(read, backend.reads if read.waits else backend.ahead, first=True)
        else:
            self._next_place(read, Miss.STORAGE_DOWN)

    def learned(self, backend: BackendWork) -> None:
        """Go on with the reads that waited for the namespaces that a backend keeps."""
        for read in list(backend.learning):
            self._queue(read, backend.reads if read.waits else backend.ahead)

    def shard_bytes(self, file: File) -> int:
        """Return how long a block's payload is, as far as its namespace tells; 0 when it is not known."""
        return self._shard_bytes.get(file[0][:DIGEST_BYTES], 0)

    def lost(self, backend: BackendWork) -> None:
        """Have what was to be read from a backend that is down read elsewhere, or tell who waits: see ``move``."""
        for read in list(backend.running.values()):
            self._failed(read, Miss.STORAGE_DOWN)
        self._given_up += [queue for queue in (backend.reads, backend.learning, backend.ahead) if queue]
        backend.reads, backend.learning, backend.ahead = ReadQueue(), ReadQueue(), ReadQueue()

    def move(self, looks_max: int) -> int:
        """Go on with at most so many reads of backends that went down; returns of how many."""
        looks = 0
        while self._given_up and looks < looks_max:
            if not self._given_up[0]:
                del self._given_up[0]
                continue
            looks += 1
            self._next_place(self._given_up[0].pop(), Miss.STORAGE_DOWN)
        return looks

    def too_large(self, failure: Failure) -> bool:
        """Whether a file is longer than any block that could be here: it has grown, or is a foreign one."""
        return failure.trouble is Trouble.SIZE and failure.actual_bytes > self._segment.capacity_bytes

    def _next_place(self, read: Read, miss: Miss) -> None:
        """Try the next backend where a block may lie; with none left, say why it is not here."""
        read.sized = False
        del read.places[0]
        while read.places and not self._backends[read.places[0]].readable:
            del read.places[0]
            miss = Miss.STORAGE_DOWN
        if read.places and read.waits:
            self._queue(read, self._backends[read.places[0]].reads)
        else:
            self._failed(read, miss)
