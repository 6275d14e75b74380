"""KeyTable beside a dict: the same answers whatever is inserted, removed, collides or grows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.core import keytable
from kvpool.core.keytable import KeyTable, Rows, Words, as_words

ROWS_MAX = 8192
MIX = np.uint64(0x9E3779B97F4A7C15)


def spread(numbers: np.ndarray) -> Words:
    """Keys as a hash makes them."""
    low = numbers.astype(np.uint64) * MIX
    return np.stack((low ^ (low >> np.uint64(29)), low * MIX), axis=1)


def crafted(mixed: np.ndarray, high: np.ndarray) -> Words:
    """The keys with this high word that are mixed to these 64 bits: the table's mixing, backwards."""
    low_factor, high_factor = keytable.FACTORS
    high = high.astype(np.uint64)
    low = (mixed.astype(np.uint64) - high * high_factor) * np.uint64(pow(int(low_factor), -1, 1 << 64))
    return np.stack((low, high), axis=1)


def test_crafted_keys_are_mixed_as_wanted():
    """The helper is the inverse of what the table does."""
    wanted = np.arange(1000).astype(np.uint64) * MIX
    assert (keytable.mix(crafted(wanted, np.arange(1000))) == wanted).all()


def one_bucket(numbers: np.ndarray) -> Words:
    """Every key wants the same bucket, however large the table is."""
    n = numbers.astype(np.uint64)
    return crafted(np.uint64(3 << 40) | n, n * MIX)


def one_tag(numbers: np.ndarray) -> Words:
    """Every key has the same tag; every eight share a bucket."""
    n = numbers.astype(np.uint64)
    high = (n // np.uint64(8) * MIX) & np.uint64(0xFFFFFFFF)
    return crafted((high << np.uint64(32)) | (high ^ np.uint64(7)), n)


def one_of_everything(numbers: np.ndarray) -> Words:
    """One bucket, one tag: only the whole keys tell them apart."""
    n = numbers.astype(np.uint64)
    return crafted(np.full_like(n, (1 << 63) | 5), n)


class Twin:
    """A KeyTable and the dict that it must equal."""

    def __init__(self, rows_max: int = ROWS_MAX) -> None:
        self.column: Words = np.zeros((rows_max, 2), np.uint64)
        self.table = KeyTable(self.column)
        self.dict: dict[bytes, int] = {}
        self.free = list(range(rows_max))

    def take_rows(self, count: int) -> Rows:
        taken, self.free = self.free[:count], self.free[count:]
        return np.array(taken, np.int64)

    def insert(self, keys: Words) -> None:
        before = dict(self.dict)
        rows, new = self.table.insert(keys, self.take_rows)
        taken = iter(new.tolist())
        for key, row in zip(keys, rows.tolist(), strict=True):
            if key.tobytes() not in self.dict:
                expected = next(taken, -1)
                if expected >= 0:
                    self.dict[key.tobytes()] = expected
            assert row == self.dict.get(key.tobytes(), -1)
        assert len(new) == len(self.dict) - len(before)

    def remove(self, keys: Words) -> None:
        rows = {self.dict.pop(key.tobytes(), None) for key in keys} - {None}
        self.table.remove(np.array(sorted(rows), np.int64))
        self.free += rows

    def check(self, keys: Words) -> None:
        assert len(self.table) == len(self.dict)
        expected = [self.dict.get(key.tobytes(), -1) for key in keys]
        assert self.table.find(keys).tolist() == expected


operations = st.lists(
    st.tuples(st.sampled_from(["insert", "insert", "remove"]), st.integers(0, 60), st.integers(1, 40)),
    max_size=14,
)


@pytest.mark.parametrize("small", [False, True], ids=["real", "small"])
@pytest.mark.parametrize(
    ("family", "scale"), [(spread, 10), (one_tag, 10), (one_bucket, 3), (one_of_everything, 1)],
)
@settings(max_examples=25)
@given(script=operations, step=st.integers(1, 3))
def test_it_answers_as_a_dict_does(family, scale, small, script, step):
    """Find, insert and remove agree with a dict through growth, overflowing buckets and equal tags."""
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(keytable, "BUCKETS_MIN", 2)
            patch.setattr(keytable, "MOVE_BUCKETS", 16)
        twin = Twin()
        universe = family(np.arange(100 * scale))
        for verb, start, count in script:
            keys = universe[start * scale : (start + count * step) * scale : step]
            if verb == "insert":
                twin.insert(keys)
            else:
                twin.remove(keys)
            twin.check(universe)


@given(st.lists(st.integers(0, 40), max_size=60))
def test_equal_keys_in_one_batch_get_one_row(numbers):
    """A key that comes twice in a batch is one block."""
    twin = Twin()
    twin.insert(spread(np.array(numbers, np.int64)))
    assert len(twin.table) == len(set(numbers))
    twin.check(spread(np.arange(41)))


@pytest.mark.parametrize("family", [spread, one_bucket])
@given(st.lists(st.integers(0, 60), max_size=60), st.integers(0, 30))
def test_without_rows_the_last_new_keys_stay_out(family, numbers, rows_max):
    """What finds no row is answered with -1, is not found later, and disturbs nothing."""
    twin = Twin(max(rows_max, 1))
    twin.take_rows(max(rows_max, 1) - rows_max)
    twin.insert(family(np.array(numbers, np.int64)))
    twin.check(family(np.arange(61)))


@pytest.mark.parametrize("family", [spread, one_tag])
def test_a_batch_larger_than_the_table_fits(family):
    """Growth keeps up with one huge batch, also while an earlier growth is under way."""
    twin = Twin()
    universe = family(np.arange(8000))
    for start, end in ((0, 400), (400, 1200), (1200, 8000)):
        twin.insert(universe[start:end])
        twin.check(universe)


def test_a_bucket_overflows_into_its_neighbours():
    """More than eight keys of one bucket are all found, and removing the first ones hides none of the others."""
    twin = Twin()
    universe = one_bucket(np.arange(40))
    twin.insert(universe[:30])
    twin.check(universe)
    twin.remove(universe[:8])
    twin.check(universe)
    twin.insert(universe[30:])
    twin.check(universe)


def test_coming_and_going_needs_no_growth():
    """A table whose keys are replaced for ever stays as large as its keys need."""
    twin = Twin()
    for turn in range(200):
        twin.insert(spread(np.arange(turn * 50, turn * 50 + 200)))
        twin.remove(spread(np.arange(turn * 50, turn * 50 + 50)))
    assert twin.table._slots.buckets <= 2 * keytable.BUCKETS_MIN
    twin.check(spread(np.arange(200 * 50 + 200)))


def test_cleaning_out_removed_slots_always_ends():
    """Keys chosen to leave whole buckets of removed slots, with the live ones where a move comes last."""
    twin = Twin(20_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keytable, "BUCKETS_MIN", 1024)
        twin.table = KeyTable(twin.column)

    def keys(home: np.ndarray, numbers: np.ndarray) -> Words:
        n = numbers.astype(np.uint64)
        return crafted((home.astype(np.uint64) << np.uint64(54)) | n, n * MIX)

    n = np.arange(4000)
    first = keys(np.where(n < 3120, n // 8, 640 + (n - 3120) // 8), n)
    twin.insert(first)
    twin.remove(first[:3120])
    for start in range(4000, 5250, 10):
        n = np.arange(start, start + 10)
        twin.insert(keys(753 + (n - 4000) // 8, n))
    for start in range(6000, 12_000, 99):
        n = np.arange(start, start + 99)
        twin.insert(keys(n % 1024, n))
        twin.check(keys(n % 1024, n))
    twin.check(first)


@pytest.mark.parametrize("batch", [1, 97, 1024])
def test_growth_out_of_a_table_full_of_removed_slots(batch):
    """Keys that were removed from overflowing buckets leave marks; cleaning them out loses nothing."""
    twin = Twin()
    universe = one_bucket(np.arange(2000))
    for start in range(0, 1500, 100):
        twin.insert(universe[start : start + 100])
    for start in range(0, 1400, 100):
        twin.remove(universe[start : start + 100])
    fresh = spread(np.arange(4000))
    for start in range(0, 4000, batch):
        twin.insert(fresh[start : start + batch])
    twin.check(fresh)
    twin.check(universe)


def test_packed_keys_are_read_as_they_are_written():
    """as_words and the bytes of a key column agree."""
    packed = bytes(range(64))
    assert as_words(packed).tobytes() == packed
    assert as_words(memoryview(packed)).shape == (4, 2)


@pytest.mark.parametrize("shift", [0, 24, 40])
@pytest.mark.parametrize("word", [0, 1])
def test_keys_that_are_no_hashes_are_spread(word, shift):
    """Counters in any place of a key fill buckets as hashes do: hardly one overflows."""
    numbers = np.arange(20_000).astype(np.uint64) << np.uint64(shift)
    words = [np.zeros_like(numbers), np.zeros_like(numbers)]
    words[word] = numbers
    homes = keytable.mix(np.stack(words, axis=1)) >> np.uint64(64 - 13)
    assert np.bincount(homes.astype(np.int64)).max() <= 20
