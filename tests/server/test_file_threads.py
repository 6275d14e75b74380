"""The file tier's threads over stores that hang, fail and lie: nobody waits longer than they said."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import xxhash

from kvpool.core.file_jobs import FILES_OWNER, LOOKS_MAX, Failure, File, Miss, Remove, Trouble
from kvpool.core.filetier import FileTierState
from kvpool.core.messages import Scanned
from kvpool.core.segment import SegmentState
from kvpool.model import Backend, BackendState, Namespace
from kvpool.server import filetier
from kvpool.server.filescan import TRIES_MAX
from kvpool.server.filetier import SCANS_LOST_MAX, FileTier
from kvpool.server.filework import Gone, perform
from kvpool.testing.store_faults import FaultyStore
from kvpool.tiers import blockfile
from kvpool.tiers.dram import Segment, SlotHeader, pack_header
from kvpool.tiers.layout import IDENTITY_FILE
from kvpool.tiers.memory_store import MemoryStore
from kvpool.tiers.posix import PosixStore
from kvpool.tiers.store import FileName, StoredFile, StoreError, StoreFullError, StoreMissingError
from tests.server.waiting import T, until

SPACE = Namespace(model="demo")
PAYLOAD = 8192
SLOTS = 64
TIMEOUT_S = 0.2


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def content(number: int) -> bytes:
    return number.to_bytes(8, "big") * (PAYLOAD // 8)


def named(number: int) -> FileName:
    return FileName(SPACE.digest, key(number), 0)


def file(number: int) -> File:
    return SPACE.digest + key(number), 0


class Node:
    """A segment and a file tier of two threads, as the data plane uses them."""

    def __init__(self, slots: int = SLOTS, timeout_s: float = T) -> None:
        self.store = MemoryStore()
        self.faulty = FaultyStore(self.store)
        self.segment = Segment.create(slots * (PAYLOAD + 512), lock=False)
        self.state = SegmentState(self.segment.size)
        self.state.register(SPACE)
        tier = FileTierState(self.state, [], queue_bytes_max=1 << 20)
        self.tier = FileTier(tier, self.segment, threads=2, timeout_s=timeout_s)
        self.tier.add(self.faulty)

    def put(self, *numbers: int) -> None:
        """Store blocks; raises when one finds no room."""
        held = self.state.reserve(1, SPACE.digest, (0,), b"".join(map(key, numbers)), PAYLOAD, 1)
        checksums = b""
        for number, offset in zip(numbers, held.offsets, strict=True):
            assert offset >= 0
            self.segment.view[offset : offset + PAYLOAD] = content(number)
            checksums += xxhash.xxh3_64_intdigest(content(number)).to_bytes(8, "little")
        for slot in self.state.commit(1, held.id, checksums):
            header = SlotHeader(SPACE.digest, slot.key, 0, PAYLOAD, 1, slot.generation, slot.checksums or b"")
            pack_header(self.segment.view, slot.offset, header)
            self.tier.state.committed([slot])
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
        """Empty the memory."""
        self.state.evict(self.state.snapshot())

    @property
    def backend(self) -> Backend:
        return self.tier.state.backends[0].described()

    def idle(self) -> bool:
        held = self.state._owners.get(FILES_OWNER)
        return held is None or not (held.pins or held.reservations)


def with_node(test: Callable[[Node], Awaitable[None]], slots: int = SLOTS, timeout_s: float = T) -> None:
    """Run a test on a loop of its own; ``timeout_s`` is short where something is to hang, and only there."""

    async def run() -> None:
        node = Node(slots, timeout_s)
        try:
            await test(node)
            node.state.check()
        finally:
            node.tier.close()
            node.segment.close()

    asyncio.run(run())


def test_many_small_files_come_back_with_their_bytes() -> None:
    """Written behind, dropped, read again: each batch is verified where it was read."""

    async def test(node: Node) -> None:
        for first in range(0, 512, 32):
            node.put(*range(first, first + 32))
            await until(lambda first=first: len(list(node.store.files())) == first + 32, "they are written")
        for first in range(0, 512, 32):
            assert await node.fetch(*range(first, first + 32)) == {}
        await until(node.idle, "nothing is held")

    with_node(test)


def test_puts_go_on_at_full_speed_while_writes_hang() -> None:
    """An eviction never waits for a disk: only what threads have in hand stays, and the tier is down with a reason."""

    async def test(node: Node) -> None:
        event = node.faulty.hang()
        node.put(0)
        await asyncio.to_thread(node.faulty.wait_hanging)
        for number in range(1, 50 * SLOTS):
            node.put(number)
        await until(lambda: node.backend.state is BackendState.DOWN, "it is down")
        assert "no answer" in node.backend.reason
        assert await node.fetch(100_000) == {file(100_000): Miss.STORAGE_DOWN}
        for number in range(50 * SLOTS, 100 * SLOTS):
            node.put(number)
        node.faulty.heal()
        event.set()
        await until(lambda: node.backend.state is BackendState.UP, "it comes back by itself")
        node.put(200_000)
        await until(lambda: named(200_000) in {found.name for found in node.store.files()}, "it writes again")
        await until(node.idle, "nothing is held")

    with_node(test, timeout_s=TIMEOUT_S)


def test_a_request_is_answered_at_its_deadline_while_reads_hang() -> None:
    """The slot that a thread may still fill stays taken until the thread returns."""

    async def test(node: Node) -> None:
        node.put(1)
        await until(lambda: list(node.store.files()), "it is written")
        await until(node.idle, "nothing is held")
        node.drop()
        event = node.faulty.hang(["read"])
        assert await node.fetch(1, timeout_s=0.05) == {file(1): Miss.NOT_IN_TIME}
        assert node.state.reserved == 1
        assert await node.fetch(1) == {file(1): Miss.STORAGE_DOWN}  # long before its own deadline
        assert node.state.reserved == 1
        node.faulty.heal()
        event.set()
        await until(lambda: node.state.reserved == 0, "the slot is free")
        await until(lambda: node.backend.state is BackendState.UP, "it comes back")
        assert await node.fetch(1) == {}

    with_node(test, timeout_s=10 * TIMEOUT_S)


def test_a_broken_file_is_read_twice_and_set_aside() -> None:
    """One bad read may be the way; two are the file."""

    async def test(node: Node) -> None:
        good, torn = blockfile.build(named(1), content(1), 1), blockfile.build(named(2), content(2), 1)
        torn[5000:] = bytes(len(torn) - 5000)
        node.store.write(named(1), memoryview(good))
        node.store.write(named(2), memoryview(torn))
        assert await node.fetch(1, 2, 3) == {file(2): Miss.FILE_BROKEN, file(3): Miss.FILE_MISSING}
        assert list(node.store.aside) == [named(2)]
        assert node.backend.state is BackendState.UP

    with_node(test)


def test_a_file_that_has_grown_beyond_all_memory_is_set_aside() -> None:
    """No room could ever be found for it: it is broken, as whoever wrote it wrote something shorter."""

    async def test(node: Node) -> None:
        grown = bytearray(node.segment.size + 4096)
        grown[: PAYLOAD + 512] = blockfile.build(named(1), content(1), 1)
        node.store.write(named(1), memoryview(grown))
        assert await node.fetch(1) == {file(1): Miss.FILE_BROKEN}
        assert list(node.store.aside) == [named(1)]
        assert [added for _, added in node.tier.state.changes.take(10)[0].values()] == [False]

    with_node(test)


def test_a_removal_is_not_begun_too_late() -> None:
    """Somebody else was asked for it meanwhile, and the file may be a new one."""
    store = MemoryStore()
    store.write(named(1), memoryview(b"new"))
    failure, _ = perform(store, memoryview(b""), Remove(0, 7, [file(1)], time.monotonic() - 0.001))
    assert failure is not None
    assert failure.trouble is Trouble.GIVEN_BACK
    assert [found.name for found in store.files()] == [named(1)]
    assert perform(store, memoryview(b""), Remove(0, 7, [file(1)], time.monotonic() + T)) == (None, None)
    assert not list(store.files())


def test_files_are_looked_for_only_where_they_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not there is gone only if the backend is itself: a mount may be away."""
    store = MemoryStore()
    store.write(named(1), memoryview(b"here"))
    look = Remove(0, 7, [file(1), file(2)], look=True)
    assert perform(store, memoryview(b""), look) == (None, Gone([file(2)]))

    def probe() -> None:
        raise StoreError("not mounted")

    monkeypatch.setattr(store, "probe", probe)
    assert perform(store, memoryview(b""), Remove(0, 7, [file(1)], look=True)) == (None, Gone([]))
    failure, found = perform(store, memoryview(b""), look)
    assert (failure, found) == (Failure(Trouble.ERROR, "not mounted"), None)


def spoiled(extent: bytes, rng: random.Random) -> bytes:
    """Return a file with something wrong at a random place."""
    data = bytearray(extent)
    at = rng.randrange(len(data))
    kind = rng.randrange(5)
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        return bytes(data[:at])
    elif kind == 2:
        data[at:] = bytes(len(data) - at)
    elif kind == 3:
        end = min(len(data), at + rng.randrange(1, 4096))
        data[at:end] = rng.randbytes(end - at)
    else:
        data += rng.randbytes(rng.randrange(1, 2000))
    return bytes(data)


def test_thousands_of_spoiled_files_and_not_one_wrong_byte() -> None:
    """Whatever is wrong with a file: it is a miss and set aside, or nothing that counts was touched."""

    async def test(node: Node) -> None:
        rng = random.Random(4)
        broken = 0
        for first in range(0, 3000, 50):
            numbers = range(first, first + 50)
            for number in numbers:
                extent = blockfile.build(named(number), content(number), 1)
                node.store.write(named(number), memoryview(spoiled(extent, rng)))
            misses = await node.fetch(*numbers)  # checks the bytes of those that are hits
            assert set(misses.values()) <= {Miss.FILE_BROKEN, Miss.FILE_MISSING}
            broken += len(misses)
            left = {found.name for found in node.store.files()}
            assert {number for number in numbers if named(number) in left} == {
                number for number in numbers if file(number) not in misses
            }
            node.drop()
        assert broken > 2500

    with_node(test)


def test_a_strangers_file_is_no_hit() -> None:
    """A whole file under another key, shard or namespace holds somebody else's bytes."""

    async def test(node: Node) -> None:
        other = Namespace(model="other")
        strangers = [named(7), FileName(SPACE.digest, key(1), 1), FileName(other.digest, key(3), 0)]
        for number, name in enumerate(strangers, 1):
            node.store.write(named(number), memoryview(blockfile.build(name, content(number), 1)))
        assert await node.fetch(1, 2, 3) == dict.fromkeys(map(file, (1, 2, 3)), Miss.FILE_BROKEN)

    with_node(test)


def test_errors_and_a_full_disk_have_their_states_and_end() -> None:
    """EIO: down. ENOSPC: read-only, reads go on. Both come back."""

    async def test(node: Node) -> None:
        node.put(1)
        await until(lambda: list(node.store.files()), "it is written")
        node.faulty.fail(StoreError("Input/output error"))
        node.put(2)
        await until(lambda: node.backend.state is BackendState.DOWN, "it is down")
        assert node.backend.reason == "Input/output error"
        node.faulty.heal()
        await until(lambda: node.backend.state is BackendState.UP, "it is up")
        node.faulty.fail(StoreFullError("No space left on device"), ["write", "probe"])
        node.put(3)
        await until(lambda: node.backend.state is BackendState.READ_ONLY, "it is read-only")
        await until(node.idle, "nothing is held")
        node.drop()
        assert await node.fetch(1) == {}
        node.faulty.heal()
        await until(lambda: node.backend.state is BackendState.UP, "it is up again")

    with_node(test)


def test_a_client_that_goes_is_not_answered() -> None:
    """Its request holds nothing any more."""

    async def test(node: Node) -> None:
        event = node.faulty.hang(["read"])
        node.tier.fetch(7, [file(1)], node.store.id, T, lambda misses: os.abort())
        node.tier.cancel(7)
        node.faulty.heal()
        event.set()
        await until(node.idle, "nothing is held")

    with_node(test)


def test_a_node_ends_while_its_storage_hangs() -> None:
    """Threads that never return do not keep it."""

    async def test(node: Node) -> None:
        event = node.faulty.hang()
        node.put(1)
        await asyncio.to_thread(node.faulty.wait_hanging)
        node.tier.close()
        event.set()
        await until(lambda: not node.faulty.hanging, "threads end")

    with_node(test)


def test_what_a_stuck_thread_has_not_begun_is_done_by_others() -> None:
    """Jobs behind one that hangs are given back at once; their end says nothing of a backend that is up again."""

    async def test(node: Node) -> None:
        backend = node.tier.state.backends[0]
        event = node.faulty.hang(["write"])
        node.put(*range(200))
        await until(lambda: node.faulty.hanging == 2, "both threads hang")
        node.faulty.heal()  # whoever hangs, hangs
        await until(lambda: node.backend.state is BackendState.DOWN, "it is down")
        assert "no answer" in node.backend.reason
        await until(lambda: node.state.pinned <= 2, "only what hangs is held")
        assert "no answer" in node.backend.reason
        await until(lambda: node.backend.state is BackendState.UP, "it is up again")
        event.set()
        await until(node.idle, "threads have come back")
        assert backend.errors <= 2
        assert backend.counters["down"] == 1

    with_node(test, 1024, TIMEOUT_S)


def test_what_is_read_from_a_file_is_told() -> None:
    """A block that came into memory, and those that had to go for it, are changes like any others."""

    async def test(node: Node) -> None:
        node.put(1)
        await until(lambda: list(node.store.files()), "it is written")
        await until(node.idle, "nothing is held")
        node.drop()
        node.state.take_changes()
        changes = node.tier.state.changes
        changes.told(1, changes.take(100)[0])
        node.tier.state.storage()
        told: list[bool] = []
        node.tier.changed = lambda: told.append(node.state.has_changes)
        assert await node.fetch(1) == {}
        assert True in told

    with_node(test)


def test_an_end_in_order_writes_what_waits() -> None:
    """What is queued when a node is asked to end is in files when it ends."""

    async def test(node: Node) -> None:
        slow = threading.Event()
        node.faulty.around = lambda operation, size, call: (slow.wait(0.005), call())[1]  # type: ignore[method-assign]
        node.put(*range(50))
        assert len(list(node.store.files())) < 50
        await node.tier.finish()
        assert {found.name for found in node.store.files()} == {named(number) for number in range(50)}
        assert len(node.tier.state.changes) == 50
        assert node.idle()

    with_node(test)


def test_an_end_in_order_does_not_wait_for_a_store_that_hangs(caplog: pytest.LogCaptureFixture) -> None:
    """What was not written is said to have been lost."""

    async def test(node: Node) -> None:
        event = node.faulty.hang()
        node.put(*range(10))
        await node.tier.finish()
        event.set()
        assert "blocks were not written" in caplog.text
        await until(node.idle, "threads have come back")

    with_node(test, timeout_s=TIMEOUT_S)


def test_a_scan_that_lost_changes_made_necessary_is_told_to_the_end() -> None:
    """It begins again after a session that broke or a scan that failed, and once more if changes got lost meanwhile."""

    async def test(node: Node) -> None:
        lost, told = node.tier.state.changes.lost, []
        listens = broken = True

        def tell(scanned: Scanned) -> bool:
            told.append(scanned)
            if broken:
                node.tier.session_ended()
            return not broken

        node.tier.tell, node.tier.listening = tell, lambda: listens
        lost.add(node.store.id)
        await until(lambda: len(told) > 1, "it is tried again")
        listens = False
        node.tier.session_ended()
        assert lost == {node.store.id}
        broken = False
        told.clear()
        listens = True
        await until(lambda: told and told[-1].last, "it is told")
        assert not lost
        assert len(told) == 2
        lost.add(node.store.id)
        node.tier._scan(time.monotonic())
        lost.add(node.store.id)  # another one
        await until(lambda: sum(scanned.last for scanned in told) == 3, "it is told twice more")
        assert not lost

    with_node(test)


def test_a_directory_that_is_deleted_gets_its_blocks_again(tmp_path: Path) -> None:
    """When they are used, with what tells of their namespace: it is made anew by whoever finds that it is gone."""

    async def test(node: Node) -> None:
        place = tmp_path / "pool"
        directory = PosixStore(str(place), owner="tester", direct=False)
        node.tier.add(directory)
        node.tier.state.set_full(frozenset({node.store.id}))
        node.put(*range(8))
        await until(lambda: len(list(directory.files())) == 8, "all are written")
        await until(node.idle, "nothing is held")
        shutil.rmtree(place)
        misses: list[dict[File, Miss]] = []
        node.tier.fetch(2, [file(100)], directory.id, T, misses.append)
        await until((place / IDENTITY_FILE).exists, "it is made anew")

        def used() -> bool:
            node.tier.state.used(node.state.slot(*file(number)) for number in range(8))
            node.tier.pump()
            return len(list(directory.files())) == 8

        await until(used, "all are written again")
        assert directory.namespaces() == [SPACE]
        assert misses

    with_node(test)


def test_one_answer_that_fails_costs_nobody_else_theirs(caplog: pytest.LogCaptureFixture) -> None:
    """Requests that end together are answered one by one; one that is cancelled meanwhile is not."""

    async def test(node: Node) -> None:
        answered: list[int] = []

        def fail(misses: dict[File, Miss]) -> None:
            node.tier.cancel(9)
            raise ValueError("no such connection")

        node.put(1)
        await until(lambda: list(node.store.files()), "it is written")
        await until(node.idle, "nothing is held")
        node.drop()
        node.tier.fetch(7, [file(1)], node.store.id, T, fail)
        node.tier.fetch(8, [file(1)], node.store.id, T, lambda misses: answered.append(8))
        node.tier.fetch(9, [file(1)], node.store.id, T, lambda misses: answered.append(9))
        await until(node.idle, "nothing is held")
        assert answered == [8]
        assert "no such connection" in caplog.text

    with_node(test)


def test_what_one_turn_of_the_loop_does_not_take_is_taken_in_the_next() -> None:
    """A thousand writes of blocks that are gone: others have their turn in between."""

    async def test(node: Node) -> None:
        node.tier.state._queue_bytes_max = 1 << 30
        node.tier.state.take(0)  # the namespaces it keeps
        node.tier._giving_out = False
        for first in range(0, 1024, SLOTS):
            node.put(*range(first, first + SLOTS))
        node.tier._giving_out = True
        node.tier.pump()
        backend = node.tier.state.backends[0]
        assert backend.counters["dropped_evicted"] == LOOKS_MAX
        await until(lambda: backend.counters["dropped_evicted"] == 1024 - SLOTS, "all are looked at")
        await until(lambda: len(list(node.store.files())) == SLOTS, "what is there is written")

    with_node(test)


def test_what_a_backend_that_fails_has_left_is_worked_off_at_once() -> None:
    """In slices, one a turn of the loop, and not one a tick."""

    async def test(node: Node) -> None:
        node.tier._giving_out = False
        numbers = range(1000, 1000 + 10 * LOOKS_MAX)
        answer = asyncio.create_task(node.fetch(*numbers))
        await asyncio.sleep(0)
        node.tier.state.stuck(0, 1.0, time.monotonic())
        node.tier._timer.cancel()
        node.tier.pump()
        for _ in range(20):
            await asyncio.sleep(0)
        assert answer.done()
        assert await answer == dict.fromkeys(map(file, numbers), Miss.STORAGE_DOWN)

    with_node(test)


def test_a_backend_whose_threads_all_hang_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that succeeds is not enough when nobody is left to do anything."""
    monkeypatch.setattr(filetier, "STUCK_FACTOR", 1)

    async def test(node: Node) -> None:
        event = node.faulty.hang(["write"])
        node.put(1)
        node.put(2)
        await until(lambda: node.faulty.hanging == 2, "both threads hang")
        node.faulty.heal()
        await until(lambda: node.backend.reason == "all threads hang", "it says why")
        assert node.backend.state is BackendState.DOWN
        event.set()
        await until(lambda: node.backend.state is BackendState.UP, "it is up when they have come back")
        node.put(3)
        await until(lambda: named(3) in {found.name for found in node.store.files()}, "it writes again")

    with_node(test, timeout_s=TIMEOUT_S)


def test_a_probe_that_never_returns_is_given_up() -> None:
    """Another one is begun; what the first one says in the end counts no more."""

    async def test(node: Node) -> None:
        event = node.faulty.hang(["probe"])
        node.faulty.fail_once(StoreError("Input/output error"), "write")
        node.put(1)
        await until(lambda: node.faulty.hanging == 1, "the probe hangs")
        await until(lambda: node.backend.state is BackendState.DOWN, "it is down")
        node.faulty.heal()
        await until(lambda: node.backend.state is BackendState.UP, "another probe has found it up")
        assert node.tier._probes_lost[0] == 1
        event.set()
        await until(lambda: node.tier._probes_lost[0] == 0, "the first one has come back")
        assert node.backend.state is BackendState.UP

    with_node(test, timeout_s=TIMEOUT_S)


def test_a_probe_without_a_thread_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long there is none: then the backend comes back."""
    start = threading.Thread.start

    async def test(node: Node) -> None:
        refused = 0

        def refuse(thread: threading.Thread) -> None:
            nonlocal refused
            if thread.name == "kvpool-storage":
                refused += 1
                raise RuntimeError("can't start new thread")
            start(thread)

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            node.faulty.fail_once(StoreError("Input/output error"), "write")
            node.put(1)
            await until(lambda: node.backend.state is BackendState.DOWN, "it is down")
            await until(lambda: refused >= 2, "probes have found no thread")
            assert not node.tier._probes_lost[0]
        await until(lambda: node.backend.state is BackendState.UP, "it is up")

    with_node(test)


def test_threads_for_files_that_are_refused_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then the loop goes on, probes too, and what is to be written waits."""
    start = threading.Thread.start

    async def test(node: Node) -> None:
        refused = 0

        def refuse(thread: threading.Thread) -> None:
            nonlocal refused
            if thread.name.startswith("kvpool-files"):
                refused += 1
                raise RuntimeError("can't start new thread")
            start(thread)

        raised: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context))
        await until(lambda: len(node.tier._workers[0]) > 0, "it has threads")
        for worker in node.tier._workers[0]:
            worker.retire()
        for _ in node.tier._workers[0]:
            node.tier._desks[0].batches.put(None)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            await until(lambda: refused >= 2 and not node.tier._workers[0], "there are none left")
            node.tier.state.stuck(0, 1.0, time.monotonic())
            await until(lambda: node.backend.state is BackendState.UP, "a probe has ended")
            node.put(1)
            before = refused
            await until(lambda: refused > before, "another one is refused")
            assert list(node.store.files()) == []
        await until(lambda: list(node.store.files()), "it is written")
        assert raised == []

    with_node(test)


def test_probes_that_never_return_are_rare() -> None:
    """A mount that hangs for days must not cost a thread a second; one in its place is found all the same."""

    async def test(node: Node) -> None:
        event = node.faulty.hang(["probe"])
        node.tier._probes_lost[0] = 1  # as many hang for good
        node.faulty.fail_once(StoreError("Input/output error"), "write")
        node.put(1)
        await until(lambda: node.faulty.hanging == 1, "it is probed")
        first = node.tier._probes[0]
        await until(lambda: node.faulty.hanging == 2, "it is probed once more")
        assert node.tier._probes[0] - first > 2 * filetier.PROBE_AGAIN * TIMEOUT_S
        node.faulty.heal()  # those that hang go on hanging
        node.tier._probes_lost[0] = 0
        await until(lambda: node.backend.state is BackendState.UP, "a later one has found it")
        assert node.faulty.hanging == 2
        event.set()
        await until(lambda: not node.faulty.hanging, "they have come back")

    with_node(test, timeout_s=TIMEOUT_S)


def scanned(node: Node) -> list[Scanned]:
    """Have the backend scanned; returns what is told of it, piece by piece."""
    told: list[Scanned] = []

    def tell(piece: Scanned) -> bool:
        told.append(piece)
        return True

    node.tier.tell = tell
    node.tier.state.scans_asked.append(node.store.id)
    return told


def test_a_scan_ends_whatever_a_store_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect is the scan's end and said to be; a file that is far too long is no block."""

    async def test(node: Node) -> None:
        def files(since: float) -> Iterator[StoredFile]:
            yield StoredFile(named(2), 1 << 62)
            yield from found

        def defect(since: float) -> Iterator[StoredFile]:
            raise ValueError("a defect")

        node.put(1)
        await until(lambda: list(node.store.files()), "it is written")
        found = list(node.store.files())
        monkeypatch.setattr(node.faulty, "files", files)
        told = scanned(node)
        await until(lambda: told and told[-1].last, "the scan has ended")
        assert (told[-1].error, told[-1].files) == ("", 2)
        assert [run.keys for run in told[-1].added] == [key(1)]
        monkeypatch.setattr(node.faulty, "files", defect)
        told = scanned(node)
        await until(lambda: told and told[-1].last, "the scan has ended")
        assert told[-1].error == "a defect"

    with_node(test)


@pytest.mark.parametrize("failures", [1, TRIES_MAX - 1, TRIES_MAX])
def test_a_scan_leaves_nothing_out_that_can_be_read(failures: int) -> None:
    """A file that tells what others of its length hold may fail for a moment; if many do, it is the backend."""

    async def test(node: Node) -> None:
        node.put(*range(2 * TRIES_MAX))
        await until(lambda: len(list(node.store.files())) == 2 * TRIES_MAX, "all are written")
        for _ in range(failures):
            node.faulty.fail_once(StoreError("Input/output error"), "read")
        told = scanned(node)
        await until(lambda: told and told[-1].last, "the scan has ended")
        if failures == TRIES_MAX:
            assert told[-1].error == "Input/output error"
        else:
            assert told[-1].error == ""
            assert sum(len(run) for piece in told for run in piece.added) == 2 * TRIES_MAX

    with_node(test)


@pytest.mark.parametrize("kind", ["read", "namespaces"])
def test_a_scan_that_does_not_see_all_says_so(kind: str) -> None:
    """What it has found counts; it is done once more, and nothing is removed as unknown until then."""

    async def test(node: Node) -> None:
        node.put(*range(2 * TRIES_MAX))
        await until(lambda: len(list(node.store.files())) == 2 * TRIES_MAX, "all are written")
        node.faulty.fail_once(StoreError("Input/output error"), kind)
        for _ in range(TRIES_MAX - 1 if kind == "read" else 0):
            node.faulty.fail_once(StoreMissingError("evicted meanwhile"), kind)
        told = scanned(node)
        await until(lambda: told and told[-1].last, "the scan has ended")
        assert told[-1].error
        assert sum(len(run) for piece in told for run in piece.added) == (0 if kind == "read" else 2 * TRIES_MAX)

    with_node(test)


def test_a_scan_that_hangs_is_given_up_when_it_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mount may be dead while the backend works; but only so many threads are lost that way."""
    monkeypatch.setattr(filetier, "SCAN_RETRY_S", 0.1)

    async def test(node: Node) -> None:
        node.put(1)
        await until(lambda: list(node.store.files()), "it is written")
        event = node.faulty.hang(["files"])
        for lost in range(1, SCANS_LOST_MAX + 2):
            scanned(node)
            await until(lambda lost=lost: node.faulty.hanging == lost, "the scan hangs")
            await asyncio.sleep(0.15)
        node.faulty.heal()
        told = scanned(node)
        await asyncio.sleep(0.3)
        assert not told, "there is no thread for another one"
        event.set()
        await until(lambda: told and told[-1].last and not told[-1].error, "another scan has ended")
        assert told[-1].files == 1
        assert node.backend.state is BackendState.UP

    with_node(test)


def test_a_scan_that_gets_on_slowly_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is asked for, and however long its pieces take."""
    monkeypatch.setattr(filetier, "SCAN_RETRY_S", 2.0)

    async def test(node: Node) -> None:
        def files(since: float) -> Iterator[StoredFile]:
            for number in range(8):
                time.sleep(0.3)
                yield StoredFile(named(number), 1 << 62)

        monkeypatch.setattr(node.faulty, "files", files)
        told = scanned(node)
        tell = node.tier.tell
        ended: list[tuple[int, int, int]] = []  # what is asked for after that begins another one

        def note(piece: Scanned) -> bool:
            done = tell(piece)
            if piece.last:
                ended.append((piece.files, len(told), node.tier.state.counters["scans"]))
            return done

        node.tier.tell = note

        def asked_again() -> bool:
            node.tier.state.scans_asked.append(node.store.id)
            return bool(ended)

        await until(asked_again, "the scan has ended")
        assert ended[0] == (8, 2, 1)

    with_node(test)


def test_an_end_in_order_is_bounded_though_nothing_is_down_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a timeout of minutes, threads that hang are left behind all the same, with what they have in hand."""
    monkeypatch.setattr(filetier, "FINISH_S", 0.1)
    monkeypatch.setattr(filetier, "LAST_S", 0.1)

    async def test(node: Node) -> None:
        node.tier._timeout_s = 600.0
        event = node.faulty.hang(["write"])
        node.put(*range(10))
        await until(lambda: node.faulty.hanging == 2, "both threads hang")
        await node.tier.finish()
        assert node.backend.state is BackendState.UP
        assert node.faulty.hanging == 2
        assert node.state.pinned == 2
        event.set()
        await until(node.idle, "threads have come back")

    with_node(test)
