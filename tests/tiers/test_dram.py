"""The DRAM tier: segment creation, attachment, slot headers."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.errors import InvalidArgumentError
from kvpool.tiers import dram
from kvpool.tiers.dram import (
    HEADER_FIXED_BYTES,
    AttachedSegment,
    Segment,
    SlotHeader,
    header_area,
    pack_header,
    parse_header,
)
from kvpool.tiers.memory import allowed_bytes
from kvpool.transport import shm

MIB = 1 << 20


def test_segment_is_populated_sealed_and_shared() -> None:
    """All pages are there at once, progress is told, and an attached view is the same memory."""
    steps: list[tuple[int, int]] = []
    segment = Segment.create(3 * MIB, lock=False, progress=lambda done, total: steps.append((done, total)))
    assert os.fstat(segment.fd).st_blocks * 512 == segment.size == 3 * MIB
    assert steps[-1] == (3 * MIB, 3 * MIB)
    with pytest.raises(PermissionError):
        os.ftruncate(segment.fd, 0)
    attached = AttachedSegment.from_fd(os.dup(segment.fd), segment.size)
    attached.prefault()
    segment.view[MIB : MIB + 5] = b"hello"
    assert bytes(attached.view[MIB : MIB + 5]) == b"hello"
    attached.close()
    attached.close()
    segment.close()
    assert segment.fd == -1


def test_close_with_views_in_use_keeps_their_memory() -> None:
    """A copy that is running when the segment closes reads memory, not a hole."""
    segment = Segment.create(MIB, lock=False)
    piece = segment.view[:16]
    segment.close()
    assert bytes(piece) == bytes(16)


def test_locking_is_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locked, or a reason; never a failure."""
    segment = Segment.create(MIB)
    assert segment.locked is (segment.lock_error == "")
    monkeypatch.setattr(shm._libc, "mlock", lambda address, size: -1)
    segment.locked = False
    segment.lock()
    assert not segment.locked
    assert "RLIMIT_MEMLOCK" in segment.lock_error
    segment.close()


@pytest.mark.parametrize("size", [0, -1, 2 * MIB, 1 << 62])
def test_size_outside_the_limits_is_named(size: int) -> None:
    """The error names the field and what is allowed."""
    with pytest.raises(InvalidArgumentError, match=r"segment_size: must be from 1 to 1048576 bytes"):
        Segment.create(size, limit_bytes=MIB)


def test_a_tail_lies_on_pages_of_its_own() -> None:
    """It comes on top of what was asked for, whose limit leaves room for it."""
    segment = Segment.create(MIB + 1, tail_bytes=8192, lock=False, limit_bytes=2 * MIB)
    assert segment.size == MIB + 4096 + 8192
    segment.close()
    with pytest.raises(InvalidArgumentError, match="must be from 1 to "):
        Segment.create(MIB, tail_bytes=8192, limit_bytes=MIB)


def test_failing_progress_leaves_no_descriptor() -> None:
    """Whatever is raised while the segment is made, its memory is given back."""
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with pytest.raises(KeyboardInterrupt):
        Segment.create(MIB, lock=False, progress=interrupt)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def interrupt(done: int, total: int) -> None:
    raise KeyboardInterrupt


def test_populate_falls_back_to_touching_pages() -> None:
    """An older kernel refuses the advice; every page is there all the same."""
    segment = Segment.create(MIB, lock=False)
    segment.view[4096] = 7
    segment.populate(advice=9999)
    assert segment.view[4096] == 7
    segment.close()


def test_attach_refuses_what_is_not_sealed(tmp_path: Path) -> None:
    """The descriptor is closed then."""
    fd = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    with pytest.raises(InvalidArgumentError, match="segment_fd"):
        AttachedSegment.from_fd(fd, 4096)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def fake_host(tmp_path: Path, line: str, files: dict[str, str]) -> tuple[int, str]:
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9999999 kB\nMemAvailable: 1000 kB\n")
    (proc / "self" / "cgroup").write_text(line)
    for name, text in files.items():
        (cgroup / name).parent.mkdir(parents=True, exist_ok=True)
        (cgroup / name).write_text(text)
    return allowed_bytes(proc, cgroup)


def test_cgroup_v2_limit_of_an_ancestor_counts(tmp_path: Path) -> None:
    """The tightest group decides; page cache is given up first and does not count."""
    files = {
        "a/b/memory.max": "max\n",
        "a/b/memory.current": "500\n",
        "a/memory.max": "600000\n",
        "a/memory.current": "500000\n",
        "a/memory.stat": "anon 1\ninactive_file 100000\nactive_file 50000\n",
    }
    allowed, why = fake_host(tmp_path, "0::/a/b\n", files)
    assert allowed == 250_000
    assert "cgroup" in why


def test_cgroup_v1_limit_counts(tmp_path: Path) -> None:
    """The memory controller of version 1, with its own file names."""
    files = {"memory/x/memory.limit_in_bytes": "300000\n", "memory/x/memory.usage_in_bytes": "100000\n"}
    assert fake_host(tmp_path, "4:cpu,memory:/x\n1:cpu:/y\n", files)[0] == 200_000


def test_without_limits_the_host_decides(tmp_path: Path) -> None:
    """No cgroup file, or none with a limit: what is available."""
    assert fake_host(tmp_path, "0::/\n", {}) == (1_024_000, "memory available on this host")


def sample(layers: int = 3) -> SlotHeader:
    return SlotHeader(b"d" * 16, b"k" * 16, 2, 60 * layers, layers, 5, bytes(range(8)) * layers)


def test_header_size_is_as_documented() -> None:
    """96 bytes and 8 per layer, rounded up to 512."""
    assert dram._FIXED.size + dram._OWN_CHECKSUM.size == HEADER_FIXED_BYTES
    assert [header_area(n) for n in (1, 52, 53, 4096)] == [512, 512, 1024, 33280]


@given(
    st.integers(1, 200),
    st.integers(0, 255),
    st.integers(1, 50),
    st.integers(0, (1 << 64) - 1),
    st.binary(min_size=16, max_size=16),
)
def test_header_comes_back_as_written(layers: int, shard: int, layer_bytes: int, generation: int, key: bytes) -> None:
    """Every field survives; the payload and what lies before the header area are not touched."""
    header = SlotHeader(b"n" * 16, key, shard, layer_bytes * layers, layers, generation, b"c" * 8 * layers)
    area = header_area(layers)
    view = memoryview(bytearray(b"\xee" * (512 + area + header.shard_bytes)))
    pack_header(view, 512 + area, header)
    assert parse_header(view, 512 + area) == header
    assert set(view[:512]) == {0xEE}
    assert set(view[512 + area :]) == {0xEE}


@given(st.integers(0, 8 * (96 + 24) - 1))
def test_any_flipped_bit_of_a_header_is_noticed(bit: int) -> None:
    """A header is whole or an error."""
    view = memoryview(bytearray(1024))
    pack_header(view, 512, sample())
    view[512 - 120 + bit // 8] ^= 1 << bit % 8
    with pytest.raises(InvalidArgumentError, match="slot_header"):
        parse_header(view, 512)


@pytest.mark.parametrize("offset", [-1, 0, 95, 500, 1023, 1024, 1 << 63])
def test_no_header_at_a_wrong_offset(offset: int) -> None:
    """Offsets outside the segment are errors, not reads."""
    with pytest.raises(InvalidArgumentError, match="slot_header"):
        parse_header(memoryview(bytearray(1024)), offset)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 0},
        {"shard": 256},
        {"shard_bytes": 0},
        {"shard_bytes": 61},
        {"checksums": b""},
        {"namespace": b"short"},
        {"shard_bytes": 1 << 40},
    ],
)
def test_impossible_headers_are_not_written(change: dict[str, object]) -> None:
    """The slot stays as it was."""
    view = memoryview(bytearray(1024))
    with pytest.raises(InvalidArgumentError, match="slot_header"):
        pack_header(view, 512, dataclasses.replace(sample(), **change))  # type: ignore[arg-type]
    assert not any(view)
