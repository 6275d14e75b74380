"""Object stores: the same as every store, over fsspec; errors that say what is wrong and show no secrets."""

from __future__ import annotations

import itertools
import logging
import math
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from kvpool.errors import ConfigError
from kvpool.testing.store_conformance import SPACES, StoreConformance, extent_of, name_of, read, write_many
from kvpool.tiers.layout import IDENTITY_FILE
from kvpool.tiers.object import ObjectStore, _modified
from kvpool.tiers.opening import check_urls, open_store, public
from kvpool.tiers.posix import PosixStore
from kvpool.tiers.store import StoreError, StoreFullError, StoreMissingError, StoreReadOnlyError

CAPACITY = 7 << 30
_numbers = itertools.count()


def open_object(url: str, owner: str = "tester", capacity_bytes: int | None = CAPACITY, **more: Any) -> ObjectStore:
    return ObjectStore(url, owner=owner, capacity_bytes=capacity_bytes, **more)


@pytest.fixture
def memory_url() -> str:
    """Return a place in fsspec's memory that nobody else has."""
    return f"memory://test{next(_numbers)}/pool"


class TestMemory(StoreConformance):
    """fsspec's own memory: puts are whole."""

    @pytest.fixture(autouse=True)
    def place(self, memory_url: str) -> None:
        self._url = memory_url

    def open(self, owner: str, capacity_bytes: int | None = None) -> ObjectStore:
        return open_object(self._url, owner, capacity_bytes or CAPACITY)

    def put_foreign(self, path: str, data: bytes) -> bool:
        fsspec.filesystem("memory").pipe_file(f"{self._url}/{path}", data)
        return True


class TestDirectory(StoreConformance):
    """A filesystem whose puts are seen half done: a temporary object, and a move."""

    @pytest.fixture(autouse=True)
    def place(self, tmp_path: Path) -> None:
        self.root = tmp_path / "pool"
        self.root.mkdir()

    def open(self, owner: str, capacity_bytes: int | None = None) -> ObjectStore:
        return open_object(f"file://{self.root}", owner, capacity_bytes or CAPACITY)

    def put_foreign(self, path: str, data: bytes) -> bool:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        return True

    def test_what_interrupted_writers_left_goes(self) -> None:
        """By age, and our own at once."""
        store = self.open("me")
        [name] = write_many(store, range(1))
        place = self.root / "blocks" / str(name)
        for owner in ("me", "other"):
            (place.parent / f".{place.name}.{owner}.1.tmp").write_bytes(b"half")
        assert store.clean(1000) == 1
        assert store.clean(0) == 1
        assert [path.name for path in place.parent.iterdir()] == [place.name]

    def test_a_directory_reads_the_same_files(self) -> None:
        """Object stores and directories have one layout."""
        store = self.open("me")
        [name] = write_many(store, range(1))
        store.keep_namespace(SPACES[0])
        directory = open_store(str(self.root), owner="other")
        assert (directory.id, directory.capacity_bytes) == (store.id, store.capacity_bytes)
        assert read(directory, name) == extent_of(name)
        assert directory.namespaces() == [SPACES[0]]

    def test_a_failed_move_leaves_nothing_behind(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The temporary object goes with the error."""
        store = self.open("me")
        [name] = write_many(store, range(1))

        def refuse(*_: object) -> None:
            raise OSError(122, "Disk quota exceeded")

        with monkeypatch.context() as patch:
            patch.setattr(store._fs, "mv", refuse)
            with pytest.raises(StoreFullError, match="quota"):
                store.write(name, extent_of(name))
        assert [path.name for path in (self.root / "blocks" / str(name)).parent.iterdir()] == [Path(str(name)).name]

    def test_what_is_being_written_is_no_leftover(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nor is what another one writes where a listing does not say since when."""
        store, other = self.open("me"), self.open("other")
        move, [name] = store._fs.mv, write_many(store, range(1))
        cleaned = []

        def meanwhile(*arguments: Any) -> None:
            cleaned.append((store.clean(0), other.clean(0)))
            move(*arguments)

        monkeypatch.setattr(store._fs, "mv", meanwhile)
        monkeypatch.setattr("kvpool.tiers.object._modified", lambda entry: _modified({**entry, "mtime": math.inf}))
        store.write(name, extent_of(name))
        assert cleaned == [(0, 0)]
        assert _modified({}) == math.inf

    def test_a_lost_connection_is_made_again_by_a_probe(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Filesystems of one connection, such as SFTP, do not do that themselves."""
        store = self.open("me")
        [name] = write_many(store, range(1))

        def closed(*_: object, **__: object) -> None:
            raise OSError("Socket is closed")

        for method in ("cat_file", "pipe_file", "info"):
            monkeypatch.setattr(store._fs, method, closed)
        with pytest.raises(StoreError, match="Socket is closed"):
            read(store, name)
        store.probe()
        assert read(store, name) == extent_of(name)


def test_blocks_are_copied_while_others_run(memory_url, monkeypatch):
    """By numpy, which gives up the interpreter's lock; what a filesystem is given is bytes nevertheless."""
    store = open_object(memory_url)
    name = name_of(1)
    copied: list[int] = []
    given: list[bytes] = []
    copy, put = np.copyto, store._fs.pipe_file

    def counted(target: Any, data: Any) -> None:
        copied.append(len(data))
        copy(target, data)

    def noted(path: str, value: bytes, **more: Any) -> None:
        given.append(value)
        put(path, value, **more)

    monkeypatch.setattr(np, "copyto", counted)
    monkeypatch.setattr(store._fs, "pipe_file", noted)
    store.write(name, extent_of(name))
    assert read(store, name) == extent_of(name)
    assert copied == [len(extent_of(name))] * 2
    assert type(given[0]) is bytes


def test_a_directory_has_a_url_too(tmp_path):
    """It is opened as a directory all the same: past the page cache, and with a capacity of its own."""
    store = open_store(f"file://{tmp_path}/pool", owner="me")
    assert isinstance(store, PosixStore)
    assert store.url == f"{tmp_path}/pool"


def test_a_capacity_must_be_given_once(memory_url):
    """Nobody can ask an object store what is free; whoever opens it later is told what was recorded."""
    with pytest.raises(ConfigError, match="storage_capacity: must be given") as refused:
        open_object(memory_url, capacity_bytes=None)
    assert refused.value.field == "storage_capacity"
    made = open_object(memory_url)
    again = open_object(memory_url, capacity_bytes=None)
    assert (again.id, again.capacity_bytes) == (made.id, CAPACITY)


def test_another_capacity_is_named_in_the_log(memory_url, caplog):
    """What was recorded counts."""
    open_object(memory_url)
    with caplog.at_level(logging.WARNING):
        assert open_object(memory_url, capacity_bytes=1).capacity_bytes == CAPACITY
    assert "7.0 GiB" in caplog.text


def test_a_place_that_is_no_backend_can_be_refused(memory_url):
    """Tools look, they do not make."""
    with pytest.raises(ConfigError, match="is no backend"):
        open_object(memory_url, create=False)
    open_object(memory_url)
    assert open_object(memory_url, create=False).capacity_bytes == CAPACITY


def test_an_identity_that_cannot_be_understood_is_refused(memory_url):
    """Nothing is written over what is not ours."""
    fsspec.filesystem("memory").pipe_file(f"{memory_url}/{IDENTITY_FILE}", b"[1]")
    with pytest.raises(ConfigError, match="cannot be understood"):
        open_object(memory_url)


@pytest.mark.parametrize(
    ("url", "options", "problem"),
    [("nosuch://x/y", {}, "Protocol not known"), ("s3://b/p", {"nosuch_option": 1}, "nosuch_option")],
)
def test_what_cannot_be_opened_names_the_setting(url, options, problem):
    """An unknown protocol, an option that the filesystem does not know."""
    if url.startswith("s3:"):
        pytest.importorskip("s3fs", reason="s3fs is not installed")
    with pytest.raises(ConfigError, match=rf"storage_backends: {url}.*{problem}"):
        open_object(url, options=options)


@pytest.mark.parametrize("url", ["nosuch://x/y", "nosuch::s3://x/y"])
def test_an_unknown_protocol_is_said_before_anything_is_done(url):
    """A node says so before it takes its memory; directories and known protocols pass."""
    with pytest.raises(ConfigError, match='storage_backends: fsspec knows no "nosuch://"'):
        check_urls(["/kv", url])
    check_urls(["/kv", "file:///kv", "memory://x", "s3://b/p", "simplecache::s3://b/p"])


def test_a_backend_that_is_gone_is_down_and_is_made_again_by_a_probe(memory_url):
    """Missing blocks of a missing backend are no misses: nothing is known of them."""
    store = open_object(memory_url)
    [name] = write_many(store, range(1))
    fsspec.filesystem("memory").rm(memory_url, recursive=True)
    for action in (lambda: read(store, name), lambda: list(store.files())):
        with pytest.raises(StoreError, match="is gone") as failed:
            action()
        assert not isinstance(failed.value, StoreMissingError)
    store.probe()
    with pytest.raises(StoreMissingError):
        read(store, name)
    assert open_object(memory_url).id == store.id


def test_another_backend_at_the_same_place_is_noticed(memory_url):
    """A probe does not take a stranger for our own."""
    store = open_object(memory_url)
    fsspec.filesystem("memory").rm(memory_url, recursive=True)
    open_object(memory_url)
    with pytest.raises(StoreError, match="another backend"):
        store.probe()


class _DeniedError(PermissionError):
    """As s3fs raises it: the server's answer is the cause."""

    def __init__(self, code: str) -> None:
        super().__init__("no")
        self.__cause__ = RuntimeError()
        self.__cause__.response = {"Error": {"Code": code}}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(28, "No space left on device"), StoreFullError),
        (OSError(122, "Disk quota exceeded"), StoreFullError),
        (OSError(30, "Read-only file system"), StoreReadOnlyError),
        (PermissionError(13, "denied"), StoreReadOnlyError),
        (_DeniedError("AccessDenied"), StoreReadOnlyError),
        (_DeniedError("ExpiredToken"), StoreError),
        (_DeniedError("XMinioStorageFull"), StoreFullError),
        (RuntimeError("something of a library"), StoreError),
        (TimeoutError(), StoreError),
    ],
)
def test_errors_of_a_filesystem_are_errors_of_a_store(memory_url, monkeypatch, error, kind):
    """Whatever a filesystem raises while it writes; while it reads, only what is missing has a kind."""
    store = open_object(memory_url)

    def refuse(*_: object, **__: object) -> None:
        raise error

    for method in ("pipe_file", "cat_file"):
        monkeypatch.setattr(store._fs, method, refuse)
    with pytest.raises(StoreError) as failed:
        store.write(name_of(1), extent_of(name_of(1)))
    assert type(failed.value) is kind
    with pytest.raises(StoreError) as failed:
        read(store, name_of(1))
    assert type(failed.value) is StoreError


def test_nothing_shows_a_secret(memory_url, monkeypatch):
    """Neither the url, nor its repr, nor an error's text, nor the error that it came from."""
    secrets = {"secret": "hush-hush", "client_kwargs": {"aws_session_token": "mum-is-the-word"}}
    url = memory_url.replace("memory://", "memory://user:pass-word@") + "?sas=x"
    store = open_object(url, options=secrets)
    assert "pass-word" not in store.url + repr(store)
    assert "sas" not in store.url

    def refuse(*_: object, **__: object) -> None:
        raise OSError(f"{url} does not like hush-hush and mum-is-the-word")

    monkeypatch.setattr(store._fs, "pipe_file", refuse)
    with pytest.raises(StoreError) as failed:
        store.write(name_of(1), extent_of(name_of(1)))
    assert not any(secret in str(failed.value) for secret in ("hush-hush", "mum-is-the-word", "pass-word"))
    assert failed.value.__cause__ is None
    assert failed.value.__suppress_context__


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("/mnt/kv@home?", "/mnt/kv@home?"),
        ("s3://bucket/pool", "s3://bucket/pool"),
        ("sftp://me:word@host:22/kv@1?key=x", "sftp://host:22/kv@1"),
        ("sftp://me:wo@rd@host/kv", "sftp://host/kv"),
        ("memory://", "memory://"),
    ],
)
def test_names_of_backends_are_shown_without_secrets(url, shown):
    """In the log, and in what a node remembers."""
    assert public(url) == shown


def test_a_description_that_may_be_there_is_not_left_out(memory_url, monkeypatch):
    """Else all of its objects would be, from a scan that counts as complete."""
    store = open_object(memory_url)
    store.keep_namespace(SPACES[0])

    def busy(*_: object, **__: object) -> None:
        raise OSError("503 Slow Down")

    with monkeypatch.context() as patch:
        patch.setattr(store._fs, "cat_file", busy)
        with pytest.raises(StoreError, match="Slow Down"):
            store.namespaces(strict=True)
        assert store.namespaces() == []
    assert store.namespaces(strict=True) == [SPACES[0]]


def test_files_are_listed_a_few_directories_at_a_time(memory_url, monkeypatch):
    """Nobody holds the names of a whole backend."""
    store = open_object(memory_url)
    names = write_many(store, range(100))
    asked: list[int] = []
    listed = store._listed

    def count(paths: list[str]) -> Any:
        asked.append(len(paths))
        return listed(paths)

    monkeypatch.setattr(store, "_listed", count)
    files = store.files()
    first = next(files)
    assert sum(asked) < 50, "most of the hundred directories have not been looked at"
    assert {first.name, *(file.name for file in files)} == set(names)
