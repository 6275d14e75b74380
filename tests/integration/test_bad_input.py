"""Bytes, values and settings that nobody should send: an error that names the field, and daemons that live on."""

from __future__ import annotations

import contextlib
import functools
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from kvpool import Client, Namespace
from kvpool.errors import InvalidArgumentError, KVPoolError, UnknownIdError, UnknownNamespaceError
from kvpool.rpc.v1 import admin_pb2, admin_pb2_grpc, master_pb2, master_pb2_grpc, node_pb2, node_pb2_grpc, types_pb2
from kvpool.rpc.v1.node_pb2 import Commit, Get, LocalPrefix, NodeFrame, Pin, ReleaseReservation, Reserve, Write
from kvpool.transport.frames import HEAD, MAGIC, encode
from tests.integration.pool import (
    SPACE,
    Pool,
    Process,
    T,
    chain_of,
    content_of,
    environment,
    free_port,
    get_chain,
    lookup_without_master,
    put_chain,
    run_module,
    wait_for,
)

SIZE = 16 << 10
KEYS = chain_of(1, 16)
RANDOM = random.Random(5)

GARBAGE = {
    "noise": RANDOM.randbytes(4096),
    "http": b"GET / HTTP/1.1\r\nHost: pool\r\n\r\n",
    "wrong magic": b"KVP2" + bytes(60),
    "header that is none": HEAD.pack(MAGIC, 64, 0) + b"\xff" * 64,
    "empty header": HEAD.pack(MAGIC, 0, 0),
    "truncated head": MAGIC + b"\x01",
    "truncated header": HEAD.pack(MAGIC, 1000, 0) + bytes(10),
    "truncated payload": encode(NodeFrame(pin=Pin(namespace=SPACE.digest, shards=[0])), 1 << 20) + bytes(100),
    "huge header": HEAD.pack(MAGIC, (1 << 32) - 1, 0) + bytes(1000),
    "huge payload": HEAD.pack(MAGIC, 4, (1 << 64) - 1) + bytes(1000),
    "payload of 2**63": encode(NodeFrame(write=Write(reservation=1)), 1 << 63) + bytes(1000),
    "half of a terabyte": encode(NodeFrame(write=Write(reservation=1)), 1 << 39) + bytes(100_000),
    "zeros": bytes(100_000),
}


def ports(pool: Pool) -> dict[str, Callable[[], socket.socket]]:
    def unix() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(pool.socket_path("a"))
        return sock

    with Client(pool.address, node=pool.socket_path("a")) as client:
        assert client._link is not None
        data_port = client._link._data_port
    tcp = pool.statuses()["a"].address.port
    return {
        "node's unix socket": unix,
        "node's port": lambda: socket.create_connection(("127.0.0.1", tcp)),
        "master's data port": lambda: socket.create_connection(("127.0.0.1", data_port)),
        "master's port": lambda: socket.create_connection(("127.0.0.1", pool.port)),
    }


def test_garbage_on_every_port_harms_nobody(pool: Pool) -> None:
    """Whatever arrives, at once or in pieces, with or without a goodbye: others are served, memory does not grow."""
    client = pool.client("a")
    put_chain(client, SPACE, KEYS, SIZE)
    wait_for(lambda: client.lookup(SPACE, KEYS).reason == "complete", "the blocks are known")
    daemons = [pool.master, pool.nodes["a"]]
    before = [resident(daemon) for daemon in daemons]
    with contextlib.ExitStack() as still_open:
        for connect in ports(pool).values():
            for data in GARBAGE.values():
                for pieces in ([data], [data[i : i + 7] for i in range(0, min(len(data), 200), 7)]):
                    sock = still_open.enter_context(connect())
                    with contextlib.suppress(OSError):  # cut off in the middle is what we hope for
                        for piece in pieces:
                            sock.sendall(piece)
                    if RANDOM.random() < 0.5:
                        sock.close()
            assert client.lookup(SPACE, KEYS, timeout_ms=5000).prefix == len(KEYS)
            assert get_chain(client, SPACE, KEYS, SIZE).prefix == len(KEYS)
            other = pool.client()
            lookup = other.lookup(SPACE, KEYS, timeout_ms=5000)
            assert get_chain(other, SPACE, KEYS, SIZE, lookup=lookup).prefix == len(KEYS)
    for daemon, was in zip(daemons, before, strict=True):
        assert daemon.alive and resident(daemon) - was < 64 << 20
    assert put_chain(client, SPACE, chain_of(2, 16), SIZE) == 16


def resident(process: Process) -> int:
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4096


def test_peer_that_is_cut_off_is_told_why(pool: Pool) -> None:
    """A frame that cannot be read is answered once, then the connection ends."""
    for name, connect in ports(pool).items():
        if name == "master's port":
            continue  # speaks HTTP/2
        for what, said in (("noise", b"magic"), ("huge header", b"header has"), ("huge payload", b"payload has")):
            with connect() as sock:
                sock.settimeout(T)
                with contextlib.suppress(OSError):
                    sock.sendall(GARBAGE[what])
                answer = b""
                with contextlib.suppress(ConnectionResetError):
                    while more := sock.recv(4096):
                        answer += more
                assert said in answer, (name, what, answer)


BIG = (1 << 63, (1 << 64) - 1)


@pytest.mark.parametrize(
    ("frame", "payload", "field"),
    [
        (NodeFrame(reserve=Reserve(namespace=b"short", shards=[0], shard_bytes=64, layers=1)), KEYS[0], "namespace"),
        (NodeFrame(reserve=Reserve(namespace=SPACE.digest, shards=[0], shard_bytes=64, layers=1)), b"odd", "keys"),
        (NodeFrame(reserve=Reserve(namespace=SPACE.digest, shards=[], shard_bytes=64, layers=1)), KEYS[0], "shards"),
        (NodeFrame(reserve=Reserve(namespace=SPACE.digest, shards=[1], shard_bytes=64, layers=1)), KEYS[0], "shards"),
        (
            NodeFrame(reserve=Reserve(namespace=SPACE.digest, shards=[2**32 - 1], shard_bytes=64, layers=1)),
            KEYS[0],
            "shards",
        ),
        (
            NodeFrame(reserve=Reserve(namespace=SPACE.digest, shards=[0], shard_bytes=0, layers=1)),
            KEYS[0],
            "shard_bytes",
        ),
        *(
            (
                NodeFrame(reserve=Reserve(namespace=SPACE.digest, shards=[0], shard_bytes=size, layers=1)),
                KEYS[0],
                "shard_bytes",
            )
            for size in BIG
        ),
        (NodeFrame(reserve=Reserve(namespace=SPACE.digest, shards=[0], shard_bytes=64, layers=0)), KEYS[0], "layers"),
        (NodeFrame(reserve=Reserve(namespace=SPACE.digest, shards=[0], shard_bytes=64, layers=3)), KEYS[0], "layers"),
        (
            NodeFrame(reserve=Reserve(namespace=SPACE.digest, shards=[0], shard_bytes=64, layers=2**32 - 1)),
            KEYS[0],
            "layers",
        ),
        (NodeFrame(pin=Pin(namespace=b"", shards=[0])), KEYS[0], "namespace"),
        (NodeFrame(pin=Pin(namespace=SPACE.digest, shards=[0, 0])), KEYS[0], "shards"),
        (NodeFrame(pin=Pin(namespace=SPACE.digest, shards=[0])), KEYS[0][:15], "keys"),
        (NodeFrame(get=Get(namespace=SPACE.digest, shards=[0], first_layer=2**32 - 1)), KEYS[0], "layer_count"),
        (NodeFrame(get=Get(namespace=SPACE.digest, shards=[0], layer_count=2**32 - 1)), KEYS[0], "layer_count"),
        (NodeFrame(local_prefix=LocalPrefix(namespace=SPACE.digest, shards=0)), KEYS[0], "shards"),
        (NodeFrame(local_prefix=LocalPrefix(namespace=SPACE.digest, shards=2**32 - 1)), KEYS[0], "shards"),
        (NodeFrame(register=types_pb2.NamespaceDescriptor()), b"", "namespace.model"),
        (NodeFrame(register=types_pb2.NamespaceDescriptor(model="m")), b"", "namespace.block_tokens"),
        (NodeFrame(), b"", "body"),
    ],
)
def test_node_names_the_field(one_node: Pool, frame: NodeFrame, payload: bytes, field: str) -> None:
    """A request that makes no sense is answered on its own connection, which goes on."""
    with one_node.raw("a") as node:
        with pytest.raises(InvalidArgumentError, match=f"^{field}: ") as caught:
            node.call(frame, payload)
        assert caught.value.field == field
        assert node.local_prefix(SPACE, KEYS) == len(KEYS)


@pytest.mark.parametrize(
    ("frame", "payload"),
    [
        (NodeFrame(commit=Commit(reservation=7)), bytes(8)),
        (NodeFrame(abort=ReleaseReservation(reservation=(1 << 64) - 1)), b""),
        (NodeFrame(write=Write(reservation=7)), bytes(64)),
    ],
)
def test_node_knows_only_the_reservations_of_a_connection(one_node: Pool, frame: NodeFrame, payload: bytes) -> None:
    """Another's number, or none at all, is no key to anything."""
    with one_node.raw("a") as node, one_node.raw("a") as other:
        number, _ = other.reserve(SPACE, chain_of(5, 1), 64)
        for reservation in (7, number):
            body = frame.WhichOneof("body")
            assert body is not None
            getattr(frame, body).reservation = reservation
            with pytest.raises(UnknownIdError):
                node.call(frame, payload)
        other.abort(number)


def test_node_refuses_checksums_that_do_not_fit(one_node: Pool) -> None:
    """The reservation stays as it was, and can be committed rightly."""
    with one_node.raw("a") as node:
        number, _ = node.reserve(SPACE, chain_of(6, 2), 64)
        for checksums in (b"", bytes(63), bytes(65), bytes(1 << 16)):
            with pytest.raises(InvalidArgumentError, match=r"^checksums: "):
                node.commit(number, checksums)
        assert node.commit(number, bytes(64)) == 2


def test_unknown_namespace(one_node: Pool) -> None:
    """Nothing is stored under it; what is asked for is a miss with that reason."""
    other = Namespace(model="never registered")
    with one_node.raw("a") as node:
        with pytest.raises(UnknownNamespaceError, match=other.digest.hex()):
            node.reserve(other, KEYS, 64)
        assert node.pin(other, KEYS) == (0, [-1, 0] * len(KEYS))
        assert node.local_prefix(other, KEYS) == 0
    with Client(one_node.address, node=one_node.socket_path("a")) as client:
        assert client.lookup(bytes(16), KEYS, timeout_ms=1000 * T).reason == "namespace_unknown"
        with pytest.raises(InvalidArgumentError, match=r"^namespace: .* never registered"):
            client.get(bytes(16), KEYS, [bytearray(SIZE) for _ in KEYS])


@pytest.fixture(scope="module")
def one_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Return a pool with node "a" that holds KEYS, the same one for many tests."""
    pool = Pool(tmp_path_factory.mktemp("pool"))
    try:
        pool.start_master()
        pool.start_node("a")
        with Client(pool.address, node=pool.socket_path("a")) as client:
            put_chain(client, SPACE, KEYS, SIZE)
            wait_for(lambda: client.lookup(SPACE, KEYS).reason == "complete", "the blocks are known")
        yield pool
    finally:
        pool.close()


Call = Callable[[Client], Any]


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda c: c.lookup(SPACE, b"odd"), "hashes"),
        (lambda c: c.lookup(SPACE, [b"short"]), "hashes"),
        (lambda c: c.lookup(SPACE, bytes(16 * ((1 << 20) + 1))), "hashes"),
        (lambda c: c.lookup(b"short", KEYS), "namespace"),
        (lambda c: c.lookup(SPACE, KEYS, known_prefix=-1), "known_prefix"),
        (lambda c: c.lookup(SPACE, KEYS, known_prefix=17), "known_prefix"),
        (lambda c: c.lookup(SPACE, KEYS, known_prefix=1 << 63), "known_prefix"),
        *((lambda c, t=t: c.lookup(SPACE, KEYS, timeout_ms=t), "timeout_ms") for t in (0, -1, 2.0**70, float("nan"))),
        *(
            (lambda c, t=t: c.put(SPACE, KEYS[:1], [bytes(64)], timeout_ms=t), "timeout_ms")
            for t in (0, -1, 2.0**70, float("inf"))
        ),
        (lambda c: c.put(SPACE, KEYS, [bytes(64)]), "blocks"),
        (lambda c: c.put(SPACE, KEYS[:1], [b""]), "blocks"),
        (lambda c: c.put(SPACE, KEYS[:1], [bytes(63)]), "blocks"),
        (lambda c: c.put(SPACE, KEYS[:2], [bytes(64), bytes(128)]), "blocks"),
        (lambda c: c.put(SPACE, KEYS[:1], [[bytes(16)] * 3]), "blocks"),
        (lambda c: c.put(SPACE, KEYS[:1], [["text"]]), "blocks"),
        (lambda c: c.put(SPACE, KEYS[:1], [bytes(64)], shard=1), "shard"),
        (lambda c: c.put(SPACE, KEYS[:1], [bytes(64)], shard=-1), "shard"),
        (lambda c: c.put(SPACE, KEYS[:1], [bytes(64)], shard=1 << 63), "shard"),
        (lambda c: c.get(SPACE, KEYS[:1], [bytes(SIZE)]), "blocks"),
        (lambda c: c.get(SPACE, KEYS[:1], [bytearray(SIZE)], layers=(0, 1 << 63)), "layers"),
        (lambda c: c.get(SPACE, KEYS[:1], [bytearray(SIZE)], layers=(2, 2)), "layers"),
        (lambda c: c.get(SPACE, KEYS[:1], [bytearray(SIZE)], layers=(-1, 2)), "layers"),
        (lambda c: c.register(Namespace(model="")), "namespace.model"),
        (lambda c: c.register(Namespace(model="m", layers=1 << 63)), "namespace.layers"),
        (lambda c: c.register(Namespace(model="m", layers=3, layer_groups=2)), "namespace.layer_groups"),
    ],
)
def test_client_names_the_field(one_node: Pool, call: Call, field: str) -> None:
    """Misuse is an error of the caller's, before anything is sent; the client goes on."""
    with Client(one_node.address, node=one_node.socket_path("a")) as client:
        with pytest.raises(InvalidArgumentError) as caught:
            call(client)
        assert caught.value.field == field
        assert client.lookup(SPACE, KEYS, timeout_ms=1000 * T).prefix == len(KEYS)
        assert get_chain(client, SPACE, KEYS, SIZE).prefix == len(KEYS)


@pytest.mark.parametrize("node", ["a", "none"])
@pytest.mark.parametrize(
    ("size", "layers"), [(SIZE // 2, None), (SIZE * 2, None), (SIZE // 4 + 4, (0, 1)), (SIZE, (0, 1))]
)
def test_get_with_buffers_of_another_size(
    one_node: Pool, node: str, size: int, layers: tuple[int, int] | None
) -> None:
    """It is a miss of that reason; other gets, by the same client too, are not disturbed."""
    with Client(one_node.address, node=one_node.socket_path(node)) as client:
        result = client.get(SPACE, KEYS, [np.zeros(size, np.uint8) for _ in KEYS], layers=layers)
        assert (result.prefix, result.reasons) == (0, {"wrong_size": len(KEYS)})
        assert get_chain(client, SPACE, KEYS, SIZE).prefix == len(KEYS)
        assert client.has_node() == (node == "a")


def test_master_names_the_field(one_node: Pool) -> None:
    """By gRPC too: INVALID_ARGUMENT or NOT_FOUND with the field, and the next question is answered."""
    refused = grpc.StatusCode.INVALID_ARGUMENT
    with one_node.channel() as channel:
        master, admin = master_pb2_grpc.MasterStub(channel), admin_pb2_grpc.AdminStub(channel)
        lookup, evict = master_pb2.LookupRequest, admin_pb2.EvictBlocksRequest
        resident = functools.partial(master_pb2.ResidencyRequest, owner=1, sequence=2**64 - 1)
        digest = SPACE.digest
        cases: list[tuple[Any, Any, grpc.StatusCode, str]] = [
            (master.Handshake, master_pb2.HandshakeRequest(protocol=2**32 - 1), refused, "protocol"),
            (master.Lookup, lookup(namespace=b"x", hashes=KEYS[0]), refused, "namespace"),
            (master.Lookup, lookup(hashes=KEYS[0]), refused, "namespace"),
            (master.Lookup, lookup(namespace=digest, hashes=b"odd"), refused, "hashes"),
            (master.Lookup, lookup(namespace=digest, hashes=KEYS[0], known_prefix=2), refused, "known_prefix"),
            (master.Lookup, lookup(namespace=digest, hashes=KEYS[0], known_prefix=2**32 - 1), refused, "known_prefix"),
            (master.Place, master_pb2.PlaceRequest(bytes=2**63), grpc.StatusCode.OUT_OF_RANGE, "larger than every"),
            (master.RegisterNamespace, types_pb2.NamespaceDescriptor(), refused, "namespace.model"),
            (master.RegisterNamespace, types_pb2.NamespaceDescriptor(model="m" * 2000), refused, "namespace."),
            (admin.Inspect, lookup(namespace=digest, hashes=b"odd"), refused, "hashes"),
            (admin.Explain, admin_pb2.ExplainRequest(), refused, "keys"),
            (admin.Explain, admin_pb2.ExplainRequest(keys=b"odd"), refused, "keys"),
            (admin.Explain, admin_pb2.ExplainRequest(keys=bytes(16 * 1025)), refused, "keys"),
            (admin.Explain, admin_pb2.ExplainRequest(keys=bytes(16), namespace=b"x"), refused, "namespace"),
            (master.ReportResidency, master_pb2.ResidencyRequest(), refused, "owner"),
            (master.ReportResidency, resident(), refused, "engine"),
            (master.ReportResidency, resident(engine="e", keys=b"odd"), refused, "keys"),
            (master.ReportResidency, resident(engine="e", keys=bytes(16)), refused, "namespace"),
            (master.ReportResidency, resident(engine="e", removed=1), refused, "removed"),
            (admin.EvictBlocks, evict(), refused, "namespace"),
            (admin.EvictBlocks, evict(namespace=digest, keys=b"odd"), refused, "keys"),
            (admin.EvictBlocks, evict(namespace=digest, coldest_bytes=1), refused, "coldest_bytes"),
            (admin.EvictBlocks, evict(namespace=bytes(16)), grpc.StatusCode.NOT_FOUND, bytes(16).hex()),
            (admin.EvictBlocks, evict(namespace=bytes(16), keys=KEYS[0]), grpc.StatusCode.NOT_FOUND, bytes(16).hex()),
        ]
        for method, request, code, said in cases:
            with pytest.raises(grpc.RpcError) as caught:
                method(request, timeout=T)
            assert caught.value.code() is code and said in caught.value.details(), (request, caught.value)  # type: ignore[attr-defined]
        assert not master.RenewLeases(master_pb2.LeaseRequest(), timeout=T).unknown
        assert list(master.RenewLeases(master_pb2.LeaseRequest(leases=[0, 1, 2**64 - 1]), timeout=T).unknown)
        assert master.Lookup(lookup(namespace=digest, hashes=b"".join(KEYS)), timeout=T).prefix == len(KEYS)


@pytest.mark.parametrize(
    "messages",
    [
        [node_pb2.NodeMessage()],
        [node_pb2.NodeMessage(hello=node_pb2.Hello())],
        [node_pb2.NodeMessage(hello=node_pb2.Hello(address=types_pb2.NodeAddress(node_id="x", port=2**32 - 1)))],
        [node_pb2.NodeMessage(delta=node_pb2.Delta(sequence=2**63, added=[types_pb2.BlockRun(namespace=b"x")]))],
        [
            node_pb2.NodeMessage(hello=node_pb2.Hello(address=types_pb2.NodeAddress(node_id="x"), epoch=1)),
            node_pb2.NodeMessage(
                inventory=node_pb2.Inventory(
                    last=True, added=[types_pb2.BlockRun(namespace=bytes(16), keys=b"odd", shards=b"\x01")]
                )
            ),
        ],
        [
            node_pb2.NodeMessage(hello=node_pb2.Hello(address=types_pb2.NodeAddress(node_id="x"), epoch=1)),
            node_pb2.NodeMessage(
                inventory=node_pb2.Inventory(
                    last=True,
                    added=[types_pb2.BlockRun(namespace=bytes(16), keys=KEYS[0], shards=b"\xff" * 64)],
                )
            ),
        ],
    ],
)
def test_session_of_something_that_is_no_node_is_ended(one_node: Pool, messages: list[node_pb2.NodeMessage]) -> None:
    """It is told INVALID_ARGUMENT, the other sessions go on."""
    with one_node.channel() as channel:
        call = node_pb2_grpc.NodeSessionStub(channel).Session(iter(messages), timeout=T)
        with pytest.raises(grpc.RpcError) as caught:
            for _ in call:
                pass
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
    with Client(one_node.address, node=one_node.socket_path("none")) as client:
        assert get_chain(client, SPACE, KEYS, SIZE).prefix == len(KEYS)
    assert one_node.state("a") == "live"


# ---- settings ------------------------------------------------------------------------------------------

NODE, MASTER = "kvpool.cli.node", "kvpool.cli.master"


@pytest.mark.parametrize(
    ("module", "arguments", "said"),
    [
        (NODE, ["--segment_size", "4XB"], "segment_size: '4XB' is not a size; allowed: "),
        (NODE, ["--segment_size", "0"], "segment_size: "),
        (NODE, ["--segment_size", str(1 << 63)], "segment_size: "),
        (NODE, ["--segment_size", "100"], "segment_size: must be at least"),
        (NODE, ["--segment_size", "100TB"], "segment_size: must be from 1 to "),
        (NODE, ["--segmnt_size", "1GB"], "Did you mean '--segment_size'?"),
        (NODE, ["--port", "65536"], "port: "),
        (NODE, ["--host", "no such host!"], "host: "),
        (NODE, ["--host", "198.51.100.1"], "host: cannot listen on 198.51.100.1"),
        (NODE, ["--master", "nowhere"], "master: 'nowhere' is not allowed; allowed: HOST:PORT"),
        (NODE, ["--master", "10.0.0..7:50088"], "master: '10.0.0..7:50088' is not allowed; allowed: HOST:PORT"),
        (NODE, ["--socket_mode", "999"], "socket_mode: "),
        (NODE, ["--connections_max", "0"], "connections_max: "),
        (MASTER, ["--port", "-1"], "port: "),
        (MASTER, ["--host", "198.51.100.1"], "host: cannot listen on 198.51.100.1"),
        (MASTER, ["--host", "no-such-host.invalid"], "host: cannot listen on no-such-host.invalid"),
        (MASTER, ["--host", "a..b"], "host: 'a..b' is not allowed; allowed: a host name"),
        (MASTER, ["--eviction_ratio", "1.5"], "eviction_ratio: "),
        (MASTER, ["--eviction_ratio", "0.9", "--eviction_high_watermark_ratio", "0.5"], "eviction_ratio: must be at"),
        (MASTER, ["--default_kv_lease_ttl", "soon"], "default_kv_lease_ttl: "),
        (MASTER, ["--client_ttl", "0"], "client_ttl: "),
        (MASTER, ["--log_level", "loud"], "log_level: 'loud' is not allowed; allowed: debug or info"),
        (MASTER, ["--data_dir", "/proc/none"], "data_dir: "),
        (MASTER, ["--config", "/nowhere.yaml"], "config: cannot read /nowhere.yaml"),
    ],
)
def test_daemon_refuses_a_setting(tmp_path: Path, module: str, arguments: list[str], said: str) -> None:
    """One line that names the setting, exit code 2, nothing left behind."""
    if module == NODE:
        arguments = [*arguments, "--socket_path", str(tmp_path / "n.sock")]
        if "--segment_size" not in arguments:
            arguments += ["--segment_size", "4MB"]
    done = run_module(module, *arguments)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("KVPOOL_SEGMENT_SIZE", "much", "segment_size: 'much' is not a size"),
        ("KVPOOL_SEGMNT_SIZE", "1GB", "KVPOOL_SEGMNT_SIZE: no such setting; did you mean KVPOOL_SEGMENT_SIZE?"),
    ],
)
def test_daemon_refuses_an_environment(variable: str, value: str, said: str) -> None:
    """As for flags, with the variable's name."""
    done = run_module(NODE, **{variable: value})
    assert done.returncode == 2 and said in done.stderr and variable in done.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "config: "),
        ("segment_sizes: 1GB", "segment_sizes: no such setting; did you mean segment_size?"),
        ("segment_size: [1]", "segment_size: "),
        ("- 1", "config: "),
        ('{"master_server_address": "127.0.0.1:50088", "protocl": "tcp"}', "protocl: no such setting; did you mean"),
    ],
)
def test_daemon_refuses_a_file(tmp_path: Path, content: str, said: str) -> None:
    """As for flags, with the file's name."""
    path = tmp_path / "pool.yaml"
    path.write_text(content)
    done = run_module(NODE, "--config", str(path))
    assert done.returncode == 2 and said in done.stderr and str(path) in done.stderr, done.stderr


def test_port_in_use(one_node: Pool, tmp_path: Path) -> None:
    """The error names the port's setting; whoever has the port is not disturbed."""
    port = str(one_node.port)
    for module, flag in ((MASTER, "port"), (MASTER, "data_port"), (NODE, "port")):
        more = ["--port", str(free_port())] if flag == "data_port" else []
        if module == NODE:
            more = ["--segment_size", "4MB", "--socket_path", str(tmp_path / "n.sock")]
        done = run_module(module, "--host", "127.0.0.1", f"--{flag}", port, *more)
        assert done.returncode == 2, done.stderr
        assert f"{flag}: cannot listen on 127.0.0.1:{port}" in done.stderr, done.stderr
        assert not list(tmp_path.iterdir())
    assert one_node.state("a") == "live"


def test_socket_path_in_use_or_too_long(one_node: Pool, tmp_path: Path) -> None:
    """A live node's socket is left alone, as is a file that is no socket; the limit is told."""
    taken, file, long = one_node.socket_path("a"), tmp_path / "file", tmp_path / ("x" * 101)
    file.write_text("mine")
    for path, said in (
        (taken, f"another process serves {taken}"),
        (str(file), "is no socket"),
        (str(long), "at most 100 bytes"),
    ):
        done = run_module(NODE, "--segment_size", "4MB", "--socket_path", path)
        assert done.returncode == 2 and "socket_path: " in done.stderr and said in done.stderr, done.stderr
    assert file.read_text() == "mine"
    with one_node.raw("a") as node:
        assert node.local_prefix(SPACE, KEYS) == len(KEYS)


def test_stale_socket_gives_way(bare_pool: Pool) -> None:
    """What a killed node left behind does not keep the next one from starting."""
    bare_pool.start_master()
    bare_pool.start_node("a").kill()
    assert Path(bare_pool.socket_path("a")).exists()
    bare_pool.start_node("a")
    bare_pool.client("a")


def test_segment_larger_than_the_cgroup(tmp_path: Path) -> None:
    """What the cgroup leaves is the limit that is named, where we may make a cgroup to see that."""
    group = Path("/sys/fs/cgroup") / f"kvpool-test-{tmp_path.name}"
    if not (group.parent / "cgroup.controllers").exists():
        group = Path("/sys/fs/cgroup/memory") / group.name
    limit = "memory.max" if (group.parent / "cgroup.controllers").exists() else "memory.limit_in_bytes"
    try:
        group.mkdir()
    except OSError as exc:
        pytest.skip(f"cannot make a cgroup here: {exc.strerror}")
    try:
        try:
            (group / limit).write_text(str(256 << 20))
        except OSError as exc:
            pytest.skip(f"cannot limit a cgroup's memory here: {exc.strerror}")
        script = (
            f"import os, sys\nopen({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
            f"os.execv(sys.executable, [sys.executable, '-m', {NODE!r}, '--segment_size', '1GB', "
            f"'--socket_path', {str(tmp_path / 'n.sock')!r}])"
        )
        path = tmp_path / "in_group.py"
        path.write_text(script)
        done = subprocess.run(
            [sys.executable, str(path)], capture_output=True, text=True, timeout=T, check=False, env=environment()
        )
        assert done.returncode == 2 and "segment_size: must be from 1 to " in done.stderr, done.stderr
        assert "cgroup" in done.stderr
    finally:
        wait_for(lambda: removed(group), "the cgroup is empty")


def removed(group: Path) -> bool:
    try:
        group.rmdir()
    except OSError:
        return False
    return True


def test_missing_master(bare_pool: Pool) -> None:
    """The node keeps trying, and serves clients of its host meanwhile; then all is known at once."""
    pool = bare_pool
    begin = time.monotonic()
    node = pool.start_node("a", wait=False)
    wait_for(lambda: node.says("no session with the master"), "the node says what is missing")
    assert node.alive
    with Client(pool.address, node=pool.socket_path("a")) as client:
        assert put_chain(client, SPACE, KEYS, SIZE) == len(KEYS)
        result = lookup_without_master(client, SPACE, KEYS)
        assert (result.prefix, result.reason) == (len(KEYS), "master_unreachable")
        assert get_chain(client, SPACE, KEYS, SIZE).prefix == len(KEYS)
        with Client(pool.address, node=pool.socket_path("none")) as lonely:
            assert lonely.lookup(SPACE, KEYS).reason == "no_pool"
            result = lonely.put(SPACE, KEYS, [content_of(key, SIZE) for key in KEYS])  # type: ignore[assignment]
            assert result.errors == {"unavailable": len(KEYS)}  # type: ignore[attr-defined]
            assert get_chain(lonely, SPACE, KEYS, SIZE).prefix == 0
        pool.start_master()
        wait_for(lambda: client.lookup(SPACE, KEYS).reason == "complete", "the master knows the blocks")
    often = 1 + (time.monotonic() - begin) // 10
    assert 1 <= node.words().count("no session with the master") <= often, "once in ten seconds is enough"


def test_slow_loris_does_not_use_up_the_connections(bare_pool: Pool) -> None:
    """One connection too many is told so, and those that work go on."""
    pool = bare_pool
    pool.start_master()
    pool.start_node("a", "--segment_size", "8MB", "--connections_max", "20")
    client = pool.client("a")
    put_chain(client, SPACE, KEYS, SIZE)
    with contextlib.ExitStack() as idle:
        for _ in range(30):
            sock = idle.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(pool.socket_path("a"))
        with pytest.raises(KVPoolError, match="connections are taken"):
            pool.raw("a").local_prefix(SPACE, KEYS)
        assert get_chain(client, SPACE, KEYS, SIZE).prefix == len(KEYS)

    def there_is_room() -> bool:
        with contextlib.suppress(KVPoolError):
            return pool.raw("a").local_prefix(SPACE, KEYS) == len(KEYS)
        return False

    wait_for(there_is_room, "there is room again", pause_s=0.2)


def test_head_is_what_the_garbage_says() -> None:
    """The wire's head has 16 bytes: what the frames above are made of."""
    assert struct.calcsize("<4sIQ") == HEAD.size == 16
