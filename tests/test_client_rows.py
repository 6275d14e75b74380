"""Blocks that are rows of one table a layer, copied to slots and back many at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.client_bytes import STEP_BYTES, Blocks, CopyThreads
from kvpool.client_rows import BlockRows, _runs, rows_in, rows_out
from kvpool.errors import InvalidArgumentError

ROWS = 24


@pytest.fixture(scope="module")
def copies() -> CopyThreads:
    return CopyThreads(2)


def tables(layers: int, size: int, seed: int) -> list[np.ndarray]:
    """Return tables whose rows lie apart, as in an engine that keeps other things between them."""
    whole = np.random.default_rng(seed).integers(0, 256, (layers, ROWS, size + 3), dtype=np.uint8)
    return [table[:, :size] for table in whole]


def expected(layers: list[np.ndarray], number: int) -> bytes:
    return b"".join(layer[number].tobytes() for layer in layers)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), layers=st.integers(1, 4), size=st.sampled_from([1, 5, 4096, 140_000, 300_000]))
def test_rows_go_to_slots_and_back(copies: CopyThreads, data: Any, layers: int, size: int) -> None:
    """Whatever the order, each slot has its row's bytes, checksums are theirs, nothing else changes."""
    count = data.draw(st.integers(1, 12))
    scattered = st.permutations(range(ROWS)).map(lambda order: order[:count])
    regular = st.sampled_from([list(range(count)), list(range(count))[::-1], list(range(0, 2 * count, 2))])
    numbers, places = data.draw(scattered | regular), data.draw(scattered | regular)
    source, target = tables(layers, size, 1), tables(layers, size, 2)
    shard = layers * size
    memory = bytearray(b"\xaa" * (ROWS * shard + 14))
    offsets = [7 + place * shard for place in places]
    chosen = data.draw(st.permutations(range(count)))
    items = [(i, offsets[i]) for i in chosen]
    sums = rows_in(memoryview(memory), BlockRows(source, numbers), items, copies)
    for (i, offset), found in zip(items, sums, strict=True):
        assert memory[offset : offset + shard] == expected(source, numbers[i])
        assert found == [xxhash.xxh3_64_intdigest(table[numbers[i]].tobytes()) for table in source]
    rest = np.ones(len(memory), bool)
    for offset in offsets:
        rest[offset : offset + shard] = False
    assert (np.frombuffer(memory, np.uint8)[rest] == 0xAA).all()

    flat = [digest for found in sums for digest in found]
    wrong = data.draw(st.sets(st.integers(0, count - 1)))
    for at in wrong:
        flat[at * layers + data.draw(st.integers(0, layers - 1))] ^= 1
    wanted = [(i, offset, at * layers, (at + 1) * layers) for at, (i, offset) in enumerate(items)]
    reasons = ["not_here"] * count
    rows_out(memoryview(memory), BlockRows(target, numbers), wanted, flat, copies, reasons)
    assert reasons == ["corrupt" if chosen.index(i) in wrong else "" for i in range(count)]
    for here, there in zip(source, target, strict=True):
        assert np.array_equal(there[numbers], here[numbers])
        there[:] = 0
    reasons = ["not_here"] * count
    rows_out(memoryview(memory), BlockRows(target, numbers), wanted, None, copies, reasons)
    assert reasons == [""] * count
    assert all(np.array_equal(there[numbers], here[numbers]) for here, there in zip(source, target, strict=True))


def test_only_the_rows_asked_for_are_written(copies: CopyThreads) -> None:
    """Rows beside them, and the bytes between rows, stay as they were."""
    layers, numbers = tables(2, 64, 3), [9, 3, 4, 17]
    whole = layers[0].base
    before = whole.copy()
    memory = memoryview(bytearray(range(256)) * 4)
    wanted = [(i, 128 * i, 2 * i, 2 * i + 2) for i in range(4)]
    rows_out(memory, BlockRows(layers, numbers), wanted, None, copies, [""] * 4)
    changed = np.argwhere((whole != before).any(axis=2))
    assert {tuple(pair) for pair in changed.tolist()} == {(layer, n) for layer in range(2) for n in numbers}
    assert np.array_equal(whole[:, :, 64:], before[:, :, 64:])


@pytest.mark.parametrize("offset", [-1, -64, 1024 - 127, 4096])
@pytest.mark.parametrize("beside", [[], [0], [0, 128]])
def test_places_outside_of_the_memory_are_refused(copies: CopyThreads, offset: int, beside: list[int]) -> None:
    """Whatever leads out of the segment is no copy but an error, alone or with others."""
    memory = memoryview(bytearray(1024))
    offsets = [*beside, offset]
    rows = BlockRows(tables(2, 64, 1), range(len(offsets)))
    with pytest.raises(ValueError, match=r"strides|buffer|offset"):
        rows_in(memory, rows, list(enumerate(offsets)), copies)


@pytest.mark.parametrize("numbers", [[-1], [ROWS], [0, ROWS + 5]])
def test_rows_that_a_table_lacks_are_refused(numbers: list[int]) -> None:
    """The shortest table counts."""
    with pytest.raises(InvalidArgumentError, match="rows must be from 0 to"):
        BlockRows(tables(2, 8, 1), numbers)
    with pytest.raises(InvalidArgumentError, match="from 0 to 1"):
        BlockRows([np.zeros((4, 8), np.uint8), np.zeros((2, 8), np.uint8)], [2])


def test_tables_that_do_not_fit_are_refused() -> None:
    """All have bytes, equally many in each row and without gaps, and there is one for each layer."""
    good = np.zeros((4, 8), np.uint8)
    for other in (good[:, :4], good.view(np.uint16), good[:, ::2], good[0], good[:, :0]):
        with pytest.raises(InvalidArgumentError, match="blocks"):
            BlockRows([other, good] if other.shape != (4, 0) else [other], [0])
    for layers, writable in ((1, True), (3, False)):
        with pytest.raises(InvalidArgumentError, match="one for each"):
            Blocks(BlockRows([good, good], [0]), bytes(16), layers, writable=writable)
    good.setflags(write=False)
    with pytest.raises(InvalidArgumentError, match="written"):
        Blocks(BlockRows([good], [0]), bytes(16), 1, writable=True)
    with pytest.raises(InvalidArgumentError, match="2 buffers for 1"):
        Blocks(BlockRows([good], [0, 1]), bytes(16), 1, writable=False)


def test_some_layers_of_some_blocks() -> None:
    """Parts of a call mean the same bytes as the pieces that others would be given."""
    layers = tables(3, 8, 4)
    blocks = Blocks(BlockRows(layers, [5, 1, 7, 2]), bytes(64), 3, writable=True)
    assert (len(blocks), blocks.shard_bytes, blocks.layer_bytes) == (4, 24, 8)
    assert [len(pieces) for pieces in blocks.pieces] == [3] * 4
    part = blocks.span(1, 4, 1, 3).some([2, 0])
    assert (len(part), part.layers, part.shard_bytes) == (2, 2, 16)
    assert [[piece.tolist() for piece in pieces] for pieces in part.pieces] == [
        [layer[number].tolist() for layer in layers[1:]] for number in (2, 1)
    ]
    gathered = blocks.gathered()
    assert gathered.rows is None
    assert [pieces[0].tobytes() for pieces in gathered.pieces] == [expected(layers, n) for n in (5, 1, 7, 2)]


def test_large_layers_are_copied_one_by_one() -> None:
    """They are hashed in steps, as they would leave the cache."""
    layer = np.zeros((1, STEP_BYTES + 1), np.uint8)
    blocks = Blocks(BlockRows([layer, layer], [0]), bytes(16), 2, writable=True)
    assert blocks.rows is None
    assert [piece.nbytes for piece in blocks.pieces[0]] == [STEP_BYTES + 1] * 2


@pytest.mark.parametrize(
    ("count", "most", "runs"),
    [(129, 64, [65, 64]), (80, 64, [80]), (81, 64, [41, 40]), (5, 1, [1] * 5), (6, 4, [3, 3]), (0, 64, [])],
)
def test_a_run_leaves_no_few_blocks_behind(count: int, most: int, runs: list[int]) -> None:
    """What is a little longer is copied at once, or in equal parts: each part costs the same, however short."""
    offsets = [4096 + 512 * at for at in range(count)]
    assert [end - first for first, end in _runs(offsets, most)] == runs


def test_runs_end_where_distances_change() -> None:
    """A strided copy has one distance."""
    assert list(_runs([0, 10, 20, 25, 30, 35, 90], 64)) == [(0, 3), (3, 6), (6, 7)]
