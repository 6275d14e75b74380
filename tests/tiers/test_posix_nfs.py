"""A directory on a real NFS server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvpool.testing.store_conformance import StoreConformance, extent_of, name_of, read, write_many
from kvpool.tiers.opening import open_store
from kvpool.tiers.posix import PosixStore
from kvpool.tiers.store import BlockStore
from tests.faultfs.nfs import NfsMount, why_no_nfs


@pytest.fixture(scope="module")
def nfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NfsMount]:
    """Return a server and a mount for the tests of this file."""
    if why := why_no_nfs():
        pytest.skip(why)
    mount = NfsMount(tmp_path_factory.mktemp("nfs"))
    yield mount
    mount.close()


class TestNfs(StoreConformance):
    """The suite of all stores, every call a request to the server."""

    slow = True

    @pytest.fixture(autouse=True)
    def place(self, nfs: NfsMount, tmp_path: Path) -> None:
        self.name, self.nfs = tmp_path.name, nfs

    def open(self, owner: str, capacity_bytes: int | None = None) -> BlockStore:
        return open_store(self.url(), owner=owner, capacity_bytes=capacity_bytes)

    def url(self) -> str:
        return str(self.nfs.path / self.name)

    def put_foreign(self, path: str, data: bytes) -> bool:
        target = self.nfs.below / self.name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        return True


def test_the_servers_own_directory_is_the_same_backend(nfs):
    """Who writes on the server and who writes through NFS see each other's files."""
    far = PosixStore(str(nfs.path / "both"), owner="far")
    near = PosixStore(str(nfs.below / "both"), owner="near")
    assert near.id == far.id
    first, second = name_of(1), name_of(2)
    far.write(first, extent_of(first))
    near.write(second, extent_of(second))
    assert read(near, first) == extent_of(first)
    assert read(far, second) == extent_of(second)


def test_a_server_that_is_killed_and_started_again(nfs):
    """Calls wait for it, as on a hard mount, and then go on."""
    store = PosixStore(str(nfs.path / "killed"), owner="tester")
    [name] = write_many(store, range(1))
    got: list[bool] = []

    def work() -> None:
        other = name_of(7)
        store.write(other, extent_of(other))
        got.append(read(store, name) == extent_of(name) and read(store, other) == extent_of(other))

    nfs.kill_server()
    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert got == []
    finally:
        nfs.start_server()
        thread.join()
    assert got == [True]
