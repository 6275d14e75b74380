"""Page-locking the node's segment: in the background, in chunks, undone when nobody uses it."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from kvpool_vllm.device_pinning import CudaRegistrar, PinnedSegment, Pinning, PinState, address_of

WAIT_S = 30.0


class Error(int):
    """A code of the runtime."""


class Runtime:
    """The part of the CUDA runtime that page-locks: refuses what it is told to, and waits at a gate."""

    class cudaError:  # noqa: D106, N801 -- torch's name
        success = Error(0)

    def __init__(self, refuse_from: int = 1 << 30) -> None:
        self.locked: dict[int, int] = {}
        self.calls = 0
        self.refuse_from = refuse_from
        self.gate = threading.Event()
        self.gate.set()

    def cudaHostRegister(self, address: int, size: int, flags: int) -> Error:  # noqa: N802
        assert self.gate.wait(WAIT_S)
        assert flags == 1
        assert not any(start < address + size and address < start + length for start, length in self.locked.items())
        self.calls += 1
        if self.calls > self.refuse_from:
            return Error(2)
        self.locked[address] = size
        return Error(0)

    def cudaHostUnregister(self, address: int) -> Error:  # noqa: N802
        return Error(0 if self.locked.pop(address, 0) else 713)

    def cudaGetErrorString(self, error: Error) -> str:  # noqa: N802
        return {2: "out of memory", 713: "part or all of the requested memory range is not registered"}[error]


@pytest.fixture
def memory() -> np.ndarray:
    return np.zeros(10_000, np.uint8)


def segment_of(memory: np.ndarray, runtime: Runtime, chunk_bytes: int = 4096) -> PinnedSegment:
    return PinnedSegment(memory, CudaRegistrar(runtime), chunk_bytes=chunk_bytes)


def usable(segment: PinnedSegment) -> bool:
    with segment.using() as yes:
        return yes


def test_a_segment_becomes_usable_when_all_of_it_is_registered(memory):
    """Whoever asks meanwhile is told no at once, and nothing waits for the driver."""
    runtime = Runtime()
    runtime.gate.clear()
    segment = segment_of(memory, runtime)
    assert segment.state is PinState.UNREGISTERED
    assert not usable(segment)
    segment.start()
    segment.start()
    assert segment.state is PinState.REGISTERING
    assert not usable(segment)
    runtime.gate.set()
    assert segment.wait(WAIT_S)
    assert segment.state is PinState.REGISTERED
    assert usable(segment)
    start = address_of(memory)
    assert runtime.locked == {start: 4096, start + 4096: 4096, start + 8192: 10_000 - 8192}
    segment.close()
    assert segment.state is PinState.CLOSED
    assert not usable(segment)
    assert not runtime.locked
    assert segment.memory is None


def test_what_the_driver_refuses_is_undone(memory):
    """A segment that can't be page-locked whole is not page-locked at all, and says why."""
    runtime = Runtime(refuse_from=2)
    segment = segment_of(memory, runtime)
    segment.start()
    assert not segment.wait(WAIT_S)
    assert segment.state is PinState.FAILED
    assert segment.reason == "out of memory"
    assert not usable(segment)
    assert not runtime.locked
    segment.close()


def test_a_driver_that_raises_is_a_driver_that_refuses(memory):
    """An exception ends in the same state, with its text as the reason."""

    class Broken(Runtime):
        def cudaHostRegister(self, address: int, size: int, flags: int) -> Error:  # noqa: N802
            raise RuntimeError("CUDA driver is gone")

    segment = segment_of(memory, Broken())
    segment.start()
    assert not segment.wait(WAIT_S)
    assert (segment.state, segment.reason) == (PinState.FAILED, "RuntimeError: CUDA driver is gone")


def test_closing_before_anything_began(memory):
    """Nothing was registered, nothing is undone."""
    segment = segment_of(memory, Runtime())
    segment.close()
    segment.start()
    assert segment.state is PinState.CLOSED
    assert not segment.wait(0.0)


def test_closing_while_it_registers(memory):
    """What was registered until then is undone; the rest is left out."""
    runtime = Runtime()
    runtime.gate.clear()
    segment = segment_of(memory, runtime)
    segment.start()
    closer = threading.Thread(target=segment.close)
    closer.start()
    assert not segment.wait(WAIT_S)
    runtime.gate.set()
    closer.join(WAIT_S)
    assert segment.state is PinState.CLOSED
    assert not runtime.locked
    assert runtime.calls < 3


def test_closing_waits_for_copies(memory):
    """Memory stays page-locked until the last copy that uses it has ended."""
    runtime = Runtime()
    segment = segment_of(memory, runtime)
    segment.start()
    assert segment.wait(WAIT_S)
    closer = threading.Thread(target=segment.close)
    with segment.using() as yes:
        assert yes
        closer.start()
        while segment.state is not PinState.CLOSED:
            threading.Event().wait(0.001)
        assert not usable(segment)
        assert len(runtime.locked) == 3
    closer.join(WAIT_S)
    assert not runtime.locked


@pytest.mark.parametrize(
    ("start", "end", "lengths"),
    [
        (0, 4096, [4096]),
        (100, 4000, [3900]),
        (4000, 4200, [96, 104]),
        (4096, 8192, [4096]),
        (4000, 9000, [96, 4096, 808]),
    ],
)
def test_no_piece_crosses_from_chunk_to_chunk(memory, start, end, lengths):
    """The driver refuses a copy whose memory was registered in two calls; the pieces are the view's bytes in order."""
    memory[:] = np.arange(len(memory)) % 251
    pieces = segment_of(memory, Runtime()).pieces(memory[start:end])
    assert [len(piece) for piece in pieces] == lengths
    assert np.array_equal(np.concatenate(pieces), memory[start:end])


def test_a_restarted_node_has_another_segment(memory):
    """The new one is registered, the old one let go of; one that is known is not registered twice."""
    runtime = Runtime()
    pinning = Pinning(CudaRegistrar(runtime))
    first = pinning.segment(memory)
    assert first is not None
    assert first.wait(WAIT_S)
    assert pinning.segment(memory) is first
    other = np.zeros(5000, np.uint8)
    second = pinning.segment(other)
    assert second is not None
    assert second.wait(WAIT_S)
    while first.memory is not None:
        threading.Event().wait(0.001)
    assert runtime.locked == {address_of(other): 5000}
    pinning.close()
    assert not runtime.locked
    assert pinning.segment(other) is None


def test_a_node_that_is_gone_leaves_nothing_registered(memory):
    """Whether a job finds that it is gone or the client says so: its memory is of use to others."""
    runtime = Runtime()
    pinning = Pinning(CudaRegistrar(runtime))
    for let_go in (lambda: pinning.segment(None), pinning.let_go):
        segment = pinning.segment(memory)
        assert segment is not None
        assert segment.wait(WAIT_S)
        let_go()
        while segment.memory is not None:
            threading.Event().wait(0.001)
        assert not runtime.locked


def test_without_a_node_or_a_registrar_there_is_nothing_to_register(memory):
    """Copies go through a buffer then."""
    assert Pinning(None).segment(memory) is None
    assert Pinning(CudaRegistrar(Runtime())).segment(None) is None


def test_unregistering_what_is_not_registered_is_told():
    """In the runtime's own words."""
    runtime: Any = Runtime()
    with pytest.raises(RuntimeError, match="not registered"):
        CudaRegistrar(runtime).unregister(4096)
