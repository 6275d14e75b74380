"""Host names that cannot even be looked up: an error of the setting that has them, wherever one gets through."""

from __future__ import annotations

import asyncio

import pytest
from click.testing import CliRunner

from kvpool.cli import up
from kvpool.config import MasterSettings, NodeSettings
from kvpool.errors import InvalidArgumentError
from kvpool.server import master, node
from kvpool.server.launch import free_port

BAD = ["a..b", "x" * 64]


@pytest.mark.parametrize("host", BAD)
def test_a_port_of_no_host_is_not_free(host):
    """The error is that of the host."""
    with pytest.raises(InvalidArgumentError, match="cannot listen on") as caught:
        free_port(host)
    assert caught.value.field == "host"


@pytest.mark.parametrize("host", BAD)
def test_a_node_has_an_address_whatever_its_master_is_called(host, monkeypatch):
    """As for a name that is not known."""
    monkeypatch.setattr(node, "split_address", lambda *_: (host, 1))
    assert node.advertised_host(NodeSettings()) == "127.0.0.1"


@pytest.mark.parametrize("host", BAD)
def test_a_master_does_not_listen_there(host):
    """The error is that of the host."""
    settings = MasterSettings()
    object.__setattr__(settings, "host", host)  # as if it had passed the checks
    with pytest.raises(InvalidArgumentError, match="cannot listen on") as caught:
        asyncio.run(master.serve(settings, asyncio.Event()))
    assert caught.value.field == "host"


@pytest.mark.parametrize("host", BAD)
def test_up_says_what_is_wrong(host):
    """In one line; a name that gets through is refused by who listens."""
    done = CliRunner().invoke(up.command, ["--host", host])
    assert done.exit_code == 2
    assert f"host: {host!r} is not allowed" in done.output
    up._check_reachable(host, insecure=False)
