"""Random days of a file tier: what it says and holds is compared with what a plain dict of files says."""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvpool.core.file_jobs import FILES_OWNER, File, Job, Miss, Read, Trouble, Wait, Write
from kvpool.core.messages import BlockRun, RemoveFiles
from kvpool.errors import AllPinnedError
from tests.core.file_world import BACKENDS, PAYLOAD, SLOT, SPACE, World, file

NUMBERS = st.lists(st.integers(0, 11), min_size=1, max_size=6, unique=True)
WHERE = st.integers(0, 1)
QUEUE_SLOTS = 6


class TierDays(RuleBasedStateMachine):
    """Two backends, eight slots, twelve blocks; jobs end in any order, or after the backend was given up."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(slots=8, backends=2, queue_slots=QUEUE_SLOTS)
        self.running: list[Job] = []
        self.waits: dict[Wait, float] = {}
        self.removals = 0
        self.known_bad: set[tuple[int, File]] = set()  # vanished or broken without a word to the tier

    # ---- what happens ----------------------------------------------------------------------------------

    @rule(numbers=NUMBERS, payload=st.sampled_from([PAYLOAD, PAYLOAD, 1000]))
    def put(self, numbers, payload):
        world = self.world
        keys = b"".join(file(n)[0][16:] for n in numbers)
        try:
            held = world.segment.reserve(1, SPACE.digest, (0,), keys, payload, 1)
        except AllPinnedError:
            return
        if held.id:
            world.tier.committed(world.segment.commit(1, held.id, bytes(8 * len(held.slots))))

    @rule(numbers=NUMBERS)
    def use(self, numbers):
        pin = self.world.segment.pin(1, SPACE.digest, (0,), b"".join(file(n)[0][16:] for n in numbers))
        self.world.tier.used(pin.slots)
        self.world.segment.release(1, pin.id)

    @rule(numbers=NUMBERS, where=st.integers(0, 2), timeout_s=st.floats(0, 5))
    def fetch(self, numbers, where, timeout_s):
        absent = [n for n in numbers if not self.world.here(n)]
        wait = self.world.fetch(*absent, backend=(*BACKENDS, b"")[where], timeout_s=timeout_s)
        self.waits[wait] = self.world.now + timeout_s

    @rule(numbers=NUMBERS, where=st.integers(0, 2))
    def ahead(self, numbers, where):
        absent = [file(n) for n in numbers if not self.world.here(n)]
        self.world.tier.reads.ahead(absent, (*BACKENDS, b"")[where])

    @rule(pick=st.integers(0, 50))
    def client_goes(self, pick):
        if self.waits:
            wait = list(self.waits)[pick % len(self.waits)]
            del self.waits[wait]
            self.world.tier.reads.cancel(wait)

    @rule(number=WHERE)
    def take(self, number):
        self.running += self.world.tier.take(number)

    @rule(pick=st.integers(0, 50), many=st.integers(1, 4))
    def end(self, pick, many):
        for _ in range(many):
            if self.running:
                self._end(self.running.pop(pick % len(self.running)))

    def _end(self, job: Job) -> None:
        self.world.end(job)
        if isinstance(job, Read | Write):
            self.known_bad.discard((job.backend, job.file))

    @rule(number=WHERE, trouble=st.sampled_from([None, None, Trouble.ERROR, Trouble.FULL, Trouble.READ_ONLY]))
    def weather(self, number, trouble):
        self.world.trouble[number] = trouble

    @rule(number=WHERE)
    def silence(self, number):
        self.world.tier.stuck(number, 2.5, self.world.now)

    @rule(seconds=st.floats(0, 3))
    def time_goes_by(self, seconds):
        self.world.now += seconds
        self.world.tier.catch_up(self.world.now)
        self.world.tier.reads.expire(self.world.now)
        self.world.probe()

    @rule(numbers=NUMBERS)
    def master_evicts(self, numbers):
        keys = b"".join(file(n)[0][16:] for n in numbers)
        self.world.segment.evict([BlockRun(SPACE.digest, 1, PAYLOAD, keys)])

    @rule(full=st.sets(st.sampled_from(BACKENDS)))
    def limits(self, full):
        self.world.tier.set_full(frozenset(full))

    @rule(numbers=NUMBERS, number=WHERE, broken=st.booleans())
    def file_rots(self, numbers, number, broken):
        for n in numbers:
            if file(n) in self.world.files[number]:
                self.known_bad.add((number, file(n)))
                if broken:
                    self.world.files[number][file(n)] = None
                else:
                    del self.world.files[number][file(n)]

    # ---- what must be true -------------------------------------------------------------------------------

    @invariant()
    def counts_agree(self):
        tier = self.world.tier
        self.world.segment.check()
        queues = [*(backend.writes for backend in tier.backends), *(writes for _, writes in tier._moving)]
        assert tier.queue_bytes == sum(sum(writes.values()) for writes in queues)
        assert tier.queue_bytes <= QUEUE_SLOTS * SLOT + 1024

    @invariant()
    def only_what_is_in_hand_is_held(self):
        held = self.world.segment._owners.get(FILES_OWNER)
        reading = [job for job in self.running if isinstance(job, Read)]
        writing = [job for job in self.running if isinstance(job, Write)]
        waiting = sum(len(wait.pins) for wait in self.waits)
        assert len(held.reservations if held else ()) == len(reading)
        assert len(held.pins if held else ()) == len(writing) + waiting

    @invariant()
    def nobody_waits_past_a_deadline_or_for_nothing(self):
        world = self.world
        world.tier.reads.expire(world.now)
        for wait in world.tier.reads.take_finished():
            if wait in self.waits:
                del self.waits[wait]
                assert not wait.reads
                for missed, miss in wait.misses.items():
                    assert isinstance(miss, Miss), missed
                world.tier.reads.close(wait)
        assert all(deadline > world.now for deadline in self.waits.values())
        assert all(wait.reads for wait in self.waits)

    def teardown(self):
        """When all is calm again, the master knows exactly the files that are there."""
        world, calm = self.world, random.Random(0)
        world.trouble = [None, None]
        world.tier.set_full(frozenset())
        while self.running:
            self._end(self.running.pop(calm.randrange(len(self.running))))
        for _ in range(12):
            world.now += 10
            world.work()
            world.tier.reads.expire(world.now)
            world.finished()
        world.listen()
        for number, backend in enumerate(BACKENDS):
            believed = {name for (where, name), there in world.told.items() if where == backend and there}
            unknown = {name for where, name in self.known_bad if where == number}
            assert believed - unknown == set(world.files[number]) - unknown
        numbers = [n for n in range(12) if not world.here(n)]
        for number, backend in enumerate(BACKENDS):
            world.tier.remove(
                RemoveFiles(
                    number, backend, (BlockRun(SPACE.digest, 1, PAYLOAD, b"".join(file(n)[0][16:] for n in numbers)),)
                )
            )
        world.work()
        assert sorted(done.id for done in world.tier.take_removed()) == [0, 1]
        assert len(world.tier.reads) == 0
        assert world.segment.pinned == world.segment.reserved == 0
        assert all(backend.readable for backend in world.tier.backends)


TierDays.TestCase.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
TestTierDays = TierDays.TestCase
