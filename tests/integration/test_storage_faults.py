"""Storage that fails under a running pool: puts and gets go on from memory, its state says why, and it comes back."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvpool import Client
from kvpool.rpc.v1 import admin_pb2
from kvpool.rpc.v1.types_pb2 import Backend
from tests.faultfs.mount import FaultyMount, fill_up, mount
from tests.faultfs.nfs import NfsMount, why_no_nfs
from tests.integration.pool import SPACE, Pool, T, chain_of, get_chain, put_chain, wait_for

SIZE = 32 << 10
SEGMENT = 16 << 20
IN_FILES = chain_of(1, 12)
IN_MEMORY = chain_of(2, 6)
MS_RDONLY, MS_REMOUNT = 1, 32
UP, DOWN, READ_ONLY = Backend.State.UP, Backend.State.DOWN, Backend.State.READ_ONLY
AWAY = {"storage_down", "storage_timeout", "owner_suspect", "not_stored", "file_missing", "not_here"}
"""Why blocks are not had whose storage is away: who asked first is told, later ones find them gone from the index."""


class Storage:
    """A master and a node "a" on a backend; some blocks are in files only, some in memory too."""

    def __init__(self, pool: Pool, root: Path | str, *more: str) -> None:
        self.pool = pool
        self.root = Path(root)
        self._arguments = ("--storage_backends", str(root), *(more or ("--storage_timeout", "2s")))
        pool.start_master("--data_dir", str(pool.directory / "catalog"))
        self.start()
        put_chain(pool.client("a"), SPACE, IN_FILES, SIZE)
        wait_for(lambda: self.backend().blocks == len(IN_FILES), "all are in files")
        pool.nodes["a"].kill()
        self.start()
        self.client: Client = pool.client("a")
        wait_for(lambda: self.client.lookup(SPACE, IN_FILES).prefix == len(IN_FILES), "all are found again")
        put_chain(self.client, SPACE, IN_MEMORY, SIZE)
        wait_for(lambda: self.backend().blocks == len(IN_FILES + IN_MEMORY), "the others are in files, too")

    def start(self) -> None:
        self.pool.start_node("a", "--segment_size", str(SEGMENT), *self._arguments)

    def backend(self) -> admin_pb2.BackendStatus:
        reply: admin_pb2.BackendsResponse = self.pool.admin().Backends(
            admin_pb2.BackendsRequest(), timeout=T, wait_for_ready=True
        )
        return reply.backends[0] if reply.backends else admin_pb2.BackendStatus()

    def is_said_to_be(self, state: int, reason: str = "") -> None:
        """Wait until operators are told this."""

        def said() -> bool:
            told = self.backend()
            return told.state == state and reason in told.reason

        try:
            wait_for(said, f"state {state} because of {reason}")
        except AssertionError as exc:
            raise AssertionError(f"{exc}: {self.backend()}") from None

    def memory_goes_on(self, chain: int) -> None:
        """See that blocks are stored, found and loaded from memory, as if nothing were wrong."""
        keys = chain_of(chain, 4)
        put_chain(self.client, SPACE, keys, SIZE)
        for stored in (keys, IN_MEMORY):
            wait_for(lambda stored=stored: self.client.lookup(SPACE, stored).prefix == len(stored), "they are found")
            wait_for(lambda stored=stored: self._tiers(stored) == {"local": len(stored)}, "they are in memory")

    def _tiers(self, keys: list[bytes]) -> dict[str, int]:
        return dict(get_chain(self.client, SPACE, keys, SIZE).tiers)

    def is_asked(self) -> int:
        """Ask for what is in files only; returns how much came. What did not has a reason that names the storage."""
        known = self.client.lookup(SPACE, IN_FILES, timeout_ms=1000 * T)
        result = get_chain(self.client, SPACE, IN_FILES, SIZE, lookup=known)
        assert result.reasons.keys() <= AWAY, result
        return int(result.prefix)

    def files_are_read(self) -> None:
        """Wait until what is in files only is loaded, with the right bytes."""
        wait_for(lambda: get_chain(self.client, SPACE, IN_FILES, SIZE).prefix == len(IN_FILES), "files are read")

    def files_are_written(self, chain: int) -> None:
        """See that new blocks reach files."""
        keys = chain_of(chain, 4)
        put_chain(self.client, SPACE, keys, SIZE)
        files = [self.root / "blocks" / SPACE.digest.hex() / key.hex()[:3] / f"{key.hex()}.0" for key in keys]
        wait_for(lambda: all(file.exists() for file in files), "new blocks are in files")


@pytest.fixture
def storage_on(bare_pool: Pool) -> Callable[[Path], Storage]:
    """Return what starts a pool on a directory."""
    return lambda root: Storage(bare_pool, root)


@pytest.mark.parametrize(
    ("ops", "error"),
    [("*", errno.EIO), ("*", errno.ENOTCONN), ("open|create|read|write", errno.ESTALE), ("*", errno.ETIMEDOUT)],
    ids=lambda value: errno.errorcode.get(value, "") if isinstance(value, int) else "",
)
def test_storage_that_answers_errors(faulty_mount: FaultyMount, storage_on: Any, ops: str, error: int):
    """It is down with the reason, and up again when it works again; memory never notices."""
    storage = storage_on(faulty_mount.path / "pool")
    faulty_mount.fail(ops, error)
    assert storage.is_asked() == 0
    storage.is_said_to_be(DOWN, os.strerror(error))
    storage.memory_goes_on(3)
    faulty_mount.heal()
    storage.is_said_to_be(UP)
    storage.files_are_read()
    storage.files_are_written(4)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EROFS], ids=errno.errorcode.get)
def test_storage_that_takes_nothing_more(faulty_mount: FaultyMount, storage_on: Any, error: int):
    """It is read-only: what is in files is still loaded, and new blocks are written when that works again."""
    storage = storage_on(faulty_mount.path / "pool")
    faulty_mount.fail("create|write|mkdir|rename|unlink", error)
    storage.memory_goes_on(3)
    storage.is_said_to_be(READ_ONLY, os.strerror(error))
    storage.files_are_read()
    faulty_mount.heal()
    storage.is_said_to_be(UP)
    storage.files_are_written(4)


@pytest.mark.parametrize("ops", ["*", "read", "write|fsync|create", "open"])
def test_storage_that_hangs(faulty_mount: FaultyMount, storage_on: Any, ops: str):
    """Everybody is answered while it hangs; who waits for nothing else gets everything else."""
    storage = storage_on(faulty_mount.path / "pool")
    faulty_mount.hang(ops)
    storage.is_asked()
    storage.memory_goes_on(3)
    storage.is_said_to_be(DOWN, "s")
    storage.memory_goes_on(5)
    assert faulty_mount.hanging > 0
    faulty_mount.heal()
    storage.is_said_to_be(UP)
    storage.files_are_read()
    storage.files_are_written(4)


def helpers_of(pid: int) -> list[int]:
    """Return the processes beside a node that have written files."""
    children = (task.joinpath("children").read_text().split() for task in Path(f"/proc/{pid}/task").iterdir())
    return [int(child) for some in children for child in some if _written(int(child)) > SIZE]


def _written(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/io").read_text().split("wchar: ")[1].split()[0])
    except (OSError, IndexError):
        return 0


def test_processes_beside_the_node_that_hang_are_left_behind(faulty_mount: FaultyMount, storage_on: Any):
    """Others take their place, and they end as soon as they can."""
    storage = storage_on(faulty_mount.path / "pool")
    node = storage.pool.nodes["a"]
    chains = iter(range(100, 200))

    def busy() -> list[int]:
        there = storage.backend().blocks
        put_chain(storage.client, SPACE, chain_of(next(chains), 32), SIZE)
        wait_for(lambda: storage.backend().blocks == there + 32, "they are in files")
        return helpers_of(node.pid)

    wait_for(busy, "a process writes files")
    put_chain(storage.client, SPACE, IN_MEMORY, SIZE)  # others may have taken their place
    before = set(helpers_of(node.pid))
    faulty_mount.hang("read")
    storage.is_asked()
    storage.is_said_to_be(DOWN, "no answer")
    storage.memory_goes_on(3)
    faulty_mount.heal()
    storage.is_said_to_be(UP)
    storage.files_are_read()
    storage.files_are_written(4)
    wait_for(lambda: before - set(helpers_of(node.pid)), "one that hung is no more")


def test_a_node_ends_while_its_storage_hangs(faulty_mount: FaultyMount, storage_on: Any):
    """SIGTERM is obeyed, with reads, writes and probes under way that will never return."""
    storage = storage_on(faulty_mount.path / "pool")
    faulty_mount.hang()
    storage.is_asked()
    storage.memory_goes_on(3)
    storage.is_said_to_be(DOWN)
    assert faulty_mount.hanging > 0
    node = storage.pool.nodes["a"]
    node.send(signal.SIGTERM)
    assert node.popen.wait(T) == 0, node.words()
    faulty_mount.heal()
    storage.start()
    wait_for(storage.client.has_node, "the client is attached again")
    storage.files_are_read()


def test_a_node_ends_while_what_it_has_to_write_hangs(faulty_mount: FaultyMount, bare_pool: Pool):
    """SIGTERM is obeyed long before storage that may keep a write for a minute is down."""
    storage = Storage(bare_pool, faulty_mount.path / "pool", "--storage_timeout", "60s")
    faulty_mount.hang("write|create")
    put_chain(storage.client, SPACE, chain_of(9, 8), SIZE)
    wait_for(lambda: faulty_mount.hanging > 0, "writes hang")
    node = bare_pool.nodes["a"]
    node.send(signal.SIGTERM)
    assert node.popen.wait(T) == 0, node.words()
    assert "blocks were not written" in node.words()
    faulty_mount.heal()


def test_a_node_does_not_wait_for_storage_that_hangs_at_the_start(faulty_mount: FaultyMount, bare_pool: Pool):
    """It says which backend does not answer, and ends."""
    bare_pool.start_master()
    faulty_mount.hang()
    root = str(faulty_mount.path / "pool")
    node = bare_pool.start_node("a", "--segment_size", str(SEGMENT), "--storage_backends", root, wait=False)
    assert node.popen.wait(2 * T) not in {0, -signal.SIGKILL}
    assert f"{root} does not answer" in node.words()
    bare_pool.expected_errors.append("does not answer")


def test_a_mount_that_dies_and_is_mounted_again(faulty_mount: FaultyMount, storage_on: Any):
    """Nothing is made at the place where it was; when it is back, its files are."""
    storage = storage_on(faulty_mount.path / "pool")
    faulty_mount.kill()
    storage.is_asked()
    storage.is_said_to_be(DOWN)
    storage.memory_goes_on(3)
    faulty_mount.restart()
    storage.is_said_to_be(UP)
    storage.files_are_read()
    storage.files_are_written(4)


def test_an_nfs_server_that_is_killed_and_started_again(tmp_path: Path, bare_pool: Pool):
    """A hard mount: whoever asks waits for the server, only not those who ask the pool."""
    if why := why_no_nfs():
        pytest.skip(why)
    nfs = NfsMount(tmp_path / "nfs")
    try:
        storage = Storage(bare_pool, nfs.path / "pool")
        nfs.kill_server()
        assert storage.is_asked() == 0
        storage.is_said_to_be(DOWN, "no answer")
        storage.memory_goes_on(3)
        nfs.start_server()
        storage.is_said_to_be(UP)
        storage.files_are_read()
        storage.files_are_written(4)
        assert storage.pool.nodes["a"].end() == 0
    finally:
        nfs.close()


def test_a_disk_that_is_full(small_disk: Path, storage_on: Any):
    """A real one: read-only until there is room."""
    storage = storage_on(small_disk)
    ballast = fill_up(small_disk)
    storage.memory_goes_on(3)
    storage.is_said_to_be(READ_ONLY, "No space left")
    storage.files_are_read()
    ballast.unlink()
    storage.is_said_to_be(UP)
    storage.files_are_written(4)


def test_a_disk_that_becomes_read_only(small_disk: Path, storage_on: Any):
    """A real remount."""
    storage = storage_on(small_disk)
    mount("tmpfs", "kvpool-test", small_disk, flags=MS_REMOUNT | MS_RDONLY)
    storage.memory_goes_on(3)
    storage.is_said_to_be(READ_ONLY, "Read-only file system")
    storage.files_are_read()
    mount("tmpfs", "kvpool-test", small_disk, flags=MS_REMOUNT)
    storage.is_said_to_be(UP)
    storage.files_are_written(4)


def test_a_directory_that_is_deleted(tmp_path: Path, storage_on: Any):
    """It is made again with the same id; what was in it is a miss, what comes is written."""
    storage = storage_on(tmp_path / "files")
    before = storage.backend().id
    (tmp_path / "files").rename(tmp_path / "gone")  # at once: the node writes there meanwhile
    shutil.rmtree(tmp_path / "gone")
    storage.memory_goes_on(3)
    assert storage.is_asked() == 0
    storage.is_said_to_be(UP)
    wait_for((tmp_path / "files" / "kvpool.json").exists, "the directory is made again")
    storage.files_are_written(4)
    assert storage.backend().id == before


def test_an_object_store_that_is_killed_and_started_again(tmp_path: Path, bare_pool: Pool):
    """S3 for real: what it held is loaded again when it is back, and what comes then is stored; no secret is logged."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    pytest.importorskip("moto", reason="moto is not installed")
    from tests.faultfs.s3 import BUCKET, SECRET, S3Server

    server = S3Server(tmp_path)
    options = json.dumps(server.options())
    try:
        storage = Storage(
            bare_pool, f"s3://{BUCKET}/pool", "--storage_options", options, "--storage_capacity", "1GB",
            "--storage_timeout", "3s",
        )  # fmt: skip
        held = server.kill()
        assert storage.is_asked() == 0
        storage.is_said_to_be(DOWN, "Could not connect")
        storage.memory_goes_on(3)
        server.restart(held)
        storage.is_said_to_be(UP)
        storage.files_are_read()
        keys = chain_of(4, 4)
        put_chain(storage.client, SPACE, keys, SIZE)
        wait_for(
            lambda: (
                {f"pool/blocks/{SPACE.digest.hex()}/{key.hex()[:3]}/{key.hex()}.0" for key in keys}
                <= server.objects().keys()
            ),
            "new blocks are objects",
        )
        assert not any(SECRET in process.words() for process in (bare_pool.master, bare_pool.nodes["a"]))
    finally:
        server.close()
