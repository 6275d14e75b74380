"""A block file is a slot's extent: ``| header area | payload | rounding |``; here its bytes are judged.

The layout of the header is the slot's own, see ``kvpool/tiers/dram.py``. The header ends where the payload
begins, so a file whose number of layers is not known is searched for it, in steps of 512 bytes.
"""

from __future__ import annotations

import struct

import xxhash

from kvpool.errors import InvalidArgumentError
from kvpool.model import CHECKSUM_BYTES, FORMAT_VERSION, LAYERS_MAX
from kvpool.tiers.dram import (
    HEADER_ALIGN_BYTES,
    HEADER_FIXED_BYTES,
    SLOT_MAGIC,
    SlotHeader,
    fixed_part,
    header_area,
    pack_header,
    parse_header,
)
from kvpool.tiers.store import FileName, StoreBrokenError

__all__ = ["build", "content", "extent_bytes", "parse", "payload", "verify"]


def extent_bytes(shard_bytes: int, layers: int) -> int:
    """Return the length of a file, and of a slot's extent, whose payload has ``shard_bytes`` in so many layers."""
    return header_area(layers) + -(-shard_bytes // HEADER_ALIGN_BYTES) * HEADER_ALIGN_BYTES


def verify(extent: memoryview, name: FileName, shard_bytes: int, layers: int) -> bytes:
    """Return the checksums (8 bytes a layer) of an extent that holds what its name says, every byte of it.

    Raises StoreBrokenError with the reason: another length, magic, version, header checksum, namespace, key,
    shard, size, number of layers, or a layer whose bytes have another xxh3-64.
    """
    if len(extent) != extent_bytes(shard_bytes, layers):
        raise _broken(name, f"{len(extent)} bytes instead of {extent_bytes(shard_bytes, layers)}")
    try:
        header = parse_header(extent, header_area(layers))
    except InvalidArgumentError as exc:
        raise _broken(name, exc.problem) from None
    for what, found, wanted in (
        ("namespace", header.namespace.hex(), name.namespace.hex()),
        ("key", header.key.hex(), name.key.hex()),
        ("shard", header.shard, name.shard),
        ("shard_bytes", header.shard_bytes, shard_bytes),
        ("layers", header.layers, layers),
    ):
        if found != wanted:
            raise _broken(name, f"{what} is {found}")
    wrong = _wrong_layers(extent, header)
    if wrong:
        raise _broken(name, f"layers {wrong} are not what was written" if wrong[1:] else f"layer {wrong[0]} is changed")
    return header.checksums


def content(extent: memoryview, name: FileName, layers: int) -> tuple[int, bytes]:
    """Return (shard_bytes, checksums) of an extent that holds what its name says, however long its payload is.

    As ``verify``, of which this is the short way for what is right.
    """
    area = header_area(layers)
    header_at = area - HEADER_FIXED_BYTES - CHECKSUM_BYTES * layers
    shard_bytes = 0
    if len(extent) > area:
        found, shard_bytes, own = fixed_part(extent, area)
        step = shard_bytes // layers
        if (
            found == (SLOT_MAGIC, FORMAT_VERSION, layers, name.namespace + name.key, name.shard)
            and len(extent) == extent_bytes(shard_bytes, layers)
            and step * layers == shard_bytes > 0
            and xxhash.xxh3_64_intdigest(extent[header_at : area - CHECKSUM_BYTES]) == own
        ):
            checksums = bytes(extent[header_at : area - HEADER_FIXED_BYTES])
            wanted = struct.unpack(f"<{layers}Q", checksums)
            found_sums = [
                xxhash.xxh3_64_intdigest(extent[at : at + step]) for at in range(area, area + shard_bytes, step)
            ]
            if found_sums == list(wanted):
                return shard_bytes, checksums
    return shard_bytes, verify(extent, name, shard_bytes, layers)


def parse(extent: memoryview) -> SlotHeader:
    """Return the header of a file whose number of layers is not known; the payload is not looked at.

    Raises StoreBrokenError unless there is one that fits the file's length.
    """
    last = min(len(extent), header_area(LAYERS_MAX))
    for offset in range(HEADER_ALIGN_BYTES, last + 1, HEADER_ALIGN_BYTES):
        fixed_at = offset - HEADER_FIXED_BYTES
        if extent[fixed_at : fixed_at + len(SLOT_MAGIC)] != SLOT_MAGIC:
            continue
        try:
            header = parse_header(extent, offset)
        except InvalidArgumentError:
            continue
        if header_area(header.layers) == offset and extent_bytes(header.shard_bytes, header.layers) == len(extent):
            return header
    raise StoreBrokenError("no block's header, or one of another length")


def payload(extent: memoryview, header: SlotHeader) -> memoryview:
    """Return the part of an extent that is the shard's bytes."""
    start = header_area(header.layers)
    return extent[start : start + header.shard_bytes]


def build(name: FileName, data: bytes | memoryview, layers: int, generation: int = 0) -> bytearray:
    """Return a whole extent for a shard's bytes, as a node's segment has it."""
    extent = bytearray(extent_bytes(len(data), layers))
    start = header_area(layers)
    extent[start : start + len(data)] = data
    step = len(data) // layers
    checksums = b"".join(
        xxhash.xxh3_64_intdigest(data[at : at + step]).to_bytes(CHECKSUM_BYTES, "little")
        for at in range(0, step * layers, step)
    )
    header = SlotHeader(name.namespace, name.key, name.shard, len(data), layers, generation, checksums)
    pack_header(memoryview(extent), start, header)
    return extent


def _wrong_layers(extent: memoryview, header: SlotHeader) -> list[int]:
    data = payload(extent, header)
    step = header.shard_bytes // header.layers
    checksums = header.checksums
    return [
        layer
        for layer in range(header.layers)
        if xxhash.xxh3_64_intdigest(data[layer * step : (layer + 1) * step])
        != int.from_bytes(checksums[layer * CHECKSUM_BYTES : (layer + 1) * CHECKSUM_BYTES], "little")
    ]


def _broken(name: FileName, reason: str) -> StoreBrokenError:
    return StoreBrokenError(f"{name}: {reason}")
