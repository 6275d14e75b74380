"""What an engine tells the master of itself, so that routers find it: where requests reach it, and what it does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpool.config import split_address
from kvpool.errors import InvalidArgumentError

if TYPE_CHECKING:
    from kvpool.config import ConnectorSettings

SERVE_PORT = 8000
"""Of vLLM's server where none is given."""

HCCN = Path("/etc/hccn.conf")
"""Addresses of an Ascend host's devices."""

_HCCN_LINE = re.compile(r"^\s*address_(\d{1,4})\s*=\s*([0-9a-fA-F.:]+)\s*$", re.MULTILINE)
_DATA_PARALLEL = re.compile(r"_dp\d+$")
_UNREACHABLE = (
    "--headless", "--uds", "--config", "--ssl-keyfile", "--ssl-certfile", "--data-parallel-multi-port-external-lb",
)  # fmt: skip
"""With these, the command line does not say where plain HTTP is served, or where this engine's is."""

_EVERYWHERE = ("", "0.0.0.0", "::")


def facts(vllm_config: Any, kv_role: str, settings: ConnectorSettings, argv: Sequence[str]) -> dict[str, Any]:
    """Return what an engine says of itself at its start. ``argv``: its process's, as ``sys.argv``."""
    parallel = vllm_config.parallel_config
    return {
        "engine": vllm_config.kv_transfer_config.engine_id,
        "address": address(settings.engine_address, vllm_config.kv_transfer_config.engine_id, argv),
        "role": kv_role,
        "model": str(vllm_config.model_config.served_model_name),
        "tensor_parallel": parallel.tensor_parallel_size,
        "pipeline_parallel": parallel.pipeline_parallel_size,
        "data_parallel_rank": parallel.data_parallel_rank,
        "devices": devices(parallel),
    }


def address(given: str | None, engine_id: str, argv: Sequence[str]) -> str:
    """Return where the engine's server is, as HOST:PORT, or :PORT for one on all of its host's addresses; "" unknown.

    It is what the setting says, else ``engine_id`` where that has the form HOST:PORT or a URL's, else what the
    command line of ``vllm serve`` says, which all of vLLM's processes know.
    """
    if given:
        return given
    named = _DATA_PARALLEL.sub("", engine_id).removeprefix("http://").rstrip("/")
    try:
        host, port = split_address(named, "engine_id")
    except InvalidArgumentError:
        return _served(argv)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _served(argv: Sequence[str]) -> str:
    """Return the address in the command line of a ``vllm serve`` process; "" where there is none."""
    program = argv[0] if argv else ""
    serves = (program.endswith("/vllm") and "serve" in argv[1:2]) or program.endswith("openai/api_server.py")
    if not serves or any(word.partition("=")[0].replace("_", "-") in _UNREACHABLE for word in argv):
        return ""
    host, port = _option(argv, "--host") or "", _option(argv, "--port") or str(SERVE_PORT)
    if not (port.isdigit() and 0 < int(port) < 1 << 16):
        return ""
    host = "" if host in _EVERYWHERE else host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _option(argv: Sequence[str], name: str) -> str | None:
    """Return an option's last value."""
    found = None
    for word, after in zip(argv, [*argv[1:], ""], strict=True):
        if word == name:
            found = after
        elif word.startswith(f"{name}="):
            found = word.partition("=")[2]
    return found


def devices(parallel: Any) -> list[str]:
    """Return the accelerators of this host's ranks, by rank, as "id" or "id,address"; none on a CPU."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return []
    ids = getattr(parallel, "assigned_physical_gpu_ids", None)
    if ids is None:
        try:
            ids = [current_platform.device_id_to_physical_device_id(rank) for rank in range(parallel.local_world_size)]
        except (IndexError, ValueError):  # fewer are visible here than have ranks: others know
            return []
    own = device_addresses(HCCN)
    return [f"{one},{own[str(one)]}" if str(one) in own else str(one) for one in ids]


def device_addresses(path: Path) -> dict[str, str]:
    """Return the addresses of devices by id, from a file like ``/etc/hccn.conf``; none where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return dict(_HCCN_LINE.findall(text))
