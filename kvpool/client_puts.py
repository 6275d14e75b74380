"""Where a put stores its blocks: in this host's node, or else in one that the master names."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable

from kvpool.client_bytes import Blocks, CopyThreads
from kvpool.client_files import PART_BLOCKS_MAX
from kvpool.client_layers import LayeredPut
from kvpool.client_node import LocalNode
from kvpool.client_peers import Peer, Peers
from kvpool.client_results import PutResult, reason_of_error
from kvpool.client_switching import quick_switching
from kvpool.errors import AllPinnedError, InvalidArgumentError, KVPoolError, TooLargeError, UnavailableError
from kvpool.model import KEY_BYTES, RESERVE_ITEMS_MAX, Namespace, NodeAddress
from kvpool.transport.channel import time_left

log = logging.getLogger(__name__)

PLACED_S = 0.5
"""How long the node that the master named is used before it is asked again."""


class Puts:
    """Stores the blocks of puts."""

    def __init__(
        self,
        peers: Peers,
        copies: CopyThreads,
        local: Callable[[], LocalNode | None],
        own_id: Callable[[], str],
        place: Callable[[int, float], NodeAddress | None],
        counters: Counter[str],
    ) -> None:
        """``place(bytes, seconds)``: the node that the master names. UnavailableError when there is no master."""
        self._peers = peers
        self._copies = copies
        self._local = local
        self._own_id = own_id
        self._place = place
        self._counters = counters
        self._placed: tuple[Peer | None, float] = (None, 0.0)  # where a client without a node puts, until when

    def run(
        self, space: Namespace, keys: bytes, blocks: Blocks, shard: int, timeout_s: float, transfer: int
    ) -> PutResult:
        """Store what can be stored until then. Raises InvalidArgumentError."""
        deadline = time.monotonic() + timeout_s
        counts: Counter[str] = Counter()
        with quick_switching:
            for part, some_keys, some in blocks.parts(keys, PART_BLOCKS_MAX):
                try:
                    if part.start and time.monotonic() >= deadline:
                        raise UnavailableError("deadline exceeded")
                    counts.update(self._put(space, some_keys, some, shard, time_left(deadline), transfer))
                except InvalidArgumentError:
                    raise
                except AllPinnedError:
                    counts["no_room"] += len(some)
                except TooLargeError as exc:
                    log.warning("put: %s", exc)
                    counts["too_large"] += len(blocks) - part.start
                    break
                except KVPoolError as exc:
                    log.debug("put: %s", exc)
                    counts[reason_of_error(exc)] += len(blocks) - part.start
                    break
        return self._count(counts, blocks.shard_bytes)

    def layers(
        self, space: Namespace, keys: bytes, place: tuple[int, int, int], timeout_s: float
    ) -> LayeredPut | None:
        """Begin a put layer by layer; None where that cannot be now. Raises InvalidArgumentError.

        ``place``: shard, its bytes, transfer; ``timeout_s``: of each question to the node.
        """
        node = self._local()
        if node is None or len(keys) > RESERVE_ITEMS_MAX * KEY_BYTES:
            return None
        try:
            return LayeredPut(node, space, keys, place, timeout_s, self._copies, self._count)
        except InvalidArgumentError:
            raise
        except KVPoolError as exc:
            log.log(logging.WARNING if isinstance(exc, TooLargeError) else logging.DEBUG, "put of layers: %s", exc)
            return None

    def _count(self, counts: Counter[str], block_bytes: int) -> PutResult:
        stored = counts.pop("stored", 0)
        existed = counts.pop("existed", 0) + counts.pop("being_written", 0)
        errors = {reason: count for reason, count in counts.items() if count}
        self._counters["put.stored"] += stored
        self._counters["put.existed"] += existed
        self._counters["put.bytes"] += stored * block_bytes
        for reason, count in errors.items():
            self._counters[f"put.failed.{reason}"] += count
        return PutResult(stored, existed, sum(errors.values()), errors)

    def _put(
        self, space: Namespace, keys: bytes, blocks: Blocks, shard: int, timeout_s: float, transfer: int
    ) -> dict[str, int]:
        node = self._local()
        if node is not None:
            return node.put(space, keys, blocks, shard, self._copies, timeout_s, transfer)
        peer, until = self._placed
        if time.monotonic() > until:
            self._placed = (peer, time.monotonic() + PLACED_S)  # whoever comes meanwhile does not ask again
            with contextlib.suppress(UnavailableError):  # the master is away: the node that it named last will do
                address = self._place(blocks.shard_bytes, timeout_s)
                # Our own node, of which we have just lost hold, would be no quicker by another way.
                peer = self._peers.at(address) if address is not None and address.node_id != self._own_id() else None
                self._placed = (peer, time.monotonic() + PLACED_S)
        if peer is None:
            raise UnavailableError("neither this host nor the master has a node that answers")
        return peer.put(space, keys, blocks, shard, timeout_s, transfer)
