"""kvpoolctl fs: a real directory with real block files, beside a master whose catalog is a dict."""

import json
import os
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvpool.cli import ctl_fs, fs_files, remote
from kvpool.cli.ctl import command
from kvpool.cli.fs_verify import Verification
from kvpool.model import Namespace
from kvpool.rpc.v1 import admin_pb2, types_pb2
from kvpool.tiers import blockfile
from kvpool.tiers.memory_store import MemoryStore
from kvpool.tiers.opening import open_store
from kvpool.tiers.posix import PosixStore
from kvpool.tiers.store import FileName, StoreError, StoreReadOnlyError
from tests.cli.fake_storage import names, serving

SPACE = Namespace(model="demo", layers=2)
WIDE = Namespace(model="wide", layers=2, head_groups=2)
SHARD_BYTES = 3000
NOBODY = "127.0.0.1:1"


def name_of(number, space=SPACE, shard=0):
    return FileName(space.digest, bytes([number]) * 16, shard)


@pytest.fixture
def store(tmp_path):
    """A backend with five blocks of one namespace, and one whole and one half block of another."""
    opened = open_store(str(tmp_path / "kv"), owner="test", capacity_bytes=1 << 30)
    opened.keep_namespace(SPACE)
    opened.keep_namespace(WIDE)
    files = [name_of(n) for n in range(5)] + [name_of(8, WIDE, 0), name_of(8, WIDE, 1), name_of(9, WIDE, 1)]
    for name in files:
        opened.write(name, memoryview(blockfile.build(name, os.urandom(SHARD_BYTES), layers=2)))
    return opened


@pytest.fixture
def path(store):
    def of(name):
        return Path(store.url, "blocks", str(name))

    return of


@pytest.fixture
def master(store):
    """It has catalogued every file."""
    with serving() as fake:
        fake.backends[store.id] = admin_pb2.BackendStatus(
            complete=True,
            id=store.id, url=store.url, state=types_pb2.Backend.UP, capacity_bytes=1 << 30, used_bytes=8 * 4096,
            blocks=7, servers=[
                admin_pb2.BackendStatus.Server(node="a", backend=types_pb2.Backend(id=store.id, url=store.url)),
                admin_pb2.BackendStatus.Server(
                    node="b",
                    backend=types_pb2.Backend(
                        id=store.id, url=store.url, state=types_pb2.Backend.READ_ONLY, reason="mounted read-only"
                    ),
                ),
            ],
        )  # fmt: skip
        fake.files = {file.name: SHARD_BYTES for file in store.files()}
        yield fake


@pytest.fixture
def ctl(master):
    def run(*arguments, address=master.address):
        return CliRunner().invoke(command, ["--master", address, "--timeout", "3s", *arguments])

    return run


def data_of(result):
    (found,) = json.loads(result.stdout)["backends"]
    return found


def flip(path, at):
    """Change one bit of a file."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


class TestStatus:
    def test_backends_are_part_of_the_status(self, ctl):
        """A node that sees a backend otherwise than the others has a line of its own."""
        text = ctl("status").stdout
        assert "b: read only, mounted read-only" in text
        assert "32.0 KiB of 1.0 GiB" in text
        (backend,) = json.loads(ctl("--json", "status").stdout)["backends"]
        assert (backend["state"], [each["node"] for each in backend["servers"]]) == ("up", ["a", "b"])

    def test_trouble_is_said(self, ctl, master, store):
        """Down with its reason, full, scanning with its progress, removing."""
        status = master.backends[store.id]
        status.state, status.reason = types_pb2.Backend.DOWN, "read took 3.0 s"
        status.full = status.scanning = True
        status.scanned_files, status.scan_expected, status.removing_bytes = 50, 200, 1 << 20
        text = " ".join(ctl("status").stdout.split())
        for said in ("down, read took 3.0 s", "full: nothing is written", "50 of about 200 files", "1.0 MiB"):
            assert said in text
        status.scanning = status.complete = False
        assert "waits to be scanned" in " ".join(ctl("status").stdout.split())


class TestUsage:
    def test_without_a_backend_the_master_is_asked(self, ctl, master, store):
        """It knows all of them; none is exit code 1."""
        assert data_of(ctl("--json", "fs", "usage"))["used_bytes"] == 8 * 4096
        assert "32.0 KiB of 1.0 GiB" in ctl("fs", "usage").stdout
        master.backends.clear()
        result = ctl("fs", "usage")
        assert result.exit_code == 1
        assert "--storage_backends" in result.stdout
        assert ctl("fs", "usage", address=NOBODY).exit_code == 3

    def test_a_backend_is_looked_at_without_a_pool(self, ctl, store):
        """Files count in whole units of the disk, as at the master; blocks are whole with all their shards."""
        result = ctl("--json", "fs", "usage", store.url, address=NOBODY)
        assert result.exit_code == 0, result.output
        data = data_of(result)
        assert (data["files"], data["used_bytes"], data["capacity_bytes"]) == (8, 8 * 4096, 1 << 30)
        spaces = {each["descriptor"]["model"]: each for each in data["namespaces"]}
        assert (spaces["demo"]["blocks"], spaces["demo"]["whole_blocks"]) == (5, 5)
        assert (spaces["wide"]["files"], spaces["wide"]["blocks"], spaces["wide"]["whole_blocks"]) == (3, 2, 1)
        assert "32.0 KiB of 1.0 GiB" in ctl("fs", "usage", store.url).stdout


class TestOpening:
    @pytest.mark.parametrize("subcommand", ["usage", "ls", "verify", "scrub"])
    def test_a_mistyped_directory_is_exit_code_2_and_stays_as_it_is(self, ctl, tmp_path, subcommand):
        """No backend is made by looking for one."""
        empty = tmp_path / "empty"
        empty.mkdir()
        for place in (empty, tmp_path / "absent"):
            result = ctl("fs", subcommand, str(place))
            assert result.exit_code == 2
            assert str(place) in result.stderr
        assert list(empty.iterdir()) == []
        assert not (tmp_path / "absent").exists()

    def test_backends_come_from_a_nodes_settings_too(self, ctl, store, monkeypatch, tmp_path):
        """The same names as everywhere: variable and file."""
        assert ctl("fs", "ls").exit_code == 2
        config = tmp_path / "node.yaml"
        config.write_text(f"storage_backends: [{store.url}]\n")
        assert "demo" in ctl("fs", "ls", "--config", str(config)).stdout
        monkeypatch.setenv("KVPOOL_STORAGE_BACKENDS", store.url)
        assert "demo" in ctl("fs", "ls").stdout

    def test_the_master_comes_from_the_file_too(self, ctl, master, store, tmp_path):
        """The node's own; --master wins."""
        config = tmp_path / "node.yaml"
        config.write_text(f"master: {master.address}\nstorage_backends: [{store.url}]\n")
        result = CliRunner().invoke(command, ["--json", "fs", "scrub", "--config", str(config)])
        assert data_of(result)["compared"]
        assert not data_of(ctl("--json", "fs", "scrub", "--config", str(config), address=NOBODY))["compared"]

    def test_options_that_are_configured_are_for_urls(self, ctl, store, monkeypatch):
        """A directory goes without them; given beside one they are a mistake."""
        monkeypatch.setenv("KVPOOL_STORAGE_OPTIONS", '{"key": "k"}')
        assert ctl("fs", "ls", store.url).exit_code == 0
        assert ctl("fs", "ls", store.url, "--storage_options", '{"key": "k"}').exit_code == 2

    def test_a_backend_that_fails_at_its_opening_is_exit_code_3(self, ctl, tmp_path):
        """It is there, and cannot be read: nothing is wrong with what was asked."""
        (tmp_path / "broken" / "kvpool.json").mkdir(parents=True)
        result = ctl("fs", "ls", str(tmp_path / "broken"))
        assert result.exit_code == 3
        assert "the backend fails: " in result.stderr

    def test_a_backend_that_hangs_at_its_opening_is_exit_code_3(self, ctl, store, monkeypatch):
        """A hung mount keeps nobody."""
        release = threading.Event()
        monkeypatch.setattr(fs_files, "STALLED_S", 0.05)
        monkeypatch.setattr(ctl_fs, "open_store", lambda *args, **options: release.wait(30))
        result = ctl("fs", "usage", store.url)
        release.set()
        assert result.exit_code == 3
        assert f"{store.url} has not answered" in result.stderr


class TestList:
    def test_namespaces(self, ctl, store):
        """Which models' blocks, and how many are whole."""
        data = data_of(ctl("--json", "fs", "ls", store.url))
        assert {each["namespace"]: each["files"] for each in data["namespaces"]} == {
            SPACE.digest.hex(): 5,
            WIDE.digest.hex(): 3,
        }
        assert "1 of 2" in ctl("fs", "ls", store.url).stdout

    def test_files(self, ctl, store):
        """A line each for pipes, an object each for scripts; of one namespace when asked."""
        lines = ctl("fs", "ls", store.url, "--blocks").stdout.splitlines()
        assert sorted(line.split()[1] for line in lines) == sorted(str(file.name) for file in store.files())
        size = blockfile.extent_bytes(SHARD_BYTES, 2)
        assert all(line.split()[0] == str(size) for line in lines)
        found = data_of(ctl("--json", "fs", "ls", store.url, "--blocks", "--namespace", WIDE.digest.hex()[:8]))
        assert [(each["key"][:2], each["shard"], each["bytes"]) for each in found["files"]] == [
            ("08", 0, size), ("08", 1, size), ("09", 1, size),
        ]  # fmt: skip

    def test_nothing_is_exit_code_1(self, ctl, store):
        """Like ls of what is not there."""
        assert ctl("fs", "ls", store.url, "--namespace", "ffffffffffff").exit_code == 1
        assert ctl("fs", "ls", store.url, "--namespace", "ffffffffffff", "--blocks").exit_code == 1


class TestVerify:
    def test_whole_files_are_left_alone(self, ctl, store, master):
        """Exit code 0, and the master hears nothing."""
        before = sorted(store.files())
        result = ctl("fs", "verify", store.url)
        assert result.exit_code == 0, result.output
        assert "8 files" in result.stdout
        assert "none is broken" in result.stdout
        assert sorted(store.files()) == before
        assert master.asked == []

    def test_every_kind_of_damage_is_found_and_set_aside(self, ctl, store, master, path):
        """Flipped, truncated, foreign, of another namespace: out of the way, and out of the catalog."""
        size = blockfile.extent_bytes(SHARD_BYTES, 2)
        flip(path(name_of(0)), size - 600)
        os.truncate(path(name_of(1)), size - 512)
        path(name_of(2)).write_bytes(b"hello")
        path(name_of(3)).replace(path(name_of(8, WIDE, 0)))
        broken = [name_of(0), name_of(1), name_of(2), name_of(8, WIDE, 0)]
        result = ctl("--json", "fs", "verify", store.url, "--threads", "3")
        assert result.exit_code == 1, result.output
        data = data_of(result)
        assert [each["file"] for each in data["broken"]] == sorted(map(str, broken))
        assert all(each["reason"] for each in data["broken"])
        assert (data["files"], data["whole"], data["disposed"], data["told_master"]) == (7, 3, 4, 4)
        assert {file.name for file in store.files()}.isdisjoint(broken)
        assert master.files.keys().isdisjoint(broken)
        assert len(list(Path(store.url, "aside").iterdir())) == 4
        assert ctl("fs", "verify", store.url).exit_code == 0

    def test_the_master_hears_of_it_when_the_file_is_set_aside(self, ctl, store, master, path):
        """It has lost files removed: that must not take away what is kept to be looked at."""
        flip(path(name_of(0)), 700)
        there = []
        master.on_correct = lambda request: there.append(path(name_of(0)).exists())
        assert ctl("fs", "verify", store.url).exit_code == 1
        assert there == [False]

    def test_remove_instead_of_setting_aside(self, ctl, store, path):
        """Nothing of it is kept."""
        flip(path(name_of(0)), 700)
        result = ctl("fs", "verify", store.url, "--remove")
        assert "1 broken, removed" in result.stdout
        assert not path(name_of(0)).exists()
        assert not Path(store.url, "aside").exists()

    def test_what_was_found_is_shown_though_an_error_ends_the_run(self, ctl, store, path, monkeypatch):
        """In the table and for scripts; the exit code is the error's."""
        flip(path(name_of(0)), 700)

        def refuse(store, name):
            raise StoreReadOnlyError("read-only file system")

        monkeypatch.setattr(PosixStore, "set_aside", refuse)
        result = ctl("--json", "fs", "verify", store.url)
        assert result.exit_code == 3, result.output
        assert [each["file"] for each in data_of(result)["broken"]] == [str(name_of(0))]
        assert data_of(result)["disposed"] == 0
        assert "1 broken, 0 of them set aside" in ctl("fs", "verify", store.url).stdout

    def test_a_dry_run_changes_nothing(self, ctl, store, master, path):
        """It only reports; exit code 1 all the same."""
        flip(path(name_of(0)), 700)
        result = ctl("fs", "verify", store.url, "--dry_run")
        assert result.exit_code == 1
        assert str(name_of(0)) in "".join(result.stdout.split())
        assert path(name_of(0)).exists()
        assert master.asked == []

    def test_it_works_without_a_pool(self, ctl, store, path):
        """And says that nobody was told."""
        flip(path(name_of(0)), 700)
        result = ctl("fs", "verify", store.url, address=NOBODY)
        assert result.exit_code == 1
        assert "only the files are looked at" in result.stderr
        assert not path(name_of(0)).exists()

    def test_remove_and_dry_run_exclude_each_other(self, ctl, store):
        """Exit code 2."""
        assert ctl("fs", "verify", store.url, "--remove", "--dry_run").exit_code == 2


class TestScrub:
    def test_agreement_is_exit_code_0(self, ctl, store, master):
        """Nothing is told, nothing removed."""
        result = ctl("fs", "scrub", store.url)
        assert result.exit_code == 0, result.output
        assert "0 unknown to the catalog; 0 missing" in result.stdout
        assert master.asked == []

    def test_unknown_files_are_adopted_once_they_are_verified(self, ctl, store, master, path):
        """The master gets their sizes and descriptors; a broken one is set aside instead."""
        lost, broken = [name_of(1), name_of(8, WIDE, 1)], name_of(2)
        for name in [*lost, broken]:
            del master.files[name]
        flip(path(broken), 700)
        result = ctl("--json", "fs", "scrub", store.url)
        assert result.exit_code == 1, result.output
        data = data_of(result)
        assert (data["adopted"], data["removed"], len(data["unknown"])) == (2, 0, 3)
        assert [each["file"] for each in data["broken"]] == [str(broken)]
        assert {name: master.files.get(name) for name in lost} == dict.fromkeys(lost, SHARD_BYTES)
        assert broken not in master.files
        assert {each.model for each in master.namespaces} == {"demo", "wide"}
        assert not path(broken).exists()

    def test_unknown_files_are_removed_when_asked(self, ctl, store, master, path, monkeypatch):
        """Only those: what the catalog has stays. The master is told afterwards: it may have heard of one just now."""
        del master.files[name_of(1)]
        there = []
        master.on_correct = lambda request: there.append(path(name_of(1)).exists())
        monkeypatch.setattr(PosixStore, "_now", lambda store: time.time() + 2 * 3600)
        result = ctl("fs", "scrub", store.url, "--remove_unknown")
        assert result.exit_code == 1, result.output
        assert "1 unknown to the catalog, removed" in result.stdout
        assert not path(name_of(1)).exists()
        assert sorted(file.name for file in store.files()) == sorted(master.files)
        (asked,) = master.asked
        assert [name for run in asked.removed for name in names(run)] == [name_of(1)]
        assert there == [False]

    def test_what_was_just_written_is_not_removed_as_unknown(self, ctl, store, master, path):
        """Its node may not have told yet; how young that is, is said by --older_than."""
        del master.files[name_of(1)]
        result = ctl("fs", "scrub", store.url, "--remove_unknown")
        assert result.exit_code == 1, result.output
        assert "1 unknown to the catalog, 0 removed, 1 too young for that" in result.stdout
        assert path(name_of(1)).exists()
        assert master.asked == []
        changed = path(name_of(1)).stat().st_ctime
        while time.time() <= changed + 0.1:
            time.sleep(0.01)
        result = ctl("--json", "fs", "scrub", store.url, "--remove_unknown", "--older_than", "1ms")
        assert data_of(result)["removed"] == 1

    def test_nothing_is_removed_as_unknown_while_a_node_is_silent(self, ctl, store, master, monkeypatch):
        """It may go on writing what the master hears of later."""
        del master.files[name_of(1)]
        master.silent_s = 30
        monkeypatch.setattr(PosixStore, "_now", lambda store: time.time() + 2 * 3600)
        result = ctl("fs", "scrub", store.url, "--remove_unknown")
        assert result.exit_code == 3
        assert "hears nothing of a, b" in result.stderr
        assert len(list(store.files())) == 8

    def test_files_that_wait_for_their_removal_are_known(self, ctl, store, master, path):
        """Whether they are still there or not: a backend that is being evicted agrees with the catalog."""
        for number in range(2):
            master.files[name_of(number)] = 0
        path(name_of(0)).unlink()
        result = ctl("fs", "scrub", store.url)
        assert result.exit_code == 0, result.output
        assert "0 unknown to the catalog; 0 missing" in result.stdout
        assert path(name_of(1)).exists()

    def test_a_file_that_is_evicted_meanwhile_is_not_missing(self, ctl, store, master, path):
        """It was in the catalog before the files were listed."""
        path(name_of(0)).unlink()
        master.late = {name_of(0): 0}
        result = ctl("fs", "scrub", store.url)
        assert result.exit_code == 0, result.output
        assert master.asked == []

    def test_a_file_that_is_reported_meanwhile_is_not_unknown(self, ctl, store, master, path):
        """Listing takes a while, and nodes go on writing."""
        master.late = {name_of(1): master.files.pop(name_of(1))}
        result = ctl("fs", "scrub", store.url, "--remove_unknown")
        assert result.exit_code == 0, result.output
        assert path(name_of(1)).exists()

    @pytest.mark.parametrize("trouble", ["warming", "scanning", "not scanned", "unknown backend", "no master"])
    def test_nothing_is_removed_as_unknown_unless_the_catalog_is_complete(self, ctl, store, master, trouble):
        """A master that has just started knows of no file."""
        master.files.clear()
        master.warming = trouble == "warming"
        master.backends[store.id].scanning = trouble == "scanning"
        master.backends[store.id].complete = trouble != "not scanned"
        if trouble == "unknown backend":
            master.backends.clear()
        address = NOBODY if trouble == "no master" else master.address
        result = ctl("fs", "scrub", store.url, "--remove_unknown", address=address)
        assert result.exit_code == 3
        assert "remove_unknown" in result.stderr
        assert len(list(store.files())) == 8

    def test_missing_files_are_forgotten(self, ctl, store, master, path):
        """The catalog has them, the disk has not."""
        path(name_of(3)).unlink()
        result = ctl("--json", "fs", "scrub", store.url)
        assert result.exit_code == 1
        data = data_of(result)
        assert (data["missing"], data["forgotten"]) == ([str(name_of(3))], 1)
        assert name_of(3) not in master.files
        (asked,) = master.asked
        assert [name for run in asked.removed for name in names(run)] == [name_of(3)]

    def test_leftovers_of_writers_go_by_age_and_owner(self, ctl, store, path):
        """A temporary file of a process that died long ago goes, one of a minute ago may still be written."""
        directory = path(name_of(0)).parent
        old, new = (directory / f".{n:032x}.0.someone-{n}.1.tmp" for n in range(2))
        for each in (old, new):
            each.write_bytes(b"half")
        past = time.time() - 7200
        os.utime(old, (past, past))
        result = ctl("--json", "fs", "scrub", store.url)
        assert data_of(result)["leftovers_removed"] == 1
        assert (old.exists(), new.exists()) == (False, True)

    def test_files_set_aside_are_shown_and_removed(self, ctl, store, path):
        """They are for people to look at, until then."""
        store.set_aside(name_of(0))
        aside = Path(store.url, "aside")
        size = blockfile.extent_bytes(SHARD_BYTES, 2)
        for options, left in ((["--dry_run"], 1), (["--keep_aside"], 1), ([], 0)):
            result = ctl("--json", "fs", "scrub", store.url, *options, address=NOBODY)
            assert [each["bytes"] for each in data_of(result)["aside"]] == [size]
            assert len(list(aside.iterdir())) == left

    def test_a_dry_run_changes_nothing(self, ctl, store, master, path):
        """It says what would be done."""
        path(name_of(3)).unlink()
        del master.files[name_of(1)]
        before = sorted(store.files())
        result = ctl("fs", "scrub", store.url, "--dry_run")
        assert result.exit_code == 1
        assert "1 unknown to the catalog; 1 missing" in result.stdout
        assert master.asked == []
        assert sorted(store.files()) == before

    def test_a_master_whose_list_does_not_end_is_given_its_own_time(self, ctl, store, master, monkeypatch):
        """Which is not that of other questions, and is the one that is named."""
        monkeypatch.setattr(remote, "STREAM_S", 0.2)
        release = threading.Event()
        master.on_list = lambda: release.wait(30)
        result = ctl("fs", "scrub", store.url)
        release.set()
        assert result.exit_code == 3
        assert "did not answer within 0.2 s" in result.stderr

    def test_what_is_set_aside_goes_though_the_cleaning_fails(self, ctl, store, path, monkeypatch):
        """Its room may be what is missing. What was done is shown, and the exit code is the error's."""
        store.set_aside(name_of(0))

        def refuse(store, older_than_s):
            raise StoreReadOnlyError("disk quota exceeded")

        monkeypatch.setattr(PosixStore, "clean", refuse)
        result = ctl("--json", "fs", "scrub", store.url)
        assert result.exit_code == 3, result.output
        assert "disk quota exceeded" in result.stderr
        assert (data_of(result)["forgotten"], len(data_of(result)["aside"])) == (1, 1)
        assert store.aside_files() == []
        store.set_aside(name_of(1))
        monkeypatch.setattr(PosixStore, "drop_aside", lambda store: refuse(store, 0))
        assert "1 files set aside (3.5 KiB) are kept" in ctl("fs", "scrub", store.url).stdout

    def test_empty_directories_go(self, ctl, store, path):
        """What was removed leaves none behind; a directory with files stays."""
        store.remove([name_of(n) for n in range(5)])
        assert ctl("fs", "scrub", store.url, address=NOBODY).exit_code == 0
        assert [each.name for each in Path(store.url, "blocks").iterdir()] == [WIDE.digest.hex()]


class Failing(MemoryStore):
    """A store of which some reads fail, and which is asked to set nothing aside."""

    failing: frozenset[FileName] = frozenset()

    def read_into(self, name, target):
        if name in self.failing:
            raise StoreError("input/output error")
        super().read_into(name, target)


class TestFailingBackend:
    def filled(self, count):
        store = Failing(capacity_bytes=1 << 30)
        for n in range(count):
            store.write(name_of(n), memoryview(blockfile.build(name_of(n), bytes(SHARD_BYTES), layers=2)))
        return store

    def test_what_cannot_be_read_is_reported_and_left(self):
        """A read error says nothing about the bytes: the file may be read again tomorrow."""
        store = self.filled(5)
        store.failing = frozenset([name_of(2)])
        run = Verification(store, None, threads=2, remove=False, dry_run=False)
        run.run()
        data = run.data()
        assert not run.clean
        assert (data["whole"], data["broken"], data["disposed"]) == (4, [], 0)
        assert [each["reason"] for each in data["unreadable"]] == ["input/output error"]
        assert len(list(store.files())) == 5

    def test_a_backend_that_fails_altogether_ends_the_run(self):
        """Nothing is set aside because a mount is gone."""
        store = self.filled(40)
        store.failing = frozenset(file.name for file in store.files())
        run = Verification(store, None, threads=2, remove=True, dry_run=False)
        with pytest.raises(StoreError, match="in a row"):
            run.run()
        assert len(list(store.files())) == 40

    def test_a_backend_that_hangs_ends_the_run(self, monkeypatch):
        """The threads that are stuck are left behind."""
        monkeypatch.setattr(fs_files, "STALLED_S", 0.05)
        release = threading.Event()
        store = self.filled(1)
        monkeypatch.setattr(store, "read_into", lambda name, target: release.wait(30))
        with pytest.raises(fs_files.StalledError, match="has not answered"):
            Verification(store, None, threads=1, remove=False, dry_run=False).run()
        release.set()


CALLS = {
    "files": lambda store: list(store.files()),
    "namespaces": lambda store: store.namespaces(),
    "remove": lambda store: store.remove([name_of(1)]),
    "set_aside": lambda store: store.set_aside(name_of(1)),
    "aside_files": lambda store: store.aside_files(),
    "drop_aside": lambda store: store.drop_aside(),
    "clean": lambda store: store.clean(1.0),
    "free_bytes": lambda store: store.free_bytes(),
}


class TestBounded:
    @pytest.mark.parametrize("call", CALLS)
    def test_no_call_waits_for_ever(self, call, monkeypatch):
        """Whichever of them a mount hangs in."""
        monkeypatch.setattr(fs_files, "STALLED_S", 0.05)
        monkeypatch.setattr(fs_files, "CLEAN_S", 0.05)
        release = threading.Event()
        store = MemoryStore()
        monkeypatch.setattr(store, call, lambda *args, **more: iter(()) if release.wait(30) else None)
        with pytest.raises(fs_files.StalledError, match="has not answered"):
            CALLS[call](fs_files.BoundedStore(store))
        release.set()

    def test_what_was_listed_comes_before_the_error(self, monkeypatch):
        """Piece by piece, in order; the error is raised where the list is read."""
        monkeypatch.setattr(fs_files, "PIECE", 2)

        def files(since):
            yield from "abcde"
            raise StoreError("input/output error")

        store = MemoryStore()
        monkeypatch.setattr(store, "files", files)
        listed = fs_files.BoundedStore(store).files()
        assert [next(listed) for _ in range(5)] == list("abcde")
        with pytest.raises(StoreError, match="input/output"):
            next(listed)
