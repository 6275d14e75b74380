"""Transfers between engines through a real pool: clients open, seal, claim, renew and end; processes die."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from urllib.request import urlopen

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvpool import Client, Namespace, client_master
from kvpool.client_transfers import Claimed, TransferPart, TransferState
from kvpool.errors import InvalidArgumentError
from kvpool.rpc.v1 import master_pb2, master_pb2_grpc
from tests.integration.pool import SPACE, Pool, T, chain_of, free_port, put_chain, run_module, wait_for

SIZE = 64 << 10
KEYS = chain_of(1, 8)
PARTS = [TransferPart(SPACE, b"".join(KEYS), drop_last=1)]


@pytest.fixture(autouse=True)
def time_for_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of a second is an engine's; here whoever is there answers, however busy the machine is."""
    monkeypatch.setattr("kvpool.client_transfers.CALL_S", T)


def states(pool: Pool) -> dict[str, int]:
    """What became of transfers, by the master's counters."""
    counters = pool.status().counters
    return {name.removeprefix("transfers."): n for name, n in counters.items() if name.startswith("transfers.")}


def under_way(pool: Pool) -> tuple[int, int]:
    status = pool.status()
    return status.transfers, status.transfer_blocks


def test_a_prompt_moves_from_one_engine_to_another(pool: Pool) -> None:
    """The consumer learns where it is; at the end nothing is held, and its last block is gone, the others stay."""
    producer, consumer = pool.client("a"), pool.client("b")
    assert consumer.transfers.claim(7) == Claimed(TransferState.UNKNOWN)
    assert producer.transfers.open(7, PARTS, ["a"], "prefill")
    assert under_way(pool) == (1, 8)
    claimed = consumer.transfers.claim(7, "decode")
    assert (claimed.state, claimed.namespaces) == (TransferState.OPEN, (SPACE.digest,))
    (node,) = claimed.nodes
    assert node is not None and (node.node_id, node.socket_path) == ("a", pool.socket_path("a"))
    put_chain(producer, SPACE, KEYS, SIZE)
    assert producer.transfers.renew([7]) == []
    assert producer.transfers.seal(7, 60_000)
    assert consumer.transfers.claim(7).state is TransferState.SEALED
    wait_for(lambda: pool.blocks() == 8, "the blocks are known")
    consumer.transfers.end([7, 8])
    wait_for(lambda: pool.blocks() == 7, "the last one is dropped")
    assert consumer.lookup(SPACE, KEYS, timeout_ms=1000 * T).prefix == 7
    assert under_way(pool) == (0, 0)
    assert producer.transfers.renew([7]) == [7]
    assert not producer.transfers.seal(7, 0)
    assert consumer.transfers.claim(7) == Claimed(TransferState.ENDED)
    assert states(pool) == {"opened": 1, "sealed": 1, "claimed": 1, "ended": 1}


def test_the_operator_sees_what_is_under_way(bare_pool: Pool) -> None:
    """In the status, for people and for scripts, and in the metrics."""
    port = free_port()
    bare_pool.start_master("--metrics_port", str(port))
    client = bare_pool.client()
    assert client.transfers.open(1, PARTS, [""]) and client.transfers.open(2, PARTS, [])
    client.transfers.end([2])
    done = run_module("kvpool.cli.ctl", "--master", bare_pool.address, "--json", "status")
    status = json.loads(done.stdout)
    assert (status["transfers"], status["transfer_blocks"]) == (1, 8)
    shown = run_module("kvpool.cli.ctl", "--master", bare_pool.address, "status").stdout
    assert "1 under way, 8 blocks held for them" in shown
    pins = run_module("kvpool.cli.ctl", "--master", bare_pool.address, "--json", "pins").stdout
    assert json.loads(pins)["pins"] == []
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=T) as page:
        families = {family.name: family for family in text_string_to_metric_families(page.read().decode())}
    assert families["kvpool_prompt_transfers_under_way"].samples[0].value == 1
    assert families["kvpool_prompt_transfer_blocks"].samples[0].value == 8
    events = {sample.labels["event"]: sample.value for sample in families["kvpool_prompt_transfers"].samples}
    assert events == {"opened": 2, "ended": 1}


def test_who_says_nothing_is_gone(bare_pool: Pool) -> None:
    """A producer while it is open, a consumer once it is sealed: nobody waits for them longer than the lease TTL."""
    bare_pool.start_master("--default_kv_lease_ttl", "2s")
    bare_pool.start_node("a")
    producer, consumer = bare_pool.client("a"), bare_pool.client()
    put_chain(producer, SPACE, KEYS, SIZE)
    for transfer in (1, 2, 3):
        assert producer.transfers.open(transfer, PARTS, ["a"])
    assert producer.transfers.seal(2, 60_000) and producer.transfers.seal(3, 60_000)
    assert consumer.transfers.claim(2).state is TransferState.SEALED
    wait_for(lambda: under_way(bare_pool)[0] == 1, "those that nobody renews are over")
    assert consumer.transfers.renew([1, 2, 3]) == [1, 2]
    assert [consumer.transfers.claim(t).state for t in (1, 2)] == [TransferState.ENDED] * 2
    assert states(bare_pool) == {"opened": 3, "sealed": 2, "claimed": 1, "expired": 2}
    assert bare_pool.master.says("has expired")
    assert consumer.transfers.claim(3).state is TransferState.SEALED
    wait_for(lambda: under_way(bare_pool)[0] == 0, "so is one whose consumer is silent")
    wait_for(lambda: bare_pool.blocks() == 7, "and with the last one its block")
    assert under_way(bare_pool) == (0, 0)


def test_a_master_that_was_restarted_learns_of_transfers(pool: Pool) -> None:
    """From their producers, of what they have open or sealed; nothing raises while the master is away."""
    producer, consumer = pool.client("a"), pool.client("b")
    assert producer.transfers.open(7, PARTS, ["a"]) and producer.transfers.open(9, PARTS, ["a"])
    put_chain(producer, SPACE, KEYS, SIZE)
    assert producer.transfers.seal(9, 60_000)
    pool.master.kill()
    wait_for(lambda: producer.transfers.renew([7]) == [7], "the master is missed")
    assert not producer.transfers.open(8, PARTS, ["a"])
    assert not producer.transfers.seal(8, 1000)
    wait_for(lambda: consumer.transfers.claim(7) == Claimed(TransferState.NO_MASTER), "the consumer misses it too")
    producer.transfers.end([8])
    pool.start_master()
    wait_for(lambda: consumer.transfers.claim(7).state is TransferState.OPEN, "it is told of what was open")
    wait_for(lambda: consumer.transfers.claim(9).state is TransferState.SEALED, "and of what was sealed")
    assert consumer.transfers.claim(8).state is TransferState.UNKNOWN
    wait_for(lambda: pool.state("a") == "live", "the node is back")
    assert consumer.transfers.claim(9).nodes[0] is not None
    assert producer.transfers.open(7, PARTS, ["a"]), "it can be opened anew"
    wait_for(lambda: pool.blocks() == len(KEYS), "the blocks are known")
    consumer.transfers.end([7])
    consumer.transfers.end([9])
    wait_for(lambda: pool.blocks() == len(KEYS) - 1, "the last one is dropped")
    assert under_way(pool) == (0, 0)


def test_what_one_consumer_gives_back_another_one_takes(pool: Pool) -> None:
    """The first one's end takes nothing from the second; if nobody comes, it is over in some seconds."""
    producer, consumer = pool.client("a"), pool.client("b")
    assert producer.transfers.open(7, PARTS, ["a"]) and producer.transfers.open(8, PARTS, ["a"])
    put_chain(producer, SPACE, KEYS, SIZE)
    assert producer.transfers.seal(7, 60_000) and producer.transfers.seal(8, 60_000)
    for transfer in (7, 8):
        assert consumer.transfers.claim(transfer, "one").state is TransferState.SEALED
        assert consumer.transfers.end([transfer], "one", back=True) == []
    assert consumer.transfers.claim(7, "two").state is TransferState.SEALED
    assert consumer.transfers.end([7, 9], "one") == [9]
    assert consumer.transfers.claim(8, "two").state is TransferState.SEALED
    assert consumer.transfers.end([8], "two", back=True) == []
    wait_for(lambda: under_way(pool) == (1, 8), "what nobody comes for is over")
    assert consumer.transfers.renew([7, 8], "two") == [8]
    assert consumer.transfers.end([7, 8], "two") == [8]
    assert under_way(pool) == (0, 0)
    assert states(pool) == {"opened": 2, "sealed": 2, "claimed": 4, "ended": 2}


def test_a_namespace_that_the_master_does_not_know_is_announced(pool: Pool) -> None:
    """Whoever has registered it; a digest that nobody has registered opens nothing."""
    client = pool.client("a")
    fresh, stranger = Namespace("fresh"), Namespace("stranger")
    assert client.transfers.open(1, [TransferPart(fresh, KEYS[0])], [])
    assert not client.transfers.open(2, [TransferPart(stranger.digest, KEYS[0])], [])
    other = pool.client("b")
    assert other.transfers.open(2, [TransferPart(fresh.digest, KEYS[0])], [])
    client.transfers.end([1, 2])


@pytest.fixture
def slow_client(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """A client that reaches the master by gRPC alone."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        connect = client_master.Channel.connect_tcp
        monkeypatch.setattr(
            client_master.Channel,
            "connect_tcp",
            lambda host, port, timeout_s: connect(host, closed.getsockname()[1], timeout_s),
        )
        with Client(pool.address, node="", transfer_timeout_ms=10_000) as client:
            yield client


def test_transfers_go_by_grpc_where_nothing_else_gets_through(pool: Pool, slow_client: Client) -> None:
    """Every word of them, with all keys."""
    transfers = slow_client.transfers
    parts = [*PARTS, TransferPart(Namespace("second group"), b"".join(chain_of(2, 3)))]
    assert transfers.open(7, parts, ["a", "gone"], "prefill")
    assert under_way(pool) == (1, 11)
    claimed = transfers.claim(7)
    assert [node and node.node_id for node in claimed.nodes] == ["a", None]
    assert claimed.namespaces == (SPACE.digest, Namespace("second group").digest)
    assert transfers.renew([7, 9]) == [9]
    assert transfers.seal(7, 1000)
    transfers.end([7])
    assert transfers.claim(7).state is TransferState.ENDED


def test_long_prompts_fit(pool: Pool) -> None:
    """A million tokens of two KV cache groups, by frame."""
    client = pool.client("a")
    parts = [TransferPart(Namespace(f"long {group}"), b"".join(chain_of(group, 62_500))) for group in range(2)]
    assert client.transfers.open(7, parts, ["a"])
    assert under_way(pool) == (1, 125_000)
    client.transfers.end([7])
    wait_for(lambda: under_way(pool) == (0, 0), "all are let go of")


def test_what_cannot_be_asked_is_refused(pool: Pool) -> None:
    """By the client at once; by the master, which names the field."""
    transfers = pool.client("a").transfers
    for call, field in (
        (lambda: transfers.open(0, PARTS, []), "transfer"),
        (lambda: transfers.open(1, [TransferPart(SPACE, b"odd")], []), "parts.keys"),
        (lambda: transfers.open(1, [TransferPart(SPACE, KEYS[0], 2)], []), "parts.drop_last"),
        (lambda: transfers.open(1, [TransferPart(b"short", KEYS[0])], []), "parts.namespace"),
        (lambda: transfers.claim(1 << 64), "transfer"),
        (lambda: transfers.renew([-1]), "transfer"),
    ):
        with pytest.raises(InvalidArgumentError, match=field):
            call()
    with pool.channel() as channel:
        stub = master_pb2_grpc.MasterStub(channel)
        part = master_pb2.TransferPart(namespace=bytes(16), keys=KEYS[0])
        for method, request, field in (
            (stub.OpenTransfer, master_pb2.OpenTransferRequest(transfer=1), "parts"),
            (stub.OpenTransfer, master_pb2.OpenTransferRequest(transfer=1, parts=[part]), "namespace"),
            (stub.SealTransfer, master_pb2.SealTransferRequest(transfer=1, ttl_ms=1 << 40), "ttl_ms"),
            (stub.ClaimTransfer, master_pb2.ClaimTransferRequest(), "transfer"),
            (stub.RenewTransfers, master_pb2.TransfersRequest(consumed=[0]), "consumed"),
            (stub.EndTransfers, master_pb2.TransfersRequest(transfers=[0]), "transfers"),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                method(request, timeout=T)
            assert field in refused.value.details()
    link = pool.client("b")._link
    assert link is not None
    request = master_pb2.OpenTransferRequest(transfer=1)
    request.parts.add(namespace=SPACE.digest, blocks=3)
    with pytest.raises(InvalidArgumentError, match=r"parts\.blocks"):
        link.ask(master_pb2.MasterFrame(open_transfer=request), KEYS[0], T)
    assert under_way(pool) == (0, 0)
