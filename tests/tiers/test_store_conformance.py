"""Every store of this package does what the contract says; object stores have a file of their own."""

from __future__ import annotations

import pytest

from kvpool.testing.dram_store import DramStore
from kvpool.testing.store_conformance import StoreConformance, extent_of, name_of, read
from kvpool.testing.store_faults import FaultyStore, SlowStore
from kvpool.tiers import posix_io
from kvpool.tiers.measured import MeasuredStore
from kvpool.tiers.memory_store import MemoryStore
from kvpool.tiers.opening import open_store
from kvpool.tiers.posix import PosixStore
from kvpool.tiers.store import StoreBrokenError, StoreFullError


class TestMemoryStore(StoreConformance):
    """The reference."""

    @pytest.fixture(autouse=True)
    def backend(self):
        """One backend a test."""
        self.shared = MemoryStore(capacity_bytes=1 << 30)

    def open(self, owner, capacity_bytes=None):
        return self.shared


class TestWrappedStore(TestMemoryStore):
    """Wrappers that are told nothing change nothing."""

    def open(self, owner, capacity_bytes=None):
        return MeasuredStore(FaultyStore(SlowStore(self.shared)))


class TestDramStore(TestMemoryStore):
    """A node's segment and its state machine, as a store."""

    @pytest.fixture(autouse=True)
    def backend(self):
        """One segment a test."""
        self.shared = DramStore(capacity_bytes=64 << 20)
        yield
        self.shared.state.check()
        self.shared.close()

    @pytest.fixture
    def store(self):
        """The segment lives as long as the test."""
        return self.open("tester")

    def test_the_coldest_file_makes_room(self, store):
        """What was used last stays, and nothing that is listed is missing."""
        extent = extent_of(name_of(0), shard_bytes=7 << 20)
        for number in range(20):
            store.write(name_of(number), extent)
            assert read(store, name_of(0), len(extent)) == extent
        listed = {file.name for file in store.files()}
        assert name_of(0) in listed
        assert name_of(1) not in listed
        for name in listed:
            assert read(store, name, len(extent)) == extent
        with pytest.raises(StoreFullError):
            store.write(name_of(99), memoryview(bytes(65 << 20)))

    def test_changed_memory_is_found_out(self, store):
        """The bytes that are read are hashed, not those of the slot."""
        store.write(name_of(0), extent_of(name_of(0)))
        slot = store.state.slot(store._space + store._key(name_of(0)), 0)
        store.segment.view[slot.offset + 1000] ^= 1
        with pytest.raises(StoreBrokenError):
            read(store, name_of(0))


class PosixConformance(StoreConformance):
    """A directory."""

    direct = True
    fsync = "off"

    @pytest.fixture(autouse=True)
    def directory(self, tmp_path):
        """One directory a test."""
        self.root = tmp_path / "backend"

    def open(self, owner, capacity_bytes=None):
        return open_store(
            str(self.root), owner=owner, capacity_bytes=capacity_bytes, direct=self.direct, fsync=self.fsync
        )

    def url(self):
        return str(self.root)

    def put_foreign(self, path, data):
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
        return True


class TestBuffered(PosixConformance):
    """Through the page cache."""

    direct = False


class TestDirect(PosixConformance):
    """Past the page cache, in whatever units this disk takes."""

    @pytest.fixture(autouse=True)
    def needs_direct(self, directory, tmp_path):
        """Skip where O_DIRECT does not work at all."""
        if not PosixStore(str(tmp_path / "probe"), owner="probe").direct_unit:
            pytest.skip("this filesystem has no O_DIRECT")


class TestDirectInPages(PosixConformance):
    """Past the page cache on a disk that takes whole pages only: through aligned buffers."""

    @pytest.fixture(autouse=True)
    def pages(self, directory, monkeypatch):
        """Find a disk of 4096 bytes a sector."""
        unit = posix_io.direct_unit
        monkeypatch.setattr(posix_io, "direct_unit", lambda path: 4096 if unit(path) else 0)


class TestSynced(PosixConformance):
    """Awaiting the disk for every file and its name."""

    fsync = "full"
    slow = True
