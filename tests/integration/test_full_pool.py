"""Too little memory: what a put into a full pool does, and the only two reasons for which it fails."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kvpool.errors import AllPinnedError, TooLargeError
from tests.integration.pool import SEGMENT, SPACE, Pool, chain_of, content_of, get_chain, put_chain, wait_for

SIZE = 1 << 20
FULL = 62
"""Blocks that nearly fill a segment."""


def put(pool: Pool, node: str | None, chain: int, blocks: int) -> None:
    client = pool.client(node)
    for first in range(0, blocks, 8):  # with four at once half of the segment is being written
        put_chain(client, SPACE, chain_of(chain, blocks)[first : first + 8], SIZE)


@pytest.mark.parametrize("node", ["a", None])
def test_put_into_a_full_pool_never_fails(pool: Pool, node: str | None) -> None:
    """The coldest blocks give way, whoever puts and however many at once; what is found is right."""
    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(put, pool, node, chain, 64) for chain in range(6)]:
            done.result()
    client = pool.client(node)
    keys = chain_of(9, 32)
    assert put_chain(client, SPACE, keys, SIZE) == len(keys)
    wait_for(lambda: client.lookup(SPACE, keys).reason == "complete", "what came last is known")
    assert get_chain(client, SPACE, keys, SIZE).prefix == len(keys)
    assert pool.status().used_bytes <= 2 * SEGMENT


def test_put_fails_when_everything_is_pinned(pool: Pool) -> None:
    """A clear reason, counted; when a pin ends its blocks give way again, and pinned ones were not touched."""
    client = pool.client("a")
    keys = chain_of(1, FULL)
    put_chain(client, SPACE, keys, SIZE)
    late = chain_of(2, 8)
    with pool.raw("a") as node:
        held = [node.pin(SPACE, keys[:1])[0], node.pin(SPACE, keys[1:])[0]]
        result = client.put(SPACE, late, [content_of(key, SIZE) for key in late])
        room = result.stored  # in what the segment had left
        assert room <= 2 and result.errors == {"no_room": len(late) - room}
        assert client.stats()["put.failed.no_room"] == len(late) - room
        with pytest.raises(AllPinnedError, match="pinned or being written"):
            node.reserve(SPACE, chain_of(3, 4), 4 * SIZE)
        node.release(held[0])
        wait_for(lambda: put_some(pool, 4) == 1, "the block that is pinned no more gives way")
        assert node.local_prefix(SPACE, keys[1:]) == len(keys) - 1
    wait_for(lambda: not client.put(SPACE, late, [content_of(key, SIZE) for key in late]).failed, "the pins ended")


def put_some(pool: Pool, chain: int) -> int:
    key = chain_of(chain, 1)
    result = pool.client("a").put(SPACE, key, [content_of(key[0], SIZE)])
    return result.stored + result.existed


@pytest.mark.parametrize("node", ["a", None])
def test_block_larger_than_the_segment_is_refused(pool: Pool, node: str | None) -> None:
    """A clear reason, counted, and nothing is evicted for it."""
    small = chain_of(1, 8)
    put_chain(pool.client("a"), SPACE, small, SIZE)
    client = pool.client(node)
    result = client.put(SPACE, chain_of(2, 2), [np.zeros(SEGMENT + 4, np.uint8)] * 2)
    assert (result.failed, result.errors) == (2, {"too_large": 2})
    assert client.stats()["put.failed.too_large"] == 2
    with pool.raw("a") as raw:
        with pytest.raises(TooLargeError, match="larger than the segment"):
            raw.reserve(SPACE, chain_of(3, 1), SEGMENT)
        assert raw.local_prefix(SPACE, small) == len(small)
