"""Protected mode: until TLS or a token exists, only this host is answered unless told otherwise."""

from __future__ import annotations

import functools
import ipaddress
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc

from kvpool.errors import KVPoolError, RefusedError
from kvpool.rpc.status import status_of

MESSAGE = (
    "protected mode: this {what} answers only clients that reach it by the loopback (127.0.0.1); "
    "start it with --insecure to answer every host of a network that you trust"
)


@functools.lru_cache(4096)
def is_loopback(host: str) -> bool:
    """Return whether an IP address is this host's own loopback."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return address.is_loopback


def grpc_peer_host(peer: str) -> str:
    """Return the IP address in gRPC's spelling of a peer; "" for a unix socket."""
    kind, _, rest = urllib.parse.unquote(peer).partition(":")
    if kind == "unix":
        return ""
    return rest.rpartition(":")[0].strip("[]")


class Guard:
    """Lets a peer pass, or raises RefusedError with what to do about it."""

    def __init__(self, what: str, *, insecure: bool) -> None:
        self._insecure = insecure
        self._message = MESSAGE.format(what=what)

    def check(self, host: str) -> None:
        """Raise RefusedError for a peer of another host; "" is a unix socket."""
        if not self._insecure and host and not is_loopback(host):
            raise RefusedError(self._message)


Method = TypeVar("Method", bound=Callable[..., Awaitable[Any]])


def rpc(method: Method) -> Method:
    """Make a servicer method guarded, with kvpool's errors as gRPC statuses."""

    @functools.wraps(method)
    async def wrapped(self: Any, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            self.pool.guard.check(grpc_peer_host(context.peer()))
            return await method(self, request, context)
        except KVPoolError as exc:
            await context.abort(status_of(exc), str(exc))

    return wrapped  # type: ignore[return-value]


Stream = TypeVar("Stream", bound=Callable[..., AsyncIterator[Any]])


def rpc_stream(method: Stream) -> Stream:
    """Do what ``rpc`` does for a method that answers with a stream."""

    @functools.wraps(method)
    async def wrapped(self: Any, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            self.pool.guard.check(grpc_peer_host(context.peer()))
            async for reply in method(self, request, context):
                yield reply
        except KVPoolError as exc:
            await context.abort(status_of(exc), str(exc))

    return wrapped  # type: ignore[return-value]
