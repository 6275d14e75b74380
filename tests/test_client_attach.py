"""Where a client looks for its host's node."""

import threading

import numpy as np

from kvpool import Client, Namespace, client_own
from kvpool.client_own import OwnNode


def test_a_place_that_cannot_be_looked_into_is_no_node(monkeypatch):
    """The socket's directory may belong to somebody else, or be no path at all: the client starts without a node."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/" + 300 * "x")  # as root, permissions would not stop anybody
    with Client("127.0.0.1:1") as client:
        stored = client.put(Namespace("demo"), [b"\1" * 32], [np.zeros(512, np.uint8)])
    assert (stored.stored, stored.failed) == (0, 1)


def test_an_attach_that_hangs_is_waited_for_by_one_thread(monkeypatch):
    """The others have lookups to do. When it has ended, the next is asked for."""
    monkeypatch.setattr(client_own, "REATTACH_S", 0.0)
    asked, hangs, over = [], threading.Event(), threading.Event()

    class Hung:
        def __init__(self, path, name):
            hangs.set()
            assert over.wait(10)
            raise client_own.KVPoolError("it says nothing")

    def submit(work):
        asked.append(threading.Thread(target=work))
        asked[-1].start()

    monkeypatch.setattr(client_own, "LocalNode", Hung)
    own = OwnNode("/nowhere", "test", list, lambda: None, submit, 1.0)
    for _ in range(5):
        assert own.get() is None
        assert hangs.wait(10)
    assert len(asked) == 1
    over.set()
    asked[0].join(10)
    own.get()
    assert len(asked) == 2
    asked[1].join(10)


def test_a_first_attach_that_failed_is_tried_again_soon_although_there_is_a_master(monkeypatch):
    """The master's list is asked for every few seconds only: so long an engine would be without its node."""
    monkeypatch.setattr(client_own, "REATTACH_S", 0.0)
    tried = []

    class Late:
        def __init__(self, path, name):
            tried.append(path)
            raise client_own.KVPoolError("it is late")

    monkeypatch.setattr(client_own, "LocalNode", Late)
    own = OwnNode("/nowhere", "test", list, list, lambda work: work(), 1.0)
    own.attach()  # as the master's thread does
    own.get()
    assert tried == ["/nowhere"] * 2


def test_an_attach_that_no_thread_could_be_had_for_is_asked_for_again(monkeypatch):
    """Refused once, it is not taken for one that runs."""
    monkeypatch.setattr(client_own, "REATTACH_S", 0.0)
    asked = []

    def refuse(work):
        asked.append(work)
        raise RuntimeError("can't start new thread")

    own = OwnNode("/nowhere", "test", list, lambda: None, refuse, 1.0)
    assert [own.get(), own.get()] == [None, None]
    assert len(asked) == 2
