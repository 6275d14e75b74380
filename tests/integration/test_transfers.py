"""Transfers between engines through a real pool: clients open, seal, claim, renew and end; processes die."""

from __future__ import annotations

from kvpool.client_transfers import Claimed, TransferPart, TransferState
from tests.integration.pool import SPACE, Pool, chain_of, put_chain, wait_for

SIZE = 64 << 10
KEYS = chain_of(1, 8)
PARTS = [TransferPart(SPACE, b"".join(KEYS), drop_last=1)]


def states(pool: Pool) -> dict[str, int]:
    """What became of transfers, by the master's counters."""
    counters = pool.status().counters
    return {name.removeprefix("transfers."): n for name, n in counters.items() if name.startswith("transfers.")}


def under_way(pool: Pool) -> tuple[int, int]:
    status = pool.status()
    return status.transfers, status.transfer_blocks


def test_a_prompt_moves_from_one_engine_to_another(pool: Pool) -> None:
    """The consumer learns where it is; at the end nothing is held, and its last block is gone, the others stay."""
    producer, consumer = pool.client("a"), pool.client("b")
    assert consumer.transfers.claim(7) == Claimed(TransferState.UNKNOWN)
    assert producer.transfers.open(7, PARTS, ["a"], "prefill")
    assert under_way(pool) == (1, 8)
    claimed = consumer.transfers.claim(7, "decode")
    assert (claimed.state, claimed.namespaces) == (TransferState.OPEN, (SPACE.digest,))
    (node,) = claimed.nodes
    assert node is not None and (node.node_id, node.socket_path) == ("a", pool.socket_path("a"))
    put_chain(producer, SPACE, KEYS, SIZE)
    assert producer.transfers.renew([7]) == []
    assert producer.transfers.seal(7, 60_000)
    assert consumer.transfers.claim(7).state is TransferState.SEALED
    wait_for(lambda: pool.blocks() == 8, "the blocks are known")
    consumer.transfers.end([7, 8])
    wait_for(lambda: pool.blocks() == 7, "the last one is dropped")
    assert consumer.lookup(SPACE, KEYS).prefix == 7
    assert under_way(pool) == (0, 0)
    assert producer.transfers.renew([7]) == [7]
    assert not producer.transfers.seal(7, 0)
    assert consumer.transfers.claim(7) == Claimed(TransferState.ENDED)
    assert states(pool) == {"opened": 1, "sealed": 1, "claimed": 1, "ended": 1}
