"""Transfers between engines: who wants one, what is held for it, what its end drops; and a dumb model of all that."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvpool.core import transfers as transfers_module
from kvpool.core.effects import CatalogFiles, FileChange, Tick, TransferExpired
from kvpool.core.explain import Verdict
from kvpool.core.keytable import as_words
from kvpool.core.messages import Delta, Evict, Heartbeat, Victims
from kvpool.core.removals import Why
from kvpool.core.transfers import BACK_S, DROP_AGAIN_S, OVER_S, SEAL_MS_MAX, Claimed, Part, State
from kvpool.errors import InvalidArgumentError, OverloadedError, UnknownNamespaceError
from kvpool.model import Backend, Namespace, split_keys
from kvpool.testing.checks import check_master
from kvpool.testing.slices import small_slices
from tests.core.master_pool import LIMITS, ONE, TWO, Pool, key, keys, run

TTL_S = LIMITS.lease_ttl_s
HERE = bytes(range(16))


class Moving(Pool):
    """A pool whose node "a" (session 1) does as it is told, and says so."""

    def __init__(self) -> None:
        super().__init__()
        self.said = 0
        self.obeyed = 0

    @property
    def transfers(self) -> transfers_module.Transfers:
        return self.master.transfers

    @property
    def up(self) -> float:
        return self.master.uptime(self.clock())

    def open(self, transfer: int, *numbers: int, drop: int = 0, nodes=("a",)) -> None:
        self.transfers.open(transfer, [Part(ONE.digest, keys(*numbers), drop)], nodes, "engine", self.up)
        self.work()

    def end(self, *transfers: int) -> list[int]:
        unknown = self.transfers.end(transfers, self.up)
        self.work()
        return unknown

    def put(self, *numbers: int) -> None:
        self.report(added=(run(*numbers),))

    def report(self, added=(), removed=()) -> None:
        self.said += 1
        self.say(1, Delta(self.said, added, removed, 0))

    def obey(self) -> set[bytes]:
        """Let the node drop what it was asked to since; returns the keys."""
        asked = [r for message in self.told(1, Evict)[self.obeyed :] for r in message.blocks]
        self.obeyed = len(self.told(1, Evict))
        if asked:
            self.report(removed=tuple(asked))
        return {k for r in asked for k in split_keys(r.keys)}

    def wait(self, seconds: float) -> None:
        self.pass_time(seconds, 1, sequence=self.said)

    def stored(self, *numbers: int) -> list[int]:
        return [n for n in numbers if self.prefix(n)]

    def held(self) -> set[bytes]:
        every = keys(*range(100))
        levels = self.master.index.holds.levels(ONE.digest, as_words(every))
        return {name for name, level in zip(split_keys(every), levels.tolist(), strict=True) if level}

    def state(self, transfer: int) -> State:
        return self.transfers.claim(transfer, "", self.up).state


@pytest.fixture
def pool():
    pool = Moving()
    pool.join(1, "a")
    yield pool
    pool.work()
    check_master(pool.master)


def counted(pool) -> dict[str, int]:
    return {name.removeprefix("transfers."): n for name, n in pool.master.counters.items() if "transfers." in name}


def test_what_a_transfer_needs_is_evicted_last(pool):
    """Blocks that are there and such that come later, until it ends: then the oldest goes first again."""
    pool.put(1, 2)
    pool.open(7, 1, 3)
    pool.put(3, 4)
    pool.master.limits = replace(LIMITS, eviction_ratio=1.0)

    def evict_all() -> list[bytes]:
        pool.wait(2.1)
        pool.sent.clear()
        pool.pass_time(0.1, 1, sequence=pool.said, used=2000)
        return pool.evicted(1)

    assert evict_all() == [key(2), key(4), key(1), key(3)]
    pool.end(7)
    assert evict_all() == [key(2), key(1), key(4), key(3)]


def test_what_is_on_a_victim_list_leaves_it(pool):
    """Nodes take from their lists without asking: they get new ones soon."""
    pool.put(*range(8))
    pool.pass_time(0.3, 1, sequence=pool.said, used=800)
    (listed,) = [split_keys(m.blocks[0].keys) for m in pool.told(1, Victims)]
    (number,) = [n for n in range(8) if key(n) == listed[0]]
    pool.sent.clear()
    pool.open(7, number)
    pool.pass_time(0.1, 1, sequence=pool.said, used=800)
    assert key(number) not in {k for m in pool.told(1, Victims)[-1:] for r in m.blocks for k in split_keys(r.keys)}
    assert pool.told(1, Victims)


def test_what_is_held_while_a_victim_list_is_made_is_not_on_it(monkeypatch):
    """The list is made in slices, and a transfer may be opened between two of them."""
    monkeypatch.setattr("kvpool.core.recency.SEGMENT", 2)
    pool = Moving()
    pool.join(1, "a", *[run(n) for n in range(8)], capacity_bytes=10_000)
    pool.say(1, Heartbeat(6_000, 0))
    pool.perform(pool.master.handle(Tick(), pool.clock()))
    pool.perform(pool.master.work())
    pool.open(7, 0, 2)
    (victims,) = pool.told(1, Victims)
    assert [k for r in victims.blocks for k in split_keys(r.keys)] == [key(1), key(3), key(4)]


def test_a_transfer_goes_its_way(pool):
    """Unknown, open, sealed, ended; each side hears what it has to know, and all is counted."""
    assert pool.state(7) is State.UNKNOWN
    pool.open(7, 1, 2, drop=1, nodes=("a", "nobody", ""))
    assert (len(pool.transfers.by_id), pool.transfers.blocks) == (1, 2)
    claimed = pool.transfers.claim(7, "decode", pool.up)
    assert claimed == Claimed(State.OPEN, (ONE.digest,), (pool.master.nodes["a"].address, None, None))
    assert pool.transfers.seal(7, 1000, pool.up)
    assert pool.transfers.seal(7, 1000, pool.up)
    assert pool.state(7) is State.SEALED
    assert pool.end(7, 8) == [8]
    assert pool.end(7) == [7]
    assert pool.state(7) is State.ENDED
    assert not pool.transfers.seal(7, 1000, pool.up)
    assert pool.transfers.renew([7], [7, 9], pool.up) == [7, 7, 9]
    assert (len(pool.transfers.by_id), pool.transfers.blocks, pool.held()) == (0, 0, set())
    assert counted(pool) == {"opened": 1, "sealed": 1, "claimed": 1, "ended": 1}


def test_a_node_that_is_gone_is_not_named(pool):
    """A consumer is sent only where somebody is."""
    pool.open(7, 1)
    pool.close(1)
    assert pool.transfers.claim(7, "", pool.up).nodes == (None,)


def test_a_producer_that_says_nothing_is_gone(pool):
    """While it is open its producer's word counts, not the consumer's: nobody must wait for what will not come."""
    pool.open(7, 1)
    for _ in range(3):
        pool.wait(TTL_S - 1)
        assert pool.transfers.renew([7], [], pool.up) == []
    for _ in range(2):
        assert pool.state(7) is State.OPEN
        pool.wait(TTL_S / 2 + 0.1)
        pool.transfers.renew([], [7], pool.up)
    assert pool.state(7) is State.ENDED
    assert [effect for effect in pool.kept if isinstance(effect, TransferExpired)] == [
        TransferExpired(7, "engine", sealed=False)
    ]
    assert counted(pool) == {"opened": 1, "claimed": 1, "expired": 1}


def test_what_is_sealed_waits_for_its_consumer_and_then_lives_by_it(pool):
    """For as long as the producer has said; the consumer's TTL is shorter."""
    for transfer in (7, 8):
        pool.open(transfer, 1)
        pool.transfers.seal(transfer, 60_000, pool.up)
    pool.transfers.renew([], [7], pool.up)  # by whom nobody knows: it takes nothing of its time
    pool.wait(3 * TTL_S)
    assert pool.state(7) is State.SEALED
    pool.wait(TTL_S - 1)
    assert pool.transfers.renew([], [7], pool.up) == []
    pool.wait(TTL_S - 1)
    assert pool.transfers.renew([8], [7], pool.up) == []
    pool.wait(4)
    assert pool.transfers.renew([], [7], pool.up) == []
    assert pool.state(8) is State.SEALED
    pool.wait(TTL_S + 0.1)
    assert set(pool.transfers.by_id) == set()
    pool.open(9, 1)
    pool.transfers.seal(9, 0, pool.up)
    pool.wait(TTL_S + 0.1)
    assert pool.state(9) is State.ENDED


def test_a_consumer_that_went_before_the_seal_may_be_replaced(pool):
    """What was claimed by somebody who is silent since waits for another one."""
    pool.open(7, 1)
    pool.transfers.claim(7, "", pool.up)
    pool.wait(TTL_S - 1)
    pool.transfers.renew([7], [], pool.up)
    pool.wait(2)
    pool.transfers.seal(7, 60_000, pool.up)
    pool.wait(TTL_S + 1)
    assert pool.state(7) is State.SEALED


def test_a_stall_of_the_master_costs_nobody_a_transfer(pool):
    """Time in which nobody could have been heard does not count."""
    pool.open(7, 1)
    pool.clock.advance(3 * TTL_S)
    pool.wait(0.1)
    assert pool.state(7) is State.OPEN


def test_a_transfer_can_be_opened_anew(pool):
    """By another producer, with other blocks, also when it is over; what both need is never let go of."""
    pool.put(1, 2, 3)
    pool.open(7, 1, 2, drop=1)
    pool.transfers.seal(7, 60_000, pool.up)
    pool.transfers.open(7, [Part(ONE.digest, keys(1, 3), 1)], ["a"], "other", pool.up)
    while pool.master.busy:
        assert key(1) in pool.held()
        pool.perform(pool.master.work())
    assert pool.obey() == {key(2)}
    assert pool.state(7) is State.OPEN
    assert (pool.held(), pool.transfers.blocks) == ({key(1), key(3)}, 2)
    pool.end(7)
    assert pool.obey() == {key(3)}
    pool.open(7, 2)
    assert pool.state(7) is State.OPEN
    assert (pool.held(), counted(pool)["opened"]) == ({key(2)}, 2)


def test_the_end_drops_what_nobody_else_can_use(pool):
    """From memory and from files; what another transfer, a pin or a lease names stays until that ends."""
    pool.say(1, Delta(1, (run(1, 2, 3, 4, 5),), (), 0))
    pool.said = 1
    pool.open(7, 1, 2, 3, 4, 5, drop=4)
    pool.open(8, 5, drop=1)
    pin, slices = pool.master.pins.begin(ONE.digest, key(4), 60, "", pool.clock())
    list(slices)
    lease = pool.lookup(3, lease=True).lease
    pool.end(7)
    assert pool.obey() == {key(2)}
    pool.master.release([lease])
    list(pool.master.pins.end(pin))
    pool.wait(DROP_AGAIN_S[0] + 0.2)
    assert pool.obey() == {key(3), key(4)}
    pool.end(8)
    assert pool.obey() == {key(5)}
    assert pool.stored(1, 2, 3, 4, 5) == [1]


def test_files_of_the_last_blocks_go_too(pool):
    """Whichever node has written them: the backend forgets them, and they are doomed."""
    pool.hello(2, "b", backends=(Backend(HERE, "dir", 1 << 30),))
    pool.put(1, 2)
    pool.open(7, 1, 2, drop=1)
    pool.report(added=(replace(run(1, 2), backend=HERE),))
    pool.end(7)
    (doomed,) = [e for e in pool.kept if isinstance(e, CatalogFiles) and e.change is FileChange.DOOMED]
    assert [r.keys for r in doomed.blocks] == [key(2)]
    assert pool.obey() == {key(2)}
    assert pool.stored(1, 2) == [1]


def test_what_comes_after_the_end_is_dropped_too(pool):
    """A consumer may be faster than the report of what it has loaded, and a reader may still pin a block."""
    pool.open(7, 1, 2, drop=1)
    pool.end(7)
    pool.put(1, 2)
    pool.wait(DROP_AGAIN_S[0] + 0.2)
    assert pool.obey() == {key(2)}
    pool.put(2)
    pool.wait(sum(DROP_AGAIN_S[:2]))
    assert pool.obey() == {key(2)}
    assert pool.stored(1, 2) == [1]


def test_why_a_block_was_dropped_can_be_explained(pool):
    """Its transfer has ended."""
    from tests.simulation.test_simulation import explained

    pool.put(1)
    pool.open(7, 1, drop=1)
    pool.end(7)
    (piece,) = [r for m in pool.told(1, Evict) for r in m.blocks]
    pool.report(removed=(replace(piece, commanded=True),))
    (block,) = explained(pool.master, ONE.digest, key(1), pool.clock())
    assert (block.verdict, [r.why for r in block.removals]) == (Verdict.EVICTED, [Why.TRANSFER])


def test_what_is_over_is_remembered_for_a_while(pool, monkeypatch):
    """So that a late consumer computes at once; and not so many that it would ever matter."""
    monkeypatch.setattr(transfers_module, "OVER_MAX", 2)
    for transfer in (1, 2, 3):
        pool.open(transfer, 1)
        pool.end(transfer)
    assert [pool.state(transfer) for transfer in (1, 2, 3)] == [State.UNKNOWN, State.ENDED, State.ENDED]
    pool.wait(OVER_S + 0.2)
    assert pool.state(3) is State.UNKNOWN


def test_long_prompts_are_taken_and_let_go_of_in_slices(pool, monkeypatch):
    """A transfer that ends in the middle lets go of what it had, and takes no more."""
    monkeypatch.setattr(transfers_module, "SLICE_BLOCKS", 10)
    pool.transfers.open(7, [Part(ONE.digest, keys(*range(95)), 15)], (), "", pool.up)
    assert pool.held() == set()
    for blocks in (10, 20, 30):
        pool.perform(pool.master.work())
        assert len(pool.held()) == blocks
    pool.transfers.end([7], pool.up)
    assert pool.transfers.blocks == 95
    for blocks in (30, 20, 10, 0):
        pool.perform(pool.master.work())
        assert len(pool.held()) == blocks
    pool.work()
    assert pool.transfers.blocks == 0


def test_transfers_are_bounded(pool, monkeypatch):
    """In number and in blocks, those counted that are still to be let go of; refusals are counted."""
    monkeypatch.setattr(transfers_module, "TRANSFERS_MAX", 2)
    monkeypatch.setattr(transfers_module, "KEYS_MAX", 4)
    pool.open(1, 1)
    pool.open(2, 1)
    with pytest.raises(OverloadedError):
        pool.open(3, 1)
    pool.open(2, 1, 2)
    with pytest.raises(OverloadedError):
        pool.open(2, 1, 2)
    pool.transfers.end([2], pool.up)
    with pytest.raises(OverloadedError):
        pool.open(3, 1, 2)
    pool.work()
    pool.open(3, 1, 2)
    assert counted(pool)["refused"] == 3


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"transfer": 0}, "transfer"),
        ({"transfer": 1 << 64}, "transfer"),
        ({"parts": []}, "parts"),
        ({"parts": [Part(ONE.digest, key(1))] * 65}, "parts"),
        ({"parts": [Part(ONE.digest, b"")]}, "parts.keys"),
        ({"parts": [Part(ONE.digest, b"odd")]}, "parts.keys"),
        ({"parts": [Part(ONE.digest, key(1), 2)]}, "parts.drop_last"),
        ({"nodes": ["a"] * 257}, "nodes"),
        ({"nodes": ["a" * 257]}, "nodes"),
        ({"producer": "a" * 257}, "producer"),
    ],
)
def test_what_cannot_be_opened_is_named(pool, change, field):
    """And nothing is left of it."""
    asked = {"transfer": 7, "parts": [Part(ONE.digest, key(1))], "nodes": ["a"], "producer": "", **change}
    with pytest.raises(InvalidArgumentError, match=f"^{field}:"):
        pool.transfers.open(**asked, up=pool.up)
    assert (len(pool.transfers.by_id), pool.transfers.blocks) == (0, 0)


def test_other_arguments_are_checked_too(pool):
    """Each refusal names what is wrong."""
    transfers = pool.transfers
    for namespace in (b"short", Namespace(model="never heard of").digest):
        with pytest.raises(UnknownNamespaceError):
            transfers.open(7, [Part(ONE.digest, key(1)), Part(namespace, key(1))], (), "", pool.up)
    for call, field in (
        (lambda: transfers.seal(0, 1, pool.up), "transfer"),
        (lambda: transfers.seal(7, SEAL_MS_MAX + 1, pool.up), "ttl_ms"),
        (lambda: transfers.claim(0, "", pool.up), "transfer"),
        (lambda: transfers.claim(7, "x" * 257, pool.up), "consumer"),
        (lambda: transfers.renew([0], [], pool.up), "transfers"),
        (lambda: transfers.renew([], [0], pool.up), "consumed"),
        (lambda: transfers.end([1] * 5000, pool.up), "transfers"),
        (lambda: transfers.end([1], pool.up, "x" * 257), "consumer"),
        (lambda: transfers.renew([], [1], pool.up, "x" * 257), "consumer"),
    ):
        with pytest.raises(InvalidArgumentError, match=f"^{field}:"):
            call()


# ---- another consumer ---------------------------------------------------------------------------------


def test_what_its_consumer_gives_back_is_there_for_another_one(pool):
    """For some seconds; if nobody comes, it ends, without having expired."""
    pool.put(1)
    pool.open(7, 1, drop=1)
    pool.transfers.seal(7, 60_000, pool.up)
    pool.transfers.claim(7, "x", pool.up)
    assert pool.transfers.end([7], pool.up, "x", back=True) == []
    pool.wait(BACK_S - 1)
    assert pool.transfers.claim(7, "y", pool.up).state is State.SEALED
    assert pool.transfers.end([7], pool.up, "x", back=True) == []  # which it has no more
    assert pool.transfers.end([7], pool.up, "x") == []
    pool.wait(TTL_S - 1)
    pool.transfers.renew([], [7], pool.up, "y")
    assert pool.transfers.end([7], pool.up, "y", back=True) == []
    pool.wait(BACK_S - 1)
    assert 7 in pool.transfers.by_id
    pool.wait(1.1)
    assert not pool.transfers.by_id
    assert counted(pool) == {"opened": 1, "sealed": 1, "claimed": 2, "ended": 1}


def test_a_consumer_that_is_at_work_keeps_what_another_one_gives_back(pool):
    """Both had claimed it, and the one that gives it back was the last."""
    pool.open(7, 1)
    pool.transfers.claim(7, "y", pool.up)
    pool.transfers.claim(7, "x", pool.up)
    pool.transfers.end([7], pool.up, "x", back=True)
    pool.transfers.renew([], [7], pool.up)  # which says nothing of whose
    assert pool.transfers.by_id[7].back_until is not None
    assert pool.transfers.renew([], [7], pool.up, "y") == []
    pool.transfers.seal(7, 60_000, pool.up)
    pool.wait(TTL_S - 1)
    assert pool.transfers.by_id[7].consumer == "y"


# ---- a dumb model ------------------------------------------------------------------------------------


@dataclass
class Known:
    """What the model keeps of a transfer."""

    keys: list[int]
    drop: list[int]
    sealed: bool
    until: float
    consumer_until: float | None = None
    consumer: str = ""
    back_until: float | None = None

    def deadline(self) -> float:
        if self.back_until is not None:
            return self.back_until
        return self.consumer_until if self.sealed and self.consumer_until is not None else self.until


ids = st.integers(1, 3)
numbers = st.lists(st.integers(0, 7), min_size=1, max_size=5)
consumers = st.sampled_from(["", "x", "y"])


class TransfersModel(RuleBasedStateMachine):
    """Some transfers of a few blocks, each as a record in a dict: which are under way, what is held, what goes."""

    @initialize()
    def begin(self) -> None:
        self.small = small_slices()
        self.small.__enter__()
        self.pool = Moving()
        self.pool.join(1, "a", namespaces=(ONE, TWO))
        self.known: dict[int, Known] = {}
        self.over: set[int] = set()
        self.stored: set[int] = set()
        self.doomed: set[int] = set()  # of use to a transfer that has ended
        self.leases: dict[int, list[int]] = {}
        self.pins: list[tuple[object, list[int]]] = []

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.finish()
            self.small.__exit__(None, None, None)

    def spared(self) -> set[int]:
        by_transfers = {n for known in self.known.values() for n in known.keys}
        by_others = {n for held in (*self.leases.values(), *(held for _, held in self.pins)) for n in held}
        return by_transfers | by_others

    def end_now(self, transfer: int) -> None:
        known = self.known.pop(transfer)
        self.over.add(transfer)
        self.doomed.update(known.drop)

    def settle(self, surely: set[int]) -> None:
        """Let the node obey: ``surely`` go, and nothing else does but what some end has dropped, unless spared."""
        self.pool.work()
        dropped = self.pool.obey()
        gone = {n for n in range(8) if key(n) in dropped}
        assert surely <= gone <= self.doomed - self.spared()
        self.stored -= gone

    @rule(transfer=ids, parts=numbers, drop=st.integers(0, 2))
    def open(self, transfer, parts, drop):
        drop = min(drop, len(parts))
        before = self.known.get(transfer)
        self.pool.transfers.open(transfer, [Part(ONE.digest, keys(*parts), drop)], ("a",), "", self.pool.up)
        self.known[transfer] = Known(parts, parts[len(parts) - drop :], False, self.pool.up + TTL_S)
        self.over.discard(transfer)
        surely: set[int] = set()
        if before is not None:
            now = self.known[transfer]
            now.consumer, now.consumer_until, now.back_until = before.consumer, before.consumer_until, before.back_until
            self.doomed.update(before.drop)
            surely = (set(before.drop) & self.stored) - self.spared()
        self.settle(surely)

    @rule(transfer=ids, ttl_s=st.sampled_from([0, 3, 25]))
    def seal(self, transfer, ttl_s):
        known = self.known.get(transfer)
        assert self.pool.transfers.seal(transfer, 1000 * ttl_s, self.pool.up) == (known is not None)
        if known is not None:
            known.sealed, known.until = True, self.pool.up + (ttl_s or TTL_S)
            if known.consumer_until is not None and known.consumer_until <= self.pool.up:
                known.consumer_until = None

    @rule(transfer=ids, consumer=consumers)
    def claim(self, transfer, consumer):
        known = self.known.get(transfer)
        wanted = State.ENDED if transfer in self.over else State.UNKNOWN
        if known is not None:
            wanted = State.SEALED if known.sealed else State.OPEN
            known.consumer, known.consumer_until, known.back_until = consumer, self.pool.up + TTL_S, None
        assert self.pool.transfers.claim(transfer, consumer, self.pool.up).state is wanted

    @rule(produced=st.lists(ids, max_size=2), consumed=st.lists(ids, max_size=2), consumer=consumers)
    def renew(self, produced, consumed, consumer):
        unknown = self.pool.transfers.renew(produced, consumed, self.pool.up, consumer)
        assert unknown == [t for t in (*produced, *consumed) if t not in self.known]
        for transfer in produced:
            if transfer in self.known and not self.known[transfer].sealed:
                self.known[transfer].until = self.pool.up + TTL_S
        for transfer in [t for t in consumed if t in self.known]:
            known = self.known[transfer]
            if known.back_until is not None and consumer:
                known.consumer, known.consumer_until, known.back_until = consumer, self.pool.up + TTL_S, None
            elif known.consumer_until is not None:
                known.consumer_until = self.pool.up + TTL_S

    @rule(transfers=st.lists(ids, min_size=1, max_size=2, unique=True), consumer=consumers, back=st.booleans())
    def end(self, transfers, consumer, back):
        unknown = [t for t in transfers if t not in self.known]
        theirs = [t for t in transfers if t in self.known and consumer in {"", self.known[t].consumer or consumer}]
        assert self.pool.transfers.end(transfers, self.pool.up, consumer, back=back) == unknown
        if back:
            for transfer in theirs:
                known = self.known[transfer]
                known.consumer, known.consumer_until, known.back_until = "", None, self.pool.up + BACK_S
            self.settle(set())
            return
        # What two of them name may be looked at for the one while the other still holds it: it goes a little later.
        named = Counter(n for t in theirs for n in set(self.known[t].keys))
        drop = {n for t in theirs for n in self.known[t].drop if named[n] == 1}
        for transfer in theirs:
            self.end_now(transfer)
        self.settle((drop & self.stored) - self.spared())

    @rule(parts=numbers)
    def put(self, parts):
        self.pool.put(*parts)
        self.stored |= set(parts)

    @rule(parts=numbers)
    def lease(self, parts):
        there = [n for n in dict.fromkeys(parts) if n in self.stored]
        answer = self.pool.lookup(*there, lease=True) if there else None
        if answer is not None and answer.lease:
            self.leases[answer.lease] = there

    @rule(hard=st.booleans(), parts=numbers)
    def pin(self, hard, parts):
        pin, slices = self.pool.master.pins.begin(ONE.digest, keys(*parts), 0 if hard else 3600, "", self.pool.clock())
        list(slices)
        self.pins.append((pin, parts))

    @rule()
    def release(self):
        self.pool.master.release(list(self.leases))
        self.leases.clear()
        while self.pins:
            list(self.pool.master.pins.end(self.pins.pop()[0]))

    @rule(ticks=st.sampled_from([1, 2, 6, 14]))
    def wait(self, ticks):
        for _ in range(ticks):
            self.tick()

    def tick(self) -> None:
        self.pool.clock.advance(0.9)
        self.pool.say_beats((1,), self.pool.said, 0)
        self.pool.perform(self.pool.master.handle(Tick(), self.pool.clock()))
        for transfer in [t for t, known in self.known.items() if known.deadline() <= self.pool.up]:
            self.end_now(transfer)
        for lease in self.pool.master.renew(list(self.leases), self.pool.clock()):
            del self.leases[lease]
        self.settle(set())

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "pool"):
            return
        pool = self.pool
        assert set(pool.transfers.by_id) == set(self.known)
        assert pool.transfers.blocks == sum(len(known.keys) for known in self.known.values())
        held = {n for known in self.known.values() for n in known.keys} | {n for _, held in self.pins for n in held}
        assert pool.held() == {key(n) for n in held}
        assert set(pool.stored(*range(8))) == self.stored
        index = pool.master.index
        free = [index.keys[row].tobytes() for rows in index.coldest(pool.master.nodes["a"].incarnation) for row in rows]
        assert set(free) == {key(n) for n in self.stored - self.spared()}
        check_master(pool.master)

    def finish(self) -> None:
        """Everybody goes, and in the end nothing is held."""
        self.release()
        for _ in range(30):
            self.tick()
        assert not self.known
        self.agrees()
        assert (len(self.pool.master.index.holds), self.pool.transfers.blocks) == (0, 0)


TransfersModel.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestTransfersModel = TransfersModel.TestCase
