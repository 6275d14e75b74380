"""Leases are renewed while held and released when dropped."""

from __future__ import annotations

import queue

import pytest

from kvpool.errors import UnavailableError
from kvpool_vllm import leases
from kvpool_vllm.leases import LeaseKeeper

DEADLINE_S = 30.0


class Client:
    """Notes what it is asked."""

    def __init__(self) -> None:
        self.calls: queue.Queue[tuple[str, list[int]]] = queue.Queue()
        self.fail = False

    def renew(self, tokens: list[int]) -> list[int]:
        self.calls.put(("renew", sorted(tokens)))
        if self.fail:
            raise UnavailableError("no master")
        return tokens

    def release(self, tokens: list[int]) -> None:
        self.calls.put(("release", sorted(tokens)))

    def next(self) -> tuple[str, list[int]]:
        return self.calls.get(timeout=DEADLINE_S)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    monkeypatch.setattr(leases, "RENEW_EVERY_S", 0.01)
    return Client()


def test_held_leases_are_renewed_until_dropped(client: Client) -> None:
    """A load may wait longer than a lease lives; zero is no lease."""
    keeper = LeaseKeeper(client)  # type: ignore[arg-type]  # stands in for Client
    keeper.hold(0)
    keeper.hold(7)
    assert client.next() == ("renew", [7])
    keeper.drop(7)
    keeper.drop(7)
    call = client.next()
    while call == ("renew", [7]):
        call = client.next()
    assert call == ("release", [7])
    keeper.close()
    assert len(keeper) == 0
    assert client.calls.empty()


def test_master_that_is_away_ends_nothing(client: Client) -> None:
    """Renewing goes on until somebody answers."""
    client.fail = True
    keeper = LeaseKeeper(client)  # type: ignore[arg-type]  # stands in for Client
    keeper.hold(7)
    assert [client.next() for _ in range(3)] == [("renew", [7])] * 3
    keeper.close()


def test_closing_releases_what_is_held(client: Client) -> None:
    """An engine that ends leaves no lease behind."""
    keeper = LeaseKeeper(client)  # type: ignore[arg-type]  # stands in for Client
    keeper.hold(7)
    keeper.hold(8)
    keeper.close()
    calls = [client.calls.get_nowait() for _ in range(client.calls.qsize())]
    assert calls[-1] == ("release", [7, 8])
