"""Blocks that are rows of one table a layer, as an engine holds them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from xxhash import xxh3_64_intdigest

from kvpool import Client, Namespace
from kvpool.client_bytes import Blocks, CopyThreads
from kvpool.client_copies import copy_in, copy_out
from kvpool.client_node import LocalNode
from kvpool.client_rows import BlockRows
from kvpool.errors import UnavailableError
from kvpool.model import KEY_BYTES
from tests.integration.pool import Pool, T, chain_of, wait_for

LAYERS, BLOCKS, ROWS, SIZE = 3, 40, 64, 16 << 10
SPACE = Namespace("rows", layers=LAYERS)
CHAIN = chain_of(1, BLOCKS)
FREE = 8 << 20
"""Where the segment holds nothing yet."""


def tables(seed: int | None = None) -> np.ndarray:
    """Return layers x rows x bytes."""
    shape = (LAYERS, ROWS, SIZE)
    return np.zeros(shape, np.uint8) if seed is None else np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def numbers(seed: int) -> list[int]:
    """Return rows: a run upwards, one downwards, and some at random."""
    order = np.random.default_rng(seed).permutation(np.arange(30, ROWS))
    return [*range(20), *range(29, 19, -1), *order[:10].tolist()]


def check(target: np.ndarray, there: list[int], source: np.ndarray, here: list[int], first: int = 0) -> None:
    """The rows are those of the source from a layer on; others stay empty."""
    assert np.array_equal(target[first:, there], source[first:, here])
    assert not target[:first].any()
    assert not np.delete(target, there, axis=1).any()


@pytest.mark.parametrize("putter", ["a", ""], ids=["shared memory", "TCP"])
@pytest.mark.parametrize("checksum", ["always", "transfer"])
def test_rows_come_back_to_other_rows(pool: Pool, putter: str, checksum: str) -> None:
    """Through shared memory and TCP, with checksums and without; also some layers, and as whole buffers."""
    source, here, there = tables(1), numbers(1), numbers(2)

    def client(name: str) -> Client:
        own = pool.socket_path(name) if name else ""
        return Client(pool.address, node=own, checksum=checksum, transfer_timeout_ms=10_000)

    with client(putter) as one:
        assert one.put(SPACE, CHAIN, BlockRows(list(source), here)).stored == BLOCKS
        wait_for(lambda: pool.blocks() == BLOCKS, "the master to know all blocks")
    for getter in ("a", "b", ""):
        with client(getter) as two:
            target = tables()
            assert two.get(SPACE, CHAIN, BlockRows(list(target), there)).prefix == BLOCKS
            check(target, there, source, here)
            target = tables()
            assert two.get(SPACE, CHAIN, BlockRows(list(target[1:]), there), layers=(1, LAYERS)).prefix == BLOCKS
            check(target, there, source, here, first=1)
            whole = [np.zeros(LAYERS * SIZE, np.uint8) for _ in CHAIN]
            assert two.get(SPACE, CHAIN, whole).prefix == BLOCKS
            assert all(np.array_equal(run, source[:, n].ravel()) for run, n in zip(whole, here, strict=True))


def test_rows_come_layer_by_layer(pool: Pool) -> None:
    """A transfer's layers go from rows to rows, through shared memory and TCP, before their commit."""
    source, here, there = tables(1), numbers(1), numbers(2)
    with pool.client("a") as one, pool.client("a") as near, pool.client("b") as far:
        node = one.own_node
        assert node is not None
        put = one.put_layers(SPACE, CHAIN, shard=0, shard_bytes=LAYERS * SIZE, transfer=7)
        assert put is not None
        put.write(0, 1, BlockRows(list(source[:1]), here))
        targets = [tables() for _ in range(2)]
        with ThreadPoolExecutor(2) as threads:
            received = [
                threads.submit(
                    client.receive, SPACE, CHAIN, BlockRows(list(target), there),
                    shard=0, transfer=7, node=node, alive=lambda: True, timeout_ms=1000 * T,
                )
                for client, target in zip((near, far), targets, strict=True)
            ]  # fmt: skip
            wait_for(lambda: all(target[0, there].any(axis=1).all() for target in targets), "the first layer")
            put.write(1, LAYERS, BlockRows(list(source[1:]), here))
            assert [future.result().prefix for future in received] == [BLOCKS] * 2
        assert put.commit().stored == BLOCKS
        for target in targets:
            check(target, there, source, here)


@pytest.mark.parametrize("rows", [True, False])
def test_a_node_that_is_closed_as_a_copy_begins(pool: Pool, rows: bool) -> None:
    """Another thread may have seen the node end: a copy that has begun goes on, a later one is told."""
    node = LocalNode(pool.socket_path("a"), "closed")
    source = tables(3)
    buffers = [BlockRows([source[0]], [3, 4]), BlockRows([tables()[0]], [1, 2])]
    into, out = [
        Blocks(part if rows else list(part), bytes(2 * KEY_BYTES), 1, writable=True) for part in buffers
    ]
    copies, reasons = CopyThreads(1), ["", ""]
    memory = node.memory()
    node.close()
    known = None if rows else [[xxh3_64_intdigest(row)] for row in source[0][3:5]]  # known digests: the quick way
    digests = copy_in(memory, [(0, FREE), (1, FREE + SIZE)], into, known, copies)
    checksums = [digest for found in digests for digest in found]
    items = [(0, FREE, 0, 1), (1, FREE + SIZE, 1, 2)]
    copy_out(memory, items, checksums, out, True, copies, reasons)
    assert reasons == ["", ""]
    with pytest.raises(UnavailableError):
        node._copy_items(items, checksums, out, True, copies, reasons)
