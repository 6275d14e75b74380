"""What a node and the master say to each other comes out of the wire as it went in."""

from __future__ import annotations

import pytest

from kvpool.core.messages import (
    Ack,
    BlockRun,
    FilesRemoved,
    Hello,
    LookForFiles,
    MasterMessage,
    NodeMessage,
    RemoveFiles,
)
from kvpool.model import Backend, NodeAddress
from kvpool.server import wire

BACKEND = bytes(range(16))
FILES = (BlockRun(bytes(16), 1 << 3, 512, bytes(range(32))), BlockRun(bytes(16), 1, 0, bytes(16), backend=BACKEND))


@pytest.mark.parametrize(
    "message",
    [
        Hello(
            NodeAddress("a", "host", 7, "/socket", "boot"), 5, 100, 50, 3, 9, (), (Backend(BACKEND, "dir", 1),), 8, 77
        ),
        FilesRemoved(7),
        FilesRemoved(7, FILES),
    ],
)
def test_what_a_node_says(message: NodeMessage) -> None:
    """Every field of it."""
    assert wire.node_message_from_proto(wire.node_message_to_proto(message)) == message


@pytest.mark.parametrize("message", [Ack(5, 77), RemoveFiles(7, BACKEND, FILES), LookForFiles(7, BACKEND, FILES)])
def test_what_the_master_says(message: MasterMessage) -> None:
    """Every field of it."""
    assert wire.master_message_from_proto(wire.master_message_to_proto(message)) == message
