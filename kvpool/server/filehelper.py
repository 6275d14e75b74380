"""A process beside the node that reads and writes small files for one of its threads, in the node's own segment.

Python runs one thread of a process at a time, and a small file is mostly Python: four threads of the node with their
loop are hardly faster than one. A process of its own for each thread is. It is sent a batch of jobs and answers in
their order. Whatever happens to it, the thread does the rest of the batch itself; killed, it does nothing more once
its socket is closed, so that its slots can be given to others. What the kernel may still do for it then, bringing
what a network filesystem was asked for, is done to memory of its own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import marshal
import mmap
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from kvpool import __version__
from kvpool.core.file_jobs import Failure, Job, Read, Trouble, Write
from kvpool.errors import KVPoolError
from kvpool.processes import module_command
from kvpool.server.child import die_with_parent
from kvpool.server.filework import Finish, begin_reads, perform
from kvpool.tiers import posix_io
from kvpool.tiers.opening import open_store
from kvpool.tiers.posix import PosixStore
from kvpool.tiers.store import BlockStore
from kvpool.transport.shm import AttachedSegment

log = logging.getLogger(__name__)

MESSAGE_BYTES_MAX: Final = 160 << 10
"""Of one packet; the kernel's default for what a socket may hold is more."""

REPLY_BYTES: Final = 64 << 10
"""Answers of about so many bytes do not wait for more."""

POST_S: Final = 0.01
"""Answers wait for more no longer than until the first job that ends after this: each packet costs two threads of the
node a turn."""

TEXT_CHARS_MAX: Final = 500

Answer = tuple[float, Failure | None, tuple[int, bytes] | None]
"""Seconds that a job took, and what ``filework.perform`` returns for it."""


class HelperEndedError(Exception):
    """The process is no more, and touches nothing any longer."""


@dataclass(frozen=True, slots=True)
class Opening:
    """How a process opens a directory that the node has opened, too."""

    directory: str
    owner: str
    direct: bool
    fsync: str


class FileHelper:
    """The node's end of one process. All but ``kill`` belongs to the thread that made it, with which it ends."""

    def __init__(self, opening: Opening, backend: bytes, segment_fd: int, segment_bytes: int) -> None:
        """Start it. Raises OSError."""
        self._backend = backend
        self._ready = False
        self._buffer = memoryview(bytearray(MESSAGE_BYTES_MAX))
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                numbers = (os.getpid(), theirs.fileno(), segment_fd, segment_bytes)
                command = module_command("kvpool.server.filehelper")
                self._process = subprocess.Popen(
                    [*command, json.dumps(asdict(opening)), *map(str, numbers)],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), segment_fd),
                )
            except BaseException:
                self._sock.close()
                raise

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def ready(self) -> bool:
        """Return whether it takes jobs by now. Raises HelperEndedError."""
        if not self._ready:
            try:
                self._ready = self._receive(socket.MSG_DONTWAIT) == (__version__, self._backend)
            except BlockingIOError:
                return False
            if not self._ready:
                self._end("it found another backend, or is of another version")
        return True

    def send(self, jobs: Sequence[Job]) -> None:
        """Have ``portable`` jobs done, whose answers then have to be received, in order. Raises HelperEndedError."""
        try:
            self._sock.send(marshal.dumps([_packed(job) for job in jobs if isinstance(job, Read | Write)]))
        except OSError as exc:
            self._end(str(exc))

    def receive(self) -> list[Answer]:
        """Wait for the next answers, one or more. Raises HelperEndedError."""
        answers = self._receive()
        try:
            return [
                (seconds, Failure(Trouble(trouble), text, actual) if trouble else None, brought)
                for seconds, trouble, text, actual, brought in answers
            ]
        except (TypeError, ValueError) as exc:
            return self._end(str(exc))  # type: ignore[no-any-return]

    def kill(self) -> None:
        """Kill it; from any thread. Its own thread is told by HelperEndedError when it is no more."""
        self._process.kill()

    def close(self) -> None:
        """Have it end, and wait until it has. It has nothing in hand, and may stand still."""
        self._sock.close()
        self._process.kill()
        self._process.wait()

    def _receive(self, flags: int = 0) -> Any:
        try:
            got = self._sock.recv_into(self._buffer, 0, flags)
        except BlockingIOError:
            raise
        except OSError as exc:
            self._end(str(exc))
        if not got:
            self._end("")
        try:
            return marshal.loads(self._buffer[:got])  # noqa: S302 - of a process that we have started
        except (ValueError, EOFError, TypeError) as exc:
            self._end(str(exc))

    def _end(self, why: str) -> Any:
        """Make sure that it is no more, and say so."""
        self.close()
        raise HelperEndedError(why or f"the process for files has ended with {self._process.returncode}")


def portable(job: Job) -> bool:
    """Whether a job is one for a process beside the node."""
    return isinstance(job, Read) or (isinstance(job, Write) and job.namespace is None)


def _packed(job: Read | Write) -> tuple[Any, ...]:
    if isinstance(job, Write):
        return job.file, job.start, job.size, job.shard_bytes, 0, False
    return job.file, job.start, job.size, job.shard_bytes, job.layers, job.sized


def _unpacked(packed: tuple[Any, ...]) -> Read | Write:
    file, start, size, shard_bytes, layers, sized = packed
    if not layers:
        return Write(0, file, start, size, shard_bytes, 0, None)
    return Read(file, [], False, start=start, size=size, shard_bytes=shard_bytes, layers=layers, sized=sized)


# ---- the process ---------------------------------------------------------------------------------------


Begin = Callable[[BlockStore, memoryview, Sequence[Read | Write], float], tuple[int, Finish]]
"""Does the first jobs as far as the disk is needed: at least one, and none begun after a time of the monotonic clock.

Returns how many, and what does the rest.
"""


class _OwnMemory:
    """Files are read into it first where a read by O_DIRECT may go on when the process that asked for it is no more."""

    def __init__(self) -> None:
        self._view = memoryview(b"")

    def begin(
        self,
        store: BlockStore,
        view: memoryview,
        jobs: Sequence[Read | Write],
        until: float,  # noqa: ARG002 -- as all that begins
    ) -> tuple[int, Finish]:
        """Do the first job."""
        job = jobs[0]
        if not isinstance(job, Read):
            return _perform_one(store, view, job)
        if len(self._view) < job.size:
            self._view = memoryview(mmap.mmap(-1, job.size))
        slot = view[job.start : job.start + job.size]
        job.start = 0
        failure, brought = perform(store, self._view, job)
        if failure is None:
            slot[:] = self._view[: job.size]
        return 1, iter([(failure, brought)])


def _begin(store: BlockStore, view: memoryview, jobs: Sequence[Read | Write], until: float) -> tuple[int, Finish]:
    """Do the first jobs, several files at a stretch where all are to be read."""
    if isinstance(store, PosixStore):
        reads = [job for job in jobs if isinstance(job, Read)]
        if len(reads) == len(jobs):
            return begin_reads(store, view, reads, until)
    return _perform_one(store, view, jobs[0])


def _perform_one(store: BlockStore, view: memoryview, job: Job) -> tuple[int, Finish]:
    return 1, iter([perform(store, view, job)])


class _Answers(threading.Thread):
    """Looks at what was read, and answers, while the next files are read."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(name="kvpool-answers", daemon=True)
        self._sock = sock
        self._begun: queue.SimpleQueue[tuple[float, Finish, bool] | None] = queue.SimpleQueue()

    def put(self, seconds: float, finish: Finish, *, last: bool) -> None:
        """Take jobs that have been begun, each of which took so long; ``last``: of a batch."""
        self._begun.put((seconds, finish, last))

    def end(self) -> None:
        """Answer what was begun, and wait until that is done."""
        self._begun.put(None)
        self.join()

    def run(self) -> None:
        """Answer until the end; without a node this process has nothing left to do."""
        try:
            with contextlib.suppress(OSError):
                self._answer()
        finally:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    def _answer(self) -> None:
        answers: list[tuple[Any, ...]] = []
        size, posted = 0, 0.0
        while (begun := self._begun.get()) is not None:
            seconds, finish, last = begun
            started = time.monotonic()
            posted = posted if answers else started
            for failure, brought in finish:
                now = time.monotonic()
                took, started = seconds + now - started, now
                if failure is None:
                    answers.append((took, "", "", 0, brought))
                else:
                    text = failure.text[:TEXT_CHARS_MAX]
                    answers.append((took, failure.trouble.value, text, failure.actual_bytes, None))
                size += 512 + (len(brought[1]) if isinstance(brought, tuple) else 0)
                if now - posted > POST_S or size > REPLY_BYTES:
                    self._sock.send(marshal.dumps(answers))
                    answers, size, posted = [], 0, now
            if last and answers:
                self._sock.send(marshal.dumps(answers))
                answers, size = [], 0


def _serve(sock: socket.socket, opening: Opening, segment: AttachedSegment) -> None:
    """Do batch after batch until the node closes the socket."""
    store = open_store(
        opening.directory, owner=f"{os.getpid()}-{opening.owner}", direct=opening.direct, fsync=opening.fsync,
        create=False,
    )  # fmt: skip
    begin: Begin = _begin
    if opening.direct and not posix_io.reads_end(opening.directory):
        begin = _OwnMemory().begin
    segment.prefault()  # or the first file in each slot takes twice as long
    sock.send(marshal.dumps((__version__, store.id)))  # the package may have been replaced since the node started
    clock = time.monotonic
    answers = _Answers(sock)
    answers.start()
    try:
        while request := sock.recv(MESSAGE_BYTES_MAX):
            jobs = [_unpacked(packed) for packed in marshal.loads(request)]  # noqa: S302 - of the node
            while jobs:
                started = clock()
                count, finish = begin(store, segment.view, jobs, started + POST_S)
                del jobs[:count]
                answers.put((clock() - started) / count, finish, last=not jobs)
    finally:
        answers.end()


def main() -> None:
    """Serve the node that has started this process."""
    parent, number, segment_fd, segment_bytes = map(int, sys.argv[2:])
    die_with_parent(parent, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's: the node's to act on
    with socket.socket(fileno=number) as sock:
        try:
            segment = AttachedSegment.from_fd(segment_fd, segment_bytes)
            _serve(sock, Opening(**json.loads(sys.argv[1])), segment)
        except KVPoolError as exc:
            log.warning("the process for files cannot begin: %s", exc)  # while the node listens: then it is killed
        except ConnectionError:
            pass  # the node is gone, or has done without


if __name__ == "__main__":
    main()
