"""Marks of those who write into a directory: kept, seen by others, taken over, removed at an end in order."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from kvpool.tiers import writers
from kvpool.tiers.posix import PosixStore
from kvpool.tiers.store import FileName
from kvpool.tiers.writers import Writers

NODE = "host-a-1"
OLD, NEW, OTHER = (f"{name}-{epoch:016x}" for name, epoch in ((NODE, 1), (NODE, 2), ("host-a", 3)))


@pytest.fixture
def root(tmp_path: Path) -> str:
    PosixStore(str(tmp_path), owner="test", capacity_bytes=1 << 20)
    return str(tmp_path)


def test_others_see_a_mark_since_when_and_that_it_is_touched(root: str) -> None:
    """What it says stays until it is told otherwise; when it was touched is the filesystem's time."""
    mine, other = Writers(root, OLD), Writers(root, OTHER)
    assert other.others() == {}
    began = mine.keep(None)
    assert began is not None
    (seen,) = other.others().values()
    assert seen.since == began
    os.utime(Path(root, "writers", mine.name), (1.0, 1.0))
    assert mine.keep(began) is not None
    assert mine.keep(began) is not None
    assert other.others()[mine.name].since == began
    assert other.others()[mine.name].touched >= seen.touched
    mine.keep(began + 100)
    assert other.others()[mine.name].since == began + 100
    assert mine.others() == {}
    assert not list(Path(root).rglob("*.tmp"))


def test_a_call_that_hangs_keeps_no_other_one_waiting_for_ever(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mount may have been replaced meanwhile."""
    monkeypatch.setattr(writers, "LOCK_S", 0.05)
    mine, hangs, goes_on = Writers(root, OLD), threading.Event(), threading.Event()

    def touch(self: Writers, since: float | None) -> float:
        hangs.set()
        assert goes_on.wait(10)
        return 1.0

    monkeypatch.setattr(Writers, "_write", touch)
    thread = threading.Thread(target=mine.keep, args=(None,))
    thread.start()
    assert hangs.wait(10)
    with pytest.raises(TimeoutError):
        mine.keep(None)
    goes_on.set()
    thread.join(10)


def test_a_mark_is_of_a_process_and_of_a_node(root: str) -> None:
    """An earlier process of the same node is told from another node whose name begins alike."""
    old, new, other = Writers(root, OLD), Writers(root, NEW), Writers(root, OTHER)
    assert new.ours(old.name)
    assert not new.ours(other.name)
    assert not new.ours(new.name)
    assert not other.ours(new.name)


def test_a_mark_that_was_taken_comes_back_and_one_that_left_does_not(root: str) -> None:
    """Who is believed dead and is not says so again; after an end in order a late touch makes nothing."""
    mine, other = Writers(root, OLD), Writers(root, OTHER)
    since = mine.keep(None)
    mine.keep(since)
    other.drop([mine.name, "no such mark"])
    assert other.others() == {}
    mine.keep(since)
    assert other.others()[mine.name].since == since
    mine.leave()
    assert mine.keep(since) is None
    assert other.others() == {}


def test_a_mark_that_cannot_move_on_is_touched(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no room, what it says still holds; but it must not claim to answer for an older one."""

    def full(since: float | None) -> float:
        raise OSError(errno.ENOSPC, "no space left")

    mine, other = Writers(root, OLD), Writers(root, OTHER)
    began = mine.keep(None)
    assert began is not None
    os.utime(Path(root, "writers", mine.name), (1.0, 1.0))
    monkeypatch.setattr(mine, "_write", full)
    assert mine.keep(began + 100) is not None
    assert other.others()[mine.name].since == began
    assert other.others()[mine.name].touched > 2e9
    os.utime(Path(root, "writers", mine.name), (1.0, 1.0))
    with pytest.raises(OSError, match="no space"):
        mine.keep(began - 100)
    assert other.others()[mine.name].touched > 2e9


@pytest.mark.parametrize("spoiled", [b"", b"nonsense\n", b"nan", b"\xff\xfe", b"inf"])
def test_a_mark_that_says_nothing_means_all(root: str, spoiled: bytes) -> None:
    """A death while it was written, or a stranger: everything has to be looked at."""
    Path(root, "writers").mkdir()
    Path(root, "writers", "_x-1").write_bytes(spoiled)
    assert Writers(root, OLD).others()["_x-1"].since == 0.0


def test_a_mark_that_is_there_is_not_made_anew(root: str) -> None:
    """An attempt to open the directory may come late: what was written meanwhile is answered for."""
    mine, other = Writers(root, OLD), Writers(root, OTHER)
    began = mine.keep(None)
    assert began is not None
    mine.keep(began - 100)
    assert mine.keep(None) is not None
    assert other.others()[mine.name].since == began - 100


def test_one_that_cannot_be_read_hides_no_other(root: str) -> None:
    """Whatever is wrong with it, the others are seen."""
    mine, other = Writers(root, OLD), Writers(root, OTHER)
    other.keep(None)
    Path(root, "writers", "_a-1").mkdir()
    Path(root, "writers", "_z-1").symlink_to("_z-1")
    os.mkfifo(Path(root, "writers", "_b-1"))  # which nobody ever opens to write
    assert set(mine.others()) == {other.name}


def test_nothing_is_made_where_the_backend_is_away(tmp_path: Path) -> None:
    """An unmounted directory stays empty."""
    with pytest.raises(FileNotFoundError):
        Writers(str(tmp_path), OLD).keep(None)
    assert not list(tmp_path.iterdir())


def test_files_since_are_those_that_came_later(root: str) -> None:
    """Directories in which nothing has changed are not even listed; without a time there is everything."""
    store = PosixStore(root, owner="test")
    names = [FileName(bytes(16), bytes([number]) * 16, 0) for number in range(4)]
    for name in names:
        store.write(name, memoryview(bytes(512)))
    for name in names[:2]:
        path = Path(root, "blocks", str(name))
        os.utime(path.parent, (1000.0, 1000.0))
    late = Path(root, "blocks", str(names[3])).stat().st_mtime
    assert {file.name for file in store.files()} == set(names)
    assert {file.name for file in store.files(late - 60)} == set(names[2:])
    assert list(store.files(late + 60)) == []
