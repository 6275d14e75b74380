"""A reservation while its slots are written: whatever ends that early gives it back, once nobody writes any more."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import Self

from kvpool.errors import KVPoolError, UnknownIdError
from kvpool.rpc.v1 import node_pb2
from kvpool.transport.channel import Channel

log = logging.getLogger(__name__)

ABORT_S = 0.5
"""Given to the node to take a reservation back."""


class Held:
    """A reservation on a channel, for ``with``: given back when the body ends with an exception, whatever it is.

    Where that cannot be said on this channel any more, an answer being on its way or the node silent, the channel is
    closed and ``lose`` called: the node frees what lost channels had reserved when it is attached anew.
    """

    def __init__(self, channel: Channel, lose: Callable[[], None]) -> None:
        self.reservation = 0
        """To be set as soon as it is known."""
        self._channel = channel
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
