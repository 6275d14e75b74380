"""The order in which files are read, against a list that is sorted."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.core.file_jobs import ORDER_S, Read, ReadQueue
from tests.core.file_world import World, file

DEADLINES = st.sampled_from([1.0, 2.0, 3.0, math.inf])


@given(
    st.lists(st.tuples(st.sampled_from(["add", "first", "pop", "remove", "again"]), DEADLINES, st.integers(0, 1 << 16)))
)
def test_reads_leave_in_the_order_of_their_deadlines(steps):
    """Then of their coming; what was removed does not, and what comes again has a new place."""
    queue, oracle = ReadQueue(), []
    for turn, (step, deadline, choice) in enumerate(steps):
        if step in {"add", "first"}:
            read = Read(file(turn), [0], True, deadline)
            queue.add(read, first=step == "first")
            oracle.append((-math.inf if step == "first" else deadline, turn, read))
        elif oracle and step == "pop":
            oracle.sort(key=lambda entry: entry[:2])
            assert queue.pop() is oracle.pop(0)[2]
        elif oracle:
            read = oracle.pop(choice % len(oracle))[2]
            queue.remove(read)
            assert read.queue is None
            if step == "again":
                read.deadline = deadline
                queue.add(read)
                oracle.append((deadline, turn, read))
        assert len(queue) == len(oracle)
        assert list(queue) == [read for _, _, read in sorted(oracle, key=lambda entry: entry[:2])]
    if not oracle:
        with pytest.raises(IndexError):
            queue.pop()


def test_deadlines_that_hardly_differ_are_equal():
    """Those of one call differ by what its questions took: others that came after all of them are not read between."""
    queue = ReadQueue()
    middle = (math.floor(1000 / ORDER_S) + 0.5) * ORDER_S
    reads = [Read(file(n), [0], True, middle + shift) for n, shift in enumerate([0.002, 0.001, 0.0, ORDER_S, -ORDER_S])]
    for read in reads:
        queue.add(read)
    assert [queue.pop() for _ in reads] == [reads[n] for n in (4, 0, 1, 2, 3)]


def test_what_left_it_is_not_kept():
    """Ten thousand reads that come and are given up cost no memory, while one stays."""
    queue = ReadQueue()
    queue.add(Read(file(0), [0], True))
    for number in range(1, 10_000):
        read = Read(file(number), [0], True)
        queue.add(read)
        queue.remove(read)
    assert len(queue._heap) < 100


@pytest.mark.parametrize("later_s", [0.02, 0.1])
def test_all_of_an_earlier_call_is_read_before_a_later_one(later_s):
    """A client asks for much in parts: the last of them does not wait for all that others have asked for meanwhile."""
    world = World()
    world.files[0].update({file(n): 512 for n in range(12)})
    world.work()
    first = world.fetch(*range(4), timeout_s=1.0)
    world.now = later_s
    world.fetch(*range(8, 12), timeout_s=1.0)
    world.now = 0.2
    last = world.fetch(*range(4, 8), timeout_s=0.8)
    read = [job.file for job in world.work()]
    assert read == [file(n) for n in range(12)]
    assert world.finished()[:2] == [first, last]


def test_a_block_that_somebody_more_hurried_asks_for_is_read_earlier():
    """Also one that was only to be read ahead, and one that the first to ask no longer wants."""
    world = World()
    world.files[0].update({file(n): 512 for n in range(6)})
    world.work()
    world.tier.reads.ahead([file(5)], b"")
    patient = world.fetch(0, 1, 2, timeout_s=10.0)
    world.fetch(3, timeout_s=5.0)
    world.fetch(5, 2, timeout_s=1.0)
    world.tier.reads.cancel(patient)
    assert [job.file for job in world.work()] == [file(5), file(2), file(3)]


def test_who_is_hardly_more_hurried_leaves_the_order_as_it_is():
    """Blocks that two ask for at once keep the place that the first one gave them."""
    world = World()
    world.files[0].update({file(n): 512 for n in range(4)})
    world.work()
    start = (math.floor(100 / ORDER_S) + 0.5) * ORDER_S
    world.fetch(0, 1, timeout_s=start)
    world.fetch(2, 3, timeout_s=start)
    world.fetch(0, 1, timeout_s=start - ORDER_S / 4)
    assert [job.file for job in world.work()] == [file(n) for n in range(4)]


def test_a_request_hurries_what_was_put_off_and_what_is_in_hand():
    """A read whose first request is over goes before those that nobody waits for; one in hand is hurried elsewhere."""
    world = World(backends=2)
    for files in world.files:
        files.update({file(n): 1024 for n in range(8)})
    world.work()
    world.fetch(1, timeout_s=1.0)
    (job,) = world.tier.take(0) or world.tier.take(1)
    world.now = 2.0
    world.tier.reads.expire(world.now)
    world.tier.reads.ahead([file(n) for n in range(2, 8)], b"")
    world.end(job)  # of another size: to be read ahead, now
    read = world.tier.reads._reads[file(1)]
    assert read.queue in {work.ahead for work in world.tier.backends}
    world.fetch(1, timeout_s=5.0)
    assert read.queue in {work.reads for work in world.tier.backends}


def test_who_joins_a_read_in_hand_is_waited_for_where_it_is_done_next():
    """It was to be read ahead; the backend that has it in hand does not have the file."""
    world = World(backends=2)
    world.work()
    first = world.tier.reads
    first.ahead([file(1)], b"")
    job = (world.tier.take(0) or world.tier.take(1))[0]
    world.fetch(1, timeout_s=1.0)
    world.end(job)  # missing: the other one is asked
    assert first._reads[file(1)].deadline == 1.0
