"""The master's catalog with real processes: everything killed, everything found again; pins; lost catalogs."""

from __future__ import annotations

import shutil
from pathlib import Path

import grpc
import pytest

from kvpool.bench.restart import measure
from kvpool.rpc.v1 import admin_pb2, types_pb2
from kvpool.tiers.store import FileName
from tests.integration.pool import SPACE, Pool, T, chain_of, lookup_by_grpc, put_chain, wait_for

SIZE = 64 << 10
BLOCKS = 24


@pytest.fixture
def shared(bare_pool: Pool, tmp_path: Path) -> Pool:
    """A master with a catalog, and a node whose blocks go to a directory."""
    files, data = tmp_path / "files", tmp_path / "data"
    files.mkdir()
    bare_pool.start_master("--data_dir", str(data))
    node = ("--segment_size", "16MB", "--storage_backends", str(files), "--storage_capacity", "1GB")
    bare_pool.start_node("a", *node, "--data_dir", str(data / "a"))
    wait_for(lambda: bare_pool.status().counters["scans_asked"] == 1 and not backend(bare_pool).scanning,
             "the scan of the new directory has ended")  # fmt: skip
    return bare_pool


def backend(pool: Pool) -> admin_pb2.BackendStatus | None:
    reply = pool.admin().Backends(admin_pb2.BackendsRequest(), timeout=10, wait_for_ready=True)
    return reply.backends[0] if reply.backends else None


def store(pool: Pool, blocks: int = BLOCKS, chain: int = 1) -> list[bytes]:
    """Put a chain and wait until all of it is in files."""
    keys = chain_of(chain, blocks)
    with_files = backend(pool).blocks + blocks
    client = pool.client("a")
    client.register(SPACE)
    assert put_chain(client, SPACE, keys, SIZE) == blocks
    wait_for(lambda: backend(pool).blocks == with_files, "all blocks are in files")
    return keys


def found(pool: Pool, keys: list[bytes]) -> tuple[int, set[str]]:
    """How many of these a lookup finds, and in which tiers."""
    with pool.channel() as channel:
        reply = lookup_by_grpc(channel, SPACE, keys)
    return reply.prefix, {owner.tier for run in reply.runs for owner in run.owners}


def test_everything_is_found_again_after_kill_9_of_everything(shared):
    """Files, pins, namespaces and nodes: a restarted master serves them from the catalog, without a scan."""
    keys = store(shared)
    pin = shared.admin().PinBlocks(
        admin_pb2.PinBlocksRequest(namespace=SPACE.digest, keys=b"".join(keys[:4]), label="prefix"), timeout=10
    )
    assert pin.blocks == 4
    shared.master.kill()
    shared.nodes["a"].kill()
    shared.start_master()
    wait_for(lambda: backend(shared) is not None and not shared.status().warming, "the catalog is read")
    assert (found(shared, keys)[0], backend(shared).blocks) == (0, BLOCKS)
    shared.start_node("a")
    assert found(shared, keys) == (BLOCKS, {"fs"})
    assert shared.status().counters["scans_asked"] == 0
    (kept,) = shared.admin().Pins(admin_pb2.PinsRequest(), timeout=10).pins
    assert (kept.pin, kept.label, kept.blocks, kept.present, kept.left_s) == (pin.pin, "prefix", 4, 4, 0)
    ended = shared.admin().UnpinBlocks(admin_pb2.UnpinBlocksRequest(label="prefix"), timeout=10)
    assert (ended.pins, ended.blocks) == (1, 4)


@pytest.mark.parametrize("loss", ["gone", "cut off", "foreign"])
def test_a_lost_catalog_is_made_anew_by_a_scan(shared, tmp_path, loss):
    """Whatever has become of the file: the node scans, and everything is found again."""
    keys = store(shared)
    shared.master.kill()
    catalog = tmp_path / "data" / "catalog.lmdb"
    if loss == "gone":
        catalog.unlink()
    elif loss == "cut off":
        with catalog.open("r+b") as file:
            file.truncate(catalog.stat().st_size // 2)
    else:
        catalog.write_bytes(b"something else\n" * 4096)
    shared.nodes["a"].kill()
    shared.start_master()
    shared.start_node("a")
    wait_for(lambda: found(shared, keys) == (BLOCKS, {"fs"}), "all files are found")
    # What is new is found even before the master asks for everything, as the node did not end in order.
    wait_for(lambda: shared.status().counters["scans_asked"] == 1 and not backend(shared).scanning, "the scan ends")
    assert loss == "gone" or "set aside" in shared.master.words()


def test_a_catalog_that_was_put_back_is_noticed(shared, tmp_path):
    """The node that was told otherwise says so: what is missing is found by a scan, while the rest is served."""
    catalog, older = tmp_path / "data" / "catalog.lmdb", tmp_path / "older"
    first = store(shared)
    shared.master.kill()
    shutil.copyfile(catalog, older)
    shared.start_master()
    wait_for(lambda: found(shared, first)[0] == BLOCKS, "the catalog is read")
    second = store(shared, chain=2)
    shared.client("a").close()
    shared.master.kill()
    shutil.copyfile(older, catalog)
    shared.start_master()
    wait_for(lambda: backend(shared).blocks == 2 * BLOCKS, "all files are found")
    assert (found(shared, first)[0], found(shared, second)[0]) == (BLOCKS, BLOCKS)
    assert shared.status().counters["scans_asked"] == 1
    assert "lacks what a master has acknowledged" in shared.master.words()
    wait_for(lambda: not backend(shared).scanning, "the scan has ended")
    all_kept(shared)
    shared.master.kill()
    shared.start_master()
    wait_for(lambda: backend(shared).blocks == 2 * BLOCKS, "the catalog is read")
    assert shared.status().counters["scans_asked"] == 0


def test_operators_correct_what_the_catalog_says(shared, tmp_path):
    """What is said to be lost goes from the index and from the directory; a scan on demand finds unknown files."""
    keys = store(shared)
    file = tmp_path / "files" / "blocks" / str(FileName(SPACE.digest, keys[0], 0))
    content = file.read_bytes()
    status = backend(shared)
    admin = shared.admin()
    listed = [run for reply in admin.CataloguedFiles(admin_pb2.CataloguedFilesRequest(backend=status.id), timeout=10)
              for run in reply.blocks]  # fmt: skip
    assert sorted(run.keys[at : at + 16] for run in listed for at in range(0, len(run.keys), 16)) == sorted(keys)
    removed = types_pb2.BlockRun(namespace=SPACE.digest, shards=b"\x01", shard_bytes=SIZE, keys=keys[0] + b"-" * 16)
    reply = admin.CorrectCatalog(admin_pb2.CorrectCatalogRequest(backend=status.id, removed=[removed]), timeout=10)
    assert (reply.removed, backend(shared).blocks) == (1, BLOCKS - 1)
    reply = admin.CorrectCatalog(admin_pb2.CorrectCatalogRequest(backend=status.id, removed=[removed]), timeout=10)
    assert reply.removed == 0
    wait_for(lambda: not file.exists() and not backend(shared).removing_bytes, "its file is removed, too")
    file.write_bytes(content)
    assert admin.ScanBackend(admin_pb2.ScanBackendRequest(backend=status.id), timeout=10).node == "a"
    wait_for(lambda: backend(shared).blocks == BLOCKS, "the scan has found it again")
    assert (status.url, status.capacity_bytes, status.servers[0].node) == (str(tmp_path / "files"), 1 << 30, "a")
    with pytest.raises(grpc.RpcError, match="not known"):
        admin.ScanBackend(admin_pb2.ScanBackendRequest(backend=b"x" * 16), timeout=10)


def test_files_beyond_the_capacity_are_removed_the_coldest_first(bare_pool, tmp_path):
    """Out of the index first, then from the directory; what is pinned stays."""
    files = tmp_path / "files"
    files.mkdir()
    bare_pool.start_master("--data_dir", str(tmp_path / "data"), "--storage_high_watermark_ratio", "0.8")
    bare_pool.start_node("a", "--segment_size", "16MB", "--storage_backends", str(files), "--storage_capacity", "4MB")
    first = store(bare_pool)
    bare_pool.admin().PinBlocks(
        admin_pb2.PinBlocksRequest(namespace=SPACE.digest, keys=b"".join(first[:2])), timeout=10
    )
    client = bare_pool.client("a")
    client.register(SPACE)
    put_chain(client, SPACE, chain_of(2, 3 * BLOCKS), SIZE)
    wait_for(lambda: bare_pool.status().counters["files_removed"] > 0, "files are removed", 60)
    wait_for(lambda: backend(bare_pool).removing_bytes == 0 and 0 < backend(bare_pool).used_bytes <= 0.8 * (4 << 20),
             "the backend is below its watermark", 60)  # fmt: skip

    def settled() -> bool:
        there = sum(1 for path in files.glob("blocks/*/*/*") if not path.name.startswith("."))
        return there == backend(bare_pool).blocks

    wait_for(settled, "directory and index agree")
    with bare_pool.channel() as channel:
        owners = [run.owners for run in lookup_by_grpc(channel, SPACE, first[:2]).runs]
    assert all(any(owner.tier == "fs" for owner in some) for some in owners)
    assert len(owners) > 0


def all_kept(pool: Pool) -> None:
    """Wait until the catalog has all that the master knows: this is answered when it has."""
    pool.admin().UnpinBlocks(admin_pb2.UnpinBlocksRequest(label="none"), timeout=T)


def test_a_node_that_does_not_come_back_is_named(bare_pool, tmp_path):
    """The catalog remembers who was there: a restarted master says who is missing, until it is back."""
    bare_pool.start_master("--data_dir", str(tmp_path / "data"), "--client_ttl", "500ms")
    bare_pool.start_node("a")
    bare_pool.start_node("b")
    all_kept(bare_pool)
    bare_pool.master.kill()
    bare_pool.nodes["b"].kill()
    bare_pool.start_master()
    wait_for(lambda: any("node b was here" in text for text in bare_pool.status().warnings), "b is missed")
    wait_for(lambda: not any("node a was here" in text for text in bare_pool.status().warnings), "a is back")
    bare_pool.start_node("b")
    assert not bare_pool.status().warnings


def test_a_restart_is_measured():
    """The benchmark's part: a killed master finds all that it has acknowledged."""
    figures = measure(2500)
    assert figures.blocks == 2500
    assert 0 < figures.answering_s <= figures.whole_s
