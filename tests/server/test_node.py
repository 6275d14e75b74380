"""What a node tells the master and the log about itself, without a process."""

from __future__ import annotations

import pytest

from kvpool.config import NodeSettings
from kvpool.server import node


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({"insecure": True}, True),
        ({"insecure": True, "advertise_host": "10.0.0.8"}, False),
        ({}, False),
    ],
)
def test_a_node_that_others_may_ask_and_cannot_reach_warns(settings, warned, caplog):
    """With the default master it announces the loopback; one in protected mode is for its own host anyway."""
    node._address(NodeSettings(**settings), "a", 1)
    assert ("cannot reach this node: it announces 127.0.0.1; give --advertise_host" in caplog.text) is warned
