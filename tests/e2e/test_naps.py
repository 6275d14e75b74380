"""The loop in which vLLM's processes wait for each other can nap."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")

from vllm.distributed.device_communicators import shm_broadcast

from kvpool_vllm import naps


@pytest.fixture
def naps_taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    taken: list[float] = []
    monkeypatch.setattr(shm_broadcast, naps.NAME, shm_broadcast.sched_yield)  # put back at the end
    monkeypatch.setattr(naps.time, "sleep", taken.append)
    yield taken
    naps.nap_for(0.0)


def test_the_loop_of_this_vllm_naps(naps_taken: list[float]) -> None:
    """What waits for a message does it in the loop that is taken."""
    naps.install()
    waiting = object.__new__(shm_broadcast.SpinCondition)
    waiting.is_reader, waiting.busy_loop_s = True, 1.0
    waiting.record_read()
    waiting.wait()
    assert not naps_taken
    naps.nap_for(1.0)
    waiting.wait()
    assert naps_taken == [1.0 / naps.PART]
