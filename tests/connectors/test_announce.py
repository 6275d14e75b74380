"""Where an engine's server is, as far as its scheduler's process can know."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from kvpool_vllm import announce
from kvpool_vllm.settings import ConnectorSettings

VLLM = "/opt/venv/bin/vllm"
MODULE = "/opt/venv/lib/python3.12/site-packages/vllm/entrypoints/openai/api_server.py"
UUID = "0f6c4a8e-7f0c-4f0f-9a54-1c2b3d4e5f60"


@pytest.mark.parametrize(
    ("given", "engine_id", "argv", "address"),
    [
        ("10.0.0.9:1", "10.0.0.1:8100", [VLLM, "serve", "m", "--port", "7"], "10.0.0.9:1"),
        (None, "10.0.0.1:8100", [VLLM, "serve", "m", "--port", "7"], "10.0.0.1:8100"),
        (None, "http://10.0.0.1:8100/", [], "10.0.0.1:8100"),
        (None, "10.0.0.1:8100_dp3", [], "10.0.0.1:8100"),
        (None, "[fe80::1]:8100", [], "[fe80::1]:8100"),
        (None, UUID, [VLLM, "serve", "m", "--port", "8100"], ":8100"),
        (None, UUID, [VLLM, "serve", "m", "--port=8100", "--host=10.0.0.3"], "10.0.0.3:8100"),
        (None, UUID, [VLLM, "serve", "m", "--port", "1", "--host", "::", "--port", "2"], ":2"),
        (None, UUID, [VLLM, "serve", "m", "--host", "fe80::1"], "[fe80::1]:8000"),
        (None, "0", [VLLM, "serve", "m", "--host", "0.0.0.0"], ":8000"),
        (None, UUID, [MODULE, "--model", "m", "--port", "8100"], ":8100"),
        (None, UUID, [VLLM, "serve", "m", "--headless"], ""),
        (None, UUID, [VLLM, "serve", "m", "--config", "c.yaml"], ""),
        (None, UUID, [VLLM, "serve", "m", "--uds=/run/vllm"], ""),
        (None, UUID, [VLLM, "serve", "m", "--ssl-keyfile", "k"], ""),
        (None, UUID, [VLLM, "serve", "m", "--ssl_keyfile=k"], ""),
        (None, UUID, [VLLM, "serve", "m", "--port", "7", "--data-parallel-multi-port-external-lb"], ""),
        (None, UUID, [VLLM, "serve", "m", "--port", "$PORT"], ""),
        (None, UUID, [VLLM, "serve", "m", "--port", "0"], ""),
        (None, UUID, [VLLM, "serve", "m", "--port"], ":8000"),
        (None, UUID, [VLLM, "bench", "serve", "--port", "8100"], ""),
        (None, UUID, ["offline.py", "serve", "--port", "8100"], ""),
        (None, UUID, [], ""),
    ],
)
def test_the_address(given: str | None, engine_id: str, argv: list[str], address: str) -> None:
    """What was set, else an id that is one, else the server's command line where it tells."""
    assert announce.address(given, engine_id, argv) == address


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Return vLLM's platform, as a host has it whose devices 4 and 5 are visible."""
    visible = [4, 5]
    found = types.SimpleNamespace(is_cpu=lambda: False, device_id_to_physical_device_id=visible.__getitem__)
    monkeypatch.setitem(sys.modules, "vllm.platforms", types.SimpleNamespace(current_platform=found))
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace())
    return found


def parallel(ranks: int, **more: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(local_world_size=ranks, **more)


def test_devices(platform: types.SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By rank, with their addresses where the host knows them; none where they cannot be told."""
    monkeypatch.setattr(announce, "HCCN", tmp_path / "absent")
    assert announce.devices(parallel(2)) == ["4", "5"]
    assert announce.devices(parallel(3)) == []
    assert announce.devices(parallel(2, assigned_physical_gpu_ids=[1, 0])) == ["1", "0"]
    hccn = tmp_path / "hccn.conf"
    hccn.write_text("address_5=29.0.0.5\nnetmask_5=255.0.0.0\n address_6 = 29.0.0.6 \nnonsense\n")
    monkeypatch.setattr(announce, "HCCN", hccn)
    assert announce.devices(parallel(2)) == ["4", "5,29.0.0.5"]
    platform.is_cpu = lambda: True
    assert announce.devices(parallel(2)) == []


def test_what_is_said_at_the_start() -> None:
    """The words of ``EngineAnnouncement``."""
    config = types.SimpleNamespace(
        kv_transfer_config=types.SimpleNamespace(engine_id=UUID),
        model_config=types.SimpleNamespace(served_model_name="bench"),
        parallel_config=types.SimpleNamespace(
            tensor_parallel_size=2, pipeline_parallel_size=1, data_parallel_rank=3, local_world_size=2,
            assigned_physical_gpu_ids=[],
        ),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        cpu = types.SimpleNamespace(is_cpu=lambda: True)
        patch.setitem(sys.modules, "vllm.platforms", types.SimpleNamespace(current_platform=cpu))
        patch.setitem(sys.modules, "vllm", types.SimpleNamespace())
        said = announce.facts(config, "kv_producer", ConnectorSettings(), [VLLM, "serve", "m", "--port", "8100"])
    assert said == {
        "engine": UUID, "address": ":8100", "role": "kv_producer", "model": "bench", "tensor_parallel": 2,
        "pipeline_parallel": 1, "data_parallel_rank": 3, "devices": [],
    }  # fmt: skip
