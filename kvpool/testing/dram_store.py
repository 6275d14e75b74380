"""The DRAM tier as a BlockStore: files in a node's segment, placed by its state machine.

It shows that memory does what the contract of stores says, with the parts that a node has: slots are reserved,
committed, pinned and evicted. Unlike a disk it is never full: what was not used for longest makes room.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import xxhash

from kvpool.core.segment import SegmentState
from kvpool.core.slots import block_keys, group_runs
from kvpool.errors import NoRoomError
from kvpool.model import CHECKSUM_BYTES, DIGEST_BYTES, KEY_BYTES, Namespace
from kvpool.tiers.dram import Segment, SlotHeader, pack_header, parse_header
from kvpool.tiers.memory_store import MemoryStore
from kvpool.tiers.store import (
    FileName,
    StoreBrokenError,
    StoredFile,
    StoreFullError,
    StoreMissingError,
    StoreSizeError,
)

_FILES = Namespace(model="files")
_OWNER = 1


class DramStore(MemoryStore):
    """Files in a segment of ``capacity_bytes``; one that exists already is left as it is."""

    def __init__(self, *, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes=capacity_bytes)
        self.segment = Segment.create(capacity_bytes, lock=False)
        self.state = SegmentState(capacity_bytes)
        self._space = self.state.register(_FILES)
        self._names: dict[bytes, FileName] = {}

    def write(self, name: FileName, data: memoryview) -> None:
        """Reserve a slot, copy, commit. Raises StoreFullError for what no eviction can make room for."""
        key = self._key(name)
        with self._lock:
            try:
                reservation = self.state.reserve(_OWNER, self._space, [0], key, len(data), 1)
            except NoRoomError as exc:
                raise StoreFullError(f"{self.url}: {exc}") from exc
            for slot in reservation.slots:
                payload = self.segment.view[slot.offset : slot.offset + len(data)]
                np.copyto(np.frombuffer(payload, np.uint8), np.frombuffer(data, np.uint8))
                checksums = xxhash.xxh3_64_intdigest(payload).to_bytes(CHECKSUM_BYTES, "little")
                self.state.commit(_OWNER, reservation.id, checksums)
                header = SlotHeader(self._space, key, 0, len(data), 1, slot.generation, checksums)
                pack_header(self.segment.view, slot.offset, header)
                self._names[key] = name
            self._forget_evicted()

    def read_into(self, name: FileName, target: memoryview) -> None:
        """Pin the slot, copy, compare. Raises StoreMissingError, StoreSizeError, StoreBrokenError."""
        key = self._key(name)
        with self._lock:
            pin = self.state.pin(_OWNER, self._space, [0], key)
            slot = pin.slots[0]
            if slot is None:
                raise StoreMissingError(f"{self.url}: no {name}")
            try:
                if slot.shard_bytes != len(target):
                    raise StoreSizeError(name, slot.shard_bytes)
                header = parse_header(self.segment.view, slot.offset)
                payload = self.segment.view[slot.offset : slot.offset + len(target)]
                np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(payload, np.uint8))
            finally:
                self.state.release(_OWNER, pin.id)
        found = xxhash.xxh3_64_intdigest(target).to_bytes(CHECKSUM_BYTES, "little")
        if (header.key, header.checksums) != (key, found):
            raise StoreBrokenError(f"{self.url}: {name} is changed")

    def remove(self, names: Sequence[FileName]) -> None:
        """Evict their slots."""
        with self._lock:
            keys = [(self._space + self._key(name), 0, 0) for name in names]
            self.state.evict(group_runs(keys))
            self._forget_evicted()

    def set_aside(self, name: FileName) -> None:
        """Keep a copy apart and evict the slot."""
        slot = self.state.slot(self._space + self._key(name), 0)
        if slot is not None:
            super().write(name, self.segment.view[slot.offset : slot.offset + slot.shard_bytes])
            super().set_aside(name)
            self.remove([name])

    def files(self, since: float = 0.0) -> Iterator[StoredFile]:
        """Yield what is there now."""
        del since
        with self._lock:
            slots = [(name, self.state.slot(self._space + key, 0)) for key, name in self._names.items()]
            found = [StoredFile(name, slot.shard_bytes) for name, slot in slots if slot is not None]
        yield from found

    def free_bytes(self) -> int | None:
        """Return what can be reserved without an eviction."""
        return self.state.capacity_bytes - self.state.used_bytes

    def close(self) -> None:
        """Give the memory back."""
        self.segment.close()

    def _forget_evicted(self) -> None:
        _, removed = self.state.take_changes()
        for run in removed:
            for key in block_keys(run):
                if self.state.slot(key, 0) is None:
                    self._names.pop(key[DIGEST_BYTES:], None)

    @staticmethod
    def _key(name: FileName) -> bytes:
        return hashlib.blake2b(str(name).encode(), digest_size=KEY_BYTES).digest()
