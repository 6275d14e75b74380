"""Kill -9 of everything in turn while hundreds of prompts move: each ends in time, and nothing is left."""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from kvpool.rpc.v1 import admin_pb2
from tests.integration.pool import ROOT, SPACE, Pool, T, environment, say, wait_for
from tests.integration.transfer_engine import OPEN_S, RECEIVE_S, keys_of

TRANSFERS = 400
AT_A_TIME = 16
STRIKE_EVERY = 22
"""Transfers; the last strike comes when a few are left."""

DEADLINE_S = OPEN_S + RECEIVE_S + 1.0
LEFT_S = 60.0
"""What is of use to one transfer alone is looked for again 1, 5 and 30 s after its end."""

ENGINES = {"p0": "a", "p1": "b", "d0": "a", "d1": "b"}
"""Each engine's node."""

VICTIMS = (
    "p", "d", "a", "b", "stop p", "p", "stop a", "d", "stop d",
    "b", "stop master", "master", "stop a", "d", "a", "stop d", "stop p", "master",
)  # fmt: skip
"""In turn. What a master that dies knew its successor learns of the producers that live: those die earlier."""


class Engine:
    """A process that computes prompts, or takes them."""

    def __init__(self, pool: Pool, node: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.transfer_engine", pool.address, pool.socket_path(node)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(), cwd=ROOT,
        )  # fmt: skip
        self.running: dict[int, float] = {}
        self.ends: dict[int, tuple[str, float]] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            told = json.loads(line)
            self.ends[told["transfer"]] = (told["end"], told["seconds"])
            self.running.pop(told["transfer"], None)

    def begin(self, do: str, transfer: int) -> None:
        """Have it begin."""
        assert self.popen.stdin is not None
        self.running[transfer] = time.monotonic()
        self.popen.stdin.write(json.dumps({"do": do, "transfer": transfer}) + "\n")
        self.popen.stdin.flush()

    def end(self) -> None:
        """Kill it, and hear what it has said before."""
        self.popen.kill()
        self.popen.wait(T)
        self._reader.join(T)
        for stream in (self.popen.stdin, self.popen.stdout):
            assert stream is not None
            stream.close()


class Storm:
    """Transfers under way between engines that are killed."""

    def __init__(self, pool: Pool, seed: int) -> None:
        self.pool = pool
        self.random = random.Random(seed)
        self.engines = {name: Engine(pool, node) for name, node in ENGINES.items()}
        self.strikes: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.begun: list[int] = []
        self.longest = 0.0
        self._numbers = itertools.count(1)
        self._victims = iter(VICTIMS)

    def run(self, transfers: int, strike_every: int = 0) -> None:
        """Move so many prompts, and strike after every so many; ``ends`` says what became of them."""
        self.ends.clear()
        for number in itertools.islice(self._numbers, transfers):
            self.begun.append(number)
            wait_for(lambda: self._running() < AT_A_TIME, "others end", 2 * DEADLINE_S, 0.002)
            producer, consumer = self._any("p"), self._any("d")
            for do, name in self.random.sample((("produce", producer), ("consume", consumer)), 2):
                self.engines[name].begin(do, number)
                if self.random.random() < 0.2:
                    time.sleep(self.random.uniform(0, 0.02))
            if strike_every and number % strike_every == 0:
                self._strike(next(self._victims))
        wait_for(lambda: not self._running(), "all end", 2 * DEADLINE_S)
        for name in ENGINES:
            self._count(name)

    def close(self) -> None:
        for engine in self.engines.values():
            engine.end()

    def _any(self, side: str) -> str:
        return self.random.choice([name for name in ENGINES if name.startswith(side)])

    def _running(self) -> int:
        return sum(len(engine.running) for engine in self.engines.values())

    def _strike(self, victim: str) -> None:
        self.strikes[victim] += 1
        kind, _, name = victim.rpartition(" ")
        if kind:
            popen = self._process(name)
            popen.send_signal(signal.SIGSTOP)
            time.sleep(self.random.uniform(0.5, 2.0))
            popen.send_signal(signal.SIGCONT)
        elif victim in {"p", "d"}:
            name = self._any(victim)
            self.engines[name].end()
            self._count(name)
            self.engines[name] = Engine(self.pool, ENGINES[name])
        elif victim == "master":
            self.pool.master.kill()
            self.pool.start_master()
        else:
            self.pool.nodes[victim].kill()
            time.sleep(self.random.uniform(0, 0.3))
            self.pool.start_node(victim, wait=False)

    def _process(self, name: str) -> subprocess.Popen[Any]:
        if name in {"p", "d"}:
            return self.engines[self._any(name)].popen
        return (self.pool.master if name == "master" else self.pool.nodes[name]).popen

    def _count(self, name: str) -> None:
        """Take how an engine's transfers have ended; those that it had not ended when it was killed are lost."""
        engine = self.engines[name]
        for end, seconds in engine.ends.values():
            assert not end[:2].isupper(), end
            self.ends[f"{name[0]} {end}"] += 1
            if name.startswith("d") and not self.strikes["stop d"]:
                self.longest = max(self.longest, seconds)
        self.lost[name[0]] += len(engine.running)
        engine.ends.clear()
        engine.running.clear()


@pytest.fixture
def storm(bare_pool: Pool) -> Iterator[Storm]:
    """Return two engines that compute and two that take prompts, each pair at both of two nodes."""
    bare_pool.start_master("--default_kv_lease_ttl", "1s")
    for name in ("a", "b"):
        bare_pool.start_node(name)
    one = Storm(bare_pool, 1)
    try:
        yield one
    finally:
        one.close()


def check_nothing_left(storm: Storm) -> None:
    """Nothing is held, and of what was for one transfer alone nothing is there."""
    pool = storm.pool

    def over() -> bool:
        status = pool.status()
        return not (status.transfers or status.transfer_blocks or status.leases or status.leased_blocks)

    took = wait_for(over, "no transfer and no lease stands")
    wait_for(lambda: {pool.state(name) for name in ("a", "b")} == {"live"}, "both nodes are back")
    keys = b"".join(key for transfer in storm.begun for key in keys_of(transfer)[:-1])
    request = admin_pb2.EvictBlocksRequest(namespace=SPACE.digest, keys=keys)
    pool.admin().EvictBlocks(request, timeout=T)
    took += wait_for(lambda: not pool.blocks(), "what one transfer alone needed is gone", LEFT_S)
    for name in ("a", "b"):
        pool.wait_idle(name)
    say(f"nothing is left after {took:.1f} s")


def all_work(storm: Storm) -> bool:
    """Return whether prompts move between all engines again."""
    storm.run(8)
    return storm.ends["d right"] == 8 - storm.ends["p given up"]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_everything_is_killed_while_prompts_move(storm: Storm) -> None:
    """Producers, consumers, nodes and the master, killed or stopped: right bytes or a miss, in time, and no remains."""
    storm.run(TRANSFERS, STRIKE_EVERY)
    say(f"{dict(storm.strikes)}, lost {dict(storm.lost)}, longest {storm.longest:.1f} s")
    for end, count in sorted(storm.ends.items()):
        say(f"{count:5d} {end}")
    assert all(storm.strikes[victim] for victim in VICTIMS)
    taken = sum(count for end, count in storm.ends.items() if end.startswith("d "))
    assert taken + storm.lost["d"] == TRANSFERS
    assert storm.ends["d right"] > TRANSFERS // 3
    assert storm.longest < DEADLINE_S
    check_nothing_left(storm)
    wait_for(lambda: all_work(storm), "everybody has found the others again")
    storm.run(40)
    assert not storm.ends["p refused"]
    assert storm.ends["d right"] == 40 - storm.ends["p given up"], storm.ends
    check_nothing_left(storm)
