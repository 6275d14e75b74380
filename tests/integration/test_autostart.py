"""A client that finds no node on its host may start one."""

import os
import select
import subprocess
import sys
import time

import pytest

from kvpool.client_autostart import start_node
from kvpool.config import ClientSettings
from kvpool.errors import UnavailableError
from kvpool.transport.channel import Channel


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
