"""Engines under a mixed load, restarted, and started side by side: the same tokens, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import MARGIN_MIN, EngineProcess, Pool, Prompts
from tests.e2e.engine import BLOCK_TOKENS, Answer

BLOCKS = 20
PROMPT = BLOCKS * BLOCK_TOKENS + 5
REQUESTS = 500
BLOCK_BYTES = 32 * 768
"""Of one block of the tiny model, in all ranks."""

pytestmark = pytest.mark.timeout(400)


def processes(root: int) -> list[int]:
    """Return a process and all that descend from it."""
    found = [root]
    for pid in found:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that ended meanwhile
                found += map(int, (thread / "children").read_text().split())
    return found


def descriptors(engine: EngineProcess, pool: Pool) -> dict[str, int]:
    """Return how many files each process of an engine and its pool has open."""
    roots = {"engine": engine.pid, "node": pool.node.pid, "master": pool.master.pid}
    return {
        f"{name} {pid}": sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
        for name, root in roots.items()
        for pid in processes(root)
    }


def mixed_load(rng: random.Random) -> list[dict[str, Any]]:
    """Return requests of many lengths, most with a shared beginning and asked for repeatedly; some hang up."""
    prefixes = [[rng.randrange(3, 4096) for _ in range(n)] for n in (64, 200, 320, 480)]
    prompts = []
    for i in range(80):
        own = [rng.randrange(3, 4096) for _ in range(rng.choice((7, 33, 90, 180, 330)))]
        prompts.append(own if i % 8 == 0 else prefixes[i % 4] + own)
    load = []
    for i in range(REQUESTS):
        one: dict[str, Any] = {"prompt": prompts[rng.randrange(len(prompts))], "tokens": rng.choice((1, 2, 4, 40))}
        if i % 9 == 4:
            one["abort_after"] = rng.randrange(1, 12)
        load.append(one)
    return load


@contextlib.contextmanager
def stumbling(*pids: int) -> Iterator[None]:
    """Stop each of the processes for a moment, again and again: everybody then opens a channel, so many as may be."""
    over = threading.Event()

    def stumble() -> None:
        while not over.is_set():
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
                over.wait(0.2)  # less than any of them is given up for
                os.kill(pid, signal.SIGCONT)
                over.wait(0.2)

    thread = threading.Thread(target=stumble)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def cold_answers(engine: EngineProcess, load: list[dict[str, Any]]) -> dict[tuple[int, ...], list[int]]:
    """Return the clear tokens of each prompt, answered alone and sharing no block with anything stored."""
    prompts = sorted({tuple(one["prompt"]) for one in load})
    asked = [{"prompt": prompt, "tokens": 12, "salt": f"own-{i}"} for i, prompt in enumerate(prompts)]
    answers = [Answer(**answer) for answer in engine.ask("mixed", requests=asked, at_once=1)]
    assert not any(answer.cached for answer in answers)
    assert not engine.counters().get("load.jobs")
    return {prompt: answer.sure_tokens(MARGIN_MIN) for prompt, answer in zip(prompts, answers, strict=True)}


def wrong_answers(
    load: list[dict[str, Any]], answers: list[dict[str, Any] | None], cold: dict[tuple[int, ...], list[int]]
) -> list[int]:
    """Return which requests were answered otherwise than cold, or not at all without having hung up."""
    wrong = []
    for i, (one, answer) in enumerate(zip(load, answers, strict=True)):
        sure = cold[tuple(one["prompt"])][: one["tokens"]]
        if answer["tokens"][: len(sure)] != sure if answer else "abort_after" not in one:
            wrong.append(i)
    return wrong


def settled(engine: EngineProcess, pool: Pool) -> dict[str, Any]:
    """Return what engine and pool hold when the last save and load are over."""
    engine.ask("settle")
    deadline = time.monotonic() + 30
    while (status := pool.control("status"))["leases"]:
        assert time.monotonic() < deadline, f"still leased: {status}"
    state = engine.state()
    return {name: state[name] for name in ("free_blocks", "leases", "tracked", "held_for_saving")}


@pytest.fixture
def small_pool(tmp_path: Path) -> Iterator[Pool]:
    """Return a pool that holds a part of the load only."""
    one = Pool(tmp_path, segment_size="16MB")
    yield one
    one.close()


def test_mixed_requests_on_two_ranks(small_pool: Pool, model: Path) -> None:
    """Loads, saves, evictions, preemptions and aborts at once: no other token, and nothing stays held or open."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("needs two cores")
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, cores))}
    engine = EngineProcess(
        model,
        {"master": small_pool.address, "lookup_timeout": "1s", "save_decode_cache": True},
        binding,
        tensor_parallel_size=2,
        kv_cache_memory_bytes=48 * BLOCK_BYTES // 2,
        max_model_len=1024,
        max_num_batched_tokens=512,
    )
    try:
        load = mixed_load(random.Random(5))
        start = settled(engine, small_pool)
        cold = cold_answers(engine, load)
        assert sum(map(len, cold.values())) > len(cold), "tokens beyond the first"
        with stumbling(small_pool.node.pid, small_pool.master.pid):
            engine.ask("mixed", requests=load[:200], at_once=16)
        assert settled(engine, small_pool) == start
        opened, state, known = descriptors(engine, small_pool), engine.state(), small_pool.control("status")

        answers = []
        for first in range(0, REQUESTS, 100):
            answers += engine.ask("mixed", requests=load[first : first + 100], at_once=16)
        assert settled(engine, small_pool) == start
        assert wrong_answers(load, answers, cold) == []
        left = descriptors(engine, small_pool)
        assert left.keys() == opened.keys()
        assert {name: count for name, count in left.items() if count > opened[name]} == {}, opened

        assert answers.count(None) > 20
        assert engine.state()["preemptions"] > state["preemptions"]
        assert engine.counters()["load.arrived"] > state["counters"]["load.arrived"] + 500
        removed = small_pool.control("status")["counters"]["blocks_removed"]
        assert removed > known["counters"]["blocks_removed"], "the pool was full"
        small_pool.empty()  # which pins and reservations would prevent
    finally:
        engine.close()


@pytest.mark.parametrize("end", ["closed", "killed"])
def test_restarted_engine_hits_what_the_last_one_stored(pool: Pool, model: Path, prompts: Prompts, end: str) -> None:
    """A new process finds the blocks of one that ended, in whatever way, and answers as that did."""
    settings = {"master": pool.address, "lookup_timeout": "1s"}
    known = pool.control("status")["blocks"]
    engine = EngineProcess(model, settings, {})
    try:
        prompt, cold = prompts.clear(engine, PROMPT)
        assert cold.cached == 0
        pool.wait_blocks(known + BLOCKS)
        if end == "killed":
            os.kill(engine.pid, signal.SIGKILL)
    finally:
        engine.close()
    engine = EngineProcess(model, settings, {})
    try:
        again = engine.generate(prompt, 4)
        assert (again.tokens, again.cached) == (cold.tokens, BLOCKS * BLOCK_TOKENS)
    finally:
        engine.close()
    pool.empty()


def test_two_engines_started_at_once_on_an_empty_pool(small_pool: Pool, model: Path, prompts: Prompts) -> None:
    """Both come up, store the same blocks at the same time, and both hit them."""
    settings = {"master": small_pool.address, "lookup_timeout": "1s"}
    both = [EngineProcess(model, settings, {}) for _ in range(2)]
    try:
        for engine in both:
            engine.wait_up()
        asked = [prompts.random(PROMPT) for _ in range(4)]
        with ThreadPoolExecutor() as threads:
            cold = list(threads.map(lambda engine: [engine.generate(prompt, 4) for prompt in asked], both))
        small_pool.wait_blocks(len(asked) * BLOCKS)
        assert small_pool.control("status")["blocks"] == len(asked) * BLOCKS, "stored once"
        for engine, answers in zip(both, cold, strict=True):
            engine.forget()
            for prompt, answer in zip(asked, answers, strict=True):
                again, sure = engine.generate(prompt, 4), answer.sure_tokens(MARGIN_MIN)
                assert again.tokens[: len(sure)] == sure
                assert again.cached == BLOCKS * BLOCK_TOKENS
        small_pool.empty()
    finally:
        for engine in both:
            engine.close()
