"""Blocks whose bytes have gaps in the caller's memory: some heads of what an engine holds."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kvpool import Client, Namespace
from tests.integration.pool import Pool, T, chain_of, wait_for

SPACE = Namespace("gaps", layers=2, head_groups=2)
BLOCKS = 6


def memory(seed: int | None = None) -> np.ndarray:
    """Return blocks x layers x tokens x heads x bytes."""
    shape = (BLOCKS, 2, 16, 2, 64)
    return np.zeros(shape, np.uint8) if seed is None else np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def head(blocks: np.ndarray, number: int) -> list[list[np.ndarray]]:
    return [[layer[:, number] for layer in block] for block in blocks]


def joined(blocks: np.ndarray, number: int) -> list[bytes]:
    return [b"".join(layer[:, number].tobytes() for layer in block) for block in blocks]


@pytest.mark.parametrize("putter", ["a", ""], ids=["shared memory", "TCP"])
@pytest.mark.parametrize("checksum", ["always", "transfer"])
def test_heads_come_back_to_their_places(pool: Pool, putter: str, checksum: str) -> None:
    """Through shared memory and TCP, with checksums and without; other heads stay as they are."""
    chain, source = chain_of(1, BLOCKS), memory(1)

    def client(name: str) -> Client:
        own = pool.socket_path(name) if name else ""
        return Client(pool.address, node=own, checksum=checksum, transfer_timeout_ms=10_000)

    with client(putter) as one:
        for number in (0, 1):
            assert one.put(SPACE, chain, head(source, number), shard=number).stored == BLOCKS
        wait_for(lambda: one.lookup(SPACE, chain).reason == "complete", "the master to know both shards of all blocks")
    for getter in ("a", "b", ""):
        with client(getter) as two:
            target = memory()
            assert two.get(SPACE, chain, head(target, 1), shard=1).prefix == BLOCKS
            assert np.array_equal(target[:, :, :, 1], source[:, :, :, 1])
            assert not target[:, :, :, 0].any()
            target = memory()
            got = two.get(SPACE, chain, [layers[1:] for layers in head(target, 0)], shard=0, layers=(1, 2))
            assert got.prefix == BLOCKS
            assert np.array_equal(target[:, 1, :, 0], source[:, 1, :, 0])
            assert not target[:, 0].any()
            whole = [np.zeros(2 * 16 * 64, np.uint8) for _ in range(BLOCKS)]
            assert two.get(SPACE, chain, whole, shard=1).prefix == BLOCKS
            assert [run.tobytes() for run in whole] == joined(source, 1)


def test_heads_come_layer_by_layer(pool: Pool) -> None:
    """A transfer's layers, too, go from gaps to gaps, through shared memory and TCP, before their commit."""
    chain, source = chain_of(1, BLOCKS), memory(1)
    wanted = head(source, 1)
    with pool.client("a") as one, pool.client("a") as near, pool.client("b") as far:
        node = one.own_node
        assert node is not None
        put = one.put_layers(SPACE, chain, shard=1, shard_bytes=2 * 16 * 64, transfer=7)
        assert put is not None
        assert put.wanted == list(range(BLOCKS))
        put.write(0, 1, [layers[:1] for layers in wanted])
        targets = [memory() for _ in range(2)]
        with ThreadPoolExecutor(2) as threads:
            received = [
                threads.submit(
                    client.receive, SPACE, chain, head(target, 1),
                    shard=1, transfer=7, node=node, alive=lambda: True, timeout_ms=1000 * T,
                )
                for client, target in zip((near, far), targets, strict=True)
            ]  # fmt: skip
            wait_for(lambda: all(target[:, 0, :, 1].any() for target in targets), "the first layer")
            put.write(1, 2, [layers[1] for layers in wanted])
            assert [future.result(T).prefix for future in received] == [BLOCKS, BLOCKS]
        assert put.commit().stored == BLOCKS
        for target in targets:
            assert np.array_equal(target[:, :, :, 1], source[:, :, :, 1])
            assert not target[:, :, :, 0].any()


def test_large_layers(pool: Pool) -> None:
    """Longer than a step of copying, and than what is sent at once."""
    space = Namespace("large gaps")
    source = np.random.default_rng(3).integers(0, 256, (3, 5 << 20, 2), np.uint8)
    with pool.client("a") as one, pool.client("b") as two, pool.client() as three:
        assert one.put(space, chain_of(1, 3), [block[:, 0] for block in source]).stored == 3
        assert three.put(space, chain_of(2, 3), [block[:, 1] for block in source]).stored == 3
        wait_for(lambda: pool.blocks() == 6, "the master to know them")
        for client in (one, two, three):
            for number in (0, 1):
                target = np.zeros_like(source)
                chain = chain_of(number + 1, 3)
                assert client.get(space, chain, [block[:, number] for block in target]).prefix == 3
                assert np.array_equal(target[:, :, number], source[:, :, number])
                assert not target[:, :, 1 - number].any()
