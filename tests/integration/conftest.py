"""Pools of real processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.pool import Pool, wait_for


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the hammers run shorter or longer."""
    parser.addoption("--hammer_seconds", type=float, default=60.0, help="How long each of the two hammers runs.")


@pytest.fixture
def bare_pool(tmp_path: Path) -> Iterator[Pool]:
    """Return a pool of which nothing runs yet."""
    pool = Pool(tmp_path)
    try:
        yield pool
    finally:
        pool.close()


@pytest.fixture
def pool(bare_pool: Pool) -> Pool:
    """Return a master and the nodes "a" and "b", 64 MB each."""
    bare_pool.start_master()
    for name in ("a", "b"):
        bare_pool.start_node(name, wait=False)
    wait_for(lambda: {bare_pool.state(name) for name in ("a", "b")} == {"live"}, "both nodes are live")
    return bare_pool
