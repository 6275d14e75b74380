"""Our threads beside an engine's whose first thread is bound to a core."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvpool.client_bytes import CopyThreads
from kvpool.client_threads import Threads
from kvpool.processes import cpu_count, run_threads_on, start_thread
from kvpool_vllm.cpus import free_cpus

ALL = os.sched_getaffinity(0)
T = 30.0


def _worker(conn: Any, nodes: Path, cpus: set[int]) -> None:
    """Be a worker whose thread is bound; say where threads of ours run."""
    os.sched_setaffinity(0, cpus)
    run_threads_on(free_cpus(nodes))
    threads, copies = Threads(1, "some"), CopyThreads(1)
    conn.send(os.sched_getaffinity(0))
    conn.send(threads.submit(os.sched_getaffinity, 0).result(T))
    conn.send(copies.executor().submit(os.sched_getaffinity, 0).result(T))
    thread = start_thread(lambda: conn.send(os.sched_getaffinity(0)), "one")
    assert thread is not None
    thread.join(T)
    conn.send(cpu_count())
    threads.close()
    copies.close()


def seen_by_worker(nodes: Path, cpus: set[int]) -> list[Any]:
    spawning = multiprocessing.get_context("spawn")
    ours, theirs = spawning.Pipe()
    process = spawning.Process(target=_worker, args=(theirs, nodes, cpus))
    process.start()
    theirs.close()
    try:
        seen = []
        for _ in range(5):
            assert ours.poll(T)
            seen.append(ours.recv())
        return seen
    finally:
        process.join(T)
        assert process.exitcode == 0


def node(directory: Path, number: int, cpus: str) -> None:
    (directory / f"node{number}").mkdir()
    (directory / f"node{number}" / "cpulist").write_text(cpus + "\n")


@pytest.mark.skipif(len(ALL) < 2, reason="needs two processors")
class TestBoundWorker:
    def test_threads_run_where_the_engine_may(self, tmp_path):
        """All but the one that was bound, in the memory nodes of that one."""
        first, *others = sorted(ALL)
        node(tmp_path, 0, ",".join(map(str, sorted(ALL))))
        assert seen_by_worker(tmp_path, {first}) == [{first}, ALL, ALL, ALL, len(ALL)]
        node(tmp_path, 1, "4000-4003")
        assert seen_by_worker(tmp_path, {others[0]})[1] == ALL

    def test_other_memory_nodes_are_left_alone(self, tmp_path):
        first, *others = sorted(ALL)
        node(tmp_path, 0, str(first))
        node(tmp_path, 1, ",".join(map(str, others)))
        assert seen_by_worker(tmp_path, {first}) == [{first}, {first}, {first}, {first}, 1]

    def test_a_system_without_memory_nodes(self, tmp_path):
        assert seen_by_worker(tmp_path / "none", {min(ALL)})[1] == ALL
        node(tmp_path, 0, "no list")
        assert seen_by_worker(tmp_path, {min(ALL)})[1] == ALL


def test_who_was_not_started_by_an_engine_stays_where_it_is():
    """The parent may be a shell: where that runs, we may have been told not to."""
    assert free_cpus() == set()
    run_threads_on(free_cpus())
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(os.sched_getaffinity, 0).result(T) == ALL
    assert cpu_count() == len(ALL)
