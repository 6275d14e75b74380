"""Frames: the incremental parser takes anything and gives frames or FrameError."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.errors import FrameError
from kvpool.rpc.v1.node_pb2 import LocalPrefix, NodeFrame, Pin
from kvpool.transport.frames import (
    ALIGN_BYTES,
    HEAD,
    HEADER_BYTES_MAX,
    MAGIC,
    FrameParser,
    encode,
    frame_buffers,
    parse_message,
)

LIMIT = 4096


def one(frame_id: int, payload: bytes) -> bytes:
    return encode(NodeFrame(id=frame_id, pin=Pin(namespace=b"n" * 16, shards=[0, 3])), len(payload)) + payload


def drain(parser: FrameParser) -> list[tuple[int, bytes]]:
    frames = []
    while (header := parser.header()) is not None:
        message = parse_message(NodeFrame, header.message)
        payload = parser.payload()
        if payload is None:
            break
        frames.append((message.id, bytes(payload)))
    return frames


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(c % (len(data) + 1) for c in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges) if a < b]


@given(st.lists(st.binary(max_size=300), max_size=6), st.lists(st.integers(0, 1 << 16), max_size=12))
def test_any_chunks_give_the_frames_that_were_sent(payloads: list[bytes], cuts: list[int]) -> None:
    """However the stream is cut, the same frames come out, and nothing is left."""
    parser = FrameParser(LIMIT)
    frames = []
    for piece in pieces(b"".join(one(i, p) for i, p in enumerate(payloads)), cuts):
        parser.feed(piece)
        frames += drain(parser)
    assert frames == list(enumerate(payloads))
    assert parser.buffered == 0


garbage = st.one_of(
    st.binary(max_size=200),
    st.binary(max_size=200).map(MAGIC.__add__),
    st.builds(
        lambda header, payload, rest: HEAD.pack(MAGIC, header, payload) + rest,
        st.sampled_from([0, 1, 5, HEADER_BYTES_MAX, HEADER_BYTES_MAX + 1, (1 << 32) - 1]),
        st.sampled_from([0, 1, LIMIT, LIMIT + 1, 1 << 63, (1 << 64) - 1]),
        st.binary(max_size=200),
    ),
    st.builds(lambda payload, bit: flipped(one(7, payload), bit), st.binary(max_size=64), st.integers(0, 1 << 16)),
    st.builds(lambda payload, keep: one(7, payload)[:keep], st.binary(max_size=64), st.integers(0, 100)),
)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8 % len(changed)] ^= 1 << bit % 8
    return bytes(changed)


@settings(max_examples=500)
@given(st.lists(garbage, max_size=4), st.lists(st.integers(0, 1 << 16), max_size=8))
def test_garbage_is_frames_or_frame_error(parts: list[bytes], cuts: list[int]) -> None:
    """Garbage, truncations, flipped bits, lengths of 0 and 2**63: only FrameError, and memory for what came."""
    parser = FrameParser(LIMIT)
    fed = 0
    try:
        for piece in pieces(b"".join(parts), cuts):
            parser.feed(piece)
            fed += len(piece)
            drain(parser)
            assert parser.buffered <= fed
    except FrameError as exc:
        assert str(exc)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"GET ", "magic"),
        (b"KVP2" + bytes(12), "magic"),
        (HEAD.pack(MAGIC, HEADER_BYTES_MAX + 1, 0), "header has 1048577"),
        (HEAD.pack(MAGIC, 0, 1 << 63), "payload has 9223372036854775808"),
        (HEAD.pack(MAGIC, 4, 0) + b"\xff\xff\xff\xff", "not a NodeFrame"),
    ],
)
def test_error_names_what_is_wrong(data: bytes, named: str) -> None:
    """The message says which part of the frame is not allowed."""
    parser = FrameParser(LIMIT)
    parser.feed(data)
    with pytest.raises(FrameError, match=named):
        drain(parser)


def test_payload_views_outlive_the_next_feed() -> None:
    """A payload stays what it was while later bytes arrive."""
    parser = FrameParser(LIMIT)
    views = []
    stream = b"".join(one(i, bytes([i]) * 100) for i in range(20))
    for i in range(0, len(stream), 37):
        parser.feed(stream[i : i + 37])
        while parser.header() is not None and (payload := parser.payload()) is not None:
            views.append(payload)
    assert [bytes(v) for v in views] == [bytes([i]) * 100 for i in range(20)]


def test_whole_frame_in_one_piece_is_not_copied() -> None:
    """The payload is a view of the bytes that were fed."""
    data = one(1, b"x" * 50)
    parser = FrameParser(LIMIT)
    parser.feed(data)
    parser.header()
    payload = parser.payload()
    assert payload is not None
    assert payload.obj is data


def test_skipped_payload_is_taken_raw() -> None:
    """After skip_header the buffered part of a payload comes from take, and the next frame follows it."""
    parser = FrameParser(1 << 40)
    parser.feed(one(1, b"abcdef") + one(2, b""))
    parser.header()
    parser.skip_header()
    assert bytes(parser.take(4)) == b"abcd"
    assert bytes(parser.take(2)) == b"ef"
    assert drain(parser) == [(2, b"")]


@given(st.binary(max_size=70), st.binary(max_size=70))
def test_bulk_begins_aligned_and_the_message_is_the_same(namespace: bytes, before: bytes) -> None:
    """Padding puts the first large buffer at a multiple of 64 bytes and changes no field."""
    message = NodeFrame(id=9, local_prefix=LocalPrefix(namespace=namespace, shards=2))
    bulk = bytes(1 << 15)
    frame = frame_buffers(message, [memoryview(before), memoryview(bulk)])
    assert (len(frame[0]) + len(before)) % ALIGN_BYTES == 0
    parser = FrameParser(1 << 20)
    parser.feed(b"".join(frame))
    header = parser.header()
    assert header is not None
    parsed = parse_message(NodeFrame, header.message)
    parsed.DiscardUnknownFields()
    assert parsed == message
    assert bytes(parser.payload() or b"") == before + bulk


def test_header_over_the_limit_is_not_sent() -> None:
    """A message that no reader would take is refused by its writer."""
    with pytest.raises(FrameError, match="header has"):
        encode(NodeFrame(pin=Pin(namespace=bytes(HEADER_BYTES_MAX))))
