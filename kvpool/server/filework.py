"""What is done to files, by a thread of the node or in a process beside it: one job at a time, verified."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from kvpool.core.file_jobs import Failure, File, Job, Learn, Read, Remove, Trouble, Write
from kvpool.model import DIGEST_BYTES, Namespace
from kvpool.tiers import blockfile
from kvpool.tiers.dram import HEADER_ALIGN_BYTES, header_area
from kvpool.tiers.posix import PosixStore
from kvpool.tiers.store import (
    BlockStore,
    FileName,
    StoreBrokenError,
    StoreError,
    StoreFullError,
    StoreMissingError,
    StoreReadOnlyError,
    StoreSizeError,
)

log = logging.getLogger(__name__)

_TROUBLES: Final = (
    (StoreMissingError, Trouble.MISSING),
    (StoreBrokenError, Trouble.BROKEN),
    (StoreFullError, Trouble.FULL),
    (StoreReadOnlyError, Trouble.READ_ONLY),
)


@dataclass(frozen=True, slots=True)
class Gone:
    """Files that were looked for and are not there."""

    files: list[File]


Brought = tuple[int, bytes] | list[Namespace] | Gone | None


def perform(store: BlockStore, view: memoryview, job: Job) -> tuple[Failure | None, Brought]:
    """Do a job; returns what went wrong, and what it brought.

    That is a block's (shard_bytes, checksums), or namespaces, or the files that are not there.
    """
    try:
        if isinstance(job, Read):
            return None, _read(store, view, job)
        if isinstance(job, Write):
            if job.namespace is not None:
                store.keep_namespace(job.namespace)
            store.write(_name(job.file), view[job.start : job.start + job.size])
        elif isinstance(job, Remove):
            if time.monotonic() > job.until:
                return Failure(Trouble.GIVEN_BACK, "too late"), None
            if job.look:
                return None, _look(store, job)
            store.remove([_name(file) for file in job.files])
        elif isinstance(job, Learn):
            return None, store.namespaces()
    except Exception as exc:  # a thread's last resort: a defect of a store must not end it
        return failure_of(exc), None
    return None, None


Finish = Iterator[tuple[Failure | None, Brought]]
"""Does what is left of some jobs, one by one, and yields what ``perform`` returns for each."""


def begin_reads(store: PosixStore, view: memoryview, jobs: Sequence[Read], until: float) -> tuple[int, Finish]:
    """Read the files of the first jobs, at least one and none begun after ``until``; returns how many, and the rest.

    Step by step for all of them, not one after the other: see ``posix_io.fill_all``.
    """
    names = [_name(job.file) for job in jobs]
    targets = [view[job.start : job.start + job.size] for job in jobs]
    try:
        tried = store.try_read(names, targets, until)
    except Exception as exc:  # as in ``perform``
        failed = failure_of(exc)
        return 1, iter([(failed, None)])

    def finish() -> Finish:
        for job, name, target, there in zip(jobs, names, targets, tried, strict=False):
            brought = None
            if there:
                with contextlib.suppress(Exception):  # which is said below
                    brought = blockfile.content(target, name, job.layers)
            yield (None, brought) if brought is not None else perform(store, view, job)

    return len(tried), finish()


def failure_of(exc: Exception) -> Failure:
    """Return what an exception of a store says; one of another kind is logged."""
    if isinstance(exc, StoreSizeError):
        return Failure(Trouble.SIZE, str(exc), exc.actual)
    if not isinstance(exc, StoreError):
        log.error("a store failed in a way of its own", exc_info=exc)
        return Failure(Trouble.ERROR, repr(exc))
    trouble = next((trouble for kind, trouble in _TROUBLES if isinstance(exc, kind)), Trouble.ERROR)
    return Failure(trouble, str(exc))


def _name(file: File) -> FileName:
    return FileName(file[0][:DIGEST_BYTES], file[0][DIGEST_BYTES:], file[1])


def _look(store: BlockStore, job: Remove) -> Gone:
    """See which files are not there, if that is where they should be. Raises StoreError."""
    there = set(store.older_than([_name(file) for file in job.files], -math.inf))
    gone = [file for file in job.files if _name(file) not in there]
    if gone:
        store.probe()
    return Gone(gone)


def _read(store: BlockStore, view: memoryview, read: Read) -> tuple[int, bytes]:
    """Fill a slot from its file; returns the payload's size and checksums. A file that is wrong twice is set aside."""
    name = _name(read.file)
    target = view[read.start : read.start + read.size]
    for last in (False, True):
        try:
            return _read_verified(store, name, target, read, len(view))
        except StoreBrokenError:
            if last:
                with contextlib.suppress(StoreError):  # it stays where it is, and is broken for the next one, too
                    store.set_aside(name)
                raise
    raise AssertionError("not reached")


def _read_verified(
    store: BlockStore, name: FileName, target: memoryview, read: Read, longest: int
) -> tuple[int, bytes]:
    try:
        store.read_into(name, target)
    except StoreSizeError as exc:
        area = header_area(read.layers)
        if read.sized or exc.actual % HEADER_ALIGN_BYTES or not area < exc.actual <= longest:
            raise StoreBrokenError(str(exc)) from exc
        raise
    return blockfile.content(target, name, read.layers)
