"""The thread that tells the master of an engine, beside a master that keeps what it is told."""

from __future__ import annotations

import threading
import time

import pytest

from kvpool import client_announce
from kvpool.client_announce import EngineAnnouncer, own_address
from kvpool.errors import InvalidArgumentError, UnavailableError
from kvpool.rpc.v1.master_pb2 import AnnounceEngineResponse, EngineAnnouncement


class Master:
    """Can be away."""

    def __init__(self):
        self.away = False
        self.refuses = ""
        self.asked = 0
        self.told = []

    def call(self, method, request, timeout_s):
        assert method == "AnnounceEngine"
        assert timeout_s <= 1
        self.asked += 1
        if self.away:
            raise UnavailableError("away")
        if self.refuses:
            raise InvalidArgumentError(self.refuses, "is not allowed")
        copy = EngineAnnouncement()
        copy.CopyFrom(request)
        self.told.append(copy)
        return AnnounceEngineResponse(ttl_ms=30)


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def master(monkeypatch):
    monkeypatch.setattr(client_announce, "ALIVE_S", 0.01)
    return Master()


@pytest.fixture
def announcer(master):
    announcer = EngineAnnouncer(master.call, "127.0.0.1", 7)
    yield announcer
    announcer.close()


def test_nothing_is_said_before_the_first_word(master, announcer):
    """Most clients are no engines: they have no thread."""
    assert not any(thread.name == "kvpool-announce" for thread in threading.enumerate())
    announcer.close()
    assert not master.asked


def test_what_is_said_adds_up_and_is_said_again_and_again(master, announcer):
    """Later words replace earlier ones of the same field; the owner stays."""
    announcer.say(engine="e", role="kv_both", namespaces=[b"1"], transfers=True)
    announcer.say(namespaces=[b"2", b"3"], transfers=False)
    wait_for(lambda: master.told and len(master.told[-1].namespaces) == 2)
    seen = len(master.told)
    wait_for(lambda: len(master.told) > seen + 3)
    last = master.told[-1]
    assert (last.owner, last.engine, last.role, last.transfers) == (7, "e", "kv_both", False)
    assert list(last.namespaces) == [b"2", b"3"]
    assert last.host
    assert last.boot_id


def test_a_port_alone_is_one_of_this_host(master, announcer):
    """At the address by which the master sees it."""
    announcer.say(address=":8100")
    wait_for(lambda: master.told)
    assert master.told[-1].address == "127.0.0.1:8100"
    announcer.say(address="other:1")
    wait_for(lambda: master.told[-1].address == "other:1")


def test_addresses_that_lead_nowhere():
    """Are none; IPv6 is as good."""
    assert own_address("no.such.host.invalid") == ""
    assert own_address("::1") in {"::1", ""}


def test_a_master_that_is_away_is_told_when_it_is_back(master, announcer, caplog):
    """And one that refuses is named in the log, once."""
    master.away = True
    announcer.say(engine="e")
    wait_for(lambda: master.asked > 2)
    master.away = False
    wait_for(lambda: master.told)
    master.refuses = "engine"
    asked = master.asked
    wait_for(lambda: master.asked > asked + 3)
    assert [record.levelname for record in caplog.records if "does not take" in record.message] == ["WARNING"]


def test_the_end_is_said(master, announcer):
    """Once, and nothing after it."""
    announcer.say(engine="e")
    wait_for(lambda: master.told)
    announcer.close()
    assert master.told[-1].bye
    assert master.told[-1].owner == 7
    asked = master.asked
    announcer.say(engine="f")
    assert master.asked == asked


def test_what_no_engine_has_is_refused(announcer):
    """At once, at the caller."""
    with pytest.raises(InvalidArgumentError):
        announcer.say(colour="red")
