"""The ways to the master, one after the other."""

from __future__ import annotations

from typing import Any

import pytest

from kvpool.client_health import Health
from kvpool.client_master import MasterLink
from kvpool.errors import UnavailableError
from kvpool.transport.channel import ChannelPool


class Way:
    """A channel of which nobody answers."""

    broken = False
    payload_left = 0

    def is_usable(self) -> bool:
        return True

    def close(self) -> None:
        self.broken = True


def ways() -> ChannelPool:
    made: Any = lambda _: Way()  # noqa: E731
    return ChannelPool(made)


def test_a_late_failure_closes_no_way_that_was_found_since(monkeypatch: pytest.MonkeyPatch) -> None:
    """The master has been there again for long when a question to the one before meets its deadline."""
    monkeypatch.setattr(MasterLink, "_keep", lambda _: None)
    link = MasterLink("127.0.0.1:1", "test", lambda: None, Health(3, 1.0), 0.1)
    old, new = ways(), ways()
    link._use(old)

    def fail_late(meanwhile: ChannelPool | None) -> None:
        with link._channel(1.0):
            if meanwhile is not None:
                link._use(meanwhile)
            raise UnavailableError("deadline exceeded")

    with pytest.raises(UnavailableError):
        fail_late(new)
    assert link.up
    assert link._pool is new
    assert not link._wake.is_set()
    with pytest.raises(UnavailableError):
        fail_late(None)
    assert not link.up
    assert link._wake.is_set()
    link.close()
