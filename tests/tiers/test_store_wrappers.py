"""What wrappers of stores count, and what they do wrong when they are told to."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvpool.model import Namespace
from kvpool.testing.store_conformance import extent_of, name_of, read
from kvpool.testing.store_faults import FaultyStore, SlowStore
from kvpool.tiers import blockfile
from kvpool.tiers.measured import Measured, MeasuredStore
from kvpool.tiers.memory_store import MemoryStore
from kvpool.tiers.store import StoreBrokenError, StoreError, StoreFullError, StoreMissingError, StoreSizeError
from kvpool.tiers.wrapper import OPERATIONS

NAME = name_of(1)
EXTENT = extent_of(NAME)

CALLS = {
    "write": lambda store: store.write(NAME, EXTENT),
    "read": lambda store: read(store, NAME),
    "remove": lambda store: store.remove([NAME]),
    "set_aside": lambda store: store.set_aside(NAME),
    "aside_files": lambda store: store.aside_files(),
    "drop_aside": lambda store: store.drop_aside(),
    "files": lambda store: list(store.files()),
    "namespaces": lambda store: store.namespaces(),
    "keep_namespace": lambda store: store.keep_namespace(Namespace(model="x")),
    "clean": lambda store: store.clean(0),
    "probe": lambda store: store.probe(),
    "free_bytes": lambda store: store.free_bytes(),
}


@pytest.fixture
def memory():
    return MemoryStore(capacity_bytes=1 << 20)


def test_every_operation_is_counted(memory):
    """Calls, bytes and seconds of each; what failed moves no bytes, and a missing file is no other error."""
    now = iter(range(1000))
    store = MeasuredStore(FaultyStore(memory), clock=lambda: float(next(now)))
    assert (store.id, store.url, store.capacity_bytes) == (memory.id, memory.url, memory.capacity_bytes)
    assert set(CALLS) == set(OPERATIONS)
    for call in CALLS.values():
        if call is CALLS["remove"]:
            continue
        call(store)
    CALLS["remove"](store)
    with pytest.raises(StoreMissingError):
        CALLS["read"](store)
    store.store.fail(operations=["write"])
    with pytest.raises(StoreError):
        CALLS["write"](store)
    measured = store.measured()
    size = len(EXTENT)
    assert measured.pop("write") == Measured(calls=2, errors=1, missing=0, bytes=size, seconds=2.0)
    assert measured.pop("read") == Measured(calls=2, errors=1, missing=1, bytes=size, seconds=2.0)
    assert measured == dict.fromkeys(measured, Measured(calls=1, errors=0, missing=0, bytes=0, seconds=1.0))
    store.close()


def test_threads_are_counted_together(memory):
    """No call is lost between them."""
    store = MeasuredStore(memory)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: CALLS["write"](store), range(400)))
    assert store.measured()["write"].calls == 400
    assert store.measured()["write"].bytes == 400 * len(EXTENT)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_any_operation_can_fail(memory, operation):
    """Until it is healed, and no other."""
    store = FaultyStore(memory)
    store.write(NAME, EXTENT)
    store.fail(StoreFullError("no space"), [operation])
    for _ in range(2):
        with pytest.raises(StoreFullError, match="no space"):
            CALLS[operation](store)
    for other, call in CALLS.items():
        if other not in {operation, "read"}:
            call(store)
    store.heal()
    store.write(NAME, EXTENT)
    CALLS[operation](store)
    assert operation in store.calls


def test_errors_come_in_the_order_they_were_scripted(memory):
    """Each in one call, then it works again."""
    store = FaultyStore(memory)
    store.fail_once(StoreFullError("first"), "write")
    store.fail_once(StoreError("second"), "write")
    for text in ("first", "second"):
        with pytest.raises(StoreError, match=text):
            store.write(NAME, EXTENT)
    store.write(NAME, EXTENT)
    assert read(store, NAME) == EXTENT


def test_calls_hang_until_the_event(memory):
    """Those that hang fail in the end; those after the healing do not hang."""
    store = FaultyStore(memory)
    store.write(NAME, EXTENT)
    event = store.hang(["read"])
    failed = []

    def reader():
        try:
            read(store, NAME)
        except StoreError as error:
            failed.append(error)

    threads = [threading.Thread(target=reader) for _ in range(2)]
    for thread in threads:
        thread.start()
    store.wait_hanging(2)
    with pytest.raises(TimeoutError):
        store.wait_hanging(3, timeout_s=0.0)
    store.heal()
    assert read(store, NAME) == EXTENT
    assert not failed
    event.set()
    for thread in threads:
        thread.join()
    assert len(failed) == 2
    assert store.hanging == 0


def test_a_torn_write_is_acknowledged_and_found_out_by_its_reader(memory):
    """As after a power cut: the file is short, or its bytes are not what the header says."""
    store = FaultyStore(memory)
    store.tear(1024)
    store.write(NAME, EXTENT)
    with pytest.raises(StoreSizeError) as torn:
        read(store, NAME)
    assert torn.value.actual == 1024
    with pytest.raises(StoreBrokenError):
        blockfile.parse(read(store, NAME, 1024))
    store.write(NAME, EXTENT)
    assert read(store, NAME) == EXTENT


def test_a_slow_store_takes_its_time(memory):
    """A fixed time for each call, and for its bytes one after the other."""
    waits = []
    store = SlowStore(memory, latency_s=0.5, bytes_per_s=1000.0, sleep=waits.append)
    store.write(NAME, EXTENT)
    store.probe()
    assert waits == [0.5, len(EXTENT) / 1000.0, 0.5]
    assert read(store, NAME) == EXTENT


def test_a_memory_store_can_be_full(memory):
    """As a disk: what is removed or replaced makes room."""
    small = MemoryStore(capacity_bytes=2 * len(EXTENT))
    for number in range(2):
        small.write(name_of(number), extent_of(name_of(number)))
    small.write(name_of(0), extent_of(name_of(0)))
    assert small.free_bytes() == 0
    with pytest.raises(StoreFullError):
        small.write(name_of(2), extent_of(name_of(2)))
    small.remove([name_of(0)])
    small.write(name_of(2), extent_of(name_of(2)))
    assert small.free_bytes() == 0
