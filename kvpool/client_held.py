"""A reservation while its slots are written: whatever ends that early gives it back, once nobody writes any more."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

from kvpool.client_bytes import CopyThreads
from kvpool.errors import KVPoolError, UnknownIdError
from kvpool.rpc.v1 import node_pb2
from kvpool.transport.channel import Channel

log = logging.getLogger(__name__)

T = TypeVar("T")

ABORT_S = 0.5
"""Given to the node to take a reservation back."""


class WatchedCopies(CopyThreads):
    """Somebody's threads for moving bytes, which can be waited for where ``run`` was interrupted as it waited."""

    def __init__(self, copies: CopyThreads) -> None:
        self.threads, self.streams = copies.threads, copies.streams
        self._copies = copies
        self._changed = threading.Condition()
        self._copying = 0
        self._over = False

    def run(
        self, items: Sequence[T], item_bytes: int, work: Callable[[Sequence[T]], None], most: int | None = None
    ) -> None:
        """Do what CopyThreads does."""
        caller = threading.get_ident()

        def watched(part: Sequence[T]) -> None:
            if threading.get_ident() == caller:  # who is interrupted is no longer at work
                work(part)
                return
            with self._changed:
                if self._over:
                    return
                self._copying += 1
            try:
                work(part)
            finally:
                with self._changed:
                    self._copying -= 1
                    self._changed.notify()

        super().run(items, item_bytes, watched, most)

    def executor(self) -> ThreadPoolExecutor:
        """Return the threads."""
        return self._copies.executor()

    def settle(self) -> None:
        """Return when no thread copies any more, nor ever will."""
        with self._changed:
            self._over = True
            self._changed.wait_for(lambda: not self._copying)


class Held:
    """A reservation on a channel, for ``with``: given back when the body ends with an exception, whatever it is.

    Where that cannot be said on this channel any more, an answer being on its way or the node silent, the channel is
    closed and ``lose`` called: the node frees what lost channels had reserved when it is attached anew.
    """

    def __init__(self, channel: Channel, lose: Callable[[], None], copies: WatchedCopies | None = None) -> None:
        """``copies``: who may be writing to the slots."""
        self.reservation = 0
        """To be set as soon as it is known."""
        self._channel = channel
        self._copies = copies
        self._lose = lose

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give it back after an exception."""
        # Without a reservation, a KVPoolError is the node's refusal, or the end of the channel.
        if exc is not None and (self.reservation or not isinstance(exc, KVPoolError)):
            self._give_back()

    def _give_back(self) -> None:
        given = False
        try:
            if self._copies is not None:
                self._copies.settle()
            if self.reservation and not self._channel.broken:
                abort = node_pb2.ReleaseReservation(reservation=self.reservation)
                frame = node_pb2.NodeFrame(abort=abort)
                self._channel.call(frame, node_pb2.NodeFrameReply, timeout_s=ABORT_S)
                given = True
        except UnknownIdError:
            given = True  # the commit had reached the node
        except KVPoolError as exc:
            log.debug("a reservation cannot be given back: %s", exc)
        finally:
            if not given:
                self._channel.close()
                self._lose()
