"""Blocks from other nodes: many requests of one get, to owners that may be lost."""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from kvpool import client_peers
from kvpool.client_bytes import Bytes, CopyThreads
from kvpool.client_health import Health
from kvpool.client_peers import Peer, Peers, Source, Want, Wanted
from kvpool.errors import UnavailableError
from kvpool.model import NodeAddress
from kvpool.rpc.v1 import node_pb2

SIZE = 512
BLOCKS = 12
SLOW = NodeAddress("slow", "127.0.0.1", 1)
WELL = NodeAddress("well", "127.0.0.1", 2)


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peers]:
    """Nodes of which each request asks for two blocks, and that nobody leaves alone."""
    monkeypatch.setattr(client_peers, "REQUEST_BYTES", 2 * SIZE)
    health = Health(1000, 60.0)
    found = Peers(health, 0.1)
    yield found
    found.close()
    health.close()


def fetched(
    peers: Peers, blocks: int, owners: Sequence[NodeAddress], *, threads: int = 1, timeout_s: float = 5.0
) -> dict[int, str]:
    """Get so many blocks, each of which these nodes have; returns their reasons."""
    with contextlib.closing(CopyThreads(threads)) as copies:
        copies.streams = threads
        wanted = [
            Wanted(n, bytes([n]) * 16, [np.zeros(SIZE, np.uint8)], [Source(owner) for owner in owners])
            for n in range(blocks)
        ]
        return peers.get(bytes(16), wanted, Want(0, 0, 1, SIZE), copies, timeout_s)


def test_nodes_that_the_master_no_longer_names_are_forgotten(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody probes them, and their channels are closed; not before they are missing for long."""
    slow, well = peers.at(SLOW), peers.at(WELL)
    peers.named([WELL])
    assert peers.at(SLOW) is slow
    monkeypatch.setattr(client_peers, "UNNAMED_S", 0.0)
    peers.named([WELL])
    assert peers.at(WELL) is well
    with pytest.raises(UnavailableError, match="closed"), slow.channel(1.0):
        pass
    assert slow.guard not in peers._health._guards
    assert well.guard in peers._health._guards
    assert set(peers._last) == {"well"}


def test_a_call_that_outlives_its_client_opens_no_channel(peers: Peers) -> None:
    """Nobody would close it."""
    peers.close()
    with pytest.raises(UnavailableError, match="the channels are closed"), peers.at(WELL).channel(1.0):
        pass


@pytest.mark.parametrize("wait_s", [0.0, 2 * client_peers.PATIENCE_S])
@pytest.mark.parametrize("threads", [1, 4])
def test_an_owner_that_keeps_us_waiting_does_so_once(
    peers: Peers, monkeypatch: pytest.MonkeyPatch, wait_s: float, threads: int
) -> None:
    """Its other blocks are asked of others at once; one that fails quickly is worth each try."""
    asked: list[str] = []

    def get(self: Peer, namespace: bytes, items: Sequence[Wanted], *rest: Any) -> Iterator[str]:
        asked.append(self.address.node_id)
        if self.address is SLOW:
            time.sleep(wait_s)
            raise UnavailableError("no answer")
        yield from [""] * len(items)

    monkeypatch.setattr(Peer, "get", get)
    if not wait_s:
        monkeypatch.setattr(client_peers, "PATIENCE_S", 60.0)  # whatever the machine does meanwhile, it was quick
    reasons = fetched(peers, BLOCKS, [SLOW, WELL], threads=threads)
    assert reasons == dict.fromkeys(range(BLOCKS), "")
    requests = BLOCKS // 2
    assert asked.count("well") == requests
    if wait_s:
        assert 1 <= asked.count("slow") <= threads
    else:
        assert asked.count("slow") == requests


def test_blocks_that_came_before_a_failure_are_not_asked_for_again(
    peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the rest of the request is another owner's."""
    asked: list[int] = []

    def get(self: Peer, namespace: bytes, items: Sequence[Wanted], *rest: Any) -> Iterator[str]:
        if self.address is SLOW:
            yield ""
            raise UnavailableError("no answer")
        asked.extend(item.number for item in items)
        yield from [""] * len(items)

    monkeypatch.setattr(Peer, "get", get)
    monkeypatch.setattr(client_peers, "PATIENCE_S", 60.0)  # whatever the machine does meanwhile, it was quick
    reasons = fetched(peers, 4, [SLOW, WELL])
    assert reasons == dict.fromkeys(range(4), "")
    assert asked == [1, 3]


def test_what_a_call_had_no_time_for_is_late(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing of the owner, who may have been sending."""

    def get(self: Peer, namespace: bytes, items: Sequence[Wanted], want: Want, timeout_s: float, *_: Any) -> list[str]:
        time.sleep(timeout_s)
        raise UnavailableError("deadline exceeded")

    monkeypatch.setattr(Peer, "get", get)
    reasons = fetched(peers, 4, [SLOW], timeout_s=0.05)
    assert reasons[0] == "late"


class Stream:
    """A channel whose answer's payload is these bytes."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self.calls: list[int] = []

    @property
    def payload_left(self) -> int:
        """Bytes that were not taken yet."""
        return len(self._payload)

    def recv_into(self, buffers: Sequence[memoryview]) -> None:
        self.calls.append(sum(map(len, buffers)))
        for buffer in buffers:
            buffer[:] = self._payload[: len(buffer)]
            self._payload = self._payload[len(buffer) :]


class Breaking(Stream):
    """One that begins a long answer and breaks off."""

    payload_left = 1 << 20

    def begin(self, *_: Any, **__: Any) -> node_pb2.NodeFrameReply:
        return node_pb2.NodeFrameReply(got=node_pb2.Got(layers=1))

    def recv_into(self, buffers: Sequence[memoryview]) -> None:
        if sum(map(len, buffers)) > len(self._payload):
            raise UnavailableError("deadline exceeded")
        super().recv_into(buffers)


@pytest.mark.parametrize("come", [0, 1])
def test_a_node_whose_bytes_come_is_not_left_alone_for_being_slow(monkeypatch: pytest.MonkeyPatch, come: int) -> None:
    """Calls that have no time left in the middle of an answer are no failures in a row; answers without bytes are."""
    block = np.arange(SIZE, dtype=np.uint16).view(np.uint8)[:SIZE]
    begun = struct.pack("<2q2Q", SIZE, SIZE, *[xxh3_64_intdigest(block)] * 2) + come * block.tobytes()
    pool = SimpleNamespace(channel=lambda _: contextlib.nullcontext(Breaking(begun)))
    health = Health(3, 60.0)
    peer = Peer(SLOW, health, 0.1)
    monkeypatch.setattr(peer, "_pool", pool)
    monkeypatch.setattr(client_peers, "STEP_BYTES", SIZE)
    items = [Wanted(n, bytes(16), [np.zeros(SIZE, np.uint8)], [Source(SLOW)]) for n in range(2)]
    for _ in range(3):
        came: list[str] = []
        with pytest.raises(UnavailableError):
            came.extend(peer.get(bytes(16), items, Want(0, 0, 1, SIZE), 1.0))
        assert came == [""] * come
    assert peer.guard.closed == bool(come)
    health.close()


@settings(max_examples=200)
@given(
    layers=st.integers(1, 5),
    layer_bytes=st.sampled_from([1, 7, 16, 33]),
    form=st.sampled_from(["one piece", "a piece a layer", "with gaps"]),
    blocks=st.lists(st.sampled_from(["right", "right", "right", "absent", "other size", "broken"]), max_size=12),
    step=st.sampled_from([1, 16, 40, 1000]),
    seed=st.integers(0, 2**32 - 1),
)
def test_an_answers_blocks_are_received_each_where_it_belongs(
    layers: int, layer_bytes: int, form: str, blocks: list[str], step: int, seed: int
) -> None:
    """Whatever lies between them, and however many fit one step; one that is wrong costs no other."""
    rng = np.random.default_rng(seed)
    want = Want(0, 0, layers, layer_bytes)
    payload, sizes, checksums, contents = b"", [], [], []
    for kind in blocks:
        size = {"absent": -1, "other size": want.bytes + 3}.get(kind, want.bytes)
        content = rng.integers(0, 256, max(size, 0), np.uint8)
        sizes.append(size)
        contents.append(content)
        payload += content.tobytes()
        if size >= 0:
            right = [xxh3_64_intdigest(part) for part in content[: want.bytes].reshape(layers, layer_bytes)]
            checksums += [right[0] ^ 1, *right[1:]] if kind == "broken" else right
    targets = [_target(form, layers, layer_bytes) for _ in blocks]
    stream = Stream(payload)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_peers, "STEP_BYTES", step)
        found = client_peers.receive_blocks(stream, sizes, targets, want, tuple(checksums))  # type: ignore[arg-type]
        reasons = list(found)
    said = {"right": "", "absent": "not_here", "other size": "wrong_size", "broken": "corrupt"}
    assert reasons == [said[kind] for kind in blocks]
    for kind, target, content in zip(blocks, targets, contents, strict=True):
        if kind == "right":
            assert b"".join(piece.tobytes() for piece in target) == content.tobytes()
    assert not stream.payload_left
    if blocks == ["right"] * len(blocks) and form == "one piece" and step == 1000:
        assert len(stream.calls) <= 1 + want.bytes * len(blocks) // (step - want.bytes)


def _target(form: str, layers: int, layer_bytes: int) -> list[Bytes]:
    if form == "one piece":
        return [np.zeros(layers * layer_bytes, np.uint8)]
    if form == "a piece a layer":
        return [np.zeros(layer_bytes, np.uint8) for _ in range(layers)]
    return [np.zeros((layer_bytes, 2), np.uint8)[:, :1] for _ in range(layers)]
