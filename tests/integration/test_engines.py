"""Engines that announce themselves to a real master: who is known, for how long, and whose memory is whose."""

from __future__ import annotations

import json

import grpc
import pytest

from kvpool.rpc.v1 import master_pb2, master_pb2_grpc
from tests.integration.pool import SPACE, Pool, T, chain_of, run_module, wait_for

KEYS = b"".join(chain_of(1, 5))
SAID = {"engine": "0", "role": "kv_both", "model": "m", "tensor_parallel": 1, "pipeline_parallel": 1}


@pytest.fixture
def stub(bare_pool: Pool):
    bare_pool.start_master("--client_ttl", "1s")
    with bare_pool.channel() as channel:
        yield master_pb2_grpc.MasterStub(channel)


def known(stub) -> dict[str, master_pb2.EngineStatus]:
    return {status.engine.address: status for status in stub.Engines(master_pb2.EnginesRequest()).engines}


def test_engines_of_one_name_are_told_apart_by_their_owner(bare_pool: Pool, stub):
    """Their addresses, and what each holds itself: seed configurations give every engine the id 0."""
    engines = {f"127.0.0.1:{port}": bare_pool.client(name="vllm 0 scheduler") for port in (8100, 8200)}
    for blocks, (address, client) in enumerate(engines.items(), 2):
        client.announce_engine(**SAID, address=address)
        client.announce_engine(namespaces=[SPACE.digest], residency=True)
        client.report_residency(SPACE, added=KEYS[: 16 * blocks])
    wait_for(lambda: {a: s.blocks for a, s in known(stub).items()} == {"127.0.0.1:8100": 2, "127.0.0.1:8200": 3}, "all")
    request = master_pb2.LookupRequest(namespace=SPACE.digest, hashes=KEYS)

    def held() -> dict[str, int]:
        owners = {status.engine.owner: address for address, status in known(stub).items()}
        residents = bare_pool.admin().Inspect(request).residents
        return {owners.get(one.owner, ""): one.ranges[0].blocks for one in residents}

    # Each once: what an engine holds is forgotten after client_ttl, and said again every two seconds.
    wait_for(lambda: held() == {"127.0.0.1:8100": 2, "127.0.0.1:8200": 3}, "an inspection says the same")
    wait_for(lambda: bare_pool.status().engines_announced == 2, "and the status")
    expected = [(address, blocks, [SPACE.digest.hex()]) for blocks, address in enumerate(engines, 2)]

    def told() -> bool:
        done = run_module("kvpool.cli.ctl", "--master", bare_pool.address, "engines", "--json")
        said = json.loads(done.stdout)["engines"]
        return [(one["address"], one["blocks"], one["namespaces"]) for one in said] == expected

    wait_for(told, "the command says the same")


def test_an_engine_is_known_while_it_says_so(bare_pool: Pool, stub, monkeypatch: pytest.MonkeyPatch):
    """It says that it ends; without a word it is forgotten; a new master hears of it again."""
    monkeypatch.setattr("kvpool.client_announce.BYE_S", T)
    client = bare_pool.client()
    client.announce_engine(**SAID, address="127.0.0.1:8100")
    stub.AnnounceEngine(master_pb2.EngineAnnouncement(owner=5, **SAID, address="127.0.0.1:8200"))
    assert "127.0.0.1:8200" in known(stub)
    wait_for(lambda: set(known(stub)) == {"127.0.0.1:8100"}, "the silent one is forgotten")
    bare_pool.master.kill()
    bare_pool.start_master()
    wait_for(lambda: set(known(stub)) == {"127.0.0.1:8100"}, "the new master knows it")
    client.close()
    assert not known(stub)


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("owner", {"owner": 0}),
        ("owner", {"owner": 0, "bye": True}),
        ("role", {"role": "x"}),
        ("address", {"address": "nowhere"}),
        ("namespaces", {"namespaces": [b"x"]}),
        ("tensor_parallel", {"tensor_parallel": 0}),
    ],
)
def test_what_is_not_allowed_is_named(stub, field, bad):
    """And nobody is announced by it."""
    with pytest.raises(grpc.RpcError) as caught:
        stub.AnnounceEngine(master_pb2.EngineAnnouncement(**({"owner": 5} | SAID | bad)))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field in caught.value.details()
    assert not known(stub)
