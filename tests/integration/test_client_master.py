"""The client's way to the master where only the gRPC port is open."""

import socket
import time

from kvpool import Client, Namespace, client_master
from kvpool.client_lookup import Also
from kvpool.transport import dialing
from tests.integration.pool import chain_of, wait_for


def test_lookups_fall_back_to_grpc(pool, monkeypatch):
    """A data port that cannot be reached costs speed, nothing else: lookups and leases go over gRPC."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        connect = client_master.Channel.connect_tcp
        monkeypatch.setattr(
            client_master.Channel,
            "connect_tcp",
            lambda host, port, timeout_s: connect(host, closed.getsockname()[1], timeout_s),
        )
        with Client(pool.address, node="") as client:
            answer = client.lookup(Namespace("grpc only"), [bytes(16)], lease=True, timeout_ms=10_000)
            assert answer.reason == "not_stored"
            assert client.renew([12345]) == [12345]


def test_a_slow_resolver_is_no_firewall(pool, monkeypatch):
    """The data port is used as soon as the master's name is found, however little time a connection has."""
    look_up = socket.getaddrinfo

    def slow(host, port, **more):
        if host == "localhost" and not more["flags"]:
            time.sleep(0.7)
        return look_up(host, port, **more)

    monkeypatch.setattr(dialing, "names", dialing.Names())
    monkeypatch.setattr(client_master, "names", dialing.names)
    monkeypatch.setattr(socket, "getaddrinfo", slow)
    monkeypatch.setattr(client_master, "DATA_PORT_S", 0.5)
    with Client(f"localhost:{pool.port}", node="") as client:
        wait_for(lambda: client._link.up, "the master is found")
        assert client._link._pool is not None


def test_puts_go_on_without_the_master(pool):
    """A client without a node of its own goes on with the node that the master named last."""
    client = pool.client()
    space = Namespace("placed before")
    client.register(space)
    assert client.put(space, chain_of(1, 2), [bytes(64)] * 2).stored == 2
    pool.master.kill()
    wait_for(lambda: client.lookup(space, chain_of(1, 2)).reason == "no_pool", "the client knows")
    named_until = client._puts._placed[1]
    wait_for(lambda: time.monotonic() > named_until, "it would ask the master again")
    for number in (2, 3):  # after asking in vain, and after that
        assert client.put(space, chain_of(number, 2), [bytes(64)] * 2).stored == 2
    pool.start_master()


def test_a_restarted_master_is_told_until_it_has_listened(pool):
    """Of what the last one knew; once is enough when it did."""
    client = pool.client("a")
    told = []

    def tell(ask):
        told.append(ask)
        if len(told) == 1:
            client._link._drop()  # as an answer that is late does
        return len(told) > 1

    client._link.restarted = tell
    pool.master.kill()
    away = {"no_pool", "breaker_open", "master_unreachable"}
    wait_for(lambda: client.lookup(Namespace("gone"), [bytes(16)]).reason in away, "the client knows")
    pool.start_master()
    wait_for(lambda: len(told) == 2, "it is told again")
    wait_for(lambda: not client._link._restarted, "that was enough")


def test_a_first_lookup_waits_for_a_stopped_master_no_longer_than_any(pool):
    """Its namespace is announced in the lookup's own time; the link's thread does it once the master is back."""
    client, *more = [pool.client("a") for _ in range(3)]  # a stall of the machine's own is no finding
    one, others = Namespace("first"), [Namespace("first", kv_group=str(number)) for number in range(3)]
    with pool.master.stopped():

        def took(some):
            begin = time.monotonic()
            some.lookup(one, chain_of(1, 2), also=[Also(space) for space in others])
            return time.monotonic() - begin

        assert any(took(some) < 0.5 for some in (client, *more))
    for space in (one, *others):
        wait_for(lambda space=space: client.lookup(space.digest, chain_of(1, 2)).reason == "not_stored", "it is known")


def test_a_first_lookup_waits_for_a_stopped_node_no_longer_than_any(pool):
    """The node is told later, by another thread, whether or not it counts as lost meanwhile."""
    client, *more = [pool.client("a") for _ in range(3)]
    space = Namespace("first")
    with pool.nodes["a"].stopped():

        def took(some):
            begin = time.monotonic()
            some.lookup(space, chain_of(1, 2))
            return time.monotonic() - begin

        assert any(took(some) < 0.5 for some in (client, *more))

    def told() -> bool:
        node = client._own.get()
        return node is not None and space.digest in node._registered

    wait_for(told, "the node knows it")
    assert client.put(space, chain_of(1, 2), [bytes(64)] * 2).stored == 2
