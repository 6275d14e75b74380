"""What every benchmark is made of: interleaved rounds, processes of its own, an end that leaves nothing behind."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import FrameType, TracebackType
from typing import Any, Self

import click

from kvpool.errors import InvalidArgumentError, KVPoolError
from kvpool.model import LAYERS_MAX
from kvpool.server.child import die_with_parent
from kvpool.server.launch import StartError

ROUNDS_MIN = 3
HELPER_START_S = 30.0
HELPER_END_S = 3.0
LAYER_BYTES_MAX = 256 << 10


class BenchError(KVPoolError):
    """Something did not do what is to be measured: a figure would lie."""


class BadUsage(click.ClickException):
    """A value that is not allowed: exit code 2."""

    exit_code = 2


class FiniteRange(click.FloatRange):
    """A number within bounds; "nan" is within none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number, or fail."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is no finite number", param, ctx)
        return number


def layers_of(block_bytes: int) -> int:
    """Return in how many equal layers a block is stored: as few as are small enough. Raises InvalidArgumentError."""
    fewest = -(-block_bytes // LAYER_BYTES_MAX)
    for layers in range(fewest, LAYERS_MAX + 1):
        if block_bytes % layers == 0:
            return layers
    raise InvalidArgumentError(
        "block_bytes",
        f"must be at most {LAYERS_MAX} equal layers of at most {LAYER_BYTES_MAX} bytes, {block_bytes} is not",
    )


@contextmanager
def one_command() -> Iterator[None]:
    """Turn our own errors into one line, and every polite signal into an orderly end."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except InvalidArgumentError as error:
        raise BadUsage(str(error)) from None
    except KVPoolError as error:
        refused = isinstance(error, StartError) and error.refused
        raise (BadUsage if refused else click.ClickException)(str(error)) from None
    except MemoryError as error:
        raise click.ClickException(f"there is not so much memory here: give smaller sizes. {error}") from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def interleaved(parts: Sequence[Callable[[], float]], rounds: int, at_most_s: float) -> list[float]:
    """Run the parts in turn and return each one's median; fewer rounds if time runs out, but a few at least."""
    values: list[list[float]] = [[] for _ in parts]
    end = time.monotonic() + at_most_s
    for done in range(rounds):
        if done >= min(rounds, ROUNDS_MIN) and time.monotonic() > end:
            break
        for part, seen in zip(parts, values, strict=True):
            seen.append(part())
    return [statistics.median(seen) for seen in values]


class _Failed:
    """What a helper sends instead of an answer."""

    def __init__(self, text: str) -> None:
        self.text = text


class Helper:
    """A function in a process of its own: ``target(connection, *arguments)``; it ends when its pipe is closed."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        """Start it; the first thing it sends says that it is ready and is kept in ``ready``."""
        context = multiprocessing.get_context("spawn")  # threads and channels of ours are not forked
        self._conn, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(os.getpid(), theirs, target, arguments), daemon=True)
        self._name = target.__name__.strip("_")
        self._process.start()
        theirs.close()
        self.ready: Any = None

    def wait_ready(self) -> Self:
        """Wait for its first word."""
        self.ready = self.receive(HELPER_START_S)
        return self

    def __enter__(self) -> Self:
        """Wait until it is ready."""
        try:
            return self.wait_ready()
        except BaseException:  # Ctrl-C included: nobody else would end it
            self.close(at_once=True)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it, at once if something went wrong."""
        self.close(at_once=kind is not None)

    def send(self, request: Any) -> None:
        """Ask something."""
        try:
            self._conn.send(request)
        except OSError:
            self.receive(0.0)  # its last words, if it left some
            raise BenchError(f"the {self._name} process is gone") from None

    def receive(self, timeout_s: float) -> Any:
        """Return the next answer. Raises BenchError."""
        try:
            if not self._conn.poll(timeout_s):
                raise BenchError(f"the {self._name} process did not answer within {timeout_s:.0f} s")
            answer = self._conn.recv()
        except (EOFError, OSError):
            raise BenchError(f"the {self._name} process has ended") from None
        if isinstance(answer, _Failed):
            raise BenchError(f"the {self._name} process failed:\n{answer.text}")
        return answer

    def ask(self, request: Any, timeout_s: float) -> Any:
        """Ask something and return the answer. Raises BenchError."""
        self.send(request)
        return self.receive(timeout_s)

    def close(self, *, at_once: bool = False) -> None:
        """End the process; without ``at_once`` it may end on its own."""
        self._conn.close()
        if not at_once:
            self._process.join(HELPER_END_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(HELPER_END_S)


def _run(parent_pid: int, conn: Connection, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    die_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when it ends
    try:
        target(conn, *arguments)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent has closed the pipe
    except Exception:  # whatever it was, the parent prints it
        conn.send(_Failed(traceback.format_exc(limit=-6)))


@contextmanager
def helpers(target: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> Iterator[list[Helper]]:
    """Start one helper for each tuple of arguments, side by side."""
    started: list[Helper] = []
    try:
        started.extend(Helper(target, *each) for each in arguments)
        for helper in started:
            helper.wait_ready()
        yield started
    finally:
        for helper in started:
            helper.close()
