"""``kvpool up``: a pool in one go, and nothing of it left when it ends, however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kvpool import Client
from tests.integration.pool import (
    ROOT,
    SPACE,
    T,
    chain_of,
    environment,
    free_port,
    get_chain,
    put_chain,
    run_module,
    wait_for,
)

SIZE = 64 << 10
KEYS = chain_of(1, 16)


class Up:
    """``kvpool up --nodes 2`` with homes of its own for sockets and temporary files."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.run, self.tmp = directory / "run", directory / "tmp"
        for path in (self.run, self.tmp):
            path.mkdir()
        self.environment = environment(XDG_RUNTIME_DIR=str(self.run), TMPDIR=str(self.tmp))
        self.log = directory / "up.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kvpool.cli.main", "up", "--nodes", "2", "--port", str(self.port),
                 "--segment_size", "32MB"],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env=self.environment, cwd=ROOT, start_new_session=True,
            )  # fmt: skip
        wait_for(lambda: self.says("kvpool is up"), "the pool is up")
        self.children = psutil.Process(self.process.pid).children(recursive=True)
        assert len(self.children) == 3

    def says(self, text: str) -> bool:
        """Whether it has printed something."""
        words = self.log.read_text()
        assert text in words or self.process.poll() is None, words
        return text in words

    def sockets(self) -> list[str]:
        """Return the nodes' sockets."""
        done = run_module("kvpool.cli.ctl", "--master", self.address, "--json", "nodes")
        assert done.returncode == 0, done.stderr
        return [node["socket_path"] for node in json.loads(done.stdout)["nodes"]]

    def left(self) -> list[str]:
        """Return the processes and files that are left, empty directories for sockets aside."""
        alive = [repr(child) for child in self.children if child.is_running()]
        files = [str(path) for home in (self.run, self.tmp) for path in home.rglob("*") if path.name != "kvpool"]
        return alive + files


@pytest.fixture
def up() -> Iterator[Up]:
    """Return a pool that is up, in a place short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="up-") as directory:
        yield from _up(Path(directory))


def _up(directory: Path) -> Iterator[Up]:
    started = Up(directory)
    try:
        yield started
    finally:
        for process in (psutil.Process(started.process.pid) if started.process.poll() is None else None,
                        *started.children):  # fmt: skip
            if process is not None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        started.process.wait(T)


def use(up: Up) -> None:
    """Put by one node, get by the other."""
    for path in sorted(up.sockets()):
        with Client(up.address, node=path) as client:
            assert client.has_node()
            if client.lookup(SPACE, KEYS).prefix == 0:
                put_chain(client, SPACE, KEYS, SIZE)
                wait_for(lambda c=client: c.lookup(SPACE, KEYS).reason == "complete", "the blocks are known")  # type: ignore[misc]
            assert get_chain(client, SPACE, KEYS, SIZE).prefix == len(KEYS)


@pytest.mark.parametrize("how", ["ctrl-c", "SIGINT", "SIGTERM", "SIGHUP"])
def test_up_works_and_leaves_nothing(up: Up, how: str) -> None:
    """Ctrl-C reaches the whole process group, a signal one process: both end it in order, with code 0."""
    use(up)
    if how == "ctrl-c":
        os.killpg(up.process.pid, signal.SIGINT)
    else:
        up.process.send_signal(signal.Signals[how])
    assert up.process.wait(T) == 0, up.log.read_text()
    assert not up.left()
    assert "Traceback" not in up.log.read_text()


def test_up_killed_takes_its_children_along(up: Up) -> None:
    """Kill -9 cannot be caught, but the children notice."""
    use(up)
    up.process.kill()
    up.process.wait(T)
    wait_for(lambda: not [child for child in up.children if child.is_running()], "the children end")
    assert not [path for path in (*up.run.rglob("*"), *up.tmp.rglob("*")) if path.is_socket()]


@pytest.mark.parametrize("victim", [0, 1])
def test_up_ends_when_a_part_dies(up: Up, victim: int) -> None:
    """With code 1 and the dead part's last words; the others do not stay behind."""
    up.children[victim].kill()
    assert up.process.wait(T) == 1
    assert "was killed by signal 9" in up.log.read_text()
    assert not up.left()


def test_up_refuses_a_port_in_use(up: Up, tmp_path: Path) -> None:
    """It says which, and disturbs nobody."""
    done = run_module("kvpool.cli.main", "up", "--port", str(up.port), "--segment_size", "8MB",
                      "--base_dir", str(tmp_path / "second"), **up.environment)  # fmt: skip
    assert done.returncode == 2 and f"port: cannot listen on 127.0.0.1:{up.port}" in done.stderr, done.stderr
    use(up)
