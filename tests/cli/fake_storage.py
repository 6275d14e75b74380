"""A master that answers what concerns storage from a catalog in a dict, over a real socket on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc

from kvpool.rpc.v1 import admin_pb2, admin_pb2_grpc, types_pb2
from kvpool.tiers.store import FileName


def names(run: types_pb2.BlockRun) -> list[FileName]:
    """The files of a run of one shard."""
    shard = int.from_bytes(run.shards, "little").bit_length() - 1
    return [FileName(run.namespace, run.keys[at : at + 16], shard) for at in range(0, len(run.keys), 16)]


class FakeStorageMaster(admin_pb2_grpc.AdminServicer):
    """Keeps pins and catalogs; ``late`` are files that a node reports between two questions for the catalog."""

    def __init__(self) -> None:
        self.backends: dict[bytes, admin_pb2.BackendStatus] = {}
        self.files: dict[FileName, int] = {}
        self.late: dict[FileName, int] = {}
        self.namespaces: list[types_pb2.NamespaceDescriptor] = []
        self.pins: dict[int, admin_pb2.PinStatus] = {}
        self.present = 1
        self.warming = False
        self.silent_s = 0.0
        self.asked: list[object] = []
        self.on_correct = lambda request: None
        self.on_list = lambda: None
        self.address = ""

    def Status(self, request, context):  # noqa: N802  # the generated base class names it
        return admin_pb2.StatusResponse(version="1", warming=self.warming, backends=self.backends.values())

    def Backends(self, request, context):  # noqa: N802
        return admin_pb2.BackendsResponse(backends=self.backends.values())

    def Nodes(self, request, context):  # noqa: N802
        names = {server.node for backend in self.backends.values() for server in backend.servers}
        nodes = [
            admin_pb2.NodeStatus(address=types_pb2.NodeAddress(node_id=name), last_seen_s=self.silent_s)
            for name in sorted(names)
        ]
        return admin_pb2.NodesResponse(nodes=nodes)

    def Namespaces(self, request, context):  # noqa: N802
        return admin_pb2.NamespacesResponse()

    def PinBlocks(self, request, context):  # noqa: N802
        self.asked.append(request)
        number = 0xABC + len(self.pins)
        self.pins[number] = admin_pb2.PinStatus(
            pin=number, label=request.label, namespace=request.namespace, blocks=len(request.keys) // 16,
            present=self.present, left_s=request.ttl_ms / 1000,
        )  # fmt: skip
        return admin_pb2.PinBlocksResponse(pin=number, blocks=self.present)

    def UnpinBlocks(self, request, context):  # noqa: N802
        self.asked.append(request)
        ended = [
            pin for pin in self.pins.values()
            if request.all or pin.pin in request.pins or (request.label and pin.label == request.label)
        ]  # fmt: skip
        for pin in ended:
            del self.pins[pin.pin]
        return admin_pb2.UnpinBlocksResponse(pins=len(ended), blocks=sum(pin.blocks for pin in ended))

    def Pins(self, request, context):  # noqa: N802
        return admin_pb2.PinsResponse(pins=self.pins.values())

    def CataloguedFiles(self, request, context):  # noqa: N802
        self.on_list()
        for name, shard_bytes in list(self.files.items()):
            run = types_pb2.BlockRun(
                namespace=name.namespace, shards=(1 << name.shard).to_bytes(32, "little"), shard_bytes=shard_bytes,
                keys=name.key, backend=request.backend,
            )  # fmt: skip
            yield admin_pb2.CataloguedFilesResponse(blocks=[run])
        self.files.update(self.late)

    def CorrectCatalog(self, request, context):  # noqa: N802
        self.asked.append(request)
        self.on_correct(request)
        self.namespaces.extend(request.namespaces)
        removed = [name for run in request.removed for name in names(run) if self.files.pop(name, None) is not None]
        added = {name: run.shard_bytes for run in request.added for name in names(run) if name not in self.files}
        self.files.update(added)
        return admin_pb2.CorrectCatalogResponse(removed=len(removed), added=len(added))


@contextmanager
def serving() -> Iterator[FakeStorageMaster]:
    """Yield one that listens; its ``address`` is what --master takes."""
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        fake = FakeStorageMaster()
        admin_pb2_grpc.add_AdminServicer_to_server(fake, server)
        fake.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            yield fake
        finally:
            server.stop(grace=None).wait(timeout=10)
