"""Prompts that are read while they are written: by shared memory and TCP, and when somebody dies meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import platform
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from kvpool import Client, Namespace
from kvpool.client_node import LocalNode
from kvpool.client_receive import _Receive
from kvpool.client_results import GetResult, PutResult
from kvpool.core.slot_table import ordered
from kvpool.errors import InvalidArgumentError, UnavailableError
from kvpool.model import NodeAddress
from kvpool.rpc.v1.node_pb2 import Get, NodeFrame, NodeFrameReply, Pin, Progress, Reserve
from tests.integration.pool import SPACE, Bytes, Pool, Process, T, chain_of, content_of, put_chain, wait_for

SIZE = 64 << 10
LAYERS = SPACE.shard_layers
STEP = SIZE // LAYERS
KEYS = chain_of(1, 32)
TRANSFER = 0x1234_5678_9ABC_DEF0


def address_of(pool: Pool, name: str) -> NodeAddress:
    at = pool.statuses()[name].address
    return NodeAddress(at.node_id, at.host, at.port, at.socket_path, at.boot_id)


def layers_of(put_wanted: list[int], first: int, end: int, keys: list[bytes] = KEYS) -> list[Bytes]:
    return [content_of(keys[number], SIZE)[first * STEP : end * STEP] for number in put_wanted]


class Writer:
    """The process that writes, and the files that it waits for."""

    def __init__(self, pool: Pool, node: str = "a") -> None:
        self._directory = pool.directory / "go"
        self._directory.mkdir()
        arguments = (
            "tests.integration.layer_writer", pool.address, pool.socket_path(node), str(self._directory), "1",
            str(len(KEYS)), str(SIZE), str(TRANSFER),
        )  # fmt: skip
        self.process: Process = pool.adopt("writer", arguments)
        wait_for(lambda: self.process.says(f"reserved {len(KEYS)}"), "the writer has reserved")

    def write(self, layer: int) -> None:
        """Have a layer written."""
        (self._directory / f"layer{layer}").touch()
        wait_for(lambda: self.process.says(f"wrote {layer}"), f"layer {layer} is written")

    def commit(self) -> None:
        """Have everything committed."""
        (self._directory / "commit").touch()
        wait_for(lambda: self.process.says(f"committed {len(KEYS)}"), "all is committed")


class Reader(threading.Thread):
    """A receive under way; ``layered`` buffers are one a layer."""

    def __init__(
        self,
        client: Client,
        node: NodeAddress,
        *,
        keys: list[bytes] = KEYS,
        transfer: int = TRANSFER,
        alive: Callable[[], bool] = lambda: True,
        timeout_s: float = T,
        layered: bool = False,
    ) -> None:
        super().__init__(daemon=True)
        self.keys = keys
        self.buffers = [np.zeros(SIZE, np.uint8) for _ in keys]
        self.result: GetResult | None = None
        self.seconds = 0.0
        blocks = [list(np.split(buffer, LAYERS)) for buffer in self.buffers] if layered else self.buffers

        def run() -> None:
            begin = time.monotonic()
            self.result = client.receive(
                SPACE, keys, blocks, shard=0, transfer=transfer, node=node, alive=alive, timeout_ms=1000 * timeout_s
            )
            self.seconds = time.monotonic() - begin

        self.run = run  # type: ignore[method-assign]
        self.start()

    def has(self, layer: int) -> bool:
        """Whether a layer of every block has come."""
        part = slice(layer * STEP, (layer + 1) * STEP)
        pairs = zip(self.keys, self.buffers, strict=True)
        return all(np.array_equal(buffer[part], content_of(key, SIZE)[part]) for key, buffer in pairs)

    def ended(self) -> GetResult:
        """Wait for the end; the blocks that are said to be here are right."""
        self.join(T)
        assert self.result is not None
        for key, buffer, ok in zip(self.keys, self.buffers, self.result.ok, strict=True):
            assert not ok or np.array_equal(buffer, content_of(key, SIZE)), "wrong bytes"
        return self.result


def readers(pool: Pool, **options: object) -> list[Reader]:
    """Return a reader on the writer's host and one on another, of the node "a"."""
    node = address_of(pool, "a")
    near, far = pool.client("a"), pool.client("b")
    for client in (near, far):
        client.register(SPACE)
    return [Reader(near, node, layered=True, **options), Reader(far, node, **options)]  # type: ignore[arg-type]


def test_layers_are_read_before_the_last_is_written(pool: Pool) -> None:
    """Readers on the same host and over TCP, there before the writer is, have each layer when it is written."""
    both = readers(pool)
    writer = Writer(pool)
    for layer in range(LAYERS):
        assert not any(reader.has(layer) for reader in both)
        writer.write(layer)
        for reader in both:
            wait_for(lambda r=reader, n=layer: r.has(n), f"layer {layer} is read")  # type: ignore[misc]
    writer.commit()
    for reader, tier in zip(both, ("local", "remote"), strict=True):
        result = reader.ended()
        assert (result.prefix, result.reasons, result.tiers) == (len(KEYS), {}, {tier: len(KEYS)})
    assert readers(pool)[1].ended().prefix == len(KEYS), "what is committed is received as a whole"
    pool.wait_idle("a")


def test_blocks_put_as_a_whole_are_received_as_they_come(pool: Pool) -> None:
    """Those of a put that does not name the transfer, too."""
    both = readers(pool)
    client = pool.client("a")
    put_chain(client, SPACE, KEYS[:10], SIZE)
    for reader in both:
        wait_for(lambda r=reader: all(b.any() for b in r.buffers[:10]), "the first blocks have come")  # type: ignore[misc]
    blocks = [content_of(key, SIZE) for key in KEYS]
    assert client.put(SPACE, KEYS[:20], blocks[:20], transfer=TRANSFER).existed == 10
    assert client.put_async(SPACE, KEYS, blocks, transfer=TRANSFER).result(T).stored == 12
    assert [reader.ended().prefix for reader in both] == [len(KEYS)] * 2


@pytest.mark.skipif(not ordered(platform.machine()), reason="this processor's clients always pin")
def test_what_is_whole_by_now_is_read_without_asking(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a transfer's writer has committed; of the rest, between and behind, the node is asked."""
    client, other = pool.client("a"), pool.client("a")
    for at in (0, 12):
        blocks = slice(at, at + 10)
        contents = [content_of(key, SIZE) for key in KEYS[blocks]]
        assert other.put(SPACE, KEYS[blocks], contents, transfer=TRANSFER).stored == 10
    reads, listed = LocalNode.get_listed, list[int]()

    def get_listed(*arguments: Any) -> list[str]:
        reasons = reads(*arguments)
        listed.append(reasons.count(""))
        return reasons

    asked = []
    ask = LocalNode.long_channel

    def long_channel(node: LocalNode, timeout_s: float) -> Any:
        asked.append(timeout_s)
        return ask(node, timeout_s)

    monkeypatch.setattr(LocalNode, "get_listed", get_listed)
    monkeypatch.setattr(LocalNode, "long_channel", long_channel)
    node = address_of(pool, "a")
    client.register(SPACE)
    some = KEYS[:10] + KEYS[12:22]

    def unasked() -> bool:
        asked.clear()
        result = Reader(client, node, keys=some).ended()
        assert result.prefix == len(some) and result.tiers == {"local": len(some)}
        return not asked

    wait_for(unasked, "they are listed soon after the put")
    reader = Reader(client, node)
    wait_for(lambda: asked, "the others are asked for")
    put_chain(other, SPACE, KEYS, SIZE)
    result = reader.ended()
    assert (result.prefix, result.tiers) == (len(KEYS), {"local": len(KEYS)})
    assert listed[-1] == len(some)
    pool.wait_idle("a")


def test_writers_and_readers_need_no_node_of_their_own(bare_pool: Pool) -> None:
    """Blocks that come to a node over TCP are waited for over TCP."""
    bare_pool.start_master()
    bare_pool.start_node("a")
    writer, reader = bare_pool.client(), bare_pool.client()
    for client in (writer, reader):
        client.register(SPACE)
    waiting = Reader(reader, address_of(bare_pool, "a"))
    assert writer.put(SPACE, KEYS, [content_of(key, SIZE) for key in KEYS], transfer=TRANSFER).stored == len(KEYS)
    assert waiting.ended().tiers == {"remote": len(KEYS)}
    bare_pool.wait_idle("a")


def test_others_see_nothing_before_the_commit(pool: Pool) -> None:
    """Readers of another transfer, gets and lookups do not; the transfer's readers do."""
    writer = Writer(pool)
    for layer in range(LAYERS):
        writer.write(layer)
    others = readers(pool, transfer=TRANSFER + 1, alive=lambda: False)
    assert [reader.ended().reasons for reader in others] == [{"not_here": len(KEYS)}] * 2
    assert not any(buffer.any() for reader in others for buffer in reader.buffers)
    client = pool.client("a")
    client.register(SPACE)
    assert client.get(SPACE, KEYS, [np.zeros(SIZE, np.uint8) for _ in KEYS]).prefix == 0
    assert client.lookup(SPACE, KEYS).prefix == 0
    assert [reader.ended().prefix for reader in readers(pool)] == [len(KEYS)] * 2
    waiting = readers(pool, transfer=TRANSFER + 1)
    writer.commit()
    assert [reader.ended().prefix for reader in waiting] == [len(KEYS)] * 2


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_writer_that_is_gone_ends_its_readers_in_time(pool: Pool, how: str) -> None:
    """They have a prefix of nothing, with the reason; nothing stays pinned or reserved; stopped, it may go on."""
    writer = Writer(pool)
    gone = threading.Event()
    both = readers(pool, alive=lambda: not gone.is_set())
    writer.write(0)
    for reader in both:
        wait_for(lambda r=reader: r.has(0), "layer 0 is read")  # type: ignore[misc]
    with contextlib.ExitStack() as stopped:
        if how == "killed":
            writer.process.kill()
        else:
            stopped.enter_context(writer.process.stopped())
        gone.set()
        for reader in both:
            result = reader.ended()
            assert (result.prefix, result.reasons) == (0, {"not_here": len(KEYS)})
    if how == "stopped":
        for layer in range(1, LAYERS):
            writer.write(layer)
        writer.commit()
        assert [reader.ended().prefix for reader in readers(pool)] == [len(KEYS)] * 2
    pool.wait_idle("a")


def test_the_deadline_ends_a_wait(pool: Pool) -> None:
    """Even where the writer is said to live: what is whole by then is the prefix."""
    put_chain(pool.client("a"), SPACE, KEYS[:7], SIZE)
    for reader in readers(pool, timeout_s=1.5):
        result = reader.ended()
        assert (result.prefix, result.reasons) == (7, {"late": len(KEYS) - 7})
        assert 1.4 < reader.seconds < T
    pool.wait_idle("a")


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_node_that_is_gone_ends_its_readers(pool: Pool, how: str) -> None:
    """With the reason; the writer's calls end as well, and say what has failed."""
    client = pool.client("a")
    client.register(SPACE)
    put = client.put_layers(SPACE, KEYS, shard=0, shard_bytes=SIZE, transfer=TRANSFER)
    assert put is not None
    both = readers(pool)
    put.write(0, 1, layers_of(put.wanted, 0, 1))
    for reader in both:
        wait_for(lambda r=reader: r.has(0), "layer 0 is read")  # type: ignore[misc]
    with contextlib.ExitStack() as stopped:
        if how == "killed":
            pool.nodes["a"].kill()
        else:
            stopped.enter_context(pool.nodes["a"].stopped())
        for reader in both:
            result = reader.ended()
            assert (result.prefix, result.reasons) == (0, {"unavailable": len(KEYS)})
        put.write(1, LAYERS, layers_of(put.wanted, 1, LAYERS))
        result_of_put = put.commit()
        assert (result_of_put.stored, result_of_put.errors) == (0, {"unavailable": len(KEYS)})
        assert put.commit() == result_of_put
        put.abort()
    if how == "killed":
        pool.start_node("a")
    wait_for(client.has_node, "the node is attached again")

    def stored() -> bool:  # by the commit that a stopped node found waiting, or now
        put_chain(client, SPACE, KEYS, SIZE)
        with pool.raw("a") as node:
            return node.local_prefix(SPACE, KEYS) == len(KEYS)

    wait_for(stored, "the writer's slots are free")
    pool.wait_idle("a")


def test_a_flipped_bit_ends_the_prefix_there(pool: Pool) -> None:
    """Also in a layer that is read before the commit, and by a client that need not verify what is local."""
    client = pool.client("a")
    client.register(SPACE)
    put = client.put_layers(SPACE, KEYS, shard=0, shard_bytes=SIZE, transfer=TRANSFER)
    assert put is not None
    put.write(0, 2, layers_of(put.wanted, 0, 2))
    node = client._local()
    assert node is not None
    node._memory[put._offsets[5] + STEP + 17] ^= 4
    trusting = pool.client("a", checksum="transfer")
    trusting.register(SPACE)
    some = [*readers(pool), Reader(trusting, address_of(pool, "a"))]
    for reader in some:
        wait_for(lambda r=reader: r.buffers[4][STEP : 2 * STEP].any(), "the first layers are read")  # type: ignore[misc]
    put.write(2, LAYERS, layers_of(put.wanted, 2, LAYERS))
    put.commit()
    for reader in some:
        result = reader.ended()
        assert (result.prefix, result.reasons) == (5, {"corrupt": len(KEYS) - 5})


@pytest.mark.parametrize("where", ["a", "b"])
def test_a_slow_copy_is_no_silence_of_the_node(pool: Pool, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """What was answered while the part before was copied is taken, however long that took."""
    monkeypatch.setattr("kvpool.client_receive.PART_BYTES_MIN", SIZE)
    monkeypatch.setattr("kvpool.client_receive.CONTROL_S", 0.2)
    put_chain(pool.client("a"), SPACE, KEYS, SIZE)
    take = _Receive._take

    def slowly(*arguments: Any) -> None:
        time.sleep(0.4)
        take(*arguments)

    monkeypatch.setattr("kvpool.client_receive._Receive._take", slowly)
    client = pool.client(where)
    assert Reader(client, address_of(pool, "a")).ended().prefix == len(KEYS)
    assert client.has_node()


def test_two_writers_of_a_block(pool: Pool) -> None:
    """The second leaves it to the first; its readers wait for the first one's commit."""
    client = pool.client("a")
    client.register(SPACE)
    first = client.put_layers(SPACE, KEYS[:20], shard=0, shard_bytes=SIZE, transfer=TRANSFER)
    second = client.put_layers(SPACE, KEYS, shard=0, shard_bytes=SIZE, transfer=TRANSFER + 1)
    assert first is not None
    assert second is not None
    assert second.wanted == list(range(20, len(KEYS)))
    both = readers(pool, transfer=TRANSFER + 1)
    second.write(0, LAYERS, layers_of(second.wanted, 0, LAYERS))
    assert (second.commit().stored, second.commit().existed) == (12, 20)
    first.write(0, LAYERS, layers_of(first.wanted, 0, LAYERS))
    assert not any(reader.buffers[0].any() for reader in both)
    assert first.commit().stored == 20
    assert [reader.ended().prefix for reader in both] == [len(KEYS)] * 2
    assert client.put_layers(SPACE, KEYS, shard=0, shard_bytes=SIZE, transfer=TRANSFER).wanted == []  # type: ignore[union-attr]


def test_what_is_incomplete_or_aborted_is_given_back(pool: Pool) -> None:
    """And what the caller gets wrong is said by name, before anything is written."""
    client = pool.client("a")
    client.register(SPACE)
    for end in ("commit", "abort"):
        put = client.put_layers(SPACE, KEYS, shard=0, shard_bytes=SIZE, transfer=TRANSFER)
        assert put is not None
        for first, last, blocks, field in (
            (1, 2, layers_of(put.wanted, 1, 2), "first_layer"),
            (0, 0, layers_of(put.wanted, 0, 1), "first_layer"),
            (0, LAYERS + 1, layers_of(put.wanted, 0, 1), "first_layer"),
            (0, 1, layers_of(put.wanted, 0, 2), "blocks"),
            (0, 1, layers_of(put.wanted[1:], 0, 1), "blocks"),
        ):
            with pytest.raises(InvalidArgumentError) as caught:
                put.write(first, last, blocks)
            assert caught.value.field == field
        put.write(0, 1, layers_of(put.wanted, 0, 1))
        if end == "commit":
            assert put.commit().errors == {"incomplete": len(KEYS)}
        put.abort()
        assert put.commit().stored == 0
        put.write(1, 2, [])
    assert pool.client().put_layers(SPACE, KEYS, shard=0, shard_bytes=SIZE, transfer=1) is None
    pool.wait_idle("a")


def test_a_put_that_the_node_refuses_keeps_nothing(pool: Pool) -> None:
    """Its blocks can be stored afterwards, by the same process too; a put of no blocks is none."""
    client = pool.client("a")
    client.register(SPACE)
    put = client.put_layers(SPACE, KEYS, shard=0, shard_bytes=SIZE, transfer=TRANSFER)
    assert put is not None
    put.write(0, 1, layers_of(put.wanted, 0, 1))
    put._digests = [[0] * LAYERS] * len(KEYS)
    put.write(1, LAYERS, layers_of(put.wanted, 1, LAYERS))
    assert put.commit().errors == {"refused": len(KEYS)}
    wait_for(lambda: client.put(SPACE, KEYS, layers_of(list(range(len(KEYS))), 0, LAYERS)).stored, "they are stored")
    none = client.put_layers(SPACE, [], shard=0, shard_bytes=SIZE, transfer=TRANSFER)
    assert none is not None
    assert (none.wanted, none.commit()) == ([], PutResult())


def bad_frames() -> Iterator[tuple[NodeFrame, bytes, str]]:
    digest, key = SPACE.digest, KEYS[0]
    for wrap, kind in ((lambda r: NodeFrame(pin=r), Pin), (lambda r: NodeFrame(get=r), Get)):
        yield wrap(kind(namespace=digest, shards=[0], wait_ms=60_001)), key, "wait_ms"
        yield wrap(kind(namespace=digest, shards=[0], wait_ms=2**32 - 1)), key, "wait_ms"
        yield wrap(kind(namespace=digest, shards=[0], wait_ms=1, fetch_ms=1)), key, "fetch_ms"
        yield wrap(kind(namespace=digest, shards=[0], transfer=2**64 - 1)), key, "transfer"
        yield wrap(kind(namespace=digest, shards=[0], wait_ms=1, first_layer=LAYERS)), key, "first_layer"
        yield wrap(kind(namespace=digest, shards=[0], wait_ms=1, first_layer=2**32 - 1)), key, "first_layer"
        yield wrap(kind(namespace=bytes(16), shards=[0], wait_ms=1, first_layer=4096)), key, "first_layer"
        yield wrap(kind(namespace=digest, shards=[0, 0], wait_ms=1)), key, "shards"
        yield wrap(kind(namespace=b"short", shards=[0], wait_ms=1)), key, "namespace"
        yield wrap(kind(namespace=digest, shards=[0], wait_ms=1)), key[1:], "keys"
    yield NodeFrame(pin=Pin(namespace=digest, shards=[0], first_layer=1)), key, "first_layer"


def test_the_node_names_the_field(pool: Pool) -> None:
    """Each new field out of its range is refused, and the connection goes on."""
    with pool.raw("a") as node:
        node.register(SPACE)
        for frame, payload, field in bad_frames():
            with pytest.raises(InvalidArgumentError, match=f"^{field}: "):
                node.call(frame, payload)
        reserve = Reserve(namespace=SPACE.digest, shards=[0], shard_bytes=SIZE, layers=LAYERS, transfer=2**64 - 1)
        reply, _ = node.call(NodeFrame(reserve=reserve), KEYS[0])
    for layers, checksums, field in ((0, b"", "layers"), (LAYERS + 1, bytes(8), "layers"), (1, bytes(7), "checksums")):
        with pool.raw("a") as node:
            reply, _ = node.call(NodeFrame(reserve=reserve), layers.to_bytes(16, "big"))
            progress = Progress(reservation=reply.reserved.reservation, layers=layers)
            node.channel.send_only(NodeFrame(progress=progress), checksums, timeout_s=T)
            with pytest.raises(UnavailableError, match=f"refused: {field}: "):  # it has no answer of its own
                node.call(NodeFrame(pin=Pin(namespace=SPACE.digest, shards=[0])), KEYS[0])
    client = pool.client("a")
    put_chain(client, SPACE, KEYS, SIZE)


def test_the_client_names_the_field(pool: Pool) -> None:
    """Misuse is an error of the caller's."""
    client, node = pool.client("a"), address_of(pool, "a")
    client.register(SPACE)
    buffers = [np.zeros(SIZE, np.uint8) for _ in KEYS]

    def receive(**changed: object) -> object:
        options = {"shard": 0, "transfer": 1, "node": node, "alive": lambda: False, "timeout_ms": 1000} | changed
        return client.receive(SPACE, KEYS, options.pop("blocks", buffers), **options)  # type: ignore[arg-type]

    def layers(**changed: int) -> object:
        return client.put_layers(SPACE, KEYS, **({"shard": 0, "shard_bytes": SIZE, "transfer": 1} | changed))  # type: ignore[arg-type]

    for call, field in (
        *((lambda t=t: receive(transfer=t), "transfer") for t in (0, -1, 1 << 64)),
        *((lambda t=t: receive(timeout_ms=t), "timeout_ms") for t in (0, float("nan"))),
        (lambda: receive(shard=1), "shard"),
        (lambda: receive(blocks=buffers[1:]), "blocks"),
        (lambda: receive(blocks=[bytes(SIZE)] * len(KEYS)), "blocks"),
        *((lambda t=t: layers(transfer=t), "transfer") for t in (0, -1, 1 << 64)),
        *((lambda s=s: layers(shard_bytes=s), "shard_bytes") for s in (0, -4, 6, 1 << 62)),
        (lambda: layers(shard=-1), "shard"),
        *((lambda t=t: client.put(SPACE, KEYS, buffers, transfer=t), "transfer") for t in (-1, 1 << 64)),
        (lambda: client.receive(Namespace(model="x").digest, KEYS, buffers, shard=0, transfer=1, node=node,
                                alive=lambda: False, timeout_ms=1), "namespace"),
    ):  # fmt: skip
        with pytest.raises(InvalidArgumentError) as caught:
            call()
        assert caught.value.field == field
    empty = client.receive(SPACE, [], [], shard=0, transfer=1, node=node, alive=lambda: False, timeout_ms=1)
    assert empty.prefix == 0
    wrong = client.put(SPACE, KEYS, [buffer[: SIZE // 2] for buffer in buffers])
    assert wrong.stored
    assert receive().reasons == {"wrong_size": len(KEYS)}  # type: ignore[attr-defined]


def test_a_reader_that_is_killed_or_closes_lets_go(pool: Pool) -> None:
    """Whether it waits or has something pinned."""
    with pool.raw("a") as writer, contextlib.ExitStack() as held:
        writer.register(SPACE)
        reserve = Reserve(namespace=SPACE.digest, shards=[0], shard_bytes=SIZE, layers=LAYERS, transfer=TRANSFER)
        reply, _ = writer.call(NodeFrame(reserve=reserve), b"".join(KEYS[:2]))
        progress = Progress(reservation=reply.reserved.reservation, layers=1)
        writer.channel.send_only(NodeFrame(progress=progress), bytes(16), timeout_s=T)
        pin = Pin(namespace=SPACE.digest, shards=[0], transfer=TRANSFER, wait_ms=60_000)
        for keys in (KEYS[:2], KEYS[:3]):
            reader = held.enter_context(pool.raw("a"))
            reader.channel.start(NodeFrame(pin=pin), b"".join(keys), timeout_s=T)
            if len(keys) == 2:
                pinned, payload = reader.channel.finish(NodeFrame(id=1), NodeFrameReply, soon=True)
                assert (pinned.pinned.ready, pinned.pinned.layers, len(payload)) == (1, LAYERS, 2 * 16 + 2 * 8)
        writer.abort(reply.reserved.reservation)
        held.close()
        pool.wait_idle("a")


def test_hammer_of_transfers(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writers in chunks, some of which give up, and readers of each: whole where all was committed, never wrong."""
    for patience in ("client_layers.CONTROL_S", "client_receive.CONTROL_S", "client_receive.PROGRESS_S"):
        monkeypatch.setattr(f"kvpool.{patience}", T)  # nobody is gone here, however crowded
    node, choice = address_of(pool, "a"), random.Random(1)
    chains = itertools.count(100)
    clients = [pool.client(name) for name in ("a", "a", "b")]
    for client in clients:
        client.register(SPACE)
    errors: list[object] = []

    def prompt(chain: int, seed: int) -> None:
        rng, transfer = random.Random(seed), chain << 32 | 1
        keys = chain_of(chain, 24)
        over = threading.Event()

        def alive() -> bool:
            return not over.is_set()

        mine = [
            Reader(client, node, keys=keys, transfer=transfer, alive=alive, layered=rng.random() < 0.5)
            for client in clients
        ]
        complete = True
        for start in range(0, len(keys), 8):
            chunk = keys[start : start + 8]
            put = clients[rng.randrange(2)].put_layers(SPACE, chunk, shard=0, shard_bytes=SIZE, transfer=transfer)
            assert put is not None
            layer = 0
            while layer < LAYERS and complete:
                end = rng.randint(layer + 1, LAYERS)
                put.write(layer, end, layers_of(put.wanted, layer, end, chunk))
                layer = end
                complete = rng.random() < 0.97
            if complete:
                assert put.commit().stored == len(chunk)
            else:
                put.abort()
                break
        over.set()
        for reader in mine:
            result = reader.ended()
            if (complete and result.prefix < len(keys)) or set(result.reasons) - {"not_here"}:
                errors.append((chain, complete, result))

    def work(seed: int) -> None:
        try:
            for number in range(6):
                prompt(next(chains), 100 * seed + number)
        except BaseException as exc:
            errors.append(exc)
            raise

    threads = [threading.Thread(target=work, args=(choice.randrange(1000),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    pool.wait_idle("a")
