"""``kvpool-bench device``: what it prints, and what it says where it cannot run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvpool.cli.bench import command


def test_without_torch_it_says_where_torch_comes_from(monkeypatch: pytest.MonkeyPatch):
    """One line and an exit code; nothing of it is needed to import the benchmarks."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "kvpool_vllm.device_bench", raising=False)
    result = CliRunner().invoke(command, ["device"])
    assert result.exit_code == 1
    assert "torch is not installed here; it comes with the engine" in result.output
    assert "Traceback" not in result.output


def test_figures_of_both_models_beside_their_limit(tmp_path: Path):
    """Load and store each, with the copy that they are compared with, after the bytes were checked."""
    torch = pytest.importorskip("torch", reason="needs torch, which comes with an engine: make e2e")
    path = tmp_path / "device.json"
    result = CliRunner().invoke(command, ["device", "--blocks", "3", "--rounds", "1", "--json", str(path)])
    assert result.exit_code == 0, result.output
    figures = json.loads(path.read_text())["figures"]
    limit = "one pinned copy" if torch.cuda.is_available() else "one memory copy"
    assert [(f["name"], f["model"], f["limit"]) for f in figures] == [
        (name, model, limit) for model in ("Llama-3-8B", "DeepSeek-V3 (MLA)") for name in ("load", "store")
    ]
    assert all(f["value"] > 0 and f["ratio"] > 0 and f["blocks"] == 3 for f in figures)
    assert [f["block_bytes"] for f in figures[::2]] == [32 * 64 * 1024, 61 * 16 * 576 * 2]
    assert ("No accelerator is here" in result.output) == (not torch.cuda.is_available())
