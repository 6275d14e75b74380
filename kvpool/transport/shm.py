"""Shared memory between processes: a sealed memfd, handed over a unix socket.

An unsealed memfd would let whoever receives it kill the owner by truncating it.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import resource
import socket
import stat
from collections.abc import Callable, Sequence

from kvpool.errors import FrameError, InvalidArgumentError
from kvpool.model import format_size

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""Size fixed for ever; writing stays allowed."""

FDS_MAX = 8
"""File descriptors one frame may carry."""

_FD_BYTES = array.array("i").itemsize

_libc = ctypes.CDLL(None, use_errno=True)  # calls through it give up the GIL
for _name in ("madvise", "mlock", "munlock"):
    getattr(_libc, _name).restype = ctypes.c_int
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mlock.argtypes = _libc.munlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
_POPULATE_BYTES = 64 << 20

Progress = Callable[[int, int], None]


def create_memfd(name: str, size_bytes: int) -> int:
    """Return a close-on-exec file descriptor of anonymous memory of this size, not sealed yet."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
    except OSError:
        os.close(fd)
        raise
    return fd


def seal(fd: int) -> None:
    """Fix the size of a memfd for ever."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)


def check_sealed(fd: int, size_bytes: int) -> None:
    """Raise InvalidArgumentError unless ``fd`` is a sealed memfd of exactly this size."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        status = os.fstat(fd)
    except OSError as exc:
        raise InvalidArgumentError("segment_fd", "must be a memfd") from exc
    if not stat.S_ISREG(status.st_mode) or seals & SEALS != SEALS:
        raise InvalidArgumentError("segment_fd", "must be sealed against shrinking, growing and further seals")
    if status.st_size != size_bytes:
        raise InvalidArgumentError("segment_fd", f"must have the announced {size_bytes} bytes, not {status.st_size}")


def fd_control(fds: Sequence[int]) -> list[tuple[int, int, bytes]]:
    """Return what ``sendmsg`` takes to send these file descriptors along."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []


def receive_with_fds(sock: socket.socket, view: memoryview, fds: list[int], flags: int = 0) -> int:
    """Receive bytes into ``view`` and append the file descriptors that came along, close-on-exec.

    Raises FrameError for more than FDS_MAX of them, or than this process may open; none is left open then.
    """
    space = socket.CMSG_SPACE(FDS_MAX * _FD_BYTES)
    done, control, message_flags, _ = sock.recvmsg_into([view], space, flags | socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received = array.array("i")
            received.frombytes(data[: len(data) - len(data) % _FD_BYTES])
            fds.extend(received)
    if message_flags & socket.MSG_CTRUNC or len(fds) > FDS_MAX:
        close_fds(fds)
        raise FrameError(f"more than {FDS_MAX} file descriptors in a frame, or than this process may open")
    return done


def close_fds(fds: list[int]) -> None:
    """Close and forget file descriptors."""
    while fds:
        with contextlib.suppress(OSError):
            os.close(fds.pop())


class MappedMemory:
    """A mapped segment: ``fd``, ``size``, ``view`` (writable), ``locked``, ``lock_error``."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self.fd = fd
        self.size = size_bytes
        self.locked = False
        self.lock_error = ""
        self._map = mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.view = memoryview(self._map)

    def populate(self, progress: Progress | None = None, *, advice: int = _MADV_POPULATE_WRITE) -> None:
        """Bring every page in now, so that no copy meets a page fault later; gives up the GIL meanwhile.

        Raises InvalidArgumentError("segment_size") when the memory is not there, ValueError when it is closed.
        """
        for start in range(0, self.size, _POPULATE_BYTES):
            if self.fd < 0:
                raise ValueError("the segment is closed")
            length = min(_POPULATE_BYTES, self.size - start)
            if _libc.madvise(self._address + start, length, advice):
                code = ctypes.get_errno()
                if code != errno.EINVAL:
                    raise InvalidArgumentError("segment_size", f"{format_size(self.size)}: {os.strerror(code)}")
                self._touch(start, length)  # Linux before 5.14
            if progress is not None:
                progress(start + length, self.size)

    def lock(self) -> None:
        """Lock all of it in memory, or nothing: then ``lock_error`` says why."""
        if _libc.mlock(self._address, self.size) == 0:
            self.locked, self.lock_error = True, ""
            return
        code = ctypes.get_errno()
        _libc.munlock(self._address, self.size)
        soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        limit = "no limit" if soft == resource.RLIM_INFINITY else format_size(soft)
        self.lock_error = f"mlock of {format_size(self.size)}: {os.strerror(code)} (RLIMIT_MEMLOCK: {limit})"

    def close(self) -> None:
        """Unmap and close; a view that is still in use keeps the mapping, not the file descriptor."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        with contextlib.suppress(BufferError):  # then it is unmapped with its last view
            self.view.release()
            self._map.close()

    def _touch(self, start: int, length: int) -> None:
        for offset in range(start, start + length, mmap.PAGESIZE):
            self._map[offset] = self._map[offset]


class AttachedSegment(MappedMemory):
    """A node's memory, seen from a client."""

    @classmethod
    def from_fd(cls, fd: int, size_bytes: int) -> AttachedSegment:
        """Map a received file descriptor, which is ours from now on, also when this raises.

        Raises InvalidArgumentError("segment_fd") unless it is sealed and has exactly this size.
        """
        try:
            check_sealed(fd, size_bytes)
            return cls(fd, size_bytes)
        except (OSError, InvalidArgumentError) as exc:
            os.close(fd)
            if isinstance(exc, OSError):
                raise InvalidArgumentError("segment_fd", f"cannot map {size_bytes} bytes: {exc.strerror}") from exc
            raise

    def prefault(self) -> None:
        """Enter all pages into this process's page table; reading only, so it never adds memory."""
        self.populate(advice=_MADV_POPULATE_READ)

    def _touch(self, start: int, length: int) -> None:
        for offset in range(start, start + length, mmap.PAGESIZE):
            _ = self._map[offset]  # others write here: what was read may not be written back
