"""Blocks from other nodes: many requests of one get, to owners that may be lost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from kvpool import client_peers
from kvpool.client_bytes import CopyThreads
from kvpool.client_health import Health
from kvpool.client_peers import Peer, Peers, Source, Want, Wanted
from kvpool.errors import UnavailableError
from kvpool.model import NodeAddress

SIZE = 512
BLOCKS = 12
SLOW = NodeAddress("slow", "127.0.0.1", 1)
WELL = NodeAddress("well", "127.0.0.1", 2)


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peers]:
    """Nodes of which each request asks for two blocks, and that nobody leaves alone."""
    monkeypatch.setattr(client_peers, "REQUEST_BYTES", 2 * SIZE)
    health = Health(1000, 60.0)
    found = Peers(health, 0.1)
    yield found
    found.close()
    health.close()


def test_nodes_that_the_master_no_longer_names_are_forgotten(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody probes them, and their channels are closed; not before they are missing for long."""
    slow, well = peers.at(SLOW), peers.at(WELL)
    peers.named([WELL])
    assert peers.at(SLOW) is slow
    monkeypatch.setattr(client_peers, "UNNAMED_S", 0.0)
    peers.named([WELL])
    assert peers.at(WELL) is well
    with pytest.raises(UnavailableError, match="closed"), slow.channel(1.0):
        pass
    assert slow.guard not in peers._health._guards
    assert well.guard in peers._health._guards
    assert set(peers._last) == {"well"}


@pytest.mark.parametrize("wait_s", [0.0, 2 * client_peers.PATIENCE_S])
@pytest.mark.parametrize("threads", [1, 4])
def test_an_owner_that_keeps_us_waiting_does_so_once(
    peers: Peers, monkeypatch: pytest.MonkeyPatch, wait_s: float, threads: int
) -> None:
    """Its other blocks are asked of others at once; one that fails quickly is worth each try."""
    asked: list[str] = []

    def get(self: Peer, namespace: bytes, items: Sequence[Wanted], *rest: Any) -> list[str]:
        asked.append(self.address.node_id)
        if self.address is SLOW:
            time.sleep(wait_s)
            raise UnavailableError("no answer")
        return [""] * len(items)

    monkeypatch.setattr(Peer, "get", get)
    if not wait_s:
        monkeypatch.setattr(client_peers, "PATIENCE_S", 60.0)  # whatever the machine does meanwhile, it was quick
    copies = CopyThreads(threads)
    copies.streams = threads
    wanted = [
        Wanted(n, bytes([n]) * 16, [np.zeros(SIZE, np.uint8)], [Source(SLOW), Source(WELL)]) for n in range(BLOCKS)
    ]
    try:
        reasons = peers.get(bytes(16), wanted, Want(0, 0, 1, SIZE), copies, 5.0)
    finally:
        copies.close()
    assert reasons == dict.fromkeys(range(BLOCKS), "")
    requests = BLOCKS // 2
    assert asked.count("well") == requests
    if wait_s:
        assert 1 <= asked.count("slow") <= threads
    else:
        assert asked.count("slow") == requests
