"""The program itself, with engines that can be killed."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import aiohttp
import pytest
from click.testing import CliRunner

from kvpool.cli import proxy
from kvpool.config import ProxySettings, load
from kvpool.errors import ConfigError, InvalidArgumentError
from kvpool.proxy.server import Proxy
from tests.integration.pool import Pool, wait_for
from tests.proxy.fake import COMPLETIONS

ROOT = Path(__file__).parent.parent.parent
DEADLINE_S = 20.0


@contextmanager
def engine(name: str, *in_pool: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a fake engine, of a pool where a master and a role are given; yields its process and address."""
    command = [sys.executable, "-m", "tests.proxy.fake", name, *in_pool]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, f"127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.kill()


@contextmanager
def running(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run kvpool-proxy; yields its process and URL."""
    command = [sys.executable, "-m", "kvpool.cli.proxy", "--host", "127.0.0.1", "--port", "0", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if found := re.search(r"listening on (\S+);", line):
                    break
            assert found
            yield process, f"http://{found[1]}"
        finally:
            process.kill()
            process.stderr.read()


async def ask(client: aiohttp.ClientSession, url: str, number: int) -> str:
    """Return how a request ended."""
    body = {"prompt": f"{number % 7} " * 500, "stream": bool(number % 3), "max_tokens": 20}
    try:
        async with asyncio.timeout(DEADLINE_S), client.post(url + COMPLETIONS, json=body) as response:
            got = await response.read()
    except aiohttp.ClientPayloadError:
        return "broken"
    except TimeoutError:
        return "never"
    if response.status != 200:
        return str(response.status)
    whole = got.rstrip().endswith(b"[DONE]") if body["stream"] else got.startswith(b"{")
    return "whole" if whole else "a lie"


async def load_and_kill(url: str, *victims: subprocess.Popen[str]) -> Counter[str]:
    """Send 200 requests, 20 at a time, and kill processes in their midst, one after the other."""
    waiting = list(victims)
    ends: Counter[str] = Counter()
    gate = asyncio.Semaphore(20)
    async with aiohttp.ClientSession() as client:

        async def one(number: int) -> None:
            async with gate:
                ends[await ask(client, url, number)] += 1
                if sum(ends.values()) % 60 == 0 and waiting:
                    waiting.pop().kill()

        await asyncio.gather(*(one(number) for number in range(200)))
        for number in range(20):
            assert await ask(client, url, number) == "whole"
    return ends


@pytest.mark.parametrize("divided", [None, "prefill", "decode"])
def test_an_engine_is_killed_in_the_midst_of_200_requests(divided):
    """Every request ends in time, whole or with an error, and those after are well."""
    with engine("a") as (one, a), engine("b") as (_, b), engine("c") as (two, c), engine("d") as (_, d):
        ports = [address.rpartition(":")[2] for address in (a, b, c, d)]
        flags = ["--instances", a, b, c, d]
        if divided:
            flags = ["--prefiller-ports", *ports[:2], "--decoder-ports", *ports[2:]]
        with running(*flags, "--health_interval", "200ms") as (process, url):
            ends = asyncio.run(load_and_kill(url, two if divided == "decode" else one))
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
    assert sum(ends.values()) == 200
    assert set(ends) <= {"whole", "broken"}
    assert ends["whole"] >= 170
    if divided == "prefill":
        assert ends["broken"] == 0


async def until_found(url: str, role: str, count: int) -> None:
    """Wait for the proxy to have found so many instances, each of them up."""
    async with asyncio.timeout(DEADLINE_S), aiohttp.ClientSession() as client:
        while True:
            async with client.get(f"{url}/instances") as answer:
                found = (await answer.json())[role]
            if sum(one["up"] and one["discovered"] for one in found) == count:
                return
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("victims", [("prefill",), ("decode",), ("prefill", "decode"), ("master", "prefill")], ids=str)
def test_processes_are_killed_in_the_midst_of_200_requests_at_once(tmp_path, victims):
    """Prefill and decode run side by side, found through a master: every request ends, and no transfer is left."""
    pool = Pool(tmp_path)
    pool.start_master()
    names = {"p0": "kv_producer", "p1": "kv_producer", "d0": "kv_consumer", "d1": "kv_consumer"}
    with ExitStack() as stack:
        stack.callback(pool.close)
        engines = {name: stack.enter_context(engine(name, pool.address, role))[0] for name, role in names.items()}
        processes = {"prefill": engines["p0"], "decode": engines["d0"], "master": pool.master.popen}
        flags = ("--master", pool.address, "--health_interval", "200ms")
        process, url = stack.enter_context(running(*flags))
        for role in ("prefill", "decode"):
            asyncio.run(until_found(url, role, 2))
        ends = asyncio.run(load_and_kill(url, *(processes[victim] for victim in reversed(victims))))
        if "master" in victims:
            pool.start_master()
        with urllib.request.urlopen(f"{url}/metrics", timeout=DEADLINE_S) as answer:
            page = answer.read().decode()
        begun = re.search(r'decode_starts_total\{when="with_prefill"\} (\S+)', page)
        assert begun
        assert float(begun[1]) >= 200
        wait_for(lambda: not pool.status().transfers, "no transfer is left")
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    assert sum(ends.values()) == 200
    assert set(ends) <= {"whole", "broken"}
    assert ends["whole"] >= 170
    if "decode" not in victims:
        assert ends["broken"] == 0


def test_the_end_waits_for_a_request_but_not_forever():
    """SIGTERM: what runs may go on within its time, then it ends, and so does the program."""

    async def story(process: subprocess.Popen[str], url: str) -> bytes:
        body = {"prompt": "p", "stream": True}
        async with aiohttp.ClientSession() as client, client.post(url + COMPLETIONS, json=body) as response:
            got = await response.content.readany()
            process.send_signal(signal.SIGTERM)
            return got + await response.content.read()

    with engine("a") as (_, address), running("--instances", address, "--drain-timeout", "5s") as (process, url):
        got = asyncio.run(story(process, url))
        assert got.rstrip().endswith(b"[DONE]")
        assert process.wait(10) == 0


class TestTheCommandLine:
    @pytest.fixture
    def started(self, monkeypatch):
        calls = []
        monkeypatch.setattr("kvpool.proxy.server.run", lambda settings, notes: calls.append(settings) or 0)
        return calls

    def run(self, *arguments):
        return CliRunner().invoke(proxy.command, arguments)

    def test_the_seeds_flags(self, started):
        """Several values after one flag, in either spelling."""
        prefill = ("--prefiller-hosts", "h1", "h1", "--prefiller-ports", "9000", "9001")
        decode = ("--decoder-hosts", "h2", "::1", "--decoder_ports", "9000", "9001")
        result = self.run("--host", "0.0.0.0", "--port", "7850", *prefill, *decode)
        assert result.exit_code == 0, result.output
        assert started[0].urls("prefiller") == ("http://h1:9000", "http://h1:9001")
        assert started[0].urls("decoder") == ("http://h2:9000", "http://[::1]:9001")
        assert started[0].port == 7850

    @pytest.mark.parametrize(
        "words",
        [
            ["--instances", "a:1", "b:2"],
            ["--instances=a:1", "b:2"],
            ["--instances", "a:1,b:2"],
            ["--port", "1", "--instances", "http://a:1/", "b:2", "--insecure"],
        ],
    )
    def test_instances(self, started, words):
        """With or without a scheme."""
        result = self.run(*words)
        assert result.exit_code == 0, result.output
        assert started[0].instances == ("http://a:1", "http://b:2")

    def test_one_value_leaves_out_the_s(self, started):
        """As a seed's command line has it, for which its proxy's parser took any beginning of a flag."""
        result = self.run(
            "--host", "127.0.0.1", "--port", "0", "--prefiller-host", "192.0.0.1", "--prefiller-port", "13700",
            "--decoder-hosts", "192.0.0.2", "192.0.0.3", "--decoder-port=13700", "13701",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert started[0].prefiller_ports == (13700,)
        assert started[0].decoder_ports == (13700, 13701)

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (["--prefiller-ports", "1", "2", "--prefiller-hosts", "h", "--decoder-ports", "3"], "prefiller_ports"),
            (["--prefiller-hosts", "h"], "prefiller_hosts"),
            (["--prefiller-ports", "1"], "prefiller_ports"),
            (["--decoder-ports", "0"], "decoder_ports"),
            (["--decoder-ports"], "decoder_ports"),
            (["--instances", "ftp://h:1"], "instances"),
            (["--instances", "h:1", "--decoder-ports", "1"], "instances"),
            (["--policy", "best"], "policy"),
            (["--queue-max", "-1"], "queue_max"),
            (["7"], "7"),
        ],
    )
    def test_what_is_wrong_is_named(self, started, words, told):
        """In one line, with exit code 2."""
        result = self.run(*words)
        assert result.exit_code == 2
        assert told in result.output.splitlines()[-1]
        assert not started

    def test_a_file_and_the_environment_say_the_same(self, tmp_path):
        """Lists in a file, blanks or commas in the environment."""
        path = tmp_path / "proxy.yaml"
        path.write_text("decoder_ports: [1, 2]\nprefiller_ports: 3\n")
        loaded = load(ProxySettings, flags={}, config_path=str(path), environ={"KVPOOL_PREFILLER_HOSTS": "h"})
        assert loaded.settings.urls("prefiller") == ("http://h:3",)
        assert loaded.settings.urls("decoder") == ("http://127.0.0.1:1", "http://127.0.0.1:2")
        with pytest.raises(ConfigError, match="instances"):
            load(ProxySettings, flags={}, environ={"KVPOOL_INSTANCES": "a:1, b"})




def test_the_page_names_every_setting():
    """With its default and what it is for."""
    page = (ROOT / "docs" / "proxy.md").read_text(encoding="utf-8")
    for item in dataclasses.fields(ProxySettings):
        shown = str(item.metadata["shown"] or "none")
        shown = shown.lower() if shown in {"True", "False"} else shown
        assert f"| `{item.name}` | {shown} | {item.metadata['help']} |" in page


def test_a_host_that_is_not_ours_is_named():
    """Not the port, which is none of the trouble."""

    async def start() -> None:
        server = Proxy(ProxySettings(host="192.0.2.7", port=0))
        try:
            with pytest.raises(InvalidArgumentError, match=r"^host: cannot listen on 192\.0\.2\.7:0"):
                await server.start()
        finally:
            await server.close()

    asyncio.run(start())
