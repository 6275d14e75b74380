"""The way to the master: a handshake over gRPC, then lookups as frames with a hard deadline.

A thread keeps the connection; callers never wait for it. While the master is away every question fails
at once, and the caller falls back on its own node.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc

from kvpool.client_announce import EngineAnnouncer
from kvpool.client_health import Health
from kvpool.client_residency import Ask, ResidencyReporter
from kvpool.config import split_address
from kvpool.errors import FrameError, KVPoolError, UnavailableError
from kvpool.model import KEY_BYTES, Namespace, NodeAddress
from kvpool.processes import begin_thread
from kvpool.rpc.convert import address_from_proto, namespace_to_proto
from kvpool.rpc.status import error_of
from kvpool.rpc.v1 import master_pb2, master_pb2_grpc
from kvpool.transport.channel import Channel, ChannelPool
from kvpool.transport.dialing import names

log = logging.getLogger(__name__)

PROTOCOL = 1
HANDSHAKE_S = 1.0
CHANNELS_MAX = 8
RETRY_FIRST_S = 0.1
RETRY_MAX_S = 2.0
REFRESH_S = 5.0
"""How often the list of nodes is asked for anew."""

DATA_PORT_S = 0.3
CHANNEL_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]

MasterFrame = master_pb2.MasterFrame
MasterFrameReply = master_pb2.MasterFrameReply


class MasterLink:
    """Knows the master's data port and its nodes while the master is there."""

    def __init__(
        self, address: str, name: str, changed: Callable[[], None], health: Health, probe_timeout_s: float
    ) -> None:
        """``changed`` is called by the link's thread after each handshake, good or bad.

        Once questions have timed out several times in a row, none is asked before one was answered again
        within ``probe_timeout_s``.
        """
        self._guard = health.guard("master", self._probe)
        self._probe_timeout_s = probe_timeout_s
        self._address = address
        self._host = split_address(address, "master")[0]
        self._name = name
        self._changed = changed
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._tried = threading.Event()
        self._closed = False
        self._pool: ChannelPool | None = None
        self._data_port = 0
        self._epoch = 0
        self._restarted = False
        self.restarted: Callable[[Ask], bool] | None = None
        """Called by the link's thread once another master answers: to be told what the last one knew, or once more."""
        self._namespaces: dict[bytes, Namespace] = {}
        self._announced: set[bytes] = set()
        self._said = ""
        self._slow_channel: grpc.Channel | None = None
        self._stub: master_pb2_grpc.MasterStub | None = None  # set where the data port cannot be reached
        self.nodes: list[NodeAddress] = []
        self.residency = ResidencyReporter(self.ask, name)
        self.announcer = EngineAnnouncer(self._call, self._host, self.residency.owner)
        self.warnings: list[str] = []  # what the master said about our namespaces, each once
        self._thread = threading.Thread(target=self._keep, name="kvpool-master-link", daemon=True)
        self._thread.start()

    @property
    def up(self) -> bool:
        """Whether the master answered last time."""
        return self._pool is not None or self._stub is not None

    def wait_tried(self, timeout_s: float) -> bool:
        """Wait for the first handshake to have ended, well or not."""
        return self._tried.wait(timeout_s)

    def close(self) -> None:
        """End the thread and close all channels."""
        self.residency.close()
        self.announcer.close()
        self._closed = True
        self._wake.set()
        self._drop()

    # ---- questions -------------------------------------------------------------------------------

    def ask(self, frame: master_pb2.MasterFrame, payload: bytes, timeout_s: float) -> master_pb2.MasterFrameReply:
        """Ask by frame, or by gRPC where the data port cannot be reached.

        Raises UnavailableError at once when the master is away, and at the deadline; BreakerOpenError.
        """
        if not self.up:
            raise UnavailableError(f"the master at {self._address} is not reachable")
        with self._guard.call(self._probe_timeout_s):  # leases may wait longer than lookups
            return self._ask(frame, payload, timeout_s)

    def _probe(self) -> None:
        self._ask(leases_frame("renew", []), b"", self._probe_timeout_s)

    def _ask(self, frame: master_pb2.MasterFrame, payload: bytes, timeout_s: float) -> master_pb2.MasterFrameReply:
        stub = self._stub
        if stub is not None:
            return _ask_by_grpc(stub, frame, payload, timeout_s)
        with self._channel(timeout_s) as channel:
            return channel.call(frame, MasterFrameReply, payload, timeout_s=timeout_s)[0]

    @contextlib.contextmanager
    def _channel(self, timeout_s: float) -> Iterator[Channel]:
        pool = self._pool
        if pool is None:
            raise UnavailableError(f"the master at {self._address} is not reachable")
        try:
            with pool.channel(timeout_s) as channel:
                yield channel
        except (UnavailableError, FrameError):
            self._drop(pool)
            raise

    def register(self, namespace: Namespace, timeout_s: float) -> None:
        """Announce a namespace, now if the master is there, and again after it was away.

        What there is no time for, or takes longer, the link's thread does.
        """
        with self._lock:
            self._namespaces[namespace.digest] = namespace
            if namespace.digest in self._announced:
                return
        if self.up:
            try:
                if timeout_s <= 0:
                    raise UnavailableError("no time left")
                self._announce(namespace, timeout_s)
            except KVPoolError as exc:
                log.debug("cannot announce namespace %s: %s", namespace.digest.hex(), exc)
                self._wake.set()

    def _announce(self, namespace: Namespace, timeout_s: float) -> None:
        reply = self._call("RegisterNamespace", namespace_to_proto(namespace), timeout_s)
        self._announced.add(namespace.digest)
        for text in reply.warnings:
            if text not in self.warnings:
                self.warnings.append(text)
                log.warning("%s", text)

    def announce(self, digests: Sequence[bytes], timeout_s: float) -> None:
        """Announce these again, those that were registered, to a master that does not know them. Raises KVPoolError."""
        for digest in digests:
            if (namespace := self._namespaces.get(digest)) is not None:
                self._announce(namespace, timeout_s)

    def place(self, size: int, timeout_s: float) -> NodeAddress | None:
        """Ask for a node that takes our blocks. Raises UnavailableError, at once when the master is away."""
        if not self.up:
            raise UnavailableError(f"the master at {self._address} is not reachable")
        reply = self._call("Place", master_pb2.PlaceRequest(bytes=size), timeout_s)
        return address_from_proto(reply.node) if reply.HasField("node") else None

    # ---- the thread ------------------------------------------------------------------------------

    def _use(
        self, pool: ChannelPool | None, slow: grpc.Channel | None = None, *, instead_of: ChannelPool | None = None
    ) -> bool:
        """Ask this way from now on; returns whether there was a pool before, which is closed.

        ``instead_of``: only if that pool is still in use.
        """
        with self._lock:
            if instead_of is not None and self._pool is not instead_of:
                return False
            pool, self._pool = self._pool, pool
            slow, self._slow_channel = self._slow_channel, slow
            self._stub = None if self._slow_channel is None else master_pb2_grpc.MasterStub(self._slow_channel)
        for old in (pool, slow):
            if old is not None:
                old.close()
        return pool is not None

    def _drop(self, failed: ChannelPool | None = None) -> None:
        """Ask no more, or no more by the pool that failed: there may be another one since."""
        if self._use(None, instead_of=failed):
            self._wake.set()

    def _keep(self) -> None:
        begin_thread()
        retry_s = RETRY_FIRST_S
        while not self._closed:
            self._wake.clear()
            try:
                self._handshake()
                retry_s, pause_s = RETRY_FIRST_S, REFRESH_S
            except KVPoolError as exc:
                self._drop()
                self._wake.clear()
                if str(exc) != self._said:
                    self._said = str(exc)
                    log.warning("no master at %s: %s", self._address, exc)
                retry_s, pause_s = min(2 * retry_s, RETRY_MAX_S), retry_s
            try:
                self._changed()
            except Exception:  # whatever it was, the thread must live: nobody else looks for the master
                log.exception("after the handshake with the master at %s", self._address)
            self._tried.set()
            self._wake.wait(pause_s)
        self._drop()  # what was made while we were closed

    def _handshake(self) -> None:
        request = master_pb2.HandshakeRequest(protocol=PROTOCOL, client=self._name)
        reply = self._call("Handshake", request, HANDSHAKE_S)
        self._said = ""
        self.nodes = [address_from_proto(node) for node in reply.nodes]
        with self._lock:
            if reply.master_epoch != self._epoch:
                self._restarted |= self._epoch > 0
                self._epoch = reply.master_epoch
                self._announced.clear()
            missing = [n for digest, n in self._namespaces.items() if digest not in self._announced]
        if not self.up or reply.data_port != self._data_port:
            self._connect(reply.data_port)
        for namespace in missing:
            self._announce(namespace, HANDSHAKE_S)
        if self._restarted and (self.restarted is None or self.restarted(self._ask)):
            self._restarted = False

    def _connect(self, port: int) -> None:
        """Open the way for lookups: the data port, or gRPC where a firewall lets nothing else through."""
        pool = ChannelPool(
            lambda timeout_s: Channel.connect_tcp(self._host, port, timeout_s), channels_max=CHANNELS_MAX
        )
        self._data_port = port
        with contextlib.suppress(OSError, UnicodeError):
            names.find(self._host, port, HANDSHAKE_S, fresh=True)  # a slow resolver is no firewall; it may have moved
        try:
            with pool.channel(DATA_PORT_S):
                pass
        except KVPoolError as exc:
            pool.close()
            log.warning("lookups go by gRPC, which is slower: the master's data port: %s", exc)
            self._use(None, grpc.insecure_channel(self._address, CHANNEL_OPTIONS))
        else:
            self._use(pool)

    def _call(self, method: str, request: object, timeout_s: float) -> Any:
        # A channel of its own each time: calls are rare, and no thread of gRPC's stays in the engine.
        with grpc.insecure_channel(self._address, CHANNEL_OPTIONS) as channel:
            stub = master_pb2_grpc.MasterStub(channel)
            try:
                return getattr(stub, method)(request, timeout=timeout_s)
            except grpc.RpcError as exc:
                raise error_of(exc) from exc


def _ask_by_grpc(
    stub: master_pb2_grpc.MasterStub, frame: master_pb2.MasterFrame, payload: bytes, timeout_s: float
) -> master_pb2.MasterFrameReply:
    body = frame.WhichOneof("body")
    try:
        if body == "lookup":
            frame.lookup.hashes = payload
            return MasterFrameReply(lookup=stub.Lookup(frame.lookup, timeout=timeout_s))
        if body == "renew":
            return MasterFrameReply(lease=stub.RenewLeases(frame.renew, timeout=timeout_s))
        if body == "residency":
            frame.residency.keys = payload
            return MasterFrameReply(residency=stub.ReportResidency(frame.residency, timeout=timeout_s))
        if body == "release":
            return MasterFrameReply(lease=stub.ReleaseLeases(frame.release, timeout=timeout_s))
        return _ask_of_transfers(stub, frame, payload, timeout_s)
    except grpc.RpcError as exc:
        raise error_of(exc) from exc
    except ValueError as exc:  # the channel was closed just now
        raise UnavailableError(str(exc)) from exc


def _ask_of_transfers(
    stub: master_pb2_grpc.MasterStub, frame: master_pb2.MasterFrame, payload: bytes, timeout_s: float
) -> master_pb2.MasterFrameReply:
    body = frame.WhichOneof("body")
    if body == "open_transfer":
        at = 0
        for part in frame.open_transfer.parts:
            part.keys = payload[at : at + part.blocks * KEY_BYTES]
            at += part.blocks * KEY_BYTES
        return MasterFrameReply(open_transfer=stub.OpenTransfer(frame.open_transfer, timeout=timeout_s))
    if body == "seal_transfer":
        return MasterFrameReply(seal_transfer=stub.SealTransfer(frame.seal_transfer, timeout=timeout_s))
    if body == "claim_transfer":
        return MasterFrameReply(claim_transfer=stub.ClaimTransfer(frame.claim_transfer, timeout=timeout_s))
    if body == "renew_transfers":
        return MasterFrameReply(transfers=stub.RenewTransfers(frame.renew_transfers, timeout=timeout_s))
    return MasterFrameReply(transfers=stub.EndTransfers(frame.end_transfers, timeout=timeout_s))


def leases_frame(kind: str, leases: Sequence[int]) -> master_pb2.MasterFrame:
    """Return the frame that renews or releases leases."""
    request = master_pb2.LeaseRequest(leases=leases)
    return MasterFrame(renew=request) if kind == "renew" else MasterFrame(release=request)
