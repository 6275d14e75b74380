"""Nodes and masters that hang: soon nobody waits for them any more, and they are used again when they answer."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvpool import Client
from kvpool.client_results import GetResult
from kvpool.rpc.v1.node_pb2 import Get, NodeFrame
from kvpool.transport.channel import Channel
from tests.integration.pool import SPACE, Pool, T, chain_of, content_of, free_port, get_chain, put_chain, wait_for
from tests.integration.slow import SlowProxy

SIZE = 64 << 10
KEYS = chain_of(1, 16)
OTHERS = chain_of(2, 16)
QUICK_PROBES = {"breaker_probe_interval_ms": 200}
ALL_REFUSED = {"breaker_open": len(KEYS)}


@contextlib.contextmanager
def hanging(pool: Pool, proxy: SlowProxy, how: str) -> Iterator[None]:
    """Stop node b, or delay its answers."""
    if how == "stopped":
        with pool.nodes["b"].stopped():
            yield
    else:
        proxy.delay_s = 2.0
        yield
        proxy.delay_s = 0.0


@pytest.mark.parametrize("how", ["stopped", "delayed"])
def test_node_that_hangs_is_left_alone_until_it_answers(bare_pool: Pool, how: str) -> None:
    """After a few timeouts reads and writes are refused without asking it; a probe finds it well again."""
    pool, port = bare_pool, free_port()
    pool.start_master()
    pool.start_node("b", "--port", str(port), "--advertise_host", "127.0.0.2", "--segment_size", "64MB")
    with SlowProxy("127.0.0.2", port) as proxy:
        put_chain(pool.client("b"), SPACE, KEYS, SIZE)
        client = pool.client(breaker_failures=2, **QUICK_PROBES)
        wait_for(lambda: client.lookup(SPACE, KEYS).prefix == len(KEYS), "the blocks are known")
        lookup = client.lookup(SPACE, KEYS, timeout_ms=1000 * T)

        def read() -> GetResult:
            result: GetResult = get_chain(client, SPACE, KEYS, SIZE, lookup=lookup)
            return result

        assert read().prefix == len(KEYS)
        first = chain_of(3, 1)
        assert not client.put(SPACE, first, [content_of(key, SIZE) for key in first]).failed
        # The master soon stops naming a node that is stopped: it is used as the master has named it now.
        client._puts._placed = (client._puts._placed[0], time.monotonic() + T)
        with hanging(pool, proxy, how):
            # At once, so that the breaker opens before the master stops naming a node that is stopped.
            with ThreadPoolExecutor(2) as threads:
                for result in [threads.submit(read) for _ in range(2)]:
                    assert result.result().reasons == {"owner_lost": len(KEYS)}
            wait_for(lambda: read().reasons == ALL_REFUSED, "the breaker opens", 5.0)
            assert client.unusable_nodes() == {f"b@127.0.0.2:{port}"}
            # Probes that fail do not let a call through.
            opened = client.stats()["breaker.opened.b"]
            for _ in range(100):
                assert read().reasons == ALL_REFUSED
            assert client.put(SPACE, OTHERS, [content_of(k, SIZE) for k in OTHERS]).errors == ALL_REFUSED
            counters = client.stats()
            assert (counters["breaker.open.b"], counters["breaker.opened.b"]) == (1, opened)
            assert counters["breaker.rejected.b"] > 100
        wait_for(lambda: read().prefix == len(KEYS), "it is asked again")
        assert client.unusable_nodes() == set()
        assert client.stats()["breaker.open.b"] == 0


def test_readers_that_take_nothing_keep_nobody_else_waiting(bare_pool: Pool) -> None:
    """Each has a thread of the node's to itself until it is given up: others are answered in time meanwhile."""
    pool, size = bare_pool, 1 << 20
    pool.start_master()
    pool.start_node("b", "--segment_size", "64MB")
    put_chain(pool.client("b"), SPACE, KEYS, size)
    client = pool.client()
    wait_for(lambda: client.lookup(SPACE, KEYS).prefix == len(KEYS), "the blocks are known")
    ((address, _),) = {
        (address, backend)
        for run in client.lookup(SPACE, KEYS, timeout_ms=1000 * T).runs
        for address, _, _, backend in run.owners
    }
    with contextlib.ExitStack() as held:
        channels = [
            held.enter_context(contextlib.closing(Channel.connect_tcp(address.host, address.port, T)))
            for _ in range(24)
        ]
        for channel in channels:
            everything = NodeFrame(get=Get(namespace=SPACE.digest, shards=[0]))
            channel.start(everything, b"".join(KEYS), timeout_s=T)
        wait_for(lambda: not any(channel.is_usable() for channel in channels), "each has its first bytes")
        result = get_chain(client, SPACE, KEYS, size)
        assert result.prefix == len(KEYS), result
        assert not client.unusable_nodes()


@contextlib.contextmanager
def client_behind(pool: Pool, data_port: int) -> Iterator[tuple[Client, SlowProxy]]:
    """Yield a client without a node, and what its lookups pass through."""
    with (
        SlowProxy("127.0.0.2", pool.port),
        SlowProxy("127.0.0.2", data_port) as lookups,
        Client(f"127.0.0.2:{pool.port}", node=pool.socket_path("none"), breaker_failures=2, **QUICK_PROBES) as client,
    ):
        yield client, lookups


def test_master_whose_lookups_time_out_is_left_alone_until_they_do_not(bare_pool: Pool) -> None:
    """It shakes hands in time, so only the breaker keeps every lookup from waiting for its timeout."""
    pool, data_port = bare_pool, free_port()
    pool.start_master("--data_port", str(data_port))
    pool.start_node("a")
    put_chain(pool.client("a"), SPACE, KEYS, SIZE)
    with client_behind(pool, data_port) as (client, lookups):
        wait_for(lambda: client.lookup(SPACE, KEYS).prefix == len(KEYS), "the blocks are known")
        lookups.delay_s = 2.0
        wait_for(lambda: client.lookup(SPACE, KEYS).reason == "breaker_open", "the breaker opens", 5.0)
        assert client.lookup(SPACE, KEYS).prefix == 0
        assert client.stats()["breaker.open.master"] == 1
        lookups.delay_s = 0.0
        wait_for(lambda: client.lookup(SPACE, KEYS).reason == "complete", "it is asked again")
        assert client.stats()["breaker.open.master"] == 0


def test_with_master_and_node_stopped_no_lookup_waits_for_either(pool: Pool) -> None:
    """This host's node answers for the master until it hangs as well; both are found again."""
    client = pool.client("a", breaker_failures=2, **QUICK_PROBES)
    put_chain(client, SPACE, KEYS, SIZE)
    wait_for(lambda: client.lookup(SPACE, KEYS).reason == "complete", "the blocks are known")
    with pool.master.stopped():
        wait_for(lambda: client.lookup(SPACE, KEYS).reason != "complete", "the master is missed")
        wait_for(lambda: client.lookup(SPACE, KEYS).prefix == len(KEYS), "the node answers for it")
        with pool.nodes["a"].stopped():

            def left_alone() -> bool:
                assert client.lookup(SPACE, KEYS).prefix == 0
                return client.stats().get("breaker.open.this host") == 1

            wait_for(left_alone, "the breaker opens", 5.0)
        wait_for(lambda: client.lookup(SPACE, KEYS).prefix == len(KEYS), "the node is asked again")
    wait_for(lambda: client.lookup(SPACE, KEYS).reason == "complete", "the master is asked again")


def test_stopped_local_node_is_unusable_until_it_is_attached_again(pool: Pool) -> None:
    """Reads and writes go on without it, and use it as soon as it answers."""
    client = pool.client("a", **QUICK_PROBES)
    put_chain(client, SPACE, KEYS, SIZE)
    with pool.nodes["a"].stopped():
        wait_for(lambda: get_chain(client, SPACE, KEYS, SIZE).prefix == 0, "it is missed")
        assert client.unusable_nodes() == {"a"}
    wait_for(lambda: get_chain(client, SPACE, KEYS, SIZE).tiers == {"local": len(KEYS)}, "it is used again")
    assert client.unusable_nodes() == set()


def test_node_that_is_back_at_another_address_is_asked_there(bare_pool: Pool) -> None:
    """What is left alone is its old address; what was counted of it under its name is only ever added to."""
    pool, seen = bare_pool, Counter[str]()
    pool.start_master()
    client = pool.client(breaker_failures=2, **QUICK_PROBES)
    for _ in range(2):
        pool.start_node("b", "--port", str(free_port()))
        put_chain(pool.client("b"), SPACE, KEYS, SIZE)
        wait_for(lambda: client.lookup(SPACE, KEYS).prefix == len(KEYS), "the blocks are known")
        lookup = client.lookup(SPACE, KEYS, timeout_ms=1000 * T)
        (owner,) = {owner for run in lookup.runs for owner, *_ in run.owners}
        assert client.unusable_nodes().isdisjoint({owner.node_id, owner.place})
        assert get_chain(client, SPACE, KEYS, SIZE, lookup=lookup).prefix == len(KEYS)
        pool.nodes["b"].kill()
        wait_for(lambda: get_chain(client, SPACE, KEYS, SIZE, lookup=lookup).reasons == ALL_REFUSED, "it is left alone")  # noqa: B023
        assert owner.place in client.unusable_nodes()
        now = Counter({name: count for name, count in client.stats().items() if not name.startswith("breaker.open.")})
        assert now > seen
        seen = now
        wait_for(lambda: client.lookup(SPACE, KEYS).prefix == 0, "the master has noticed")
