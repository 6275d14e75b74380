"""The client's way to the master where only the gRPC port is open."""

import socket

from kvpool import Client, Namespace, client_master


def test_lookups_fall_back_to_grpc(pool, monkeypatch):
    """A data port that cannot be reached costs speed, nothing else: lookups and leases go over gRPC."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        connect = client_master.Channel.connect_tcp
        monkeypatch.setattr(
            client_master.Channel,
            "connect_tcp",
            lambda host, port, timeout_s: connect(host, closed.getsockname()[1], timeout_s),
        )
        with Client(pool.address, node="") as client:
            answer = client.lookup(Namespace("grpc only"), [bytes(16)], lease=True)
            assert answer.reason == "not_stored"
            assert client.renew([12345]) == [12345]
