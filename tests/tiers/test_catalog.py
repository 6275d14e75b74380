"""The catalog: what was handed over is there after a restart, a kill, a full disk, a broken file."""

from __future__ import annotations

import logging
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import lmdb
import pytest

from kvpool.errors import ConfigError
from kvpool.model import Backend, Namespace
from kvpool.tiers import catalog as catalog_module
from kvpool.tiers import lmdb_file
from kvpool.tiers.catalog import Catalog, Files, KnownBackend, KnownPin

ONE = Namespace(model="one")
HERE, THERE = b"h" * 16, b"t" * 16
BACKEND = Backend(HERE, "dir", 1 << 40)


def key(number: int) -> bytes:
    return number.to_bytes(16)


def files(*numbers: int, backend: bytes = HERE, shards: int = 1, size: int = 100) -> Files:
    return Files(backend, ONE.digest, shards, size, b"".join(map(key, numbers)))


def names(found) -> Counter:
    """Each file of a FileList, or of a list of pieces: backend, shards, size, number."""
    pieces = [piece for part in found.slices(3) for piece in part] if hasattr(found, "slices") else found
    return Counter(
        (piece.backend, piece.shards, piece.shard_bytes, int.from_bytes(piece.keys[at : at + 16]))
        for piece in pieces
        for at in range(0, len(piece.keys), 16)
    )


def expected(*runs: Files) -> Counter:
    return names(list(runs))


def read(catalog: Catalog):
    """Wait for what it has: files, doomed files."""
    answers: queue.SimpleQueue = queue.SimpleQueue()
    catalog.read_files(lambda found, doomed: answers.put((found, doomed)))
    return answers.get(timeout=10)


def kept(catalog: Catalog) -> None:
    """Wait until everything handed over is kept, or given up."""
    done = threading.Event()
    if catalog.when_kept(done.set):
        assert done.wait(10)


@pytest.fixture
def opened(tmp_path):
    """Open the catalog in one place, as often as it is called; an open one is closed before."""
    catalogs: list[Catalog] = []

    def open_again() -> Catalog:
        for catalog in catalogs:
            catalog.close()
        catalogs[:] = [Catalog(str(tmp_path))]
        return catalogs[0]

    yield open_again
    for catalog in catalogs:
        catalog.close()


def test_everything_is_there_after_a_restart(opened):
    """Namespaces, backends, pins, nodes, files and doomed files."""
    catalog = opened()
    pins = [KnownPin(7, "system prompt", ONE.digest, 0.0, key(1) + key(2)), KnownPin(8, "", ONE.digest, 5e9, key(3))]
    catalog.keep_namespace(ONE)
    catalog.keep_backend(KnownBackend(BACKEND, complete=False))
    catalog.keep_backend(KnownBackend(BACKEND, complete=True))
    for pin in (*pins, pins[0]._replace(id=9)):
        catalog.keep_pin(pin)
    catalog.drop_pin(9)
    for node in ("a", "b"):
        catalog.keep_node(node)
    catalog.drop_node("a")
    catalog.files_added(files(1, 2, 3))
    catalog.files_added(files(1, backend=THERE, shards=0b101, size=300))
    catalog.files_lost(files(1))
    catalog.files_doomed(files(2, 9))
    catalog = opened()
    assert (catalog.namespaces, catalog.backends) == ([ONE], [KnownBackend(BACKEND, complete=True)])
    assert (catalog.pins, catalog.nodes) == (pins, ["b"])
    found, doomed = read(catalog)
    there = [files(1, backend=THERE, shards=shard, size=300) for shard in (1, 4)]
    assert names(found) == expected(files(3), *there)
    assert names(doomed) == expected(files(2))
    catalog.files_removed(files(2))
    assert names(read(catalog)[1]) == expected()


def test_a_file_is_there_once_whatever_its_size(opened):
    """A block reported with another size is kept with that one; a loss names any size."""
    catalog = opened()
    catalog.files_added(files(1, 2))
    catalog.files_added(files(1, size=200))
    assert names(read(catalog)[0]) == expected(files(2), files(1, size=200))
    catalog.files_lost(files(1, 2, size=0))
    assert names(read(catalog)[0]) == expected()


def test_files_come_back_oldest_first(opened, monkeypatch):
    """By the time at which they were written, whatever their names are; a file written again is young."""
    catalog = opened()
    clock = iter(range(1000, 2000))
    monkeypatch.setattr(catalog_module.time, "time", lambda: next(clock))
    for number in (5, 3, 9, 1, 3):
        catalog.files_added(files(number))
    slices = [sorted(names(part)) for part in read(catalog)[0].slices(2)]
    assert [[number for *_, number in part] for part in slices] == [[5, 9], [1, 3]]


KILLED = """
import sys, os
from kvpool.tiers.catalog import Catalog, Files
catalog = Catalog(sys.argv[1])
number = 0
while True:
    keys = b"".join((number + i).to_bytes(16) for i in range(50))
    number += 50
    catalog.files_added(Files(b"h" * 16, b"n" * 16, 1, 100, keys))
    def told(upto=number):
        os.write(1, b"%d\\n" % upto)
    if not catalog.when_kept(told):
        told()
"""


def test_what_was_kept_survives_a_kill(tmp_path, opened):
    """Everything up to the last word that it was kept is there, in order, after kill -9 in the middle of writing."""
    writer = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
    said = [int(writer.stdout.readline()) for _ in range(20)]
    os.kill(writer.pid, signal.SIGKILL)
    said += [int(line) for line in writer.stdout.read().split(b"\n")[:-1]]
    writer.wait(10)
    writer.stdout.close()
    catalog = opened()
    found = names(read(catalog)[0])
    assert len(found) >= said[-1] >= 1000
    assert {number for *_, number in found} == set(range(len(found)))


def test_a_defect_of_ours_does_not_end_the_thread(opened, caplog, monkeypatch):
    """What nobody has thought of is said; nothing is lost, and what comes later is written and acknowledged."""
    catalog = opened()
    tries: queue.SimpleQueue = queue.SimpleQueue()

    def fail(changes):
        tries.put(len(changes))
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(catalog, "_transact", fail)
        catalog.files_added(files(1))
        for _ in range(2):
            tries.get(timeout=10)
        assert "ZeroDivisionError" in caplog.text
        assert catalog.problem
    catalog.files_added(files(2))
    kept(catalog)
    assert names(read(catalog)[0]) == expected(files(1, 2))
    assert (catalog.problem, catalog.take_lost()) == ("", False)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _foreign(path: Path) -> None:
    path.write_bytes(b"this is no catalog\n" * 1000)


def _no_pages(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(2 * 4096)
        file.write(bytes(size - 2 * 4096))


def _entry_of_another_length(path: Path) -> None:
    with lmdb.open(str(path), subdir=False, max_dbs=16) as env, env.begin(write=True) as txn:
        txn.put(b"\0\0\0\1" + bytes(17), b"", db=env.open_db(b"files", txn=txn, create=False))


def _put_raw(path: Path, db: bytes, key: bytes, value: bytes) -> None:
    with lmdb.open(str(path), subdir=False, max_dbs=16) as env, env.begin(write=True) as txn:
        txn.put(key, value, db=env.open_db(db, txn=txn, create=False))


def _group_of_no_size(path: Path) -> None:
    _put_raw(path, b"groups", b"\0\0\0\2", catalog_module._GROUP.pack(HERE, ONE.digest, 0, 1 << 63))


def _group_of_no_shard(path: Path) -> None:
    _put_raw(path, b"groups", b"\0\0\0\2", catalog_module._GROUP.pack(HERE, ONE.digest, 300, 100))


def _time_of_another_length(path: Path) -> None:
    _put_raw(path, b"files", b"\0\0\0\1" + bytes(16), bytes(8))


def test_a_pin_that_is_cut_is_left_out(tmp_path, opened, caplog):
    """The rest is there; the master starts."""
    catalog = opened()
    catalog.files_added(files(1))
    catalog.keep_pin(KnownPin(7, "whole", ONE.digest, 0.0, key(1)))
    catalog.close()
    head = b'{"label": "cut", "until": 0}'
    value = struct.pack(">H", len(head)) + head + ONE.digest + b"x"
    _put_raw(tmp_path / "catalog.lmdb", b"pins", bytes(7) + b"\x08", value)
    catalog = opened()
    assert [pin.label for pin in catalog.pins] == ["whole"]
    assert "a pin that cannot be read" in caplog.text
    assert names(read(catalog)[0]) == expected(files(1))


def test_a_transaction_that_fails_leaves_nothing_behind(opened, monkeypatch):
    """Nor in memory: sizes that are known by then are written when the disk is well again."""
    monkeypatch.setattr(catalog_module, "RETRY_S", 0.01)
    catalog = opened()
    catalog.files_added(files(1, size=100))
    kept(catalog)
    put, failed = catalog_module._cursor, threading.Event()
    with monkeypatch.context() as patch:

        def full(txn, db):
            if db is catalog._files:
                failed.set()
                raise lmdb.DiskError("no space left")
            return put(txn, db)

        patch.setattr(catalog_module, "_cursor", full)
        catalog.files_added(files(2, size=200))
        assert failed.wait(10)
    kept(catalog)
    assert catalog.problem == ""
    assert names(read(catalog)[0]) == expected(files(1, size=100), files(2, size=200))


def test_an_environment_that_is_given_up_is_opened_again(opened, monkeypatch):
    """After LMDB's last word on it, too: what is in the file stays, what was held is written, all is told anew."""
    monkeypatch.setattr(catalog_module, "RETRY_S", 0.01)
    catalog = opened()
    catalog.files_added(files(1, size=100))
    catalog.keep_namespace(ONE)
    kept(catalog)
    transact, panics = catalog._transact, iter([True, True])

    def panic(changes):
        if next(panics, False):
            raise lmdb.PanicError("the environment has had a fatal error")
        transact(changes)

    monkeypatch.setattr(catalog, "_transact", panic)
    catalog.files_added(files(2, size=200))
    kept(catalog)
    assert (catalog.problem, catalog.take_lost()) == ("", True)
    assert names(read(catalog)[0]) == expected(files(1, size=100), files(2, size=200))
    again = opened()
    assert names(read(again)[0]) == expected(files(1, size=100), files(2, size=200))
    assert again.namespaces == [ONE]


@pytest.mark.parametrize(
    "damage",
    [
        _truncate, _foreign, _no_pages, _entry_of_another_length, _group_of_no_size, _group_of_no_shard,
        _time_of_another_length,
    ],
)  # fmt: skip
def test_a_broken_file_is_set_aside(tmp_path, opened, caplog, damage):
    """Whatever is wrong with it: one clear line, the file kept for people, an empty catalog that works."""
    catalog = opened()
    for start in range(0, 20_000, 1000):
        catalog.files_added(files(*range(start, start + 1000)))
    catalog.close()
    damage(tmp_path / "catalog.lmdb")
    with caplog.at_level(logging.WARNING):
        catalog = opened()
        assert names(read(catalog)[0]) == expected()
    assert "set aside" in caplog.text
    assert len(list(tmp_path.glob("catalog.lmdb.broken-*"))) == 1
    catalog.files_added(files(1))
    assert names(read(opened())[0]) == expected(files(1))


READER = """
import sys, threading
from kvpool.tiers.catalog import Catalog
read = threading.Event()
catalog = Catalog(sys.argv[1])
catalog.read_files(lambda files, doomed: read.set())
read.wait(30)
"""


def _zero_page(path: Path, content: bytes) -> None:
    """Zero the leaf pages that hold this, as after a power loss."""
    data = bytearray(path.read_bytes())
    for at in range(2 * 4096, len(data), 4096):
        is_leaf = struct.unpack_from("<H", data, at + 10)[0] & 2
        if is_leaf and content in data[at : at + 4096]:
            data[at : at + 4096] = bytes(4096)
    path.write_bytes(data)


def test_a_file_that_kills_its_reader_is_set_aside_at_the_next_start(tmp_path, opened, caplog):
    """LMDB ends the process where it walks onto a page that is none: once, and not at every start."""
    catalog = opened()
    catalog.keep_backend(KnownBackend(BACKEND, complete=True))
    for start in range(0, 20_000, 1000):
        catalog.files_added(files(*range(start, start + 1000)))
    read(catalog)
    catalog.close()
    _zero_page(tmp_path / "catalog.lmdb", b"\0\0\0\1" + key(10_000))
    reader = subprocess.run([sys.executable, "-c", READER, str(tmp_path)], capture_output=True, timeout=60, check=False)
    assert reader.returncode == -signal.SIGABRT, reader.stderr
    catalog = opened()
    assert (names(read(catalog)[0]), catalog.backends) == (expected(), [])
    assert "SIGABRT when it is read" in caplog.text
    assert len(list(tmp_path.glob("catalog.lmdb.broken-*"))) == 1
    catalog.files_added(files(1))
    assert names(read(opened())[0]) == expected(files(1))


def test_a_reader_that_somebody_killed_loses_nothing(tmp_path, opened, monkeypatch):
    """The next start looks whether it was the file, in a process of its own; the one after that does not."""
    catalog = opened()
    catalog.files_added(files(1, 2))
    read(catalog)
    mark = tmp_path / "catalog.lmdb.reading"
    assert not mark.exists()
    looks: list[Path] = []
    deadly = lmdb_file.deadly
    monkeypatch.setattr(lmdb_file, "deadly", lambda path: looks.append(path) or deadly(path))
    catalog.close()
    mark.touch()
    catalog = opened()
    assert mark.exists(), "until it has read the files"
    assert names(read(catalog)[0]) == expected(files(1, 2))
    assert not mark.exists()
    opened()
    assert len(looks) == 1
    assert not list(tmp_path.glob("catalog.lmdb.broken-*"))


def test_a_file_that_cannot_be_read_to_its_end_is_as_one_that_kills(tmp_path, opened, monkeypatch):
    """The start does not hang on it."""
    opened().close()
    assert not lmdb_file.deadly(tmp_path / "catalog.lmdb")
    monkeypatch.setattr(lmdb_file, "READ_S", 0.0)
    assert lmdb_file.deadly(tmp_path / "catalog.lmdb") == "it was not read in 0 s"


def test_a_full_disk_costs_only_the_memory_of_it(opened, monkeypatch):
    """What cannot be written is held within bounds, and is not said to be kept; beyond, all must be told again."""
    monkeypatch.setattr(catalog_module, "RETRY_S", 0.01)
    monkeypatch.setattr(catalog_module, "HELD_KEYS_MAX", 10)
    catalog = opened()
    catalog.files_added(files(1))
    kept(catalog)
    transact = catalog._transact
    full = threading.Event()
    full.set()
    failed: queue.SimpleQueue = queue.SimpleQueue()

    def fail(changes):
        if full.is_set():
            failed.put(len(changes))
            raise lmdb.DiskError("no space left")
        transact(changes)

    monkeypatch.setattr(catalog, "_transact", fail)
    catalog.files_added(files(2, 3))
    calls: queue.SimpleQueue = queue.SimpleQueue()
    assert catalog.when_kept(lambda: calls.put(full.is_set()))
    for _ in range(3):
        failed.get(timeout=10)
    assert "no space left" in catalog.problem
    assert not catalog.take_lost()
    assert catalog.when_kept(lambda: calls.put(full.is_set()))
    full.clear()
    assert [calls.get(timeout=10), calls.get(timeout=10)] == [False, False]
    assert names(read(catalog)[0]) == expected(files(1, 2, 3))
    kept(catalog)
    assert (catalog.problem, catalog.take_lost()) == ("", False)
    full.set()
    catalog.files_added(files(*range(10, 30)))
    kept(catalog)
    full.clear()
    catalog.files_added(files(4))
    kept(catalog)
    found, _ = read(catalog)
    kept(catalog)
    assert names(found) == expected(files(1, 2, 3, 4))
    assert [catalog.take_lost(), catalog.take_lost()] == [True, False]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    """The setting at fault is data_dir."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="data_dir"):
        Catalog(str(tmp_path / "file" / "below"))
