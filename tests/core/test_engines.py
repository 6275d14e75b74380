"""Engines that announce themselves, beside a plain dict."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.core import engines as engines_module
from kvpool.core.engines import Announcement, Engines
from kvpool.errors import InvalidArgumentError, OverloadedError
from kvpool.model import DIGEST_BYTES

TTL_S = 10


def said(owner=1, **more):
    return Announcement(**({"owner": owner, "engine": "e", "role": "kv_both"} | more))


steps = st.tuples(st.integers(0, 7), st.sampled_from(["says", "ends", "passes"]), st.integers(1, 4))


@given(st.lists(steps, max_size=40))
def test_an_engine_is_known_from_its_first_word_to_its_last_or_its_silence(story):
    """Whatever others do meanwhile; a later word replaces an earlier one."""
    engines, heard, now = Engines(TTL_S), {}, 0
    for passed, what, owner in story:
        now += passed
        engines.expire(now)
        heard = {who: (when, word) for who, (when, word) in heard.items() if now - when <= TTL_S}
        if what == "says":
            word = said(owner, tensor_parallel=passed + 1)
            engines.announce(word, now)
            heard[owner] = (now, word)
        elif what == "ends":
            engines.leave(owner)
            heard.pop(owner, None)
        assert {who: engine.said for who, engine in engines.engines.items()} == {
            who: word for who, (_, word) in heard.items()
        }
        assert len(engines) == len(heard)


def test_so_many_engines_and_no_more(monkeypatch):
    """One that is known already may go on."""
    monkeypatch.setattr(engines_module, "ENGINES_MAX", 2)
    engines = Engines(TTL_S)
    engines.announce(said(1), 0)
    engines.announce(said(2), 0)
    with pytest.raises(OverloadedError):
        engines.announce(said(3), 0)
    engines.announce(said(2, model="m"), 1)
    engines.leave(1)
    engines.announce(said(3), 2)
    assert set(engines.engines) == {2, 3}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("owner", 0),
        ("engine", ""),
        ("engine", "e" * 257),
        ("engine", "a\nb"),
        ("role", "kv_other"),
        ("role", ""),
        ("address", "h" * 257),
        ("address", "host"),
        ("address", "host:"),
        ("address", "host:0"),
        ("address", "host:65536"),
        ("address", "host:٣"),
        ("address", ":80"),
        ("address", "http://host:80"),
        ("address", "user@host:80"),
        ("address", "::1:80"),
        ("model", "m" * 257),
        ("namespaces", (b"short",)),
        ("namespaces", (bytes(DIGEST_BYTES),) * 17),
        ("tensor_parallel", 0),
        ("tensor_parallel", 1 << 17),
        ("pipeline_parallel", 0),
        ("data_parallel_rank", 1 << 17),
        ("host", "h" * 257),
        ("boot_id", "b" * 65),
        ("devices", ("0",) * 4097),
        ("devices", ("",)),
        ("devices", ("d" * 129,)),
    ],
)
def test_what_no_engine_would_say_is_refused_and_named(field, value):
    """And changes nothing."""
    engines = Engines(TTL_S)
    engines.announce(said(), 0)
    with pytest.raises(InvalidArgumentError) as caught:
        engines.announce(dataclasses.replace(said(), **{field: value}), 1)
    assert caught.value.field == field
    assert [engine.last_seen for engine in engines.engines.values()] == [0]


@pytest.mark.parametrize("address", ["", "10.0.0.1:8100", "engine-0.engines.svc:8000", "[fe80::1]:8000"])
def test_addresses(address):
    """Of either kind, by name, or none."""
    engines = Engines(TTL_S)
    engines.announce(said(address=address, namespaces=(bytes(DIGEST_BYTES),) * 16, devices=("0,10.0.0.1",)), 0)
    assert engines.engines[1].said.address == address


def test_nobody_ends_without_a_name():
    """Owner 0 is nobody."""
    with pytest.raises(InvalidArgumentError, match="owner"):
        Engines(TTL_S).leave(0)
