"""The node's process: its segment, its data plane, its session with the master."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import os
import secrets
import socket
from collections.abc import Iterable
from pathlib import Path

import grpc

from kvpool.config import NodeSettings, boot_id, split_address
from kvpool.core.messages import NodeMessage, Scanned
from kvpool.core.reporter import Reporter
from kvpool.core.segment import SegmentState
from kvpool.core.slot_table import SlotTable, table_bytes
from kvpool.errors import ConfigError, InvalidArgumentError, KVPoolError, UnavailableError
from kvpool.model import NodeAddress, format_size
from kvpool.rpc.v1 import node_pb2, node_pb2_grpc
from kvpool.server import metrics, wire
from kvpool.server.daemon import run_daemon
from kvpool.server.dataplane import DataPlane
from kvpool.server.filetier import FileTier
from kvpool.server.peers import Guard, is_loopback
from kvpool.server.storage import open_tier, storage_values
from kvpool.tiers.dram import Segment
from kvpool.tiers.opening import check_urls
from kvpool.transport.server import FrameServer

log = logging.getLogger(__name__)

HEARTBEAT_S = 0.2
FLUSH_S = 0.002
FLUSH_EVERY_S = 0.02
"""The first change is reported at once, what follows within this time in one more delta."""

WELCOME_S = 5.0
RETRY_FIRST_S = 0.05
RETRY_MAX_S = 1.0
COMPLAIN_EVERY_S = 10.0
TOLD_S = 1.0
"""How long a node that ends waits for the master to take what it has to tell of files."""

QUEUE_MAX = 64
MESSAGE_BYTES_MAX = 32 << 20
EXIT_SUPERSEDED = 3


class Session:
    """Keeps a session with the master: connects, says Hello, reports, and begins again when it breaks."""

    def __init__(self, master: str, state: SegmentState, reporter: Reporter, tier: FileTier | None = None) -> None:
        self._master = master
        self._state = state
        self._reporter = reporter
        self._tier = tier
        if tier is not None:
            tier.changed, tier.tell, tier.listening = self.changed, self._tell, lambda: reporter.welcomed
        self._out: asyncio.Queue[NodeMessage] = asyncio.Queue()
        self._flush_at: asyncio.TimerHandle | None = None
        self._flushed_at = 0.0
        self._report_asked = False
        self.superseded = asyncio.Event()

    def changed(self) -> None:
        """Report soon; what changes meanwhile goes along."""
        if self._flush_at is None:
            loop = asyncio.get_running_loop()
            self._flush_at = loop.call_at(max(loop.time() + FLUSH_S, self._flushed_at + FLUSH_EVERY_S), self._flush)

    def _flush(self) -> None:
        if self._flush_at is not None:
            self._flush_at.cancel()
            self._flush_at = None
        self._flushed_at = asyncio.get_running_loop().time()
        if self._out.qsize() >= QUEUE_MAX:
            self._reporter.spare()
            self.changed()  # the master takes nothing at the moment: the changes stay where they are, unless many
            return
        self._put(self._reporter.flush())

    def _report(self) -> None:
        """Go on with an inventory: a slice, then the others have their turn."""
        if self._reporter.reporting and not self._report_asked:
            self._report_asked = True
            asyncio.get_running_loop().call_later(0 if self._out.qsize() < QUEUE_MAX else FLUSH_S, self._report_slice)

    def _report_slice(self) -> None:
        self._report_asked = False
        if self._out.qsize() < QUEUE_MAX:
            self._put(self._reporter.more())
        self._report()

    def _tell(self, scanned: Scanned) -> bool:
        """Send a piece of a scan, unless the master has not taken enough of what came before."""
        if not self._reporter.welcomed or self._out.qsize() >= QUEUE_MAX:
            return False
        self._flush()
        if self._reporter.behind:
            return False  # a file whose change is told after the scan was changed after it
        self._put([scanned])
        return True

    def _put(self, messages: Iterable[NodeMessage]) -> None:
        for message in messages:
            self._out.put_nowait(message)
        if self._reporter.behind:
            self.changed()

    async def run(self) -> None:
        """Keep the session until cancelled, or until another process takes our place."""
        retry_s, complained = RETRY_FIRST_S, -COMPLAIN_EVERY_S
        loop = asyncio.get_running_loop()
        while not self._reporter.superseded:
            try:
                await self._once()
                retry_s = RETRY_FIRST_S
            except (grpc.RpcError, KVPoolError) as exc:
                text = exc.details() if isinstance(exc, grpc.aio.AioRpcError) else str(exc)
                if loop.time() - complained >= COMPLAIN_EVERY_S:
                    complained = loop.time()
                    log.warning("no session with the master at %s: %s; trying again", self._master, text)
            if self._reporter.welcomed:
                retry_s, complained = RETRY_FIRST_S, -COMPLAIN_EVERY_S
            self._reporter.disconnected()
            if self._tier is not None:
                self._tier.session_ended()
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, RETRY_MAX_S)
        self.superseded.set()

    async def told(self) -> None:
        """Wait until the master will not forget any change of files, within TOLD_S, if it is there."""
        loop = asyncio.get_running_loop()
        end = loop.time() + TOLD_S
        while self._reporter.welcomed and loop.time() < end and self._tier is not None and self._tier.state.changes:
            self._flush()
            await asyncio.sleep(FLUSH_S)
        if self._tier is not None and self._tier.state.changes:
            log.warning("the master has not been told of %d files", len(self._tier.state.changes))

    async def _once(self) -> None:
        options = [
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
            ("grpc.keepalive_time_ms", 30_000),
            # Each try is a channel of its own: one that remembers failures would wait on its own account.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
        ]
        async with grpc.aio.insecure_channel(self._master, options) as channel:
            call = node_pb2_grpc.NodeSessionStub(channel).Session()
            self._out = asyncio.Queue()
            self._put(self._reporter.connected())
            tasks = [asyncio.create_task(part) for part in (self._read(call), self._write(call), self._beat())]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                call.cancel()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, call: grpc.aio.StreamStreamCall[node_pb2.NodeMessage, node_pb2.MasterMessage]) -> None:
        async for message in call:
            self._put(self._reporter.handle(wire.master_message_from_proto(message)))
            self._report()
            if self._reporter.superseded:
                return
            if self._tier is not None:
                self._tier.pump()
            if message.WhichOneof("body") == "welcome":
                log.info("session with the master at %s", self._master)
            self.changed()
        # Ended in order by the master: begin again.

    async def _write(self, call: grpc.aio.StreamStreamCall[node_pb2.NodeMessage, node_pb2.MasterMessage]) -> None:
        while True:
            message = await self._out.get()
            try:
                await call.write(wire.node_message_to_proto(message))
            except asyncio.InvalidStateError:
                return  # the call is over: what ended it is for _read to say

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        welcome_by = loop.time() + WELCOME_S
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            if not self._reporter.welcomed and loop.time() > welcome_by:
                raise UnavailableError(f"the master has not answered our Hello for {WELCOME_S:g} s")
            if self._reporter.welcomed and self._out.empty():
                self._put([self._reporter.heartbeat()])


def node_id(settings: NodeSettings) -> str:
    """Return the node's stable name: as set, as kept in the data directory, or made from host and socket."""
    if settings.node_id:
        return settings.node_id
    name = socket.gethostname()
    made = f"{name}-{hashlib.blake2b(f'{name}|{settings.socket_path}'.encode(), digest_size=4).hexdigest()}"
    if settings.data_dir is None:
        return made
    kept = Path(settings.data_dir) / "node_id"
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        if kept.exists():
            return kept.read_text().strip() or made
        kept.write_text(made + "\n")
    except OSError as exc:
        raise ConfigError("data_dir", f"cannot keep the node's id in {settings.data_dir}: {exc.strerror}") from exc
    return made


def advertised_host(settings: NodeSettings) -> str:
    """Return the address that other hosts reach us by: as set, or that of the way to the master."""
    if settings.advertise_host:
        return settings.advertise_host
    if settings.host not in {"0.0.0.0", "::", ""}:
        return settings.host
    host, port = split_address(settings.master, "master")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.connect(address)  # sends nothing: it only chooses a route
            return str(probe.getsockname()[0])
    except (OSError, UnicodeError):
        return "127.0.0.1"


def _address(settings: NodeSettings, name: str, port: int) -> NodeAddress:
    host = advertised_host(settings)
    if not settings.insecure and not is_loopback(host):
        log.info("protected mode: other hosts are refused; --insecure lets them in")
    if settings.insecure and is_loopback(host):
        log.warning("other hosts cannot reach this node: it announces %s; give --advertise_host", host)
    return NodeAddress(name, host, port, str(Path(settings.socket_path).absolute()), boot_id())


def _prepare_socket_dir(path: str) -> None:
    parent = Path(path).parent
    try:
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = parent.stat()
    except OSError as exc:
        raise ConfigError("socket_path", f"cannot make {parent}: {exc.strerror}") from exc
    if status.st_uid not in {os.getuid(), 0} and not status.st_mode & 0o1000:
        raise ConfigError("socket_path", f"{parent} belongs to another user")


async def serve(settings: NodeSettings, stop: asyncio.Event) -> int:
    """Serve until ``stop``; returns the exit code. Raises KVPoolError for what cannot be started."""
    _prepare_socket_dir(settings.socket_path)
    epoch = secrets.randbits(63) | 1
    try:
        state = SegmentState(settings.segment_size)
    except InvalidArgumentError as exc:
        raise ConfigError("segment_size", exc.problem) from exc
    check_urls(settings.storage_backends or ())
    log.info("populating a segment of %s", format_size(settings.segment_size))
    segment = await asyncio.to_thread(
        Segment.create, settings.segment_size, tail_bytes=table_bytes(state.capacity_bytes), lock=settings.lock_memory
    )
    state.table = SlotTable(segment.view, state.capacity_bytes)
    if not segment.locked:
        log.warning("the segment is not locked in memory: %s", segment.lock_error)
    name = node_id(settings)
    plane = DataPlane(segment, state, name, epoch, Guard("node", insecure=settings.insecure))
    tier = plane.tier = await open_tier(settings, state, segment, f"{name}-{epoch:016x}")
    server = FrameServer(plane, connections_max=settings.connections_max)
    try:
        _, port = server.listen_tcp(settings.host, settings.port)
        server.listen_unix(settings.socket_path, settings.socket_mode)
        stop_metrics = metrics.serve(
            settings.metrics_port,
            settings.host,
            lambda: metrics.node_values(state, plane) + (storage_values(tier) if tier is not None else []),
            insecure=settings.insecure,
        )
    except KVPoolError:
        await server.close()
        raise
    address = _address(settings, name, port)
    reporter = Reporter(
        state, address, epoch, tier.state if tier is not None else None, memory="Cache" in str(settings.pipeline)
    )
    session = Session(settings.master, state, reporter, tier)
    plane.changed = session.changed
    log.info("node %s is ready on %s and %s:%d", name, address.socket_path, address.host, port)
    running = asyncio.create_task(session.run())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([running, stopped], return_when=asyncio.FIRST_COMPLETED)
    code = 0
    if session.superseded.is_set():
        log.error("another process has taken the name %s: this one exits", name)
        code = EXIT_SUPERSEDED
    elif running.done():
        log.error("the node stops: %r", running.exception(), exc_info=running.exception())
        code = 1
    close_s = 5.0
    if code == 0 and tier is not None:
        await asyncio.gather(server.close(close_s), tier.finish())
        close_s = 0.0
        await session.told()
        await tier.leave()
    running.cancel()
    stopped.cancel()
    await asyncio.gather(running, stopped, return_exceptions=True)
    stop_metrics()
    await server.close(close_s)
    if tier is not None:
        tier.close()
    segment.close()
    return code


def run(settings: NodeSettings, notes: list[str]) -> int:
    """Run a node until SIGTERM or SIGINT; returns the exit code."""
    return run_daemon(functools.partial(serve, settings), settings.log_level, notes)
