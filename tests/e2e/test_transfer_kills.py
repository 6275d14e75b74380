"""Kill -9 of everything in turn, in the middle of 200 requests to real engines that prefill here and decode there.

Every request ends in time, with the tokens of a single engine or an error; afterwards nothing is held anywhere,
nothing is left of what was of use to one transfer alone, and new requests take the same way again.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from kvpool.bench.ttft_engines import EngineSpec, end_groups, engine_python, kvpool_transfer, read_model
from kvpool.proxy.chains import block_keys, can_hash
from kvpool.rpc.convert import namespace_from_proto
from kvpool.rpc.v1 import admin_pb2
from kvpool.server.launch import Child, Children, StartError
from tests.e2e.conftest import MARGIN_MIN
from tests.e2e.test_proxy import ASK_S, AT_ONCE, HOST, MOVED, START_S, Server, margin
from tests.integration.pool import Pool, Process, free_port, say, wait_for

BLOCK_TOKENS = 32
REQUESTS = 200
NEXT = 12
AT_A_TIME = 16
TOKENS = 8
KILL_AFTER = 50
"""Answers."""

STOPPED_S = 5.0
PAUSE_S = 0.5
"""Of a client that was told no, before it asks for something else."""

DEADLINE_S = 45.0
TRANSFER_TTL_S = 10
LEFT_S = 60.0
"""What is of use to one transfer alone is looked for again 1, 5 and 30 s after its end."""

NODES = {"p0": "a", "p1": "a", "d0": "a", "d1": "b"}
"""Each engine's node: what is prefilled is fetched through shared memory by one, by TCP by the other."""

PROXIES = {"at_once": "auto", "after": "after_prefill"}
SEGMENT = 256 << 20

LAST_WORDS = ("EngineCore encountered a fatal error", "EngineCore failed to start", "output_handler failed")
"""What an engine's log says before all the errors that follow from that."""

WORDS_SHOWN = 60

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Asked:
    """A prompt, and what a single engine says to it."""

    prompt: list[int]
    text: str
    stream: bool

    @property
    def body(self) -> dict[str, Any]:
        return body_of(self.prompt) | {"stream": self.stream}


def body_of(prompt: list[int]) -> dict[str, Any]:
    return {"model": "bench", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}


def some_prompts(rng: random.Random, count: int) -> list[list[int]]:
    """Return prompts of all lengths: shorter than a block, whole blocks, long ones, with a beginning in common."""
    tokens = range(3, 4096)
    shared = [rng.choices(tokens, k=length) for length in (128, 300, 512)]
    prompts = []
    for _ in range(count):
        own = rng.choices(tokens, k=rng.choice((7, 30, BLOCK_TOKENS, 100, 160, 250, 400, 700)))
        prompts.append((rng.choice(shared) if rng.random() < 0.3 else []) + own)
    return prompts


class Load:
    """Requests to an address, some at once, and how they end."""

    def __init__(self, address: Callable[[], str]) -> None:
        self.ends: Counter[str] = Counter()
        self.ended = 0
        self.seconds: list[float] = []
        self.in_the_middle = asyncio.Event()
        self._address = address

    async def run(self, asked: list[Asked]) -> None:
        """Ask all of them."""
        todo = iter(asked)
        timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:

            async def client() -> None:
                for one in todo:
                    start = time.monotonic()
                    end = await self._ask(session, one)
                    self.seconds.append(time.monotonic() - start)
                    self.ends[end] += 1
                    self.ended += 1
                    if self.ended == KILL_AFTER:
                        self.in_the_middle.set()
                    if end != "right":
                        await asyncio.sleep(PAUSE_S)

            await asyncio.gather(*(client() for _ in range(AT_A_TIME)))

    async def _ask(self, session: aiohttp.ClientSession, asked: Asked) -> str:
        data = b""
        try:
            url = f"http://{self._address()}/v1/completions"
            async with session.post(url, json=asked.body) as answer:
                async for chunk in answer.content.iter_any():
                    data += chunk
        except TimeoutError:
            return "late"
        except (aiohttp.ClientError, OSError) as error:
            return "broken stream" if b'"error"' in data else f"broken: {type(error).__name__}"
        if answer.status != 200:
            return f"status {answer.status}" if json.loads(data)["error"]["message"] else "status without a word"
        if not asked.stream:
            return "right" if json.loads(data)["choices"][0]["text"] == asked.text else "wrong"
        events = [event.removeprefix("data: ") for event in data.decode().split("\n\n") if event]
        if events[-1:] != ["[DONE]"]:
            return "cut"
        if any('"error"' in event for event in events):
            return "broken stream"
        text = "".join(choice["text"] for event in events[:-1] for choice in json.loads(event)["choices"])
        return "right" if text == asked.text else "wrong"

    @property
    def errors(self) -> int:
        """Those that ended honestly, without an answer."""
        return self.ended - self.ends["right"]


class Site:
    """A pool, engines and proxies, of which each can be killed and started again."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._folder = folder
        self._model = read_model(model)
        self._python = engine_python(sys.executable, "python")
        self._log = folder / "engines.log"
        self._children = Children(self._write_down)
        self._running: dict[str, Child] = {}
        self.servers = {name: Server(free_port()) for name in (*NODES, *PROXIES)}
        self.proxies: dict[str, Process] = {}
        self.pool = Pool(folder)
        self._asked: set[tuple[int, ...]] = set()

    def start(self) -> None:
        """Start everything."""
        self.pool.start_master()
        for name in ("a", "b"):
            self.pool.start_node(name, "--segment_size", str(SEGMENT))
        for name in NODES:
            self.start_engine(name)
        for name in PROXIES:
            self.start_proxy(name)
        self.wait_found()

    def close(self) -> None:
        children, self._children.children = self._children.children, []
        end_groups(children)
        self.pool.close()

    # ---- engines ---------------------------------------------------------------------------------------

    def _write_down(self, line: str) -> None:
        with self._log.open("a") as log:
            log.write(f"{line}\n")

    def check_engines(self) -> None:
        """No engine has ended, nor is about to, other than those that were killed."""
        lines = self._log.read_text().splitlines()
        died = [number for number, line in enumerate(lines) if any(words in line for words in LAST_WORDS)]
        name = lines[died[0]].partition(": ")[0] if died else ""
        assert not died, "\n".join([line for line in lines[died[0]:] if line.startswith(f"{name}: ")][:WORDS_SHOWN])
        self._children.check()

    def start_engine(self, name: str) -> None:
        """Begin to start an engine, where it was before."""
        home = self._folder / name
        home.mkdir(exist_ok=True)
        more = {"gate": "off", "use_layerwise": True, "lookup_timeout": "2s", "transfer_ttl": f"{TRANSFER_TTL_S}s"}
        role = "kv_producer" if name in {"p0", "p1"} else "kv_consumer"
        transfer = kvpool_transfer(self.pool.address, self.pool.socket_path(NODES[name]), more) | {"kv_role": role}
        cores = sorted(os.sched_getaffinity(0))
        own = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": str(cores[len(self._running) % len(cores)])}
        spec = EngineSpec(
            name, self._python, self._model, 400, BLOCK_TOKENS, 4096, transfer, own, resettable=True
        )  # fmt: skip
        port = int(self.servers[name].address.rpartition(":")[2])
        command = spec.command(port, home)
        self._running[name] = self._children.start(name, "kvpool.bench.ttft_exec", command)

    def start_proxy(self, name: str) -> None:
        """Begin to start a proxy, where it was before."""
        self.proxies[name] = self.pool.adopt(name, (
            "kvpool.cli.proxy", "--host", HOST, "--port", self.servers[name].address.rpartition(":")[2],
            "--master", self.pool.address, "--decode_start", PROXIES[name], "--health_interval", "1s",
            "--first_byte_timeout", "20s", "--idle_timeout", "10s", "--request_timeout", "40s",
        ))  # fmt: skip

    def wait_found(self) -> None:
        """Wait until every proxy has found every engine that runs, and no other."""
        expected = {f"http://{self.servers[name].address}" for name in self._running}
        deadline = time.monotonic() + START_S

        def found() -> bool:
            return all(self.servers[name].is_healthy() and self.servers[name].found() == expected for name in PROXIES)

        try:
            self._children.wait_until(found, "the proxies do not find the engines", deadline)
        except StartError:
            self.check_engines()  # which may know why
            raise

    def need(self, *names: str) -> None:
        """See to it that these engines run, and no others."""
        for name in NODES:
            if name in names and name not in self._running:
                self.start_engine(name)
            elif name not in names and name in self._running:
                self.kill_engine(name)
        self.wait_found()

    def signal_engine(self, name: str, number: signal.Signals) -> None:
        """Send a signal to all processes of an engine."""
        os.killpg(self._running[name].process.pid, number)

    def kill_engine(self, name: str) -> None:
        """Kill -9 all processes of an engine."""
        child = self._running.pop(name)
        self._children.children.remove(child)
        os.killpg(child.process.pid, signal.SIGKILL)
        child.process.wait(30)

    def engines(self, side: str) -> list[Server]:
        """Return those that run of one side, "p" or "d"."""
        return [self.servers[name] for name in self._running if name.startswith(side)]

    # ---- requests --------------------------------------------------------------------------------------

    def storm(self, proxy: str, asked: list[Asked], strike: Callable[[], None] | None = None) -> Load:
        """Ask a proxy all of these; strike when some were answered, and others are under way."""
        load = Load(lambda: self.servers[proxy].address)
        self._asked |= {tuple(one.prompt) for one in asked}

        async def story() -> None:
            asking = asyncio.create_task(load.run(asked))
            if strike is not None:
                await load.in_the_middle.wait()
                await asyncio.to_thread(strike)
            await asking

        started = time.monotonic()
        asyncio.run(story())
        longest = ", ".join(f"{seconds:.1f}" for seconds in sorted(load.seconds)[-4:])
        say(f"{proxy}: {dict(load.ends)} in {time.monotonic() - started:.1f} s, the longest {longest} s")
        self.check_engines()
        assert load.ended == len(asked)
        assert not {"wrong", "cut", "late", "status without a word"} & load.ends.keys(), load.ends
        return load

    # ---- what is left ----------------------------------------------------------------------------------

    def check_nothing_left(self) -> None:
        """No transfer, lease, reservation, pin or block of an engine is held, nor is a block of a dead transfer there.

        Empties every cache.
        """
        pool = self.pool

        def over() -> bool:
            status = pool.status()
            return not (status.transfers or status.transfer_blocks or status.leases or status.leased_blocks)

        took = wait_for(over, f"no transfer and no lease stands: {pool.status()}", LEFT_S, 0.1)
        for name in self._running:
            server = self.servers[name]
            for gauge in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
                wait_for(lambda s=server, g=gauge: not s.metric(g), f"{gauge} of {name} is 0", LEFT_S, 0.1)  # type: ignore[misc]
            wait_for(
                lambda s=server: json.loads(s.post("/reset_prefix_cache", {}))["success"],  # type: ignore[misc]
                f"{name} holds no block", LEFT_S, 0.1,
            )  # fmt: skip
        for proxy in PROXIES:
            wait_for(lambda s=self.servers[proxy]: running(s) == 0, f"nothing runs at {proxy}", LEFT_S, 0.1)  # type: ignore[misc]
        self._evict_whole_blocks()
        took += wait_for(lambda: not pool.blocks(), "what one transfer alone needed is gone", LEFT_S, 0.1)
        for name in ("a", "b"):
            pool.wait_idle(name, SEGMENT)
        say(f"nothing is left after {took:.1f} s")

    def _evict_whole_blocks(self) -> None:
        """Evict what is there for everybody: the rest was for one transfer only."""
        admin = self.pool.admin()
        for space in admin.Namespaces(admin_pb2.NamespacesRequest(), timeout=ASK_S).namespaces:
            namespace = namespace_from_proto(space.descriptor)
            if not space.blocks or not can_hash(namespace):
                continue
            keys = b"".join(block_keys(namespace, prompt) for prompt in self._asked)
            request = admin_pb2.EvictBlocksRequest(namespace=space.digest, keys=keys)
            admin.EvictBlocks(request, timeout=ASK_S)

    def check_works(self, proxy: str, asked: list[Asked]) -> None:
        """New requests are prefilled here and decoded there."""
        opened = self.pool.status().counters["transfers.opened"]
        before = sum(server.metric(MOVED) for server in self.engines("d"))
        assert self.storm(proxy, asked).errors == 0
        assert self.pool.status().counters["transfers.opened"] - opened == len(asked)
        moved = sum(server.metric(MOVED) for server in self.engines("d")) - before
        assert moved >= sum(len(one.prompt) for one in asked) // 2


def running(proxy: Server) -> int:
    """Return how many requests run at a proxy's instances."""
    return sum(one["requests"] for role in json.loads(proxy.get("/instances")).values() for one in role)


def sure_of(server: Server, rng: random.Random, count: int) -> list[Asked]:
    """Return prompts that an engine answers with a clear margin, all by itself."""
    found: list[Asked] = []

    async def ask(session: aiohttp.ClientSession, prompts: Iterator[list[int]]) -> None:
        for prompt in prompts:
            body = body_of(prompt) | {"logprobs": 2}
            async with session.post(f"http://{server.address}/v1/completions", json=body) as answer:
                choice = (await answer.json())["choices"][0]
            if margin(choice) >= MARGIN_MIN:
                found.append(Asked(prompt, choice["text"], rng.random() < 0.5))

    async def ask_all() -> None:
        async with aiohttp.ClientSession() as session:
            while len(found) < count:
                prompts = iter(some_prompts(rng, 100))
                await asyncio.gather(*(ask(session, prompts) for _ in range(8)))

    asyncio.run(ask_all())
    return found[:count]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Site]:
    """Return two engines that prefill and two that decode, two nodes, and two proxies that ask them differently."""
    one = Site(tmp_path_factory.mktemp("k"), model)
    try:
        one.start()
        yield one
    finally:
        one.close()


@pytest.fixture(scope="module")
def all_asked(site: Site) -> list[Asked]:
    """Return prompts and what a single engine, which has not seen them, answers."""
    asked = sure_of(site.engines("d")[0], random.Random(5), REQUESTS + NEXT)
    site.check_nothing_left()
    assert not site.pool.status().counters["transfers.opened"]
    return asked


@pytest.fixture
def asked(all_asked: list[Asked]) -> list[Asked]:
    """Return those that are asked while somebody is killed."""
    return all_asked[NEXT:]


@pytest.fixture
def more(all_asked: list[Asked]) -> list[Asked]:
    """Return those that are asked afterwards."""
    return all_asked[:NEXT]


def test_a_prefill_engine_dies_in_the_middle_of_at_once(site: Site, asked: list[Asked], more: list[Asked]) -> None:
    """The decode engines wait for layers that never come; another engine prefills, and every client is answered."""
    site.need("p0", "p1", "d0", "d1")
    started = site.servers["at_once"].metric(AT_ONCE)
    load = site.storm("at_once", asked, lambda: site.kill_engine("p0"))
    assert load.errors == 0
    assert site.servers["at_once"].metric(AT_ONCE) - started > REQUESTS // 2
    site.check_nothing_left()
    site.check_works("at_once", more)


def test_a_decode_engine_dies_in_the_middle_of_at_once(site: Site, asked: list[Asked], more: list[Asked]) -> None:
    """Streams that had begun break; all others are answered by the other engine."""
    site.need("p1", "d0", "d1")
    load = site.storm("at_once", asked, lambda: site.kill_engine("d0"))
    assert load.errors == load.ends["broken stream"] <= AT_A_TIME
    site.check_nothing_left()
    site.check_works("at_once", more)


def test_a_node_dies(site: Site, asked: list[Asked], more: list[Asked]) -> None:
    """What it held is computed again; a new one in its place is used by the engines that run."""
    site.need("p1", "d1")

    def strike() -> None:
        site.pool.nodes["a"].kill()
        site.pool.start_node("a")

    assert site.storm("after", asked, strike).errors == 0
    site.check_nothing_left()
    site.check_works("after", more)


def test_the_master_dies(site: Site, asked: list[Asked], more: list[Asked]) -> None:
    """Nobody waits for it; the next one learns what its predecessor knew."""
    site.need("p1", "d1")

    def strike() -> None:
        site.pool.master.kill()
        site.pool.start_master()

    assert site.storm("after", asked, strike).errors == 0
    site.check_nothing_left()
    site.check_works("after", more)


@pytest.mark.parametrize("proxy", PROXIES)
def test_a_proxy_dies(site: Site, asked: list[Asked], more: list[Asked], proxy: str) -> None:
    """Its clients see their connections end; the engines notice, and let go of everything."""
    site.need("p1", "d1")

    def strike() -> None:
        site.proxies[proxy].kill()
        site.start_proxy(proxy)

    load = site.storm(proxy, asked, strike)
    assert load.ends["right"] > KILL_AFTER
    assert {end.partition(":")[0] for end in load.ends} <= {"right", "broken", "status 503"}
    site.wait_found()
    site.check_nothing_left()
    site.check_works(proxy, more)


@pytest.mark.parametrize("victim", ["node", "prefill engine"])
def test_somebody_stands_still(site: Site, asked: list[Asked], more: list[Asked], victim: str) -> None:
    """For five seconds; nobody waits for longer, and afterwards all goes on."""
    site.need("p1", "d1")
    node = site.pool.nodes["a"]

    def strike() -> None:
        if victim == "node":
            with node.stopped():
                time.sleep(STOPPED_S)
        else:
            site.signal_engine("p1", signal.SIGSTOP)
            time.sleep(STOPPED_S)
            site.signal_engine("p1", signal.SIGCONT)

    assert site.storm("after", asked, strike).errors == 0
    site.wait_found()
    site.check_nothing_left()
    site.check_works("after", more)


def test_the_last_prefill_engine_dies(site: Site, asked: list[Asked], more: list[Asked]) -> None:
    """The decode engines compute; one that is started in its place is found and used."""
    site.need("p1", "d1")
    load = site.storm("after", asked, lambda: site.kill_engine("p1"))
    assert load.errors == 0
    site.check_nothing_left()
    site.need("p1", "d1")
    site.check_works("after", more)


def test_the_last_decode_engine_dies(site: Site, asked: list[Asked], more: list[Asked]) -> None:
    """Nobody can answer, and clients are told so at once, until another one is there."""
    site.need("p1", "d1")
    load = site.storm("after", asked, lambda: site.kill_engine("d1"))
    assert load.ends["right"] >= KILL_AFTER
    assert {end.partition(" ")[0] for end in load.ends} <= {"right", "broken", "status"}
    site.check_nothing_left()
    site.need("p1", "d0")
    site.check_works("after", more)
