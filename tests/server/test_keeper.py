"""The catalog between two masters: whether the later one may believe that it has all that the earlier one kept."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from kvpool.core.effects import CatalogBackend, CatalogFiles, FileChange
from kvpool.core.master import MasterLimits, MasterState
from kvpool.core.messages import BlockRun
from kvpool.model import Backend, Namespace
from kvpool.server import keeper as keeper_module
from kvpool.server.keeper import RUNS_MAX, Keeper
from kvpool.tiers.catalog import Catalog, FileList

SPACE = Namespace(model="demo")
HERE = Backend(bytes(range(16)), "dir", 1 << 30)


class Master:
    """What a master has of its catalog, without sessions."""

    def __init__(self, data: Path, epoch: int) -> None:
        self.catalog = Catalog(str(data))
        self.state = MasterState(MasterLimits(), epoch, 100.0)
        self.keeper = Keeper(self.catalog, self.state, 100.0)

    def keep(self, change: FileChange, number: int) -> int:
        """Have a change of a file kept; returns the generation that an Ack would name."""
        run = BlockRun(SPACE.digest, 1, 512, number.to_bytes(16, "big"))
        self.keeper.perform(CatalogFiles(HERE.id, change, (run,)))
        return self.kept()

    def kept(self) -> int:
        done = threading.Event()
        if self.catalog.when_kept(done.set):
            assert done.wait(10)
        return self.keeper.generation

    def complete(self) -> None:
        self.keeper.perform(CatalogBackend(HERE, complete=True))
        self.kept()

    @property
    def believes(self) -> bool:
        """Whether it takes what the catalog has of the backend for all that there is."""
        return self.state.backends.by_id[HERE.id].complete

    def has(self, epoch: int, generation: int) -> bool:
        """Whether it has what a master has acknowledged."""
        assert self.state.backends.earlier is not None
        return generation <= self.state.backends.earlier.get(epoch, 0)

    def files(self) -> tuple[int, int]:
        """How many files the catalog has, and how many to be removed."""
        found: list[int] = []

        def take(files: FileList, doomed: FileList) -> None:
            found.extend((len(files), len(doomed)))

        self.catalog.read_files(take)
        self.kept()
        return found[0], found[1]

    def die(self) -> None:
        """End at once; what was kept is in the file."""
        self.catalog.close()


@pytest.fixture
def boots(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The machine's boot is the last one of these."""
    boots = ["first"]
    monkeypatch.setattr(keeper_module, "boot_id", lambda: boots[-1])
    return boots


def test_what_was_acknowledged_is_there_after_a_death(tmp_path: Path, boots: list[str]) -> None:
    """Of every master that has used the catalog, however each of them ended."""
    assert boots
    told: list[tuple[int, int]] = []
    for epoch in range(1, 6):
        master = Master(tmp_path, epoch)
        master.complete()
        assert epoch == 1 or master.believes
        assert all(master.has(*one) for one in told)
        told.append((epoch, master.keep(FileChange.ADDED, epoch)))
        assert master.has(*told[-1])
        if epoch % 2:
            master.die()
        else:
            master.keeper.close()


def test_a_catalog_that_was_put_back_lacks_what_was_acknowledged_since(tmp_path: Path, boots: list[str]) -> None:
    """Also when later masters have gone on with it; what was acknowledged before that it has."""
    assert boots
    master = Master(tmp_path / "new", 1)
    master.complete()
    before = master.keep(FileChange.ADDED, 1)
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    after = master.keep(FileChange.ADDED, 2)
    master.die()
    later = Master(tmp_path / "new", 2)
    told = later.keep(FileChange.ADDED, 3)
    later.die()
    for epoch in range(3, 6):
        master = Master(tmp_path / "old", epoch)
        assert (master.has(1, before), master.has(1, after), master.has(2, told)) == (True, False, False)
        for number in range(10):
            master.keep(FileChange.ADDED, number)
        master.die()


def test_a_machine_that_went_down_may_have_lost_changes(tmp_path: Path, boots: list[str]) -> None:
    """Nothing awaits the disk: backends are scanned then, unless the last master has ended in order."""
    master = Master(tmp_path, 1)
    master.complete()
    master.keeper.close()
    boots.append("second")
    master = Master(tmp_path, 2)
    assert master.believes
    master.die()
    master = Master(tmp_path, 3)
    assert master.believes  # killed, on a machine that goes on
    master.die()
    boots.append("third")
    for epoch in (4, 5):  # also the next one, if no scan has ended meanwhile
        master = Master(tmp_path, epoch)
        assert not master.believes
        master.kept()
        master.die()


def test_files_in_doubt_are_kept_as_doomed(tmp_path: Path, boots: list[str]) -> None:
    """Should the master end before they were looked for, they are removed for certain."""
    assert boots
    master = Master(tmp_path, 1)
    master.keep(FileChange.DOUBTED, 1)
    assert master.files() == (0, 1)
    master.keep(FileChange.REMOVED, 1)
    master.keep(FileChange.ADDED, 1)
    assert master.files() == (1, 0)


def test_only_the_last_masters_are_remembered(tmp_path: Path, boots: list[str]) -> None:
    """A node that has heard of none of them has the backends scanned."""
    assert boots
    for epoch in range(1, RUNS_MAX + 3):
        master = Master(tmp_path, epoch)
        master.kept()
        master.die()
    assert len(Catalog(str(tmp_path)).runs) == RUNS_MAX
