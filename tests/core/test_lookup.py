"""Lookups beside brute force: the longest prefix that is really there, and the reason why it ends."""

from __future__ import annotations

from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.core import lookup as lookup_module
from kvpool.core.index import Index
from kvpool.core.lookup import Group, Query, Rule, check, longest_prefix
from kvpool.core.messages import BlockRun
from kvpool.errors import InvalidArgumentError
from kvpool.model import Namespace, Reason

FULL = Namespace(model="m", layers=2, layer_groups=2)
WINDOW = Namespace(model="m", kv_group="window")
STATE = Namespace(model="m", kv_group="state")
OTHER = Namespace(model="m", layers=2, layer_groups=2, dtype="float16")
LENGTH = 10
KEYS = [blake2b(bytes([i]), digest_size=16).digest() for i in range(LENGTH)]
CHAIN = b"".join(KEYS)

LIVE, SUSPECT = 1, 2


@pytest.fixture(autouse=True, scope="module")
def small_head():
    """A prompt has several parts that are looked at one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookup_module, "HEAD_BLOCKS", 2)
        yield


def an_index(*, without: tuple[Namespace, ...] = ()) -> Index:
    index = Index(256)
    for namespace in (FULL, WINDOW, STATE, OTHER):
        if namespace not in without:
            index.describe(namespace)
    index.placements.set_live(LIVE, live=True)
    index.placements.set_live(SUSPECT, live=False)
    return index


def put(index: Index, namespace: Namespace, block: int, incarnation: int, shards: int) -> None:
    if shards:
        index.add(BlockRun(namespace.digest, shards, 10, KEYS[block]), incarnation, "dram")


def covered(index: Index, answer) -> list[int]:
    """For each block of the answer's runs, the shards that lie at live owners."""
    masks = []
    for blocks, placement in answer.runs:
        live = 0
        for owner in placement.owners:
            live |= owner.shards if index.placements.is_live(owner.incarnation) else 0
        masks += [live] * blocks
    return masks


held_shards = st.lists(st.tuples(st.sampled_from([0, 3, 3, 3, 1, 2]), st.sampled_from([0, 0, 3, 2])), max_size=LENGTH)


@settings(max_examples=300)
@given(held_shards, st.integers(0, LENGTH), st.booleans())
def test_a_hit_is_a_prefix_with_all_shards_at_live_nodes(held, known, warming):
    """The answer is the longest one, its runs cover exactly it, and the reason fits the block it stops at."""
    index = an_index()
    for block, (live, suspect) in enumerate(held):
        put(index, FULL, block, LIVE, live)
        put(index, FULL, block, SUSPECT, suspect)
    state = [*held, *[(0, 0)] * (LENGTH - len(held))]
    expected = known
    while expected < LENGTH and state[expected][0] == 3:
        expected += 1
    answer = longest_prefix(index, Query((Group(FULL.digest),), CHAIN, known), warming=warming)
    assert answer.prefix == expected
    assert covered(index, answer) == [3] * (expected - known)
    assert [index.keys[row].tobytes() for row in answer.hit_rows] == KEYS[known:expected]
    there = [KEYS[i] for i in range(known) if any(state[i])]
    assert [index.keys[row].tobytes() for row in answer.known_rows] == there
    if expected == LENGTH:
        assert answer.reason is Reason.COMPLETE
    elif warming:
        assert answer.reason is Reason.WARMING
    elif state[expected] == (0, 0):
        assert answer.reason is Reason.NOT_STORED
    else:
        whole = state[expected][0] | state[expected][1] == 3
        assert answer.reason is (Reason.OWNER_SUSPECT if whole else Reason.NOT_WHOLE)


rules = st.one_of(
    st.just(Group(WINDOW.digest, Rule.FULL)),
    st.integers(1, 4).map(lambda n: Group(WINDOW.digest, Rule.LAST_N, n)),
    st.just(Group(WINDOW.digest, Rule.LAST)),
)
some_blocks = st.frozensets(st.integers(0, LENGTH - 1)).map(lambda gone: frozenset(range(LENGTH)) - gone)


def needed(group: Group, prefix: int, known: int) -> set[int]:
    """The blocks of a group that a prefix needs from the pool."""
    window = {Rule.FULL: prefix, Rule.LAST_N: group.last_n, Rule.LAST: 1}[group.rule]
    return set(range(max(known, prefix - window), prefix))


@settings(max_examples=300)
@given(some_blocks, some_blocks, some_blocks, rules, st.integers(0, LENGTH), st.booleans())
def test_hybrid_rules_are_those_of_brute_force(full, window, state, rule, known, two):
    """The longest prefix for which every group has the blocks that its rule asks for behind the known ones."""
    index = an_index()
    groups = [Group(FULL.digest), rule, *([Group(STATE.digest, Rule.LAST)] if two else [])]
    stored = {FULL.digest: full, WINDOW.digest: window, STATE.digest: state}
    for block in range(LENGTH):
        for namespace, shards in ((FULL, 3), (WINDOW, 1), (STATE, 1)):
            put(index, namespace, block, LIVE, shards if block in stored[namespace.digest] else 0)
    usable = [
        n
        for n in range(known, LENGTH + 1)
        if n == known or all(needed(group, n, known) <= stored[group.namespace] for group in groups)
    ]
    answer = longest_prefix(index, Query(tuple(groups), CHAIN, known), warming=False)
    assert answer.prefix == max(usable)
    assert covered(index, answer) == [3] * (answer.prefix - known)
    leased = {(int(index.space_of[row]), index.keys[row].tobytes()) for row in answer.hit_rows.tolist()}
    assert leased == {
        (index.spaces[group.namespace].number, KEYS[block])
        for group in groups
        for block in needed(group, answer.prefix, known)
    }
    assert (answer.reason is Reason.COMPLETE) == (answer.prefix == LENGTH)


def test_a_group_nobody_knows_ends_the_prefix():
    """A hybrid prompt whose second group was never registered has no hit behind the known part."""
    index = an_index(without=(STATE,))
    for block in range(LENGTH):
        put(index, FULL, block, LIVE, 3)
    query = Query((Group(FULL.digest), Group(STATE.digest, Rule.LAST)), CHAIN, 2)
    answer = longest_prefix(index, query, warming=False)
    assert (answer.prefix, answer.runs, len(answer.hit_rows)) == (2, [], 0)


def test_the_same_hash_under_another_descriptor_is_named():
    """A block that exists for a sibling namespace only says in which fields the two differ."""
    index = an_index()
    put(index, OTHER, 0, LIVE, 3)
    answer = longest_prefix(index, Query((Group(FULL.digest),), CHAIN), warming=False)
    assert (answer.prefix, answer.reason, answer.detail) == (0, Reason.NAMESPACE_MISMATCH, "dtype")
    put(index, FULL, 0, LIVE, 3)
    answer = longest_prefix(index, Query((Group(FULL.digest),), CHAIN), warming=False)
    assert (answer.prefix, answer.reason) == (1, Reason.NOT_STORED)


@pytest.mark.parametrize(("warming", "reason"), [(True, Reason.WARMING), (False, Reason.NAMESPACE_UNKNOWN)])
def test_an_unknown_namespace_is_a_miss_with_a_reason(warming, reason):
    """While nodes still report, it may only be not known yet."""
    index = an_index(without=(FULL,))
    answer = longest_prefix(index, Query((Group(FULL.digest),), CHAIN, 3), warming=warming)
    assert (answer.prefix, answer.reason) == (3, reason)


def test_an_empty_prompt_is_complete():
    """No blocks asked for, none missing."""
    answer = longest_prefix(an_index(), Query((Group(FULL.digest),), b""), warming=False)
    assert (answer.prefix, answer.reason, answer.runs) == (0, Reason.COMPLETE, [])


@pytest.mark.parametrize(
    ("query", "field"),
    [
        (Query((Group(FULL.digest),), b"x" * 17), "hashes"),
        (Query((Group(FULL.digest),), CHAIN, LENGTH + 1), "known_prefix"),
        (Query((Group(FULL.digest),), CHAIN, -1), "known_prefix"),
        (Query((), CHAIN), "namespace"),
        (Query((Group(b"short"),), CHAIN), "namespace"),
        (Query((Group(FULL.digest), Group(WINDOW.digest, Rule.LAST_N, 0)), CHAIN), "groups.last_n"),
        (Query((Group(FULL.digest, Rule.LAST),), CHAIN), "groups"),
        (Query((Group(FULL.digest),), bytes(16 * ((1 << 20) + 1))), "hashes"),
        (Query((Group(FULL.digest),) * 65, CHAIN), "groups"),
        (Query((Group(FULL.digest),) * 2, bytes(16 * ((1 << 19) + 1))), "groups"),
    ],
)
def test_a_bad_query_names_the_field(query, field):
    """What is not well formed is refused before anything is looked at."""
    with pytest.raises(InvalidArgumentError) as caught:
        check(query)
    assert caught.value.field == field


@pytest.mark.parametrize("stored", [0, 1, 2, 3, 4, LENGTH])
def test_a_long_prompt_is_looked_at_as_far_as_it_is_there(stored, monkeypatch):
    """Its head, and then twice as much each time: nothing is searched for behind what ends the prefix."""
    index = an_index()
    for block in range(stored):
        put(index, FULL, block, LIVE, 3)
    looked: list[int] = []
    table = index.spaces[FULL.digest].table
    find = type(table).find

    def counted(one, keys):
        if one is table:
            looked.append(len(keys))
        return find(one, keys)

    monkeypatch.setattr(type(table), "find", counted)
    answer = longest_prefix(index, Query((Group(FULL.digest),), CHAIN), warming=False)
    assert answer.prefix == stored
    assert looked == {0: [2], 1: [2], 2: [2, 2], 3: [2, 2], 4: [2, 2, 4], LENGTH: [2, 2, 4, 2]}[stored]
