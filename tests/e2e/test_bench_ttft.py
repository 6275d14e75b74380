"""``kvpool-bench ttft`` with real engines: figures for every phase, and nothing that runs on afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

RUN_S = 200
START_S = 60
END_S = 60
SMALL = ("--model", "tiny", "--input_len", "512", "--prompts", "3", "--output_len", "2")

PATIENT = {"gate": "off", "lookup_timeout": "10s", "transfer_timeout": "30s"}
"""This model computes faster than a busy machine loads, or even looks up: here a hit is waited for."""


@pytest.fixture
def own() -> Iterator[Path]:
    """Return a directory for temporary files, by whose name every process of a run can be found."""
    with tempfile.TemporaryDirectory(prefix="kvt-") as made:
        yield Path(made)


def engines_of(own: Path) -> list[psutil.Process]:
    """Return the processes whose temporary files lie in an engine's folder there."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR", "").startswith(f"{own}/"):
                found.append(process)
        except psutil.Error:  # gone meanwhile, or somebody else's
            continue
    return found


def start(own: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "kvpool.cli.bench", "ttft", *SMALL, *arguments],
        env={**os.environ, "TMPDIR": str(own)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # Started in the background of a script the tests ignore SIGINT, and children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - one thread here
    )  # fmt: skip


def test_two_engines_on_two_nodes(own: Path, tmp_path: Path) -> None:
    """Cold, HBM hit, both pool hits, each of them what it is called; the other engine's crosses nodes."""
    path = tmp_path / "ttft.json"
    run = start(own, "--concurrency", "2", "--connector_config", json.dumps(PATIENT), "--json", str(path))
    try:
        output, _ = run.communicate(timeout=RUN_S)
    finally:
        run.kill()
    assert run.returncode == 0, output
    figures: dict[str, dict[str, Any]] = {figure["name"]: figure for figure in json.loads(path.read_text())["figures"]}
    names = ["ttft_cold", "ttft_hbm_hit", "ttft_local_hit", "ttft_other_node_hit"]
    assert list(figures) == names
    assert [figures[name]["hit_share"] for name in names] == [0.0, 1.0, 1.0, 1.0], output
    assert sum(figures[name]["same_text_as_hbm_hit"] for name in names[2:]) >= 3  # near ties may go either way
    held = [int(blocks) for blocks in re.findall(r"node\s+holds\s+(\d+)", output)]
    assert len(held) == 2 and held[1] < held[0] / 2, "the other engine's hits come through the first one's node"
    assert engines_of(own) == []
    assert list(own.iterdir()) == []


def test_an_interrupt_ends_every_engine(own: Path) -> None:
    """Ctrl-C in the middle of a start leaves no process and no file."""
    run = start(own)
    try:
        deadline = time.monotonic() + START_S
        while len(engines_of(own)) < 2:
            assert run.poll() is None, run.communicate()[0]
            assert time.monotonic() < deadline, "no engine was started"
            time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        output, _ = run.communicate(timeout=END_S)
    finally:
        run.kill()
        run.wait(END_S)
    assert run.returncode == 1, output
    assert engines_of(own) == []
    assert list(own.iterdir()) == []
