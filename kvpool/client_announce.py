"""Tells the master, from a thread, that an engine is there, what it does and where requests reach it."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from typing import Any

from kvpool.config import boot_id
from kvpool.errors import InvalidArgumentError, KVPoolError
from kvpool.processes import start_thread
from kvpool.rpc.v1.master_pb2 import EngineAnnouncement

log = logging.getLogger(__name__)

Call = Callable[[str, object, float], Any]
"""An rpc's name, its request and seconds to the master's answer; raises KVPoolError."""

ALIVE_S = 3.0
"""How often an engine says that it is there: more often than the master asks for, since a new one knows nobody."""

ASK_S = 1.0
BYE_S = 0.2


class EngineAnnouncer:
    """What one engine process says of itself: ``say`` never waits; from the first word on a thread tells the master."""

    def __init__(self, call: Call, master_host: str, owner: int) -> None:
        self._call = call
        self._master_host = master_host
        self._said = EngineAnnouncement(owner=owner, host=socket.gethostname(), boot_id=boot_id())
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._refused = ""

    def say(self, **said: Any) -> None:
        """Say this, and what was said before of other fields. Raises InvalidArgumentError for an unknown field."""
        with self._lock:
            try:
                new = EngineAnnouncement(**said)
            except (TypeError, ValueError) as error:
                raise InvalidArgumentError("announcement", str(error)) from error
            for name in said:
                self._said.ClearField(name)
            self._said.MergeFrom(new)
            if self._thread is None and not self._closing.is_set():
                self._thread = start_thread(self._run, "kvpool-announce")
        self._wake.set()

    def close(self) -> None:
        """End the thread, after a word to the master if it is there."""
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(2 * BYE_S)

    def _run(self) -> None:
        while not self._closing.is_set():
            self._wake.clear()
            self._wake.wait(self._tell())
        try:
            self._call("AnnounceEngine", EngineAnnouncement(owner=self._said.owner, bye=True), BYE_S)
        except KVPoolError as error:
            log.debug("the end of the engine is not announced: %s", error)

    def _tell(self) -> float:
        """Tell the master once; returns the seconds to the next time."""
        with self._lock:
            said = EngineAnnouncement()
            said.CopyFrom(self._said)
        if said.address.startswith(":"):
            host = own_address(self._master_host)
            said.address = f"[{host}]{said.address}" if ":" in host else f"{host}{said.address}" if host else ""
        try:
            ttl_ms: int = self._call("AnnounceEngine", said, ASK_S).ttl_ms
        except InvalidArgumentError as error:
            if str(error) != self._refused:
                self._refused = str(error)
                log.warning("the master does not take what this engine says of itself: %s", error)
            return ALIVE_S
        except KVPoolError as error:
            log.debug("the engine is not announced: %s", error)
            return ALIVE_S
        return min(ALIVE_S, ttl_ms / 3000)


def own_address(master_host: str) -> str:
    """Return this host's address on its way to the master; "" where there is none. Sends nothing, may ask DNS."""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(master_host, 9, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0])
    except OSError as error:
        log.debug("this host's address is not known: %s", error)
    return ""
