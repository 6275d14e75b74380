"""An engine that finds no node on its host starts one, uses it, and takes it along when it ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from kvpool.server.launch import Children, free_port, is_serving
from tests.e2e.conftest import EngineProcess, Prompts
from tests.e2e.engine import BLOCK_TOKENS

BLOCKS = 10
START_S = 60.0


@pytest.fixture
def master() -> Iterator[str]:
    """Return the address of a master that has no node."""
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    children = Children()
    try:
        children.start("master", "kvpool.cli.master", ["--port", address.rpartition(":")[2]])
        with grpc.insecure_channel(address) as channel:
            children.wait_until(lambda: is_serving(channel), "the master did not start", time.monotonic() + START_S)
        yield address
    finally:
        children.close()


def nodes_of(engine: EngineProcess) -> list[psutil.Process]:
    """Return the nodes among an engine's processes."""
    family = psutil.Process(engine.pid).children(recursive=True)
    return [process for process in family if "kvpool.cli.node" in process.cmdline()]


@pytest.mark.timeout(180)
def test_engine_starts_a_node_uses_it_and_takes_it_along(
    master: str, model: Path, prompts: Prompts, tmp_path: Path
) -> None:
    """Blocks come back through the new node's shared memory; after the engine's end the node is gone."""
    path = tmp_path / "node.sock"
    settings = {"master": master, "node": str(path), "autostart_node": True, "segment_size": "64MB"}
    engine = EngineProcess(model, settings, {})
    try:
        engine.wait_up()
        (node,) = nodes_of(engine)
        deadline = time.monotonic() + START_S
        while not engine.state()["client"]["worker"].get("get.local_blocks"):
            assert time.monotonic() < deadline, "the node is not used"
            prompt, cold = prompts.clear(engine, BLOCKS * BLOCK_TOKENS + 5)
            engine.forget()
            again = engine.generate(prompt, 4)
            assert again.tokens == cold.tokens
        assert again.cached == BLOCKS * BLOCK_TOKENS
    finally:
        engine.close()
    assert not psutil.wait_procs([node], timeout=10)[1], "the node outlived its engine"
    assert not path.exists()
