"""What a node and the master say to each other comes out of the wire as it went in."""

from __future__ import annotations

import numpy as np
import pytest

from kvpool.core.lookup import Answer
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
from kvpool.core.placement import Owner, Placement
from kvpool.model import Backend, NodeAddress, Reason
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


def test_an_answer_whose_runs_lie_here_and_there_in_turn() -> None:
    """Every run names all its owners that can be reached, each node once in the list of nodes."""
    nodes = {1: NodeAddress("a", "host", 7, "/a", "boot"), 2: NodeAddress("b", "host", 8, "/b", "boot")}
    here = Placement(3, (Owner(1, "dram", 3), Owner(9, "dram", 3)))
    there = Placement(3, (Owner(2, "dram", 1), Owner(1, "dram", 2)))
    lost = Placement(3, (Owner(9, "dram", 3),))
    places = [here, there, here, lost, there, lost]
    rows = np.empty(0, np.int64)
    answer = Answer(12, Reason.COMPLETE, [(2, place) for place in places], rows, rows)
    response = wire.answer_to_proto(answer, lambda one: (nodes[one], b"") if one in nodes else None)
    assert [node.node_id for node in response.nodes] == ["a", "b"]
    said = [[(response.nodes[o.node].node_id, o.shards[0]) for o in run.owners] for run in response.runs]
    by_place = {id(here): [("a", 3)], id(there): [("b", 1), ("a", 2)], id(lost): []}
    assert said == [by_place[id(place)] for place in places]
    assert {run.blocks for run in response.runs} == {2}
