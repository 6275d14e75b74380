"""Directories on filesystems that behave as network filesystems do, fail, fill up, hang, or go away."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvpool.testing.store_conformance import StoreConformance, extent_of, name_of, read, write_many
from kvpool.tiers.opening import open_store
from kvpool.tiers.posix import PosixStore
from kvpool.tiers.store import (
    BlockStore,
    StoreError,
    StoreFullError,
    StoreMissingError,
    StoreReadOnlyError,
    StoreSizeError,
)
from tests.faultfs.mount import FaultyMount, detach, fill_up, mount, mounted, why_no_mounts
from tests.integration.pool import wait_for

MS_RDONLY, MS_REMOUNT = 1, 32
CACHE_S = 0.5


class OnAMount(StoreConformance):
    """The suite of all stores on a FUSE filesystem that has no fault."""

    direct = True
    cache_s = 0.0

    @pytest.fixture(autouse=True)
    def place(self, faulty_mounts: Callable[..., FaultyMount]) -> None:
        self.mount = faulty_mounts(cache_s=self.cache_s)
        self.root = self.mount.path / "pool"
        self.misbehave()

    def misbehave(self) -> None:
        """Add faults that a store has to live with."""

    def open(self, owner: str, capacity_bytes: int | None = None) -> BlockStore:
        return open_store(str(self.root), owner=owner, capacity_bytes=capacity_bytes, direct=self.direct)

    def url(self) -> str:
        return str(self.root)

    def put_foreign(self, path: str, data: bytes) -> bool:
        target = self.mount.below / "pool" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        return True


class TestDirect(OnAMount):
    """Past the page cache."""


class TestBuffered(OnAMount):
    """Through the page cache."""

    direct = False


class TestCached(OnAMount):
    """Names and attributes are believed for a while, as on NFS."""

    cache_s = CACHE_S


class TestLostAnswers(OnAMount):
    """Requests are sent and done twice: what succeeded says that it failed, again and again."""

    def misbehave(self) -> None:
        self.mount.fail("rename", errno.ENOENT, after=True, every=3)
        self.mount.fail("rename", errno.EEXIST, after=True, every=5)
        self.mount.fail("unlink|rmdir", errno.ENOENT, after=True, every=3)
        self.mount.fail("mkdir|link", errno.EEXIST, after=True, every=3)


class TestStaleHandles(OnAMount):
    """Now and then the server does not know a handle any more."""

    def misbehave(self) -> None:
        self.mount.fail("open|readdir", errno.ESTALE, every=7, path="*/blocks/*")
        self.mount.fail("read", errno.ESTALE, every=11, path="*/blocks/*")


# ---- one fault at a time ----------------------------------------------------------------------------


@pytest.fixture
def store(faulty_mount: FaultyMount) -> Iterator[PosixStore]:
    """Return a store on the faulty mount that keeps no data back."""
    store = PosixStore(str(faulty_mount.path / "pool"), owner="tester", fsync="data")
    yield store
    store.close()


NAME = name_of(1)
FILE = f"*{NAME.key.hex()}*"  # the temporary one too


def write(store: PosixStore) -> None:
    store.write(NAME, extent_of(NAME))


@pytest.mark.parametrize(
    ("op", "error", "kind"),
    [
        ("write", errno.EIO, StoreError),
        ("write", errno.ENOSPC, StoreFullError),
        ("write", errno.EDQUOT, StoreFullError),
        ("flush", errno.ENOSPC, StoreFullError),  # a server may say it when the file is closed
        ("flush", errno.EDQUOT, StoreFullError),
        ("flush", errno.EIO, StoreError),
        ("fsync", errno.ENOSPC, StoreFullError),
        ("fsync", errno.EIO, StoreError),
        ("create", errno.EROFS, StoreReadOnlyError),
        ("create", errno.EACCES, StoreReadOnlyError),
        ("create", errno.ENOSPC, StoreFullError),
        ("create", errno.EIO, StoreError),
        ("create", errno.ENFILE, StoreError),
        ("rename", errno.EIO, StoreError),
        ("rename", errno.EROFS, StoreReadOnlyError),
    ],
)
def test_a_write_that_fails_says_how(faulty_mount, store, op, error, kind):
    """It leaves nothing behind, neither a file nor a temporary one, and the next one works."""
    write_many(store, range(2, 3))
    faulty_mount.fail(op, error, path=FILE)
    with pytest.raises(StoreError) as failed:
        write(store)
    assert type(failed.value) is kind
    assert os.strerror(error) in str(failed.value)
    faulty_mount.heal()
    assert {file.name for file in store.files()} == {name_of(2)}
    assert not list((faulty_mount.below / "pool" / "blocks").rglob("*.tmp"))
    write(store)
    assert read(store, NAME) == extent_of(NAME)


@pytest.mark.parametrize(
    ("op", "error", "kind"),
    [
        ("open", errno.EIO, StoreError),
        ("read", errno.EIO, StoreError),
        ("read", errno.ESTALE, StoreError),
        ("open", errno.ESTALE, StoreError),
        ("open", errno.ENOENT, StoreMissingError),
        ("*", errno.EIO, StoreError),
        ("*", errno.ENOTCONN, StoreError),
        ("*", errno.ETIMEDOUT, StoreError),  # a mount with `soft`
    ],
)
def test_a_read_that_fails_says_how(faulty_mount, store, op, error, kind):
    """Only what is not there is missing."""
    write(store)
    faulty_mount.fail(op, error, path=FILE if op != "*" else "*")
    with pytest.raises(StoreError) as failed:
        read(store, NAME)
    assert type(failed.value) is kind
    faulty_mount.heal()
    assert read(store, NAME) == extent_of(NAME)


@pytest.mark.parametrize("op", ["open", "read", "getattr"])
def test_a_handle_that_went_stale_is_opened_again(faulty_mount, store, op):
    """Once is nothing; the bytes are right."""
    write(store)
    faulty_mount.fail(op, errno.ESTALE, times=1, path=FILE)
    assert read(store, NAME) == extent_of(NAME)


@pytest.mark.parametrize("error", [errno.EEXIST, errno.ENOENT])
def test_a_rename_that_was_done_is_done(faulty_mount, store, error):
    """Whatever it answers: the file is there, once, and nothing beside it."""
    write_many(store, range(2, 3))
    faulty_mount.fail("rename", error, after=True, times=1)
    write(store)
    assert faulty_mount.calls("rename") == 2
    assert read(store, NAME) == extent_of(NAME)
    assert not list((faulty_mount.below / "pool" / "blocks").rglob("*.tmp"))


def test_a_rename_that_was_not_done_is_an_error(faulty_mount, store):
    """Even when it says that there is a file already, and there is none."""
    write_many(store, range(2, 3))
    faulty_mount.fail("rename", errno.EEXIST)
    with pytest.raises(StoreError):
        write(store)
    assert not list((faulty_mount.below / "pool" / "blocks").rglob("*.tmp"))


def test_a_removal_that_fails_is_told_after_all_were_tried(faulty_mount, store):
    """One bad file does not keep the others."""
    names = write_many(store, range(4))
    faulty_mount.fail("unlink", errno.EIO, path=f"*/{names[1].key.hex()}*")
    with pytest.raises(StoreError, match="Input/output error"):
        store.remove(names)
    faulty_mount.heal()
    assert [file.name for file in store.files()] == [names[1]]


def test_listing_a_directory_that_cannot_be_read_is_an_error(faulty_mount, store):
    """Files that are not seen are not gone: whoever lists must know that he has not seen all."""
    write_many(store, range(4))
    faulty_mount.fail("readdir", errno.EIO, path="*/blocks/*")
    with pytest.raises(StoreError, match="Input/output error"):
        list(store.files())


def test_another_hosts_file_appears_when_the_cache_allows(faulty_mounts):
    """Until then it is missing, which costs a recomputation; it is never wrong."""
    mount = faulty_mounts(cache_s=CACHE_S)
    here = PosixStore(str(mount.path / "pool"), owner="here")
    there = PosixStore(str(mount.below / "pool"), owner="there")
    assert here.id == there.id
    with pytest.raises(StoreMissingError):
        read(here, NAME)
    there.write(NAME, extent_of(NAME))

    def seen() -> bool:
        try:
            return read(here, NAME) == extent_of(NAME)
        except StoreMissingError:
            return False

    wait_for(seen, "the file is seen here")


def test_another_hosts_shorter_file_is_a_size_or_right(faulty_mounts):
    """What is remembered of a file's length may be old; then it is said, and later it is right."""
    mount = faulty_mounts(cache_s=CACHE_S)
    here = PosixStore(str(mount.path / "pool"), owner="here")
    there = PosixStore(str(mount.below / "pool"), owner="there")
    here.write(NAME, extent_of(NAME)[:1024])
    with pytest.raises(StoreSizeError):
        read(here, NAME)
    there.write(NAME, extent_of(NAME))

    def right() -> bool:
        try:
            return read(here, NAME) == extent_of(NAME)
        except StoreError:
            return False

    wait_for(right, "the whole file is seen here")


def test_a_hang_keeps_nobody_else(faulty_mount, store):
    """The call waits in its own thread; others go on; when the mount answers again, the bytes are right."""
    names = write_many(store, range(2))
    faulty_mount.hang("open|read", path=f"*/{names[0].key.hex()}*")
    got: list[bool] = []
    thread = threading.Thread(target=lambda: got.append(read(store, names[0]) == extent_of(names[0])))
    thread.start()
    wait_for(lambda: faulty_mount.hanging == 1, "the read hangs")
    assert read(store, names[1]) == extent_of(names[1])
    store.probe()
    assert got == []
    faulty_mount.heal()
    thread.join()
    assert got == [True]


def test_a_mount_that_dies_is_down(faulty_mount, store):
    """Its files are not missing, and nothing is made at its place."""
    write(store)
    faulty_mount.kill()
    for action in (lambda: read(store, NAME), store.probe, lambda: list(store.files()), lambda: write(store)):
        with pytest.raises(StoreError) as failed:
            action()
        assert not isinstance(failed.value, StoreMissingError)
    detach(faulty_mount.path)
    for action in (lambda: read(store, NAME), store.probe, lambda: list(store.files()), lambda: write(store)):
        with pytest.raises(StoreError) as failed:
            action()
        assert not isinstance(failed.value, StoreMissingError)
    assert list(faulty_mount.path.iterdir()) == []


# ---- filesystems of the kernel's own ----------------------------------------------------------------


def test_a_full_disk(small_disk: Path):
    """What does not fit says so and leaves nothing behind; reading goes on; room makes it work again."""
    store = PosixStore(str(small_disk), owner="tester", capacity_bytes=4 << 20)
    names = write_many(store, range(2))
    ballast = fill_up(small_disk)
    big = name_of(9)
    for action in (lambda: store.write(big, extent_of(big, shard_bytes=1 << 19)), store.probe):
        with pytest.raises(StoreFullError):
            action()
    assert {file.name for file in store.files()} == set(names)
    assert not list(small_disk.rglob("*.tmp"))
    assert read(store, names[0]) == extent_of(names[0])
    ballast.unlink()
    store.probe()
    store.write(big, extent_of(big, shard_bytes=1 << 19))


def test_a_disk_that_became_read_only(small_disk: Path):
    """Reading goes on, writing and the probe say why not, until it can be written again."""
    store = PosixStore(str(small_disk), owner="tester", capacity_bytes=4 << 20)
    [name] = write_many(store, range(1))
    mount("tmpfs", "kvpool-test", small_disk, flags=MS_REMOUNT | MS_RDONLY)
    for action in (lambda: write(store), store.probe, lambda: store.remove([name])):
        with pytest.raises(StoreReadOnlyError, match="Read-only file system"):
            action()
    assert read(store, name) == extent_of(name)
    mount("tmpfs", "kvpool-test", small_disk, flags=MS_REMOUNT)
    store.probe()
    write(store)


def test_a_disk_that_is_read_only_from_the_start(tmp_path: Path):
    """A backend can be opened to be read."""
    if why := why_no_mounts():
        pytest.skip(why)
    with mounted("tmpfs", tmp_path / "disk", "size=1m") as disk:
        made = PosixStore(str(disk), owner="maker")
        [name] = write_many(made, range(1))
        mount("tmpfs", "kvpool-test", disk, flags=MS_REMOUNT | MS_RDONLY)
        store = PosixStore(str(disk), owner="tester", create=False)
        assert (store.id, read(store, name)) == (made.id, extent_of(name))


def test_a_directory_that_is_deleted_comes_back(tmp_path: Path):
    """Nothing is known of its files until a probe has made it again, with the same id; then they are missing."""
    store = PosixStore(str(tmp_path / "pool"), owner="tester")
    write(store)
    shutil.rmtree(tmp_path / "pool")
    with pytest.raises(StoreError) as failed:
        read(store, NAME)
    assert not isinstance(failed.value, StoreMissingError)
    store.probe()
    with pytest.raises(StoreMissingError):
        read(store, NAME)
    write(store)
    assert PosixStore(str(tmp_path / "pool"), owner="other").id == store.id
