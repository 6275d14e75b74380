"""The pools that engines are measured with: ours, and vLLM's own MooncakeStoreConnector beside it."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvpool.bench.harness import BenchError
from kvpool.bench.pool import BenchPool, bench_children
from kvpool.bench.ttft_engines import HOST, Python, end_groups
from kvpool.errors import InvalidArgumentError
from kvpool.server.launch import free_port, join_address

STORED_S = 30.0
QUIET_S = 0.5
"""When nothing more was stored for so long, background saves have ended."""

START_S = 30.0
ASK_S = 5.0
POLL_S = 0.05

_KEYS = re.compile(r"^master_(?:key_count|evicted_key_count) (\d+)", re.MULTILINE)


class Stored:
    """Waits until blocks that engines save in the background have become known."""

    def __init__(self, count: Callable[[], int]) -> None:
        """``count`` returns how many blocks were ever stored."""
        self._count = count
        self._seen = count()

    def __call__(self, blocks: int) -> str:
        """Wait for so many more than at the last call; return what to warn of, or an empty text.

        For 0 of them wait until nothing more is stored.
        """
        wanted, deadline = self._seen + blocks, time.monotonic() + STORED_S
        if not blocks:
            self._wait_quiet(deadline)
            return ""
        while (stored := self._count()) < wanted and time.monotonic() < deadline:
            time.sleep(POLL_S)
        missing, self._seen = max(0, wanted - stored), stored
        return f"{missing} of {blocks} blocks were not stored within {STORED_S:.0f} s" if missing else ""

    def _wait_quiet(self, deadline: float) -> None:
        changed = time.monotonic()
        while changed + QUIET_S > time.monotonic() < deadline:
            stored = self._count()
            if stored != self._seen:
                self._seen, changed = stored, time.monotonic()
            time.sleep(POLL_S)


def blocks_added(pool: BenchPool) -> int:
    """Return how many blocks a pool's master has ever heard of."""
    return int(pool.status().counters["blocks_added"])


@dataclass(frozen=True, slots=True)
class Mooncake:
    """A running ``mooncake_master``, and the file that engines find it by."""

    config: str
    metrics_port: int
    pid: int

    def keys_stored(self) -> int:
        """Return how many keys were ever stored. Raises BenchError."""
        connection = http.client.HTTPConnection(HOST, self.metrics_port, timeout=ASK_S)
        try:
            connection.request("GET", "/metrics")
            page = connection.getresponse().read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise BenchError(f"mooncake_master does not answer: {error}") from None
        finally:
            connection.close()
        return sum(map(int, _KEYS.findall(page)))

    @property
    def environment(self) -> dict[str, str]:
        """What an engine's environment must hold."""
        return {"MOONCAKE_CONFIG_PATH": self.config}


MOONCAKE_TRANSFER = {
    "kv_connector": "MooncakeStoreConnector",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}


def need_mooncake(python: Python, name: str) -> None:
    """Raise InvalidArgumentError(name) where Mooncake is not installed beside the engine."""
    if not python.mooncake or not _program(python).exists():
        raise InvalidArgumentError(name, f"{python.path} has no Mooncake: make setup-mooncake, and see README.md")


def _program(python: Python) -> Path:
    return Path(python.path).parent / "mooncake_master"


@contextmanager
def mooncake_pool(python: Python, folder: Path, segment_bytes: int) -> Iterator[Mooncake]:
    """Run a Mooncake master; each engine gives ``segment_bytes`` of its own process to that pool."""
    port, metrics_port = free_port(HOST), free_port(HOST)
    config = folder / "mooncake.json"
    settings = {
        "metadata_server": "P2PHANDSHAKE",
        "master_server_address": join_address(HOST, port),
        "protocol": "tcp",
        "device_name": "",
        "mode": "embedded",
        "global_segment_size": segment_bytes,
        "local_buffer_size": 256 << 20,
    }
    config.write_text(json.dumps(settings), encoding="utf-8")
    children = bench_children()
    try:
        master = children.start(
            "mooncake master",
            "kvpool.bench.ttft_exec",
            [
                *(str(_program(python)), "--rpc_address", HOST, "--rpc_port", str(port)),
                *("--metrics_host", HOST, "--metrics_port", str(metrics_port)),
            ],
        )
        found = Mooncake(str(config), metrics_port, master.process.pid)
        children.wait_until(lambda: _answers(found), "mooncake_master was not ready", time.monotonic() + START_S)
        yield found
    finally:
        end_groups(children.children)


def _answers(pool: Mooncake) -> bool:
    try:
        pool.keys_stored()
    except BenchError:
        return False
    return True
