"""Calls of so many blocks that a node would be busy with one of them alone: in parts, and refused beyond a bound."""

from __future__ import annotations

import pytest

from kvpool.client_files import PART_BLOCKS_MAX
from kvpool.errors import InvalidArgumentError
from kvpool.model import NODE_ITEMS_MAX, RESERVE_ITEMS_MAX
from tests.integration.pool import SPACE, Pool, chain_of, content_of, get_chain, put_chain, wait_for

SIZE = 1 << 10
MANY = 2 * PART_BLOCKS_MAX + 100


@pytest.fixture(params=[True, False], ids=["unpinned", "pinned"])
def reads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients of this process find blocks by themselves, or ask the node."""
    if not request.param:
        monkeypatch.setattr("kvpool.client_node.ordered", lambda machine: False)


@pytest.mark.parametrize("node", ["a", None])
@pytest.mark.usefixtures("reads")
def test_more_blocks_than_a_node_looks_at_in_one_go(pool: Pool, node: str | None) -> None:
    """Each is stored, found and right, by shared memory and over TCP."""
    client, keys = pool.client(node), chain_of(1, MANY)
    assert put_chain(client, SPACE, keys, SIZE) == MANY
    wait_for(lambda: client.lookup(SPACE, keys).reason == "complete", "all of it is known")
    result = get_chain(client, SPACE, keys, SIZE)
    assert (result.prefix, result.ok) == (MANY, [True] * MANY)
    again = client.put(SPACE, keys, [content_of(key, SIZE) for key in keys])
    assert (again.stored + again.existed, again.failed) == (MANY, 0)  # over TCP another node may have been named


def test_a_block_that_is_missing_far_behind(pool: Pool) -> None:
    """Reasons belong to the blocks that they are said of, in whatever order the parts were asked for."""
    client, keys = pool.client("a"), chain_of(2, MANY)
    missing = {5, PART_BLOCKS_MAX, MANY - 1}
    here = [key for number, key in enumerate(keys) if number not in missing]
    put_chain(client, SPACE, here, SIZE)
    result = get_chain(client, SPACE, keys, SIZE)
    assert {number for number, ok in enumerate(result.ok) if not ok} == missing
    assert result.prefix == 5


def test_a_node_refuses_more_than_it_can_answer_soon(pool: Pool) -> None:
    """By name, and goes on."""
    with pool.raw("a") as node:
        with pytest.raises(InvalidArgumentError, match=f"keys: at most {RESERVE_ITEMS_MAX} items"):
            node.reserve(SPACE, chain_of(3, RESERVE_ITEMS_MAX + 1), SIZE)
        with pytest.raises(InvalidArgumentError, match=f"keys: at most {NODE_ITEMS_MAX} items"):
            node.pin(SPACE, chain_of(3, NODE_ITEMS_MAX + 1))
        assert node.local_prefix(SPACE, chain_of(3, NODE_ITEMS_MAX + 1)) == 0
    client = pool.client("a")
    assert client.put_layers(SPACE, chain_of(3, RESERVE_ITEMS_MAX + 1), shard=0, shard_bytes=SIZE, transfer=1) is None
    assert put_chain(client, SPACE, chain_of(3, 4), SIZE) == 4
