"""An NFS client as a FUSE filesystem, through libnfs, for kernels without one.

``python -m tests.faultfs.nfs_client LIBRARY PORT MOUNT_PORT PATH MOUNTPOINT``.
Every operation is a request to the server; nothing is remembered in between.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
import threading
from ctypes import POINTER, byref, c_char_p, c_int, c_uint32, c_uint64, c_void_p
from typing import Any

import mfusepy

_STAT = (
    "dev", "ino", "mode", "nlink", "uid", "gid", "rdev", "size", "blksize", "blocks", "atime", "mtime", "ctime",
    "atime_nsec", "mtime_nsec", "ctime_nsec", "used",
)  # fmt: skip


class _Stat(ctypes.Structure):
    _fields_ = [(name, c_uint64) for name in _STAT]


class _Url(ctypes.Structure):
    _fields_ = [("server", c_char_p), ("path", c_char_p), ("file", c_char_p)]


class _Entry(ctypes.Structure):
    _fields_ = [("next", c_void_p), ("name", c_char_p), ("inode", c_uint64), ("type", c_uint32)]


class Client(mfusepy.Operations):
    """One connection; requests follow one another."""

    use_ns = True

    def __init__(self, library: str, port: int, mount_port: int, path: str) -> None:
        self._nfs = ctypes.CDLL(library)
        self._nfs.nfs_init_context.restype = c_void_p
        self._nfs.nfs_parse_url_dir.restype = POINTER(_Url)
        self._nfs.nfs_readdir.restype = POINTER(_Entry)
        self._nfs.nfs_get_error.restype = c_char_p
        self._context = c_void_p(self._nfs.nfs_init_context())
        self._lock = threading.Lock()
        self._handles: dict[int, c_void_p] = {}
        self._next = 0
        where = f"nfs://127.0.0.1{path}?version=3&nfsport={port}&mountport={mount_port}&dircache=0&readahead=0&autoreconnect=-1"
        url = self._nfs.nfs_parse_url_dir(self._context, where.encode())
        self._do("mount", url.contents.server, url.contents.path)

    def _do(self, what: str, *arguments: Any) -> int:
        with self._lock:
            result = int(getattr(self._nfs, f"nfs_{what}")(self._context, *arguments))
        if result < 0:
            number = errno.ESTALE if result == -errno.EFAULT else -result  # libnfs calls it so
            raise OSError(number, os.strerror(number))
        return result

    def _opened(self, what: str, path: str, *arguments: Any) -> int:
        handle = c_void_p()
        self._do(what, path.encode(), *arguments, byref(handle))
        with self._lock:
            self._next += 1
            self._handles[self._next] = handle
        return self._next

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        found = _Stat()
        if fh is None:
            self._do("lstat64", path.encode(), byref(found))
        else:
            self._do("fstat64", self._handles[fh], byref(found))
        names = ("mode", "nlink", "uid", "gid", "size", "blocks", "ino")
        times = {
            f"st_{kind}time": getattr(found, f"{kind}time") * 10**9 + getattr(found, f"{kind}time_nsec")
            for kind in "amc"
        }
        return {f"st_{name}": getattr(found, name) for name in names} | times

    def readdir(self, path: str, fh: int) -> list[tuple[str, dict[str, int], int]]:
        directory = c_void_p()
        self._do("opendir", path.encode(), byref(directory))
        found = []
        with self._lock:
            while entry := self._nfs.nfs_readdir(self._context, directory):
                kind = stat.S_IFDIR if entry.contents.type == 2 else stat.S_IFREG
                found.append((os.fsdecode(entry.contents.name), {"st_mode": kind}, 0))
            self._nfs.nfs_closedir(self._context, directory)
        return found

    def open(self, path: str, flags: int) -> int:
        return self._opened("open", path, c_int(flags & (os.O_ACCMODE | os.O_TRUNC)))

    def create(self, path: str, mode: int, flags: int) -> int:
        return self._opened(
            "open2", path, c_int((flags & (os.O_ACCMODE | os.O_EXCL)) | os.O_CREAT), c_int(stat.S_IMODE(mode))
        )

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        buffer = ctypes.create_string_buffer(size)
        got = self._do("pread", self._handles[fh], c_uint64(offset), c_uint64(size), buffer)
        return buffer.raw[:got]

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        return self._do("pwrite", self._handles[fh], c_uint64(offset), c_uint64(len(data)), data)

    def truncate(self, path: str, length: int, fh: int | None = None) -> None:
        self._do("truncate", path.encode(), c_uint64(length))

    def fsync(self, path: str, datasync: int, fh: int) -> None:
        self._do("fsync", self._handles[fh])

    def release(self, path: str, fh: int) -> None:
        self._do("close", self._handles.pop(fh))

    def statfs(self, path: str) -> dict[str, int]:
        found = (ctypes.c_ulong * 32)()  # the C library's statvfs is shorter
        self._do("statvfs", path.encode(), byref(found))
        names = ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail")
        return {f"f_{name}": value for name, value in zip(names, found, strict=False)}

    def rename(self, old: str, new: str) -> None:
        self._do("rename", old.encode(), new.encode())

    def unlink(self, path: str) -> None:
        self._do("unlink", path.encode())

    def mkdir(self, path: str, mode: int) -> None:
        self._do("mkdir2", path.encode(), c_int(stat.S_IMODE(mode)))

    def rmdir(self, path: str) -> None:
        self._do("rmdir", path.encode())

    def link(self, target: str, source: str) -> None:
        self._do("link", source.encode(), target.encode())


def main(library: str, port: str, mount_port: str, path: str, mountpoint: str) -> None:
    """Serve until unmounted or killed."""
    mfusepy.FUSE(
        Client(library, int(port), int(mount_port), path), mountpoint, foreground=True, fsname="kvpool-nfs",
        entry_timeout=0, attr_timeout=0, hard_remove=True, max_threads=64,
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
