"""The DRAM tier: one sealed, populated, locked memfd, and the header in front of each slot."""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass

import xxhash

from kvpool.errors import InvalidArgumentError
from kvpool.model import CHECKSUM_BYTES, DIGEST_BYTES, FORMAT_VERSION, KEY_BYTES, LAYERS_MAX, SHARDS_MAX, format_size
from kvpool.tiers.memory import allowed_bytes
from kvpool.transport.shm import AttachedSegment, MappedMemory, Progress, create_memfd, seal

__all__ = [
    "HEADER_ALIGN_BYTES",
    "HEADER_FIXED_BYTES",
    "AttachedSegment",
    "Segment",
    "SlotHeader",
    "fixed_part",
    "header_area",
    "pack_header",
    "parse_header",
    "write_header",
]


class Segment(MappedMemory):
    """A node's memory."""

    @classmethod
    def create(
        cls,
        size_bytes: int,
        *,
        tail_bytes: int = 0,
        lock: bool = True,
        limit_bytes: int | None = None,
        progress: Progress | None = None,
    ) -> Segment:
        """Return a segment that is sealed, populated and, where the limits allow it, locked.

        ``tail_bytes`` more, whole pages of zeros, lie at its end, behind the page in which ``size_bytes`` end.
        ``limit_bytes`` lowers what the cgroup and the host allow; ``progress(done, total)`` is called
        while it is populated. Raises InvalidArgumentError("segment_size") for more than is allowed.
        """
        allowed, why = allowed_bytes()
        if limit_bytes is not None and limit_bytes < allowed:
            allowed, why = limit_bytes, "the limit given"
        if size_bytes > 0:
            allowed = allowed * size_bytes // (size_bytes + tail_bytes)
        if not 0 < size_bytes <= allowed:
            raise InvalidArgumentError(
                "segment_size", f"must be from 1 to {allowed} bytes ({format_size(allowed)}, {why}), not {size_bytes}"
            )
        if tail_bytes:
            size_bytes += -size_bytes % mmap.PAGESIZE + tail_bytes
        fd = create_memfd("kvpool-segment", size_bytes)
        try:
            segment = cls(fd, size_bytes)
        except OSError as exc:
            os.close(fd)
            raise InvalidArgumentError("segment_size", f"cannot map {size_bytes} bytes: {exc.strerror}") from exc
        try:
            segment.populate(progress)
            seal(fd)
            if lock:
                segment.lock()
            else:
                segment.lock_error = "not asked for"
        except BaseException:  # whatever `progress` raises included: no gigabytes may be left behind
            segment.close()
            raise
        return segment


# ---- the header in front of a slot's payload -------------------------------------------------------
#
#   | unused | one xxh3-64 per layer | fixed part, 96 bytes | payload ...
#                                                          ^ payload_offset
#
# It ends where the payload begins, so that it can be read without knowing how many layers there are.

HEADER_FIXED_BYTES = 96  # _FIXED and the checksum
HEADER_ALIGN_BYTES = 512
SLOT_MAGIC = b"KVPSLOT1"

# magic, format version, layers, namespace digest and key, shard, -, shard bytes, generation, -; then its own checksum
_FIXED = struct.Struct("<8sII32sI4xQQ16x")
_OWN_CHECKSUM = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class SlotHeader:
    """Whose bytes a slot holds. ``checksums``: one little-endian xxh3-64 per layer."""

    namespace: bytes
    key: bytes
    shard: int
    shard_bytes: int
    layers: int
    generation: int
    checksums: bytes


def header_area(layers: int) -> int:
    """Return the bytes kept in front of a payload for the header of so many layers."""
    used = HEADER_FIXED_BYTES + CHECKSUM_BYTES * layers
    return -(-used // HEADER_ALIGN_BYTES) * HEADER_ALIGN_BYTES


def pack_header(view: memoryview, payload_offset: int, header: SlotHeader) -> None:
    """Write a slot's header in front of its payload. Raises InvalidArgumentError for fields that cannot be."""
    problem = _problem(view, payload_offset, header.layers, header.shard, header.shard_bytes)
    if not problem and len(header.checksums) != CHECKSUM_BYTES * header.layers:
        problem = f"{header.layers} layers have {CHECKSUM_BYTES * header.layers} bytes of checksums"
    if not problem and (len(header.namespace) != DIGEST_BYTES or len(header.key) != KEY_BYTES):
        problem = f"digest and key have {DIGEST_BYTES} and {KEY_BYTES} bytes"
    if problem:
        raise InvalidArgumentError("slot_header", problem)
    write_header(
        view, payload_offset, header.namespace + header.key, header.shard, header.shard_bytes, header.layers,
        header.generation, header.checksums,
    )  # fmt: skip


def write_header(
    view: memoryview,
    payload_offset: int,
    block_key: bytes,
    shard: int,
    shard_bytes: int,
    layers: int,
    generation: int,
    checksums: bytes,
) -> None:
    """Write the header of a slot whose fields the segment's own state has made; nothing is checked."""
    fixed = _FIXED.pack(SLOT_MAGIC, FORMAT_VERSION, layers, block_key, shard, shard_bytes, generation)
    header = checksums + fixed
    own = _OWN_CHECKSUM.pack(xxhash.xxh3_64_intdigest(header))
    view[payload_offset - len(header) - _OWN_CHECKSUM.size : payload_offset] = header + own


def fixed_part(view: memoryview, payload_offset: int) -> tuple[tuple[bytes, int, int, bytes, int], int, int]:
    """Return what stands in a header's place, not judged: magic to shard, shard_bytes, own checksum."""
    found = _FIXED.unpack_from(view, payload_offset - HEADER_FIXED_BYTES)
    (own,) = _OWN_CHECKSUM.unpack_from(view, payload_offset - _OWN_CHECKSUM.size)
    return found[:5], found[5], own


def parse_header(view: memoryview, payload_offset: int) -> SlotHeader:
    """Return the header in front of a payload. Raises InvalidArgumentError when there is no valid one."""
    fixed_at = payload_offset - HEADER_FIXED_BYTES
    if not 0 <= fixed_at <= len(view) - HEADER_FIXED_BYTES:
        raise InvalidArgumentError("slot_header", f"no header before offset {payload_offset} of {len(view)} bytes")
    magic, version, layers, block_key, shard, shard_bytes, generation = _FIXED.unpack_from(view, fixed_at)
    (own,) = _OWN_CHECKSUM.unpack_from(view, payload_offset - _OWN_CHECKSUM.size)
    if magic != SLOT_MAGIC:
        raise InvalidArgumentError("slot_header", f"magic is {magic!r}, not {SLOT_MAGIC!r}")
    if version != FORMAT_VERSION:
        raise InvalidArgumentError("slot_header", f"format version is {version}, not {FORMAT_VERSION}")
    problem = _problem(view, payload_offset, layers, shard, shard_bytes)
    if problem:
        raise InvalidArgumentError("slot_header", problem)
    start = fixed_at - CHECKSUM_BYTES * layers
    if xxhash.xxh3_64_intdigest(view[start : payload_offset - _OWN_CHECKSUM.size]) != own:
        raise InvalidArgumentError("slot_header", "checksum of the header is wrong")
    namespace, key = block_key[:DIGEST_BYTES], block_key[DIGEST_BYTES:]
    return SlotHeader(namespace, key, shard, shard_bytes, layers, generation, bytes(view[start:fixed_at]))


def _problem(view: memoryview, payload_offset: int, layers: int, shard: int, shard_bytes: int) -> str:
    if not 1 <= layers <= LAYERS_MAX:
        return f"layers must be from 1 to {LAYERS_MAX}, not {layers}"
    if not 0 <= shard < SHARDS_MAX:
        return f"shard must be from 0 to {SHARDS_MAX - 1}, not {shard}"
    if shard_bytes < 1 or shard_bytes % layers:
        return f"shard_bytes must be a positive multiple of {layers} layers, not {shard_bytes}"
    if payload_offset < header_area(layers) or payload_offset + shard_bytes > len(view):
        return f"{shard_bytes} bytes with a header do not fit at offset {payload_offset} of {len(view)}"
    return ""
