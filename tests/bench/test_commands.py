"""Each benchmark from end to end with tiny sizes: figures and their names, never how large they are."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from kvpool.bench.pool import bench_pool

MACHINE = {"cpus", "model", "memory", "kernel", "python"}
RUN_S = 100


@pytest.fixture
def own():
    """A directory for temporary files whose name leaves room for a unix socket's."""
    with tempfile.TemporaryDirectory(prefix="kvb-") as made:
        yield Path(made)


@pytest.fixture
def bench(tmp_path, own):
    """Run kvpool-bench in a process of its own; returns (exit code, output, JSON). Nothing may be left behind."""

    def run(*arguments: str, **settings: str):
        path = tmp_path / "figures.json"
        done = subprocess.run(
            [sys.executable, "-m", "kvpool.cli.bench", *arguments, "--json", str(path)],
            capture_output=True, text=True, timeout=RUN_S, check=False,
            env={**os.environ, "TMPDIR": str(own), **settings},
        )  # fmt: skip
        assert list(own.iterdir()) == []
        output = done.stdout + done.stderr
        return done.returncode, output, json.loads(path.read_text()) if path.exists() else None

    return run


def check_report(report, bench):
    assert report["bench"] == bench
    assert report["version"]
    assert set(report["machine"]) == MACHINE
    for figure in report["figures"]:
        assert {"name", "value", "unit", "limit", "ratio"} <= figure.keys()
        assert figure["value"] >= 0
        assert (figure["limit"] is None) == (figure["ratio"] is None)


def test_store_measures_every_way_of_a_block(bench):
    """Local and remote, put and get, verified or not, beside a busy thread, and by several readers."""
    code, output, report = bench(
        "store", "--block_bytes", "64KB", "--blocks", "4", "--rounds", "1", "--segment_size", "64MB", "--readers", "2"
    )
    assert code == 0, output
    check_report(report, "store")
    assert all(figure["block_bytes"] == 65536 and figure["unit"] == "GB/s" for figure in report["figures"])
    seen = [
        (f["name"], f["limit"], f.get("checksum"), f.get("busy", False), f.get("readers")) for f in report["figures"]
    ]
    assert seen == [
        ("local_put", "memory_copy", "always", False, None),
        ("local_get", "memory_copy", "always", False, None),
        ("local_get", "idle", "always", True, None),
        ("local_put", "memory_copy", "transfer", False, None),
        ("local_get", "memory_copy", "transfer", False, None),
        ("remote_put", "raw_socket", None, False, None),
        ("remote_get", "raw_socket", None, False, None),
        ("remote_get", "one_reader", None, False, 2),
    ]


def test_store_leaves_a_pool_that_goes_on_as_empty_as_it_was(bench, tmp_path_factory):
    """Its size is what the pool has; what does not fit that is refused with the name of what to change."""
    small = ("--block_bytes", "64KB", "--blocks", "4", "--rounds", "1", "--checksum", "always", "--readers", "1")
    with bench_pool(None, segment_size=16 << 20) as pool:
        for arguments, named in (
            ([], "block_bytes: 3 batches of 32 blocks of 2097152 bytes must fit 16777216 bytes"),
            (["--segment_size", "17MB"], "segment_size: must be at most 16777216, which a node has"),
            (["--segment_size", "4194304TB"], "segment_size: must be at most 16777216, which a node has"),
        ):
            code, output, report = bench("store", "--master", pool.master, *arguments)
            assert (code, named in output, report) == (2, True, None), output
        code, output, report = bench("store", "--master", pool.master, *small)
        assert code == 0, output
        assert {figure["name"] for figure in report["figures"]} >= {"local_put", "remote_get"}
        deadline = time.monotonic() + 30
        while pool.status().blocks:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_lookup_measures_latency_rate_index_and_memory(bench):
    """Lookups by frames and by gRPC with their limits, and each phase of the index with the lookups meanwhile."""
    code, output, report = bench(
        "lookup", "--rounds", "20", "--clients", "1", "--rate_seconds", "0.2", "--index_blocks", "40000"
    )
    assert code == 0, output
    check_report(report, "lookup")
    seen = [(f["name"], f["limit"], f.get("missing"), f.get("phase")) for f in report["figures"]]
    assert seen == [
        ("lookup", "tcp_pingpong", None, None),
        ("lookup", "tcp_pingpong", None, None),
        ("lookup", "tcp_pingpong", 500, None),
        ("lookup_grpc", "grpc_empty_unary", None, None),
        ("lookup_rate", None, None, None),
        ("index_commit", None, None, "growth"),
        ("index_commit", None, None, "inventory"),
        ("index_commit", None, None, "sweep"),
        ("master_memory", None, None, None),
    ]
    assert [f["blocks"] for f in report["figures"]][:4] == [64, 1024, 1024, 1024]
    commits = [f for f in report["figures"] if f["name"] == "index_commit"]
    assert all({"lookup_p50_ms", "lookup_p99_ms"} <= f.keys() for f in commits)


@pytest.fixture
def trace(tmp_path):
    """A trace of conversations: each turn repeats its history and adds to it."""
    rng = random.Random(5)
    fresh = iter(range(1, 1 << 20))
    talks: list[list[int]] = [[0] for _ in range(12)]
    path = tmp_path / "trace.jsonl"
    with path.open("w") as lines:
        for number in range(120):
            talk = rng.choice(talks)
            talk += [next(fresh) for _ in range(rng.randint(1, 4))]
            record = {"timestamp": 20 * number, "input_length": 512 * len(talk), "output_length": 9, "hash_ids": talk}
            lines.write(json.dumps(record) + "\n")
    return str(path)


def test_trace_replays_every_request_through_a_pool_of_the_asked_size(bench, trace):
    """The hit rate is a fraction beside that of an ideal LRU; errors are counted and there are none."""
    code, output, report = bench("trace", trace, "--capacity_ratio", "0.4", "--block_bytes", "4KB")
    assert code == 0, output
    check_report(report, "trace")
    (figure,) = report["figures"]
    assert figure["name"] == "trace_hit_rate"
    assert figure["limit"] == "lru"
    assert 0 < figure["value"] <= 1
    assert figure["requests"] == 120
    assert figure["capacity_blocks"] == round(0.4 * figure["unique_blocks"])
    assert figure["errors"] == 0
    assert figure["evicted"] > 0
    assert "errors: none" in output


def test_settings_around_a_benchmark_are_not_its_pools(bench, trace, tmp_path):
    """Neither sizes nor directories: what is measured is what was asked for, and nothing real is touched."""
    settings = {
        "KVPOOL_DATA_DIR": str(tmp_path / "data"), "KVPOOL_STORAGE_BACKENDS": str(tmp_path / "files"),
        "KVPOOL_CACHE_BUFFER_CAPACITY_GB": "0.1", "KVPOOL_CONFIG": "/nowhere", "MOONCAKE_CONFIG_PATH": "/nowhere",
    }  # fmt: skip
    code, output, report = bench("trace", trace, "--capacity_ratio", "0.4", "--block_bytes", "4KB", **settings)
    assert code == 0, output
    assert report["figures"][0]["evicted"] > 0
    assert not (tmp_path / "data").exists()
    assert not (tmp_path / "files").exists()


def test_fs_measures_files_beside_raw_ones_and_other_designs(bench, tmp_path):
    """Fill and cold read with their spread, a hit in every design, a restart; the directory is empty again."""
    directory = tmp_path / "storage"
    directory.mkdir()
    code, output, report = bench(
        "fs", str(directory), "--block_bytes", "64KB", "--size", "12MB", "--segment_size", "4MB", "--rounds", "2",
        "--restart_blocks", "2000",
    )  # fmt: skip
    assert code == 0, output
    assert list(directory.iterdir()) == []
    check_report(report, "fs")
    figures = report["figures"]
    assert [(f["name"], f["limit"]) for f in figures[:4]] == [
        ("fill", "raw_write"), ("fill", "like_files"), ("cold_read", "raw_read"), ("cold_read", "like_files"),
    ]  # fmt: skip
    assert all(f["ratio_min"] <= f["ratio"] <= f["ratio_max"] for f in figures[:4])
    hits = [f for f in figures if f["name"] == "hit"]
    assert [f["design"].split(",")[0] for f in hits] == [
        "pool", "pool", "file per block", "the same", "packed files",
    ]  # fmt: skip
    assert all(f["p99_us"] >= f["value"] > 0 for f in hits)
    assert [(f["name"], f["blocks"]) for f in figures[-2:]] == [
        ("restart_first_answer", 2000),
        ("restart_all_found", 2000),
    ]


def test_bad_input_is_one_line_and_exit_code_2(bench, tmp_path):
    """Whatever is not allowed is named, and nothing is started."""
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"timestamp": 0, "hash_ids": [1]}\n{"timestamp": "x"}\n')
    for arguments, named in [
        (["trace", str(broken)], "line 2"),
        (["trace", str(tmp_path / "absent.jsonl")], "cannot read"),
        (["trace", str(broken), "--block_bytes", "100"], "block_bytes"),
        (["store", "--block_bytes", "1XB"], "block_bytes"),
        (["store", "--block_bytes", "1MB", "--segment_size", "2MB"], "segment_size"),
        (["store", "--block_bytes", "4194301"], "block_bytes"),
        (["store", "--segment_size", "4194304TB"], "segment_size"),
        (["fs", str(tmp_path / "absent")], "directory"),
        (["fs", str(tmp_path), "--segment_size", "1GB"], "segment_size"),
        (["fs", str(tmp_path), "--size", "10000TB"], "free"),
    ]:
        code, output, report = bench(*arguments)
        assert code == 2, output
        assert named in output
        assert "Traceback" not in output
        assert report is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("bench", ["store", "fs"])
def test_a_signal_ends_a_benchmark_and_all_that_it_started(own, tmp_path, number, bench):
    """Ctrl-C in the middle: no process, no socket, no directory stays."""
    arguments, processes = (["--segment_size", "256MB"], 4) if bench == "store" else ([str(tmp_path)], 2)
    with subprocess.Popen(
        [sys.executable, "-m", "kvpool.cli.bench", bench, *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "TMPDIR": str(own)},
        # Started in the background of a script the tests ignore SIGINT, and children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - one thread here
    ) as process:  # fmt: skip
        family = []
        deadline = time.monotonic() + 60
        while len(family) < processes:  # master, node; of store the bare socket's peer, Python's resource tracker
            assert process.poll() is None
            assert time.monotonic() < deadline
            family = psutil.Process(process.pid).children(recursive=True)
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=30) != 0
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
    assert list(own.iterdir()) == []
    assert list(tmp_path.iterdir()) == []
