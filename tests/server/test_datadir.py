"""A master's directory belongs to one master at a time."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvpool.errors import ConfigError
from kvpool.server.datadir import LOCK_FILE, held


def test_a_directory_is_held_by_one(tmp_path):
    """The second is refused and named what it asked for; when the first has let go, the next one has it."""
    directory = tmp_path / "catalog"
    with held(str(directory)):
        with (
            pytest.raises(ConfigError, match=f"^data_dir: another master uses {directory}$"),
            held(str(directory)),
        ):
            pass
        with held(str(tmp_path / "other")):
            pass
    with held(str(directory)):
        pass


def test_what_holds_it_for_a_moment_is_waited_for(tmp_path):
    """As the child does that a master was about to start when it was killed."""
    lock = os.open(tmp_path / LOCK_FILE, os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    timer = threading.Timer(0.1, os.close, (lock,))
    timer.start()
    with held(str(tmp_path)):
        timer.join()


def test_a_fork_that_has_not_run_anything_yet_does_not_keep_it(tmp_path):
    """A master that ends lets go of it for all that have the file open."""
    path = tmp_path / LOCK_FILE
    with held(str(tmp_path)):
        (opened,) = [fd for fd in Path("/proc/self/fd").iterdir() if fd.exists() and fd.samefile(path)]
        copy = os.dup(int(opened.name))
    lock = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(lock)
        os.close(copy)


def test_no_child_holds_it_any_longer(tmp_path):
    """A master that was killed may leave children behind for a moment."""
    with held(str(tmp_path)):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    try:
        with held(str(tmp_path)):
            pass
    finally:
        child.communicate()


def test_without_a_directory_nothing_is_held(tmp_path, monkeypatch):
    """Any number of masters that remember nothing may run."""
    monkeypatch.chdir(tmp_path)
    with held(None), held(None):
        assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_is_named(tmp_path):
    """As a file in its place."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="data_dir: cannot keep the catalog in"), held(str(tmp_path / "file")):
        pass
    (tmp_path / "dir" / LOCK_FILE).mkdir(parents=True)
    with pytest.raises(ConfigError, match="data_dir: cannot keep the catalog in"), held(str(tmp_path / "dir")):
        pass
