"""The threads that read and write a backend's files, alone or, many small ones at a time, with a process each."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from kvpool.core.file_jobs import Failure, Job, Read, Trouble, Write
from kvpool.processes import start_thread
from kvpool.server.filehelper import FileHelper, HelperEndedError, Opening, portable
from kvpool.server.filework import Brought, perform
from kvpool.tiers.dram import Segment
from kvpool.tiers.measured import MeasuredStore
from kvpool.tiers.store import BlockStore

log = logging.getLogger(__name__)

POST_S: Final = 0.001
"""A thread that works on small files tells the loop what it has done this often, not after each."""

HELPER_AGAIN_S: Final = 5.0
"""How long a thread works alone after its process has ended, or could not be started; twice as long each time,"""

HELPER_AGAIN_MAX_S: Final = 300.0
"""up to this long."""

_GIVEN_BACK: Final = Failure(Trouble.GIVEN_BACK, "the backend is down")


class Batch:
    """Jobs that a thread does one after the other; ``abandoned`` when nobody counts on it any more."""

    def __init__(self, number: int, jobs: list[Job], *, busy: bool = False) -> None:
        """``number``: the backend's; ``busy``: all threads have something to do already."""
        self.number = number
        self.abandoned = False
        self.unsure = False
        """Whether a file was begun of which nobody may ever say whether it is there."""
        self.portable = (busy or len(jobs) > 1) and all(map(portable, jobs))
        """Whether a process is worth asking: a single file is read sooner by whoever has it in hand."""
        self._jobs = deque(jobs)

    def next(self) -> Job | None:
        """Take a job that nobody has begun, None when there is none; from any thread."""
        try:
            return self._jobs.popleft()
        except IndexError:
            return None

    def rest(self) -> list[Job]:
        """Take all jobs that nobody has begun."""
        jobs = []
        while (job := self.next()) is not None:
            jobs.append(job)
        return jobs

    def put_back(self, jobs: list[Job]) -> None:
        """Count jobs as not begun."""
        self._jobs.extend(jobs)

    def give_back(self, results: deque[Result]) -> None:
        """Have what nobody has begun done elsewhere."""
        while (job := self.next()) is not None:
            results.append((self, job, _GIVEN_BACK, None))


Result = tuple[Batch, Job | None, Failure | None, Brought]
"""A job, why it failed, and what it brought; without a job: the batch has ended."""


@dataclass(slots=True)
class Desk:
    """What the loop and the threads of one backend share. ``wake`` has the loop look at ``results``."""

    store: BlockStore
    segment: Segment
    view: memoryview
    results: deque[Result]
    wake: Callable[[], None]
    opening: Opening | None = None
    """How a process opens the backend, None where none can."""
    batches: queue.SimpleQueue[Batch | None] = field(default_factory=queue.SimpleQueue)
    idle: set[Worker] = field(default_factory=set)
    """Threads that wait for a batch, or are about to take one."""


class Worker:
    """One I/O thread of a backend; ``started`` is when what it does now has begun."""

    def __init__(self, desk: Desk, number: int, *, helped: bool) -> None:
        """``number``: the backend's; ``helped``: it may have a process."""
        self.started: float | None = None
        self.batches: list[Batch] = []  # what is in hand, and what comes next
        self.helped = helped and desk.opening is not None
        self.helper: FileHelper | None = None
        self.retired = threading.Event()
        self._desk = desk
        self._name = f"kvpool-files-{number}"
        self._thread: threading.Thread | None = None
        self._ahead: list[Job] = []  # of the second batch, if the process has it
        self._help_at = 0.0
        self._lost = 0  # processes in a row that ended before they had done a batch

    def start(self) -> bool:
        """Begin to work, if a thread can be had."""
        self._thread = start_thread(self.run, self._name)
        return self._thread is not None

    def is_alive(self) -> bool:
        """Whether it works, or hangs."""
        return self._thread is not None and self._thread.is_alive()

    def retire(self) -> None:
        """Count on it no more; from the loop. A process that hangs is killed, which may take as long as it hangs."""
        self.retired.set()
        helper = self.helper
        if helper is not None:
            helper.kill()

    def run(self) -> None:
        """Do batch after batch."""
        while not self.retired.is_set() and (self.batches or self._take()):
            batch = self.batches[0]
            helper = self._ready_helper() if self.helped and batch.portable else None
            if helper is not None:
                self._delegate(helper, batch)
            self._do(batch)
            self._end(batch)
        if self.helper is not None:
            self.helper.close()  # before what it may be doing is anybody else's
        self._take_back()
        for batch in list(self.batches):
            self._end(batch)

    def _take(self) -> bool:
        """Wait for a batch; False when there will be none."""
        desk = self._desk
        desk.idle.add(self)
        batch = desk.batches.get()
        if batch is not None:
            self.batches.append(batch)
        desk.idle.discard(self)
        return batch is not None

    def _end(self, batch: Batch) -> None:
        self.batches.remove(batch)
        batch.give_back(self._desk.results)
        self._desk.results.append((batch, None, None, None))
        self._desk.wake()

    def _do(self, batch: Batch) -> None:
        """Do a batch, or what is left of it."""
        desk = self._desk
        posted = time.monotonic()
        while not self.retired.is_set() and (job := batch.next()) is not None:
            self.started = now = time.monotonic()
            if now - posted > POST_S:
                posted = now
                desk.wake()
            desk.results.append((batch, job, *perform(desk.store, desk.view, job)))
            self.started = None

    # ---- with a process --------------------------------------------------------------------------------

    def _ready_helper(self) -> FileHelper | None:
        """Return the process of this thread, None while there is none; it takes its time to start."""
        desk = self._desk
        try:
            if self.helper is None and time.monotonic() >= self._help_at and desk.opening is not None:
                self.helper = FileHelper(desk.opening, desk.store.id, desk.segment.fd, desk.segment.size)
            return self.helper if self.helper is not None and self.helper.ready() else None
        except (HelperEndedError, OSError, ValueError) as exc:  # ValueError: the segment is closed
            self._lose_helper(exc)
            return None

    def _lose_helper(self, exc: Exception) -> None:
        self._take_back()
        self.helper = None
        self._help_at = time.monotonic() + min(HELPER_AGAIN_S * 2**self._lost, HELPER_AGAIN_MAX_S)
        self._lost = min(self._lost + 1, 10)
        if not self.retired.is_set() and self._lost == 1:
            log.warning("%s: a thread goes on alone: %s", self._desk.store.url, exc)

    def _take_back(self) -> None:
        """Count the second batch as not begun, if the process has it, which is no more."""
        if self._ahead:
            self._undo(self.batches[-1], self._ahead)
            self._ahead = []

    @staticmethod
    def _undo(batch: Batch, jobs: list[Job]) -> None:
        """Put back what a process may have begun."""
        batch.unsure |= any(isinstance(job, Write) for job in jobs)
        batch.put_back(jobs)

    def _delegate(self, helper: FileHelper, batch: Batch) -> None:
        """Have a batch done by the process; what it leaves when it ends goes back into the batch."""
        desk, done = self._desk, 0
        jobs, self._ahead = self._ahead, []
        sent = bool(jobs)
        jobs = jobs or batch.rest()
        self.started = time.monotonic()
        try:
            if not sent:
                helper.send(jobs)
            while done < len(jobs):
                self._send_ahead(helper)
                answers = helper.receive()
                self.started = time.monotonic()
                for seconds, failure, brought in answers:
                    job = jobs[done]
                    desk.results.append((batch, job, failure, brought))
                    done += 1
                    if isinstance(desk.store, MeasuredStore):
                        _note(desk.store, job, seconds, failure)
                if done < len(jobs):
                    desk.wake()
            self._lost = 0
        except HelperEndedError as exc:
            self._undo(batch, jobs[done:])
            self._lose_helper(exc)
        finally:
            self.started = None

    def _send_ahead(self, helper: FileHelper) -> None:
        """Take a second batch, and send it to the process if that can do it: it begins it at once after the first.

        Raises HelperEndedError.
        """
        desk = self._desk
        if len(self.batches) > 1 or desk.idle:
            return
        try:
            batch = desk.batches.get_nowait()
        except queue.Empty:
            return
        if batch is None:
            desk.batches.put(None)
            return
        self.batches.append(batch)
        if self.retired.is_set():  # the loop may have looked at what this thread has in hand before
            self._end(batch)
        elif batch.portable:
            self._ahead = batch.rest()
            helper.send(self._ahead)


def _note(store: MeasuredStore, job: Job, seconds: float, failure: Failure | None) -> None:
    if isinstance(job, Read | Write):
        missing = failure is not None and failure.trouble is Trouble.MISSING
        operation = "read" if isinstance(job, Read) else "write"
        store.note(operation, 0 if failure else job.size, seconds, failed=failure is not None, missing=missing)
