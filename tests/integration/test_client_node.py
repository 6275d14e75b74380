"""Puts that end in the middle, by an exception that is none of the pool's: nothing stays reserved."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from kvpool import client_bytes, client_copies, client_node
from kvpool.transport.channel import Channel
from tests.integration.pool import SPACE, T, chain_of, content_of, environment, get_chain, put_chain, wait_for

SIZE = 16 << 10


def refused_once(monkeypatch, place, name: str, error: BaseException, after: bool = False) -> None:
    """Have a function raise when this thread calls it next: at once, or after it has done its work."""
    right, caller = getattr(place, name), threading.get_ident()

    def wrong(*arguments, **named):
        if threading.get_ident() != caller:
            return right(*arguments, **named)
        monkeypatch.setattr(place, name, right)
        if after:
            right(*arguments, **named)
        raise error

    monkeypatch.setattr(place, name, wrong)


def put_in_vain(client, keys, error: type[BaseException]) -> None:
    with pytest.raises(error):
        client.put(SPACE, keys, [content_of(key, SIZE) for key in keys])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=repr)
@pytest.mark.parametrize("where", ["copy_in", "pack_digests"])
def test_what_is_reserved_is_given_back(pool, monkeypatch, where, error):
    """At once, on the channel that reserved it: the node stays attached, and others store the blocks."""
    client, other, keys = pool.client("a"), pool.client("a"), chain_of(1, 8)
    node = client._own.node
    refused_once(monkeypatch, client_node, where, error)
    put_in_vain(client, keys, type(error))
    assert put_chain(other, SPACE, keys, SIZE) == 8
    assert client._own.node is node and node.alive
    assert get_chain(client, SPACE, keys, SIZE).prefix == 8


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=repr)
def test_an_answer_that_nobody_waits_for_is_read_by_nobody_else(pool, monkeypatch, error):
    """Interrupted while the node looks for room: the channel is closed, and what it reserved is free again soon."""
    client, other, keys = pool.client("a"), pool.client("a"), chain_of(1, 8)
    put_chain(client, SPACE, chain_of(2, 1), SIZE)
    refused_once(monkeypatch, client_node, "hash_layers", error)
    put_in_vain(client, keys, type(error))
    assert not client._own.node._pool._idle
    wait_for(lambda: client.has_node() and put_chain(other, SPACE, keys, SIZE) == 8, "others store the blocks")
    assert get_chain(client, SPACE, keys, SIZE).prefix == 8


def test_a_commit_that_is_interrupted_leaves_nothing_reserved(pool, monkeypatch):
    """Whether it has reached the node or not: the blocks are there, or others store them."""
    client, other, keys = pool.client("a"), pool.client("a"), chain_of(1, 8)
    put_chain(client, SPACE, chain_of(2, 1), SIZE)
    refused_once(monkeypatch, Channel, "_receive_header", KeyboardInterrupt())
    put_in_vain(client, keys, KeyboardInterrupt)  # the answer to Reserve
    wait_for(lambda: client.has_node() and put_chain(other, SPACE, keys, SIZE) == 8, "it is attached anew, and free")
    keys = chain_of(3, 8)
    refused_once(monkeypatch, Channel, "call", KeyboardInterrupt(), after=True)
    put_in_vain(client, keys, KeyboardInterrupt)  # the commit, which the node has done
    assert client.has_node()
    wait_for(lambda: put_chain(other, SPACE, keys, SIZE) == 0, "the blocks are there")
    assert get_chain(other, SPACE, keys, SIZE).prefix == 8


def test_layers_that_cannot_be_begun_leave_no_answer_behind(pool, monkeypatch):
    """A put of layers that is interrupted as it reserves closes its channel too."""
    client, other, keys = pool.client("a"), pool.client("a"), chain_of(1, 8)
    client.register(SPACE)
    refused_once(monkeypatch, Channel, "finish", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        client.put_layers(SPACE, keys, shard=0, shard_bytes=SIZE, transfer=1)
    assert not client._own.node._long._idle
    wait_for(lambda: client.has_node() and put_chain(other, SPACE, keys, SIZE) == 8, "others store the blocks")


class Interrupted(BaseException):
    """As KeyboardInterrupt, which would end more than a test that fails."""


def test_a_reservation_is_kept_while_a_thread_still_copies(pool, monkeypatch):
    """Interrupted as it waits for the others: the slots are given back when they have ended, not before."""
    client, keys, caller = pool.client("a"), chain_of(1, 2), threading.get_ident()
    both, aborted = threading.Barrier(2), threading.Event()
    interrupted: list[bool] = []
    ended: list[bool] = []
    given: list[int] = []
    call = Channel.call

    def interrupt(*_):
        interrupted.append(True)
        if not ended:
            raise Interrupted

    def slow(*_):
        both.wait(T)
        if threading.get_ident() != caller:
            while len(interrupted) < 2:  # one that comes just before it blocks is noticed with the next
                signal.pthread_kill(caller, signal.SIGUSR1)
                aborted.wait(0.01)
            ended.append(not aborted.wait(0.3))
        return [0] * SPACE.layers

    def watched(self, frame, *arguments, **named):
        if frame.WhichOneof("body") == "abort":
            given.append(len(ended))
            aborted.set()
        return call(self, frame, *arguments, **named)

    monkeypatch.setattr(client_bytes, "PART_BYTES_MIN", 1)
    monkeypatch.setattr(client_node, "HASH_FIRST_BYTES_MAX", 0)
    monkeypatch.setattr(client_copies, "copy_hashed", slow)
    monkeypatch.setattr(Channel, "call", watched)
    usual = signal.signal(signal.SIGUSR1, interrupt)
    try:
        put_in_vain(client, keys, Interrupted)
    finally:
        wait_for(lambda: ended, "the thread has ended")
        signal.signal(signal.SIGUSR1, usual)
    assert (given, ended) == ([1], [True])


FORKER = """
import os, signal, sys, threading
from kvpool import client_switching
from kvpool.client_switching import HELD_SWITCH_S, SWITCH_S, held_switching, quick_switching

def interval():
    return round(sys.getswitchinterval(), 6)

usual, begun, over = interval(), threading.Event(), threading.Event()

def transfer():
    with quick_switching:
        begun.set()
        over.wait()

def forked():
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        seen = [interval()]
        with held_switching:
            seen.append(interval())
            with quick_switching:
                seen.append(interval())
        seen.append(interval())
        os._exit(seen != [usual, HELD_SWITCH_S, SWITCH_S, usual])
    return os.waitpid(child, 0)[1]

thread = threading.Thread(target=transfer)
thread.start()
begun.wait()
print(forked())
with client_switching._interval._lock:
    print(forked())
print(interval() == SWITCH_S)
over.set()
thread.join()
print(interval() == usual)
"""


def test_a_forked_child_switches_threads_as_usual():
    """Whose transfer was under way in the parent, or just about to be, goes on there alone."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKER],
        capture_output=True, text=True, timeout=T, check=False, env=environment(),
    )  # fmt: skip
    assert done.stdout.split() == ["0", "0", "True", "True"], done.stderr
