"""The pool that is measured: a private one that comes and goes with the benchmark, or a running one."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from kvpool.bench.harness import BenchError
from kvpool.client import Client
from kvpool.config import boot_id, plain_environment, split_address
from kvpool.core.allocator import UNIT_BYTES, round_up
from kvpool.core.slots import header_bytes
from kvpool.model import KEY_BYTES, Namespace
from kvpool.rpc.v1 import admin_pb2, admin_pb2_grpc
from kvpool.server.launch import CHANNEL_OPTIONS, Children, free_port, is_serving, join_address, live_nodes

START_S = 60.0
HOST = "127.0.0.1"
ASK_S = 5.0
CONNECT_S = 20.0
TIMEOUT_MS = 5000.0
SETTLE_S, SETTLED_S = 0.3, 5.0
NO_ANSWER = frozenset({"no_pool", "master_unreachable"})
NO_NODE = "/nonexistent/kvpool-node.sock"
"""Where no node can be: a client that is given this path reaches every node over TCP."""


def details_of(error: grpc.RpcError) -> str:
    """Return what a call failed with, in one line."""
    return str(error.details() or error.code())


@dataclass(slots=True)
class BenchPool:
    """Where the pool is. ``sockets``: of the nodes on this host. Pids: 0 and none unless the pool is ours."""

    master: str
    channel: grpc.Channel
    sockets: list[str] = field(default_factory=list)
    master_pid: int = 0
    node_pids: list[int] = field(default_factory=list)

    @property
    def private(self) -> bool:
        """Whether it is ours alone."""
        return self.master_pid > 0

    @property
    def pids(self) -> tuple[int, ...]:
        """Every process of a private pool."""
        return (self.master_pid, *self.node_pids) if self.private else ()

    def status(self) -> admin_pb2.StatusResponse:
        """Ask the master for its page of numbers. Raises BenchError."""
        try:
            reply: admin_pb2.StatusResponse = admin_pb2_grpc.AdminStub(self.channel).Status(
                admin_pb2.StatusRequest(), timeout=ASK_S
            )
        except grpc.RpcError as error:
            raise BenchError(f"the master at {self.master} does not answer: {details_of(error)}") from None
        return reply

    def settle(self) -> None:
        """Wait until the evictions that a burst of puts has brought about are over, or as long as they may take.

        The master asks for them by what it was told last: they would meet blocks that come right behind the burst.
        """
        deadline = time.monotonic() + SETTLED_S
        before = -1
        while (removed := int(self.status().counters["blocks_removed"])) != before and time.monotonic() < deadline:
            before = removed
            time.sleep(SETTLE_S)

    def evict(self, space: Namespace) -> None:
        """Have a namespace's blocks dropped, if a master is there to do it."""
        with suppress(grpc.RpcError):
            admin_pb2_grpc.AdminStub(self.channel).EvictBlocks(
                admin_pb2.EvictBlocksRequest(namespace=space.digest), timeout=ASK_S
            )

    def smallest_node_bytes(self) -> int:
        """Return the memory of the live node that has least. Raises BenchError."""
        sizes = [int(node.capacity_bytes) for node in live_nodes(self.channel)]
        if not sizes:
            raise BenchError(f"the pool at {self.master} has no live node")
        return min(sizes)

    def node_blocks(self) -> dict[str, int]:
        """Return how many blocks each node holds, by its socket."""
        reply = admin_pb2_grpc.AdminStub(self.channel).Nodes(admin_pb2.NodesRequest(), timeout=ASK_S)
        return {node.address.socket_path: int(node.blocks) for node in reply.nodes}

    def node_state(self, node_id: str) -> str:
        """Return what the master thinks of a node."""
        reply = admin_pb2_grpc.AdminStub(self.channel).Nodes(admin_pb2.NodesRequest(), timeout=ASK_S)
        return next((str(node.state) for node in reply.nodes if node.address.node_id == node_id), "")


def slot_bytes(block_bytes: int, layers: int = 1) -> int:
    """Return what a block takes of a segment."""
    return header_bytes(layers) + round_up(block_bytes, UNIT_BYTES)


def bench_children() -> Children:
    """Return children that see none of the settings around us: those would change figures, and name real data."""
    return Children(environment=plain_environment())


@contextmanager
def connected(
    master: str, space: Namespace, *, node: str | None = NO_NODE, checksum: str = "always", name: str = ""
) -> Iterator[Client]:
    """Yield a client that the master has answered, and that is attached to ``node`` if one is named."""
    # Patient: a benchmark wants to see how long a slow answer takes, not a miss.
    with Client(
        master, node=node, checksum=checksum, lookup_timeout_ms=TIMEOUT_MS, name=f"kvpool-bench {name}"
    ) as client:
        client.register(space)
        deadline = time.monotonic() + CONNECT_S
        while client.lookup(space, bytes(KEY_BYTES)).reason in NO_ANSWER:
            if time.monotonic() > deadline:
                raise BenchError(f"the master at {master} does not answer lookups")
            time.sleep(0.02)
        if node not in {None, NO_NODE} and not client.has_node():
            raise BenchError(f"cannot attach to the node at {node}")
        yield client


@contextmanager
def leaving_nothing(pool: BenchPool, space: Namespace) -> Iterator[None]:
    """Have a benchmark's blocks dropped at its end from a pool that goes on."""
    try:
        yield
    finally:
        if not pool.private:
            pool.evict(space)


@contextmanager
def bench_pool(
    master: str | None,
    *,
    nodes: int = 1,
    segment_size: int = 64 << 20,
    master_flags: Sequence[str] = (),
    node_flags: Sequence[str] = (),
    hosts: Sequence[str] = (HOST,),
) -> Iterator[BenchPool]:
    """Yield the pool at ``master``, or one of our own. Raises BenchError, StartError, InvalidArgumentError.

    ``hosts``: where its nodes listen, in turn.
    """
    if master is not None:
        host, port = split_address(master, "master")
        with grpc.insecure_channel(join_address(host, port), options=CHANNEL_OPTIONS) as channel:
            pool = BenchPool(join_address(host, port), channel)
            pool.status()
            here = boot_id()
            local = [node.address for node in live_nodes(channel) if here and node.address.boot_id == here]
            pool.sockets = [address.socket_path for address in local if Path(address.socket_path).exists()]
            yield pool
        return
    address = join_address(HOST, free_port(HOST))
    children = bench_children()
    with (
        tempfile.TemporaryDirectory(prefix="kvpool-bench-", ignore_cleanup_errors=True) as directory,
        grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel,
    ):
        pool = BenchPool(address, channel)
        try:
            _start(
                pool, children, Path(directory), [hosts[n % len(hosts)] for n in range(nodes)], segment_size,
                master_flags, node_flags,
            )  # fmt: skip
            yield pool
        finally:
            children.close()


def _start(
    pool: BenchPool,
    children: Children,
    directory: Path,
    hosts: Sequence[str],
    segment_size: int,
    master_flags: Sequence[str],
    node_flags: Sequence[str],
) -> None:
    deadline = time.monotonic() + START_S
    _, port = split_address(pool.master, "master")
    arguments = ["--host", HOST, "--port", str(port), "--log_level", "warning", *master_flags]
    pool.master_pid = children.start("master", "kvpool.cli.master", arguments).process.pid
    children.wait_until(lambda: is_serving(pool.channel), "the master was not ready", deadline)
    for index, host in enumerate(hosts):
        own = directory / f"node-{index}"
        own.mkdir(mode=0o700)
        path = str(own / "node.sock")
        arguments = ["--master", pool.master, "--host", host, "--port", "0", "--segment_size", str(segment_size)]
        arguments += ["--socket_path", path, "--data_dir", str(own), "--log_level", "warning", *node_flags]
        node = children.start(f"node {index}", "kvpool.cli.node", arguments, socket_path=path)
        pool.sockets.append(path)
        pool.node_pids.append(node.process.pid)
    children.wait_until(lambda: len(live_nodes(pool.channel)) >= len(hosts), "not all nodes were ready", deadline)
