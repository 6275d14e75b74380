"""Leases are renewed while held and released when dropped."""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Callable

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
        self.on_release: Callable[[], object] = lambda: None

    def renew(self, tokens: list[int]) -> list[int]:
        self.calls.put(("renew", sorted(tokens)))
        if self.fail:
            raise UnavailableError("no master")
        return tokens

    def release(self, tokens: list[int]) -> None:
        self.calls.put(("release", sorted(tokens)))
        self.on_release()

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


def test_leases_are_renewed_beside_a_stream_of_drops(client: Client) -> None:
    """A busy engine ends some load at any moment; those that wait keep their leases all the same."""
    keeper = LeaseKeeper(client)  # type: ignore[arg-type]  # stands in for Client
    client.on_release = lambda: (keeper.hold(8), keeper.drop(8))  # there is always one more to release
    keeper.hold(7)
    keeper.hold(8)
    keeper.drop(8)
    calls = iter(client.next, None)
    deadline = time.monotonic() + DEADLINE_S
    assert any("renew" in call[0] for call in itertools.takewhile(lambda _: time.monotonic() < deadline, calls))
    client.on_release = lambda: None
    keeper.close()


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
