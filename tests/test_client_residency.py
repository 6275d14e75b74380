"""The thread that tells the master what an engine holds, beside a master that answers from the real state."""

from __future__ import annotations

import threading
import time
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool import client_residency
from kvpool.client_residency import ResidencyReporter
from kvpool.core.keytable import as_words
from kvpool.core.residency import Residency
from kvpool.errors import InvalidArgumentError, UnavailableError
from kvpool.model import Namespace, split_keys
from kvpool.rpc.v1.master_pb2 import MasterFrameReply, ResidencyResponse
from kvpool.server.wire import report_from_proto

SPACE = Namespace(model="demo")
KEYS = [blake2b(bytes([i]), digest_size=16).digest() for i in range(64)]


def packed(*numbers):
    return b"".join(KEYS[n] for n in numbers)


class Master:
    """Takes reports as the server does; can be away, and can be restarted."""

    def __init__(self):
        self.lock = threading.Lock()
        self.away = False
        self.reports = []
        self.restart()

    def restart(self):
        with self.lock:
            self.residency = Residency(60.0)

    def ask(self, frame, payload, timeout_s):
        with self.lock:
            if self.away:
                raise UnavailableError("away")
            self.reports.append((frame.residency, payload))
            again = self.residency.report(report_from_proto(frame.residency, payload), 0.0)
            return MasterFrameReply(residency=ResidencyResponse(again=again))

    def held(self):
        with self.lock:
            found = list(self.residency.holders(as_words(packed(*range(64))), {SPACE.digest}))
        return {n for _, _, _, at in found for n in at.tolist()}


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing is gathered for long, and small reports make many."""
    monkeypatch.setattr(client_residency, "GATHER_S", 0.001)
    monkeypatch.setattr(client_residency, "ALIVE_S", 0.05)
    monkeypatch.setattr(client_residency, "KEYS_PER_REPORT", 3)


@pytest.fixture
def master():
    return Master()


@pytest.fixture
def reporter(master):
    reporter = ResidencyReporter(master.ask, "engine")
    yield reporter
    reporter.close()
    assert reporter._thread is None or not reporter._thread.is_alive()


def test_the_master_comes_to_hold_what_the_engine_does(master, reporter):
    """Whatever is lost on the way: away for a while, restarted, restarted while away."""
    reporter.report(SPACE, packed(*range(10)), b"", cleared=False)
    wait_for(lambda: master.held() == set(range(10)))
    master.away = True
    reporter.report(SPACE.digest, packed(20), packed(0, 1), cleared=False)
    master.restart()
    master.away = False
    wait_for(lambda: master.held() == {*range(2, 10), 20})
    master.restart()
    wait_for(lambda: master.held() == {*range(2, 10), 20})
    reporter.report(SPACE, packed(5, 6), b"", cleared=True)
    wait_for(lambda: master.held() == {5, 6})


@given(st.lists(st.tuples(st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9)), st.booleans()), max_size=12))
@settings(max_examples=40, deadline=None)
def test_changes_that_wait_together_end_the_same(steps):
    """Only the last word on a key is sent, in reports of bounded size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_residency, "KEYS_PER_REPORT", 3)
        master, reporter = Master(), ResidencyReporter(None, "engine")
        reporter._master = master.ask
        reporter._thread = threading.current_thread()  # this one
        held = set()
        reporter._anew = reporter._tell(reporter._take())
        for added, removed, cleared in steps:
            reporter.report(SPACE, packed(*added), packed(*removed), cleared=cleared)
            held = (set() if cleared else held) - removed | added
        assert not reporter._tell(reporter._take())
        assert master.held() == held
        assert all(len(keys) <= 3 * 16 for _, keys in master.reports)


def test_reporting_never_waits_and_what_piles_up_is_forgotten(master, reporter, monkeypatch):
    """A master that does not answer costs no memory: the engine is then said to hold what came after."""
    monkeypatch.setattr(client_residency, "CHANGES_MAX", 20)
    hold = threading.Event()
    ask = master.ask
    monkeypatch.setattr(reporter, "_master", lambda *arguments: hold.wait(20) and ask(*arguments))
    for _ in range(3):
        reporter.report(SPACE, packed(*range(10)), b"", cleared=False)
    wait_for(lambda: reporter.dropped or reporter.report(SPACE, packed(*range(10)), b"", cleared=False))
    assert reporter.dropped
    assert sum(len(changes.held) for changes in reporter._changes.values()) <= 20
    reporter.report(SPACE, packed(40), b"", cleared=True)
    hold.set()
    wait_for(lambda: master.held() == {40})


def test_goodbye(master):
    """An engine that ends takes its blocks along."""
    reporter = ResidencyReporter(master.ask, "engine")
    reporter.report(SPACE, packed(1), b"", cleared=False)
    wait_for(lambda: master.held() == {1})
    reporter.close()
    assert not master.residency.engines
    reporter.report(SPACE, packed(2), b"", cleared=False)
    assert not master.residency.engines


def test_bad_reports_are_refused(reporter):
    """By the field's name, before anything is queued."""
    for field, arguments in (
        ("added", (SPACE, b"odd", b"")),
        ("removed", (SPACE, b"", b"odd")),
        ("namespace", (b"short", b"", b"")),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            reporter.report(*arguments, cleared=False)
        assert caught.value.field == field
    assert split_keys(packed(1)) == [KEYS[1]] and not reporter._changes
