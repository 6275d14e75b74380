"""Shared memory: only a sealed memfd of the announced size is mapped."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from kvpool.errors import InvalidArgumentError, UnavailableError
from kvpool.transport import shm
from kvpool.transport.connection import BlockingIO
from kvpool.transport.frames import FrameParser
from kvpool.transport.shm import (
    AttachedSegment,
    check_sealed,
    close_fds,
    create_memfd,
    fd_control,
    receive_with_fds,
    seal,
)
from kvpool.transport.sockets import TimedSocket


def test_sealed_memfd_cannot_change_its_size() -> None:
    """Neither end can pull the memory from under the other."""
    fd = create_memfd("test", 8192)
    try:
        seal(fd)
        check_sealed(fd, 8192)
        for size in (0, 4096, 16384):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
    finally:
        os.close(fd)


def test_unsealed_wrong_size_and_other_files_are_refused(tmp_path: Path) -> None:
    """The field is named whatever is wrong with the descriptor."""
    memfd = create_memfd("test", 8192)
    other = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    try:
        for fd, size in ((memfd, 8192), (other, 0)):
            with pytest.raises(InvalidArgumentError, match="segment_fd"):
                check_sealed(fd, size)
        seal(memfd)
        with pytest.raises(InvalidArgumentError, match="announced 4096 bytes"):
            check_sealed(memfd, 4096)
    finally:
        close_fds([memfd, other])


def test_descriptors_travel_with_bytes() -> None:
    """A received descriptor is the same memory, and is closed in programs that are started."""
    fd = create_memfd("test", 4096)
    left, right = socket.socketpair()
    received: list[int] = []
    with left, right:
        os.pwrite(fd, b"hello", 0)
        left.sendmsg([b"x"], fd_control([fd]))
        assert receive_with_fds(right, memoryview(bytearray(1)), received) == 1
    assert len(received) == 1
    assert os.pread(received[0], 5, 0) == b"hello"
    assert not os.get_inheritable(received[0])
    close_fds([fd, *received])


def test_descriptors_wait_for_a_peer_no_longer_than_bytes_do() -> None:
    """A thread that sends them to somebody who takes nothing gets its turn back."""
    left, right = socket.socketpair()
    fd = create_memfd("test", 4096)
    with left, right:
        io = BlockingIO(TimedSocket(left), FrameParser(), 0)
        io.send_all([b"abc", b"", b"def"], 5.0, [fd])
        received: list[int] = []
        assert receive_with_fds(right, memoryview(bytearray(1)), received) == 1
        assert right.recv(8) == b"bcdef"
        close_fds(received)
        left.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while left.send(bytes(1 << 16)):
                pass
        left.setblocking(True)
        with pytest.raises(UnavailableError, match=r"took no bytes for 0\.05 s"):
            io.send_all([b"abc"], 0.05, [fd])
        assert io.broken is not None
    os.close(fd)


class OldLinux:
    """Knows none of the advices that bring pages in."""

    def madvise(self, address: int, size: int, advice: int) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1


class Shared:
    """Memory of which somebody else writes each byte right after it was read."""

    def __init__(self, memory: Any) -> None:
        self._memory = memory
        self.read: list[int] = []

    def __getitem__(self, offset: int) -> int:
        value: int = self._memory[offset]
        self.read.append(offset)
        self._memory[offset] = value + 1
        return value

    def __setitem__(self, offset: int, value: int) -> None:
        self._memory[offset] = value


def test_who_is_attached_writes_nothing_as_it_brings_pages_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel does not do it, each page is read: others have written to it before one could write it back."""
    pages = 3
    fd = create_memfd("test", pages * mmap.PAGESIZE)
    seal(fd)
    segment = AttachedSegment.from_fd(fd, pages * mmap.PAGESIZE)
    with contextlib.closing(segment), monkeypatch.context() as patch:
        patch.setattr(shm, "_libc", OldLinux())
        shared = Shared(segment._map)
        patch.setattr(segment, "_map", shared)
        segment.prefault()
        assert shared.read == [number * mmap.PAGESIZE for number in range(pages)]
        assert [segment.view[offset] for offset in shared.read] == [1] * pages
