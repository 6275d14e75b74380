"""Whole files in a few system calls: past the page cache where that is possible, without the GIL.

With O_DIRECT, memory, offsets and lengths must be multiples of the filesystem's unit. Extents of a segment are
multiples of 512 bytes, which most local disks take as they are: then there is no copy. What is aligned to less
than the unit goes through an aligned buffer of the thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[tuple[int], np.dtype[np.uint8]]

DIRECT_UNITS = (512, 4096)
"""What filesystems ask of O_DIRECT, the better first."""

_BOUNCE_BYTES = 1 << 20
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
# A fifo or a link that somebody put at a block's place neither blocks the open nor leads elsewhere.
_OLD = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK

# FS_IOC_GETFLAGS and FS_IOC_SETFLAGS, and what chattr calls T.
_LONG = struct.Struct("@l")
_GET_FLAGS = 2 << 30 | _LONG.size << 16 | ord("f") << 8 | 1
_SET_FLAGS = 1 << 30 | _LONG.size << 16 | ord("f") << 8 | 2
_TOP_DIRECTORY = 0x20000

_READS_END = {0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x2FC12FC1}  # ext4, XFS, Btrfs, F2FS, ZFS; see statfs(2)

_local = threading.local()


class NotAFileError(Exception):
    """Something else than a regular file lies at the path."""


class LengthError(Exception):
    """A file has ``actual`` bytes, not as many as were asked for."""

    def __init__(self, actual: int) -> None:
        super().__init__(f"{actual} bytes")
        self.actual = actual


def direct_unit(path: str) -> int:
    """Return the bytes that O_DIRECT wants in multiples, found by reading a file; 0 where it does not work."""
    buffer = memoryview(mmap.mmap(-1, 3 * max(DIRECT_UNITS)))
    for unit in DIRECT_UNITS:
        try:
            fd = os.open(path, _OLD | os.O_DIRECT)
        except OSError:
            return 0
        try:
            os.preadv(fd, [buffer[unit : 2 * unit]], 0)
            return unit
        except OSError:
            continue
        finally:
            os.close(fd)
    return 0


def reads_end(directory: str) -> bool:
    """Return whether a read by O_DIRECT is over when the process that made it is no more, however that came.

    Local filesystems wait for the disk even if the process is killed. NFS and SMB let it go; what
    the server answers later is still written to the memory that was to be read into, which others may share.
    """
    status = ctypes.create_string_buffer(256)
    if ctypes.CDLL(None).statfs(os.fsencode(directory), status):
        return False
    return ctypes.c_long.from_buffer(status).value & 0xFFFFFFFF in _READS_END


def create(path: str, data: memoryview, *, unit: int, sync: bool) -> None:
    """Write a new file, and await the disk if ``sync``. ``unit``: O_DIRECT's, 0 for the page cache. Raises OSError."""
    fd = _open(path, _NEW, unit)
    try:
        if unit and not _aligned(data, unit):
            _write_bounced(fd, data, unit)
        else:
            _write(fd, data, 0)
        if sync:
            os.fdatasync(fd)
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(fd)
        raise
    os.close(fd)  # network filesystems say only here that there was no room


def fill(path: str, target: memoryview, unit: int) -> None:
    """Read a whole file of exactly the target's length. Raises OSError, NotAFileError, LengthError."""
    fd = _open(path, _OLD, unit)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise NotAFileError
        if status.st_size != len(target):
            raise LengthError(status.st_size)
        bounced = unit and not _aligned(target, unit)
        done = _read_bounced(fd, target, unit) if bounced else _read(fd, target, 0, len(target))
        if done != len(target):
            raise LengthError(done)
    finally:
        _close(fd)


def fill_all(paths: Sequence[str], targets: Sequence[memoryview], unit: int, until: float) -> list[bool]:
    """Read the first of several whole files; returns whether each is right, which ``fill`` says why not.

    All are opened, then read: what is done at a stretch finds its code in the cache, which bytes have left nothing of
    otherwise. There are fewer answers, at least one, when it is ``until``, of the monotonic clock.
    """
    fds: list[int] = []
    done: list[bool] = []
    flags = _OLD | (os.O_DIRECT if unit else 0)
    opened_by = (time.monotonic() + until) / 2  # where opening takes long, what was opened is to be read, too
    try:
        for path, target in zip(paths, targets, strict=True):
            fds.append(_open_whole(path, flags, len(target)))
            if time.monotonic() >= opened_by:
                break
        for fd, target in zip(fds, targets, strict=False):
            try:
                done.append(fd >= 0 and os.preadv(fd, [target], 0) == len(target))
            except OSError:
                done.append(False)
            if time.monotonic() >= until:
                break
    finally:
        for fd in fds:
            if fd >= 0:
                _close(fd)
    return done


def _open_whole(path: str, flags: int, size: int) -> int:
    """Open a regular file of exactly so many bytes; -1 when that fails."""
    try:
        fd = os.open(path, flags)
    except OSError:
        return -1
    try:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and status.st_size == size:
            return fd
    except OSError:
        pass
    _close(fd)
    return -1


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):  # nothing is lost
        os.close(fd)


def read_small(path: str, most: int) -> tuple[bytes, os.stat_result]:
    """Return at most so many bytes of a file, and its status. Raises OSError, also for what is no regular file.

    By opening, as only that asks a network filesystem's server what is there now.
    """
    fd = os.open(path, _OLD)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        return os.read(fd, most), status
    finally:
        os.close(fd)


def spread(directory: str) -> None:
    """Have ext4 put each directory below this one into a part of the disk of its own, as it does below its root.

    Files go where their directory is. Close together, every new one steps over the inodes of all that were deleted
    within the last half minute, which takes many times as long as all else about it. Means nothing elsewhere.
    """
    with contextlib.suppress(OSError):  # another filesystem, or it is not ours
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            flags = _LONG.unpack(fcntl.ioctl(fd, _GET_FLAGS, bytes(_LONG.size)))[0]
            fcntl.ioctl(fd, _SET_FLAGS, _LONG.pack(flags | _TOP_DIRECTORY))
        finally:
            os.close(fd)


def _open(path: str, flags: int, unit: int) -> int:
    if unit:
        try:
            return os.open(path, flags | os.O_DIRECT, 0o666)
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
            flags &= ~os.O_EXCL  # some filesystems make the file before they refuse the flag
    return os.open(path, flags, 0o666)


def _write(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(fd, data[done:] if done else data, offset + done)
        except OSError as exc:
            if not _buffered_from_now_on(fd, exc):
                raise


def _read(fd: int, target: memoryview, offset: int, enough: int) -> int:
    """Read ``enough`` bytes or more into a target that may be longer; fewer only at the file's end."""
    done = 0
    while done < enough:
        try:
            got = os.preadv(fd, [target[done:] if done else target], offset + done)
        except OSError as exc:
            if not _buffered_from_now_on(fd, exc):
                raise
            continue
        if not got:
            break
        done += got
    return done


def _buffered_from_now_on(fd: int, exc: OSError) -> bool:
    """Take O_DIRECT off a file when that may have been the trouble: after a short write, on an odd filesystem."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if exc.errno != errno.EINVAL or not flags & os.O_DIRECT:
        return False
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    return True


def _write_bounced(fd: int, data: memoryview, unit: int) -> None:
    bounce, array = _bounce()
    source = _array(data)
    for at in range(0, len(data), _BOUNCE_BYTES):
        used = min(_BOUNCE_BYTES, len(data) - at)
        whole = -(-used // unit) * unit
        array[:used] = source[at : at + used]  # gives up the GIL, unlike slices of memoryviews
        array[used:whole] = 0
        _write(fd, bounce[:whole], at)
    if len(data) % unit:
        os.ftruncate(fd, len(data))


def _read_bounced(fd: int, target: memoryview, unit: int) -> int:
    bounce, array = _bounce()
    sink = _array(target)
    for at in range(0, len(target), _BOUNCE_BYTES):
        wanted = min(_BOUNCE_BYTES, len(target) - at)
        got = min(wanted, _read(fd, bounce[: -(-wanted // unit) * unit], at, wanted))
        sink[at : at + got] = array[:got]
        if got < wanted:
            return at + got
    return len(target)


def _aligned(view: memoryview, unit: int) -> bool:
    if len(view) % unit:
        return False
    if unit == min(DIRECT_UNITS):
        return True  # as are all extents; asking would take as long as opening the file, and the kernel says it, too
    address: int = _array(view).__array_interface__["data"][0]
    return not address % unit


def _array(view: memoryview) -> Array:
    import numpy as np  # takes longer than all else that a process for files needs, which mostly does not need it

    return np.frombuffer(view, np.uint8)


def _bounce() -> tuple[memoryview, Array]:
    try:
        view: memoryview = _local.bounce
    except AttributeError:
        view = _local.bounce = memoryview(mmap.mmap(-1, _BOUNCE_BYTES))
    return view, _array(view)
