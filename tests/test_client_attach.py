"""Where a client looks for its host's node."""

import numpy as np

from kvpool import Client, Namespace


def test_a_place_that_cannot_be_looked_into_is_no_node(monkeypatch):
    """The socket's directory may belong to somebody else, or be no path at all: the client starts without a node."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/" + 300 * "x")  # as root, permissions would not stop anybody
    with Client("127.0.0.1:1") as client:
        stored = client.put(Namespace("demo"), [b"\1" * 32], [np.zeros(512, np.uint8)])
    assert (stored.stored, stored.failed) == (0, 1)
