"""A hash table from 16-byte keys to row numbers, worked on in whole batches.

A Python dict costs some hundred bytes an entry, a microsecond a cold look-up, and stands still for
tens of milliseconds when it grows. This table costs about twenty bytes, takes a chain of a thousand
keys in a few numpy calls, and moves to a larger array a slice at a time.

Layout: buckets of eight 64-bit slots, one cache line each. A slot holds 0 (never used), 1 (removed),
or a tag (32 bits of the mixed key, top bit set) above ``row + 2``. A key lives in the bucket that its
mixed top bits name or, when that was full, in one of the next ones; a search ends at a bucket that has a
slot never used.
The whole key is compared in the ``keys`` column before a row is believed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kvpool.core.columns import zeros

Rows = NDArray[np.int64]
Words = NDArray[np.uint64]

WIDTH = 8
BUCKETS_MIN = 64
MOVE_BUCKETS = 512
FEW = 6
"""So many keys are looked for one by one: cheaper than a batch."""

LOAD_MAX = 0.5
LOAD_PREPARE = 0.4
LOAD_START = 0.3
LOAD_START_MAX = 0.4

_EMPTY = np.uint64(0)
_REMOVED = np.uint64(1)
_FIRST = np.uint64(2)
_LOW = np.uint64(0xFFFFFFFF)
_TAG_TOP = np.uint32(0x80000000)
_HALF = np.uint64(32)

# Odd, so that no bit is lost; otherwise any will do.
FACTORS = np.array((0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93), np.uint64)

_BASES_MAX = 1 << 14
_BASES: Rows = np.arange(0, WIDTH * _BASES_MAX, WIDTH)


def as_words(packed: bytes | memoryview) -> Words:
    """Return packed 16-byte keys as an array of shape (n, 2), little endian."""
    return np.frombuffer(packed, dtype="<u8").reshape(-1, 2)


def mix(keys: Words) -> Words:
    """Return 64 bits of each key whose top bits are spread even when the keys are not: they need not be hashes."""
    mixed: Words = keys @ FACTORS
    return mixed


def _tags(mixed: Words) -> NDArray[np.uint32]:
    """Return the tags of mixed keys: the halves together, or keys that differ in their top bits would share one."""
    return (mixed ^ (mixed >> _HALF)).view(np.uint32)[::2] | _TAG_TOP


def _match(slots: Words, tags: NDArray[np.uint32]) -> tuple[Rows, NDArray[np.bool_], Rows]:
    """Return (the row in the slot that has the key's tag, all comparisons, where among them that slot's is).

    ``slots`` has shape (n, 8). Where no slot of a bucket has the tag, the row is another key's or negative.
    """
    same = slots.view(np.uint32)[:, 1::2] == tags[:, None]
    place = same.argmax(axis=1)
    place += _BASES[: len(place)] if len(place) <= _BASES_MAX else np.arange(0, slots.size, WIDTH)
    rows = (slots.ravel().take(place) & _LOW).view(np.int64)
    rows -= 2
    return rows, same, place


def _slot_values(mixed: Words, rows: Rows) -> Words:
    return (_tags(mixed).astype(np.uint64) << _HALF) | (rows.view(np.uint64) + _FIRST)


def _distinct(keys: Words) -> tuple[Rows, Rows]:
    """Return (where each distinct key stands first, in order; for each key the number of its distinct one)."""
    low = np.sort(keys[:, 0])
    if not (low[1:] == low[:-1]).any():
        every = np.arange(len(keys))
        return every, every
    numbers: dict[bytes, int] = {}
    first: list[int] = []
    back: list[int] = []
    for i, key in enumerate(keys):
        number = numbers.setdefault(key.tobytes(), len(first))
        if number == len(first):
            first.append(i)
        back.append(number)
    return np.array(first), np.array(back)


class _Slots:
    """One array of buckets."""

    def __init__(self, buckets: int) -> None:
        self.array: Words = zeros((buckets, WIDTH), np.uint64)
        self.buckets = buckets
        self._shift = np.uint64(64 - (buckets.bit_length() - 1))
        self.taken = 0  # slots that are not _EMPTY

    def home(self, mixed: Words) -> NDArray[np.int64]:
        return (mixed >> self._shift).view(np.int64)

    def find(self, keys: Words, column: Words) -> Rows:
        """Return the row of each key, -1 where it is not here."""
        if not len(keys):
            return np.empty(0, np.int64)
        mixed = mix(keys)
        bucket = self.home(mixed)
        slots = self.array.take(bucket, axis=0)
        rows, same, place = _match(slots, _tags(mixed))
        found = column.take(rows, axis=0, mode="clip")
        if np.minimum.reduce(rows) >= 0 and found.tobytes() == keys.tobytes():
            return rows
        rest = np.flatnonzero((found[:, 0] != keys[:, 0]) | (found[:, 1] != keys[:, 1]) | (rows < 0))
        rows[rest] = -1
        # Not in its home bucket: over unless that was full when the key came, or, once in 2**31, another
        # key of the bucket has the same tag and hid the right one.
        hidden = same.ravel().take(place[rest])
        rest = rest[hidden | (slots.take(rest, axis=0) != _EMPTY).all(axis=1)]
        if len(rest) <= FEW:
            for i in rest.tolist():
                rows[i] = self._find_slowly(keys[i], int(bucket[i]), column)
        else:
            rows[rest] = self._find_on(keys[rest], bucket[rest], column)
        return rows

    def _find_on(self, keys: Words, bucket: NDArray[np.int64], column: Words) -> Rows:
        """Search from these buckets on, the first included."""
        rows = np.full(len(keys), -1, np.int64)
        left = np.arange(len(keys))
        for _ in range(self.buckets):
            slots = self.array.take(bucket, axis=0)
            asked = keys.take(left, axis=0)
            found, same, place = _match(slots, _tags(mix(asked)))
            stored = column.take(found, axis=0, mode="clip")
            hit = same.ravel().take(place)
            right = hit & (stored[:, 0] == asked[:, 0]) & (stored[:, 1] == asked[:, 1])
            rows[left[right]] = found[right]
            for i in np.flatnonzero(hit & ~right).tolist():
                rows[left[i]] = self._find_slowly(asked[i], int(bucket[i]), column)
            on = ~hit & (slots != _EMPTY).all(axis=1)
            if not on.any():
                break
            left, bucket = left[on], (bucket[on] + 1) & (self.buckets - 1)
        return rows

    def _find_slowly(self, key: Words, bucket: int, column: Words) -> int:
        tag = int(_tags(mix(key.reshape(1, 2)))[0])
        for _ in range(self.buckets):
            slots: list[int] = self.array[bucket].tolist()
            for slot in slots:
                if slot >> 32 == tag:
                    row = (slot & 0xFFFFFFFF) - 2
                    if column[row, 0] == key[0] and column[row, 1] == key[1]:
                        return row
            if 0 in slots:
                return -1
            bucket = (bucket + 1) & (self.buckets - 1)
        return -1

    def place(self, keys: Words, rows: Rows) -> None:
        """Write distinct keys that are known not to be here."""
        mixed = mix(keys)
        bucket, values = self.home(mixed), _slot_values(mixed, rows)
        while len(bucket):
            slots = self.array.take(bucket, axis=0)
            free = slots < _FIRST
            column = free.argmax(axis=1)
            can = free.any(axis=1)
            where, what = (bucket[can], column[can]), values[can]
            before = self.array[where]
            self.array[where] = what
            won = self.array[where] == what  # two keys may have aimed at one slot: the last one has it
            self.taken += int(np.count_nonzero(before[won] == _EMPTY))
            stay = np.ones(len(bucket), bool)
            stay[np.flatnonzero(can)[won]] = False
            bucket = np.where(can, bucket, (bucket + 1) & (self.buckets - 1))[stay]
            values = values[stay]

    def remove(self, keys: Words, rows: Rows) -> NDArray[np.bool_]:
        """Take out the slots of these keys; returns which were here."""
        gone = np.zeros(len(rows), bool)
        mixed = mix(keys)
        bucket, values = self.home(mixed), _slot_values(mixed, rows)
        left = np.arange(len(rows))
        for _ in range(self.buckets):
            if not len(left):
                break
            slots = self.array.take(bucket[left], axis=0)
            same = slots == values[left][:, None]
            here = same.any(axis=1)
            open_end = (slots == _EMPTY).any(axis=1)
            spots = (bucket[left][here], same.argmax(axis=1)[here])
            # No search goes on past a bucket with a slot never used: there a removed one can be that again.
            ends = open_end[here]
            self.array[spots] = np.where(ends, _EMPTY, _REMOVED)
            self.taken -= int(np.count_nonzero(ends))
            gone[left[here]] = True
            left = left[~here & ~open_end]
            bucket[left] = (bucket[left] + 1) & (self.buckets - 1)
        return gone


class KeyTable:
    """Keys of one namespace to rows of the shared ``keys`` column (shape (n, 2), uint64)."""

    def __init__(self, keys: Words) -> None:
        self._keys = keys
        self._slots = _Slots(BUCKETS_MIN)
        self._old: _Slots | None = None
        self._moved = 0  # buckets of _old that are in _slots now
        self._next: _Slots | None = None  # the array to grow into, while its memory is being claimed
        self._claimed = 0  # buckets of _next whose memory is there
        self._count = 0

    def __len__(self) -> int:
        """Return the number of keys."""
        return self._count

    def find(self, keys: Words) -> Rows:
        """Return the row of each key, -1 where there is none."""
        rows = self._slots.find(keys, self._keys)
        if self._old is not None:
            missing = np.flatnonzero(rows < 0)
            if len(missing):
                rows[missing] = self._old.find(keys[missing], self._keys)
        return rows

    def insert(self, keys: Words, take_rows: Callable[[int], Rows]) -> tuple[Rows, Rows]:
        """Return (row of each key, the rows that are new). Equal keys in one batch get one row.

        ``take_rows(n)`` hands out up to n rows; where it gives fewer, the last new keys stay out
        (row -1).
        """
        rows = self.find(keys)
        missing = np.flatnonzero(rows < 0)
        if not len(missing):
            return rows, missing
        fresh = keys[missing]
        first, back = _distinct(fresh)
        new = take_rows(len(first))
        row_of = np.full(len(first), -1, np.int64)
        row_of[: len(new)] = new
        rows[missing] = row_of[back]
        placed = fresh[first[: len(new)]]
        self._keys[new] = placed
        self._make_room(len(new))
        self._slots.place(placed, new)
        self._count += len(new)
        return rows, new

    def remove(self, rows: Rows) -> None:
        """Take out distinct rows that are here."""
        keys = self._keys[rows]
        gone = self._slots.remove(keys, rows)
        if self._old is not None and not gone.all():
            self._old.remove(keys[~gone], rows[~gone])
        self._count -= len(rows)
        if self._old is not None:
            self._move(MOVE_BUCKETS // 8)

    @property
    def moving(self) -> bool:
        """Whether keys still lie in the array that was outgrown: look-ups search both."""
        return self._old is not None

    def move(self) -> None:
        """Empty one slice of the array that was outgrown."""
        self._move(MOVE_BUCKETS // 4)

    def _make_room(self, extra: int) -> None:
        """Keep the load under its limit: grow (or clean out removed slots) a slice at a time.

        First the new array's memory is claimed, then it takes over, then the old one is emptied into it.
        """
        if self._old is not None:
            self._move(max(MOVE_BUCKETS // 16, extra // 3))
        limit = WIDTH * self._slots.buckets
        if self._slots.taken + extra > LOAD_PREPARE * limit:
            self._claim(8 * extra, extra)
        if self._slots.taken + extra > LOAD_MAX * limit:
            if self._old is not None:
                self._move(self._old.buckets)  # rare: a batch larger than the table
            slots = self._claim(1 << 62, extra)
            self._old, self._moved = self._slots, 0
            self._slots, self._next = slots, None
            self._move(MOVE_BUCKETS // 16)

    def _claim(self, buckets: int, extra: int) -> _Slots:
        load = (self._count + extra) / WIDTH
        if self._next is None or load > LOAD_START_MAX * self._next.buckets:
            # Never smaller than now: it would fill up before this one is emptied, and the rest move all at once.
            wanted = self._slots.buckets
            while load > LOAD_START * wanted:
                wanted *= 2
            self._next, self._claimed = _Slots(wanted), 0
        end = min(self._claimed + buckets, self._next.buckets)
        self._next.array[self._claimed : end] = _EMPTY
        self._claimed = end
        return self._next

    def _move(self, buckets: int) -> None:
        while self._old is not None and buckets > 0:
            step = min(buckets, MOVE_BUCKETS)
            buckets -= step
            part = self._old.array[self._moved : self._moved + step]
            values = part[part >= _FIRST]
            # Removed, not empty: a search in the old array must still pass through a bucket that was full.
            part[part != _EMPTY] = _REMOVED
            self._moved += step
            if len(values):
                rows = ((values & _LOW) - _FIRST).view(np.int64)
                self._slots.place(self._keys[rows], rows)
            if self._moved >= self._old.buckets:
                self._old = None
