"""The file tier's rules, one by one, with time as the test says it is."""

from __future__ import annotations

import pytest

from kvpool.core.file_jobs import (
    FILES_OWNER,
    LOOKS_MAX,
    PROBE_FIRST_S,
    PROBE_MAX_S,
    REMOVE_WITHIN_S,
    Failure,
    Learn,
    Miss,
    Read,
    Remove,
    Trouble,
    Write,
)
from kvpool.core.file_reads import AHEAD_MAX
from kvpool.core.file_removals import REMOVE_RETRY_S
from kvpool.core.filetier import ERRORS_MAX, LEARN_AGAIN_S, REMOVE_FILES, REMOVE_TURN, WRITE_TURN
from kvpool.core.messages import BlockRun, FilesRemoved, LookForFiles, RemoveFiles
from kvpool.model import BackendState, Namespace
from tests.core.file_world import BACKENDS, CLIENT, PAYLOAD, SLOT, SPACE, World, file

A, B = BACKENDS


def pinned(world: World) -> int:
    return world.segment.pinned


def stored(world: World, *numbers: int, number: int = 0, payload: int | None = PAYLOAD) -> None:
    """Put files into a backend, as another node would."""
    world.files[number].update({file(n): payload for n in numbers})


# ---- writing behind ------------------------------------------------------------------------------------


def test_a_block_is_told_of_when_its_file_is_there_and_not_before():
    """Acknowledged means written: a crash before that is a block that was never promised."""
    world = World()
    world.put(1)
    jobs = world.tier.take(0) + world.tier.take(0)
    write = next(job for job in jobs if isinstance(job, Write))
    assert not world.tier.changes.untold
    world.end(write)
    world.listen()
    assert world.told == {(A, file(1)): True}


def test_a_block_is_protected_only_while_a_thread_writes_it():
    """A queued block can be evicted at any time; it is then counted, and not written."""
    world = World(slots=4)
    world.put(1, 2, 3, 4)
    assert pinned(world) == 0
    world.put(5, 6, 7, 8)
    jobs = world.work()
    assert [job.file for job in jobs] == [file(n) for n in (5, 6, 7, 8)]
    assert world.tier.backends[0].counters["dropped_evicted"] == 4
    assert pinned(world) == 0


def test_writes_that_do_not_fit_the_queue_are_counted_and_come_with_the_next_use():
    """The queue is bounded in bytes."""
    world = World(queue_slots=3)
    world.put(1, 2, 3, 4, 5)
    backend = world.tier.backends[0]
    assert world.tier.queue_bytes == 3 * SLOT
    assert backend.counters["dropped_queue_full"] == 2
    assert len(world.work()) == 3
    world.tier.used([world.segment.slot(*file(n)) for n in (1, 4)])
    assert [job.file for job in world.work()] == [file(4)]


def test_selective_writing_takes_what_is_used_a_second_time():
    """write_through_selective: most blocks are never used again, and never written."""
    world = World(write_through=False)
    world.put(1, 2)
    assert world.work() == []
    world.tier.used([world.segment.slot(*file(2)), None])
    assert [job.file for job in world.work()] == [file(2)]
    world.tier.used([world.segment.slot(*file(2))])
    assert world.work() == []


def test_what_was_read_from_a_file_is_not_written_again():
    """A promoted block has its file already."""
    world = World()
    stored(world, 1)
    world.fetch(1)
    world.work()
    world.finished()
    world.tier.used([world.segment.slot(*file(1))])
    assert world.here(1)
    assert world.work() == []


def test_a_namespace_is_kept_beside_its_first_file_only():
    """The descriptor is written before the first file of a backend."""
    world = World()
    world.put(1)
    world.tier.take(0)  # the namespaces that are there already
    (first,) = world.tier.take(0)
    assert isinstance(first, Write)
    assert first.namespace == SPACE
    world.end(first)
    world.put(2)
    (second,) = world.tier.take(0)
    assert isinstance(second, Write)
    assert second.namespace is None


def test_two_backends_share_the_blocks_and_agree_on_whose_is_whose():
    """Rendezvous hashing: every node prefers the same backend for a block, each about half of them."""
    world = World(slots=256, backends=2)
    world.put(*range(200))
    world.work()
    assert min(len(files) for files in world.files) > 60
    again = World(slots=256, backends=2)
    again.put(*range(200))
    again.work()
    assert again.files == world.files


def test_what_waited_for_a_backend_that_fails_goes_to_the_other_one():
    """One may fail."""
    world = World(slots=64, backends=2)
    world.put(*range(20))
    world.tier.stuck(0, 2.5, world.now)
    world.work()
    assert world.files[0] == {}
    assert set(world.files[1]) == {file(n) for n in range(20)}
    assert world.tier.queue_bytes == 0


# ---- reading -------------------------------------------------------------------------------------------


def test_one_read_serves_everybody_who_waits():
    """Single flight: N requests for a block are one read."""
    world = World()
    stored(world, 1)
    waits = [world.fetch(1) for _ in range(5)]
    assert len(world.work()) == 1
    assert world.finished() == waits
    assert all(not wait.misses for wait in waits)


def test_what_has_come_stays_until_the_request_is_answered():
    """The first blocks of a long request are not evicted by its last ones."""
    world = World(slots=4)
    stored(world, *range(4))
    wait = world.fetch(0, 1, 2, 3)
    world.work()
    assert pinned(world) == 4
    assert world.finished() == [wait]
    assert pinned(world) == 0


def test_a_request_larger_than_the_memory_is_told_what_found_no_room():
    """Partial room is no error."""
    world = World(slots=4)
    stored(world, *range(6))
    wait = world.fetch(*range(6))
    world.work()
    assert world.finished() == [wait]
    assert wait.misses == {file(4): Miss.NO_ROOM, file(5): Miss.NO_ROOM}


def test_a_request_ends_at_its_deadline_and_its_read_goes_on():
    """What came too late for one is there for the next."""
    world = World()
    stored(world, 1, 2)
    world.work()
    wait = world.fetch(1, timeout_s=1.0)
    (read,) = world.tier.take(0)
    unread = world.fetch(2, timeout_s=1.0)
    world.tier.reads.expire(0.99)
    assert world.finished() == []
    world.tier.reads.expire(1.0)
    assert world.finished() == [wait, unread]
    assert wait.misses == {file(1): Miss.NOT_IN_TIME}
    world.end(read)
    assert world.here(1)
    assert world.work() == []  # nobody waits for the other one
    assert pinned(world) == 0


def test_a_request_whose_client_is_gone_holds_nothing():
    """Cancelled: no pin, no read that nobody wants."""
    world = World()
    stored(world, 1, 2)
    wait = world.fetch(1, 2)
    world.work()
    world.tier.reads.cancel(wait)
    assert pinned(world) == 0
    other = world.fetch(3)
    world.tier.reads.cancel(other)
    assert world.work() == []


def test_a_block_that_is_put_meanwhile_needs_no_read():
    """Somebody was faster than the file."""
    world = World()
    stored(world, 1)
    wait = world.fetch(1)
    world.put(1)
    assert world.finished() == [wait]
    assert [type(job) for job in world.work()] == [Write]


def test_a_block_that_is_being_put_is_waited_for():
    """Its slot is taken by the put; the put's commit answers the request."""
    world = World()
    stored(world, 1)
    key = file(1)[0][16:]
    held = world.segment.reserve(CLIENT, SPACE.digest, (0,), key, PAYLOAD, 1)
    wait = world.fetch(1)
    assert world.work() == []
    world.tier.committed(world.segment.commit(CLIENT, held.id, bytes(8)))
    assert world.finished() == [wait]
    assert wait.misses == {}


def test_a_file_of_another_size_is_read_with_its_own():
    """The usual size is tried first; the file's length says the right one, and the header the payload's."""
    world = World()
    world.put(1)
    stored(world, 2, payload=1300)
    wait = world.fetch(2)
    world.work()
    assert world.finished() == [wait]
    slot = world.segment.slot(*file(2))
    assert slot is not None
    assert slot.shard_bytes == 1300
    world.segment.check()


def test_missing_and_broken_files_are_told_apart_and_reported():
    """-4 and -5; both are no hits any more."""
    world = World()
    stored(world, 2, payload=None)
    wait = world.fetch(1, 2, backend=A)
    world.work()
    assert world.finished() == [wait]
    assert wait.misses == {file(1): Miss.FILE_MISSING, file(2): Miss.FILE_BROKEN}
    world.listen()
    assert world.told == {(A, file(1)): False, (A, file(2)): False}


def test_missing_files_prove_nothing_when_the_backend_is_away():
    """An empty mount point in a filesystem's place must not make the pool forget all of its files."""
    world = World()
    wait = world.fetch(1, backend=A)
    world.tier.take(0)
    (read,) = world.tier.take(0)
    world.end(read)
    world.trouble[0] = Trouble.ERROR
    world.probe()
    assert world.finished() == [wait]
    world.listen()
    assert world.told == {}
    assert world.tier.backends[0].state is BackendState.DOWN


def test_a_file_that_is_written_before_the_probe_is_not_missing():
    """The probe confirms what was not found before it, unless it has come meanwhile."""
    world = World()
    world.fetch(1, backend=A)
    world.tier.take(0)
    (read,) = world.tier.take(0)
    world.end(read)
    world.put(1)
    (write,) = world.tier.take(0)
    world.end(write)
    world.probe()
    world.listen()
    assert world.told == {(A, file(1)): True}


def test_a_block_whose_file_is_gone_is_written_when_it_is_used():
    """Also where it was in another file, or about to be, when that was found out."""
    world = World(backends=2)
    number = next(n for n in range(100) if preferred(n) == 1)
    wait = world.fetch(number, backend=A)
    world.tier.take(0)
    (read,) = world.tier.take(0)
    world.end(read)
    world.put(number)
    slot = world.segment.slot(*file(number))
    assert slot is not None
    assert slot.filed
    world.probe()
    assert not slot.filed
    assert world.finished() == [wait]
    world.tier.used([slot])
    assert slot.filed
    world.work()
    world.listen()
    assert world.told == {(A, file(number)): False, (B, file(number)): True}


def preferred(number: int) -> int:
    """The backend that a block is written to while both work."""
    world = World(backends=2)
    world.put(number)
    world.work()
    return next(n for n, files in enumerate(world.files) if files)


@pytest.mark.parametrize("noticed", ["down", "error", "missing"])
def test_what_was_in_a_backend_that_was_deleted_and_made_anew_is_written_again(noticed):
    """It keeps no namespaces any more; their descriptors are written again, too, and blocks when they are used."""
    world = World(slots=2 * LOOKS_MAX)
    world.put(*range(LOOKS_MAX + 10))
    world.work()
    world.files[0].clear()
    world.kept[0].clear()
    if noticed == "down":
        world.tier.stuck(0, 2.0, world.now)
    else:
        wait = world.fetch(LOOKS_MAX + 10, backend=A)
        (read,) = world.tier.take(0)
        world.trouble[0] = Trouble.ERROR if noticed == "error" else None
        world.end(read)
        assert world.finished() == [wait]
        world.trouble[0] = None
    for _ in range(5):
        world.work()
        world.now += LEARN_AGAIN_S
    slots = [world.segment.slot(*file(n)) for n in range(LOOKS_MAX + 10)]
    world.tier.used(slots)
    world.work()
    assert set(world.files[0]) == {file(n) for n in range(LOOKS_MAX + 10)}
    assert list(world.kept[0].values()) == [SPACE]
    world.tier.used(slots)
    assert world.work() == []


def test_an_unnamed_backend_is_looked_for_in_all():
    """A block written while its first choice was away lies in the second."""
    world = World(slots=64, backends=2)
    world.trouble[0] = Trouble.ERROR
    world.put(*range(20))
    for _ in range(4):
        world.work()
        world.now += 10
    world.trouble[0] = None
    world.now += 10
    world.work()
    world.segment.evict([BlockRun(SPACE.digest, 1, PAYLOAD, b"".join(file(n)[0][16:] for n in range(20)))])
    written = [n for n in range(20) if file(n) in world.files[1]]
    assert len(written) > 10
    wait = world.fetch(*written)
    world.work()
    assert world.finished() == [wait]
    assert wait.misses == {}


def test_a_backend_that_is_not_ours_is_no_wait():
    """A node that does not serve the backend says so at once."""
    world = World()
    wait = world.fetch(1, backend=B)
    assert world.finished() == [wait]
    assert wait.misses == {file(1): Miss.STORAGE_DOWN}


def test_a_namespace_that_nobody_registered_is_read_from_the_backend():
    """Any node reads what a dead one wrote: the descriptor lies beside the files."""
    world = World()
    other = Namespace(model="other")
    block = (other.digest + bytes(16), 0)
    assert [type(job) for job in world.tier.take(0)] == [Learn]
    world.tier.learned(0, [], None, 0.0)
    wait = world.tier.reads.fetch([block], A, 1.0)
    assert [type(job) for job in world.tier.take(0)] == [Learn]
    world.tier.learned(0, [other], None, 0.0)
    world.files[0][block] = PAYLOAD
    world.work()
    assert world.finished() == [wait]
    assert wait.misses == {}


def test_a_namespace_that_the_backend_does_not_know_either_is_a_missing_file():
    """Asked once, then answered."""
    world = World()
    wait = world.tier.reads.fetch([(bytes(32), 0)], A, 1.0)
    world.work()
    assert world.finished() == [wait]
    assert wait.misses == {(bytes(32), 0): Miss.FILE_MISSING}


def test_a_shard_that_the_namespace_does_not_have_is_a_missing_file():
    """Not an error of the tier."""
    world = World()
    wait = world.tier.reads.fetch([(file(1)[0], 7)], A, 1.0)
    world.work()
    assert world.finished() == [wait]
    assert wait.misses == {(file(1)[0], 7): Miss.FILE_MISSING}


# ---- reading ahead ---------------------------------------------------------------------------------------


def test_reading_ahead_brings_blocks_and_answers_nobody():
    """Prefetch."""
    world = World()
    stored(world, 1, 2)
    world.tier.reads.ahead([file(1), file(2), file(9)], A)
    world.work()
    assert world.here(1)
    assert world.here(2)
    assert world.finished() == []
    assert len(world.tier.reads) == 0


def test_what_is_waited_for_comes_before_what_is_read_ahead():
    """And a block asked for joins the read that was planned already."""
    world = World()
    stored(world, *range(8))
    world.work()
    world.tier.reads.ahead([file(n) for n in range(6)], A)
    wait = world.fetch(5, 7)
    jobs = world.work()
    assert [job.file for job in jobs[:2]] == [file(5), file(7)]
    assert len(jobs) == 7
    assert world.finished() == [wait]


def test_reading_ahead_is_bounded():
    """More than so much is not promised."""
    world = World()
    world.tier.reads.ahead([file(n) for n in range(AHEAD_MAX + 10)], A)
    assert len(world.tier.reads) == AHEAD_MAX
    assert world.tier.reads.counters["prefetch_dropped"] == 10


def test_writes_get_their_turn_while_reads_wait():
    """A pool that reads all the time still writes."""
    world = World(slots=4096)
    world.put(*range(100))
    stored(world, *range(1000, 1400))
    world.fetch(*range(1000, 1400))
    world.tier.take(0)  # namespaces
    kinds = [type(world.tier.take(0)[0]) for _ in range(2 * WRITE_TURN)]
    assert kinds.count(Write) == 2
    assert kinds.count(Read) == 2 * WRITE_TURN - 2


def test_removals_get_their_turn_while_reads_wait():
    """A full backend that is read all the time has files removed, and is written again."""
    world = World(slots=4096)
    stored(world, *range(1000, 1900))
    world.tier.set_full(frozenset({A}))
    world.fetch(*range(1000, 1900))
    world.tier.remove(command(1, *range(1000, 1000 + 2 * REMOVE_FILES)))
    world.tier.take(0)  # namespaces
    kinds = [type(world.tier.take(0)[0]) for _ in range(2 * REMOVE_TURN)]
    assert kinds.count(Remove) == 2
    assert kinds.count(Read) > REMOVE_TURN


# ---- backends that fail ------------------------------------------------------------------------------------


def test_a_backend_that_keeps_silent_is_down_and_nobody_waits_for_it():
    """Requests are answered at once, and the slot that a thread may still fill stays taken."""
    world = World()
    stored(world, 1, 2)
    world.work()
    wait = world.fetch(1)
    (read,) = world.tier.take(0)
    queued = world.fetch(2)
    world.tier.stuck(0, 2.1, world.now)
    assert world.finished() == [wait, queued]
    assert wait.misses == {file(1): Miss.STORAGE_DOWN}
    assert queued.misses == {file(2): Miss.STORAGE_DOWN}
    assert world.segment.reserved == 1
    assert world.tier.take(0) == []
    later = world.fetch(1)
    assert world.finished() == [later]
    assert later.misses == {file(1): Miss.STORAGE_DOWN}
    world.end(read)
    assert world.segment.reserved == 0
    assert world.here(1)
    (backend,) = world.tier.storage().backends
    assert (backend.state, backend.reason) == (BackendState.DOWN, "no answer for 2.1 s")


def test_much_that_waits_for_a_backend_that_fails_is_moved_in_slices():
    """No call works through all of it; everybody is answered, or gets the block elsewhere, and all is accounted for."""
    world = World(slots=4096, backends=2, queue_slots=4096)
    world.work()
    world.put(*range(2000))
    waits = [world.fetch(n, backend=A) for n in range(10_000, 12_000)]
    elsewhere = world.fetch(*range(20_000, 20_100), timeout_s=100.0)
    stored(world, *range(20_000, 20_100), number=1)
    world.tier.reads.ahead([file(n) for n in range(30_000, 31_000)], A)
    queued = world.tier.queue_bytes
    world.tier.stuck(0, 2.0, world.now)
    assert 0 < len(world.finished()) <= 2 * LOOKS_MAX
    assert world.tier.unwritten == 2000
    assert world.tier.queue_bytes == queued
    late = world.fetch(11_999, backend=A)  # which is still to be given up
    assert world.finished() == [waits[-1], late]
    rounds = 0
    while world.tier.catch_up(world.now):
        assert len(world.finished()) <= LOOKS_MAX
        rounds += 1
    assert rounds > 8
    assert [wait.misses for wait in [*waits, late]] == [
        {file(n): Miss.STORAGE_DOWN} for n in [*range(10_000, 12_000), 11_999]
    ]
    assert len(world.tier.backends[1].writes) == world.tier.unwritten == 2000
    world.work()
    assert elsewhere in world.finished()
    assert elsewhere.misses == {}
    assert len(world.tier.reads) == world.tier.queue_bytes == 0
    assert set(world.files[1]) >= {file(n) for n in range(2000)}


def test_one_failure_is_a_question_and_the_probe_answers_it():
    """A single bad file does not take the backend away."""
    world = World()
    stored(world, 1)
    world.work()
    world.trouble[0] = Trouble.ERROR
    wait = world.fetch(1)
    (read,) = world.tier.take(0)
    world.end(read)
    assert world.finished() == [wait]
    assert wait.misses == {file(1): Miss.STORAGE_DOWN}
    world.trouble[0] = None
    world.probe()
    assert world.tier.backends[0].state is BackendState.UP
    world.trouble[0] = Trouble.ERROR
    world.fetch(1)
    world.work()
    assert world.tier.backends[0].state is BackendState.DOWN
    assert world.tier.backends[0].reason == "trouble"


def test_failures_in_a_row_take_a_backend_down_whatever_its_probes_say():
    """A probe is one small file; it does not prove that the others can be read."""
    world = World()
    world.work()
    world.trouble[0] = Trouble.ERROR
    for n in range(ERRORS_MAX):
        assert world.tier.backends[0].state is BackendState.UP
        world.fetch(n)
        for job in world.tier.take(0):
            world.end(job)
        for number in world.tier.due_probes(world.now):
            if n < ERRORS_MAX - 1:
                errors = world.tier.backends[0].errors
                world.tier.probed(number, None, None, world.now)
                world.tier.backends[0].errors = errors
    assert world.tier.backends[0].state is BackendState.DOWN


@pytest.mark.parametrize("trouble", [Trouble.FULL, Trouble.READ_ONLY])
def test_a_backend_that_takes_nothing_is_still_read(trouble):
    """Full, or mounted read-only: state READ_ONLY with the reason."""
    world = World()
    stored(world, 5)
    world.trouble[0] = trouble
    world.put(1, 2)
    world.work()
    backend = world.tier.backends[0]
    assert (backend.state, backend.reason) == (BackendState.READ_ONLY, "trouble")
    world.put(3)
    assert world.work() == []
    wait = world.fetch(5)
    world.work()
    assert world.finished() == [wait]
    assert wait.misses == {}
    world.trouble[0] = None
    world.now += 10
    world.work()
    assert backend.state is BackendState.UP
    world.tier.used([world.segment.slot(*file(n)) for n in (1, 2, 3)])
    world.work()
    assert {file(n) for n in (1, 2, 3)} <= set(world.files[0])


def test_a_missing_file_is_reported_though_nothing_can_be_written():
    """A disk that only reads proves by its probe that it is itself: what is not there is no hit any more."""
    world = World()
    wait = world.fetch(1, backend=A)
    world.tier.take(0)
    (read,) = world.tier.take(0)
    world.end(read)
    world.trouble[0] = Trouble.READ_ONLY
    world.probe()
    assert world.finished() == [wait]
    world.listen()
    assert world.told == {(A, file(1)): False}
    assert world.tier.backends[0].state is BackendState.READ_ONLY


def test_removals_that_a_read_only_disk_refuses_do_not_take_it_down():
    """Its files are still read; what was left of the command is given up with its first failure."""
    world = World()
    backend = world.tier.backends[0]
    keys = b"".join(file(n)[0][16:] for n in range(1, 3 * REMOVE_FILES))
    world.tier.take(0)
    world.tier.remove(RemoveFiles(1, A, (BlockRun(file(1)[0][:16], 1, 100, keys),)))
    (job,) = world.tier.take(0)
    world.tier.removed(job, (), Failure(Trouble.READ_ONLY, "read-only"), world.now)
    assert (backend.state, backend.errors, len(backend.removes)) == (BackendState.READ_ONLY, 0, 0)
    assert world.tier.take_removed() == []


def test_a_full_disk_is_believed_to_have_room_when_a_block_would_fit():
    """A probe's small file fits where no block does."""
    world = World()
    world.trouble[0] = Trouble.FULL
    world.put(1)
    world.work()
    world.now = 10.0
    (number,) = world.tier.due_probes(world.now)
    world.tier.probed(number, None, SLOT, world.now)
    assert world.tier.backends[0].state is BackendState.READ_ONLY
    world.now = 20.0
    (number,) = world.tier.due_probes(world.now)
    world.tier.probed(number, None, 10 * SLOT, world.now)
    assert world.tier.backends[0].state is BackendState.UP


def test_probes_come_less_and_less_often_and_one_at_a_time():
    """A backend that is gone for a day is not asked ten times a second."""
    world = World()
    world.tier.stuck(0, 2.0, 0.0)
    at, waits = 0.0, []
    for _ in range(6):
        begin = at
        while not world.tier.due_probes(at):
            at += 0.01
        waits.append(at - begin)
        assert world.tier.due_probes(at + 100) == []  # one is out
        world.tier.probed(0, Failure(Trouble.ERROR, "still away"), None, at)
    assert waits[0] == pytest.approx(PROBE_FIRST_S, abs=0.02)
    assert waits[-1] == pytest.approx(PROBE_MAX_S, abs=0.02)
    assert waits == pytest.approx(sorted(waits), abs=0.02)
    assert world.tier.backends[0].reason == "still away"


def test_a_state_is_told_once():
    """The master hears of changes only."""
    world = World()
    world.tier.storage()
    assert not world.tier.storage_changed
    world.tier.stuck(0, 2.0, 0.0)
    world.tier.stuck(0, 2.1, 0.1)
    assert world.tier.storage().backends[0].reason == "no answer for 2.0 s"
    assert not world.tier.storage_changed


# ---- the master's wishes -------------------------------------------------------------------------------------


def command(number: int, *numbers: int, backend: bytes = A) -> RemoveFiles:
    keys = b"".join(file(n)[0][16:] for n in numbers)
    return RemoveFiles(number, backend, (BlockRun(SPACE.digest, 1, PAYLOAD, keys, backend=backend),))


def test_removed_files_are_confirmed_when_all_are_gone():
    """A command is confirmed once, and its files may be written again when they are used."""
    world = World(slots=1024)
    numbers = range(REMOVE_FILES + 5)
    world.put(*numbers)
    world.work()
    world.tier.remove(command(7, *numbers))
    world.tier.remove(command(7, *numbers))
    (first,) = world.tier.take(0)
    world.end(first)
    assert world.tier.take_removed() == []
    world.work()
    assert world.tier.take_removed() == [FilesRemoved(7)]
    assert world.files[0] == {}
    world.tier.used([world.segment.slot(*file(3))])
    assert len(world.work()) == 1


def test_a_removal_that_fails_is_not_confirmed():
    """The master asks another node, or again."""
    world = World()
    world.put(1)
    world.work()
    world.trouble[0] = Trouble.ERROR
    world.tier.remove(command(7, 1))
    world.work()
    assert world.tier.take_removed() == []
    world.trouble[0] = None
    world.now += 10
    world.work()
    world.tier.remove(command(7, 1))
    world.work()
    assert world.tier.take_removed() == [FilesRemoved(7)]


def test_files_that_are_looked_for_stay_and_those_that_are_gone_are_told():
    """A block whose file is gone is written again when it is used."""
    world = World(slots=1024)
    numbers = range(REMOVE_FILES + 2)
    world.put(*numbers)
    world.work()
    del world.files[0][file(3)]
    there = dict(world.files[0])
    asked = command(7, *numbers)
    world.tier.remove(LookForFiles(asked.id, asked.backend, asked.blocks))
    world.work()
    gone = BlockRun(SPACE.digest, 1, 0, file(3)[0][16:], backend=A)
    assert (world.tier.take_removed(), world.files[0]) == ([FilesRemoved(7, (gone,))], there)
    world.tier.used([world.segment.slot(*file(number)) for number in numbers])
    assert [job.file for job in world.work()] == [file(3)]


def test_a_removal_that_waited_for_long_is_dropped():
    """The master asks another node then: to remove later what was written again meanwhile would lose it."""
    assert REMOVE_WITHIN_S <= REMOVE_RETRY_S * 2 / 3
    world = World(slots=1024)
    numbers = range(4 * REMOVE_FILES)
    world.put(*numbers)
    world.work()
    world.tier.remove(command(7, *numbers))
    world.now = 100.0
    world.tier.catch_up(world.now)
    (first,) = world.tier.take(0)
    world.end(first)
    world.now += REMOVE_WITHIN_S - 0.1
    world.tier.catch_up(world.now)
    (second,) = world.tier.take(0)
    assert isinstance(second, Remove)
    assert second.until == 100.0 + REMOVE_WITHIN_S
    world.now += 0.1
    world.tier.remove(command(8, 1))
    world.work()
    world.end(second)
    assert world.tier.take_removed() == [FilesRemoved(8)]
    assert len(world.files[0]) == 2 * REMOVE_FILES
    world.tier.remove(command(7, *numbers))
    world.work()
    assert world.tier.take_removed() == [FilesRemoved(7)]


def test_commands_for_unknown_backends_and_of_dead_masters_are_dropped():
    """Nothing is confirmed that was not done."""
    world = World()
    world.tier.remove(command(1, 1, backend=B))
    world.tier.remove(RemoveFiles(2, A, ()))
    world.tier.remove(command(3, 1))
    assert world.tier.take_removed() == [FilesRemoved(2)]
    world.tier.forget_commands()
    assert world.work() == []
    assert world.tier.take_removed() == []


def test_nothing_is_written_to_a_backend_that_the_master_calls_full():
    """Until it says otherwise; what waited goes elsewhere."""
    world = World(slots=64, backends=2)
    world.put(*range(10))
    world.tier.set_full(frozenset({A}))
    world.put(*range(10, 20))
    world.work()
    assert world.files[0] == {}
    assert len(world.files[1]) == 20
    world.tier.set_full(frozenset())
    world.put(*range(20, 40))
    world.work()
    assert world.files[0]


def test_nothing_is_held_when_nothing_is_done():
    """After a mixed day the segment is free."""
    world = World(slots=8, backends=2)
    for n in range(10, 50):
        world.put(n)
        world.fetch(n - 10, n - 5)
        world.work()
        world.finished()
    world.segment.check()
    world.segment.disconnect(FILES_OWNER)  # would free what is held
    assert world.segment.pinned == world.segment.reserved == 0
