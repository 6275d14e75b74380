"""TCP connections made within a caller's time, the look-up of the host's name included.

The system's resolver knows no deadline, so a thread asks it; what it found last is used while it is asked again.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Any

from kvpool.processes import start_thread
from kvpool.transport.sockets import tune_tcp

FRESH_S = 10.0
"""How long a name's addresses are used before they are looked up anew."""

LEAST_S = 0.001

Addresses = list[tuple[int, Any]]
"""(family, address) of each."""


class _Name:
    """What is known of a host and port."""

    def __init__(self) -> None:
        self.found: Addresses = []
        self.fresh_until = 0.0
        self.asked = False  # a thread is looking
        self.error = "its name cannot be looked up"


class Names:
    """The addresses of hosts. Thread-safe."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, int], _Name] = {}
        self.reset()

    def reset(self) -> None:
        """Forget everything: a forked child has nobody who looks."""
        self._changed = threading.Condition()
        self._names.clear()

    def find(self, host: str, port: int, timeout_s: float, *, fresh: bool = False) -> Addresses:
        """Return a host's addresses, those known last while they are looked up anew, unless they must be ``fresh``.

        Raises OSError when there is none in time, UnicodeError for what is no name.
        """
        try:
            return _look_up(host, port, socket.AI_NUMERICHOST)
        except socket.gaierror:
            pass  # a name
        with self._changed:
            name = self._names.setdefault((host, port), _Name())
            if (fresh or time.monotonic() >= name.fresh_until) and not name.asked:
                name.asked = start_thread(self._ask, "kvpool-names", host, port, name) is not None
            if (fresh or not name.found) and not self._changed.wait_for(lambda: not name.asked, timeout_s):
                raise TimeoutError("its name is not found in time")
            if not name.found:
                raise OSError(name.error)
            return name.found

    def doubt(self, host: str, port: int) -> None:
        """Have a name looked up anew the next time: nobody answers where it has led to."""
        with self._changed:
            if (name := self._names.get((host, port))) is not None:
                name.fresh_until = 0.0

    def _ask(self, host: str, port: int, name: _Name) -> None:
        found: Addresses = []
        try:
            found = _look_up(host, port)
        except OSError as exc:
            name.error = str(exc)
        finally:
            with self._changed:
                if found:
                    name.found, name.fresh_until = found, time.monotonic() + FRESH_S
                name.asked = False
                self._changed.notify_all()


def dial(host: str, port: int, timeout_s: float) -> socket.socket:
    """Connect to one of a host's addresses. Raises OSError when none answers in time, UnicodeError for no name."""
    if not 0 < port < 1 << 16:
        raise OSError("there is no such port")
    deadline = time.monotonic() + timeout_s
    addresses = names.find(host, port, timeout_s)
    failure = OSError("it has no address")
    for number, (family, address) in enumerate(addresses):
        left_s = (deadline - time.monotonic()) / (len(addresses) - number)
        try:
            return _connect(family, address, max(LEAST_S, left_s))
        except OSError as exc:
            failure = exc
    names.doubt(host, port)
    raise failure


def _connect(family: int, address: Any, timeout_s: float) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect(address)
        sock.settimeout(None)
        tune_tcp(sock)
    except OSError:
        sock.close()
        raise
    return sock


def _look_up(host: str, port: int, flags: int = 0) -> Addresses:
    return [(family, address) for family, _, _, _, address in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=flags
    )]  # fmt: skip


names = Names()

os.register_at_fork(after_in_child=names.reset)
