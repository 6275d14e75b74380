"""KV events: what the pool holds, told to whoever listens to this engine; what the engine holds, told to the pool.

Upstream contract: ``vllm.distributed.kv_events``. A connector's events are published with the engine's own
(``take_events``). The engine's own lie in a queue of its block pool until they are published; they are
looked at there, and left for vLLM's publisher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from kvpool.model import KEY_BYTES

if TYPE_CHECKING:
    from kvpool.client import Client
    from kvpool.model import Namespace

MEDIUM = "kvpool"
"""The events' name for the pool."""

ANNOUNCED_MAX = 1 << 17
"""Blocks whose removal is still told; older ones are forgotten first."""

UNUSED_NAMES_MAX = 1 << 16
"""Hashes of blocks that the engine does not hold, or not yet."""


class EventMaker(Protocol):
    """Makes vLLM's events; ``vllm_events`` is the real one."""

    def stored(self, hashes: Sequence[bytes], parent: bytes | None, token_ids: list[int], block_tokens: int) -> Any:
        """Return the event that blocks were stored."""

    def removed(self, hashes: Sequence[bytes]) -> Any:
        """Return the event that blocks are gone."""


def vllm_events() -> EventMaker:
    """Return what makes the installed vLLM's events, with hashes in the form that its publisher is set to."""
    from vllm.distributed.kv_events import BlockRemoved, BlockStored
    from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

    class Maker:
        def stored(self, hashes: Sequence[bytes], parent: bytes | None, token_ids: list[int], block_tokens: int) -> Any:
            return BlockStored(
                block_hashes=[maybe_convert_block_hash(name) for name in hashes],
                parent_block_hash=None if parent is None else maybe_convert_block_hash(parent),
                token_ids=token_ids,
                block_size=block_tokens,
                lora_id=None,
                medium=MEDIUM,
                lora_name=None,
            )

        def removed(self, hashes: Sequence[bytes]) -> Any:
            return BlockRemoved(block_hashes=[maybe_convert_block_hash(name) for name in hashes], medium=MEDIUM)

    return Maker()


@dataclass(frozen=True, slots=True)
class Stored:
    """Full blocks of one save, told of when every rank has stored them."""

    hashes: list[bytes]
    parent: bytes | None
    token_ids: list[int]


class PoolEvents:
    """Events about the pool, as far as this engine learns of it.

    What it stored itself is told when it is committed. That it was evicted is learnt, and told, when a later
    lookup finds it gone. Blocks with more than tokens in their hash (images, salts) are not told of.
    """

    def __init__(self, maker: EventMaker, block_tokens: int) -> None:
        self._maker = maker
        self._block_tokens = block_tokens
        self._saving: dict[int, Stored] = {}
        self._announced: dict[bytes, None] = {}  # oldest first
        self._events: list[Any] = []

    def saving(self, job_id: int, request: Any, hashes: Sequence[bytes], first: int, parent: bytes | None) -> None:
        """A save begins of ``hashes``, the request's blocks from number ``first`` on."""
        if request.mm_features or request.cache_salt or request.prompt_embeds is not None or not hashes:
            return
        begin, end = first * self._block_tokens, (first + len(hashes)) * self._block_tokens
        self._saving[job_id] = Stored(list(hashes), parent, list(request.all_token_ids[begin:end]))

    def saved(self, job_id: int, *, stored: bool) -> None:
        """A save has ended on every rank; ``stored``: all of its blocks are in the pool now."""
        blocks = self._saving.pop(job_id, None)
        if blocks is None or not stored:
            return
        self._events.append(self._maker.stored(blocks.hashes, blocks.parent, blocks.token_ids, self._block_tokens))
        for name in blocks.hashes:
            self._announced.pop(name, None)
            self._announced[name] = None
        while len(self._announced) > ANNOUNCED_MAX:
            del self._announced[next(iter(self._announced))]

    def missing(self, name: bytes) -> None:
        """A lookup has found that this block is not in the pool."""
        if name in self._announced:
            del self._announced[name]
            self._events.append(self._maker.removed([name]))

    def forget(self) -> None:
        """Nothing that was announced can be found any more: the engine asks under another namespace from now on."""
        if self._announced:
            self._events.append(self._maker.removed(list(self._announced)))
        self._announced.clear()
        self._saving.clear()

    def take(self) -> list[Any]:
        """Return the events since the last call."""
        events, self._events = self._events, []
        return events


class Residency:
    """Reports which blocks the engine's own prefix cache holds, from the events in its pool's queue.

    Events may name a block by 64 bits of its hash; its key comes from the requests that were scheduled.
    """

    def __init__(self, client: Client, group: int = 0) -> None:
        """``group``: the KV cache group that is reported."""
        self._client = client
        self._group = group
        self._queue: list[Any] | None = None
        self._seen = 0
        self._known: dict[str, int] = {}
        self._keys: dict[int, bytes] = {}
        self._resident: set[int] = set()
        self._changes: dict[bytes, bool] = {}
        self._cleared = False
        self._namespace: Namespace | None = None

    def scheduled(self, request_id: str, hashes: Sequence[bytes]) -> None:
        """Learn the names of a scheduled request's blocks; each covers all before it."""
        known = self._known.get(request_id, 0)
        if len(hashes) > known:
            for name in hashes[known:]:
                self._keys[_number(name)] = name[:KEY_BYTES]
            self._known[request_id] = len(hashes)

    def finished(self, request_id: str) -> None:
        """Forget a request."""
        self._known.pop(request_id, None)

    def collect(self, queue: list[Any]) -> None:
        """Look at the events that came since the last call; call it before they are published.

        ``queue``: the block pool's, which is another list each time that its events were taken.
        """
        if queue is not self._queue:
            self._queue, self._seen = queue, 0
        for event in queue[self._seen :]:
            kind = type(event).__name__
            if kind == "AllBlocksCleared":
                self._cleared, self._changes, self._resident = True, {}, set()
            elif event.group_idx in {None, self._group}:
                self._take(event.block_hashes, held=kind == "BlockStored")
        self._seen = len(queue)
        if len(self._keys) > len(self._resident) + UNUSED_NAMES_MAX:
            self._keys = {number: key for number, key in self._keys.items() if number in self._resident}
            self._known.clear()  # whoever is still running tells them again

    def report(self, namespace: Namespace | None) -> None:
        """Hand what was collected to the client, which never waits; None while the engine's namespace is not known.

        Changes are not kept until then: a namespace is first told all that is held.
        """
        if namespace != self._namespace:
            if self._namespace is not None:
                self._client.report_residency(self._namespace, cleared=True)
            self._namespace = namespace
            self._cleared, self._changes = True, {self._keys[number]: True for number in self._resident}
        if namespace is None:
            self._changes.clear()
            return
        if not self._changes and not self._cleared:
            return
        added = b"".join([key for key, held in self._changes.items() if held])
        removed = b"".join([key for key, held in self._changes.items() if not held])
        cleared, self._cleared, self._changes = self._cleared, False, {}
        self._client.report_residency(namespace, added, removed, cleared=cleared)

    def _take(self, names: Sequence[int | bytes], *, held: bool) -> None:
        for name in names:
            number = name if isinstance(name, int) else _number(name)
            key = self._keys.get(number)
            if key is None:
                continue  # of a partial block, or of a request that was never scheduled
            self._changes[key] = held
            if held:
                self._resident.add(number)
            else:
                self._resident.discard(number)


def _number(name: bytes) -> int:
    """Return the 64 bits of a hash that vLLM's events carry."""
    return int.from_bytes(name[-8:], "big")
