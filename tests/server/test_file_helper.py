"""Processes beside the node for small files: they do the work, and when one ends, stops or hangs, nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import marshal
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from kvpool.core.file_jobs import FILES_OWNER, Failure, File, Learn, Miss, Read, Trouble, Write
from kvpool.core.filetier import FileTierState
from kvpool.core.segment import SegmentState
from kvpool.model import BackendState, Namespace
from kvpool.server import filehelper, fileworker
from kvpool.server.filehelper import FileHelper, HelperEndedError, Opening
from kvpool.server.filetier import FileTier
from kvpool.testing.store_faults import FaultyStore
from kvpool.tiers import posix_io
from kvpool.tiers.dram import AttachedSegment, Segment, SlotHeader, pack_header
from kvpool.tiers.measured import MeasuredStore
from kvpool.tiers.posix import PosixStore
from kvpool.tiers.store import FileName
from tests.server.waiting import T, until

SPACE = Namespace(model="demo", layers=2)
PAYLOAD = 8192
EXTENT = PAYLOAD + 512
MANY = range(1, 65)


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def content(number: int) -> bytes:
    return number.to_bytes(8, "big") * (PAYLOAD // 8)


def checksums(data: bytes) -> bytes:
    half = PAYLOAD // 2
    return b"".join(xxhash.xxh3_64_intdigest(data[at : at + half]).to_bytes(8, "little") for at in (0, half))


def file(number: int) -> File:
    return SPACE.digest + key(number), 0


class Node:
    """A segment and a file tier of two threads with a process each, on a directory."""

    def __init__(self, directory: Path, timeout_s: float) -> None:
        self.posix = PosixStore(str(directory), owner="node", capacity_bytes=1 << 30)
        self.faulty = FaultyStore(self.posix)  # what this process does itself; the others know nothing of it
        self.store = MeasuredStore(self.faulty)
        self.segment = Segment.create(256 * EXTENT, lock=False)
        self.state = SegmentState(self.segment.size)
        self.state.register(SPACE)
        tier = FileTierState(self.state, [], queue_bytes_max=1 << 30)
        self.tier = FileTier(tier, self.segment, threads=2, timeout_s=timeout_s, processes=2)
        self.tier.add(self.store, Opening(str(directory), "node", True, "off"))

    def put(self, *numbers: int) -> None:
        held = self.state.reserve(1, SPACE.digest, (0,), b"".join(map(key, numbers)), PAYLOAD, 2)
        for number, offset in zip(numbers, held.offsets, strict=True):
            assert offset >= 0
            self.segment.view[offset : offset + PAYLOAD] = content(number)
        all_checksums = b"".join(checksums(content(number)) for number in numbers)
        slots = self.state.commit(1, held.id, all_checksums)
        for slot in slots:
            header = SlotHeader(SPACE.digest, slot.key, 0, PAYLOAD, 2, slot.generation, slot.checksums or b"")
            pack_header(self.segment.view, slot.offset, header)
        self.tier.state.committed(slots)
        self.tier.pump()

    async def fetch(self, *numbers: int, timeout_s: float = T) -> dict[File, Miss]:
        """Ask for blocks; returns why those that are not there are not, and checks those that are."""
        answer: asyncio.Future[dict[File, Miss]] = asyncio.get_running_loop().create_future()

        def done(misses: dict[File, Miss]) -> None:
            for number in numbers:
                if file(number) not in misses:
                    slot = self.state.slot(*file(number))
                    assert slot is not None
                    assert bytes(self.segment.view[slot.offset : slot.offset + PAYLOAD]) == content(number)
            answer.set_result(misses)

        self.tier.fetch(2, map(file, numbers), self.store.id, timeout_s, done)
        return await answer

    def drop(self) -> None:
        self.state.evict(self.state.snapshot())

    def idle(self) -> bool:
        held = self.state._owners.get(FILES_OWNER)
        return held is None or not (held.pins or held.reservations)

    @property
    def helpers(self) -> list[FileHelper]:
        workers = self.tier._workers[0]
        return [worker.helper for worker in workers if worker.helper is not None and not worker.retired.is_set()]

    async def fill(self) -> None:
        """Put blocks into files, and into no memory, once both threads have their processes."""
        self.put(0)  # keeps the namespace
        await until(lambda: len(list(self.posix.files())) == 1, "one is written")
        number = 1000
        while len(self.helpers) < 2 or not all(helper._ready for helper in self.helpers):
            self.put(*range(number, number + 128))
            number += 128
            await until(self.idle, "they are written")
            self.posix.remove([found.name for found in self.posix.files()])
            self.drop()
        self.put(*MANY)
        await until(lambda: len(list(self.posix.files())) == len(MANY), "they are written")
        await until(self.idle, "nothing is held")
        self.drop()


@pytest.fixture
def with_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a test with a node whose blocks of MANY are in files."""
    monkeypatch.setattr(fileworker, "HELPER_AGAIN_S", 0.0)

    def run(test: Callable[[Node], Awaitable[None]], timeout_s: float = T) -> None:
        async def main() -> None:
            node = Node(tmp_path / "kv", timeout_s)
            try:
                await node.fill()
                await test(node)
                await until(node.idle, "nothing is held")
                node.state.check()
            finally:
                node.tier.close()
                helpers = [worker.helper for worker in node.tier._workers[0] if worker.helper is not None]
                await until(lambda: all(h._process.poll() is not None for h in helpers), "processes end with it")
                node.segment.close()

        asyncio.run(main())

    return run


def test_processes_do_what_is_many_and_small(with_node: Any) -> None:
    """All but what comes alone is theirs, and is counted with the node's own calls."""

    async def test(node: Node) -> None:
        alone: Counter[str] = Counter()

        def around(operation: str, size: int, call: Callable[[], Any]) -> Any:
            alone[operation] += 1
            return call()

        node.faulty.around = around  # type: ignore[method-assign]
        before = node.store.measured()
        assert await node.fetch(*MANY) == {}
        node.put(*range(100, 164))
        await until(lambda: len(list(node.posix.files())) == len(MANY) + 64, "they are written")
        await until(node.idle, "nothing is held")
        after = node.store.measured()
        assert after["read"].calls - before["read"].calls == len(MANY)
        assert after["read"].bytes - before["read"].bytes == len(MANY) * EXTENT
        assert after["write"].calls - before["write"].calls == 64
        assert after["read"].seconds > before["read"].seconds
        assert alone["read"] < len(MANY) // 4
        assert alone["write"] < 64 // 4

    with_node(test)


def test_files_that_are_broken_or_gone_are_told_apart(with_node: Any, tmp_path: Path) -> None:
    """What a process finds out has the reasons that a thread would give, and is set aside as well."""

    async def test(node: Node) -> None:
        paths = {found.name.key: tmp_path / "kv" / "blocks" / str(found.name) for found in node.posix.files()}
        data = bytearray(paths[key(3)].read_bytes())
        data[5000] ^= 1
        paths[key(3)].write_bytes(data)
        paths[key(4)].write_bytes(data[:1000])
        paths[key(5)].unlink()
        paths[key(6)].write_bytes(paths[key(7)].read_bytes())
        assert await node.fetch(*MANY) == {
            file(3): Miss.FILE_BROKEN, file(4): Miss.FILE_BROKEN, file(5): Miss.FILE_MISSING, file(6): Miss.FILE_BROKEN,
        }  # fmt: skip
        assert len(node.posix.aside_files()) == 3

    with_node(test)


def test_a_process_that_is_killed_costs_nothing(with_node: Any) -> None:
    """Its thread does the rest of the batch, and has another process soon."""

    async def test(node: Node) -> None:
        for _ in range(3):
            await until(lambda: len(node.helpers) == 2, "both have one")
            killed = [helper.pid for helper in node.helpers]
            for pid in killed:
                os.kill(pid, signal.SIGSTOP)  # so that it dies in the middle of a batch
            fetched = asyncio.ensure_future(node.fetch(*MANY))
            workers = node.tier._workers[0]  # which do it alone, and soon, if their new ones have not started yet
            await until(lambda: fetched.done() or any(worker.started for worker in workers), "one has begun")  # noqa: B023
            for pid in killed:
                with contextlib.suppress(ProcessLookupError):  # one of the last round, whose thread has slept since
                    os.kill(pid, signal.SIGKILL)
            assert await fetched == {}
            await until(node.idle, "nothing is held")
            node.drop()
            assert await node.fetch(*MANY) == {}
            await until(node.idle, "nothing is held")
            node.drop()
        assert node.tier.state.backends[0].counters["errors"] == 0

    with_node(test)


def test_a_process_that_stands_still_is_killed_and_followed_by_another(with_node: Any) -> None:
    """After the timeout the backend is down, and slots are given back when the process is no more; then it is up."""

    async def test(node: Node) -> None:
        stopped = [helper.pid for helper in node.helpers]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        fetched = asyncio.ensure_future(node.fetch(*MANY))
        workers = node.tier._workers[0]
        # One is sent a second batch, too, unless it looked for one too early.
        await until(lambda: fetched.done() or any(worker._ahead for worker in workers), "they have begun")
        assert set((await fetched).values()) <= {Miss.STORAGE_DOWN}
        backend = node.tier.state.backends[0]
        assert backend.counters["down"] == 1
        await until(lambda: node.state.reserved == 0, "slots are free: nobody can fill them any more")
        await until(lambda: node.tier._out == [0], "nobody counts on what they were sent")
        await until(lambda: backend.state is BackendState.UP, "it comes back")
        assert await node.fetch(*MANY) == {}
        await until(lambda: not {helper.pid for helper in node.helpers} & set(stopped), "they are not used any more")

    with_node(test, timeout_s=2.0)


def batch_of(numbers: range) -> fileworker.Batch:
    reads = [read_of(number, number) for number in numbers]
    return fileworker.Batch(0, list(reads))


class Told:
    """Stands for a process: answers come when the test says so."""

    def __init__(self) -> None:
        self.sent: list[list[Any]] = []
        self.answers: queue.SimpleQueue[list[Any] | Exception] = queue.SimpleQueue()
        self.killed = threading.Event()
        self.closed = threading.Event()

    def ready(self) -> bool:
        return True

    def send(self, jobs: list[Any]) -> None:
        self.sent.append(jobs)

    def receive(self) -> list[Any]:
        answers = self.answers.get(timeout=T)
        if isinstance(answers, Exception):
            raise answers
        return answers

    def kill(self) -> None:
        self.killed.set()

    def close(self) -> None:
        self.closed.set()


@pytest.fixture
def desk(tmp_path: Path) -> Any:
    """Return what a thread works for, and that thread, not started, with a process that is told what to answer."""
    segment = Segment.create(64 * EXTENT, lock=False)
    store = PosixStore(str(tmp_path / "kv"), owner="node", capacity_bytes=1 << 30)
    opening = Opening(str(tmp_path / "kv"), "node", True, "off")
    made = fileworker.Desk(store, segment, segment.view, deque(), lambda: None, opening)
    worker = fileworker.Worker(made, 0, helped=True)
    worker.helper = Told()  # type: ignore[assignment]
    yield made, worker, worker.helper
    made.batches.put(None)
    asyncio.run(until(lambda: not worker.is_alive(), "it has ended"))
    assert not worker.is_alive()
    segment.close()


def answered(batch: fileworker.Batch, count: int) -> list[Any]:
    return [(0.0, None, (PAYLOAD, b""))] * count


def test_what_was_sent_ahead_comes_back_when_the_thread_is_given_up(desk: Any) -> None:
    """Also if the first batch ends well after that: its jobs would be awaited for ever, and their slots held."""
    made, worker, told = desk
    first, second = batch_of(range(4)), batch_of(range(4, 8))
    made.batches.put(first)
    made.batches.put(second)
    worker.start()
    asyncio.run(until(lambda: len(told.sent) == 2, "both are sent"))
    worker.retire()
    for batch in worker.batches:
        batch.abandoned = True
        batch.give_back(made.results)
    told.answers.put(answered(first, 4))
    asyncio.run(until(lambda: not worker.is_alive(), "it has ended"))
    assert told.closed.is_set()
    done = [(batch, job.file, failure) for batch, job, failure, _ in made.results if job is not None]
    assert [entry[2] for entry in done] == [None] * 4 + [fileworker._GIVEN_BACK] * 4
    assert {entry[1] for entry in done} == {file(number) for number in range(8)}
    assert [batch for batch, job, _, _ in made.results if job is None] == [first, second]


def test_what_a_process_cannot_do_has_its_turn(desk: Any) -> None:
    """However much comes that it can do: a thread that takes such a batch does it next."""
    made, worker, told = desk
    learn = fileworker.Batch(0, [Learn(0)])
    batches = [batch_of(range(4)), learn, *(batch_of(range(4)) for _ in range(8))]
    for batch in batches:
        made.batches.put(batch)
    worker.start()
    told.answers.put(answered(batches[0], 1))
    told.answers.put(answered(batches[0], 3))
    asyncio.run(until(lambda: any(one is learn and job is None for one, job, _, _ in [*made.results]), "it is done"))
    assert len(told.sent) <= 3
    for _ in batches[2:]:
        told.answers.put(answered(batches[0], 4))
    asyncio.run(until(lambda: [job for _, job, _, _ in [*made.results]].count(None) == len(batches), "all are done"))


def test_without_processes_threads_do_it_all(with_node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """When none can be started the node is slower, and that is all."""

    async def test(node: Node) -> None:
        monkeypatch.setattr(sys, "executable", "/nonexistent/python")
        for helper in node.helpers:
            helper.kill()
        for _ in range(2):
            assert await node.fetch(*MANY) == {}
            await until(node.idle, "nothing is held")
            node.drop()
        assert all(helper._process.poll() is not None for helper in node.helpers)

    with_node(test)


@pytest.fixture
def helper(tmp_path: Path) -> Any:
    """Return a process of its own with a segment and a directory, and the segment."""
    store = PosixStore(str(tmp_path / "kv"), owner="node", capacity_bytes=1 << 30)
    segment = Segment.create(64 * EXTENT, lock=False)
    made = FileHelper(Opening(str(tmp_path / "kv"), "node", True, "off"), store.id, segment.fd, segment.size)
    yield made, segment, store
    made.kill()
    made.close()
    segment.close()


def wait_ready(made: FileHelper) -> None:
    end = time.monotonic() + T
    while not made.ready():
        assert time.monotonic() < end, "it is not ready"
        time.sleep(0.005)


def write_of(segment: Segment, number: int, slot: int) -> Write:
    """Return the job that writes a block, which is made in the segment."""
    payload_at = slot * EXTENT + 512
    segment.view[payload_at : payload_at + PAYLOAD] = content(number)
    header = SlotHeader(SPACE.digest, key(number), 0, PAYLOAD, 2, 1, checksums(content(number)))
    pack_header(segment.view, payload_at, header)
    return Write(0, file(number), slot * EXTENT, EXTENT, PAYLOAD, 0, None)


def read_of(number: int, slot: int) -> Read:
    return Read(file(number), [0], True, start=slot * EXTENT, size=EXTENT, shard_bytes=PAYLOAD, layers=2)


def receive_all(made: FileHelper, count: int) -> list[filehelper.Answer]:
    answers: list[filehelper.Answer] = []
    while len(answers) < count:
        answers += made.receive()
    return answers


def test_answers_come_in_the_order_of_jobs(helper: Any) -> None:
    """Each says how long it took and what it brought, or what went wrong."""
    made, segment, _ = helper
    wait_ready(made)
    made.send([write_of(segment, number, number) for number in range(8)])
    assert [failure for _, failure, _ in receive_all(made, 8)] == [None] * 8
    segment.view[:] = bytes(segment.size)
    made.send([read_of(number, 10 + number) for number in (5, 99, 6)])
    (_, fine, brought), (_, missing, nothing), (seconds, _, _) = receive_all(made, 3)
    assert (fine, brought) == (None, (PAYLOAD, checksums(content(5))))
    assert isinstance(missing, Failure)
    assert (missing.trouble, nothing) == (Trouble.MISSING, None)
    assert seconds > 0
    assert bytes(segment.view[15 * EXTENT + 512 : 16 * EXTENT]) == content(5)


def test_one_that_opens_another_backend_is_not_used(tmp_path: Path, helper: Any) -> None:
    """The directory may have been mounted over since the node opened it."""
    _, segment, _ = helper
    other = PosixStore(str(tmp_path / "other"), owner="x", capacity_bytes=1 << 30)
    made = FileHelper(Opening(str(tmp_path / "kv"), "node", True, "off"), other.id, segment.fd, segment.size)
    with pytest.raises(HelperEndedError, match="another backend"):
        wait_ready(made)


def test_one_that_stands_still_is_ended_like_any_other(helper: Any) -> None:
    """A thread that ends would otherwise wait for it for ever."""
    made, _, _ = helper
    wait_ready(made)
    os.kill(made.pid, signal.SIGSTOP)
    thread = threading.Thread(target=made.close, daemon=True)
    thread.start()
    thread.join(T)
    assert not thread.is_alive()


def test_one_of_another_version_is_not_used(helper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package may have been replaced under a node that runs: others' files may then mean something else."""
    made, _, _ = helper
    monkeypatch.setattr(filehelper, "__version__", "0.0.1")
    with pytest.raises(HelperEndedError, match="another version"):
        wait_ready(made)


@pytest.mark.parametrize("answer", [3, [3], [(0.1, "odd", "", 0, None)]])
def test_one_that_answers_nonsense_has_ended(helper: Any, monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    """Its thread must not end of it: it has jobs in hand."""
    made, _, _ = helper
    wait_ready(made)
    monkeypatch.setattr(made, "_receive", lambda: answer)
    with pytest.raises(HelperEndedError):
        made.receive()


def test_one_does_not_import_what_lies_in_the_working_directory(
    tmp_path: Path, helper: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node, started by its own script, does not either."""
    _, segment, store = helper
    (tmp_path / "json.py").write_text("raise SystemExit('found here')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    made = FileHelper(Opening(str(tmp_path / "kv"), "node", True, "off"), store.id, segment.fd, segment.size)
    wait_ready(made)
    made.close()


def test_one_that_cannot_open_its_directory_has_ended(tmp_path: Path, helper: Any, capfd: Any) -> None:
    """And makes none: the node has one, which is away."""
    _, segment, store = helper
    made = FileHelper(Opening(str(tmp_path / "away"), "node", True, "off"), store.id, segment.fd, segment.size)
    with pytest.raises(HelperEndedError):
        wait_ready(made)
    assert not (tmp_path / "away").exists()
    assert "no backend" in capfd.readouterr().err


@pytest.mark.parametrize("end", [True, False])
def test_what_arrives_after_the_end_of_a_process_is_not_in_a_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: bool
) -> None:
    """A network's kernel goes on with the reads of a process that was killed: into memory that nobody else has."""
    store = PosixStore(str(tmp_path / "kv"), owner="node", capacity_bytes=1 << 30)
    segment = Segment.create(64 * EXTENT, lock=False)
    written = write_of(segment, 1, 1)
    store.write(FileName(SPACE.digest, key(1), 0), segment.view[written.start : written.start + written.size])
    asked: list[memoryview] = []

    def read_into(name: Any, target: memoryview) -> None:
        asked.append(target)
        PosixStore.read_into(store, name, target)

    def try_read(names: Any, targets: list[memoryview], until: float) -> list[bool]:
        asked.extend(targets)
        return PosixStore.try_read(store, names, targets, until)

    monkeypatch.setattr(store, "read_into", read_into)
    monkeypatch.setattr(store, "try_read", try_read)
    monkeypatch.setattr(filehelper, "open_store", lambda *_, **__: store)
    monkeypatch.setattr(posix_io, "reads_end", lambda _: end)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mapped = AttachedSegment.from_fd(os.dup(segment.fd), segment.size)
    thread = threading.Thread(
        target=filehelper._serve, args=(theirs, Opening(str(tmp_path / "kv"), "node", True, "off"), mapped)
    )
    thread.start()
    with ours, theirs:
        assert marshal.loads(ours.recv(1 << 16))[1] == store.id
        ours.send(marshal.dumps([filehelper._packed(read_of(number, 10 + number)) for number in (1, 9)]))
        answers: list[Any] = []
        while len(answers) < 2:
            answers += marshal.loads(ours.recv(1 << 16))
        ours.shutdown(socket.SHUT_RDWR)
        thread.join(T)
    assert [answer[1] for answer in answers] == ["", "missing"]
    assert bytes(segment.view[11 * EXTENT + 512 : 12 * EXTENT]) == content(1)
    for target in asked:
        target[:] = b"?" * EXTENT
    late = b"?" * PAYLOAD
    assert (bytes(segment.view[11 * EXTENT + 512 : 12 * EXTENT]) == late) is end
    assert (bytes(segment.view[19 * EXTENT + 512 : 20 * EXTENT]) == late) is end
    asked.clear()
    mapped.close()
    segment.close()


def test_what_is_local_and_what_is_not(tmp_path: Path) -> None:
    """Of filesystems that are not known to wait, nothing is believed."""
    assert not posix_io.reads_end("/proc")
    assert not posix_io.reads_end(str(tmp_path / "away"))


def test_one_whose_node_is_killed_ends(tmp_path: Path) -> None:
    """Also while it stands still: it would keep the node's memory."""
    PosixStore(str(tmp_path / "kv"), owner="node", capacity_bytes=1 << 30)
    script = (
        "import sys, time; from kvpool.server.filehelper import *; from kvpool.tiers.dram import Segment\n"
        "segment = Segment.create(1 << 20, lock=False)\n"
        "made = FileHelper(Opening(sys.argv[1], 'x', True, 'off'), b'?', segment.fd, segment.size)\n"
        "made._receive(); print(made.pid, flush=True); time.sleep(100)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "kv")], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        pidfd = os.pidfd_open(pid)
        os.kill(pid, signal.SIGSTOP)
        parent.kill()
    end = time.monotonic() + T
    while not _ended(pidfd):
        assert time.monotonic() < end, "it lives on"
        time.sleep(0.005)
    os.close(pidfd)


def _ended(pidfd: int) -> bool:
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return True
    return False
