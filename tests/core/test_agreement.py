"""Engines that hash differently, however many: who is in which group, and that nobody compares all with all."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.core import agreement
from kvpool.core.agreement import IN_USE_S, NAMED_MAX, disagreeing, groups, in_use, warnings
from kvpool.core.index import Index
from kvpool.model import Namespace

NOW = 100.0

namespaces = st.builds(
    Namespace,
    model=st.sampled_from("mn"),
    revision=st.sampled_from(["", "2"]),
    hash_algorithm=st.sampled_from(["sha256", "xxhash"]),
    hash_fingerprint=st.sampled_from("abc"),
)


def index_of(*descriptors: Namespace, announced: float | None = NOW) -> Index:
    index = Index(16)
    for descriptor in descriptors:
        index.describe(descriptor).announced = announced
    return index


@given(st.lists(st.tuples(namespaces, st.sampled_from([None, NOW, NOW - IN_USE_S])), unique_by=lambda item: item[0]))
def test_groups_are_what_comparing_all_with_all_finds(items):
    """A namespace in use is in a group with exactly those it disagrees with."""
    index = Index(16)
    for descriptor, announced in items:
        index.describe(descriptor).announced = announced
    index.space(bytes(16))  # only its blocks have been seen
    spaces = index.spaces.values()
    found = groups(spaces, NOW)
    group_of = {space.number: {s.number for s in group} for group in found for space in group}
    for space in spaces:
        expected = {
            other.number
            for other in spaces
            if other is not space
            and other.descriptor is not None
            and space.descriptor is not None
            and set(space.descriptor.differences(other.descriptor)) <= {"hash_algorithm", "hash_fingerprint"}
            and in_use(other, NOW)
        }
        assert {other.number for other in disagreeing(space, NOW)} == expected
        together = expected | {space.number} if expected and in_use(space, NOW) else set()
        assert group_of.get(space.number, set()) == together
    assert len(warnings(spaces, NOW)) == len(found)


def test_many_namespaces_are_looked_at_once_each(monkeypatch):
    """What a master says of a thousand engines costs as many looks, whether or not they belong together."""
    looks = 0
    shared = agreement._SHARED

    def counted(descriptor):
        nonlocal looks
        looks += 1
        return shared(descriptor)

    monkeypatch.setattr(agreement, "_SHARED", counted)
    monkeypatch.setattr(Namespace, "differences", lambda *_: pytest.fail("all are compared with all"))
    alone = index_of(*(Namespace(model="m", revision=str(number)) for number in range(300)))
    assert warnings(alone.spaces.values(), NOW) == []
    one = index_of(*(Namespace(model="m", hash_fingerprint=str(number)) for number in range(300)))
    assert len(warnings(one.spaces.values(), NOW)) == 1
    assert looks == 600
    disagreeing(next(iter(one.spaces.values())), NOW)
    assert looks == 900


def test_a_warning_names_a_few_of_many():
    """It is read by people, and sent with every answer about the pool's state."""
    descriptors = [Namespace(model="m", hash_fingerprint=f"seed {number}") for number in range(NAMED_MAX + 3)]
    descriptors[1] = replace(descriptors[0], hash_algorithm="xxhash")
    (said,) = warnings(index_of(*descriptors).spaces.values(), NOW)
    assert f"{descriptors[1].digest.hex()} (hash_algorithm 'sha256' and 'xxhash')" in said
    assert f"{descriptors[2].digest.hex()} (hash_fingerprint 'seed 0' and 'seed 2')" in said
    assert descriptors[NAMED_MAX].digest.hex() in said
    assert descriptors[NAMED_MAX + 1].digest.hex() not in said
    assert "; 2 more. Give them" in said
