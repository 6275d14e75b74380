"""The master's process: gRPC and the fast frames in, ``MasterState`` in the middle, effects out.

Everything runs on one loop. Handlers convert, ask the state, perform its effects; whatever is long
comes from the state in slices, and the loop turns between two of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import itertools
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvpool import __version__
from kvpool.config import MasterSettings
from kvpool.core.effects import (
    BackendChanged,
    Close,
    Closed,
    Effect,
    NodeChanged,
    Received,
    Send,
    Tick,
    TransferExpired,
)
from kvpool.core.master import MasterLimits, MasterState
from kvpool.core.messages import Ack, MasterMessage, Probe, Probed
from kvpool.errors import FrameError, InvalidArgumentError, KVPoolError, TooLargeError
from kvpool.rpc import convert
from kvpool.rpc.errors import to_proto
from kvpool.rpc.status import status_of
from kvpool.rpc.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    master_pb2,
    master_pb2_grpc,
    node_pb2,
    node_pb2_grpc,
)
from kvpool.server import engines, metrics, transfers, wire
from kvpool.server.admin import AdminService
from kvpool.server.daemon import run_daemon
from kvpool.server.datadir import held
from kvpool.server.keeper import Keeper
from kvpool.server.peers import Guard, grpc_peer_host, rpc
from kvpool.tiers.catalog import Catalog
from kvpool.transport.frames import encode, parse_message
from kvpool.transport.protocol import After, FrameService

log = logging.getLogger(__name__)

PROTOCOL = 1
TICK_S = 0.1
MESSAGE_BYTES_MAX = 32 << 20
SESSION_QUEUE_MAX = 2048
"""Messages to a node that wait to be sent: all that it is told of pins fits in, and as much again."""

SHUTDOWN_GRACE_S = 1.0


class Pool:
    """The state with what its effects need: sessions to send on, the catalog, the clock."""

    def __init__(self, settings: MasterSettings, catalog: Catalog | None) -> None:
        limits = MasterLimits(
            eviction_high_watermark_ratio=settings.eviction_high_watermark_ratio,
            eviction_ratio=settings.eviction_ratio,
            lease_ttl_s=settings.default_kv_lease_ttl / 1000,
            client_ttl_s=settings.client_ttl / 1000,
            storage_high_watermark_ratio=settings.storage_high_watermark_ratio,
            storage_eviction_ratio=settings.storage_eviction_ratio,
            blocks_max=settings.max_blocks,
        )
        self.settings = settings
        self.guard = Guard("master", insecure=settings.insecure)
        self.epoch = secrets.randbits(63) | 1
        self.state = MasterState(limits, self.epoch, time.monotonic())
        self.data_port = 0
        self.closing = False
        self._queues: dict[int, asyncio.Queue[MasterMessage | None]] = {}
        self._acks: dict[int, Ack] = {}  # the last one of each session, for when the catalog has it
        self._acks_asked = False
        self._numbers = itertools.count(1)
        self._work = asyncio.Event()
        self._turn = asyncio.Lock()
        self._probes: dict[tuple[int, int], asyncio.Future[bytes]] = {}
        self.keeper = Keeper(catalog, self.state, time.monotonic()) if catalog is not None else None

    def perform(self, effects: Iterable[Effect]) -> None:
        """Do what the state decided; nothing here waits."""
        for effect in effects:
            if isinstance(effect, Send):
                self._send(effect)
            elif isinstance(effect, Close):
                self._put(effect.session, None)
            elif isinstance(effect, BackendChanged):
                log.log(logging.WARNING if effect.bad else logging.INFO, "backend %s %s", effect.name, effect.what)
            elif isinstance(effect, NodeChanged):
                level = logging.INFO if effect.state in {"live", "warming"} else logging.WARNING
                log.log(level, "node %s is %s (%s)", effect.node_id, effect.state, effect.why)
            elif isinstance(effect, TransferExpired):
                last = "consumer" if effect.sealed else "producer"
                log.info("transfer %016x of %r has expired: its %s is silent", effect.id, effect.producer, last)
            if self.keeper is not None:
                self.keeper.perform(effect)
        if self.state.busy:
            self._work.set()

    def _send(self, effect: Send) -> None:
        if self.keeper is not None and isinstance(effect.message, Ack):
            # What a node may forget must not be forgotten here. Each says all that those before it have said.
            self._acks[effect.session] = effect.message
            if not self._acks_asked:
                self._acknowledge(self.keeper)
        else:
            self._put(effect.session, effect.message)

    def _acknowledge(self, keeper: Keeper) -> None:
        """Send what is to be acknowledged once all that has been handed over is kept, then what has come since."""
        acks, self._acks = self._acks, {}
        self._acks_asked = True

        def kept() -> None:
            self._acks_asked = False
            for session, message in acks.items():
                self._put(session, replace(message, generation=keeper.generation))
            if self._acks:
                self._acknowledge(keeper)

        keeper.after(kept)

    def _put(self, session: int, message: MasterMessage | None) -> None:
        queue = self._queues.get(session)
        if queue is None:
            return
        try:
            queue.put_nowait(message)
        except asyncio.QueueFull:
            # A node that takes nothing for so long is stopped or gone: it reports anew when it is back.
            log.warning("session %d does not read what it is sent; closing it", session)
            while not queue.empty():
                queue.get_nowait()
            queue.put_nowait(None)

    async def take(self, session: int, message: node_pb2.NodeMessage) -> None:
        """Take in a node's message, letting others have a turn between slices."""
        event = Received(session, wire.node_message_from_proto(message))
        if isinstance(event.message, Probed):
            waiting = self._probes.get((session, event.message.id))
            if waiting is not None and not waiting.done():
                waiting.set_result(event.message.states)
        slices = self.state.ingest(event, time.monotonic())
        while await self._slice(lambda: next(slices, None)):
            pass

    def probe(self, session: int, namespace: bytes, keys: bytes) -> asyncio.Future[bytes]:
        """Ask a node what it knows of these blocks; cancel the future when its answer is awaited no more."""
        place = (session, next(self._numbers))
        future = self._probes[place] = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda _: self._probes.pop(place))
        self._put(session, Probe(place[1], namespace, keys))
        return future

    @contextlib.contextmanager
    def session(self) -> Iterator[tuple[int, asyncio.Queue[MasterMessage | None]]]:
        """Give out a session number with its queue, and tell the state when it is over."""
        number = next(self._numbers)
        queue: asyncio.Queue[MasterMessage | None] = asyncio.Queue(SESSION_QUEUE_MAX)
        self._queues[number] = queue
        if self.closing:
            queue.put_nowait(None)
        try:
            yield number, queue
        finally:
            del self._queues[number]
            self.perform(self.state.handle(Closed(number), time.monotonic()))

    def close_sessions(self) -> None:
        """End every session once what is on its way to its node is sent, as the master is about to stop."""
        self.closing = True
        for number in self._queues:
            self._put(number, None)

    async def tick_for_ever(self) -> None:
        """Tell the state the time."""
        while True:
            self.perform(self.state.handle(Tick(), time.monotonic()))
            if self.keeper is not None:
                self.perform(self.keeper.tick(time.monotonic()))
            await asyncio.sleep(TICK_S)

    async def work_for_ever(self) -> None:
        """Do the long work in slices."""
        while True:
            await self._work.wait()
            self._work.clear()
            while self.state.busy:
                await self._slice(self.state.work)

    async def _slice(self, step: Callable[[], list[Effect] | None]) -> bool:
        """Do one slice of long work, one in each turn of the loop whoever asks; False when there was none left."""
        async with self._turn:
            effects = step()
            if effects is None:
                return False
            self.perform(effects)
            await asyncio.sleep(0)  # lookups that have come meanwhile go before the next slice
            return True

    # ---- frames ----------------------------------------------------------------------------------

    def frame(self, header: bytes, payload: memoryview, _peer_host: str) -> tuple[list[bytes], After | None]:
        """Answer a frame on the data port; leases and touches follow once the answer is on its way."""
        request = parse_message(master_pb2.MasterFrame, header)
        after: After | None = None
        try:
            reply, after = self._answer(request, payload)
        except FrameError:
            raise
        except KVPoolError as exc:
            reply = master_pb2.MasterFrameReply(error=to_proto(exc))
        reply.id = request.id
        return [encode(reply)], after

    def _answer(
        self, request: master_pb2.MasterFrame, payload: memoryview
    ) -> tuple[master_pb2.MasterFrameReply, After | None]:
        body = request.WhichOneof("body")
        if body == "lookup":
            answer = self.state.lookup(wire.query_from_proto(request.lookup, payload))
            reply = master_pb2.MasterFrameReply(lookup=wire.answer_to_proto(answer, self.state.reach))
            return reply, lambda: self.state.settle(answer, time.monotonic())
        if body == "renew":
            unknown = self.state.renew(list(request.renew.leases), time.monotonic())
        elif body == "release":
            unknown = self.state.release(list(request.release.leases))
        elif body == "residency":
            return master_pb2.MasterFrameReply(residency=self.report(request.residency, payload)), None
        elif body in transfers.FRAMES:
            return transfers.frame(self, request, payload), None
        else:
            raise InvalidArgumentError("body", "must be a lookup, or about leases, residency or transfers")
        return master_pb2.MasterFrameReply(lease=master_pb2.LeaseResponse(unknown=unknown)), None

    def report(self, request: master_pb2.ResidencyRequest, keys: bytes | memoryview) -> master_pb2.ResidencyResponse:
        """Take in what an engine holds."""
        again = self.state.residency.report(wire.report_from_proto(request, keys), self.state.uptime(time.monotonic()))
        return master_pb2.ResidencyResponse(again=again)


class MasterService(master_pb2_grpc.MasterServicer):
    """What clients ask over gRPC."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    @rpc
    async def Handshake(self, request: master_pb2.HandshakeRequest, context: Any) -> master_pb2.HandshakeResponse:
        """Say who we are."""
        if request.protocol != PROTOCOL:
            raise InvalidArgumentError("protocol", f"this master speaks {PROTOCOL}, the client {request.protocol}")
        nodes = [n for n in self.pool.state.nodes.values() if n.state in {"live", "warming"}]
        return master_pb2.HandshakeResponse(
            protocol=PROTOCOL,
            version=__version__,
            master_epoch=self.pool.epoch,
            data_port=self.pool.data_port,
            lease_ttl_ms=self.pool.settings.default_kv_lease_ttl,
            nodes=[convert.address_to_proto(n.address) for n in nodes],
        )

    @rpc
    async def RegisterNamespace(self, request: Any, context: Any) -> master_pb2.RegisterNamespaceResponse:
        """Make a namespace known."""
        namespace = convert.namespace_from_proto(request)
        warning, effects = self.pool.state.announce(namespace, time.monotonic())
        self.pool.perform(effects)
        if warning:
            log.warning("%s", warning)
        return master_pb2.RegisterNamespaceResponse(digest=namespace.digest, warnings=[warning] if warning else [])

    @rpc
    async def Lookup(self, request: master_pb2.LookupRequest, context: Any) -> master_pb2.LookupResponse:
        """Answer as the frames do."""
        answer = self.pool.state.lookup(wire.query_from_proto(request, request.hashes))
        response = wire.answer_to_proto(answer, self.pool.state.reach)
        self.pool.state.settle(answer, time.monotonic())
        return response

    @rpc
    async def RenewLeases(self, request: master_pb2.LeaseRequest, context: Any) -> master_pb2.LeaseResponse:
        """Renew leases."""
        return master_pb2.LeaseResponse(unknown=self.pool.state.renew(list(request.leases), time.monotonic()))

    @rpc
    async def ReleaseLeases(self, request: master_pb2.LeaseRequest, context: Any) -> master_pb2.LeaseResponse:
        """Release leases."""
        return master_pb2.LeaseResponse(unknown=self.pool.state.release(list(request.leases)))

    @rpc
    async def Place(self, request: master_pb2.PlaceRequest, context: Any) -> master_pb2.PlaceResponse:
        """Name a node."""
        node = self.pool.state.place(request.bytes)
        if node is None:
            if self.pool.state.place(0) is not None:
                raise TooLargeError(f"a block of {request.bytes} bytes is larger than every live node's segment")
            return master_pb2.PlaceResponse()
        return master_pb2.PlaceResponse(node=convert.address_to_proto(node.address))

    @rpc
    async def ReportResidency(self, request: master_pb2.ResidencyRequest, context: Any) -> master_pb2.ResidencyResponse:
        """Take in what an engine holds, as the frames do."""
        return self.pool.report(request, request.keys)

    @rpc
    async def OpenTransfer(
        self, request: master_pb2.OpenTransferRequest, context: Any
    ) -> master_pb2.OpenTransferResponse:
        """Begin to keep a prompt for another engine."""
        return transfers.open_transfer(self.pool, request)

    @rpc
    async def SealTransfer(
        self, request: master_pb2.SealTransferRequest, context: Any
    ) -> master_pb2.SealTransferResponse:
        """Take it as stored."""
        return transfers.seal_transfer(self.pool, request)

    @rpc
    async def ClaimTransfer(
        self, request: master_pb2.ClaimTransferRequest, context: Any
    ) -> master_pb2.ClaimTransferResponse:
        """Say where it lies."""
        return transfers.claim_transfer(self.pool, request)

    @rpc
    async def RenewTransfers(self, request: master_pb2.TransfersRequest, context: Any) -> master_pb2.TransfersResponse:
        """Renew transfers."""
        return transfers.renew_transfers(self.pool, request)

    @rpc
    async def EndTransfers(self, request: master_pb2.TransfersRequest, context: Any) -> master_pb2.TransfersResponse:
        """End transfers."""
        return transfers.end_transfers(self.pool, request)

    @rpc
    async def AnnounceEngine(self, request: Any, context: Any) -> master_pb2.AnnounceEngineResponse:
        """Take in what an engine says of itself."""
        return engines.announce(self.pool, request)

    @rpc
    async def Engines(self, request: master_pb2.EnginesRequest, context: Any) -> master_pb2.EnginesResponse:
        """Return every engine that has announced itself."""
        return engines.engines(self.pool)


class NodeSessionService(node_pb2_grpc.NodeSessionServicer):
    """The nodes' sessions."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    async def Session(
        self, request_iterator: AsyncIterator[node_pb2.NodeMessage], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[node_pb2.MasterMessage]:
        """Take a node's messages in a task of its own, send what the state says to the node."""
        try:
            self.pool.guard.check(grpc_peer_host(context.peer()))
        except KVPoolError as exc:
            await context.abort(status_of(exc), str(exc))
        with self.pool.session() as (number, queue):
            reader = asyncio.create_task(self._read(number, request_iterator, queue))
            try:
                while (message := await queue.get()) is not None:
                    yield wire.master_message_to_proto(message)
            finally:
                reader.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await reader
            if not reader.cancelled() and (error := reader.result()) is not None:
                await context.abort(status_of(error), str(error))

    async def _read(
        self, number: int, messages: AsyncIterator[node_pb2.NodeMessage], queue: asyncio.Queue[MasterMessage | None]
    ) -> KVPoolError | None:
        error: KVPoolError | None = None
        try:
            async for message in messages:
                await self.pool.take(number, message)
        except KVPoolError as exc:
            log.warning("session %d sent what is not allowed: %s", number, exc)
            error = exc
        except grpc.RpcError as exc:
            log.debug("session %d ended: %s", number, exc)
        except Exception as exc:  # a defect met by one node's message must not leave its session half alive
            if self.pool.closing and isinstance(exc, grpc.aio.BaseError):
                log.debug("session %d ended with the server: %s", number, exc)
            else:
                log.exception("session %d is closed after an unexpected error", number)
                error = KVPoolError("unexpected error, see the master's log")
        if queue.full():
            queue.get_nowait()
        queue.put_nowait(None)
        return error


def _error_frame(exc: KVPoolError) -> bytes:
    return encode(master_pb2.MasterFrameReply(error=to_proto(exc)))


def _services(*modules: Any) -> list[str]:
    return [s.full_name for m in modules for s in m.DESCRIPTOR.services_by_name.values()]


async def serve(settings: MasterSettings, stop: asyncio.Event) -> int:
    """Serve until ``stop``; returns the exit code. Raises InvalidArgumentError for a port in use."""
    catalog = Catalog(settings.data_dir) if settings.data_dir else None
    pool = Pool(settings, catalog)
    if pool.keeper is not None:
        pool.keeper.load()
    loop = asyncio.get_running_loop()
    frames = FrameService(pool.frame, _error_frame, check=pool.guard.check)
    try:
        data_server = await loop.create_server(frames, settings.host, settings.data_port)
    except (OSError, UnicodeError) as exc:
        taken = isinstance(exc, OSError) and exc.errno in {errno.EADDRINUSE, errno.EACCES}
        why = getattr(exc, "strerror", None) or exc
        raise InvalidArgumentError(
            "data_port" if taken else "host", f"cannot listen on {settings.host}:{settings.data_port}: {why}"
        ) from exc
    pool.data_port = data_server.sockets[0].getsockname()[1]

    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
        ]
    )
    master_pb2_grpc.add_MasterServicer_to_server(MasterService(pool), server)
    node_pb2_grpc.add_NodeSessionServicer_to_server(NodeSessionService(pool), server)
    admin_pb2_grpc.add_AdminServicer_to_server(AdminService(pool), server)
    healths = health.aio.HealthServicer()  # type: ignore[attr-defined]
    health_pb2_grpc.add_HealthServicer_to_server(healths, server)
    names = _services(master_pb2, node_pb2, admin_pb2)
    reflection.enable_server_reflection((*names, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    try:
        port = server.add_insecure_port(f"{host}:{settings.port}")
    except RuntimeError as exc:
        raise InvalidArgumentError("port", f"cannot listen on {host}:{settings.port}: it is in use") from exc
    read = functools.partial(metrics.master_values, pool.state, time.monotonic)
    stop_metrics = metrics.serve(settings.metrics_port, settings.host, read, insecure=settings.insecure)
    await server.start()
    for name in ("", *names):
        await healths.set(name, health_pb2.HealthCheckResponse.SERVING)
    log.info("master %s serves on %s:%d, lookups on port %d", __version__, host, port, pool.data_port)
    tasks = [asyncio.create_task(pool.tick_for_ever()), asyncio.create_task(pool.work_for_ever())]
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([*tasks, stopped], return_when=asyncio.FIRST_COMPLETED)
    failed = [t.exception() for t in tasks if t.done() and not t.cancelled()]
    for defect in failed:
        log.error("the master stops: %r", defect, exc_info=defect)
    for task in (*tasks, stopped):
        task.cancel()
    await healths.enter_graceful_shutdown()
    pool.close_sessions()
    data_server.close()
    frames.close()
    stop_metrics()
    await server.stop(SHUTDOWN_GRACE_S)
    if pool.keeper is not None:
        pool.keeper.close()
    return 1 if failed else 0


def run(settings: MasterSettings, notes: list[str]) -> int:
    """Run the master until it is told to stop; returns the exit code. Raises InvalidArgumentError."""
    with held(settings.data_dir):
        return run_daemon(functools.partial(serve, settings), settings.log_level, notes)
