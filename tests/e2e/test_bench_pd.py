"""``kvpool-bench pd`` with real engines, and vLLM's own load generator through the proxy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvpool.bench.ttft_engines import kvpool_transfer
from tests.e2e.conftest import Pool
from tests.e2e.test_bench_ttft import PATIENT, engines_of
from tests.e2e.test_proxy import served

RUN_S = 400
SMALL = ("--model", "tiny", "--seed", "1")


@pytest.fixture
def own() -> Iterator[Path]:
    """Return a directory for temporary files, by whose name every process of a run can be found."""
    with tempfile.TemporaryDirectory(prefix="kvp-") as made:
        yield Path(made)


def measure(own: Path, path: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run the benchmark and return its figures; nothing of it may run on."""
    done = subprocess.run(
        [sys.executable, "-m", "kvpool.cli.bench", "pd", *SMALL, *arguments, "--json", str(path)],
        env={**os.environ, "TMPDIR": str(own)}, capture_output=True, text=True, timeout=RUN_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout
    assert engines_of(own) == []
    assert list(own.iterdir()) == []
    figures: list[dict[str, Any]] = json.loads(path.read_text())["figures"]
    return figures


def test_two_engines_routed_by_prefixes_and_in_turn(own: Path, tmp_path: Path) -> None:
    """Every token is accounted for; a turn that goes where the last one was is hit in the engine's own cache."""
    more = ("--sessions", "4", "--turns", "3", "--rounds", "1", "--concurrency", "1")
    plain, routed = measure(own, tmp_path / "pd.json", *more, "--connector_config", json.dumps(PATIENT))
    for each in (plain, routed):
        assert each["requests"] == 12
        assert sum(each["tokens"].values()) == each["prompt_tokens"]
    assert routed["tokens"]["hbm"] > plain["tokens"]["hbm"]


def test_a_prompt_is_handed_over(own: Path, tmp_path: Path) -> None:
    """Both ways; the decoding engine computes one token of it, which its counters may leave out."""
    figures = measure(own, tmp_path / "t.json", "--transfer", "--systems", "kvpool", "--transfer_tokens", "512",
                      "--prompts", "2")  # fmt: skip
    times = [figure for figure in figures if figure["name"] == "ttft"]
    assert [each["decode asked"] for each in times] == ["after the prefill", "with the prefill"]
    assert all(0 <= tokens <= 1 for each in times for tokens in each["computed_tokens"])


def test_vllms_load_generator_through_the_proxy(tmp_path: Path, model: Path, pool: Pool) -> None:
    """``vllm bench serve`` takes the proxy for an engine; prompts with a common prefix are hit where it lies."""
    transfer = kvpool_transfer(pool.address, "", {"report_residency": True})
    del transfer["kv_connector_extra_config"]["node"]
    flags = {"--instances": [0, 1]}
    result = tmp_path / "result.json"
    with served(tmp_path, model, [transfer, transfer], flags, "--master", pool.address) as (_, proxy):
        shape = {"num-prefixes": 2, "prefix-len": 256, "suffix-len": 32, "output-len": 4}
        done = subprocess.run(
            [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "vllm",
             "--base-url", f"http://{proxy.address}", "--model", "bench", "--tokenizer", str(model),
             "--dataset-name", "prefix_repetition", "--num-prompts", "12", "--max-concurrency", "2", "--seed", "1",
             *(part for name, value in shape.items() for part in (f"--prefix-repetition-{name}", str(value))),
             "--save-result", "--result-filename", str(result)],
            capture_output=True, text=True, timeout=RUN_S, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads(result.read_text())
        assert (found["completed"], found.get("failed", 0)) == (12, 0)
        assert found["mean_ttft_ms"] > 0
        assert proxy.metric("kvpool_proxy_held_tokens_total") >= 6 * 256
