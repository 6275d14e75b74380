"""Connecting within a time that includes the look-up of a name, whose resolver may be away."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kvpool.transport import dialing
from kvpool.transport.dialing import Names, dial

T = 10.0
NAME = "node-1.kvpool.example"


class Resolver:
    """What the system's resolver says of names, when its gate is open; numbers need none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.asked = 0
        self.answered = threading.Semaphore(0)
        self.says: list[str] = ["127.0.0.1"]
        self._real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self._look_up)

    def _look_up(self, host: str, port: int, **more: Any) -> Any:
        if more.get("flags") == socket.AI_NUMERICHOST:
            return self._real(host, port, **more)
        self.asked += 1
        assert self.gate.wait(T)
        self.answered.release()
        if not self.says:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [answer for address in self.says for answer in self._real(address, port, **more)]

    def wait_asked(self, count: int) -> None:
        """Wait until it was asked so often, by threads that may begin late, and no more than that."""
        deadline = time.monotonic() + T
        while self.asked < count:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert self.asked == count


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    monkeypatch.setattr(dialing, "names", Names())
    return Resolver(monkeypatch)


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def hosts(found: dialing.Addresses) -> list[str]:
    return [address[0] for _, address in found]


def wait_until(names: Names, host: str, *, asked: bool) -> None:
    with names._changed:
        assert names._changed.wait_for(lambda: names._names[host, 1].asked == asked, T)


def test_a_resolver_that_is_away_costs_no_more_than_the_time_given(resolver: Resolver, port: int) -> None:
    """One thread waits for it, however many ask; once it has answered nobody waits."""
    resolver.gate.clear()
    for _ in range(3):
        begin = time.monotonic()
        with pytest.raises(TimeoutError, match="name"):
            dial(NAME, port, 0.05)
        assert time.monotonic() - begin < 5
    resolver.wait_asked(1)
    resolver.gate.set()
    for _ in range(3):
        dial(NAME, port, T).close()
    assert resolver.asked == 1


def test_numbers_are_not_looked_up(resolver: Resolver, port: int) -> None:
    """They are the address."""
    resolver.gate.clear()
    dial("127.0.0.1", port, T).close()
    assert hosts(Names().find("::1", 1, T)) == ["::1"]
    assert resolver.asked == 0


def test_what_was_known_last_is_used_while_it_is_looked_up_anew(
    resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resolver that is away, or has lost the name, takes away no address."""
    monkeypatch.setattr(dialing, "FRESH_S", 0.0)
    names = Names()
    assert hosts(names.find(NAME, 1, T)) == ["127.0.0.1"]
    resolver.gate.clear()
    resolver.says = ["127.0.0.2"]
    for _ in range(2):
        assert hosts(names.find(NAME, 1, 0.0)) == ["127.0.0.1"]
    resolver.wait_asked(2)
    resolver.gate.set()
    wait_until(names, NAME, asked=False)
    resolver.says = []
    assert hosts(names.find(NAME, 1, 0.0)) == ["127.0.0.2"]
    wait_until(names, NAME, asked=False)
    assert hosts(names.find(NAME, 1, 0.0)) == ["127.0.0.2"]
    wait_until(names, NAME, asked=False)  # or the last one would ask in the next test


def test_who_must_have_it_fresh_waits_for_it(resolver: Resolver) -> None:
    """What was found a moment ago may be where nobody is any more; what cannot be had in time is what was known."""
    names = Names()
    assert hosts(names.find(NAME, 1, T)) == ["127.0.0.1"]
    resolver.says = ["127.0.0.2"]
    assert hosts(names.find(NAME, 1, T)) == ["127.0.0.1"]
    assert hosts(names.find(NAME, 1, T, fresh=True)) == ["127.0.0.2"]
    resolver.gate.clear()
    with pytest.raises(TimeoutError):
        names.find(NAME, 1, 0.01, fresh=True)
    assert hosts(names.find(NAME, 1, 0.01)) == ["127.0.0.2"]
    resolver.gate.set()
    wait_until(names, NAME, asked=False)  # as above


def test_a_name_that_nobody_knows_says_so(resolver: Resolver) -> None:
    """And is looked up again by the next who asks."""
    resolver.says = []
    for _ in range(2):
        with pytest.raises(OSError, match="not known"):
            dial(NAME, 1, T)
    assert resolver.asked == 2


def test_a_name_that_leads_to_nobody_is_looked_up_anew(resolver: Resolver, port: int) -> None:
    """It may have moved."""
    resolver.says = ["127.0.0.2"]
    with pytest.raises(OSError, match="refused"):
        dial(NAME, port, T)
    resolver.says = ["127.0.0.1"]
    resolver.gate.clear()  # until it is known that nobody answers there
    with pytest.raises(OSError, match="refused"):
        dial(NAME, port, T)
    resolver.gate.set()
    with dialing.names._changed:
        assert dialing.names._changed.wait_for(lambda: not dialing.names._names[NAME, port].asked, T)
    dial(NAME, port, T).close()
    assert resolver.asked == 2


def test_addresses_share_the_time(resolver: Resolver, monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """One that is silent leaves the others their part, and the last has all that is left."""
    given: list[float] = []

    def connect(family: int, address: Any, timeout_s: float) -> socket.socket:
        given.append(timeout_s)
        raise TimeoutError("timed out")

    monkeypatch.setattr(dialing, "_connect", connect)
    monkeypatch.setattr(dialing, "time", SimpleNamespace(monotonic=lambda: 100.0))
    resolver.says = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    with pytest.raises(TimeoutError):
        dial(NAME, port, 3.0)
    assert [round(seconds, 1) for seconds in given] == [1.0, 1.5, 3.0]


@pytest.mark.parametrize("port", [0, -1, 1 << 16, (1 << 16) + 80])
def test_ports_are_not_cut_to_what_fits(resolver: Resolver, port: int) -> None:
    """The C library would connect to another one."""
    with pytest.raises(OSError, match="port"):
        dial("127.0.0.1", port, T)
