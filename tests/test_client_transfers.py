"""What a client says of transfers, to a master that is played: time, refusals, bad input."""

from __future__ import annotations

from typing import Any

import pytest

from kvpool import Namespace, client_transfers
from kvpool.client_transfers import CALL_S, SEAL_MS_MAX, TransferPart, Transfers
from kvpool.errors import InvalidArgumentError, UnavailableError, UnknownNamespaceError
from kvpool.rpc.v1 import master_pb2

SPACE = Namespace(model="demo")
PART = TransferPart(SPACE, bytes(16))


class Link:
    """Plays the way to the master; ``register_s`` of a clock that only it moves go by while it announces."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, register_s: float = 0.0) -> None:
        self.asked: list[tuple[str, int]] = []
        self.refused: dict[int, Exception] = {}
        self.restarted: Any = None
        self._now = 0.0
        self._register_s = register_s
        monkeypatch.setattr(client_transfers.time, "monotonic", lambda: self._now)

    def register(self, namespace: Namespace, timeout_s: float) -> None:
        self._now += self._register_s

    def ask(self, frame: master_pb2.MasterFrame, payload: bytes, timeout_s: float) -> master_pb2.MasterFrameReply:
        body = frame.WhichOneof("body")
        assert body is not None
        number = getattr(frame, body).transfer
        self.asked.append((body.removesuffix("_transfer"), number))
        if (error := self.refused.get(number)) is not None:
            raise error
        return master_pb2.MasterFrameReply()


def transfers_of(link: Any) -> Transfers:
    return Transfers(link)


def test_nobody_is_asked_when_no_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question that must be late would break the way to the master, for lookups too."""
    for register_s, opened in ((CALL_S / 2, True), (CALL_S - 0.001, False), (CALL_S, False)):
        link = Link(monkeypatch, register_s)
        assert transfers_of(link).open(7, [PART], ["a"]) is opened
        assert link.asked == [("open", 7)] * opened


def test_how_long_a_seal_may_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the wire cannot carry is the caller's error, by name."""
    link = Link(monkeypatch)
    transfers = transfers_of(link)
    for ttl_ms in (-1, SEAL_MS_MAX + 1, 1 << 64, float("nan")):
        with pytest.raises(InvalidArgumentError, match=r"^ttl_ms: "):
            transfers.seal(7, ttl_ms)  # type: ignore[arg-type]
    assert link.asked == []
    for ttl_ms in (0, 1500.0, SEAL_MS_MAX):
        transfers.seal(7, ttl_ms)  # type: ignore[arg-type]
    assert link.asked == [("seal", 7)] * 3


def test_a_new_master_is_told_of_others_when_it_refuses_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot be opened anew is left out; a master that is away is asked no more, and told all later."""
    link = Link(monkeypatch)
    transfers = transfers_of(link)
    for number in (1, 2, 3):
        transfers.open(number, [PART], ["a"])
    link.refused[1] = UnknownNamespaceError("which?")
    link.asked.clear()
    assert link.restarted(link.ask)
    assert link.asked == [("open", 1), ("open", 2), ("open", 3)]
    link.refused[2] = UnavailableError("gone")
    link.asked.clear()
    assert not link.restarted(link.ask)
    assert link.asked == [("open", 1), ("open", 2)]


def test_a_seal_without_an_answer_leaves_the_producer_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its renewals go on, and a master that is restarted meanwhile is told both."""
    link = Link(monkeypatch)
    transfers = transfers_of(link)
    transfers.open(7, [PART], ["a"])
    link.refused[7] = UnavailableError("late")
    assert transfers.seal(7, 60_000) is None
    assert list(transfers._opened) == [7]
    link.refused.clear()
    link.asked.clear()
    assert link.restarted(link.ask)
    assert link.asked == [("open", 7), ("seal", 7)]
    assert transfers.seal(7, 60_000) is not None
    assert list(transfers._sealed) == [7] and not transfers._opened
