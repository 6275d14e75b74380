"""What engines hold themselves, beside plain sets."""

from __future__ import annotations

from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.core import residency as residency_module
from kvpool.core.keytable import as_words
from kvpool.core.residency import Report, Residency
from kvpool.errors import InvalidArgumentError, OverloadedError
from kvpool.model import Namespace

ONE, TWO = Namespace(model="one").digest, Namespace(model="two").digest
KEYS = [blake2b(bytes([i]), digest_size=16).digest() for i in range(16)]


def report(owner=1, sequence=1, namespace=b"", added=(), removed=(), engine="engine", **about):
    about = {"first": False, "cleared": False, "bye": False, **about}
    keys = b"".join(KEYS[n] for n in (*removed, *added))
    return Report(owner, engine, sequence, namespace=namespace, removed=len(removed), keys=keys, **about)


def held(residency, namespace=ONE):
    found = residency.holders(as_words(b"".join(KEYS)), {namespace})
    return {name: set(at.tolist()) for _, name, _, at in found if len(at)}


def started(**about):
    residency = Residency(10.0)
    assert not residency.report(report(first=True, **about), 0.0)
    return residency


numbers = st.lists(st.integers(0, len(KEYS) - 1), max_size=8)
changes = st.tuples(st.sampled_from([ONE, TWO]), numbers, numbers, st.booleans())


@given(st.lists(changes, max_size=20))
@settings(max_examples=150, deadline=None)
def test_reports_add_up_to_what_the_engine_holds(steps):
    """Cleared, then removed, then added; the two namespaces have nothing to do with each other."""
    residency, sets = started(), {ONE: set(), TWO: set()}
    for sequence, (namespace, added, removed, cleared) in enumerate(steps, 2):
        if cleared:
            sets[namespace] = set()
        sets[namespace] = sets[namespace] - set(removed) | set(added)
        assert not residency.report(
            report(1, sequence, namespace, added, removed, cleared=cleared), 0.0
        )
        for digest, expected in sets.items():
            assert held(residency, digest) == ({"engine": expected} if expected else {})
        assert len(residency) == sum(map(len, sets.values()))


def test_a_gap_or_an_unknown_owner_asks_for_everything():
    """Nothing is believed until the inventory has begun; a report that comes twice is applied once."""
    residency = Residency(10.0)
    assert residency.report(report(sequence=5, namespace=ONE, added=[1]), 0.0)
    assert not residency.report(report(sequence=6, first=True), 0.0)
    assert not residency.report(report(sequence=7, namespace=ONE, added=[1]), 0.0)
    assert not residency.report(report(sequence=7, namespace=ONE, removed=[1]), 0.0)
    assert held(residency) == {"engine": {1}}
    assert residency.report(report(sequence=9, namespace=ONE, added=[2]), 0.0)
    assert held(residency) == {}
    assert residency.report(report(sequence=10, namespace=ONE, added=[2]), 0.0)
    assert not residency.report(report(sequence=11, first=True, namespace=ONE, added=[3]), 0.0)
    assert held(residency) == {"engine": {3}}


def test_an_engine_ends_by_its_word_or_by_its_silence():
    """An empty report is a sign of life."""
    residency = started(namespace=ONE, added=[1])
    residency.report(report(owner=2, first=True, engine="other", namespace=ONE, added=[2]), 0.0)
    residency.report(report(sequence=2), 8.0)
    residency.expire(12.0)
    assert held(residency) == {"engine": {1}}
    residency.report(report(sequence=3, bye=True), 12.0)
    assert not residency.engines


def test_bounds_are_refused_and_named(monkeypatch):
    """Engines, namespaces, keys: each has a limit, and a report over it changes nothing."""
    monkeypatch.setattr(residency_module, "ENGINES_MAX", 1)
    monkeypatch.setattr(residency_module, "NAMESPACES_MAX", 1)
    residency = started(namespace=ONE, added=[1])
    with pytest.raises(OverloadedError):
        residency.report(report(owner=2, first=True), 0.0)
    with pytest.raises(OverloadedError):
        residency.report(report(sequence=2, namespace=TWO, added=[1]), 0.0)
    for field, bad in (
        ("owner", report(owner=0)),
        ("sequence", report(sequence=0)),
        ("engine", report(engine="")),
        ("namespace", report(namespace=b"short", added=[1])),
        ("namespace", report(cleared=True)),
        ("keys", Report(1, "e", 2, False, ONE, False, 0, False, b"odd")),
        ("keys", Report(1, "e", 2, False, ONE, False, 0, False, bytes(16 * (residency_module.KEYS_MAX + 1)))),
        ("removed", Report(1, "e", 2, False, ONE, False, 2, False, bytes(16))),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            residency.report(bad, 0.0)
        assert caught.value.field == field
    assert held(residency) == {"engine": {1}}


def test_a_full_engine_keeps_what_it_has(monkeypatch):
    """Blocks beyond the bound stay out; removed ones make room again."""
    monkeypatch.setattr(residency_module, "BLOCKS_MAX", 4)
    residency = started(namespace=ONE, added=range(8))
    assert held(residency) == {"engine": {0, 1, 2, 3}}
    residency.report(report(sequence=2, namespace=ONE, removed=[1, 2], added=[9, 10, 11]), 0.0)
    assert held(residency) == {"engine": {0, 3, 9, 10}}
