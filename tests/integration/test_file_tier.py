"""Blocks in files, with real processes: written behind, found again, shared, and gone without anybody waiting."""

from __future__ import annotations

import os
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kvpool import Client
from kvpool.client_results import GetResult
from kvpool.rpc.v1 import admin_pb2
from kvpool.rpc.v1.node_pb2 import NodeFrame, NodeFrameReply, Pin, Prefetch
from tests.integration.pool import (
    SPACE,
    Pool,
    T,
    chain_of,
    content_of,
    free_port,
    get_chain,
    put_chain,
    wait_for,
)

SIZE = 256 << 10
SMALL = 16 << 20
"""A segment that holds some sixty blocks."""


class FilePool:
    """A pool with nodes on one directory, and a look into that directory."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.root = pool.directory / "files"
        self.metrics: dict[str, int] = {}

    def start_master(self) -> None:
        self.pool.start_master("--data_dir", str(self.pool.directory / "catalog"))

    def start_node(self, name: str, *more: str, segment: int = SMALL) -> None:
        self.metrics[name] = free_port()
        self.pool.start_node(
            name, "--segment_size", str(segment), "--storage_backends", str(self.root),
            "--metrics_port", str(self.metrics[name]), *more,
        )  # fmt: skip

    def files(self) -> list[Path]:
        return [path for path in self.root.glob("blocks/*/*/*") if not path.name.startswith(".")]

    def counted(self, name: str, metric: str, **labels: str) -> float:
        """Return a metric's sum over the labels that are not given."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics[name]}/metrics", timeout=T) as page:
            lines = page.read().decode().splitlines()
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if line.split("{")[0] == metric and all(part in line for part in wanted)
        )

    def event(self, name: str, event: str) -> float:
        return self.counted(name, "kvpool_storage_events_total", event=event)

    def known(self) -> int:
        """Return of how many blocks the master knows that they are in files."""
        reply: admin_pb2.BackendsResponse = self.pool.admin().Backends(
            admin_pb2.BackendsRequest(), timeout=T, wait_for_ready=True
        )
        return sum(backend.blocks for backend in reply.backends)

    def scanned(self) -> None:
        """Wait until the master has had the new directory looked through."""
        admin, request = self.pool.admin(), admin_pb2.BackendsRequest()
        wait_for(lambda: self.pool.status().counters["scans_asked"] == 1, "the master asks")
        wait_for(lambda: not any(b.scanning for b in admin.Backends(request, timeout=T).backends), "and is answered")

    def fill(self, client: Client, keys: list[bytes], size: int = SIZE) -> None:
        """Store blocks, slowly enough that each is in its file before memory needs its place; all are acknowledged."""
        for at in range(0, len(keys), 16):
            put_chain(client, SPACE, keys[at : at + 16], size)
            written = at + len(keys[at : at + 16])
            wait_for(lambda written=written: len(self.files()) >= written, f"{written} files are written")
        wait_for(lambda: self.known() >= len(keys), "the master knows them")
        wait_for(lambda: self.counted("a", "kvpool_storage_unacknowledged") == 0, "and will not forget them")


@pytest.fixture
def fs(bare_pool: Pool) -> FilePool:
    """Return a master with a catalog and one node "a" with a small memory and a directory."""
    files = FilePool(bare_pool)
    files.start_master()
    files.start_node("a")
    return files


def test_four_times_the_memory_is_found_and_right(fs: FilePool) -> None:
    """What memory has no room for is a hit in files, read back with the right bytes, and promoted."""
    client = fs.pool.client("a")
    keys = chain_of(1, 4 * SMALL // SIZE)
    fs.fill(client, keys)
    result = get_chain(client, SPACE, keys, SIZE)
    assert result.prefix == len(keys), result
    assert result.tiers["fs"] >= len(keys) // 2
    wait_for(
        lambda: get_chain(client, SPACE, keys[-16:], SIZE).tiers == {"local": 16}, "they are in memory, and known to be"
    )


def test_everything_killed_and_every_acknowledged_block_found(fs: FilePool) -> None:
    """Kill -9 of master and node: whatever was a hit in files is one again, with its bytes."""
    client = fs.pool.client("a")
    keys = chain_of(2, 100)
    fs.fill(client, keys)
    fs.pool.nodes["a"].kill()
    fs.pool.master.kill()
    fs.pool.start_master()
    fs.pool.start_node("a")
    client = fs.pool.client("a")
    wait_for(lambda: client.lookup(SPACE, keys).prefix == len(keys), "all are found again")
    result = get_chain(client, SPACE, keys, SIZE)
    assert result.prefix == len(keys), result
    assert result.tiers == {"fs": len(keys)}


def test_a_node_that_is_asked_to_end_loses_nothing(fs: FilePool) -> None:
    """SIGTERM right after the last put: all of it is in files, and the master knows, before the process ends."""
    client = fs.pool.client("a")
    keys = chain_of(3, 50)
    put_chain(client, SPACE, keys, SIZE)
    assert fs.pool.nodes["a"].end() == 0
    assert len(fs.files()) == len(keys)
    wait_for(lambda: fs.known() == len(keys), "the master was told")


def test_a_file_that_nobody_reported_is_found_after_a_death(fs: FilePool) -> None:
    """Kill -9 between a file's rename and the master's word: the node looks for it when it is back, and only then."""
    client = fs.pool.client("a")
    fs.fill(client, chain_of(60, 16))
    fs.scanned()
    keys = chain_of(61, 24)
    with fs.pool.master.stopped():
        put_chain(client, SPACE, keys, SIZE)
        wait_for(lambda: len(fs.files()) == 40, "they are written, and nobody can be told")
        fs.pool.nodes["a"].kill()
        fs.pool.master.kill()  # or it would read what the dead one has sent
    fs.start_master()
    wait_for(lambda: fs.known() == 16, "the catalog is read, which knows nothing of them")
    fs.start_node("a")
    wait_for(lambda: fs.known() == 40, "the master knows all of them")
    client = fs.pool.client("a")
    result = get_chain(client, SPACE, keys, SIZE)
    assert result.prefix == len(keys), result
    assert result.tiers == {"fs": len(keys)}
    assert fs.event("a", "scans") == 1
    assert fs.pool.status().counters["scans_asked"] == 0


def test_an_end_in_order_leaves_nothing_to_look_for(fs: FilePool) -> None:
    """The next node begins without a scan; one whose master was away at the end does not."""
    keys = chain_of(62, 16)
    fs.fill(fs.pool.client("a"), keys)
    fs.scanned()
    (mark,) = (fs.root / "writers").iterdir()
    assert fs.pool.nodes["a"].end() == 0
    assert not mark.exists()
    fs.start_node("a")
    client = fs.pool.client("a")
    wait_for(lambda: client.lookup(SPACE, keys).prefix == len(keys), "all are found")
    put_chain(client, SPACE, chain_of(63, 4), SIZE)
    wait_for(lambda: fs.known() == 20, "the master knows the new ones, too")
    assert fs.event("a", "scans") == 0
    with fs.pool.master.stopped():
        put_chain(client, SPACE, chain_of(64, 4), SIZE)
        assert fs.pool.nodes["a"].end() == 0
    assert len(list((fs.root / "writers").iterdir())) == 1
    fs.start_node("a")
    wait_for(lambda: fs.known() == 24, "the master knows what it could not be told")


def test_a_lost_catalog_is_rebuilt_from_the_directory(fs: FilePool) -> None:
    """A new master, with nothing but the name of its node, knows the files after a scan."""
    client = fs.pool.client("a")
    keys = chain_of(3, 60)
    fs.fill(client, keys)
    fs.pool.nodes["a"].kill()
    fs.pool.master.kill()
    (fs.pool.directory / "catalog").rename(fs.pool.directory / "lost")
    fs.pool.start_master()
    fs.pool.start_node("a")
    client = fs.pool.client("a")
    wait_for(lambda: client.lookup(SPACE, keys).prefix == len(keys), "all are found by the scan")
    assert get_chain(client, SPACE, keys, SIZE).prefix == len(keys)


def test_many_clients_and_one_read(fs: FilePool) -> None:
    """Single flight: a prompt that everybody wants is read from files once."""
    keys = chain_of(4, 40)
    fs.fill(fs.pool.client("a"), keys)
    fs.pool.nodes["a"].kill()
    fs.start_node("a", "--storage_threads", "1", segment=SMALL * 4)
    clients = [fs.pool.client("a") for _ in range(6)]
    lookups = {}
    for client in clients:  # each has a way to the master, and to the node, then
        wait_for(lambda client=client: client.lookup(SPACE, keys).prefix == len(keys), "all are found again")
        lookups[client] = client.lookup(SPACE, keys, timeout_ms=1000 * T)
    together = threading.Barrier(len(clients))

    def load(client: Client) -> GetResult:
        together.wait(T)
        loaded: GetResult = get_chain(client, SPACE, keys, SIZE, lookup=lookups[client])
        return loaded

    with ThreadPoolExecutor(len(clients)) as threads:
        results = list(threads.map(load, clients))
    assert [result.prefix for result in results] == [len(keys)] * len(clients), results
    assert fs.event("a", "read_files") == len(keys)


def test_prefetch_moves_blocks_before_anybody_asks(fs: FilePool) -> None:
    """A lookup that asks for it brings blocks into memory: the get that follows reads no file."""
    keys = chain_of(5, 40)
    fs.fill(fs.pool.client("a"), keys)
    fs.pool.nodes["a"].kill()
    fs.start_node("a")
    client = fs.pool.client("a")
    wait_for(lambda: client.lookup(SPACE, keys).prefix == len(keys), "all are found again")

    def read_ahead() -> bool:
        client.lookup(SPACE, keys, prefetch=True)  # a late answer asks for nothing
        return fs.event("a", "read_files") == len(keys)

    wait_for(read_ahead, "all were read")
    wait_for(lambda: get_chain(client, SPACE, keys, SIZE).tiers == {"local": len(keys)}, "they are known to be here")
    assert fs.event("a", "read_files") == len(keys)


def test_one_node_reads_what_another_one_wrote_before_it_died(fs: FilePool) -> None:
    """Two nodes on one directory: the living one serves the files of the dead one."""
    keys = chain_of(6, 40)
    fs.fill(fs.pool.client("a"), keys)
    fs.start_node("b")
    fs.pool.nodes["a"].kill()
    client = fs.pool.client("b")
    wait_for(lambda: fs.pool.state("a") != "live", "the master misses the dead one")
    wait_for(lambda: client.lookup(SPACE, keys).prefix == len(keys), "all are found")
    result = get_chain(client, SPACE, keys, SIZE)
    assert result.prefix == len(keys), result
    assert result.tiers == {"fs": len(keys)}


def test_files_are_read_by_a_node_that_is_back_at_another_address(fs: FilePool) -> None:
    """Engines without a node of their own have left alone the node that was killed; they load from it again."""
    keys = chain_of(10, 16)
    fs.fill(fs.pool.client("a"), keys)
    client = fs.pool.client(breaker_failures=2)
    fs.pool.nodes["a"].kill()  # what it has in memory is gone
    for _ in range(2):
        fs.start_node("a", "--port", str(free_port()))
        wait_for(lambda: client.lookup(SPACE, keys).prefix == len(keys), "all are found again")
        lookup = client.lookup(SPACE, keys, timeout_ms=1000 * T)
        ((address, backend),) = {(address, backend) for run in lookup.runs for address, _, _, backend in run.owners}
        unusable = client.unusable_nodes()
        assert any(unusable.isdisjoint(names) for names in client.storages(address, backend))
        assert get_chain(client, SPACE, keys, SIZE, lookup=lookup).tiers == {"fs": len(keys)}
        fs.pool.nodes["a"].kill()
        refused = {"breaker_open": len(keys)}
        wait_for(lambda: get_chain(client, SPACE, keys, SIZE, lookup=lookup).reasons == refused, "it is left alone")  # noqa: B023


def test_two_nodes_that_write_the_same_blocks_do_not_disturb_each_other(fs: FilePool) -> None:
    """Same name, same bytes: whoever renames first, there is one whole file of each."""
    fs.start_node("b")
    keys = chain_of(7, 48)
    clients = [fs.pool.client(name) for name in ("a", "b")]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda client: put_chain(client, SPACE, keys, SIZE), clients))
    wait_for(lambda: sum(fs.event(n, "written_files") for n in ("a", "b")) == 2 * len(keys), "both have written")
    assert len(fs.files()) == len(keys)
    assert not list(fs.root.rglob("*.tmp"))
    for name in ("a", "b"):
        fs.pool.nodes[name].kill()
    fs.pool.start_node("a")
    client = fs.pool.client("a")
    wait_for(lambda: client.lookup(SPACE, keys).prefix == len(keys), "all are found")
    assert get_chain(client, SPACE, keys, SIZE).prefix == len(keys)


def spoil(path: Path, how: str) -> None:
    """Do to a file what crashes, disks and strangers do."""
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2 // 512 * 512])
    elif how == "torn":
        path.write_bytes(bytes(data[:5000]) + bytes(len(data) - 5000))
    elif how == "flipped":
        data[len(data) // 3] ^= 1
        path.write_bytes(data)
    elif how == "foreign":
        path.write_bytes(os.urandom(777))
    else:
        path.write_bytes(b"")


def test_spoiled_files_are_misses_with_a_reason_and_are_set_aside(fs: FilePool) -> None:
    """Never a wrong byte: torn, truncated, flipped, foreign, empty; the rest of the prompt is served."""
    keys = chain_of(8, 20)
    fs.fill(fs.pool.client("a"), keys)
    fs.pool.nodes["a"].kill()
    ways = ["truncated", "torn", "flipped", "foreign", "empty"]
    by_key = {path.name.split(".")[0]: path for path in fs.files()}
    for key, how in zip(keys[::4], ways, strict=True):
        spoil(by_key[key.hex()], how)
    fs.pool.start_node("a")
    client = fs.pool.client("a")
    wait_for(lambda: client.lookup(SPACE, keys).prefix == len(keys), "all are thought to be there")
    lookup = client.lookup(SPACE, keys, timeout_ms=1000 * T)
    by_key[keys[1].hex()].unlink()  # not before: files of a node's first seconds are looked for some time later
    result = get_chain(client, SPACE, keys, SIZE, lookup=lookup)
    assert result.ok == [at % 4 != 0 and at != 1 for at in range(20)], result
    assert result.reasons == {"file_corrupt": 5, "file_missing": 1}
    assert fs.event("a", "read_broken") == 5
    assert len(list((fs.root / "aside").iterdir())) == 5
    wait_for(lambda: fs.known() == 14, "the master knows")
    assert client.lookup(SPACE, keys).prefix == 0


def test_puts_go_on_while_a_directory_is_gone(fs: FilePool) -> None:
    """The tier is down with a reason, memory serves; when the directory is back, so is the tier."""
    client = fs.pool.client("a")
    put_chain(client, SPACE, chain_of(9, 8), SIZE)
    wait_for(lambda: len(fs.files()) == 8, "files are written")
    away = fs.root.rename(fs.root.with_name("away"))
    fs.root.write_text("no directory")
    for chain in range(10, 20):
        put_chain(client, SPACE, chain_of(chain, 8), SIZE)
    wait_for(lambda: fs.counted("a", "kvpool_storage_state") != 0, "the tier is down")
    result = get_chain(client, SPACE, chain_of(19, 8), SIZE)
    assert result.tiers == {"local": 8}

    def reasons() -> list[str]:
        return [b.reason for b in fs.pool.admin().Backends(admin_pb2.BackendsRequest(), timeout=T).backends]

    wait_for(lambda: len(reasons()) == 1 and all(reasons()), "the master knows why")
    fs.root.unlink()
    away.rename(fs.root)
    wait_for(lambda: fs.counted("a", "kvpool_storage_state") == 0, "the tier is back")
    before = len(fs.files())
    put_chain(client, SPACE, chain_of(20, 8), SIZE)
    wait_for(lambda: len(fs.files()) >= before + 8, "files are written again")


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_node_that_dies_under_load_leaves_whole_files_only(fs: FilePool, how: str) -> None:
    """SIGSTOP or kill -9 in the middle of writing: what is there under its name is whole."""
    keys = chain_of(30, 400)
    stop = threading.Event()

    def hammer() -> None:
        client = fs.pool.client("a", transfer_timeout_ms=1000)
        at = 0
        while not stop.is_set() and at < len(keys):
            part = keys[at : at + 8]
            client.put(SPACE, part, [content_of(key, SIZE) for key in part])
            at += 8

    thread = threading.Thread(target=hammer)
    thread.start()
    try:
        wait_for(lambda: len(fs.files()) > 20, "it writes")
        node = fs.pool.nodes["a"]
        if how == "stopped":
            with node.stopped():
                stop.set()
                thread.join(T)
            put_chain(fs.pool.client("a"), SPACE, chain_of(31, 4), SIZE)
        else:
            node.kill()
            stop.set()
            fs.pool.start_node("a")
    finally:
        stop.set()
        thread.join(T)
    written = [bytes.fromhex(path.name.split(".")[0]) for path in fs.files()]
    client = fs.pool.client("a")
    known = [key for key in keys if key in written]
    for at in range(0, len(known), 16):
        part = known[at : at + 16]
        wait_for(lambda part=part: client.lookup(SPACE, part).prefix == len(part), "files are known")
        result = get_chain(client, SPACE, part, SIZE)
        assert result.prefix == len(part), result


def test_one_of_two_directories_may_be_away_when_the_node_starts(bare_pool: Pool) -> None:
    """It works with the other one, and takes the first one when it can be opened; both then have their part."""
    fs = FilePool(bare_pool)
    fs.start_master()
    other = fs.root.with_name("other")
    other.write_text("no directory")
    fs.start_node("a", "--storage_backends", f"{fs.root},{other}")
    client = fs.pool.client("a")
    fs.fill(client, chain_of(50, 16))
    other.unlink()
    wait_for(lambda: len(fs.pool.admin().Backends(admin_pb2.BackendsRequest(), timeout=T).backends) == 2, "it is taken")
    keys = chain_of(51, 48)
    put_chain(client, SPACE, keys, SIZE)
    wait_for(lambda: fs.event("a", "written_files") == 64, "all are written")
    shares = [len(list(root.glob("blocks/*/*/*"))) for root in (fs.root, other)]
    assert sum(shares) == 64
    assert shares[1] >= 8
    admin = fs.pool.admin()
    wait_for(
        lambda: sum(b.blocks for b in admin.Backends(admin_pb2.BackendsRequest(), timeout=T).backends) == 64,
        "all are known to be in files",
    )
    put_chain(client, SPACE, chain_of(52, 60), SIZE)
    wait_for(lambda: get_chain(client, SPACE, keys, SIZE).prefix == len(keys), "all are read")


def test_without_a_cache_memory_is_a_buffer(bare_pool: Pool) -> None:
    """Pipeline "Posix": blocks are hits in files only, and are read and written through the segment."""
    fs = FilePool(bare_pool)
    fs.start_master()
    fs.start_node("a", "--pipeline", "Posix")
    client = fs.pool.client("a")
    keys = chain_of(40, 120)
    fs.fill(client, keys)
    lookup = client.lookup(SPACE, keys, timeout_ms=1000 * T)
    assert {owner[1] for run in lookup.runs for owner in run.owners} == {"fs"}
    result = get_chain(client, SPACE, keys, SIZE)
    assert result.prefix == len(keys), result
    assert fs.pool.statuses()["a"].used_bytes == 0


def test_selective_writing_writes_what_is_used_again(bare_pool: Pool) -> None:
    """write_through_selective: the second use is a get."""
    fs = FilePool(bare_pool)
    fs.start_master()
    fs.start_node("a", "--storage_write_policy", "write_through_selective")
    client = fs.pool.client("a")
    keys = chain_of(41, 16)
    put_chain(client, SPACE, keys, SIZE)
    get_chain(client, SPACE, keys[:4], SIZE)
    wait_for(lambda: len(fs.files()) == 4, "what was used is written")
    put_chain(client, SPACE, keys[4:6], SIZE)
    wait_for(lambda: len(fs.files()) == 6, "what was put again is written")
    assert fs.event("a", "written_files") == 6


def test_a_raw_request_waits_for_no_longer_than_it_says(fs: FilePool) -> None:
    """Pin with fetch_ms: an answer by then, with a code for what is not there; without it, at once."""
    keys = chain_of(42, 4)
    with fs.pool.raw("a") as node:
        node.register(SPACE)
        for fetch_ms, code in ((0, -1), (1000, -4)):
            frame = NodeFrame(pin=Pin(namespace=SPACE.digest, shards=[0], fetch_ms=fetch_ms))
            reply, payload = node.channel.call(frame, NodeFrameReply, b"".join(keys), timeout_s=T)
            assert reply.pinned.pin == 0
            assert np.frombuffer(payload, np.int64).tolist() == [code, 0] * 4
        node.channel.send_only(
            NodeFrame(prefetch=Prefetch(namespace=SPACE.digest, shards=[0])), b"".join(keys), timeout_s=T
        )
        assert node.local_prefix(SPACE, keys) == 0
