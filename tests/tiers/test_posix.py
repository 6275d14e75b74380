"""A directory as a backend: its layout, its identity, and filesystems that do not behave."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import struct
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvpool.errors import ConfigError
from kvpool.model import Namespace
from kvpool.testing.store_conformance import extent_of, name_of, read, write_many
from kvpool.tiers import posix, posix_io
from kvpool.tiers.layout import Identity
from kvpool.tiers.opening import open_store
from kvpool.tiers.posix import PosixStore
from kvpool.tiers.store import (
    StoreBrokenError,
    StoreError,
    StoreFullError,
    StoreMissingError,
    StoreReadOnlyError,
    StoreSizeError,
)

GIB = 1 << 30
NAME = name_of(1)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "pool" / "kv"


@pytest.fixture
def store(root):
    return PosixStore(str(root), owner="me", capacity_bytes=GIB)


def temporaries(root):
    return sorted(path.name for path in root.rglob(".*"))


def tree(root):
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


class Disturbed:
    """A function of ``os`` that does something else in its next calls, then what it always does."""

    def __init__(self, monkeypatch, name, *actions):
        self.real = getattr(os, name)
        self.actions = list(actions)
        self.calls = 0
        monkeypatch.setattr(os, name, self)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if not self.actions:
            return self.real(*args, **kwargs)
        action = self.actions.pop(0)
        if isinstance(action, int):
            raise OSError(action, os.strerror(action))
        return action(self.real, *args, **kwargs)


# ---- what lies where -------------------------------------------------------------------------------


def test_the_layout_is_what_other_nodes_expect(store, root):
    """One file for each shard, under namespace and three digits of the key; nothing else but identity and meaning."""
    store.write(NAME, extent_of(NAME))
    space = Namespace(model="demo")
    store.keep_namespace(space)
    key = NAME.key.hex()
    assert tree(root) == {
        "kvpool.json",
        f"blocks/{NAME.namespace.hex()}/{key[:3]}/{key}.0",
        f"namespaces/{space.digest.hex()}.json",
    }
    identity = json.loads((root / "kvpool.json").read_text())
    assert identity == {"format": 1, "id": str(uuid.UUID(bytes=store.id)), "capacity_bytes": GIB}
    assert (root / "blocks" / str(NAME)).read_bytes() == extent_of(NAME)


def test_nobody_waits_for_a_fifo_at_the_place_of_a_description(store, root):
    """What is no file is as if it were not there, and is replaced."""
    spaces = [Namespace(model=name) for name in ("one", "two")]
    store.keep_namespace(spaces[0])
    os.mkfifo(root / "namespaces" / f"{spaces[1].digest.hex()}.json")
    assert store.namespaces() == [spaces[0]]
    store.keep_namespace(spaces[1])
    assert sorted(space.model for space in store.namespaces()) == ["one", "two"]


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_description_that_may_be_there_is_not_left_out(store, monkeypatch, code):
    """Else all of its files would be, from a scan that counts as complete."""
    space = Namespace(model="demo")
    store.keep_namespace(space)
    Disturbed(monkeypatch, "read", code)
    with pytest.raises(StoreError, match=os.strerror(code)):
        store.namespaces(strict=True)
    assert store.namespaces(strict=True) == [space]
    Disturbed(monkeypatch, "read", code)
    assert store.namespaces() == []


def test_a_block_appears_under_its_name_whole(store, root, monkeypatch):
    """Until the rename it has another name, beside its place, that says who writes it."""
    seen = []
    real = os.rename

    def rename(source, target):
        seen.append((Path(source).parent == Path(target).parent, Path(source).name))
        assert not list(store.files())
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    store.write(NAME, extent_of(NAME))
    [(beside, temporary)] = seen
    assert beside
    assert temporary.startswith(f".{NAME.key.hex()}.0.me.")
    assert temporary.endswith(".tmp")


def test_a_write_that_fails_leaves_nothing(store, root, monkeypatch):
    """Neither under the block's name nor under another."""
    Disturbed(monkeypatch, "pwrite", errno.EIO)
    with pytest.raises(StoreError, match="Input/output error"):
        store.write(NAME, extent_of(NAME))
    assert temporaries(root) == []
    assert list(store.files()) == []
    store.write(NAME, extent_of(NAME))


def test_owners_become_file_names(root):
    """Whatever a node calls itself, its temporary files stay where they belong, and are known as its own."""
    store = PosixStore(str(root), owner="../../host.example:50088 ä", capacity_bytes=GIB)
    store.write(NAME, extent_of(NAME))
    assert len(list(store.files())) == 1
    leftover = root / "blocks" / f".x.{'______host_example_50088__'}.1.tmp"
    leftover.touch()
    assert store.clean(1e9) == 1


def test_long_owners_are_told_from_each_other(root):
    """Two nodes of a host with a long name: neither takes what the other one writes for its own."""
    host = "host" * 20
    store = PosixStore(str(root), owner=f"{host}-1", capacity_bytes=GIB)
    other = PosixStore(str(root), owner=f"{host}-2")
    path = store._temporary_name(f"{root}/kvpool.json")
    Path(path).touch()
    posix._writing.clear()  # as if another process wrote it
    assert other.clean(1e9) == 0
    assert store.clean(1e9) == 1


# ---- leftovers -------------------------------------------------------------------------------------


def test_leftovers_go_by_owner_and_age(store, root):
    """Our own at once, others' when they are old by the filesystem's clock, foreign files never."""
    store.write(NAME, extent_of(NAME))
    place = (root / "blocks" / str(NAME)).parent
    now = (root / "kvpool.json").stat().st_mtime
    for name, age in (
        (".a.0.me.7.tmp", 0),
        (".b.0.other.7.tmp", 50),
        (".c.0.other.8.tmp", 5000),
        (".d.0.other.tmp", 5000),
        ("e.0.other.9.tmp", 5000),
        (".f.0.other.9.bak", 5000),
    ):
        (place / name).touch()
        os.utime(place / name, (now - age, now - age))
    for directory in (root, root / "blocks"):
        (directory / ".kvpool.json.other.1.tmp").touch()
        os.utime(directory / ".kvpool.json.other.1.tmp", (0, 0))
    assert store.clean(1000) == 4
    assert temporaries(root) == [".b.0.other.7.tmp", ".d.0.other.tmp", ".f.0.other.9.bak"]
    assert store.clean(10) == 1
    assert (place / "e.0.other.9.tmp").exists()
    assert read(store, NAME) == extent_of(NAME)


@pytest.mark.parametrize("room", ["for names", "for nothing"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_leftovers_go_from_a_full_disk(store, root, monkeypatch, room, code):
    """They are what takes the room: nothing that has to be written comes before their removal."""
    old = root / ".kvpool.json.other.7.tmp"
    old.touch()
    os.utime(old, (0, 0))
    real = os.open

    def full(path, flags, *more, **how):
        if flags & os.O_CREAT and room == "for nothing":
            raise OSError(code, os.strerror(code))
        return real(path, flags, *more, **how)

    monkeypatch.setattr(os, "open", full)
    Disturbed(monkeypatch, "pwrite", code)
    assert store.clean(1000) == 1
    assert temporaries(root) == []


def test_the_age_of_a_file_is_that_by_the_filesystems_clock(store, monkeypatch):
    """Since it came to its place, whatever its bytes say; what cannot be looked at has none."""
    for number in range(3):
        store.write(name_of(number), extent_of(name_of(number)))
    os.utime(f"{store.url}/blocks/{name_of(0)}", (0, 0))
    Path(store.url, "blocks", str(name_of(2))).unlink()
    names = [name_of(number) for number in range(3)]
    assert store.older_than(names, 1000) == []
    now = store._now()
    monkeypatch.setattr(store, "_now", lambda: now + 2000)
    assert store.older_than(names, 1000) == names[:2]
    assert store.older_than(names, 3000) == []


def test_what_is_being_written_is_no_leftover(store, monkeypatch):
    """Cleaning beside a running write of ours takes nothing from under it."""
    cleaned = []
    real = os.rename
    monkeypatch.setattr(os, "rename", lambda *paths: (cleaned.append(store.clean(0)), real(*paths)))
    store.write(NAME, extent_of(NAME))
    assert cleaned == [0]
    assert read(store, NAME) == extent_of(NAME)


# ---- identity --------------------------------------------------------------------------------------


def test_the_capacity_is_a_share_of_what_is_free_and_ours(root):
    """What the pool has there already counts as its own, as after the loss of the identity."""
    first = PosixStore(str(root), owner="me")
    status = os.statvfs(root)
    expected = 0.9 * status.f_bavail * status.f_frsize
    assert first.capacity_bytes == pytest.approx(expected, rel=0.02)
    for number in range(3):
        place = root / "blocks" / str(name_of(number))
        place.parent.mkdir(parents=True)
        place.touch()
        os.truncate(place, 1 << 40)  # sparse
    (root / "kvpool.json").unlink()
    second = PosixStore(str(root), owner="me")
    assert second.id != first.id
    assert second.capacity_bytes - expected == pytest.approx(0.9 * 3 * (1 << 40), rel=0.02)


def test_the_recorded_capacity_counts(store, root, caplog):
    """Another one given later changes nothing, and says so."""
    again = open_store(str(root), owner="you", capacity_bytes=2 * GIB)
    assert (again.id, again.capacity_bytes) == (store.id, GIB)
    assert "1.0 GiB" in caplog.text
    caplog.clear()
    open_store(str(root), owner="you")
    open_store(str(root), owner="you", capacity_bytes=GIB)
    assert caplog.text == ""


@pytest.mark.parametrize("capacity", [True, 0, -1, (1 << 62) + 1, 1 << 64, 1e9, "1GB", None])
def test_a_capacity_that_cannot_be_is_refused(capacity):
    """It is edited by hand: the field is named, and what may stand there."""
    said = json.loads(Identity.make(5).pack())
    with pytest.raises(StoreBrokenError, match=r"capacity_bytes.*from 1 to 2\*\*62"):
        Identity.parse(json.dumps({**said, "capacity_bytes": capacity}).encode())
    assert Identity.parse(json.dumps({**said, "capacity_bytes": 1 << 62}).encode()).capacity_bytes == 1 << 62
    assert Identity.make(1 << 70).capacity_bytes == 1 << 62


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_whoever_comes_first_makes_it(root, monkeypatch, links):
    """Many at once, many times, with and without hard links: one id, one capacity, nothing left over."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    openers = 6
    for turn in range(8):
        directory = root / str(turn)
        barrier = threading.Barrier(openers)

        def opener(number, directory=directory, barrier=barrier):
            barrier.wait()
            found = PosixStore(str(directory), owner=f"n{number}", capacity_bytes=number + 1)
            return found.id, found.capacity_bytes

        with ThreadPoolExecutor(openers) as threads:
            assert len(set(threads.map(opener, range(openers)))) == 1
        assert tree(directory) == {"kvpool.json"}


def test_an_identity_that_is_being_written_is_waited_for(root):
    """Without hard links it grows in place; who opens meanwhile waits."""
    root.mkdir(parents=True)
    identity = Identity.make(GIB)
    (root / "kvpool.json").write_bytes(identity.pack()[:10])
    with ThreadPoolExecutor(1) as threads:
        opening = threads.submit(PosixStore, str(root), owner="me")
        (root / "kvpool.json").write_bytes(identity.pack())
        assert opening.result().id == identity.id


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "cannot be understood"),
        ("{}", "cannot be understood"),
        ("[1]", "cannot be understood"),
        ('{"format": 2, "id": "", "capacity_bytes": 1}', "format 2"),
        ('{"format": 1, "id": "x", "capacity_bytes": 1}', "cannot be understood"),
        (json.dumps({"format": 1, "id": str(uuid.UUID(int=1)), "capacity_bytes": 0}), "capacity_bytes 0"),
    ],
)
def test_an_identity_that_is_none_is_refused(root, text, problem, monkeypatch):
    """Another program's file, or a later version's, is left as it is."""
    monkeypatch.setattr("kvpool.tiers.posix_root._HALF_WRITTEN_S", 0.0)
    root.mkdir(parents=True)
    (root / "kvpool.json").write_text(text)
    with pytest.raises(ConfigError, match=problem) as refused:
        PosixStore(str(root), owner="me")
    assert refused.value.field == "storage_backends"
    assert (root / "kvpool.json").read_text() == text


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_no_identity(root, make):
    """A pipe without a writer would keep whoever opens it, a device would never end."""
    root.mkdir(parents=True)
    make(root / "kvpool.json")
    with pytest.raises(ConfigError, match=r"kvpool\.json"):
        PosixStore(str(root), owner="me")


def test_what_is_no_directory_cannot_be_opened(tmp_path):
    """A file in the way, or no name at all: the setting is named."""
    (tmp_path / "file").touch()
    for url in (str(tmp_path / "file"), str(tmp_path / "file" / "x"), ""):
        with pytest.raises(ConfigError) as refused:
            open_store(url, owner="me")
        assert refused.value.field == "storage_backends"
    with pytest.raises(ConfigError, match="must be one of"):
        open_store(str(tmp_path / "x"), owner="me", fsync="sometimes")
    assert not (tmp_path / "x").exists()


def test_tools_do_not_make_backends(tmp_path):
    """A mistyped directory is an error, and stays what it was."""
    with pytest.raises(ConfigError, match="is no backend"):
        open_store(str(tmp_path / "typo"), owner="me", create=False)
    with pytest.raises(ConfigError, match="is no backend"):
        open_store(str(tmp_path), owner="me", create=False)
    assert list(tmp_path.iterdir()) == []


# ---- things that go away ---------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_a_deleted_directory_is_made_again(store, root, levels):
    """Three digits, a namespace, all blocks: the next write makes what it needs."""
    store.write(NAME, extent_of(NAME))
    place = root / "blocks" / str(NAME)
    for _ in range(levels):
        place = place.parent
    shutil.rmtree(place)
    with pytest.raises(StoreMissingError):
        read(store, NAME)
    assert list(store.files()) == []
    store.write(NAME, extent_of(NAME))
    assert read(store, NAME) == extent_of(NAME)


@pytest.mark.parametrize("taken", [1, 2])
def test_directories_that_go_while_others_are_made_in_them_are_made_again(store, root, monkeypatch, taken):
    """Who removes empty ones, at a node's start or once in a while, never makes a write fail."""
    mkdir, rmdir = os.mkdir, os.rmdir
    left = [taken]

    def beside_a_cleaner(path, *more, **how):
        if Path(path).parent.parent == root / "blocks" and left[0]:
            left[0] -= 1
            rmdir(Path(path).parent)
        mkdir(path, *more, **how)

    monkeypatch.setattr(os, "mkdir", beside_a_cleaner)
    store.write(NAME, extent_of(NAME))
    assert left == [0]
    assert read(store, NAME) == extent_of(NAME)


def test_a_deleted_backend_is_away_until_it_is_made_again(store, root):
    """Nothing is called missing while all is gone; a probe or a write makes the same backend again."""
    store.write(NAME, extent_of(NAME))
    for again in (store.probe, lambda: store.write(NAME, extent_of(NAME))):
        shutil.rmtree(root)
        for action in (lambda: read(store, NAME), lambda: list(store.files()), store.namespaces):
            with pytest.raises(StoreError, match=r"kvpool\.json") as away:
                action()
            assert type(away.value) is StoreError
        again()
        assert open_store(str(root), owner="you", create=False).id == store.id
    assert read(store, NAME) == extent_of(NAME)


def test_an_unmounted_directory_is_not_filled(store, root):
    """The mount point of something that is gone is on another filesystem: nothing is made there."""
    store.write(NAME, extent_of(NAME))
    shutil.rmtree(root)
    root.mkdir()
    store._root._device += 1  # as the mounted filesystem's was
    for action in (store.probe, lambda: store.write(NAME, extent_of(NAME))):
        with pytest.raises(StoreError, match="not mounted"):
            action()
    assert list(root.iterdir()) == []


def test_another_backend_in_its_place_is_not_written_to(store, root):
    """Somebody has mounted, or made, another one under the same path."""
    shutil.rmtree(root)
    other = PosixStore(str(root), owner="you", capacity_bytes=GIB)
    for action in (store.probe, lambda: store.write(NAME, extent_of(NAME))):
        with pytest.raises(StoreError, match="another backend"):
            action()
    assert list(other.files()) == []


# ---- things that are something else ----------------------------------------------------------------


def make_directory(path):
    path.mkdir(parents=True)
    (path / "inside").touch()


def make_fifo(path):
    os.mkfifo(path)


def make_link(path):
    path.symlink_to("/etc/hostname")


@pytest.mark.parametrize("make", [make_directory, make_fifo, make_link])
def test_what_is_no_file_is_broken_and_can_be_set_aside(store, root, make):
    """It is not followed, waited for or listed; out of the way, the block can be written."""
    place = root / "blocks" / str(NAME)
    place.parent.mkdir(parents=True)
    make(place)
    with pytest.raises(StoreBrokenError):
        read(store, NAME)
    assert list(store.files()) == []
    store.set_aside(NAME)
    with pytest.raises(StoreMissingError):
        read(store, NAME)
    store.write(NAME, extent_of(NAME))
    assert read(store, NAME) == extent_of(NAME)
    store.drop_aside()
    assert store.aside_files() == []


def test_a_directory_in_a_blocks_place_refuses_the_write(store, root):
    """As broken: it is this name that has trouble, not the backend."""
    make_directory(root / "blocks" / str(NAME))
    with pytest.raises(StoreBrokenError):
        store.write(NAME, extent_of(NAME))
    assert temporaries(root) == []


def test_a_file_that_shrinks_while_it_is_read(store, monkeypatch):
    """What is left is told; no byte of the target counts."""
    store.write(NAME, extent_of(NAME))
    Disturbed(monkeypatch, "preadv", lambda real, *args: 512, lambda real, *args: 0)
    with pytest.raises(StoreSizeError) as short:
        read(store, NAME)
    assert short.value.actual == 512


# ---- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, StoreFullError),
        (errno.EDQUOT, StoreFullError),
        (errno.EROFS, StoreReadOnlyError),
        (errno.EACCES, StoreReadOnlyError),
        (errno.EIO, StoreError),
        (errno.ENOTCONN, StoreError),
        (errno.ETIMEDOUT, StoreError),
    ],
)
@pytest.mark.parametrize("function", ["open", "pwrite", "rename", "close"])
def test_errors_of_a_write_say_what_they_mean(store, root, monkeypatch, code, kind, function):
    """Full and read-only are told apart from down, at whatever step; network filesystems find out at the close."""
    store.write(NAME, extent_of(NAME))

    def failing(real, *args, **kwargs):
        if function == "close":
            real(*args, **kwargs)
        raise OSError(code, os.strerror(code))

    Disturbed(monkeypatch, function, failing)
    other = name_of(2)
    with pytest.raises(kind) as failed:
        store.write(other, extent_of(other))
    assert type(failed.value) is kind
    assert os.strerror(code) in str(failed.value)
    monkeypatch.undo()
    assert temporaries(root) == []
    assert [file.name for file in store.files()] == [NAME]


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ENOTCONN])
@pytest.mark.parametrize("function", ["open", "preadv"])
def test_errors_of_a_read_are_no_missing_files(store, monkeypatch, code, function):
    """A backend that fails knows nothing of its files; not being allowed to read is no read-only backend."""
    store.write(NAME, extent_of(NAME))
    Disturbed(monkeypatch, function, code)
    with pytest.raises(StoreError) as failed:
        read(store, NAME)
    assert type(failed.value) is StoreError
    assert read(store, NAME) == extent_of(NAME)


def test_what_can_be_removed_is_removed(store, monkeypatch):
    """One that fails does not keep the others; the error comes at the end."""
    names = write_many(store, range(4))
    Disturbed(monkeypatch, "unlink", errno.EIO)
    with pytest.raises(StoreError, match="Input/output error"):
        store.remove(names)
    assert [file.name for file in store.files()] == names[:1]


def test_a_read_only_filesystem_is_probed_as_one(store, monkeypatch):
    """The probe tells what a write would."""
    Disturbed(monkeypatch, "open", *[errno.EROFS] * 2)
    with pytest.raises(StoreReadOnlyError):
        store.probe()
    monkeypatch.undo()
    store.probe()


def test_a_probe_reads_what_it_wrote(store, root, monkeypatch):
    """A filesystem that loses or changes bytes is down."""
    real = posix_io.fill

    def changed(path, target, *, unit):
        real(path, target, unit=unit)
        target[3] ^= 1

    monkeypatch.setattr(posix_io, "fill", changed)
    with pytest.raises(StoreError, match="not what was written"):
        store.probe()
    assert tree(root) == {"kvpool.json"}


# ---- filesystems over a network --------------------------------------------------------------------


@pytest.mark.parametrize("function", ["open", "pwrite", "rename"])
def test_a_stale_handle_is_tried_again(store, root, monkeypatch, function):
    """Twice is bad luck; for ever is an error."""
    store.write(NAME, extent_of(NAME))
    other = name_of(2)
    Disturbed(monkeypatch, function, errno.ESTALE)
    store.write(other, extent_of(other))
    assert read(store, other) == extent_of(other)
    Disturbed(monkeypatch, function, *[errno.ESTALE] * 100)
    with pytest.raises(StoreError, match="Stale file handle"):
        store.write(name_of(3), extent_of(name_of(3)))
    monkeypatch.undo()
    assert temporaries(root) == []


@pytest.mark.parametrize("function", ["open", "preadv"])
def test_a_stale_read_is_tried_again(store, monkeypatch, function):
    """The file was replaced by its equal, and the handle meant the older one."""
    store.write(NAME, extent_of(NAME))
    Disturbed(monkeypatch, function, errno.ESTALE)
    assert read(store, NAME) == extent_of(NAME)
    Disturbed(monkeypatch, function, *[errno.ESTALE] * 100)
    with pytest.raises(StoreError, match="Stale file handle"):
        read(store, NAME)


def test_a_file_that_another_host_has_just_written_is_found(store, root, monkeypatch):
    """A client that remembers "no such file" looks again when the directory is opened."""
    store.write(NAME, extent_of(NAME))
    opened = []
    real = os.open

    def remembering(path, flags, *args):
        if flags & os.O_DIRECTORY:
            opened.append(path)
        elif str(path).endswith(str(NAME)) and not opened:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        return real(path, flags, *args)

    monkeypatch.setattr(os, "open", remembering)
    assert read(store, NAME) == extent_of(NAME)
    assert len(opened) == 1


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EEXIST, errno.EIO, errno.ETIMEDOUT])
def test_a_rename_that_was_done_twice_is_done(store, root, monkeypatch, code):
    """The answer to the first one was lost; the second finds its work done, and says so with an error.

    Or there is no second one: a client's patience was over.
    """

    def twice(real, source, target):
        real(source, target)
        raise OSError(code, os.strerror(code))

    Disturbed(monkeypatch, "rename", twice)
    store.write(NAME, extent_of(NAME))
    monkeypatch.undo()
    assert read(store, NAME) == extent_of(NAME)
    assert temporaries(root) == []


def test_a_rename_that_finds_the_block_there_is_done(store, root, monkeypatch):
    """Another node was first, on a filesystem that does not replace: the bytes are the same."""
    store.write(NAME, extent_of(NAME))
    rename = Disturbed(monkeypatch, "rename", errno.EEXIST)
    store.write(NAME, extent_of(NAME))
    assert rename.calls == 1
    assert temporaries(root) == []


def test_a_rename_whose_file_was_taken_away_is_done_again(store, root, monkeypatch):
    """Somebody thought that a writer which had been stopped for long was dead: nothing was renamed."""

    def taken(real, source, target):
        Path(source).unlink()
        real(source, target)

    rename = Disturbed(monkeypatch, "rename", taken)
    store.write(NAME, extent_of(NAME))
    assert rename.calls == 2
    assert read(store, NAME) == extent_of(NAME)


def test_a_rename_that_finds_something_else_there_fails(store, root, monkeypatch):
    """A file of another length is not ours: nothing is acknowledged."""
    store.write(NAME, extent_of(NAME)[:512])
    Disturbed(monkeypatch, "rename", *[errno.EEXIST] * 9)
    with pytest.raises(StoreError, match="File exists"):
        store.write(NAME, extent_of(NAME))
    assert temporaries(root) == []


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("piece", [1000, 512, 4096])
def test_short_reads_and_writes_are_continued(root, monkeypatch, direct, piece):
    """A filesystem may do less than it was asked for, at any length."""
    store = PosixStore(str(root), owner="me", capacity_bytes=GIB, direct=direct)
    shorten = lambda real, fd, data, at: real(fd, data[:piece], at)  # noqa: E731
    Disturbed(monkeypatch, "pwrite", *[shorten] * 3)
    store.write(NAME, extent_of(NAME))
    Disturbed(monkeypatch, "preadv", *[lambda real, fd, data, at: real(fd, [data[0][:piece]], at)] * 3)
    assert read(store, NAME) == extent_of(NAME)


# ---- past the page cache ---------------------------------------------------------------------------


def without_direct(real, path, flags, *args):
    """A filesystem that refuses the flag, after it has made the file."""
    if flags & os.O_DIRECT:
        os.close(real(path, flags & ~os.O_DIRECT, *args))
        raise OSError(errno.EINVAL, "Invalid argument")
    return real(path, flags, *args)


# ---- many at once ----------------------------------------------------------------------------------


def test_files_that_are_right_are_read_at_a_stretch(root, monkeypatch):
    """Of the others it is said that they are not, in their places; none of them costs a descriptor."""
    store = PosixStore(str(root), owner="me", capacity_bytes=GIB, direct=False)
    names = [name_of(number) for number in range(7)]
    for name in names:
        store.write(name, memoryview(extent_of(name)))
    size = len(extent_of(NAME))
    path = {name: root / "blocks" / str(name) for name in names}
    path[names[1]].unlink()
    os.truncate(path[names[2]], size - 1)
    os.truncate(path[names[3]], size + 1)
    path[names[4]].unlink()
    os.mkfifo(path[names[4]])
    path[names[5]].unlink()
    path[names[5]].symlink_to(path[names[0]])
    before = len(list(Path("/proc/self/fd").iterdir()))
    targets = [memoryview(bytearray(size)) for _ in names]
    assert store.try_read(names, targets, time.monotonic() + 60) == [True, *[False] * 5, True]
    assert targets[0] == extent_of(names[0])
    assert targets[6] == extent_of(names[6])
    Disturbed(monkeypatch, "preadv", errno.EIO, lambda _, __, views, ___: len(views[0]) - 1)
    assert store.try_read(names[:1] * 3, targets[:3], time.monotonic() + 60) == [False, False, True]
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_what_takes_long_is_told_early(store, monkeypatch):
    """Nobody hears of a file while others are read: after the time that was given none is begun."""
    names = [name_of(number) for number in range(4)]
    for name in names:
        store.write(name, memoryview(extent_of(name)))
    targets = [memoryview(bytearray(len(extent_of(NAME)))) for _ in names]
    assert len(store.try_read(names, targets, 0.0)) == 1
    reads = []
    monkeypatch.setattr(posix_io.time, "monotonic", lambda: len(reads))
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: reads.append(args) or real(*args))
    assert len(store.try_read(names, targets, 2.0)) == 2
    assert len(reads) == 2


def test_no_direct_where_the_filesystem_has_none(root, monkeypatch):
    """Found out at the opening; blocks go through the page cache."""
    Disturbed(monkeypatch, "open", *[without_direct] * 100)
    store = PosixStore(str(root), owner="me", capacity_bytes=GIB)
    assert store.direct_unit == 0
    store.write(NAME, extent_of(NAME))
    assert read(store, NAME) == extent_of(NAME)


@pytest.mark.parametrize("unit", [512, 4096])
def test_direct_that_stops_working_is_no_error(root, monkeypatch, unit):
    """One file is refused what others were allowed: it goes through the page cache."""
    monkeypatch.setattr(posix_io, "direct_unit", lambda path: unit)
    store = PosixStore(str(root), owner="me", capacity_bytes=GIB)
    store.write(NAME, extent_of(NAME))
    Disturbed(monkeypatch, "open", *[without_direct] * 2)
    store.write(NAME, extent_of(NAME))
    Disturbed(monkeypatch, "open", without_direct)
    assert read(store, NAME) == extent_of(NAME)
    Disturbed(monkeypatch, "pwrite", errno.EINVAL)
    store.write(NAME, extent_of(NAME))
    Disturbed(monkeypatch, "preadv", errno.EINVAL)
    assert read(store, NAME) == extent_of(NAME)
    Disturbed(monkeypatch, "pwrite", errno.EINVAL, errno.EINVAL)
    with pytest.raises(StoreError, match="Invalid argument"):
        store.write(NAME, extent_of(NAME))


def test_direct_units_are_probed(tmp_path, monkeypatch):
    """A disk of whole pages refuses less."""
    file = tmp_path / "file"
    file.write_bytes(bytes(100))
    if not posix_io.direct_unit(str(file)):
        pytest.skip("this filesystem has no O_DIRECT")

    def pages_only(real, fd, buffers, at):
        if len(buffers[0]) % 4096:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, buffers, at)

    Disturbed(monkeypatch, "preadv", *[pages_only] * 9)
    assert posix_io.direct_unit(str(file)) == 4096
    Disturbed(monkeypatch, "preadv", *[errno.EINVAL] * 9)
    assert posix_io.direct_unit(str(file)) == 0


@pytest.mark.parametrize(("unit", "copied"), [(0, False), (512, False), (4096, True)])
def test_there_is_no_copy_where_none_is_needed(root, monkeypatch, unit, copied):
    """A slot begins at a multiple of 512 bytes; only a disk of whole pages needs a buffer in between."""
    monkeypatch.setattr(posix_io, "direct_unit", lambda path: unit)
    store = PosixStore(str(root), owner="me", capacity_bytes=GIB)
    bounces = []
    real = posix_io._bounce
    monkeypatch.setattr(posix_io, "_bounce", lambda: (bounces.append(1), real())[1])
    extent = extent_of(NAME)
    segment = extent_of(name_of(2), shard_bytes=1 << 16)
    slot = segment[512 : 512 + len(extent)]
    slot[:] = extent
    calls = Disturbed(monkeypatch, "pwrite")
    store.write(NAME, slot)
    reads = Disturbed(monkeypatch, "preadv")
    store.read_into(NAME, slot)
    assert slot == extent
    assert bool(bounces) is copied
    assert (calls.calls, reads.calls) == (1, 1)


@pytest.mark.parametrize(("fsync", "calls"), [("off", (0, 0)), ("data", (1, 0)), ("full", (1, 1))])
def test_the_disk_is_awaited_as_was_asked(root, monkeypatch, fsync, calls):
    """For nothing, for the file's data before it gets its name, for the name after that."""
    store = PosixStore(str(root), owner="me", capacity_bytes=GIB, fsync=fsync)
    store.write(NAME, extent_of(NAME))
    order = []
    for name in ("fdatasync", "fsync", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (order.append(name), real(*args)))
    store.write(NAME, extent_of(NAME))
    assert order == ["fdatasync"] * calls[0] + ["rename"] + ["fsync"] * calls[1]


def test_files_are_for_those_whom_the_umask_lets(store, root):
    """Nodes of other users may share a directory; nothing is executable."""
    store.write(NAME, extent_of(NAME))
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((root / "blocks" / str(NAME)).stat().st_mode) == 0o666 & ~umask


def filesystem_of(path):
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    return max((len(point), kind) for point, kind in mounts if path.is_relative_to(point))[1]


def test_directories_of_blocks_are_spread_over_an_ext4(store, root):
    """Those below a namespace's lie in different places of the disk: not all among the inodes of deleted files."""
    if filesystem_of(root) != "ext4":
        pytest.skip("the temporary directory is not on ext4")
    store.write(NAME, extent_of(NAME))
    fd = os.open(root / "blocks" / NAME.namespace.hex(), os.O_RDONLY)
    try:
        flags = struct.unpack("@l", fcntl.ioctl(fd, 0x80086601, bytes(8)))[0]
    finally:
        os.close(fd)
    assert flags & 0x20000  # chattr's T
