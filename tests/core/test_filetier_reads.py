"""The file tier's reads where requests are odd: the same block twice, puts that are given up, no room at all."""

from __future__ import annotations

import pytest

from kvpool.core.file_jobs import LOOKS_MAX, Failure, Miss, Read, Trouble
from kvpool.core.file_reads import AHEAD_MAX, BATCH_FILES
from tests.core.file_world import BACKENDS, CLIENT, PAYLOAD, SPACE, World, file


def stored(world: World, *numbers: int) -> None:
    """Put files into the backend, as another node would."""
    world.files[0].update({file(n): PAYLOAD for n in numbers})


def test_a_request_may_name_a_block_twice():
    """It is one read, one wait and one answer, whether the block comes, cannot come, or comes too late."""
    world = World()
    stored(world, 1)
    hit, miss = world.fetch(1, 1), world.fetch(2, 1, 2)
    world.work()
    assert world.finished() == [hit, miss]
    assert not hit.misses
    assert list(miss.misses) == [file(2)]
    world.fetch(3, 3)
    world.tier.reads.expire(world.now + 2)
    assert len(world.finished()) == 1
    world.tier.reads.cancel(world.fetch(4, 4))
    assert len(world.tier.reads) == 0
    world.segment.check()


def test_a_block_whose_put_was_given_up_is_read_when_it_is_asked_for_again():
    """A read that met the put waits for its end; without one, the next request goes to the file."""
    world = World()
    stored(world, 1)
    world.work()
    held = world.segment.reserve(CLIENT, SPACE.digest, (0,), file(1)[0][16:], PAYLOAD, 1)
    first = world.fetch(1)
    assert world.work() == []
    world.segment.abort(CLIENT, held.id)
    assert world.work() == []
    second = world.fetch(1)
    assert [type(job) for job in world.work()] == [Read]
    assert world.finished() == [first, second]
    assert not first.misses
    assert not second.misses


def test_a_request_for_a_block_whose_namespace_is_being_looked_for_waits_for_that():
    """It is not queued again."""
    world = World()
    world.work()
    unknown = bytes(32), 0
    wait = world.tier.reads.fetch([unknown], b"", world.now + 1)
    (learn,) = world.tier.take(0)
    again = world.tier.reads.fetch([unknown], b"", world.now + 1)
    assert [read.file for read in world.tier.backends[0].learning] == [unknown]
    assert world.tier.take(0) == []
    world.end(learn)
    world.work()
    assert world.finished() == [wait, again]
    assert len(world.tier.reads) == 0


def test_no_room_for_one_block_is_none_for_all_that_are_read_ahead():
    """Thousands of them must not be tried one after the other."""
    world = World(slots=4)
    world.work()
    held = world.segment.reserve(CLIENT, SPACE.digest, (0,), b"".join(file(n)[0][16:] for n in range(4)), PAYLOAD, 1)
    assert len(held.slots) == 4
    world.tier.reads.ahead([file(n) for n in range(10, 10 + AHEAD_MAX)], b"")
    assert world.tier.take(0) == []
    assert world.tier.backends[0].looked == 1
    assert len(world.tier.reads) == 0
    assert world.tier.reads.counters["no_room"] == 1
    assert world.tier.reads.counters["prefetch_dropped"] == AHEAD_MAX - 1


@pytest.mark.parametrize("ahead", [False, True])
def test_a_file_that_no_segment_can_hold_is_broken(ahead):
    """One that has grown: its reader is told so, and the master, and what else is read ahead is not given up."""
    world = World(slots=16)
    stored(world, 1, 2, 3)
    world.work()
    waits = [] if ahead else [world.fetch(1, backend=BACKENDS[0])]
    world.tier.reads.ahead([file(1), file(2), file(3)], BACKENDS[0])
    read, *others = world.tier.take(0)
    assert isinstance(read, Read)
    assert read.file == file(1)
    world.tier.read_failed(read, Failure(Trouble.SIZE, "another size", 1 << 40), world.now)
    assert world.finished() == waits
    assert [wait.misses for wait in waits] == [{file(1): Miss.FILE_BROKEN} for _ in waits]
    world.listen()
    assert world.told == {(BACKENDS[0], file(1)): False}
    for job in others:
        world.end(job)
    world.work()
    assert world.here(3)
    assert world.tier.reads.counters["prefetch_dropped"] == 0
    assert len(world.tier.reads) == 0


def test_a_block_that_is_too_large_drops_nothing_else_that_is_read_ahead():
    """There may be room for all others."""
    world = World(slots=16)
    stored(world, *range(1, 9))
    world.work()
    world.tier.reads._shard_bytes[SPACE.digest] = 1 << 30
    world.tier.reads.ahead([file(n) for n in range(1, 9)], BACKENDS[0])
    assert world.tier.take(0) == []
    assert world.tier.reads.counters["no_room"] == 8
    assert world.tier.reads.counters["prefetch_dropped"] == 0


def test_a_search_for_jobs_looks_at_so_many_files_only():
    """Reads that find no room and writes of blocks that are gone: the rest is for later, and none is left out."""
    world = World(slots=4)
    world.work()
    for first in range(0, 1000, 4):
        world.put(*range(first, first + 4))
    for _ in range(3):
        assert world.tier.take(0) == []
        assert world.tier.backends[0].looked == LOOKS_MAX
    (last,) = world.tier.take(0)
    world.end(last)
    world.work()
    assert len(world.files[0]) == 4
    wait = world.fetch(*range(10_000, 11_000))
    while world.tier.backends[0].reads:
        jobs = world.tier.take(0)
        assert world.tier.backends[0].looked <= LOOKS_MAX
        for job in jobs:
            world.end(job)
    assert len(wait.misses) == 1000
    world.segment.check()


def test_a_few_reads_are_shared_among_the_threads():
    """Nobody waits for files one after the other while threads have nothing to do; many still come in batches."""
    world = World(slots=4000)
    world.end(world.tier.take(0)[0])  # the namespaces it keeps
    world.fetch(*range(6))
    assert [len(world.tier.take(0, 4)) for _ in range(5)] == [2, 1, 1, 1, 1]
    world.fetch(*range(100, 600))
    assert len(world.tier.take(0, 4)) == BATCH_FILES
