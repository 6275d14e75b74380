"""How kvpoolctl talks to a master: the shared options, one call with a deadline, and the exit codes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

import click
import grpc

from kvpool.cli.options import RefusedUsage, load_settings
from kvpool.config import ClientSettings
from kvpool.errors import InvalidArgumentError
from kvpool.model import parse_duration_ms
from kvpool.rpc.v1 import admin_pb2_grpc

F = TypeVar("F", bound=Callable[..., Any])

STREAM_S = 600.0
"""All pieces of one answer together."""

TIMEOUT_HELP = "How long to wait for an answer; lists of files have 10 minutes.  [default: 5s]"


class ExitCode(IntEnum):
    """What kvpoolctl's exit codes mean."""

    OK = 0
    NOTHING = 1
    USAGE = 2
    UNREACHABLE = 3
    REFUSED = 4
    FAILED = 5


EXIT_CODES_HELP = """\b
Exit codes:
  0  done
  1  the pool answered, but there was nothing: no hit, no live node, nothing to evict; or files were broken
  2  a wrong option or value
  3  the master, or a backend, cannot be reached
  4  the master refuses this host (protected mode)
  5  the master failed to answer this
"""

_BY_STATUS = {
    grpc.StatusCode.UNAVAILABLE: ExitCode.UNREACHABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: ExitCode.UNREACHABLE,
    grpc.StatusCode.PERMISSION_DENIED: ExitCode.REFUSED,
    grpc.StatusCode.UNAUTHENTICATED: ExitCode.REFUSED,
    grpc.StatusCode.INVALID_ARGUMENT: ExitCode.USAGE,
    grpc.StatusCode.NOT_FOUND: ExitCode.NOTHING,
}


class RemoteError(click.ClickException):
    """The master did not do what was asked; one line and an exit code that says why."""

    def __init__(self, code: ExitCode, message: str) -> None:
        super().__init__(message)
        self.exit_code = int(code)  # type: ignore[misc]  # click declares it per class, and reads it from the instance


@dataclass(frozen=True, slots=True)
class Remote:
    """A master to ask."""

    address: str
    timeout_s: float
    as_json: bool

    def call(self, method: str, request: Any, service: Callable[[grpc.Channel], Any] = admin_pb2_grpc.AdminStub) -> Any:
        """Call one rpc, of the Admin service unless another one's stub is given; raises RemoteError."""
        try:
            with self._channel() as channel:
                return getattr(service(channel), method)(request, timeout=self.timeout_s)
        except grpc.RpcError as error:
            raise self._explained(error, self.timeout_s) from None

    def stream(self, method: str, request: Any) -> Iterator[Any]:
        """Call one rpc that answers in pieces, and yield them; raises RemoteError."""
        try:
            with self._channel() as channel:
                yield from getattr(admin_pb2_grpc.AdminStub(channel), method)(request, timeout=STREAM_S)
        except grpc.RpcError as error:
            raise self._explained(error, STREAM_S) from None

    def _channel(self) -> grpc.Channel:
        options = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", 64 << 20)]
        return grpc.insecure_channel(self.address, options=options)

    def _explained(self, error: grpc.RpcError, timeout_s: float) -> RemoteError:
        status = error.code()
        details = error.details() or str(status.value[1])
        code = _BY_STATUS.get(status, ExitCode.FAILED)
        if status is grpc.StatusCode.DEADLINE_EXCEEDED:
            return RemoteError(code, f"the master at {self.address} did not answer within {timeout_s:g} s")
        if code is ExitCode.UNREACHABLE:
            return RemoteError(code, f"cannot reach a master at {self.address}: {details}")
        if code is ExitCode.REFUSED:
            return RemoteError(code, f"the master at {self.address} refuses: {details}")
        if code is ExitCode.FAILED:
            return RemoteError(code, f"the master at {self.address} failed: {details} ({status.name})")
        return RemoteError(code, details)


def remote_options(function: F) -> F:
    """Give a command (or the group) the options every question shares."""
    decorators = (
        click.option("--master", metavar="HOST:PORT", help="The master.  [default: 127.0.0.1:50088; KVPOOL_MASTER]"),
        click.option("--json", "as_json", is_flag=True, default=None, help="Print JSON with stable keys."),
        click.option("--timeout", metavar="DURATION", help=TIMEOUT_HELP),
    )
    for decorate in reversed(decorators):
        function = decorate(function)
    return function


def asks_master(function: Callable[..., None]) -> Callable[..., None]:
    """Pass a Remote as first argument, from the command's own options or those before it, or what --config names."""

    @functools.wraps(function)
    def wrapper(*args: Any, **options: Any) -> None:
        given = dict(click.get_current_context().obj or {})
        given.update({k: v for k in ("master", "as_json", "timeout") if (v := options.pop(k)) is not None})
        settings = load_settings(ClientSettings, {"master": given.get("master")}, options.get("config")).settings
        try:
            timeout_s = parse_duration_ms(given.get("timeout") or "5s", "timeout") / 1000
        except InvalidArgumentError as error:
            raise RefusedUsage(str(error)) from None
        function(Remote(settings.master, timeout_s, bool(given.get("as_json"))), *args, **options)

    return remote_options(wrapper)
