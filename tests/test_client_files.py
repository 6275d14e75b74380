"""Gets that find their blocks in files: by this host's node or another one, within their time, or not at all."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvpool import Client
from kvpool.client_files import PART_BLOCKS_MAX, only_in_files, storage_name
from kvpool.client_node import PARTS_AHEAD
from kvpool.client_results import GetResult, Lookup, Run
from kvpool.model import KEY_BYTES, NodeAddress
from kvpool.rpc.v1 import master_pb2
from tests.file_node import BACKEND, FileNode
from tests.integration.pool import SPACE, chain_of, content_of, wait_for

SIZE = 64 << 10
KEYS = chain_of(7, 24)
BLOCKS = len(KEYS)
LAYERS = SPACE.shard_layers
OTHER = b"another backend!"


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., FileNode]]:
    """Start nodes; closed after the test."""
    made: list[FileNode] = []

    def start(name: str = "own", **options: Any) -> FileNode:
        made.append(FileNode(tmp_path, name, LAYERS, **options))
        return made[-1]

    yield start
    for node in made:
        node.close()


@pytest.fixture
def own(make: Callable[..., FileNode]) -> FileNode:
    """The node of this host, with all blocks in files."""
    node = make()
    node.files = {key: bytes(content_of(key, SIZE)) for key in KEYS}
    return node


@pytest.fixture
def client(own: FileNode) -> Iterator[Client]:
    with Client(None, node=own.path, breaker_failures=2, breaker_probe_interval_ms=50) as client:
        client.register(SPACE)
        assert client.has_node()
        yield client


def in_files(*servers: FileNode, backend: bytes = BACKEND, blocks: int = BLOCKS) -> Lookup:
    """The master's answer: all blocks are files, served by these nodes."""
    owners = [(server.address, "fs", (0,), backend) for server in servers]
    return Lookup(blocks, "complete", runs=[Run(blocks, owners)])


def get(client: Client, lookup: Lookup | None, timeout_ms: float = 2000, keys: list[bytes] = KEYS) -> GetResult:
    buffers = [np.zeros(SIZE, np.uint8) for _ in keys]
    result = client.get(SPACE, keys, buffers, lookup=lookup, timeout_ms=timeout_ms)
    for key, buffer, ok in zip(keys, buffers, result.ok, strict=True):
        assert not ok or np.array_equal(buffer, content_of(key, SIZE)), "wrong bytes"
    return result


class FakeLink:
    """A master that gives prepared answers, the last one again and again."""

    def __init__(self, *answers: master_pb2.LookupResponse) -> None:
        self.answers = list(answers)
        self.asked = 0
        self.nodes: list[NodeAddress] = []
        self.warnings: list[str] = []

    def ask(self, frame: Any, payload: bytes, timeout_s: float) -> master_pb2.MasterFrameReply:
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return master_pb2.MasterFrameReply(lookup=answer)

    def register(self, *arguments: Any) -> None: ...

    def close(self) -> None: ...


def answer(*runs: tuple[int, list[tuple[FileNode, str, bytes, bytes]]]) -> master_pb2.LookupResponse:
    """The master's answer as it is on the wire; owners are (node, tier, shard mask, backend)."""
    response = master_pb2.LookupResponse(prefix=sum(blocks for blocks, _ in runs))
    for blocks, owners in runs:
        run = response.runs.add(blocks=blocks)
        for node, tier, shards, backend in owners:
            run.owners.add(node=len(response.nodes), tier=tier, shards=shards, backend=backend)
            address = node.address
            response.nodes.add(node_id=address.node_id, host=address.host, port=address.port)
    return response


# ---- reading -----------------------------------------------------------------------------------------------


def test_own_node_reads_files_part_by_part(client: Client, own: FileNode) -> None:
    """Several parts are on their way while one is waited for; every pin ends; blocks count as tier fs."""
    own.hold = threading.Event()
    thread = threading.Thread(
        target=lambda: (wait_for(lambda: own.waiting == PARTS_AHEAD, "all parts ahead"), own.hold.set())
    )
    thread.start()
    result = get(client, in_files(own))
    thread.join()
    assert (result.prefix, result.tiers, result.reasons) == (BLOCKS, {"fs": BLOCKS}, {})
    assert own.waiting_max == PARTS_AHEAD
    assert sum(blocks for blocks, _ in own.fetches) == BLOCKS
    assert {backend for _, backend in own.fetches} == {BACKEND}
    assert client.stats()["get.fs_bytes"] == BLOCKS * SIZE
    wait_for(lambda: own.pinned == 0, "all pins are released")


def test_memory_comes_first(client: Client, own: FileNode) -> None:
    """Files are read only for what no memory has."""
    own.memory = {key: own.files.pop(key) for key in KEYS[:10]}
    result = get(client, in_files(own))
    assert (result.prefix, result.tiers) == (BLOCKS, {"local": 10, "fs": BLOCKS - 10})
    assert sum(blocks for blocks, _ in own.fetches) == BLOCKS - 10


def test_another_node_serves_what_the_own_one_does_not(client: Client, own: FileNode, make: Any) -> None:
    """Over TCP, with the same words; the own node is not asked for a backend that it does not have."""
    other = make("other", backends=[OTHER])
    other.files, own.files = own.files, {}
    result = get(client, in_files(other, backend=OTHER))
    assert (result.prefix, result.tiers) == (BLOCKS, {"fs": BLOCKS})
    assert own.fetches == []
    assert {backend for _, backend in other.fetches} == {OTHER}


@pytest.mark.parametrize(
    ("code", "reason"),
    [(-1, "not_here"), (-4, "file_missing"), (-5, "file_corrupt"), (-6, "storage_down"), (-7, "storage_timeout"),
     (-8, "no_room"), (-99, "not_here")],
)  # fmt: skip
@pytest.mark.parametrize("near", [True, False])
def test_every_code_is_a_reason(client: Client, own: FileNode, make: Any, near: bool, code: int, reason: str) -> None:
    """A block that cannot be had ends the prefix with the node's reason; the ones behind it are filled all the same."""
    server = own if near else make("other", backends=[OTHER])
    server.files, server.codes = own.files, {KEYS[5]: code}
    result = get(client, in_files(server, backend=BACKEND if near else OTHER))
    assert (result.prefix, result.reasons) == (5, {reason: 1})
    assert result.ok == [number != 5 for number in range(BLOCKS)]
    assert client.stats()[f"miss.{reason}"] == 1


def test_bytes_that_changed_are_never_returned(client: Client, own: FileNode) -> None:
    """The reader hashes its own copy."""
    assert get(client, in_files(own)).prefix == BLOCKS
    own.change(KEYS[3])
    result = get(client, in_files(own))
    assert (result.prefix, result.reasons) == (3, {"corrupt": 1})


def test_other_layers_than_all(client: Client, own: FileNode) -> None:
    """A range of layers is read from a file like from memory."""
    step = SIZE // LAYERS
    buffers = [np.zeros(2 * step, np.uint8) for _ in KEYS]
    result = client.get(SPACE, KEYS, buffers, lookup=in_files(own), layers=(1, 3))
    assert result.prefix == BLOCKS
    for key, buffer in zip(KEYS, buffers, strict=True):
        assert np.array_equal(buffer, content_of(key, SIZE)[step : 3 * step])


# ---- trouble -----------------------------------------------------------------------------------------------


def test_storage_that_hangs_is_soon_not_waited_for(client: Client, own: FileNode) -> None:
    """Each get ends in its time; after two the storage is left alone, its node's memory is not, and it heals."""
    own.memory = {KEYS[0]: own.files[KEYS[0]]}
    own.storage = "hangs"
    for _ in range(2):
        started = time.monotonic()
        result = get(client, in_files(own), timeout_ms=200)
        assert time.monotonic() - started < 5
        assert (result.prefix, result.reasons) == (1, {"storage_timeout": BLOCKS - 1})
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0.05), own._loop).result(10)  # all that came at the end was read
    asked = len(own.fetches)
    name = storage_name("own", BACKEND)
    result = get(client, in_files(own), timeout_ms=60_000)
    assert (result.prefix, result.tiers, result.reasons) == (1, {"local": 1}, {"breaker_open": BLOCKS - 1})
    assert client.unusable_nodes() == {name}
    assert client.stats()[f"breaker.rejected.{name}"] == 1
    assert sum(blocks > 1 for blocks, _ in own.fetches[asked:]) == 0, "only probes"
    own.storage = "up"
    wait_for(lambda: not client.unusable_nodes(), "a probe finds the storage well")
    assert get(client, in_files(own)).prefix == BLOCKS


def test_one_slow_call_is_one_failure(client: Client, own: FileNode) -> None:
    """However many parts it had."""
    own.storage = "hangs"
    assert get(client, in_files(own), timeout_ms=1000).reasons == {"storage_timeout": BLOCKS}
    assert client.unusable_nodes() == set()


def test_a_missing_file_is_no_failure_of_the_storage(client: Client, own: FileNode) -> None:
    """The storage has answered."""
    own.files = {}
    for _ in range(4):
        assert get(client, in_files(own)).reasons == {"file_missing": BLOCKS}
    assert client.unusable_nodes() == set()


@pytest.mark.parametrize("named", [True, False])
def test_another_server_of_the_same_storage_takes_over(
    client: Client, own: FileNode, make: Any, monkeypatch: Any, named: bool
) -> None:
    """Where this host's way to it is down: the one that the lookup names, or that another lookup names."""
    other = make("other")
    other.files, own.storage = own.files, "down"
    link = FakeLink(answer((BLOCKS, [(own, "fs", b"\1", BACKEND)])), answer((BLOCKS, [(other, "fs", b"\1", BACKEND)])))
    monkeypatch.setattr(client, "_link", link)
    result = get(client, in_files(own, other) if named else None)
    assert (result.prefix, result.tiers) == (BLOCKS, {"fs": BLOCKS})
    assert link.asked == (0 if named else 2)


def test_other_nodes_storage_has_a_breaker_of_its_own(client: Client, make: Any) -> None:
    """It opens for the storage, and blocks in that node's memory still come."""
    other = make("other", backends=[OTHER])
    other.storage = "hangs"
    for _ in range(2):
        assert get(client, in_files(other, backend=OTHER), timeout_ms=1000).reasons == {"storage_timeout": BLOCKS}
    asked = len([blocks for blocks, _ in other.fetches if blocks > 1])
    assert get(client, in_files(other, backend=OTHER)).reasons == {"breaker_open": BLOCKS}
    assert len([blocks for blocks, _ in other.fetches if blocks > 1]) == asked
    assert client.unusable_nodes() == {storage_name(other.address.place, OTHER)}
    other.memory = {key: bytes(content_of(key, SIZE)) for key in KEYS}
    in_memory = Lookup(BLOCKS, "complete", runs=[Run(BLOCKS, [(other.address, "dram", (0,), b"")])])
    assert get(client, in_memory).tiers == {"remote": BLOCKS}
    other.storage = "up"
    wait_for(lambda: not client.unusable_nodes(), "a probe finds the storage well")


def test_files_are_read_by_a_node_that_is_back_at_another_address(make: Any, tmp_path: Path) -> None:
    """Its old address is left alone, and no longer asked or told of once it is seen at the new one."""
    files = {key: bytes(content_of(key, SIZE)) for key in KEYS}

    def left_alone(node: FileNode) -> bool:
        unusable = client.unusable_nodes()
        return not any(unusable.isdisjoint(names) for names in client.storages(node.address, BACKEND))

    name = storage_name("b", BACKEND)
    with Client(None, node=str(tmp_path / "none"), breaker_failures=2, breaker_probe_interval_ms=50) as client:
        client.register(SPACE)
        before, back = make("b"), make("back")
        back.name = before.name
        before.files = back.files = files
        assert get(client, in_files(before)).prefix == BLOCKS
        before.close()
        for _ in range(2):
            assert get(client, in_files(before)).reasons == {"owner_lost": BLOCKS}
        assert get(client, in_files(before)).reasons == {"breaker_open": BLOCKS}
        assert (left_alone(before), left_alone(back)) == (True, False)
        assert client.stats()[f"breaker.open.{name}"] == 1
        assert get(client, in_files(back)).prefix == BLOCKS
        assert client.unusable_nodes() == set()
        counts = {kind: client.stats()[f"breaker.{kind}.{name}"] for kind in ("open", "opened", "rejected")}
        assert counts == {"open": 0, "opened": 1, "rejected": BLOCKS}


def test_a_node_that_ends_while_it_reads_is_a_miss(client: Client, own: FileNode) -> None:
    """The call ends with its connection."""
    own.hold = threading.Event()
    thread = threading.Thread(target=lambda: (wait_for(lambda: own.waiting > 0, "it reads"), own.close()))
    thread.start()
    result = get(client, in_files(own), timeout_ms=30_000)
    thread.join()
    assert (result.prefix, result.reasons) == (0, {"owner_lost": BLOCKS})


def test_two_gets_share_a_node_whose_channels_are_few(client: Client, own: FileNode) -> None:
    """Nobody waits for a channel while holding another: calls end, one after the other if need be."""
    results: list[GetResult] = []
    threads = [threading.Thread(target=lambda: results.append(get(client, in_files(own), 20_000))) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.prefix for result in results] == [BLOCKS] * 24


# ---- reading ahead -------------------------------------------------------------------------------------------


def test_a_lookup_may_ask_for_reading_ahead(client: Client, own: FileNode, make: Any, monkeypatch: Any) -> None:
    """The own node is told of the blocks, and of their shards, that are in no node's memory; nobody waits."""
    other = make("other")
    runs = (
        (4, [(other, "dram", b"\1", b"")]),
        (8, [(own, "fs", b"\1", BACKEND)]),
        (6, [(own, "fs", b"\1", BACKEND), (other, "dram", b"\1", b"")]),
        (2, [(other, "fs", b"\1", OTHER)]),
        (4, [(other, "fs", b"\1", BACKEND)]),
    )
    monkeypatch.setattr(client, "_link", FakeLink(answer(*runs)))
    assert client.lookup(SPACE, KEYS).prefix == BLOCKS
    assert client.lookup(SPACE, KEYS, prefetch=True).prefix == BLOCKS
    wait_for(lambda: len(own.prefetched) == 2, "both are told")
    assert sorted(own.prefetched) == sorted(
        [((0,), b"".join(KEYS[4:12]), BACKEND), ((0,), b"".join(KEYS[20:24]), BACKEND)]
    )
    assert client.stats()["prefetch.blocks"] == 12
    assert other.prefetched == []


def test_many_shards_are_asked_for_in_smaller_parts(client: Client, own: FileNode) -> None:
    """No frame is about more than a node may be asked for at once."""
    keys, shards = bytes(range(16)) * 1100, range(65)
    node = client._own.node
    assert node is not None
    node.prefetch(SPACE.digest, keys, shards, BACKEND, 5.0)
    wait_for(lambda: sum(len(part) for _, part, _ in own.prefetched) == len(keys), "all are asked for")
    assert all(len(part) // KEY_BYTES * len(shards) <= PART_BLOCKS_MAX for _, part, _ in own.prefetched)
    assert {asked for asked, _, _ in own.prefetched} == {tuple(shards)}


def test_storage_of_nodes_of_before_is_forgotten(own: FileNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the master is asked who is there."""
    with Client(None, node=own.path) as client:
        client.register(SPACE)
        assert get(client, in_files(own)).prefix == BLOCKS
        before = client._storage.all()
        monkeypatch.setattr(client, "_link", FakeLink())
        client._look_around()
        assert client._storage.all() == before
        client._own.id = "another"
        client._look_around()
        assert client._storage.all() == []
        assert not set(before) & set(client._health._guards)


def test_shards_that_no_memory_has_are_found() -> None:
    """Of blocks that are spread over tiers, counted from the known prefix on."""
    a, b = NodeAddress("a"), NodeAddress("b")
    lookup = Lookup(
        7,
        "complete",
        known_prefix=2,
        runs=[
            Run(2, [(a, "dram", (0,), b""), (b, "fs", (0, 1), BACKEND)]),
            Run(1, [(a, "dram", (0, 1), b""), (b, "fs", (0, 1), BACKEND)]),
            Run(2, [(a, "fs", (0, 1), BACKEND), (b, "fs", (1,), OTHER)]),
        ],
    )
    assert only_in_files(lookup) == {(BACKEND, "b", (1,)): [2, 3], (BACKEND, "a", (0, 1)): [5, 6]}


def test_who_reads_files_for_this_host(client: Client, own: FileNode, make: Any) -> None:
    """This host's node where it serves the backend, and the one that the lookup names."""
    other = make("other")
    place = other.address.place
    both = [("own", storage_name("own", BACKEND)), ("other", place, storage_name(place, BACKEND))]
    assert client.storages(other.address, BACKEND) == both
    assert client.storages(own.address, BACKEND) == both[:1]
    assert client.storages(other.address, OTHER) == [("other", place, storage_name(place, OTHER))]


def test_storage_that_was_opened_later_is_noticed(make: Any) -> None:
    """By the first answer that names this host's node for it."""
    own = make("own", backends=[])
    own.files = {key: bytes(content_of(key, SIZE)) for key in KEYS}
    with Client(None, node=own.path) as client:
        client.register(SPACE)
        assert not client.reads_files()
        assert get(client, in_files(own)).tiers == {"fs": BLOCKS}
        assert client.reads_files()
