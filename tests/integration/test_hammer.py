"""The hammer: many clients at once on far too little memory, calm and with everything being killed."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.integration.hammer import SPACES, TOTAL_BYTES
from tests.integration.pool import Pool, Process, chain_of, get_chain, put_chain, say, wait_for

OVERSUBSCRIPTION = 3
# Some that verify, some that would hand on whatever the node's protocol lets through; one without a node.
CLIENTS = (("a", "always"), ("b", "transfer"), ("a", "transfer"), ("-", "always"))


class Hammer:
    """The client processes."""

    def __init__(self, pool: Pool, seconds: float) -> None:
        self.pool = pool
        self.end = time.monotonic() + seconds
        self.numbers = itertools.count()
        self.running: dict[int, Process] = {}
        self.outputs: list[Path] = []
        for place in range(len(CLIENTS)):
            self.start(place)

    def start(self, place: int) -> None:
        """Start a client for the rest of the time."""
        number = next(self.numbers)
        node, checksum = CLIENTS[place]
        output = self.pool.directory / f"hammer{number}.json"
        socket_path = node if node == "-" else self.pool.socket_path(node)
        left = max(1.0, self.end - time.monotonic())
        arguments = ("tests.integration.hammer", self.pool.address, socket_path, str(output), str(number), str(left))
        self.running[place] = self.pool.adopt(f"hammer{number}", (*arguments, checksum))
        self.outputs.append(output)

    def join(self) -> Counter[str]:
        """Wait for all to end by themselves, and return their counts together."""
        total: Counter[str] = Counter()
        for process in self.running.values():
            wait_for(lambda p=process: not p.alive, f"{process.name} ends", self.end - time.monotonic() + 30)  # type: ignore[misc]
            assert process.popen.returncode == 0, f"{process.name}:\n{process.words()}"
        for output in self.outputs:
            if output.exists():  # not of those that were killed
                report = json.loads(output.read_text())
                assert not report["errors"], report
                total.update(report["counts"])
        for name, count in sorted(total.items()):
            say(f"{count:10d} {name}")
        return total


@pytest.fixture
def small_pool(bare_pool: Pool) -> Pool:
    """Return a pool that holds a third of what the clients store."""
    segment = TOTAL_BYTES // OVERSUBSCRIPTION // 2
    bare_pool.start_master()
    for name in ("a", "b"):
        bare_pool.start_node(name, "--segment_size", str(segment))
    return bare_pool


def still_works(pool: Pool) -> None:
    """Nothing stays pinned, reserved or quarantined, all memory can be used, and a chain goes through."""
    segment = TOTAL_BYTES // OVERSUBSCRIPTION // 2
    for name in ("a", "b"):
        wait_for(lambda name=name: pool.state(name) == "live", f"{name} is live")
        pool.wait_idle(name, segment // 4096 * 4096)
    space, size = next(iter(SPACES.items()))
    keys = chain_of(1000, 32)
    for name in ("a", "b"):
        client = pool.client(name)
        put_chain(client, space, keys, size)
        wait_for(lambda c=client: c.lookup(space, keys).reason == "complete", "the chain is known")  # type: ignore[misc]
        assert get_chain(client, space, keys, size).prefix == len(keys)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_hammer(small_pool: Pool, request: pytest.FixtureRequest) -> None:
    """Put, get, look up and evict at three times the memory: never a wrong byte, no put without room."""
    pool = small_pool
    hammer = Hammer(pool, request.config.getoption("hammer_seconds"))
    counts = hammer.join()
    assert counts["checked"] and counts["got local"] and counts["got remote"] and counts["stored"]
    assert not counts["missed corrupt"]
    failed = {name: count for name, count in counts.items() if name.startswith("put failed")}
    # The node may be kept from running for the half second after which a client goes on without it.
    assert failed.pop("put failed unavailable", 0) < counts["stored"] / 20, counts
    assert not failed, failed
    still_works(pool)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_hammer_while_everything_is_killed(small_pool: Pool, request: pytest.FixtureRequest) -> None:
    """Kill -9 of master, nodes and clients in turn: never a wrong byte, and all recovers by itself."""
    pool = small_pool
    hammer = Hammer(pool, request.config.getoption("hammer_seconds"))
    choice = random.Random(1)
    kills: Counter[str] = Counter()
    for victim in itertools.cycle(("client", "master", "client", "a", "client", "b")):
        time.sleep(choice.uniform(0.5, 1.5))
        if time.monotonic() > hammer.end - 3:
            break
        kills[victim] += 1
        if victim == "client":
            place = choice.randrange(len(CLIENTS))
            hammer.running[place].kill()
            hammer.start(place)
        elif victim == "master":
            pool.master.kill()
            time.sleep(choice.uniform(0, 0.5))
            pool.start_master()
        else:
            pool.nodes[victim].kill()
            time.sleep(choice.uniform(0, 0.5))
            pool.start_node(victim)
    say(f"killed: {dict(kills)}")
    counts = hammer.join()
    assert counts["checked"] and counts["got local"] and counts["got remote"] and counts["stored"]
    assert not counts["missed corrupt"]
    still_works(pool)
