"""The engines that have announced themselves to the master: what is told of instances, and instances by themselves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import grpc

from kvpool.config import boot_id
from kvpool.proxy.fleet import Fleet
from kvpool.proxy.routing import Instance, Role
from kvpool.rpc.v1 import master_pb2, master_pb2_grpc
from kvpool.server.peers import is_loopback

log = logging.getLogger(__name__)

PROTOCOL: Final = 1
REFRESH_S: Final = 1.0
ASK_S: Final = 2.0

SETTLE_S: Final = 10.0
"""So long after the start of a new master, engines that it does not know may not have reached it yet."""

GONE_S: Final = 5.0
"""An engine that was silent for so long has ended: what it said of its memory is not believed."""

UNREACHABLE_MAX: Final = 1000

ROLES: Final = {"kv_producer": Role.PREFILL, "kv_consumer": Role.DECODE, "kv_both": Role.BOTH}


@dataclass(slots=True)
class Told:
    """What the engines behind one address say of themselves: several are ranks of data parallelism."""

    role: Role
    model: str = ""
    namespaces: set[bytes] = field(default_factory=set)
    boot_ids: set[str] = field(default_factory=set)
    transfers: bool = False
    layerwise: bool = False
    loads: bool = False
    residency: bool = False

    def add(self, said: master_pb2.EngineAnnouncement) -> None:
        """Take in one engine's word."""
        self.model = self.model or said.model
        self.namespaces.update(said.namespaces)
        if said.boot_id:
            self.boot_ids.add(said.boot_id)
        self.transfers |= said.transfers
        self.layerwise |= said.layerwise
        self.loads |= said.loads
        self.residency |= said.residency


class Discovery:
    """Asks the master for its engines. ``start`` and ``close`` belong to the loop that it is used on.

    A master that is away changes nothing; one that was restarted is given time to hear from its engines.
    """

    def __init__(self, fleet: Fleet, channel: grpc.aio.Channel, *, adds: bool) -> None:
        """``adds``: make instances of the engines, and drain those that end."""
        self._fleet = fleet
        self._stub = master_pb2_grpc.MasterStub(channel)
        self._adds = adds
        self._told: dict[str, Told] = {}
        self._boot_id = boot_id()
        self._unreachable: set[int] = set()  # engines whose address was complained of
        self._mine: set[tuple[Role, str]] = set()
        self._epoch = 0
        self._settled_at = 0.0
        self._problem = ""
        self._task: asyncio.Task[None] | None = None
        self.urls: dict[int, str] = {}
        """Base URLs of the engines that live, by owner."""

    async def start(self) -> None:
        """Begin to ask."""
        self._task = asyncio.create_task(self._refresh())

    async def close(self) -> None:
        """Ask no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def of(self, instance: Instance) -> Told | None:
        """Return what an instance's engines say; None where they have not announced themselves."""
        return self._told.get(instance.name)

    def found(self, instance: Instance) -> bool:
        """Whether it is an instance because it has announced itself."""
        return (instance.role, instance.name) in self._mine

    async def _refresh(self) -> None:
        while True:
            try:
                request = master_pb2.HandshakeRequest(protocol=PROTOCOL, client="kvpool-proxy")
                epoch = (await self._stub.Handshake(request, timeout=ASK_S)).master_epoch
                answer = await self._stub.Engines(master_pb2.EnginesRequest(), timeout=ASK_S)
                self.take(epoch, answer.engines, asyncio.get_running_loop().time())
            except Exception as exc:  # nonsense too: this goes on as long as the proxy
                rpc = exc if isinstance(exc, grpc.aio.AioRpcError) else None
                problem = f"{rpc.code().name}: {rpc.details()}" if rpc is not None else repr(exc)
                if problem != self._problem:
                    log.warning("the master does not tell its engines: %s", problem)
                self._problem = problem
            else:
                self._problem = ""
            await asyncio.sleep(REFRESH_S)

    def take(self, epoch: int, engines: Iterable[Any], now: float) -> None:
        """Take in the engines (``EngineStatus``) that a master knows."""
        if epoch != self._epoch:
            self._epoch, self._settled_at = epoch, now + SETTLE_S
        told: dict[str, Told] = {}
        self.urls = {}
        for status in engines:
            said = status.engine
            if not said.address or said.role not in ROLES or self._elsewhere(said):
                continue
            url = f"http://{said.address}"
            if status.last_seen_s < GONE_S:
                self.urls[said.owner] = url
            told.setdefault(url, Told(ROLES[said.role])).add(said)
        if now >= self._settled_at:
            self._told = told
        else:
            self._told |= told
        if self._adds:
            self._follow({(one.role, url) for url, one in self._told.items()})
        changed: set[Role] = set()
        for instance in self._fleet.router.instances.values():
            if (one := self._told.get(instance.name)) is not None:
                before = instance.model, instance.transfers
                instance.model, instance.transfers, instance.layerwise = one.model, one.transfers, one.layerwise
                if before != (instance.model, instance.transfers):
                    changed.add(instance.role)
        for role in changed:
            self._fleet.changed(role)

    def _elsewhere(self, said: Any) -> bool:
        """Whether an engine's address reaches it on its own host alone, which is not this one."""
        if said.boot_id in {"", self._boot_id} or not _is_loopback(said.address):
            return False
        if said.owner not in self._unreachable:
            log.warning("an engine of another host announces %s: set its engine_address", said.address)
            self._unreachable = {said.owner, *list(self._unreachable)[:UNREACHABLE_MAX]}
        return True

    def _follow(self, there: set[tuple[Role, str]]) -> None:
        """Let instances come and go; what an operator does with one is left as it is."""
        router, fleet = self._fleet.router, self._fleet
        for role, url in self._mine - there:
            self._mine.discard((role, url))
            instance = router.instances.get((role, url))
            if instance is not None and not instance.leaving:
                log.info("%s instance %s has left", role, url)
                fleet.remove(instance)
        named = {one.name for one in router.instances.values() if not one.leaving}
        for role, url in sorted(there - self._mine):
            if url not in named:
                log.info("%s instance %s has announced itself", role, url)
                fleet.add(role, url, up=False)
                self._mine.add((role, url))


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    return host == "localhost" or is_loopback(host)
