"""What operators have: kvpoolctl, health, reflection, protected mode, on a real pool."""

from __future__ import annotations

import json
import socket
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvpool import Client, Namespace
from kvpool.errors import RefusedError
from kvpool.rpc.v1.node_pb2 import LocalPrefix, NodeFrame, NodeFrameReply
from kvpool.transport.channel import Channel
from tests.integration.pool import SPACE, Pool, T, chain_of, get_chain, put_chain, run_module, wait_for

SIZE = 64 << 10
KEYS = chain_of(1, 16)
HASHES = ",".join(key.hex() for key in KEYS)


def ctl(pool: Pool, *arguments: str, code: int = 0) -> str:
    """Run kvpoolctl and return what it prints."""
    done = run_module("kvpool.cli.ctl", "--master", pool.address, *arguments)
    assert done.returncode == code, (arguments, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stdout if code in {0, 1} else done.stderr


def ctl_json(pool: Pool, *arguments: str, code: int = 0) -> Any:
    return json.loads(ctl(pool, "--json", *arguments, code=code))


def test_kvpoolctl_shows_a_pool_and_drops_blocks(pool: Pool) -> None:
    """Status, nodes, namespaces, lookup and evict agree with what was stored, for people and for scripts."""
    for name in ("a", "b"):
        put_chain(pool.client(name), SPACE, KEYS if name == "a" else chain_of(2, 8), SIZE)
    wait_for(lambda: pool.blocks() == 24, "the blocks are known")
    status = ctl_json(pool, "status")
    assert (status["blocks"], status["nodes_live"], status["nodes_known"], status["warming"]) == (24, 2, 2, False)
    assert status["used_bytes"] >= 24 * SIZE and status["capacity_bytes"] == 128 << 20
    nodes = ctl_json(pool, "nodes")["nodes"]
    assert [(n["node_id"], n["state"], n["blocks"]) for n in nodes] == [("a", "live", 16), ("b", "live", 8)]
    (space,) = ctl_json(pool, "namespaces")["namespaces"]
    assert (space["digest"], space["blocks"], space["bytes"]) == (SPACE.digest.hex(), 24, 24 * SIZE)
    assert space["descriptor"]["model"] == "demo"

    found = ctl_json(pool, "lookup", "--namespace", "demo", "--hashes", HASHES)
    assert (found["prefix"], found["reason"], found["runs"][0]["owners"][0]["node"]) == (16, "complete", "a")
    for table, said in (("status", "24"), ("nodes", "live"), ("namespaces", SPACE.digest.hex())):
        assert said in ctl(pool, table)
    assert "16 of 16 blocks" in ctl(pool, "lookup", "--namespace", SPACE.digest.hex()[:6], "--hashes", HASHES)

    dropped = ctl_json(pool, "evict", "--namespace", "demo", "--hashes", HASHES, "--yes")
    assert dropped == {"blocks": 16, "bytes": 16 * SIZE}
    wait_for(lambda: pool.blocks() == 8, "the blocks are gone")
    client = pool.client("a")
    assert client.lookup(SPACE, KEYS).prefix == 0 and get_chain(client, SPACE, KEYS, SIZE).prefix == 0
    assert ctl_json(pool, "lookup", "--namespace", "demo", "--hashes", HASHES, code=1)["prefix"] == 0
    assert ctl_json(pool, "evict", "--coldest", "1B", "--yes")["blocks"] == 1
    wait_for(lambda: pool.blocks() == 7, "the coldest is gone")
    assert ctl_json(pool, "evict", "--namespace", "demo", "-y")["blocks"] == 7
    wait_for(lambda: pool.blocks() == 0, "all are gone")
    assert ctl_json(pool, "evict", "--coldest", "1GB", "--yes", code=1) == {"blocks": 0, "bytes": 0}


def test_evict_leaves_pinned_blocks_and_takes_leased_ones(pool: Pool) -> None:
    """A lease is a preference that an operator overrides, a pin is a guarantee."""
    client = pool.client("a")
    put_chain(client, SPACE, KEYS, SIZE)
    wait_for(lambda: client.lookup(SPACE, KEYS, lease=True).reason == "complete", "the blocks are known and leased")
    with pool.raw("a") as node:
        pin, _ = node.pin(SPACE, KEYS[:4])
        ctl(pool, "evict", "--namespace", "demo", "--yes")
        wait_for(lambda: client.lookup(SPACE, KEYS).prefix == 4, "only the pinned ones are left")
        assert get_chain(client, SPACE, KEYS, SIZE).prefix == 4
        node.release(pin)
    ctl(pool, "evict", "--namespace", "demo", "--yes")
    wait_for(lambda: client.lookup(SPACE, KEYS).prefix == 0, "now they are gone too")


def test_kvpoolctl_exit_codes(bare_pool: Pool) -> None:
    """1: nothing there, 2: wrong usage, 3: no master; each with one line that says so."""
    pool = bare_pool
    assert f"cannot reach a master at {pool.address}" in ctl(pool, "--timeout", "2s", "status", code=3)
    pool.start_master()
    assert ctl_json(pool, "status")["nodes_known"] == 0
    assert ctl_json(pool, "nodes", code=1) == {"nodes": []}
    assert ctl_json(pool, "namespaces", code=1) == {"namespaces": []}
    ctl(pool, "evict", "--coldest", "1GB", "--yes", code=1)
    for arguments, said in (
        (("lookup", "--namespace", "demo", "--hashes", "xyz"), "hashes: number 1"),
        (("lookup", "--namespace", "demo", "--hashes", "abcd"), "hashes: each hash must have"),
        (("evict", "--coldest", "lots", "--yes"), "coldest: 'lots' is not a size"),
        (("evict", "--yes"), "give either --namespace or --coldest"),
        (("status", "--timeout", "never"), "timeout: 'never'"),
        (("--master", "nowhere", "status"), "master: 'nowhere'"),
        (("stat",), "No such command"),
    ):
        assert said in ctl(pool, *arguments, code=2)
    with pool.master.stopped():
        assert "did not answer within 0.5 s" in ctl(pool, "--timeout", "500ms", "status", code=3)


def test_health_and_reflection_answer(pool: Pool) -> None:
    """Load balancers and grpcurl need nothing of ours."""
    names = {"kvpool.v1.Master", "kvpool.v1.Admin", "kvpool.v1.NodeSession", "grpc.health.v1.Health"}
    with pool.channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "kvpool.v1.Master", "kvpool.v1.Admin", "kvpool.v1.NodeSession"):
            reply = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=T)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError):
            health.Check(health_pb2.HealthCheckRequest(service="none"), timeout=T)
        ask = reflection_pb2.ServerReflectionRequest
        requests = [ask(list_services=""), ask(file_containing_symbol="kvpool.v1.Admin")]
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        listed, described = list(stub.ServerReflectionInfo(iter(requests), timeout=T))
        assert names <= {service.name for service in listed.list_services_response.service}
        assert described.file_descriptor_response.file_descriptor_proto


def other_address() -> str:
    """Return an address of this host that does not look like it: whoever comes from there is refused."""
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family is socket.AF_INET and not address.address.startswith("127."):
                return str(address.address)
    pytest.skip("this host has no address but its loopback")


def test_protected_mode_refuses_other_hosts(bare_pool: Pool) -> None:
    """Without --insecure only loopback is answered; everybody else is told exactly that, on every port."""
    pool, here = bare_pool, other_address()
    pool.start_master("--host", "0.0.0.0")
    pool.start_node("a", "--segment_size", "8MB", "--host", "0.0.0.0")
    put_chain(pool.client("a"), SPACE, KEYS[:4], SIZE)
    done = run_module("kvpool.cli.ctl", "--master", f"{here}:{pool.port}", "status")
    assert done.returncode == 4 and "protected mode" in done.stderr and "--insecure" in done.stderr, done.stderr

    node = pool.statuses()["a"].address
    with (
        Channel.connect_tcp(here, node.port, T) as channel,
        pytest.raises(RefusedError, match=r"protected mode: this node .*--insecure"),
    ):
        channel.call(NodeFrame(local_prefix=LocalPrefix(namespace=SPACE.digest, shards=1)), NodeFrameReply, timeout_s=T)
    with Client(f"{here}:{pool.port}", node=pool.socket_path("none")) as client:
        assert client.lookup(SPACE, KEYS).reason == "no_pool"
    stranger = pool.adopt(
        "stranger",
        ("kvpool.cli.node", "--master", f"{here}:{pool.port}", "--segment_size", "8MB", "--node_id", "stranger",
         "--socket_path", pool.socket_path("stranger")),
    )  # fmt: skip
    wait_for(lambda: stranger.says("protected mode: this master"), "the node is told")
    assert "stranger" not in pool.statuses()


def test_insecure_answers_other_hosts(bare_pool: Pool) -> None:
    """With --insecure lookups, gets and puts go through from an address that is not loopback."""
    pool, here = bare_pool, other_address()
    pool.start_master("--host", "0.0.0.0", "--insecure")
    pool.start_node("a", "--segment_size", "8MB", "--host", "0.0.0.0", "--insecure", "--advertise_host", here)
    with Client(f"{here}:{pool.port}", node=pool.socket_path("none"), transfer_timeout_ms=10_000) as client:
        assert put_chain(client, SPACE, KEYS, SIZE) == len(KEYS)
        wait_for(lambda: client.lookup(SPACE, KEYS).reason == "complete", "the blocks are known")
        result = get_chain(client, SPACE, KEYS, SIZE)
        assert (result.prefix, result.tiers) == (len(KEYS), {"remote": len(KEYS)})
    assert json.loads(run_module("kvpool.cli.ctl", "--master", f"{here}:{pool.port}", "--json", "status").stdout)


def test_mismatched_geometry_is_named(pool: Pool) -> None:
    """The same hashes under another descriptor of the same model are a miss that names the fields."""
    put_chain(pool.client("a"), SPACE, KEYS, SIZE)
    client = pool.client("b")
    other = Namespace(model="demo", layers=4, dtype="float16")
    client.register(other)
    wait_for(lambda: client.lookup(other, KEYS).reason == "namespace_mismatch", "the mismatch is seen")
    assert "dtype" in client.lookup(other, KEYS, timeout_ms=1000 * T).detail
