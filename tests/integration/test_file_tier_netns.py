"""Two hosts, made of network namespaces, that share a directory and nothing else."""

from __future__ import annotations

import pytest

from tests.integration.netns import hosts, refused
from tests.integration.pool import SPACE, Pool, chain_of, get_chain, put_chain, wait_for

SIZE = 64 << 10


def test_a_host_reads_from_the_directory_what_a_dead_one_wrote(bare_pool: Pool) -> None:
    """The writer is killed and its link is cut; the other host never reached it, and loads all of its blocks."""
    if why := refused():
        pytest.skip(why)
    pool, keys = bare_pool, chain_of(1, 64)
    directory = pool.directory / "shared"
    pool.start_master("--host", "0.0.0.0", "--insecure")
    with hosts(2) as (one, two):
        nodes = {}
        for name, host in (("a", one), ("b", two)):
            nodes[name] = pool.adopt(
                name,
                (
                    "tests.integration.netns", host.name, "kvpool.cli.node", "--master", f"{host.gateway}:{pool.port}",
                    "--host", "0.0.0.0", "--advertise_host", host.address, "--insecure", "--node_id", name,
                    "--socket_path", pool.socket_path(name), "--segment_size", "16MB",
                    "--storage_backends", str(directory),
                ),
            )  # fmt: skip
            wait_for(lambda name=name: pool.state(name) == "live", f"node {name} is live")
        writer = pool.client("a")
        put_chain(writer, SPACE, keys, SIZE)

        def in_files() -> bool:
            lookup = writer.lookup(SPACE, keys)
            tiers = [{owner[1] for owner in run.owners} for run in lookup.runs]
            return lookup.prefix == len(keys) and all("fs" in each for each in tiers)

        wait_for(in_files, "all are known to be in files")
        nodes["a"].kill()
        one.cut()
        reader = pool.client("b")
        wait_for(lambda: pool.state("a") != "live", "the dead one is missed")
        wait_for(lambda: reader.lookup(SPACE, keys).prefix == len(keys), "all are found")
        result = get_chain(reader, SPACE, keys, SIZE)
        assert result.prefix == len(keys), result
        assert result.tiers == {"fs": len(keys)}
        assert nodes["b"].end() == 0
