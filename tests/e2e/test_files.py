"""Real engines on a pool with a directory behind it: what was saved survives everybody, and memory may be small."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvpool.errors import KVPoolError
from tests.e2e.conftest import MARGIN_MIN, EngineProcess, Pool, Prompts
from tests.e2e.engine import BLOCK_TOKENS, Answer, Engine

BLOCKS = 20
PROMPT = BLOCKS * BLOCK_TOKENS + 5
T = 60.0

pytestmark = pytest.mark.timeout(300)


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """Return the first true answer."""
    deadline = time.monotonic() + T
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not within {T:g} s: {what}"
        time.sleep(0.02)
    return answer


class FilePool(Pool):
    """A pool whose node writes to a directory."""

    def __init__(self, folder: Path, segment_size: str) -> None:
        self.files = folder / "files"
        self.data = folder / "master"
        storage = ("--storage_backends", str(self.files), "--storage_capacity", "2GB")
        super().__init__(folder, segment_size, master=("--data_dir", str(self.data)), node=storage)

    @property
    def backend(self) -> dict[str, Any]:
        """What the master knows of the directory; empty before it knows it."""
        status = self.control("status")
        found: list[dict[str, Any]] = status["backends"] if status else []
        return found[0] if found else {}

    def wait_files(self, blocks: int) -> None:
        """Wait until so many blocks are files, as the master has acknowledged."""
        wait_for(lambda: self.backend.get("blocks", 0) >= blocks, f"{blocks} blocks in files: {self.backend}")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FilePool]:
    """Return a pool whose memory holds four prompts."""
    one = FilePool(tmp_path_factory.mktemp("pool"), "2MB")
    yield one
    one.close()


def settings(pool: Pool, folder: Path) -> dict[str, Any]:
    return {
        "master": pool.address,
        "node": str(folder / "node.sock"),
        "lookup_timeout": "1s",
        "transfer_timeout": "10s",
        "breaker_probe_interval": "100ms",
    }


@pytest.fixture(scope="module")
def engine_a(pool: FilePool, model: Path) -> Iterator[Engine]:
    """Return the engine of this process."""
    engine = Engine(model, settings(pool, pool.files.parent))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def engine_b(pool: FilePool, model: Path) -> Iterator[EngineProcess]:
    """Return an engine in a process of its own."""
    engine = EngineProcess(model, settings(pool, pool.files.parent), {})
    engine.wait_up()
    yield engine
    engine.close()


def joined(engine: Engine) -> bool:
    """Whether both sides of an engine know the pool again after it was away."""
    try:
        for side in (engine.scheduler, engine.worker):
            node = side._client._local()
            if node is None or not side._client._link.up or side._client.unusable_nodes():
                return False
            node.probe()  # it may be another process by now
    except KVPoolError:
        return False
    return True


def saved(pool: FilePool, engine: Engine, prompts: Prompts) -> tuple[list[int], Answer]:
    """Return a prompt with a clear margin that the engine computed, with its answer; its blocks are files.

    So are those of the prompts without one: memory has no room for many that are not written yet.
    """
    for _ in range(50):
        files, stored = pool.backend["blocks"], engine.worker.counters["save.stored"]
        prompt = prompts.random(PROMPT)
        cold = engine.generate(prompt, 4)
        assert cold.cached == 0
        stored = engine.worker.counters["save.stored"] - stored
        assert stored >= BLOCKS
        pool.wait_files(files + stored)
        if cold.margin >= MARGIN_MIN:
            return prompt, cold
    raise AssertionError("no prompt with a clear margin")


@pytest.mark.parametrize("catalog", ["kept", "lost"])
def test_what_one_engine_saved_another_loads_when_all_memory_is_gone(
    pool: FilePool, engine_a: Engine, engine_b: EngineProcess, prompts: Prompts, catalog: str
) -> None:
    """Master and node are killed; the files alone are left, and with them the catalog, or not even that."""
    wait_for(lambda: pool.backend, "the directory is known")
    wait_for(lambda: joined(engine_a), "the engine knows the pool")
    prompt, cold = saved(pool, engine_a, prompts)
    blocks = pool.backend["blocks"]
    pool.kill()
    if catalog == "lost":
        shutil.rmtree(pool.data)
    pool.start()
    pool.wait_files(blocks)
    before = engine_b.state()["client"]["worker"]

    def loads() -> bool:
        # Its clients may still be looking for the pool; what it computes meanwhile it does not keep.
        warm = engine_b.generate(prompt, 4)
        assert warm.tokens == cold.tokens
        engine_b.forget()
        return warm.cached == BLOCKS * BLOCK_TOKENS

    wait_for(loads, "the engine loads")
    after = engine_b.state()["client"]["worker"]
    read = {tier: after.get(f"get.{tier}_blocks", 0) - before.get(f"get.{tier}_blocks", 0) for tier in ("local", "fs")}
    assert read["fs"] + read["local"] >= BLOCKS, "local ones were read ahead"


@pytest.mark.parametrize("prefetch", [True, False])
def test_prompts_that_memory_cannot_hold_come_from_files(
    pool: FilePool, engine_a: Engine, prompts: Prompts, prefetch: bool
) -> None:
    """Serving goes on from the directory: the same answers, nothing computed anew, nothing left open."""
    wait_for(lambda: joined(engine_a), "the engine knows the pool")
    engine_a.scheduler.watch._prefetch = prefetch
    cold = [saved(pool, engine_a, prompts) for _ in range(8)]
    before = dict(engine_a.worker._client.stats())
    asked = engine_a.scheduler._client.stats().get("prefetch.blocks", 0)
    engine_a.forget()
    warm = engine_a.generate_all([prompt for prompt, _ in cold], 4)
    assert [answer.tokens for answer in warm] == [answer.tokens for _, answer in cold]
    after = engine_a.worker._client.stats()
    whole = [BLOCKS * BLOCK_TOKENS] * len(cold)
    assert [answer.cached for answer in warm] == whole, (engine_a.counters(), before, after)
    read = {tier: after.get(f"get.{tier}_blocks", 0) - before.get(f"get.{tier}_blocks", 0) for tier in ("local", "fs")}
    assert sum(read.values()) == len(cold) * BLOCKS
    assert read["fs"] > 0
    prefetched = engine_a.scheduler._client.stats().get("prefetch.blocks", 0) - asked
    assert (prefetched > 0) == prefetch
    engine_a.step_until(lambda: engine_a.scheduler.leases == 0)


def test_layer_by_layer_from_files(pool: FilePool, engine_a: Engine, model: Path, prompts: Prompts) -> None:
    """The first layer waits for a block's file, the others find it in memory: the same tokens."""
    wait_for(lambda: joined(engine_a), "the engine knows the pool")
    cold = [saved(pool, engine_a, prompts) for _ in range(6)]
    layerwise = settings(pool, pool.files.parent) | {"use_layerwise": True, "prefetch": False}
    engine = EngineProcess(model, layerwise, {})
    try:
        for prompt, answer in cold:
            warm = engine.generate(prompt, 4)
            assert (warm.tokens, warm.cached) == (answer.tokens, BLOCKS * BLOCK_TOKENS)
        assert engine.state()["client"]["worker"]["get.fs_blocks"] > 0
    finally:
        engine.close()
