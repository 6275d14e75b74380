"""What tests of the file tier's state share: a segment, a tier, and backends whose files are a dict."""

from __future__ import annotations

from kvpool.core.file_jobs import Failure, File, Job, Learn, Read, Remove, Trouble, Wait, Write
from kvpool.core.filetier import FileTierState
from kvpool.core.segment import SegmentState, header_bytes
from kvpool.model import Backend, Namespace

SPACE = Namespace(model="demo")
PAYLOAD = 512
SLOT = header_bytes(1) + PAYLOAD
CLIENT = 1
BACKENDS = (b"A" * 16, b"B" * 16)


def file(number: int) -> File:
    return SPACE.digest + number.to_bytes(16, "big"), 0


class World:
    """A tier over backends that work as told: each file's payload length, or None for a broken one."""

    def __init__(self, slots: int = 32, backends: int = 1, queue_slots: int = 1000, write_through: bool = True) -> None:
        self.segment = SegmentState(slots * SLOT)
        self.segment.register(SPACE)
        described = [Backend(backend, backend.decode(), 1 << 30) for backend in BACKENDS[:backends]]
        self.tier = FileTierState(
            self.segment, described, queue_bytes_max=queue_slots * SLOT, write_through=write_through
        )
        self.files: list[dict[File, int | None]] = [{} for _ in described]
        self.kept: list[dict[bytes, Namespace]] = [{} for _ in described]
        self.trouble: list[Trouble | None] = [None for _ in described]
        self.now = 0.0
        self.told: dict[tuple[bytes, File], bool] = {}  # what the master would believe

    def put(self, *numbers: int, payload: int = PAYLOAD) -> None:
        keys = b"".join(file(number)[0][16:] for number in numbers)
        held = self.segment.reserve(CLIENT, SPACE.digest, (0,), keys, payload, 1)
        if held.id:
            self.tier.committed(self.segment.commit(CLIENT, held.id, bytes(8 * len(held.slots))))

    def fetch(self, *numbers: int, backend: bytes = b"", timeout_s: float = 1.0) -> Wait:
        return self.tier.reads.fetch([file(number) for number in numbers], backend, self.now + timeout_s)

    def finished(self) -> list[Wait]:
        """Answer the requests that are finished."""
        finished = self.tier.reads.take_finished()
        for wait in finished:
            self.tier.reads.close(wait)
        return finished

    def here(self, number: int) -> bool:
        return self.segment.slot(*file(number)) is not None

    def end(self, job: Job) -> None:
        """Do a job, as the backend works now."""
        trouble, files, tier, now = self.trouble[job_backend(job)], self.files[job_backend(job)], self.tier, self.now
        if isinstance(job, Read):
            self._end_read(job, trouble, files)
        elif isinstance(job, Write):
            if trouble is None:
                files[job.file] = job.shard_bytes
                if job.namespace is not None:
                    self.kept[job.backend][job.namespace.digest] = job.namespace
            tier.write_ended(job, Failure(trouble, "trouble") if trouble else None, now)
        elif isinstance(job, Learn):
            failure = Failure(trouble, "trouble") if trouble is Trouble.ERROR else None
            tier.learned(job.backend, [] if failure else self.kept[job.backend].values(), failure, now)
        else:
            gone = [file for file in job.files if file not in files]
            for file in job.files if trouble is None and not job.look else ():
                files.pop(file, None)
            tier.removed(job, gone, Failure(trouble, "trouble") if trouble else None, now)

    def _end_read(self, job: Read, trouble: Trouble | None, files: dict[File, int | None]) -> None:
        payload = files.get(job.file, 0)
        if trouble is Trouble.ERROR:
            self.tier.read_failed(job, Failure(trouble, "trouble"), self.now)
        elif payload == 0:
            self.tier.read_failed(job, Failure(Trouble.MISSING, "no such file"), self.now)
        elif payload is None:
            del files[job.file]
            self.tier.read_failed(job, Failure(Trouble.BROKEN, "torn"), self.now)
        elif header_bytes(1) + -(-payload // 512) * 512 != job.size:
            actual = header_bytes(1) + -(-payload // 512) * 512
            self.tier.read_failed(job, Failure(Trouble.SIZE, "another size", actual), self.now)
        else:
            self.tier.read_ended(job, payload, bytes(8))

    def work(self) -> list[Job]:
        """Do all that is to be done, probes included; returns the jobs."""
        done: list[Job] = []
        while self.tier.catch_up(self.now):
            pass
        while batch := [job for number in range(len(self.files)) for job in self.tier.take(number)]:
            for job in batch:
                self.end(job)
            done += batch
        self.probe()
        return [job for job in done if not isinstance(job, Learn)]

    def probe(self) -> None:
        """Do the probes that are due."""
        for number in self.tier.due_probes(self.now):
            trouble = self.trouble[number]
            self.tier.probed(number, Failure(trouble, "trouble") if trouble else None, None, self.now)

    def listen(self) -> None:
        """Hear what the master would be told, and check that it is told in order."""
        changes = self.tier.changes
        taken, _, _ = changes.take(1 << 20)
        for (backend, key, shard), (_, added) in taken.items():
            self.told[backend, (key, shard)] = added
        changes.told(1, taken)
        changes.acknowledged(1)


def job_backend(job: Job) -> int:
    """The backend a job is for."""
    assert isinstance(job, Read | Write | Remove | Learn)
    return job.backend
