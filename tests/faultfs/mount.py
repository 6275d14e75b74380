"""Mounts for tests: a FUSE filesystem with faults, small and read-only ones. All are gone when the test is."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
START_S = 20.0
COMMAND_S = 10.0
MNT_DETACH = 2


def why_no_mounts() -> str:
    """Return why nothing can be mounted here, "" when it can."""
    return "" if os.geteuid() == 0 else "only root can mount"


def why_no_fuse() -> str:
    """Return why no FUSE filesystem can run here, "" when one can."""
    if not Path("/dev/fuse").exists():
        return "this kernel has no /dev/fuse"
    try:
        import mfusepy  # noqa: F401
    except ImportError:
        return "mfusepy is not installed"
    except OSError:
        return "libfuse is not installed (Debian: libfuse3-3)"
    return why_no_mounts()


def _libc_call(name: str, *arguments: bytes | int | None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mount(kind: str, source: str, target: Path, options: str = "", *, flags: int = 0) -> None:
    """Mount a filesystem. Raises OSError."""
    data = options.encode() or None
    _libc_call("mount", source.encode(), str(target).encode(), kind.encode(), ctypes.c_ulong(flags), data)


def detach(target: Path) -> None:
    """Take a mount away, at once and whoever uses it; nothing happens when there is none."""
    with contextlib.suppress(OSError):
        _libc_call("umount2", str(target).encode(), MNT_DETACH)


class FaultyMount:
    """A directory, ``path``, that shows another one, ``below``, and the faults it is told to have.

    ``below`` is what the file server has: a test that writes there is the other client.
    """

    def __init__(self, directory: Path, *, cache_s: float = 0.0) -> None:
        self.below = directory / "below"
        self.path = directory / "mounted"
        self.log = directory / "faultfs.log"
        for path in (self.below, self.path):
            path.mkdir(parents=True)
        # A unix socket's path is short; the directory may be deep.
        self._control = Path(f"/tmp/kvpool-faultfs-{os.getpid()}-{id(self):x}.sock")
        self._cache_s = cache_s
        self._mount()

    def _mount(self) -> None:
        arguments = [str(self.below), str(self.path), str(self._control), str(self._cache_s)]
        with self.log.open("ab") as log:
            self._daemon = subprocess.Popen(
                [sys.executable, "-m", "tests.faultfs.daemon", *arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT,
            )  # fmt: skip
        try:
            self._wait(lambda: os.path.ismount(self.path), "the filesystem is mounted")
        except BaseException:  # an interrupt included: no mount may be left behind
            self.close()
            raise

    def _wait(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + START_S
        while not condition():
            if self._daemon.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"not so: {what}\n{self.log.read_text()}")
            time.sleep(0.01)

    # ---- faults --------------------------------------------------------------------------------------

    def fail(
        self, op: str, error: int, *, after: bool = False, times: int = -1, every: int = 1, path: str = "*"
    ) -> None:
        """Let operations answer an errno, though they were done if ``after``: from now on, or only some ``times``.

        ``op``: a name of FUSE's (``rename``, ``write``, ``flush``, ...), several with ``|``, or ``*``. Of those with a
        ``path`` that fits, it is ``every`` second, third, ... one.
        ``path`` is a pattern of paths from the mount's root.
        """
        self._add(ops=op.split("|"), error=error, after=after, left=times, every=every, path=path)

    def hang(self, op: str = "*", *, path: str = "*") -> None:
        """Let operations wait until `heal`, or until the caller is killed."""
        self._add(ops=op.split("|"), hang=True, path=path)

    def heal(self) -> None:
        """End all faults, and let go of what hangs."""
        self._command({"do": "clear"})

    @property
    def hanging(self) -> int:
        """How many operations hang now."""
        return int(self._command({"do": "look"})["hanging"])

    def calls(self, op: str) -> int:
        """Return how often an operation was asked for."""
        return int(self._command({"do": "look"})["calls"].get(op, 0))

    def _add(self, **rule: Any) -> None:
        self._command({"do": "add", "rule": rule})

    def _command(self, command: dict[str, Any]) -> Any:
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(COMMAND_S)
            control.connect(str(self._control))
            control.sendall(json.dumps(command).encode() + b"\n")
            with control.makefile("rb") as lines:
                return json.loads(lines.readline())

    # ---- the end -------------------------------------------------------------------------------------

    def kill(self) -> None:
        """Kill the filesystem: whoever waits for it gets ENOTCONN, and so does everybody from now on."""
        self._daemon.kill()
        self._daemon.wait(COMMAND_S)

    def restart(self) -> None:
        """Mount it again where it was, without faults."""
        self.close()
        self._mount()

    def close(self) -> None:
        """Unmount, whatever hangs. The kernel ends all operations when the process that serves them is gone."""
        detach(self.path)
        self.kill()
        self._control.unlink(missing_ok=True)


def fill_up(directory: Path) -> Path:
    """Fill the filesystem of a directory to the last page; return the file that has taken it all."""
    ballast = directory / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return ballast


@contextlib.contextmanager
def mounted(kind: str, directory: Path, options: str = "") -> Iterator[Path]:
    """Mount a filesystem for a while, for example a tmpfs with "size=4m"."""
    directory.mkdir(parents=True, exist_ok=True)
    mount(kind, "kvpool-test", directory, options)
    try:
        yield directory
    finally:
        detach(directory)


@pytest.fixture
def faulty_mounts(tmp_path: Path) -> Iterator[Callable[..., FaultyMount]]:
    """Return what makes a `FaultyMount`; skips where FUSE does not work."""
    if why := why_no_fuse():
        pytest.skip(why)
    with contextlib.ExitStack() as stack:
        numbers = itertools.count()

        def make(**options: Any) -> FaultyMount:
            made = FaultyMount(tmp_path / f"faulty{next(numbers)}", **options)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture
def faulty_mount(faulty_mounts: Callable[..., FaultyMount]) -> FaultyMount:
    """Return a mount that has no faults yet."""
    return faulty_mounts()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a filesystem of 4 MiB in memory."""
    if why := why_no_mounts():
        pytest.skip(why)
    with mounted("tmpfs", tmp_path / "small", "size=4m") as path:
        yield path
