"""Leases beside a dict of deadlines."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.core.index import Index
from kvpool.core.leases import Leases
from kvpool.core.messages import BlockRun
from kvpool.model import Namespace

TTL_S = 10.0
ROWS = 8
BLOCKS_MAX = 20

steps = st.lists(
    st.tuples(
        st.sampled_from(["take", "take", "renew", "release", "expire"]),
        st.integers(0, 6),
        st.sets(st.integers(0, ROWS - 1), min_size=1),
    ),
    max_size=40,
)


def stocked() -> Index:
    """An index whose first rows are in use."""
    index = Index(ROWS)
    namespace = Namespace(model="m")
    index.describe(namespace)
    index.add(BlockRun(namespace.digest, 1, 10, b"".join(bytes([i]) * 16 for i in range(ROWS))), 1, "dram")
    return index


@settings(max_examples=200)
@given(steps, st.integers(1, 4))
def test_leases_behave_as_a_dict_of_deadlines(script, at_most):
    """Counts by row, unknown tokens, expiry in order and the bound agree with the oracle."""
    index = stocked()
    leases = Leases(index, TTL_S, 100, BLOCKS_MAX)
    model: dict[int, tuple[float, set[int]]] = {}
    now, given_out = 0.0, set()
    for verb, number, rows in script:
        now += number
        token = 100 + number
        if verb == "take":
            token = leases.next_token(len(rows))
            room = sum(len(held) for _, held in model.values()) + len(rows) <= BLOCKS_MAX
            assert bool(token) == room
            if token:
                assert token not in given_out
                given_out.add(token)
                leases.take(token, np.array(sorted(rows)), now)
                model[token] = (now + TTL_S, rows)
        elif verb == "renew":
            assert leases.renew([token], now) == ([] if token in model else [token])
            if token in model:
                model[token] = (now + TTL_S, model[token][1])
        elif verb == "release":
            assert leases.release([token]) == ([] if token in model else [token])
            model.pop(token, None)
        else:
            over = [t for t in leases._leases if model[t][0] <= now]
            sizes = [len(model[t][1]) for t in over]
            ended = next((n for n in range(len(over)) if sum(sizes[:n]) >= at_most), len(over))
            before = leases.expired
            leases.expire(now, at_most)
            assert leases.expired - before == ended
            deadlines = sorted(deadline for deadline, _ in model.values())
            model = {t: model[t] for t in model if t in leases._leases}
            left = sorted(deadline for deadline, _ in model.values())
            assert left == deadlines[ended:], "the oldest go first"
        counts = [sum(row in held for _, held in model.values()) for row in range(ROWS)]
        assert index.leased.tolist() == counts
        assert leases.blocks == sum(counts)
        assert len(leases) == len(model)


def test_every_lookup_has_a_token_of_its_own():
    """Two lookups whose leases are taken later do not share a token."""
    leases = Leases(stocked(), TTL_S, 1, BLOCKS_MAX)
    assert leases.next_token(1) != leases.next_token(1)
