"""The parts of the benchmarks that decide what a figure means."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass

import click
import numpy as np
import pytest
from click.testing import CliRunner

from kvpool.bench import lookup, store, trace
from kvpool.bench.harness import BadUsage, BenchError, Helper, interleaved, layers_of, one_command
from kvpool.bench.pool import bench_children, slot_bytes
from kvpool.bench.report import Figure, Report
from kvpool.bench.store import Plan
from kvpool.bench.trace import Contents, Request, ideal_hit_rate, read_trace
from kvpool.errors import InvalidArgumentError
from kvpool.rpc.v1 import admin_pb2
from kvpool.server.launch import StartError


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


def test_a_block_that_has_no_such_layers_is_refused():
    """A large prime has as many as it has bytes, or one."""
    with pytest.raises(InvalidArgumentError, match=r"block_bytes: .*4194301"):
        layers_of(4194301)


def test_what_does_not_fit_is_refused():
    """With its headers: two batches that are read must stay while a third one is written."""
    batch = 4 * slot_bytes(65536)
    Plan(65536, 4, 1, 3 * batch, ("always",), 1).check()
    for field in ("segment_size", "block_bytes"):
        with pytest.raises(InvalidArgumentError, match=f"^{field}: 3 batches of 4 blocks of 65536 bytes must fit"):
            Plan(65536, 4, 1, 3 * batch - 1, ("always",), 1).check(field)


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


def test_children_see_none_of_the_settings_around(monkeypatch):
    """Those would change what is measured, or name directories that hold real data."""
    for name in ("KVPOOL_DATA_DIR", "KVPOOL_CONFIG", "MOONCAKE_CONFIG_PATH"):
        monkeypatch.setenv(name, "/real")
    monkeypatch.setenv("KVPOOL_BENCH_ON_PURPOSE", "1")
    children = bench_children()
    try:
        child = children.start("env", "kvpool.bench.ttft_exec", ["env"])
        child.process.wait(30)
        child.reader.join(30)
    finally:
        children.close()
    seen = [line for line in child.lines if line.startswith(("KVPOOL_", "MOONCAKE_"))]
    assert seen == ["KVPOOL_BENCH_ON_PURPOSE=1"]


@dataclass
class OfSize:
    """A pool of so many bytes."""

    capacity_bytes: int
    private: bool = True

    def status(self):
        return admin_pb2.StatusResponse(capacity_bytes=self.capacity_bytes)


def test_a_trace_is_replayed_through_a_pool_of_the_asked_size_or_not_at_all():
    """A hit rate beside that of an LRU of another size would be no result."""
    size = slot_bytes(4096)
    assert trace._capacity(OfSize(7 * size), 7, 4096) == 7
    assert trace._capacity(OfSize(9 * size, private=False), 7, 4096) == 9
    with pytest.raises(BenchError, match="not"):
        trace._capacity(OfSize(9 * size), 7, 4096)


@pytest.mark.parametrize("line", [
    f'{{"timestamp": {"9" * 401}, "hash_ids": [1]}}',
    '{"timestamp": Infinity, "hash_ids": [1]}',
    '{"timestamp": NaN, "hash_ids": [1]}',
    f'{{"timestamp": 0, "hash_ids": [{"9" * 5000}]}}',
    "[" * 200_000,
])  # fmt: skip
def test_a_line_that_is_no_request_is_named(tmp_path, line):
    """Whatever the parser makes of it."""
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "hash_ids": [1]}\n' + line)
    with pytest.raises(InvalidArgumentError, match="FILE: line 2: must be"):
        read_trace(str(path), 0)


def test_any_whole_number_is_the_id_of_a_block():
    """Hashes are as long as whoever wrote the trace had them."""
    replay = trace.Replay(None, 64, 1)
    assert len({replay._key(number) for number in (0, 1, -1, 1 << 127, -(1 << 128))}) == 5


@pytest.mark.parametrize(("command", "arguments"), [
    (trace.command, ["FILE", "--capacity_ratio", "nan"]),
    (trace.command, ["FILE", "--speedup", "nan"]),
    (lookup.command, ["--rate_seconds", "nan"]),
])  # fmt: skip
def test_a_number_is_a_number(command, arguments):
    """Nothing is larger than nan, and nothing is smaller."""
    result = CliRunner().invoke(command, arguments)
    assert (result.exit_code, arguments[-2] in result.stderr) == (2, True)


def test_a_master_that_is_not_there_is_one_line(tmp_path):
    """Without the call's whole state."""
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "hash_ids": [1]}')
    for command, arguments in ((trace.command, [str(path)]), (store.command, [])):
        result = CliRunner().invoke(command, [*arguments, "--master", "127.0.0.1:1"])
        (line,) = result.stderr.strip().splitlines()
        assert (result.exit_code, "the master at 127.0.0.1:1 does not answer: " in line) == (1, True)


def test_what_a_part_refuses_is_bad_usage():
    """As if the benchmark had refused it; a part that fails is a failure; so is memory that is not there."""
    with pytest.raises(BadUsage, match="segment_size"), one_command():
        raise StartError("segment_size: must be less", refused=True)
    for error in (StartError("node 0 ended"), MemoryError("Unable to allocate 4 TiB")):
        with pytest.raises(click.ClickException) as caught, one_command():
            raise error
        assert (caught.value.exit_code, str(error) in caught.value.message) == (1, True)


def test_json_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path):
    """What is there stays, and nothing new is left until there are figures."""
    kept = tmp_path / "kept.json"
    kept.write_text("of before")
    for path, said in ((tmp_path, "Is a directory"), (tmp_path / "none" / "x", "No such file")):
        result = CliRunner().invoke(trace.command, ["/nowhere", "--json", str(path)])
        assert (result.exit_code, f"json: cannot write {path}: {said}" in result.stderr) == (2, True)
    for path in (kept, tmp_path / "new.json"):
        result = CliRunner().invoke(trace.command, ["/nowhere", "--json", str(path)])
        assert "FILE: cannot read /nowhere" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]
    assert kept.read_text() == "of before"


class Full(io.StringIO):
    def write(self, text):
        raise OSError("full")


def test_json_is_written_before_anything_is_printed(tmp_path, monkeypatch):
    """Minutes of measuring went into it: a full or closed output does not lose it."""
    report = Report("store")
    report.add(Figure("local_get", 5.0, "GB/s"))
    path = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(OSError, match="full"):
        report.show(str(path))
    assert json.loads(path.read_text())["figures"][0]["name"] == "local_get"


def test_figures_are_printed_even_where_json_cannot_be_written(capsys):
    """They are all that is left of them."""
    report = Report("store")
    report.add(Figure("local_get", 5.0, "GB/s"))
    with pytest.raises(click.ClickException, match="json: cannot write /dev/full: No space left"):
        report.show("/dev/full")
    assert "local_get" in capsys.readouterr().out
