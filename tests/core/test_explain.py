"""Explanations of a master that is driven by its messages, and of engines that hash differently."""

from __future__ import annotations

import pytest

from kvpool.core import explain as explain_module
from kvpool.core.agreement import IN_USE_S, warnings
from kvpool.core.explain import Difference, Explained, Holder, Verdict, explain, take_probe, to_probe
from kvpool.core.master import MasterLimits
from kvpool.core.messages import BEING_WRITTEN, COMMITTED, BlockRun, Delta
from kvpool.core.removals import Why
from kvpool.core.residency import Report
from kvpool.errors import InvalidArgumentError
from kvpool.model import Namespace
from tests.core.master_pool import ONE, TWO, Pool, key, keys, run


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """One key at a time."""
    monkeypatch.setattr(explain_module, "KEYS_SLICE", 1)


def ask(pool: Pool, *numbers: int, namespace: bytes = ONE.digest, between=lambda: None) -> list[Explained]:
    """Explain some keys; ``between`` is called between two slices."""
    steps = explain(pool.master, namespace, keys(*numbers), pool.clock())
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
        between()


def verdicts(pool: Pool, *numbers: int, namespace: bytes = ONE.digest) -> list[Verdict]:
    return [block.verdict for block in ask(pool, *numbers, namespace=namespace)]


def gone(*numbers: int) -> BlockRun:
    return BlockRun(ONE.digest, 1, 100, keys(*numbers), commanded=True)


def test_what_is_there_and_in_which_way():
    """Whole at live nodes; at a node that is silent; with shards that are nowhere; at a node still reporting."""
    pool = Pool()
    pool.join(1, "a", run(1, 2))
    pool.join(2, "b", run(5, namespace=TWO, shards=1))
    present, never = ask(pool, 1, 9)
    assert present.verdict is Verdict.PRESENT and present.holders == [Holder("a", "dram", "live", (0,))]
    assert never == Explained(key(9), Verdict.NEVER_STORED, ONE.digest)
    (part,) = ask(pool, 5, namespace=TWO.digest)
    assert (part.verdict, part.missing, part.holders) == (Verdict.NOT_WHOLE, (1,), [Holder("b", "dram", "live", (0,))])
    pool.lookup(1, lease=True)
    pool.pass_time(1.0, 2)
    (silent,) = ask(pool, 1)
    assert (silent.verdict, silent.leases, silent.holders[0].state) == (Verdict.OWNER_SUSPECT, 1, "suspect")
    pool.hello(3, "c")
    assert verdicts(pool, 9) == [Verdict.WARMING]


def test_the_last_use_is_told_to_the_second():
    """A lookup is a use; a time before it is never told, one long after it neither."""
    pool = Pool()
    pool.join(1, "a", run(1, 2))
    pool.pass_time(5.0, 1)
    pool.lookup(2)
    pool.pass_time(5.0, 1)
    first, second = ask(pool, 1, 2)
    assert 9.0 <= pool.clock() - first.last_use <= 10.0
    assert 4.0 <= pool.clock() - second.last_use <= 5.0


def test_who_evicted_it_and_when():
    """Commanded removals carry the master's reason, others were the node's own; the newest comes first."""
    pool = Pool()
    pool.join(1, "a", run(1, 2, 3))
    pool.perform(pool.master.evictions.keys(ONE.digest, keys(1))[2])
    pool.pass_time(2.0, 1)
    pool.say(1, Delta(1, (), (gone(1), run(2)), 100))
    (first,), (second,) = ask(pool, 1), ask(pool, 2)
    assert [removal.why for removal in first.removals] == [Why.OPERATOR]
    assert [removal.why for removal in second.removals] == [Why.ROOM]
    assert pool.clock() - first.removals[0].at == pytest.approx(0.0, abs=0.11)
    pool.say(1, Delta(2, (run(2),), (), 200))
    assert verdicts(pool, 2) == [Verdict.PRESENT]
    pool.say(1, Delta(3, (), (gone(2),), 100))  # commanded by a master before this one
    (again,) = ask(pool, 2)
    assert [removal.why for removal in again.removals] == [Why.MASTER, Why.ROOM]
    assert again.verdict is Verdict.EVICTED


def test_a_word_of_the_master_counts_for_one_life_of_a_block():
    """A row that is given to another block does not hand on why its last one had to go."""
    pool = Pool(MasterLimits(blocks_max=1))
    pool.join(1, "a", run(1))
    pool.perform(pool.master.evictions.keys(ONE.digest, keys(1))[2])
    pool.say(1, Delta(1, (), (gone(1),), 0), Delta(2, (run(2),), (), 100), Delta(3, (), (gone(2),), 0))
    assert [removal.why for removal in ask(pool, 2)[0].removals] == [Why.MASTER]


def test_a_node_that_reports_anew_explains_only_what_it_lost():
    """What the new inventory has was never away."""
    pool = Pool()
    pool.join(1, "a", run(1, 2))
    pool.close(1)
    pool.join(2, "a", run(2), sequence=7)
    pool.work()
    lost, kept = ask(pool, 1, 2)
    assert (lost.verdict, lost.removals[0].why, kept.verdict) == (Verdict.OWNER_LOST, Why.NOT_REPORTED, Verdict.PRESENT)
    assert kept.removals == []


def test_a_dead_and_a_restarted_node_are_told_apart():
    """One was silent for too long, the other says itself that it is a new process."""
    pool = Pool()
    pool.join(1, "a", run(1))
    pool.join(2, "b", run(2))
    pool.hello(3, "b", epoch=2)
    pool.pass_time(11.0, 3)
    dead, restarted = ask(pool, 1, 2)
    assert [block.removals[0].why for block in (dead, restarted)] == [Why.NODE_LOST, Why.NODE_RESTARTED]


def test_the_most_similar_namespace_is_named():
    """With the values of the fields that differ, whatever else has the key."""
    pool = Pool()
    near, far = Namespace(model="one", dtype="float16"), Namespace(model="other", dtype="int8", layers=3)
    pool.join(1, "a", run(1, namespace=far), run(1, 2, namespace=near), namespaces=(ONE, near, far))
    first, second, third = ask(pool, 1, 2, 3)
    assert (first.verdict, first.other) == (Verdict.NAMESPACE_DIFFERS, near.digest)
    assert first.differences == second.differences == [Difference("dtype", "bfloat16", "float16")]
    assert third.verdict is Verdict.NEVER_STORED
    assert {block.namespace for block in ask(pool, 1, namespace=b"")} <= {near.digest, far.digest}


def test_when_the_ring_has_overflowed_nothing_is_claimed():
    """Then a block may have been there; a block whose removal is kept is still explained."""
    pool = Pool(MasterLimits(removals_max=2))
    pool.join(1, "a", run(1, 2, 3))
    pool.say(1, Delta(1, (), (run(1, 2, 3),), 0))
    assert verdicts(pool, 1, 3, 9) == [Verdict.UNKNOWN, Verdict.EVICTED, Verdict.UNKNOWN]


def test_the_index_may_change_between_two_slices():
    """Each block is explained as it is when its turn comes."""
    pool, sequence = Pool(), iter(range(1, 100))
    pool.join(1, "a", run(*range(20)))

    def churn() -> None:
        number = next(sequence)
        pool.say(1, Delta(number, (run(number + 50),), (run(number % 20),), 0))

    for block in ask(pool, *range(30), between=churn):
        assert block.verdict in {Verdict.PRESENT, Verdict.EVICTED, Verdict.NEVER_STORED}


def test_nodes_are_asked_about_what_the_index_does_not_have():
    """Being written comes before everything that the index could say; committed and unknown is called so."""
    pool = Pool()
    pool.join(1, "a", run(1))
    blocks = ask(pool, 1, 2, 3, 4)
    asked = to_probe(blocks)
    assert [block.key for block in asked] == [key(2), key(3), key(4)]
    take_probe(asked, "a", bytes([BEING_WRITTEN, COMMITTED, 0]))
    assert [b.verdict for b in asked] == [Verdict.BEING_WRITTEN, Verdict.UNREPORTED, Verdict.NEVER_STORED]
    assert asked[0].holders == [Holder("a", "writing", "live")]


def test_engines_that_hold_a_block_themselves_are_named():
    """Also where the pool knows no namespace of the key."""
    pool = Pool()
    report = Report(1, "engine", 1, True, ONE.digest, False, 0, False, keys(1))
    pool.master.residency.report(report, pool.clock())
    for namespace in (ONE.digest, b""):
        (block,) = ask(pool, 1, namespace=namespace)
        assert block.holders == [Holder("engine", "hbm")] and block.verdict is Verdict.NEVER_STORED
        assert block.namespace == ONE.digest
    pool.pass_time(12.0)
    assert ask(pool, 1)[0].holders == []


@pytest.mark.parametrize(
    ("field", "namespace", "packed"),
    [("namespace", b"short", keys(1)), ("keys", b"", b""), ("keys", b"", b"odd"), ("keys", b"", bytes(16 * 1025))],
)
def test_bad_questions_are_refused(field, namespace, packed):
    """By the field's name."""
    with pytest.raises(InvalidArgumentError) as caught:
        next(explain(Pool().master, namespace, packed, 0.0))
    assert caught.value.field == field


# ---- engines that hash differently -----------------------------------------------------------------------


def test_only_hashing_counts_as_a_disagreement():
    """Another weight digest is another model; another seed is a mistake. Nobody is warned of what is long over."""
    pool = Pool()
    seeds = [Namespace(model="m", hash_fingerprint=seed) for seed in "ab"]
    other = Namespace(model="m", revision="2", hash_fingerprint="c")
    assert [pool.master.announce(space, pool.clock())[0] for space in (seeds[0], other, seeds[0])] == [""] * 3
    warning, _ = pool.master.announce(seeds[1], pool.clock())
    assert "hash_fingerprint 'b' and 'a'" in warning and "PYTHONHASHSEED" in warning
    spaces = pool.master.index.spaces
    assert len(warnings(spaces.values(), pool.clock())) == 1
    assert warnings(spaces.values(), pool.clock() + IN_USE_S) == []
    pool.join(1, "a", run(1, namespace=seeds[0]), run(2, namespace=seeds[1]), namespaces=tuple(seeds))
    assert len(warnings(spaces.values(), pool.clock() + IN_USE_S)) == 1
