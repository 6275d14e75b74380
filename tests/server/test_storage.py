"""Backends as a node opens them at its start: new ones, ones it has used before, ones that are away."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvpool.config import NodeSettings
from kvpool.core.segment import SegmentState
from kvpool.errors import ConfigError
from kvpool.server import storage
from kvpool.server.filetier import FileTier
from kvpool.tiers.dram import Segment

T = 20.0


@pytest.fixture
def opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Opens a directory as a node with a data_dir does, and returns the ids of what it serves once ``until`` holds."""
    monkeypatch.setattr(storage, "REOPEN_S", 0.01)
    segment = Segment.create(1 << 20, lock=False)

    def run(until: Callable[[FileTier], bool] = lambda _: True, begin: Any = None) -> list[str]:
        async def serve() -> list[str]:
            settings = NodeSettings(
                storage_backends=(str(tmp_path / "kv"),), storage_capacity=1 << 30, data_dir=str(tmp_path / "data")
            )
            tier = await storage.open_tier(settings, SegmentState(1 << 20), segment, "a")
            assert tier is not None
            try:
                if begin is not None:
                    begin(tier)
                async with asyncio.timeout(T):
                    while not until(tier):  # noqa: ASYNC110 -- the tier tells nobody
                        await asyncio.sleep(0.01)
                return [store.id.hex() for store in tier.stores]
            finally:
                tier.close()

        try:
            return asyncio.run(serve())
        finally:
            for thread in threading.enumerate():  # the next one's directory has the same name
                if thread.name.startswith(("kvpool-storage", "kvpool-files")):
                    thread.join(T)

    return run


def test_a_backend_that_was_used_is_not_made_again_but_waited_for(opening, tmp_path):
    """An empty mount point after a reboot: the node serves without files, makes nothing there, and takes it back."""
    (before,) = opening()
    (tmp_path / "kv").rename(tmp_path / "away")
    (tmp_path / "kv").mkdir()

    def mount(tier: FileTier) -> None:
        assert tier.stores == []
        assert list((tmp_path / "kv").iterdir()) == []
        (tmp_path / "kv").rmdir()
        (tmp_path / "away").rename(tmp_path / "kv")

    assert opening(lambda tier: bool(tier.stores), mount) == [before]


def test_a_new_backend_that_cannot_be_made_ends_the_start(opening, tmp_path):
    """What was never seen to work is a mistake of the settings."""
    (tmp_path / "kv").write_text("a file")
    with pytest.raises(ConfigError, match="storage_backends"):
        opening()


def test_an_attempt_that_comes_late_leaves_the_mark_alone(opening, tmp_path, monkeypatch):
    """By then another one has succeeded, and what was written since is the mark's to answer for."""
    (before,) = opening()
    goes_on, open_store = threading.Event(), storage.open_store
    hanging = [True]

    def opens(*arguments: Any, **options: Any) -> Any:
        if hanging and hanging.pop():
            goes_on.wait(T)
        return open_store(*arguments, **options)

    monkeypatch.setattr(storage, "OPEN_S", 0.5)
    monkeypatch.setattr(storage, "open_store", opens)
    mark, clock = tmp_path / "kv" / "writers" / "_a", tmp_path / "kv" / "clock"
    says: list[float] = []

    def is_late(tier: FileTier) -> bool:
        if not tier.stores:
            return False
        clock.touch()
        if not says:
            says.append(float(mark.read_text()))
        if clock.stat().st_mtime > says[0]:
            goes_on.set()
        return goes_on.is_set() and not any(thread.name == "kvpool-open" for thread in threading.enumerate())

    assert opening(is_late) == [before]
    assert float(mark.read_text()) == says[0]


class Identified:
    """Of a store, what is remembered."""

    id = bytes(16)


def test_what_is_remembered_has_no_secrets(tmp_path):
    """Nor does it go on having those that it had before."""
    (tmp_path / "backends.json").write_text('{"sftp://me:word@host/kv": "ab", "/mnt/kv": "cd"}')
    known = storage.Known(str(tmp_path))
    assert known.has("sftp://me:word@host/kv") and known.has("sftp://host/kv") and known.has("/mnt/kv")
    known.remember("sftp://me:word@host/other", Identified())
    assert "word" not in (tmp_path / "backends.json").read_text()
    assert storage.Known(str(tmp_path)).has("sftp://host/other")


def test_another_backend_in_its_place_is_taken_and_remembered(opening, tmp_path, caplog):
    """The files are named by their content: nothing can be mixed up, but somebody should know."""
    (first,) = opening()
    (tmp_path / "kv").rename(tmp_path / "away")
    (tmp_path / "data" / "backends.json").unlink()
    (second,) = opening()
    (tmp_path / "kv").rename(tmp_path / "other")
    (tmp_path / "away").rename(tmp_path / "kv")
    assert first != second
    assert opening() == [first]
    assert f"{first} instead of {second}" in caplog.text
    assert opening() == [first]
