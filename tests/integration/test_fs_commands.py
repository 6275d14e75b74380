"""kvpoolctl fs beside a pool that runs: what is found in the files, the master knows at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvpool.rpc.v1 import admin_pb2
from kvpool.tiers import blockfile
from kvpool.tiers.opening import open_store
from kvpool.tiers.store import FileName
from tests.integration.pool import SPACE, Pool, chain_of, lookup_by_grpc, put_chain, run_module, wait_for

SIZE = 64 << 10
BLOCKS = 8


@pytest.fixture
def shared(bare_pool: Pool, tmp_path: Path) -> Pool:
    """A pool whose one node has written a chain of blocks to a directory."""
    bare_pool.start_master("--data_dir", str(tmp_path / "catalog"))
    bare_pool.start_node(
        "a", "--segment_size", "16MB", "--storage_backends", str(tmp_path / "files"), "--storage_capacity", "1GB"
    )
    # Else it would find what the tests make the catalog lose.
    wait_for(
        lambda: bare_pool.status().counters["scans_asked"] == 1 and not backends(bare_pool)[0].scanning,
        "the scan of the new directory has ended",
    )
    with bare_pool.client("a") as client:
        client.register(SPACE)
        assert put_chain(client, SPACE, chain_of(1, BLOCKS), SIZE) == BLOCKS
    wait_for(lambda: files_known(bare_pool) == BLOCKS, "all blocks are in files")
    return bare_pool


def backends(pool: Pool):
    return pool.admin().Backends(admin_pb2.BackendsRequest(), timeout=10).backends


def files_known(pool: Pool) -> int:
    return sum(backend.blocks for backend in backends(pool))


def tiers_of(pool: Pool, key: bytes) -> set[str]:
    with pool.channel() as channel:
        return {owner.tier for run in lookup_by_grpc(channel, SPACE, [key]).runs for owner in run.owners}


def kvpoolctl_fs(pool: Pool, subcommand: str, directory: Path, *options: str):
    done = run_module("kvpool.cli.ctl", "--master", pool.address, "--json", "fs", subcommand, str(directory), *options)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)["backends"][0]


def test_a_broken_file_is_found_and_no_hit_any_more(shared, tmp_path):
    """Its block is still in memory, and no longer said to be in files."""
    files = tmp_path / "files"
    key = chain_of(1, BLOCKS)[2][:16]
    assert tiers_of(shared, key) == {"dram", "fs"}
    (path,) = files.rglob(f"{key.hex()}.0")
    data = bytearray(path.read_bytes())
    data[-1000] ^= 4
    path.write_bytes(data)
    code, found = kvpoolctl_fs(shared, "verify", files)
    assert (code, found["whole"], len(found["broken"]), found["told_master"]) == (1, BLOCKS - 1, 1, 1)
    assert tiers_of(shared, key) == {"dram"}
    assert files_known(shared) == BLOCKS - 1
    assert len(list((files / "aside").iterdir())) == 1
    assert kvpoolctl_fs(shared, "verify", files)[0] == 0


def test_files_that_the_catalog_has_lost_are_adopted(shared, tmp_path):
    """They are hits without a scan of the whole directory; then files and catalog agree."""
    key = b"k" * 16
    store = open_store(str(tmp_path / "files"), owner="another-pool", create=False)
    name = FileName(SPACE.digest, key, 0)
    store.write(name, memoryview(blockfile.build(name, bytes(SIZE), SPACE.shard_layers)))
    assert tiers_of(shared, key) == set()
    code, found = kvpoolctl_fs(shared, "scrub", tmp_path / "files")
    assert (code, len(found["unknown"]), found["adopted"], found["missing"]) == (1, 1, 1, [])
    assert tiers_of(shared, key) == {"fs"}
    code, found = kvpoolctl_fs(shared, "scrub", tmp_path / "files", "--remove_unknown")
    assert (code, found["files"], found["unknown"], found["missing"]) == (0, BLOCKS + 1, [], [])


def test_files_that_are_gone_are_forgotten(shared, tmp_path):
    """Nobody has to ask for them first."""
    key = chain_of(1, BLOCKS)[5][:16]
    (path,) = (tmp_path / "files").rglob(f"{key.hex()}.0")
    path.unlink()
    code, found = kvpoolctl_fs(shared, "scrub", tmp_path / "files")
    # A node looks by itself for what was written in its first seconds: it may be faster.
    assert (code, len(found["missing"]), found["forgotten"]) in {(1, 1, 1), (0, 0, 0)}
    assert tiers_of(shared, key) == {"dram"}


def test_files_that_are_being_evicted_are_known(shared, tmp_path):
    """While nobody removes them, as their node is gone, they are there: nothing is wrong with that."""
    shared.nodes["a"].kill()
    wait_for(lambda: shared.state("a") != "live", "the master misses the node")
    assert shared.admin().EvictBlocks(admin_pb2.EvictBlocksRequest(namespace=SPACE.digest), timeout=10).blocks == BLOCKS
    wait_for(lambda: files_known(shared) == 0, "no block is a hit any more")
    code, found = kvpoolctl_fs(shared, "scrub", tmp_path / "files")
    assert (code, found["files"], found["unknown"], found["missing"]) == (0, BLOCKS, [], [])
