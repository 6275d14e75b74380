"""What the master's catalog says about one backend, and how it is told what was found there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from kvpool.cli.remote import Remote, RemoteError
from kvpool.model import KEY_BYTES, Namespace
from kvpool.rpc import convert
from kvpool.rpc.v1 import admin_pb2, types_pb2
from kvpool.tiers.store import FileName

FILES_PER_CALL = 16384

AWAY_S = 5.0
"""A node that the master has not heard of for so long may write what the master does not hear of."""


class Catalog:
    """One backend in a master's catalog."""

    def __init__(self, remote: Remote, status: admin_pb2.BackendStatus) -> None:
        self._remote = remote
        self.status = status

    @classmethod
    def find(cls, remote: Remote, backend: bytes) -> tuple[Catalog | None, str]:
        """Return the backend as the master knows it, or None and why there is none."""
        try:
            reply = remote.call("Backends", admin_pb2.BackendsRequest())
        except RemoteError as error:
            return None, error.message
        for status in reply.backends:
            if status.id == backend:
                return cls(remote, status), ""
        return None, f"the master at {remote.address} does not know this backend: no node has announced it"

    def settled(self) -> bool:
        """Whether the master has read all of its catalog, which has all of this backend. Raises RemoteError."""
        status = self._remote.call("Status", admin_pb2.StatusRequest())
        return self.status.complete and not (status.warming or self.status.scanning)

    def away(self) -> list[str]:
        """Return the nodes that serve this backend and are silent at the moment. Raises RemoteError."""
        nodes = self._remote.call("Nodes", admin_pb2.NodesRequest()).nodes
        heard = {node.address.node_id for node in nodes if node.last_seen_s <= AWAY_S}
        return sorted({server.node for server in self.status.servers} - heard)

    def files(self) -> dict[FileName, int]:
        """Return every file that the catalog has, with its payload bytes: 0 if it waits to be removed.

        Raises RemoteError.
        """
        found: dict[FileName, int] = {}
        request = admin_pb2.CataloguedFilesRequest(backend=self.status.id)
        for reply in self._remote.stream("CataloguedFiles", request):
            for run in reply.blocks:
                shard = int.from_bytes(run.shards, "little").bit_length() - 1
                for at in range(0, len(run.keys), KEY_BYTES):
                    found[FileName(run.namespace, run.keys[at : at + KEY_BYTES], shard)] = run.shard_bytes
        return found

    def remove(self, names: Iterable[FileName]) -> int:
        """Tell that files are no hits any more; returns how many it had. Raises RemoteError."""
        return sum(
            self._correct(removed=_runs(part, self.status.id)).removed for part in _parts(dict.fromkeys(names, 0))
        )

    def add(self, files: Mapping[FileName, int], spaces: Mapping[bytes, Namespace]) -> int:
        """Tell of files, with their payload bytes; returns how many were new to it. Raises RemoteError."""
        added = 0
        for part in _parts(files):
            wanted = {name.namespace for name in part}
            described = [convert.namespace_to_proto(spaces[digest]) for digest in sorted(wanted) if digest in spaces]
            added += self._correct(added=_runs(part, self.status.id), namespaces=described).added
        return added

    def _correct(
        self,
        removed: Sequence[types_pb2.BlockRun] = (),
        added: Sequence[types_pb2.BlockRun] = (),
        namespaces: Sequence[types_pb2.NamespaceDescriptor] = (),
    ) -> admin_pb2.CorrectCatalogResponse:
        request = admin_pb2.CorrectCatalogRequest(
            backend=self.status.id, removed=removed, added=added, namespaces=namespaces
        )
        reply: admin_pb2.CorrectCatalogResponse = self._remote.call("CorrectCatalog", request)
        return reply


def _parts(files: Mapping[FileName, int]) -> Iterable[dict[FileName, int]]:
    items = list(files.items())
    for at in range(0, len(items), FILES_PER_CALL):
        yield dict(items[at : at + FILES_PER_CALL])


def _runs(files: Mapping[FileName, int], backend: bytes) -> list[types_pb2.BlockRun]:
    """Return files as runs of one namespace, shard and size each."""
    groups: dict[tuple[bytes, int, int], list[bytes]] = {}
    for name, shard_bytes in files.items():
        groups.setdefault((name.namespace, name.shard, shard_bytes), []).append(name.key)
    return [
        types_pb2.BlockRun(
            namespace=namespace,
            shards=convert.mask_to_bytes(1 << shard),
            shard_bytes=shard_bytes,
            keys=b"".join(keys),
            backend=backend,
        )
        for (namespace, shard, shard_bytes), keys in sorted(groups.items())
    ]
