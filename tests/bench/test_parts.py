"""The parts of the benchmarks that decide what a figure means."""

from __future__ import annotations

import numpy as np
import pytest

from kvpool.bench.harness import BenchError, Helper, interleaved
from kvpool.bench.report import Figure
from kvpool.bench.store import Plan
from kvpool.bench.trace import Contents, Request, ideal_hit_rate


def requests(*prompts):
    return [Request(0.0, tuple(prompt)) for prompt in prompts]


def test_an_ideal_lru_counts_prefixes_only():
    """A block behind a gap is no hit; what was evicted has to be stored again."""
    assert ideal_hit_rate(requests([1, 2, 3], [1, 2, 3]), 3) == 0.5
    assert ideal_hit_rate(requests([1, 2, 3], [9, 2, 3]), 9) == 0.0
    assert ideal_hit_rate(requests([1, 2], [3, 4], [1, 2]), 2) == 0.0


def test_an_ideal_lru_loses_the_tail_of_a_chain_before_its_head():
    """Half of a chain that no longer fits is still of use."""
    assert ideal_hit_rate(requests([1, 2, 3, 4], [5, 6], [1, 2, 3, 4]), 4) == 0.2


def test_rounds_alternate_and_the_median_counts():
    """A slow round of one part is no reason to call it slow."""
    order = []
    values = {"a": iter([1.0, 9.0, 2.0]), "b": iter([5.0, 5.0, 6.0])}

    def part(name):
        def run():
            order.append(name)
            return next(values[name])

        return run

    assert interleaved([part("a"), part("b")], 3, 60.0) == [2.0, 5.0]
    assert order == ["a", "b"] * 3


def test_rounds_end_when_their_time_is_over_but_some_are_made():
    """Slow is no reason to hang."""
    seen = []
    assert interleaved([lambda: float(len(seen.append(0) or seen))], 1000, 0.0) == [2.0]
    assert len(seen) == 3


def test_every_key_has_bytes_of_its_own():
    """A block under a wrong key, or shifted within itself, is noticed."""
    contents = Contents(64, 2)
    first, second = contents.of(bytes(range(16)) + bytes(range(1, 17))).copy()
    assert not np.array_equal(first, second)
    assert len(np.unique(first.view(np.uint64))) == 8
    assert np.array_equal(contents.of(bytes(range(16)))[0], first)


@pytest.mark.parametrize(("block_bytes", "layers"), [(2 << 20, 8), (64 << 10, 1), (300_000, 2), (1, 1)])
def test_a_layer_of_the_measured_blocks_is_at_most_a_quarter_of_a_megabyte(block_bytes, layers):
    """As engines have it: checksums are by layer."""
    assert Plan(block_bytes, 1, 1, 1 << 30, ("always",), 1).namespace.layers == layers


def test_a_figure_is_one_flat_object_for_scripts():
    """What it is of stands beside its value."""
    figure = Figure("local_get", 5.12345, "GB/s", "memory_copy", 0.951, {"block_bytes": 2097152}, 5.4)
    assert figure.as_json() == {
        "name": "local_get",
        "block_bytes": 2097152,
        "value": 5.123,
        "unit": "GB/s",
        "limit": "memory_copy",
        "ratio": 0.951,
        "limit_value": 5.4,
    }


def failing(conn):
    conn.send(None)
    raise ValueError(conn.recv())


def test_a_helper_that_fails_says_why():
    """Its traceback comes to the one who asked."""
    with Helper(failing) as helper, pytest.raises(BenchError, match="ValueError: broken on purpose"):
        helper.ask("broken on purpose", 20.0)
