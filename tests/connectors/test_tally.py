"""What the connector counts, in the words of its metrics."""

from __future__ import annotations

from kvpool_vllm.tally import COUNTERS, GAUGES, Tally, combined, empty, merge, summary


def test_only_changes_are_told() -> None:
    """Counters run since the start; a step brings what was added since the last one."""
    tally = Tally("rank 0")
    assert tally.take({"get.local_bytes": 10}, {}) == {"counters": {"load_bytes.local": 10}, "gauges": {}}
    assert tally.take({"get.local_bytes": 10}, {}) is None
    assert tally.take({"get.local_bytes": 15}, {}) == {"counters": {"load_bytes.local": 5}, "gauges": {}}


def test_a_counter_never_falls() -> None:
    """Threads that count without a lock may undo what others have added: vLLM's counters refuse to go down."""
    tally = Tally("rank 0")
    assert tally.take({"get.local_bytes": 10}, {}) is not None
    assert tally.take({"get.local_bytes": 4, "put.bytes": 1}, {}) == {"counters": {"save_bytes": 1}, "gauges": {}}
    assert tally.take({"get.local_bytes": 9, "put.bytes": 1}, {}) is None
    assert tally.take({"get.local_bytes": 12}, {}) == {"counters": {"load_bytes.local": 2}, "gauges": {}}


def test_every_name_belongs_to_a_family() -> None:
    """Whatever the sides count ends in the table, with a label exactly where the family has one."""
    raw = {
        "get.local_bytes": 1, "get.remote_bytes": 1, "put.bytes": 1, "put.stored": 1, "put.existed": 1,
        "put.failed.no_room": 1, "put.failed.breaker_open": 1, "save.dropped_blocks": 1, "miss.not_stored": 1,
        "lookup.hits": 1, "lookup.errors": 1, "gate.skipped": 1, "gate.skipped_tokens": 1, "hit_tokens.local": 1,
        "breaker.open.a.b": 1, "breaker.opened.a.b": 1, "breaker.rejected.a.b": 1, "load.us": 5, "save.us": 5,
        "load.errors": 1, "save.errors": 1,
    }  # fmt: skip
    data = Tally("x").take(raw, {"queue_depth.load": 1, "tokens_per_second.prefill": 2.5})
    assert data is not None
    for name in data["counters"]:
        family, dot, _ = name.partition(".")
        assert bool(dot) == bool(COUNTERS[family].label), name
    for name in data["gauges"]["x"]:
        family, dot, _ = name.partition(".")
        assert bool(dot) == bool(GAUGES[family].label), name
    assert data["counters"]["save_blocks.breaker_open"] == 1
    assert data["counters"]["breaker_opened.a.b"] == 1
    assert data["gauges"]["x"]["breaker_open.a.b"] == 1
    assert data["counters"]["load_seconds"] == 5e-6


def test_counters_that_are_no_metric_are_left_out() -> None:
    """They do not even make a step worth telling of."""
    assert Tally("x").take({"put.calls": 3}, {}) is None


def test_gauges_are_told_when_they_change() -> None:
    """A breaker that closes is told as 0."""
    tally = Tally("x")
    assert tally.take({"breaker.open.b": 1}, {"queue_depth.load": 0}) is not None
    assert tally.take({"breaker.open.b": 1}, {"queue_depth.load": 0}) is None
    assert tally.take({"breaker.open.b": 0}, {"queue_depth.load": 2}) == {
        "counters": {},
        "gauges": {"x": {"breaker_open.b": 0, "queue_depth.load": 2}},
    }


def test_ranks_are_added_up() -> None:
    """Counters and queues are sums; a breaker that is open on one rank is open."""
    data = empty()
    for rank, is_open in (("rank 0", 1), ("rank 1", 0)):
        part = Tally(rank).take({"put.bytes": 4, "breaker.open.b": is_open}, {"queue_depth.save": 3})
        assert part is not None
        merge(data, part)
    assert data["counters"] == {"save_bytes": 8}
    assert combined(data["gauges"].values()) == {"breaker_open.b": 1, "queue_depth.save": 6}


def test_later_gauges_replace_earlier_ones_of_the_same_source() -> None:
    """An interval's log line shows how it ended."""
    data, tally = empty(), Tally("x")
    for depth in (5, 2):
        part = tally.take({}, {"queue_depth.load": depth})
        assert part is not None
        merge(data, part)
    assert summary(data) == {"queue_depth.load": 2}


def test_log_line_is_short() -> None:
    """Bytes in MB, seconds to the millisecond, no zeros."""
    data = {
        "counters": {"load_bytes.local": 2_345_678, "load_seconds": 0.12345, "gate.loaded": 2, "errors.load": 0},
        "gauges": {"x": {"breaker_open.b": 0, "tokens_per_second.prefill": 1234.5}},
    }
    assert summary(data) == {
        "gate.loaded": 2,
        "load_MB.local": 2.3,
        "load_seconds": 0.123,
        "tokens_per_second.prefill": 1234,
    }
