"""Prompts of hybrid models: one lookup for all KV cache groups, at the master and at the node alone."""

from __future__ import annotations

import pytest

from kvpool import Client, Namespace
from kvpool.client_lookup import Also
from kvpool.errors import InvalidArgumentError
from tests.integration.pool import Pool, T, lookup_without_master, wait_for

FULL = Namespace("hybrid", kv_group="full")
WINDOW = Namespace("hybrid", kv_group="window")
CHAIN = [bytes([i]) * 16 for i in range(1, 9)]
LAST_TWO = [Also(WINDOW, 2)]


def fill(client: Client, window: list[int]) -> None:
    """Store all blocks of one group, and some of the other."""
    client.put(FULL, CHAIN, [b"f" * 64] * len(CHAIN))
    client.put(WINDOW, [CHAIN[i] for i in window], [b"w" * 64] * len(window))


def test_a_prefix_ends_where_the_window_is_there(pool: Pool) -> None:
    """Of the window only the last blocks count, and what the engine holds is there."""
    with pool.client("a") as client:
        fill(client, [3, 4, 7])
        wait_for(lambda: pool.blocks() == len(CHAIN) + 3, "the master to know")
        assert client.lookup(FULL, CHAIN, timeout_ms=1000 * T).prefix == 8
        found = client.lookup(FULL, CHAIN, also=LAST_TWO, lease=True, timeout_ms=1000 * T)
        assert (found.prefix, sum(run.blocks for run in found.runs)) == (5, 5)
        assert found.lease
        client.release([found.lease])
        assert client.lookup(FULL, CHAIN, also=LAST_TWO, known_prefix=7, timeout_ms=1000 * T).prefix == 8
        assert client.lookup(FULL, CHAIN, also=[Also(WINDOW)], timeout_ms=1000 * T).prefix == 0
        new = Also(Namespace("hybrid", kv_group="new"), 1)
        assert client.lookup(FULL, CHAIN, also=[*LAST_TWO, new]).prefix == 0
        with pytest.raises(InvalidArgumentError, match=r"also\.last_blocks"):
            client.lookup(FULL, CHAIN, also=[Also(WINDOW, -1)])


def test_a_node_answers_for_all_groups(pool: Pool) -> None:
    """Without a master a prefix counts if its window is there; a shorter one is not searched for."""
    with Client(None, node=pool.socket_path("a")) as client:
        fill(client, [3, 4])
        assert lookup_without_master(client, FULL, CHAIN, also=LAST_TWO).prefix == 0
        assert lookup_without_master(client, FULL, CHAIN[:5], also=LAST_TWO).prefix == 5
        assert lookup_without_master(client, FULL, CHAIN[:6], also=LAST_TWO, known_prefix=5).prefix == 5
        assert lookup_without_master(client, FULL, CHAIN[:5], also=LAST_TWO, known_prefix=4).prefix == 5
