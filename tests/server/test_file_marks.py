"""Marks at work: what a node wrote and told nobody is looked for after its death, by itself or by others."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import xxhash

from kvpool.core.file_jobs import Read, Write
from kvpool.core.filetier import FileTierState
from kvpool.core.messages import Scanned
from kvpool.core.segment import SegmentState
from kvpool.model import Namespace
from kvpool.server import filemarks
from kvpool.server.filehelper import HelperEndedError
from kvpool.server.filetier import FileTier
from kvpool.server.filework import perform
from kvpool.tiers.dram import Segment, SlotHeader, pack_header
from kvpool.tiers.posix import PosixStore
from kvpool.tiers.store import StoreError
from kvpool.tiers.writers import Seen, Writers
from tests.server.waiting import T, until

SPACE = Namespace(model="demo")
PAYLOAD = 8192


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


class Node:
    """A segment and a file tier on a directory, and a master that takes what it is told while ``listens``."""

    def __init__(self, root: Path, owner: str, *, listens: bool = True) -> None:
        self.listens = listens
        self.told: list[Scanned] = []
        self.known: set[bytes] = set()
        self.store = PosixStore(str(root), owner=owner, capacity_bytes=1 << 30)
        self.segment = Segment.create(64 * (PAYLOAD + 512), lock=False)
        self.state = SegmentState(self.segment.size)
        self.state.register(SPACE)
        self.tier = FileTier(
            FileTierState(self.state, [], queue_bytes_max=1 << 20), self.segment, threads=2, timeout_s=T
        )
        writers = Writers(str(root), owner)
        self.tier.add(self.store, None, writers, writers.keep(None))
        self.tier.tell, self.tier.changed, self.tier.listening = self._tell, self._changed, lambda: self.listens
        self.mark = root / "writers" / writers.name
        self._sequence = 0

    def _tell(self, scanned: Scanned) -> bool:
        if self.listens:
            self.told.append(scanned)
            self.known |= {run.keys[at : at + 16] for run in scanned.added for at in range(0, len(run.keys), 16)}
        return self.listens

    def _changed(self) -> None:
        changes = self.tier.state.changes
        while self.listens and changes.untold:
            taken, added, _ = changes.take(1000)
            self.known |= {run.keys[at : at + 16] for run in added for at in range(0, len(run.keys), 16)}
            self._sequence += 1
            changes.told(self._sequence, taken)
            changes.acknowledged(self._sequence)

    async def put(self, *numbers: int) -> None:
        """Store blocks and wait until they are in files."""
        held = self.state.reserve(1, SPACE.digest, (0,), b"".join(map(key, numbers)), PAYLOAD, 1)
        checksum = xxhash.xxh3_64_intdigest(bytes(PAYLOAD)).to_bytes(8, "little")
        for slot in self.state.commit(1, held.id, checksum * len(numbers)):
            header = SlotHeader(SPACE.digest, slot.key, 0, PAYLOAD, 1, slot.generation, slot.checksums or b"")
            pack_header(self.segment.view, slot.offset, header)
            self.tier.state.committed([slot])
        self.tier.pump()
        await until(lambda: {key(n) for n in numbers} <= self.stored(), "they are written")

    def stored(self) -> set[bytes]:
        return {file.name.key for file in self.store.files()}

    @property
    def scans(self) -> int:
        return self.tier.state.counters["scans"]

    def says(self) -> float:
        return float(self.mark.read_text())

    def die(self) -> None:
        """End with nothing in order."""
        self.listens = False
        self.tier.close()
        self.segment.close()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Awaitable[None]]], None]:
    """Return what runs a test on a loop, with marks that are touched all the time and stale soon."""
    monkeypatch.setattr(filemarks, "REFRESH_S", 0.02)
    monkeypatch.setattr(filemarks, "CLOCK_S", 0.1)

    def go(test: Callable[[], Awaitable[None]]) -> None:
        async def bounded() -> None:
            await asyncio.wait_for(test(), 2 * T)

        asyncio.run(bounded())

    return go


Run = Callable[[Callable[[], Awaitable[None]]], None]


def test_a_node_that_is_back_looks_for_what_it_told_nobody(tmp_path: Path, run: Run) -> None:
    """Only that, only once, and its own mark answers for the old one until the master has everything."""

    async def test() -> None:
        first = Node(tmp_path, "n-01")
        await first.put(1, 2)
        await until(lambda: first.known == {key(1), key(2)}, "the master knows")
        await until(lambda: first.says() > (tmp_path / "blocks").stat().st_mtime + 0.5, "what is known is left behind")
        first.listens = False
        await first.put(3, 4)
        mark = first.says()
        first.die()
        again = Node(tmp_path, "n-02", listens=False)
        await until(lambda: not first.mark.exists(), "its mark is taken over")
        assert again.says() == mark
        again.listens = True
        await until(lambda: again.known == {key(3), key(4)}, "what was not known is")
        assert not any(scanned.last for scanned in again.told), "nobody has asked for all of it"
        await until(lambda: again.says() > mark, "and is not looked for again")
        assert again.scans == 1
        again.die()

    run(test)


def test_a_look_that_fails_is_none(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that is back finds its old mark at the first look that succeeds."""

    async def test() -> None:
        first = Node(tmp_path, "n-01", listens=False)
        await first.put(1)
        first.die()
        fails, others = True, Writers.others
        failed = 0

        def look(writers: Writers) -> dict[str, Seen]:
            nonlocal failed
            if fails:
                failed += 1
                raise OSError(errno.EIO, "Input/output error")
            return others(writers)

        monkeypatch.setattr(Writers, "others", look)
        again = Node(tmp_path, "n-02")
        await until(lambda: failed > 2, "it has looked")
        fails = False
        await until(lambda: key(1) in again.known, "it is found")
        again.die()

    run(test)


def test_a_mark_that_cannot_be_taken_for_want_of_room_is_taken_later(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says is looked for at once, and not again when there is room."""

    async def test() -> None:
        first = Node(tmp_path, "n-01", listens=False)
        await first.put(1)
        first.die()
        again = Node(tmp_path, "n-02")
        full, write = True, Writers._write

        def written(writers: Writers, since: float | None) -> float:
            if full and writers.name == "_n-02":
                raise OSError(errno.ENOSPC, "no space left")
            return write(writers, since)

        monkeypatch.setattr(Writers, "_write", written)
        await until(lambda: key(1) in again.known, "it is found")
        full = False
        await until(lambda: not first.mark.exists(), "its mark is taken over")
        assert again.scans == 1
        again.die()

    run(test)


def test_a_silent_node_is_taken_for_dead_by_another_one(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It need not come back; one that touches its mark is left alone, also while the master is told nothing."""
    monkeypatch.setattr(filemarks, "STALE_S", 1.0)
    others = Writers.others
    # Or the one that can tell nobody might be the first to find it, and wait with that for a master.
    monkeypatch.setattr(Writers, "others", lambda writers: others(writers) if writers.name == "_other-01" else {})

    async def test() -> None:
        dead, alive, other = (Node(tmp_path, f"{name}-01", listens=False) for name in ("dead", "alive", "other"))
        await dead.put(1)
        await alive.put(2)
        dead.die()
        other.listens = True
        await until(lambda: key(1) in other.known, "another one has found it")
        await until(lambda: not dead.mark.exists(), "its mark is taken over")
        assert alive.mark.exists()
        alive.die()
        await until(lambda: key(2) in other.known, "and that of the next one")
        other.die()

    run(test)


def test_nobody_is_dead_because_a_filesystem_was_away(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All marks stand still then, for however long: only what is seen after that counts."""
    monkeypatch.setattr(filemarks, "STALE_S", 0.2)

    async def test() -> None:
        dead = Node(tmp_path, "dead-01", listens=False)
        await dead.put(1)
        dead.die()
        looks, others = [0, 0], Writers.others

        def look(writers: Writers) -> dict[str, Seen]:
            away = writers.name == "_other-01" and looks[1] == 1 and looks[0] < 20
            looks[not away] += writers.name == "_other-01"
            if away:
                raise OSError(errno.EIO, "Input/output error")
            return others(writers)

        monkeypatch.setattr(Writers, "others", look)
        other = Node(tmp_path, "other-01")
        await until(lambda: key(1) in other.known, "the dead one is missed")
        assert looks[0] == 20
        assert looks[1] > filemarks.STALE_S / filemarks.REFRESH_S
        other.die()

    run(test)


def test_who_ends_in_order_leaves_no_mark(tmp_path: Path, run: Run) -> None:
    """But for what the master does not know of: then the next process looks."""

    async def test() -> None:
        first = Node(tmp_path, "n-01")
        await first.put(1)
        await until(lambda: first.known == {key(1)}, "the master knows")
        await first.tier.finish()
        await first.tier.leave()
        assert not first.mark.exists()
        first.die()
        second = Node(tmp_path, "n-02")
        await second.put(2)
        await until(lambda: second.known == {key(2)}, "the master knows")
        assert second.scans == 0
        second.listens = False
        await second.put(3)
        await second.tier.finish()
        await second.tier.leave()
        assert second.mark.exists()
        second.die()
        third = Node(tmp_path, "n-03")
        await until(lambda: key(3) in third.known, "it is found")
        third.die()

    run(test)


def test_a_scan_of_a_part_is_none_that_the_master_asked_for(tmp_path: Path, run: Run) -> None:
    """Asked for everything while a part is looked through, a node says everything, and only then that it is all."""

    async def test() -> None:
        first = Node(tmp_path, "n-01", listens=False)
        await first.put(*range(8))
        first.die()
        again = Node(tmp_path, "n-02")
        again.tier.tell = lambda _: False
        await until(lambda: again.scans == 1, "a part is looked through")
        again.tier.state.scans_asked.append(again.store.id)
        await until(lambda: again.scans == 2, "all of it is")
        again.tier.tell = again._tell
        await until(lambda: again.told and again.told[-1].last, "it is told")
        assert again.known == {key(n) for n in range(8)}
        assert [scanned.last for scanned in again.told] == [False, True]
        assert again.told[-1].files == 8
        await until(lambda: again.tier._whole(again.store.id), "that has done for the part, too")
        assert again.scans == 2
        again.die()

    run(test)


def test_a_session_that_ends_before_the_master_has_everything_begins_the_scan_again(tmp_path: Path, run: Run) -> None:
    """What was sent last may be lost: only an acknowledgement of what follows ends the search."""

    async def test() -> None:
        first = Node(tmp_path, "n-01", listens=False)
        await first.put(1)
        first.die()
        again = Node(tmp_path, "n-02")
        again.tier.changed = lambda: None  # nothing is acknowledged
        mark = again.says()
        await until(lambda: key(1) in again.known, "it is found")
        await until(lambda: again.tier._fences, "the scan has ended")
        await until(lambda: again.says() < mark, "its own mark answers for the old one")
        again.known.clear()
        again.tier.session_ended()
        again.tier.changed = again._changed
        await until(lambda: key(1) in again.known, "it is found again")
        await until(lambda: again.says() > mark, "and now it is kept")
        assert again.scans == 2
        again.die()

    run(test)


@pytest.mark.parametrize("operation", ["read_into", "write"])
def test_what_a_thread_does_late_is_not_looked_for(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, operation: Literal["read_into", "write"]
) -> None:
    """Nobody counts on it any more, but it says itself what has become of it."""

    async def test() -> None:
        node = Node(tmp_path, "n-01")
        await node.put(1)
        await until(lambda: node.known == {key(1)}, "the master knows")
        node.state.evict(node.state.snapshot())
        goes_on, does = threading.Event(), getattr(node.store, operation)

        def hangs(*arguments: Any) -> None:
            goes_on.wait(T)
            does(*arguments)

        monkeypatch.setattr(node.store, operation, hangs)
        node.tier._timeout_s = 0.2
        batches = node.tier._batches[0]
        putting = asyncio.ensure_future(node.put(2)) if operation == "write" else None
        if putting is None:
            node.tier.fetch(2, [(SPACE.digest + key(1), 0)], node.store.id, T, lambda _: None)
        await until(lambda: any(batch.abandoned for batch in batches), "it takes too long")
        goes_on.set()
        await until(lambda: not batches, "it ends")
        assert not node.tier.state.changes.lost
        assert node.scans == 0
        if putting is not None:
            await putting
            await until(lambda: key(2) in node.known, "the master knows that, too")
        node.die()

    run(test)


def test_a_write_that_fails_late_is_looked_for(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network may have lost the answer only: the file is there."""

    async def test() -> None:
        node = Node(tmp_path, "n-01")
        await node.put(1)
        await until(lambda: node.known == {key(1)}, "the master knows")
        goes_on, write = threading.Event(), node.store.write

        def fails(*arguments: Any) -> None:
            write(*arguments)
            goes_on.wait(T)
            raise StoreError("it took too long")

        monkeypatch.setattr(node.store, "write", fails)
        node.tier._timeout_s = 0.2
        putting = asyncio.ensure_future(node.put(2))
        await until(lambda: any(batch.abandoned for batch in node.tier._batches[0]), "it takes too long")
        goes_on.set()
        await until(lambda: key(2) in node.known, "it is found")
        assert node.scans == 1
        await putting
        node.die()

    run(test)


class Process:
    """Does what a node's process beside it does that hangs when it has done the first job, until it is killed."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._killed = threading.Event()
        self.kill = self.close = self._killed.set

    def ready(self) -> bool:
        return True

    def send(self, jobs: Sequence[Read | Write]) -> None:
        assert perform(self._node.store, self._node.segment.view, jobs[0]) == (None, None)

    def receive(self) -> list[Any]:
        self._killed.wait(T)
        raise HelperEndedError


def test_what_a_killed_process_had_in_hand_is_looked_for(tmp_path: Path, run: Run) -> None:
    """A file may be there, and only a look at the directory tells."""

    async def test() -> None:
        node = Node(tmp_path, "n-01")
        await node.put(1)
        await until(lambda: node.known == {key(1)}, "the master knows")
        for worker in node.tier._workers[0]:
            worker.helped, worker.helper = True, Process(node)  # type: ignore[assignment]
        node.tier.state._batch_bytes = node.segment.size
        node.tier._timeout_s = 0.2
        putting = asyncio.ensure_future(node.put(2, 3))
        await until(lambda: key(2) in node.known, "it is found")
        assert node.scans == 1
        putting.cancel()
        node.die()

    run(test)
