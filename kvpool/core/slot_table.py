"""Where each committed slot of a segment lies, in the segment's own memory: local clients look there without asking.

The node alone writes the table; a client reads it while it changes. What keeps that from giving a wrong byte:

- An entry's first word is its slot's *generation*, a number that the node never uses twice; 0 while there is none.
  A new entry is written whole before its generation is; the slot's payload and header were there before.
- A slot's generation is cleared before the node lets anybody write to its bytes again: in the very call that
  evicts it, hence before the reservation that gets these bytes is answered, hence before the new writer's first byte.
- A reader reads the generation, the entry, the header's checksums and the payload, in this order, and then the
  generation again. Finding it the same, it knows that the slot was this one all along.

The reader's order is the processor's: on x86 loads are seen in program order, and so are stores. Elsewhere clients
do not use the table (``ordered``). The writers' order also holds between processes, because an answer on a socket
lies between the node's store and the new writer's first. An entry that is not found, or no longer the same, says
nothing: the reader asks the node, and pins. So entries may be missing, and a full table is no error.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from kvpool.core.keytable import FACTORS, as_words, mix
from kvpool.core.slots import HEADER_FIXED_BYTES, Slot, header_bytes
from kvpool.model import CHECKSUM_BYTES, DIGEST_BYTES, KEY_BYTES, LAYERS_MAX

Words = NDArray[np.uint64]
Rows = NDArray[np.int64]

BYTES_PER_ENTRY: Final = 32 << 10
"""Of the segment: a slot as small as this is found when all are. Smaller ones are, until the table is full."""

UNLISTED: Final = -1
NO_PLACE: Final = -2
"""A slot's ``entry`` when it has none: not yet, or because there was no place for it."""

_MAGIC: Final = int.from_bytes(b"KVPTABL1", "little")
_TRAILER_WORDS: Final = 8  # magic, entries
_WIDTH: Final = 8  # tags in a bucket
_WINDOW: Final = 3 * _WIDTH  # a slot's tag is in its bucket or in one of the next two
_ENTRY_WORDS: Final = 8  # generation, namespace (2), key (2), layers and shard, shard bytes, offset
_LAYERS_SHIFT: Final = 16
_BUCKETS_MIN: Final = 16
_PAGE_BYTES: Final = 4096
_WORD: Final = 8
_BODY: Final = struct.Struct("<32s3Q")  # namespace and key, layers and shard, shard bytes, offset
_BODY_STEP: Final = _ENTRY_WORDS * _WORD
_ALL: Final = (1 << 64) - 1
_PRIME: Final = (1 << 61) - 1
_ONE: Final = np.uint64(1)
_LAYERS: Rows = np.arange(LAYERS_MAX)


def table_bytes(capacity_bytes: int) -> int:
    """Return what the table of a segment takes behind it: whole pages."""
    size = _WORD * _words(_entries(capacity_bytes))
    return -(-size // _PAGE_BYTES) * _PAGE_BYTES


def _words(entries: int) -> int:
    """Return the size of a table: the last bucket's window reaches beyond it."""
    return (entries + _WINDOW - _WIDTH) * (_ENTRY_WORDS + 1) + _TRAILER_WORDS


def _entries(capacity_bytes: int) -> int:
    return _WIDTH * max(_BUCKETS_MIN, 1 << (capacity_bytes // BYTES_PER_ENTRY // _WIDTH - 1).bit_length())


@lru_cache(maxsize=1024)
def _salt(namespace: bytes, shard: int) -> int:
    """Return what keys of a namespace and shard are mixed with."""
    return ((int.from_bytes(namespace, "little") % _PRIME) * int(FACTORS[1]) ^ (shard + 1) * int(FACTORS[0])) & _ALL


class _Wanted:
    """What a reader looks for, but for the keys: made once for all gets of a namespace, shard and size."""

    __slots__ = ("least", "room", "salt", "words")

    def __init__(self, namespace: bytes, shard: int, layers: int, shard_bytes: int, end: int) -> None:
        """``end``: where the slots end and the table begins."""
        if len(namespace) != DIGEST_BYTES:
            raise ValueError("odd lengths")
        self.salt = np.uint64(_salt(namespace, shard))
        self.words = np.zeros(_ENTRY_WORDS - 2, np.uint64)
        """An entry without its generation and offset, the words of the key left open."""
        self.words[:2] = np.frombuffer(namespace, np.uint64)
        self.words[4:] = (layers << _LAYERS_SHIFT | shard, shard_bytes)
        least = header_bytes(layers)
        self.least = np.uint64(least)
        """The offset of the first slot, and in ``room`` how many bytes farther the last one may be."""
        self.room = np.uint64(max(0, end - shard_bytes - least))


_wanted = lru_cache(maxsize=1024)(_Wanted)


class _Layout:
    """The table's parts, at the end of a segment's mapping: entries | tags | trailer."""

    def __init__(self, memory: memoryview, entries: int) -> None:
        start, end = len(memory) - _words(entries) * _WORD, len(memory) - _TRAILER_WORDS * _WORD
        middle = start + (end - start) // (_ENTRY_WORDS + 1) * _ENTRY_WORDS
        self.start = start
        self.entries = memory[start:middle].cast("Q")
        self.tags = memory[middle:end].cast("Q")
        self.rows: Words = np.frombuffer(self.entries, np.uint64).reshape(-1, _ENTRY_WORDS)
        self.shift = np.uint64(64 - (entries // _WIDTH).bit_length() + 1)


class SlotTable:
    """The node's end: lists slots, and strikes them out."""

    def __init__(self, memory: memoryview, capacity_bytes: int) -> None:
        """Take the end of a segment's zeroed memory; ``table_bytes`` of it belong to nobody else."""
        entries = _entries(capacity_bytes)
        if capacity_bytes + table_bytes(capacity_bytes) > len(memory):
            raise ValueError("the table would lie in the slots")
        self._layout = _Layout(memory, entries)
        self._entries, self._tags, self._rows = self._layout.entries, self._layout.tags, self._layout.rows
        self._memory = memory[self._layout.start :]
        self._struck: list[int] = []  # whose tags are still there
        trailer = memory[len(memory) - _TRAILER_WORDS * _WORD :].cast("Q")
        trailer[0], trailer[1] = _MAGIC, entries

    def add(self, slots: Sequence[Slot | None]) -> None:
        """List those of these slots that are not: committed ones whose headers are written, and not evicted since."""
        new = [
            slot
            for slot in slots
            if slot is not None
            and slot.entry == UNLISTED
            and slot.checksums is not None
            and slot.block.shards.get(slot.shard) is slot
        ]
        if not new:
            return
        for entry in self._struck:
            self._tags[entry] = 0
        self._struck.clear()
        tags, entries, memory = self._tags, self._entries, self._memory
        mixed = mix(as_words(b"".join([slot.key for slot in new])))
        mixed ^= np.array([_salt(slot.namespace, slot.shard) for slot in new], np.uint64)
        buckets = (mixed >> self._layout.shift).tolist()
        for slot, tag, bucket in zip(new, (mixed | _ONE).tolist(), buckets, strict=True):
            first = bucket * _WIDTH
            if slot.entry != UNLISTED:
                continue  # named twice
            try:
                entry = first + tags[first : first + _WINDOW].tolist().index(0)
            except ValueError:
                slot.entry = NO_PLACE
                continue
            slot.entry = entry
            tags[entry] = tag
            shape = slot.layers << _LAYERS_SHIFT | slot.shard
            _BODY.pack_into(memory, entry * _BODY_STEP + _WORD, slot.block.key, shape, slot.shard_bytes, slot.offset)
            entries[entry * _ENTRY_WORDS] = slot.generation

    def strike(self, slot: Slot) -> None:
        """Strike a slot out, at once: its bytes are about to be given to somebody else."""
        if slot.entry >= 0:
            self._entries[slot.entry * _ENTRY_WORDS] = 0
            self._struck.append(slot.entry)
        slot.entry = UNLISTED

    def listed(self) -> dict[int, tuple[int, ...]]:
        """Return every entry in use as ``shown``, by number: for checks."""
        return {int(at): tuple(self._rows[at].tolist()) for at in self._rows[:, 0].nonzero()[0]}


def shown(slot: Slot) -> tuple[int, ...]:
    """Return the words of a slot's entry."""
    words = struct.unpack("<4Q", slot.block.key)
    return (slot.generation, *words, slot.layers << _LAYERS_SHIFT | slot.shard, slot.shard_bytes, slot.offset)


class Sighting:
    """What a reader has seen in the table: valid only if ``SlotFinder.unchanged`` says so after the bytes were read.

    ``here``: numbers of the keys that were found, ``offsets`` and ``checksums`` (a row of layers each) of theirs.
    """

    __slots__ = ("checksums", "entries", "generations", "here", "offsets")

    def __init__(self, here: list[int], entries: Rows, generations: Words, offsets: Words, checksums: Words) -> None:
        self.here = here
        self.entries = entries
        self.generations = generations
        self.offsets = offsets
        self.checksums = checksums


class SlotFinder:
    """A client's end: finds slots in a node's memory while it changes."""

    def __init__(self, memory: memoryview) -> None:
        """Take a segment's mapping. Raises LookupError when it has no table."""
        trailer = len(memory) // _WORD - _TRAILER_WORDS
        self._words: Words = np.frombuffer(memory, np.uint64, len(memory) // _WORD)
        magic, entries = self._words[trailer : trailer + 2].tolist() if trailer > 0 else (0, 0)
        size = _words(entries) * _WORD
        if magic != _MAGIC or len(memory) % _WORD or entries < _WIDTH or entries & (entries - 1) or size > len(memory):
            raise LookupError("this segment has no table of its slots")
        layout = _Layout(memory, entries)
        tags: Words = np.frombuffer(layout.tags, np.uint64)
        shape, strides = (entries // _WIDTH, _WINDOW), (_WIDTH * _WORD, _WORD)
        self._windows: Words = as_strided(tags, shape, strides, writeable=False)
        self._rows = layout.rows
        self._generations: Words = layout.rows[:, 0]
        self._shift = layout.shift
        self._end = layout.start

    def find(self, namespace: bytes, keys: bytes, shard: int, layers: int, shard_bytes: int) -> Sighting:
        """Look for the slots of these keys that have this shape. The first half of a reading: see ``unchanged``."""
        if len(keys) % KEY_BYTES:
            raise ValueError("odd lengths")
        shape = _wanted(namespace, shard, layers, shard_bytes, self._end)
        words = as_words(keys)
        mixed = mix(words)
        mixed ^= shape.salt
        buckets = (mixed >> self._shift).view(np.int64)
        mixed |= _ONE
        entries = (self._windows[buckets] == mixed[:, None]).argmax(axis=1)
        entries += buckets * _WIDTH
        generations = self._generations[entries]
        rows = self._rows.take(entries, axis=0)
        wanted = np.empty((len(words), len(shape.words)), np.uint64)
        wanted[:] = shape.words
        wanted[:, 2:4] = words
        same = rows[:, 1:7] == wanted
        offsets = rows[:, 7]
        # An entry that was being written may say anything.
        inside = offsets - shape.least <= shape.room
        here = list(range(len(words)))
        if not (same.all() and inside.all() and generations.all()):
            right = same.all(axis=1) & inside & (generations != 0)
            here = right.nonzero()[0].tolist()
            entries, generations, offsets = entries[right], generations[right], offsets[right]
        first = offsets.view(np.int64) // _WORD
        first -= (HEADER_FIXED_BYTES + CHECKSUM_BYTES * layers) // _WORD
        checksums = self._words[first[:, None] + _LAYERS[:layers] if layers > 1 else first[:, None]]
        return Sighting(here, entries, generations, offsets, checksums)

    def unchanged(self, seen: Sighting) -> NDArray[np.bool_]:
        """Return which of the slots seen have been themselves since: what was read of them meanwhile is theirs."""
        same: NDArray[np.bool_] = self._generations[seen.entries] == seen.generations
        return same


def ordered(machine: str) -> bool:
    """Return whether a processor lets a reader see loads and stores in program order (see above)."""
    return machine in {"x86_64", "AMD64"}
