"""A FUSE filesystem that passes through to a directory, and lies, fails or hangs when it is told to.

``python -m tests.faultfs.daemon DIRECTORY MOUNTPOINT CONTROL_SOCKET CACHE_SECONDS``. Commands arrive as lines of JSON
on the control socket, each answered by one; `tests/faultfs/mount.py` is the other end.
"""

# Each operation is one system call on a string.
# ruff: noqa: PTH101, PTH102, PTH104, PTH106, PTH108, PTH115, PTH208, PTH211

from __future__ import annotations

import errno
import fnmatch
import functools
import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mfusepy

THREADS_MAX = 64  # more than any test hangs at once: whoever is not asked to hang still gets an answer
UTIME_NOW = (1 << 30) - 1
EXITING = 0x4
"""Of a thread's flags: PF_EXITING."""


def ends(thread: int) -> bool:
    """Return whether a thread, by its number, is about to be no more."""
    try:
        stat = Path(f"/proc/{thread}/stat").read_text()
    except OSError:
        return False
    return bool(int(stat.rpartition(") ")[2].split()[6]) & EXITING)


@dataclass
class Rule:
    """What is wrong with some operations. ``after``: the operation is done before the error is given."""

    ops: list[str]
    error: int = 0
    after: bool = False
    left: int = -1
    every: int = 1
    path: str = "*"
    hang: bool = False

    seen: int = 0

    def strikes(self, op: str, path: str | None) -> bool:
        """Count an operation that this rule is about; whether it is its turn."""
        if self.left == 0 or not {op, "*"} & set(self.ops) or not fnmatch.fnmatch(path or "", self.path):
            return False
        self.seen += 1
        if self.seen % self.every:
            return False
        self.left -= 1
        return True


class Faults:
    """The rules in force, shared by the filesystem's threads and the control socket."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.rules: list[Rule] = []
        self.calls: dict[str, int] = {}
        self.hanging = 0
        self.free = threading.Event()

    def command(self, command: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            if command["do"] == "add":
                self.rules.append(Rule(**command["rule"]))
                self.free.clear()
            elif command["do"] == "clear":
                self.rules.clear()
                self.free.set()
            return {"hanging": self.hanging, "calls": dict(self.calls)}

    def take(self, op: str, path: str | None) -> Rule | None:
        with self.lock:
            self.calls[op] = self.calls.get(op, 0) + 1
            return next((rule for rule in self.rules if rule.strikes(op, path)), None)

    def hang(self) -> None:
        """Wait for the release; like a hard NFS mount, let go of a caller that is being killed, or ends.

        A file that a process has open as it ends is closed for it: the kernel waits for that without interruption.
        """
        free = self.free
        _, _, caller = mfusepy.fuse_get_context()
        with self.lock:
            self.hanging += 1
        try:
            while not free.wait(0.02):
                if mfusepy._libfuse.fuse_interrupted() or ends(caller):
                    raise OSError(errno.EINTR, "interrupted")
        finally:
            with self.lock:
                self.hanging -= 1

    def apply(self, op: str, path: str | None, act: Callable[[], Any]) -> Any:
        rule = self.take(op, path)
        if rule is None:
            return act()
        if rule.hang:
            self.hang()
            return act()
        if rule.after:
            act()
        raise OSError(rule.error, os.strerror(rule.error))


class Passthrough(mfusepy.Operations):
    """Every operation on the directory below, with the faults applied."""

    use_ns = True

    def __init__(self, directory: str, faults: Faults) -> None:
        self.directory = directory
        self.faults = faults
        for op in (
            "getattr", "readdir", "open", "create", "read", "write", "truncate", "flush", "release", "fsync", "rename",
            "unlink", "mkdir", "rmdir", "link", "symlink", "readlink", "statfs", "utimens", "chmod", "chown",
        ):  # fmt: skip
            setattr(self, op, self._faulty(op, getattr(self, f"_{op}")))

    def _faulty(self, op: str, act: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(act)  # its signature is looked at
        def call(path: str, *arguments: Any) -> Any:
            return self.faults.apply(op, path, lambda: act(path, *arguments))

        return call

    def _real(self, path: str) -> str:
        return self.directory + path

    def _getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        found = os.lstat(self._real(path)) if fh is None else os.fstat(fh)
        names = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks", "st_ino", "st_dev")
        times = {f"st_{kind}time": getattr(found, f"st_{kind}time_ns") for kind in "amc"}
        return {name: getattr(found, name) for name in names} | times

    def _readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *os.listdir(self._real(path))]

    def _open(self, path: str, flags: int) -> int:
        # The kernel has checked what O_DIRECT asks of the caller; the copy made here is not aligned.
        return os.open(self._real(path), flags & ~(os.O_DIRECT | os.O_NOFOLLOW))

    def _create(self, path: str, mode: int, flags: int) -> int:
        return os.open(self._real(path), (flags & ~os.O_DIRECT) | os.O_CREAT, mode)

    def _read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return os.pread(fh, size, offset)

    def _write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        return os.pwrite(fh, data, offset)

    def _truncate(self, path: str, length: int, fh: int | None = None) -> None:
        os.truncate(self._real(path) if fh is None else fh, length)

    def _flush(self, path: str, fh: int) -> None:
        pass

    def _release(self, path: str, fh: int) -> None:
        os.close(fh)

    def _fsync(self, path: str, datasync: int, fh: int) -> None:
        os.fsync(fh)

    def _rename(self, old: str, new: str) -> None:
        os.rename(self._real(old), self._real(new))

    def _unlink(self, path: str) -> None:
        os.unlink(self._real(path))

    def _mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self._real(path), mode)

    def _rmdir(self, path: str) -> None:
        os.rmdir(self._real(path))

    def _link(self, target: str, source: str) -> None:
        os.link(self._real(source), self._real(target))

    def _symlink(self, target: str, source: str) -> None:
        os.symlink(source, self._real(target))

    def _readlink(self, path: str) -> str:
        return os.readlink(self._real(path))

    def _statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(self._real(path))
        names = ("bavail", "bfree", "blocks", "bsize", "favail", "ffree", "files", "frsize", "namemax")
        return {f"f_{name}": getattr(found, f"f_{name}") for name in names}

    def _utimens(self, path: str, times: tuple[int, int] | None = None) -> None:
        if times is None or UTIME_NOW in times:
            os.utime(self._real(path))
        else:
            os.utime(self._real(path), ns=times)

    def _chmod(self, path: str, mode: int) -> None:
        os.chmod(self._real(path), mode)

    def _chown(self, path: str, uid: int, gid: int) -> None:
        os.chown(self._real(path), uid, gid)


def serve(control: socket.socket, faults: Faults) -> None:
    """Answer commands, one connection at a time, for ever."""
    while True:
        connection, _ = control.accept()
        with connection, connection.makefile("rwb", buffering=0) as lines:
            for line in lines:
                lines.write(json.dumps(faults.command(json.loads(line))).encode() + b"\n")


def main(directory: str, mountpoint: str, control_path: str, cache_s: str) -> None:
    """Serve until unmounted or killed."""
    faults = Faults()
    control = socket.socket(socket.AF_UNIX)
    control.bind(control_path)
    control.listen()
    threading.Thread(target=serve, args=(control, faults), daemon=True).start()
    mfusepy.FUSE(
        Passthrough(str(Path(directory).resolve()), faults), mountpoint, foreground=True, max_threads=THREADS_MAX,
        fsname="kvpool-faultfs", entry_timeout=cache_s, attr_timeout=cache_s, negative_timeout=cache_s,
        hard_remove=True,  # else removing an open file is a rename of it
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
