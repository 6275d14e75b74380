"""A client that finds no node on its host may start one."""

import os
import select
import subprocess
import sys
import time

import pytest

from kvpool.cli.node import command
from kvpool.client_autostart import node_arguments, start_node
from kvpool.config import AUTOSTARTED, ClientSettings, NodeSettings, child_environment, load
from kvpool.core.slot_table import table_bytes
from kvpool.errors import UnavailableError
from kvpool.transport.channel import Channel
from tests.integration.pool import SPACE, chain_of, put_chain, wait_for


def wait_for_node(path, process, deadline_s=20.0):
    end = time.monotonic() + deadline_s
    while True:
        try:
            return Channel.connect_unix(path, 0.5)
        except UnavailableError:
            assert process.poll() is None, "the node has ended"
            assert time.monotonic() < end, "no node came up"
            time.sleep(0.02)


@pytest.fixture
def settings(tmp_path):
    return ClientSettings(
        master="127.0.0.1:1", node=str(tmp_path / "node.sock"), segment_size="4MB", autostart_node=True
    )


def test_one_node_is_started_for_several_clients(settings):
    """The first call starts a node sized for all ranks; later ones see it coming, or there."""
    node = start_node(settings, ranks=2)
    assert node is not None
    try:
        assert start_node(settings, ranks=2) is None, "while it is on its way"
        wait_for_node(settings.node, node).close()
        assert start_node(settings, ranks=2) is None, "when it is there"
    finally:
        node.terminate()
        assert node.wait(10) == 0


@pytest.mark.parametrize(
    "storage",
    [
        {},
        {"storage_backends": "/mnt/a:/mnt/b", "storage_capacity": "1TB", "storage_timeout": "5s"},
        {"cache_buffer_capacity_gb": 1.5, "storage_backends": "/mnt/a", "pipeline": "Posix", "storage_direct": "off"},
        {"storage_backends": "s3://bucket/pool", "storage_options": {"key": "k", "secret": "s3cret"}},
        {"insecure": True},
    ],
)
def test_a_started_node_gets_the_storage_settings(storage):
    """As if they had been given to the node itself; secrets are not on its command line, which everybody sees."""
    settings = ClientSettings(segment_size="4MB", autostart_node=True, **storage)
    arguments, secrets = node_arguments(settings, 2, "/run/node.sock")
    given = command.make_context("kvpool-node", arguments).params
    node = load(NodeSettings, flags={**given, "config": None, **secrets}, environ={}).settings
    assert node.segment_size == (3 << 29 if "cache_buffer_capacity_gb" in storage else 8 << 20)
    assert node.socket_path == "/run/node.sock"
    alone = NodeSettings(**storage)
    for name in set(AUTOSTARTED) - {"cache_buffer_capacity_gb"}:
        assert getattr(node, name) == getattr(alone, name), name
    assert "s3cret" not in " ".join(arguments)
    assert child_environment(secrets).get("KVPOOL_STORAGE_OPTIONS") == secrets.get("storage_options")


def test_ucms_file_configures_a_node(bare_pool, tmp_path):
    """Its pipeline, its directories and its memory are a running node's, beside kvpool's own names."""
    pool = bare_pool
    pool.start_master()
    backends = [tmp_path / "a", tmp_path / "b"]
    config = tmp_path / "ucm.yaml"
    config.write_text(
        "ucm_connectors:\n"
        "  - ucm_connector_name: UcmPipelineStore\n"
        "    ucm_connector_config:\n"
        '      store_pipeline: "Cache|Posix"\n'
        f'      storage_backends: "{backends[0]}:{backends[1]}"\n'
        "      cache_buffer_capacity_gb: 0.03125\n"
        "enable_event_sync: true\n"
        "use_layerwise: true\n"
    )
    node = pool.start_node("a", "--config", str(config))
    client = pool.client("a")
    assert len(client._own.node.backends) == 2
    assert len(client._own.node._memory) == (32 << 20) + table_bytes(32 << 20)
    keys = chain_of(1, 64)
    put_chain(client, SPACE, keys, 64 << 10)
    written = [lambda at=at: any(at.glob("blocks/*/*/*.0")) for at in backends]
    wait_for(lambda: all(some() for some in written), "both directories are written to")
    assert node.words().count("these UCM keys mean nothing here: enable_event_sync, ucm_connector_name") == 1


def test_a_started_node_ends_with_its_engine(settings):
    """The node ends when the process that started it is killed."""
    code = (
        "import sys, time\n"
        "from kvpool.client_autostart import start_node\n"
        "from kvpool.config import ClientSettings\n"
        f"node = start_node(ClientSettings(master='127.0.0.1:1', node={settings.node!r}, segment_size='4MB'), 1)\n"
        "print(node.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    engine = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    pid = int(engine.stdout.readline())
    try:
        wait_for_node(settings.node, engine).close()
        pidfd = os.pidfd_open(pid)
    finally:
        engine.kill()
        engine.wait(10)
        engine.stdout.close()
    assert select.select([pidfd], [], [], 10)[0], "the node outlived its engine"
    os.close(pidfd)
