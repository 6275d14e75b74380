"""The file tier at work: threads that read and write block files, and the loop that tells them what.

Every call into a store is made by a daemon thread, because any of them may never return: a mount that hangs
costs its threads, not the node. What they did is posted to the loop, where ``FileTierState`` lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import queue
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from typing import Final

from kvpool.core.file_jobs import LOOKS_MAX, Failure, File, Miss, Read, Remove, Trouble, Wait, Write
from kvpool.core.filetier import FileTierState
from kvpool.core.messages import Scanned
from kvpool.model import Backend, BackendState
from kvpool.processes import start_thread
from kvpool.server.filehelper import Opening
from kvpool.server.filemarks import FileMark
from kvpool.server.filescan import FileScan
from kvpool.server.filework import Gone, failure_of
from kvpool.server.fileworker import Batch, Desk, Result, Worker
from kvpool.tiers.dram import Segment
from kvpool.tiers.store import BlockStore, StoreError
from kvpool.tiers.writers import Writers

log = logging.getLogger(__name__)

TICK_S: Final = 0.05
"""How often deadlines of operations and probes are looked at."""

BATCHES_AHEAD: Final = 3
"""Batches given out for each thread: one in hand, one that its process has been sent, and one to be sent then."""

RESULTS_MAX: Final = 256
"""Results that the loop takes at a time."""

THREAD: Final = "kvpool-storage"
"""The name of threads that do one thing."""

STUCK_FACTOR: Final = 4
"""Threads that never came back, for each that works, before no more are started."""

PROBE_AGAIN: Final = 4
"""A probe is given up after so many times an operation's timeout, and after twice as long for each that hangs already.

What hangs does so for as long as its mount is there: another one may have taken its place.
"""

PATIENCE_S_MAX: Final = 3600.0
"""But not after more than that: each costs a thread."""

CLEAN_EVERY_S: Final = 3600.0

SCAN_AGAIN_S: Final = 5.0
"""When a scan that lost changes made necessary is tried again after it has failed."""

SCAN_RETRY_S: Final = 60.0
"""A scan that has not got on for so long is lost: when it is asked for again, another one begins."""

SCANS_LOST_MAX: Final = 4
"""Lost scans of one backend whose threads still hang, before no more are begun."""

FINISH_S: Final = 5.0
"""How long an end in order may take to write what waits to be written."""

LAST_S: Final = 2.0
"""How long what is under way then may take, if the store is not down earlier."""

Done = Callable[[dict[File, Miss]], None]


class FileTier:
    """Runs a node's file tier; all methods but ``wake`` belong to the loop's thread.

    ``changed`` is called when there is something to tell the master, ``tell`` takes a piece of a scan and
    returns whether it could be sent.
    """

    def __init__(
        self, state: FileTierState, segment: Segment, *, threads: int, timeout_s: float, processes: int = 0
    ) -> None:
        """Take a state without backends: they are given with ``add``. ``processes``: threads that have one each."""
        self.state = state
        self._segment = segment
        self._view = segment.view[:]  # a view of its own: threads may still write when the node lets go of the segment
        self._results: deque[Result] = deque()
        self._desks: list[Desk] = []
        self.changed: Callable[[], None] = lambda: None
        self.tell: Callable[[Scanned], bool] = lambda _: False
        self.listening: Callable[[], bool] = lambda: True  # whether there is a master to be told
        self._threads = threads
        self._processes = processes
        self._timeout_s = timeout_s
        self._workers: list[list[Worker]] = []
        self._out: list[int] = []  # batches that have not ended, by backend
        self._logged: list[BackendState] = []
        self._background: set[asyncio.Task[None]] = set()
        self._probes: dict[int, float] = {}  # since when
        self._probes_lost: Counter[int] = Counter()  # given up, by backend
        self._scans: dict[bytes, FileScan] = {}
        self._scans_lost: dict[bytes, list[FileScan]] = {}  # stopped, and perhaps not ended
        self._necessary: set[bytes] = set()  # scans that lost changes have asked for, until the master has them
        self._fences: dict[bytes, int] = {}  # acknowledged when it has
        self._marks: list[FileMark | None] = []
        self._batches: list[set[Batch]] = []  # what threads have in hand, abandoned ones too, by backend
        self._owners: dict[int, Wait] = {}
        self._loop = asyncio.get_running_loop()
        self._woken = False
        self._giving_out = True
        self._clean_at = time.monotonic() + CLEAN_EVERY_S
        self._timer = self._loop.call_soon(self._tick)

    @property
    def stores(self) -> list[BlockStore]:
        """The backends, in the order in which they were added."""
        return [desk.store for desk in self._desks]

    def add(
        self,
        store: BlockStore,
        opening: Opening | None = None,
        writers: Writers | None = None,
        since: float | None = None,
    ) -> None:
        """Serve one more backend; ``opening``: how a process beside this one opens it, too.

        ``writers`` has a directory's marks, ``since`` is what ours says, if there is one.
        """
        self._desks.append(Desk(store, self._segment, self._view, self._results, self.wake, opening))
        self._workers.append([])
        self._out.append(0)
        batches: set[Batch] = set()
        changes = self.state.changes
        self._batches.append(batches)
        lost = functools.partial(changes.lost.add, store.id)
        self._marks.append(FileMark(writers, since, batches, changes, lost) if writers is not None else None)
        self._logged.append(BackendState.UP)
        self.state.add(Backend(store.id, store.url, store.capacity_bytes))
        start_thread(_clean, THREAD, store)

    def background(self, work: Coroutine[None, None, None]) -> None:
        """Do something until it ends, or the tier is closed."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def fetch(self, owner: int, files: Iterable[File], backend: bytes, timeout_s: float, done: Done) -> None:
        """Call ``done`` with why what is not here is not, when all files are here or can't be, or it is time.

        What has come stays here until ``done`` returns. One request at a time for each ``owner``.
        """
        wait = self.state.reads.fetch(files, backend, time.monotonic() + timeout_s, None)
        timer = self._loop.call_later(timeout_s, self.pump)
        wait.token = (owner, done, timer)
        self._owners[owner] = wait
        self.pump()

    def cancel(self, owner: int) -> None:
        """Forget an owner's request."""
        wait = self._owners.pop(owner, None)
        if wait is not None:
            wait.token[2].cancel()
            wait.token = None  # it may be finished already, and about to be answered
            self.state.reads.cancel(wait)

    def pump(self) -> None:
        """Give threads what there is to do, and requesters what there is to answer."""
        self._drain()
        state, now = self.state, time.monotonic()
        state.reads.expire(now)
        if state.catch_up(now):
            self.wake()
        self._answer()
        for number, desk in enumerate(self._desks if self._giving_out else ()):
            while self._out[number] < BATCHES_AHEAD * self._threads:
                if not (jobs := state.take(number, self._threads)):
                    if state.backends[number].looked >= LOOKS_MAX:
                        self.wake()  # go on when others have had their turn
                    break
                batch = Batch(number, jobs, busy=self._out[number] >= self._threads)
                self._out[number] += 1
                self._batches[number].add(batch)
                desk.batches.put(batch)
        self._answer()  # what found no room
        if state.storage_changed:
            self._log_states()
        if state.has_news:
            self.changed()

    def wake(self) -> None:
        """Have the loop look at results; from any thread."""
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop is gone, and so is everybody who waits
                self._loop.call_soon_threadsafe(self.pump)

    async def finish(self) -> None:
        """Write what waits to be written as far as it goes within FINISH_S, and let end what is under way."""
        state = self.state
        dropped = state.counters["dropped_no_backend"]
        state.only_write()
        self.session_ended()
        await self._until(lambda: not state.queue_bytes and not any(self._out), FINISH_S)
        self._giving_out = False
        for number in range(len(self._desks)):
            self._empty(number)
        await self._until(lambda: not any(self._out), min(self._timeout_s, LAST_S))
        dropped = state.counters["dropped_no_backend"] - dropped + state.unwritten
        stuck = sum(worker.started is not None for workers in self._workers for worker in workers)
        if dropped or stuck:
            log.warning("%d blocks were not written, and %d threads have not ended", dropped, stuck)

    async def _until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        self.pump()
        while not condition() and time.monotonic() < end:
            await asyncio.sleep(TICK_S / 5)
            self.pump()

    async def leave(self) -> None:
        """Remove the marks of backends of which the master knows all that we have written, as far as that goes."""
        started = [
            start_thread(mark.leave, THREAD)
            for store, mark in zip(self.stores, self._marks, strict=True)
            if mark is not None and mark.settled() and self._whole(store.id)
        ]
        threads = [thread for thread in started if thread is not None]
        await self._until(lambda: not any(thread.is_alive() for thread in threads), LAST_S)

    def close(self) -> None:
        """Stop giving out work; threads end when what they do does, or with the process."""
        self._timer.cancel()
        for task in self._background:
            task.cancel()
        for number, desk in enumerate(self._desks):
            self._empty(number)
            for _ in self._workers[number]:
                desk.batches.put(None)
        for scan in self._scans.values():
            scan.stop()

    def session_ended(self) -> None:
        """Forget scans: who asked for them is gone, or will ask again; lost changes ask for theirs until it is told."""
        self.state.scans_asked.clear()
        self.state.changes.lost |= self._necessary
        self._necessary.clear()
        self._fences.clear()
        for backend in list(self._scans):
            self._end_scan(backend)

    # ---- answers and results -------------------------------------------------------------------------

    def _answer(self) -> None:
        while finished := self.state.reads.take_finished():
            for wait in finished:
                if wait.token is None:
                    continue
                owner, done, timer = wait.token
                timer.cancel()
                self._owners.pop(owner, None)
                try:
                    done(wait.misses)
                except Exception:  # one that cannot be answered must not cost the others their answers
                    log.exception("a request for files could not be answered")
                finally:
                    self.state.reads.close(wait)

    def _drain(self) -> None:
        self._woken = False
        results, state, now = self._results, self.state, time.monotonic()
        for _ in range(min(len(results), RESULTS_MAX)):
            batch, job, failure, value = results.popleft()
            if job is None:
                self._ended(batch)
            elif isinstance(job, Write):
                batch.unsure |= failure is not None and failure.trouble is Trouble.ERROR  # or its answer got lost
                state.write_ended(job, failure, now)
            elif isinstance(job, Read):
                if isinstance(value, tuple):
                    state.read_ended(job, *value)
                elif failure is not None:
                    if failure.trouble is Trouble.BROKEN:
                        log.warning("set aside: %s", failure.text)
                    state.read_failed(job, failure, now)
            elif isinstance(job, Remove):
                state.removed(job, value.files if isinstance(value, Gone) else (), failure, now)
            else:
                state.learned(job.backend, value if isinstance(value, list) else [], failure, now)
        if results:
            self.wake()

    def _ended(self, batch: Batch) -> None:
        self._batches[batch.number].discard(batch)
        if not batch.abandoned:
            self._out[batch.number] -= 1
        elif batch.unsure and self._marks[batch.number] is not None:
            self.state.changes.lost.add(self.stores[batch.number].id)

    def _log_states(self) -> None:
        for number, backend in enumerate(self.state.backends):
            if self._logged[number] is backend.state:
                continue
            self._logged[number] = backend.state
            if backend.state is BackendState.UP:
                log.info("storage %s is up", backend.url)
            else:
                log.warning("storage %s is %s: %s", backend.url, backend.state.name.lower(), backend.reason)

    # ---- what time brings ------------------------------------------------------------------------------

    def _tick(self) -> None:
        self._timer = self._loop.call_later(TICK_S, self._tick)
        now = time.monotonic()
        for number, workers in enumerate(self._workers):
            self._look_after(number, workers, now)
        for number in self.state.due_probes(now):
            self._begin_probe(number, now)
        if now >= self._clean_at:
            self._clean_at = now + CLEAN_EVERY_S
            for store in self.stores:
                start_thread(_clean, THREAD, store)
        self._scan(now)
        for store, mark in zip(self.stores, self._marks, strict=True):
            if mark is not None:
                mark.tick(now, whole=self._whole(store.id))
        self.pump()

    def _look_after(self, number: int, workers: list[Worker], now: float) -> None:
        """Give up threads that do not come back, and replace them when the backend does."""
        backend = self.state.backends[number]
        probing = self._probes.get(number)
        if probing is not None and now - probing > self._timeout_s:
            self.state.stuck(number, now - probing, now)
            if now - probing > min(PATIENCE_S_MAX, PROBE_AGAIN * self._timeout_s * 2 ** self._probes_lost[number]):
                self._probes_lost[number] += 1
                self._begin_probe(number, now)
        for worker in workers:
            started = worker.started
            if not worker.retired.is_set() and started is not None and now - started > self._timeout_s:
                worker.retire()
                for batch in list(worker.batches):
                    if not batch.abandoned:
                        batch.abandoned = True
                        batch.give_back(self._results)
                        self._out[number] -= 1
                self.state.stuck(number, now - started, now)
        if not backend.readable:
            self._empty(number)
        workers[:] = [worker for worker in workers if worker.is_alive()]
        active = sum(not worker.retired.is_set() for worker in workers)
        if backend.readable and len(workers) - active < STUCK_FACTOR * self._threads:
            for _ in range(self._threads - active):
                helped = sum(worker.helped and not worker.retired.is_set() for worker in workers) < self._processes
                worker = Worker(self._desks[number], number, helped=helped)
                if not worker.start():
                    break
                workers.append(worker)

    def _empty(self, number: int) -> None:
        """Take back what no thread has begun."""
        with contextlib.suppress(queue.Empty):
            while batch := self._desks[number].batches.get_nowait():
                batch.give_back(self._results)
                self._results.append((batch, None, None, None))

    def _begin_probe(self, number: int, now: float) -> None:
        self._probes[number] = now
        if start_thread(self._probe, THREAD, number, now) is None:
            self._loop.call_soon(self._probed, number, now, Failure(Trouble.ERROR, "no thread for a probe"), None)

    def _probe(self, number: int, since: float) -> None:
        store = self._desks[number].store
        failure, free_bytes = None, None
        try:
            store.probe()
            free_bytes = store.free_bytes()
        except Exception as exc:  # a thread's last resort: whatever it is, the backend does not work
            failure = failure_of(exc)
        with contextlib.suppress(RuntimeError):  # the loop is gone
            self._loop.call_soon_threadsafe(self._probed, number, since, failure, free_bytes)

    def _probed(self, number: int, since: float, failure: Failure | None, free_bytes: int | None) -> None:
        if self._probes.get(number) != since:
            self._probes_lost[number] -= 1  # given up long ago: what it says is history
            return
        del self._probes[number]
        workers = self._workers[number]
        stuck = sum(worker.retired.is_set() and worker.is_alive() for worker in workers)
        if stuck == len(workers) >= STUCK_FACTOR * self._threads:
            failure = Failure(Trouble.ERROR, "all threads hang")
        self.state.probed(number, failure, free_bytes, time.monotonic())
        self.pump()

    # ---- scans -----------------------------------------------------------------------------------------

    def _whole(self, backend: bytes) -> bool:
        """Whether the master has all that scans had to look for."""
        return backend not in self.state.changes.lost and backend not in self._necessary

    def _end_scan(self, backend: bytes) -> None:
        """Have a scan end, which may take as long as its store hangs."""
        scan = self._scans.pop(backend)
        scan.stop()
        self._scans_ending(backend).append(scan)

    def _scans_ending(self, backend: bytes) -> list[FileScan]:
        """Return the scans that were told to end and have not."""
        ending = [scan for scan in self._scans_lost.get(backend, []) if not scan.ended]
        self._scans_lost[backend] = ending
        return ending

    def _begin_scan(self, store: BlockStore, since: float) -> bool:
        """Begin a scan in place of the one that runs, if there can be one more."""
        scan = FileScan(store, self._loop, self._tell, since, self._segment.size)
        if len(self._scans_ending(store.id)) >= SCANS_LOST_MAX or not scan.start():
            return False
        if store.id in self._scans:
            self._end_scan(store.id)
        self.state.counters["scans"] += 1
        self._scans[store.id] = scan
        return True

    def _scan(self, now: float) -> None:
        """Begin the scans that are asked for, and those that a flood of changes or a death made necessary."""
        state = self.state
        asked, lost = state.scans_asked, state.changes.lost
        refused: list[bytes] = []
        for backend, fence in list(self._fences.items()):
            if state.changes.settled >= fence:
                del self._fences[backend]
                self._necessary.discard(backend)
        for number, (store, mark) in enumerate(zip(self.stores, self._marks, strict=True)):
            wanted = store.id in asked
            running = self._scans.get(store.id)
            necessary = store.id in lost and self.listening()
            if running is not None:
                hangs = now - running.moved >= SCAN_RETRY_S and state.backends[number].readable
                if not hangs and not (wanted and running.since):  # all includes what a part looks for
                    continue  # what gets lost during a scan makes another one necessary
                necessary |= store.id in self._necessary
            if not (necessary or wanted):
                continue
            if not self._begin_scan(store, mark.scan_since if mark is not None and not wanted else 0.0):
                refused += [store.id] if wanted else []
                continue  # it is as necessary as before
            if necessary:
                lost.discard(store.id)
                self._necessary.add(store.id)
                self._fences.pop(store.id, None)
        asked[:] = refused

    def _tell(self, scan: FileScan, scanned: Scanned) -> bool:
        backend = scanned.backend
        running = self._scans.get(backend)
        if running is None or running is not scan:
            return True  # nobody wants it any more: let it end
        running.moved = time.monotonic()  # also while nobody takes what it has found
        # The end of a part is none of the scan that the master may have asked for meanwhile.
        if not self.tell(replace(scanned, last=False, error="") if scan.since else scanned):
            return False
        if not scanned.last:
            return True
        del self._scans[backend]
        if scan.since:
            how = f"looking for what is new has failed: {scanned.error}" if scanned.error else "was looked through"
            log.info("storage %s %s: %d new files", scan.url, how, scanned.files)
        if backend in self._necessary:
            if scanned.error:
                self._loop.call_later(SCAN_AGAIN_S, self.state.changes.lost.add, backend)
            else:
                self._fences[backend] = self.state.changes.fence()
        return True


def _clean(store: BlockStore) -> None:
    with contextlib.suppress(StoreError):
        store.clean(CLEAN_EVERY_S)
