"""Why a block is not there, what engines hold themselves, who hashes differently, /metrics: on a real pool."""

from __future__ import annotations

import functools
import http.client
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvpool import Namespace
from kvpool.rpc.v1 import admin_pb2, master_pb2, master_pb2_grpc
from tests.integration.pool import SPACE, Pool, T, chain_of, free_port, put_chain, wait_for
from tests.integration.test_operators import ctl, ctl_json

SIZE = 64 << 10
KEYS = chain_of(1, 8)
HEX = [key.hex() for key in KEYS]


def explain(pool: Pool, *keys: str, namespace: str = "", code: int = 1) -> list[dict[str, Any]]:
    """Ask kvpoolctl about keys; exit code 1 means that none is there."""
    where = ("--namespace", namespace) if namespace else ()
    blocks: list[dict[str, Any]] = ctl_json(pool, "explain", *where, *keys, code=code)["blocks"]
    assert [block["key"] for block in blocks] == list(keys)
    return blocks


def test_what_was_never_stored_and_what_is_there(pool: Pool) -> None:
    """Present blocks say where, what nobody stored says so, and what an operator evicted says when and from where."""
    client = pool.client("a")
    put_chain(client, SPACE, KEYS, SIZE)
    wait_for(lambda: client.lookup(SPACE, KEYS, lease=True).reason == "complete", "the blocks are known and leased")
    never = chain_of(9, 1)[0].hex()
    for namespace in ("demo", ""):
        there, missing = explain(pool, HEX[0], never, namespace=namespace, code=0)
        assert (there["verdict"], missing["verdict"]) == ("present", "never_stored")
        assert there["holders"] == [{"name": "a", "tier": "dram", "state": "live", "shards": [0]}]
        assert there["leases"] >= 1 and 0 <= there["last_use_s"] < T and there["namespace"] == SPACE.digest.hex()

    ctl(pool, "evict", "--namespace", "demo", "--hashes", HEX[0], "--yes")
    wait_for(lambda: pool.blocks() == 7, "one is gone")
    for namespace in ("demo", ""):
        (gone,) = explain(pool, HEX[0], namespace=namespace)
        (removal,) = gone["removals"]
        assert (gone["verdict"], removal["why"], removal["node"]) == ("evicted", "operator", "a")
        assert 0 <= removal["age_s"] < T
    table = ctl(pool, "explain", "--namespace", "demo", HEX[0], HEX[1])
    assert "by an operator" in table and "1 of 2 blocks are in the pool" in table and "is remembered" in table
    assert ctl_json(pool, "status")["removals"] == 1


def test_a_namespace_that_differs_is_named_with_both_values(pool: Pool) -> None:
    """The fields in which the namespace that has the key differs from the one asked for."""
    put_chain(pool.client("a"), SPACE, KEYS, SIZE)
    other = Namespace(model="demo", layers=4, dtype="float16", block_tokens=32)
    pool.client("b").register(other)
    wait_for(lambda: pool.blocks() == 8, "the blocks are known")
    (block,) = explain(pool, HEX[0], namespace=other.digest.hex())
    assert (block["verdict"], block["other_namespace"]) == ("namespace_differs", SPACE.digest.hex())
    assert block["differences"] == [
        {"field": "dtype", "here": "float16", "there": "bfloat16"},
        {"field": "block_tokens", "here": "32", "there": "16"},
    ]
    (unregistered,) = explain(pool, HEX[0], namespace="ab" * 16)
    assert (unregistered["verdict"], unregistered["differences"]) == ("namespace_differs", [])
    assert "dtype is 'bfloat16' there, 'float16' here" in ctl(
        pool, "explain", "--namespace", other.digest.hex(), HEX[0], code=1
    ).replace("\n", " ")


def test_a_block_that_is_being_written_is_not_called_never_stored(pool: Pool) -> None:
    """The nodes are asked; a stopped one is named and does not hold up the answer."""
    with pool.raw("a") as node:
        node.register(SPACE)
        reservation, _ = node.reserve(SPACE, KEYS[:1], SIZE)
        (block,) = explain(pool, HEX[0], namespace=SPACE.digest.hex())
        assert block["verdict"] == "being_written"
        assert block["holders"] == [{"name": "a", "tier": "writing", "state": "live", "shards": []}]
        node.abort(reservation)
    (block,) = explain(pool, HEX[0], namespace=SPACE.digest.hex())
    assert block["verdict"] == "never_stored"
    with pool.nodes["b"].stopped():
        data = ctl_json(pool, "explain", "--namespace", SPACE.digest.hex(), HEX[0], code=1)
    assert data["silent"] == ["b"] and data["blocks"][0]["verdict"] == "never_stored"


def test_a_lost_owner_is_named_whether_it_died_or_came_back_empty(bare_pool: Pool) -> None:
    """Killed for good: lost when it had been silent for client_ttl. Started anew: it says so itself."""
    pool = bare_pool
    pool.start_master("--client_ttl", "3s")
    pool.start_node("a")
    put_chain(pool.client("a"), SPACE, KEYS, SIZE)
    wait_for(lambda: pool.blocks() == 8, "the blocks are known")
    pool.nodes["a"].kill()
    wait_for(lambda: pool.state("a") == "suspect", "the node is suspect")
    (block,) = explain(pool, HEX[0], namespace="demo")
    assert block["verdict"] in {"owner_suspect", "owner_lost"}
    wait_for(lambda: pool.state("a") == "dead" and pool.blocks() == 0, "the node is dead and its blocks are swept")
    (block,) = explain(pool, HEX[0], namespace="demo")
    assert (block["verdict"], block["removals"][0]["why"], block["removals"][0]["node"]) == (
        "owner_lost", "node_lost", "a",
    )  # fmt: skip
    pool.start_node("a")
    put_chain(pool.client("a"), SPACE, KEYS, SIZE)
    wait_for(lambda: pool.blocks() == 8, "the blocks are known again")
    pool.nodes["a"].kill()
    pool.start_node("a")
    wait_for(lambda: pool.blocks() == 0, "the blocks of the process before are swept")
    (block,) = explain(pool, HEX[0], namespace="demo")
    whys = [removal["why"] for removal in block["removals"]]
    assert block["verdict"] == "owner_lost"
    assert whys in (["node_restarted", "node_lost"], ["node_lost", "node_lost"])  # the start may take over client_ttl


@pytest.mark.parametrize(("ratio", "chains", "why"), [("0.5", 5, "watermark"), ("1", 10, "room")])
def test_an_eviction_says_who_wanted_it(bare_pool: Pool, ratio: str, chains: int, why: str) -> None:
    """The master, when a node with room left is over its watermark; the node, when it needs room for a put."""
    pool = bare_pool
    pool.start_master("--eviction_high_watermark_ratio", ratio, "--eviction_ratio", "0.1")
    pool.start_node("a", "--segment_size", "4MB")
    client = pool.client("a")
    for chain in range(chains):
        keys = chain_of(chain, 8)
        put_chain(client, SPACE, keys, SIZE)
        # What comes and goes between two reports is never heard of.
        wait_for(lambda keys=keys: client.lookup(SPACE, keys[-1:]).prefix == 1, "the blocks are known")
    coldest = chain_of(0, 8)[-1].hex()
    wait_for(lambda: explain_verdict(pool, coldest) == "evicted", "the coldest block is gone")
    (block,) = explain(pool, coldest, namespace="demo")
    assert [(removal["why"], removal["node"]) for removal in block["removals"]] == [(why, "a")]


def explain_verdict(pool: Pool, key: str) -> str:
    """Return the verdict on one key, whatever the exit code."""
    reply = pool.admin().Explain(admin_pb2.ExplainRequest(namespace=SPACE.digest, keys=bytes.fromhex(key)), timeout=T)
    return admin_pb2.ExplainedBlock.Verdict.Name(reply.blocks[0].verdict).lower()


# ---- engines -------------------------------------------------------------------------------------------


def test_what_an_engine_holds_is_shown_and_never_a_hit(pool: Pool) -> None:
    """Tier hbm in lookup and explain; cleared, removed, and gone with the engine; told anew to a new master."""
    client = pool.client("a", name="engine-1")
    client.register(SPACE)

    def resident() -> list[dict[str, int]]:
        data = ctl_json(pool, "lookup", "--namespace", "demo", "--hashes", ",".join(HEX), code=1)
        assert data["prefix"] == 0
        for entry in data["residents"]:
            assert entry["engine"].startswith("engine-1@") and entry["tier"] == "hbm"
        return [part for entry in data["residents"] for part in entry["ranges"]]

    client.report_residency(SPACE, added=b"".join(KEYS))
    client.report_residency(SPACE.digest, removed=b"".join(KEYS[2:4]))
    wait_for(lambda: resident() == [{"first": 0, "blocks": 2}, {"first": 4, "blocks": 4}], "the engine is shown")
    assert client.lookup(SPACE, KEYS).prefix == 0
    (block,) = explain(pool, HEX[0], namespace="demo")
    assert block["verdict"] == "never_stored" and block["holders"][0]["tier"] == "hbm"
    status = ctl_json(pool, "status")
    assert (status["engines"], status["engine_blocks"], status["blocks"]) == (1, 6, 0)
    assert "hbm, its own" in ctl(pool, "lookup", "--namespace", "demo", "--hashes", ",".join(HEX), code=1)

    pool.master.kill()
    pool.start_master()
    wait_for(lambda: pool.status().engine_blocks == 6, "a new master is told everything")
    client.report_residency(SPACE, added=KEYS[2], cleared=True)
    wait_for(lambda: resident() == [{"first": 2, "blocks": 1}], "only what came after the reset is left")
    client.close()
    wait_for(lambda: pool.status().engines == 0, "the engine has said goodbye")


def test_residency_is_taken_by_grpc_too(pool: Pool) -> None:
    """For clients that reach nothing but the master's one port."""
    report = functools.partial(master_pb2.ResidencyRequest, owner=7, engine="far", namespace=SPACE.digest)
    with pool.channel() as channel:
        master = master_pb2_grpc.MasterStub(channel)
        assert master.ReportResidency(report(sequence=5, keys=KEYS[0]), timeout=T).again
        assert not master.ReportResidency(report(sequence=6, first=True, keys=KEYS[0]), timeout=T).again
    (block,) = explain(pool, HEX[0], namespace=SPACE.digest.hex())
    assert block["holders"] == [{"name": "far", "tier": "hbm", "state": "", "shards": []}]


def test_engines_that_hash_differently_are_told(pool: Pool) -> None:
    """Namespaces that differ in nothing but hashing: the second engine is warned, and so is the operator."""
    fields = {"model": "demo", "layers": 4}
    one, two = (Namespace(**fields, hash_fingerprint=seed) for seed in ("aa", "bb"))
    first, second, third = pool.client("a"), pool.client("b"), pool.client("b")
    first.register(one)
    third.register(Namespace(**fields, dtype="float16", hash_fingerprint="cc"))
    assert first.warnings() == third.warnings() == []
    second.register(two)
    (warning,) = second.warnings()
    assert "hash_fingerprint 'bb' and 'aa'" in warning and one.digest.hex() in warning
    (said,) = ctl_json(pool, "status")["warnings"]
    assert "hash prompts differently" in said and "warning: engines of model demo" in ctl(pool, "status")
    spaces = {space["digest"]: space["disagrees_with"] for space in ctl_json(pool, "namespaces")["namespaces"]}
    assert spaces[one.digest.hex()] == [two.digest.hex()] and spaces[two.digest.hex()] == [one.digest.hex()]
    assert sorted(map(len, spaces.values())) == [0, 1, 1]
    assert "only their hashing differs" in ctl(pool, "namespaces")


# ---- metrics -------------------------------------------------------------------------------------------


def scrape(port: int) -> dict[str, float]:
    """Return every sample of a daemon, by name and label."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=T)
    connection.request("GET", "/metrics")
    response = connection.getresponse()
    assert response.status == 200
    families = text_string_to_metric_families(response.read().decode())
    connection.close()
    return {"/".join((s.name, *s.labels.values())): s.value for family in families for s in family.samples}


def test_metrics_say_what_the_state_says(bare_pool: Pool) -> None:
    """Scraped from the running daemons, in Mooncake's names where they mean the same."""
    pool, ports = bare_pool, (free_port(), free_port())
    pool.start_master("--metrics_port", str(ports[0]))
    pool.start_node("a", "--segment_size", "8MB", "--metrics_port", str(ports[1]))
    client = pool.client("a")
    put_chain(client, SPACE, KEYS, SIZE)
    wait_for(lambda: client.lookup(SPACE, KEYS).reason == "complete", "the blocks are known")
    assert client.lookup(SPACE, [*KEYS, bytes(16)], timeout_ms=1000 * T).reason == "not_stored"
    master, node = scrape(ports[0]), scrape(ports[1])
    assert master["master_key_count"] == 8
    assert master["master_total_capacity_bytes"] == master["segment_total_capacity_bytes/a"] == 8 << 20
    assert master["segment_allocated_bytes/a"] == node["segment_allocated_bytes"] >= 8 * SIZE
    assert master["kvpool_lookup_hit_blocks_total/dram"] >= 16 and master["kvpool_lookups_total"] >= 2
    assert master["kvpool_lookup_misses_total/not_stored"] >= 1
    assert (master["kvpool_nodes/live"], master["kvpool_nodes/dead"]) == (1, 0)
    assert node["kvpool_blocks"] == 8 and node["kvpool_payload_bytes"] == 8 * SIZE
    ctl(pool, "evict", "--namespace", "demo", "--yes")
    wait_for(lambda: scrape(ports[0])["master_evicted_key_count"] == 8, "the evictions are counted")
    assert scrape(ports[0])["kvpool_removals_kept"] == 8
    assert scrape(ports[1])["kvpool_segment_events_total/commanded_evictions"] == 8


def test_a_metrics_port_in_use_is_named(bare_pool: Pool) -> None:
    """One line, and no daemon that runs without what was asked for."""
    pool, port = bare_pool, free_port()
    pool.start_master("--metrics_port", str(port))
    arguments = (
        "kvpool.cli.node", "--master", pool.address, "--host", "127.0.0.1", "--segment_size", "8MB",
        "--socket_path", pool.socket_path("x"), "--metrics_port", str(port),
    )  # fmt: skip
    node = pool.adopt("x", arguments)
    assert node.popen.wait(T) == 2
    assert "metrics_port: cannot listen on 127.0.0.1" in node.words()
