"""Buffers of a client's calls: runs of bytes, and arrays with gaps, which mean their bytes in C order."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.client_bytes import PART_BYTES_MIN, Blocks, CopyThreads, as_bytes, copy_hashed, copy_plain, scratch
from kvpool.errors import InvalidArgumentError

KEY = bytes(16)
LIMIT_S = 10.0


def held(layers: int, tokens: int, heads: int, size: int, seed: int) -> np.ndarray:
    """Return layers of tokens x heads x bytes."""
    return np.random.default_rng(seed).integers(0, 256, (layers, tokens, heads, size), dtype=np.uint8)


def some_heads(memory: np.ndarray, first: int, end: int) -> list[np.ndarray]:
    return [layer[:, first:end] for layer in memory]


@settings(max_examples=60, deadline=None)
@given(
    layers=st.integers(1, 3),
    tokens=st.integers(1, 5),
    heads=st.integers(2, 4),
    size=st.sampled_from([1, 3, 64]),
    data=st.data(),
)
def test_bytes_with_gaps_are_stored_in_order(layers: int, tokens: int, heads: int, size: int, data: Any) -> None:
    """A slot gets the bytes in C order, with their checksums; out of it they come back to where they were."""
    first = data.draw(st.integers(0, heads - 1))
    end = data.draw(st.integers(first + 1, heads))
    memory, other = held(layers, tokens, heads, size, 1), held(layers, tokens, heads, size, 2)
    untouched = other.copy()
    views = some_heads(memory, first, end)
    blocks = Blocks([views], KEY, layers, writable=False)
    canonical = b"".join(view.tobytes() for view in views)
    assert (blocks.shard_bytes, blocks.layer_bytes) == (len(canonical), len(canonical) // layers)
    sums = [xxhash.xxh3_64_intdigest(view.tobytes()) for view in views]
    slot = np.zeros(len(canonical), np.uint8)
    assert copy_hashed(blocks.pieces[0], [slot], blocks.layer_bytes, layers) == sums
    assert slot.tobytes() == canonical == blocks.gathered().pieces[0][0].tobytes()
    for copy in (
        lambda target: copy_hashed([slot], target, blocks.layer_bytes, layers) == sums,
        lambda target: copy_plain([slot], target, blocks.layer_bytes) is None,
    ):
        target = Blocks([some_heads(other, first, end)], KEY, layers, writable=True)
        assert copy(target.pieces[0])
        assert np.array_equal(other[:, :, first:end], memory[:, :, first:end])
        other[:, :, first:end] = untouched[:, :, first:end]
        assert np.array_equal(other, untouched)


def test_one_array_for_all_layers() -> None:
    """Its first dimension is that of the layers, or counts more of the same for each."""
    memory = held(4, 3, 2, 8, 1)
    whole = Blocks([memory[:, :, 1]], KEY, 2, writable=False)
    assert whole.gapped
    assert [piece.tobytes() for piece in whole.pieces[0]] == [memory[n : n + 2, :, 1].tobytes() for n in (0, 2)]
    line = Blocks([memory.reshape(-1)[::2]], KEY, 2, writable=False)
    assert b"".join(piece.tobytes() for piece in line.pieces[0]) == memory.reshape(-1)[::2].tobytes()
    assert not Blocks([memory], KEY, 2, writable=False).gapped
    with pytest.raises(InvalidArgumentError, match="whose first dimension is 3"):
        Blocks([memory[:, :, 1]], KEY, 3, writable=False)


def test_what_cannot_be_meant_is_refused() -> None:
    """Arrays of other types with gaps, and such as may not be written to."""
    memory = held(1, 4, 2, 8, 1)
    frozen = memory[0, :, 0]
    frozen.flags.writeable = False
    for array, writable in ((memory[0, :, 0].view(np.int16), False), (frozen, True)):
        with pytest.raises(InvalidArgumentError, match="must be of uint8, and not read-only"):
            Blocks([array], KEY, 1, writable=writable)
    with pytest.raises(InvalidArgumentError, match="not contiguous"):
        as_bytes(memory[0, :, 0], "blocks", writable=False)
    with pytest.raises(InvalidArgumentError, match="one size"):
        Blocks([memory[0, :, 0], memory[0, :2, 0]], KEY * 2, 1, writable=False)
    with pytest.raises(InvalidArgumentError, match="whose first dimension is 2"):
        Blocks([memory[0, :, 0], memory[0, :0, 0]], KEY * 2, 2, writable=False)


def test_blocks_with_gaps_beside_others() -> None:
    """In one call, and in the layers of one block."""
    memory = held(2, 4, 2, 8, 1)
    run = np.arange(32, dtype=np.uint8)
    blocks = Blocks([[memory[0, :, 0], run], [run, memory[1, :, 1]], run.tobytes() * 2], KEY * 3, 2, writable=False)
    slot = np.zeros(64, np.uint8)
    expected = [memory[0, :, 0].tobytes() + run.tobytes(), run.tobytes() + memory[1, :, 1].tobytes(), run.tobytes() * 2]
    for pieces, stored in zip(blocks.pieces, expected, strict=True):
        copy_hashed(pieces, [slot], 32, 2)
        assert slot.tobytes() == stored


def test_each_thread_has_its_own_scratch() -> None:
    """It grows with what is asked of it; nobody else writes there."""
    mine, theirs = scratch(10), []
    thread = threading.Thread(target=lambda: theirs.append(scratch(10)))
    thread.start()
    thread.join()
    assert not np.shares_memory(mine, theirs[0])
    assert len(scratch(1000)) == 1000
    assert len(scratch(3)) == 3


class Interrupted(BaseException):
    """As KeyboardInterrupt, which would end more than a test that fails."""


def test_interruptions_wait_for_threads_that_still_write() -> None:
    """Nobody takes a buffer back before; what no thread has begun is not begun any more."""
    caller, items = threading.get_ident(), list(range(8))
    both = threading.Barrier(2)
    interrupted: list[bool] = []
    begun: list[int] = []
    ended, over = threading.Event(), threading.Event()

    def interrupt(*_: object) -> None:
        interrupted.append(True)
        if not over.is_set():
            raise Interrupted

    def work(part: Sequence[int]) -> None:
        begun.extend(part)
        both.wait(LIMIT_S)  # each of them has a piece
        if threading.get_ident() == caller:
            raise Interrupted
        for _ in range(3):  # as it waits
            while not interrupted:  # one that comes just before it blocks is noticed with the next
                signal.pthread_kill(caller, signal.SIGUSR1)
                threading.Event().wait(0.01)
            interrupted.clear()
        ended.set()

    usual = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with contextlib.closing(CopyThreads(2)) as copies, pytest.raises(Interrupted):
            copies.run(items, PART_BYTES_MIN, work)
        assert ended.is_set()
        assert len(begun) == 2
    finally:
        over.set()
        assert ended.wait(LIMIT_S)
        signal.signal(signal.SIGUSR1, usual)


def test_without_its_threads_the_caller_copies() -> None:
    """A call that still runs as its client is closed makes no others, which nobody would end."""
    copies = CopyThreads(2)
    copies.close()
    done: set[int] = set()
    copies.run(list(range(8)), PART_BYTES_MIN, lambda _: done.add(threading.get_ident()))
    assert done == {threading.get_ident()}
    assert copies._executor is None
    with pytest.raises(RuntimeError):
        copies.executor()
