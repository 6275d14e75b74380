"""What operators want to keep: hard pins are never evicted, soft ones last, as if they were leased.

A pin is about keys, whether their blocks are there or not (kvpool/core/holds.py). Nodes are told of hard ones, so
that they spare them on their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from kvpool.core.effects import CatalogPin, Effect, PinEnded, Send
from kvpool.core.holds import HARD, SOFT
from kvpool.core.index import ROWS_PER_SLICE, Index, Space
from kvpool.core.keytable import as_words
from kvpool.core.messages import BlockRun, Keep
from kvpool.core.nodes import Node
from kvpool.errors import InvalidArgumentError, OverloadedError, UnknownNamespaceError
from kvpool.model import DIGEST_BYTES, KEY_BYTES

KEYS_MAX = 1 << 20
"""Keys of all pins together."""

GREETING_KEYS_MAX = ROWS_PER_SLICE
"""Keys in one message to a node that says hello: however many pins there are, the messages are few, and short."""

LABEL_CHARS_MAX = 256

_SLICE_BYTES = ROWS_PER_SLICE * KEY_BYTES


@dataclass(slots=True)
class OperatorPin:
    """One pin: hard if ``until`` is None. ``keys`` grows to ``blocks`` of them while it is being taken."""

    id: int
    label: str
    namespace: bytes
    until: float | None
    blocks: int
    keys: bytearray = field(default_factory=bytearray)
    present: int = 0  # blocks that were there when it was taken
    ended: bool = False

    @property
    def level(self) -> int:
        """SOFT or HARD."""
        return HARD if self.until is None else SOFT

    def __len__(self) -> int:
        """Return the number of blocks taken so far."""
        return len(self.keys) // KEY_BYTES


class Pins:
    """Every pin, by number."""

    def __init__(self, index: Index, nodes: dict[str, Node], first_id: int) -> None:
        self.by_id: dict[int, OperatorPin] = {}
        self._index = index
        self._nodes = nodes
        self._next = first_id

    # ---- taking and ending ---------------------------------------------------------------------

    def begin(
        self, namespace: bytes, keys: bytes, ttl_s: float, label: str, now: float
    ) -> tuple[OperatorPin, Iterator[list[Effect]]]:
        """Return a new pin, hard without ``ttl_s``, and the slices that take it.

        Raises InvalidArgumentError, UnknownNamespaceError, OverloadedError.
        """
        if not keys or len(keys) % KEY_BYTES:
            raise InvalidArgumentError("keys", f"must be one or more keys of {KEY_BYTES} bytes")
        if len(label) > LABEL_CHARS_MAX:
            raise InvalidArgumentError("label", f"must have at most {LABEL_CHARS_MAX} characters")
        if len(namespace) != DIGEST_BYTES or namespace not in self._index.spaces:
            raise UnknownNamespaceError(f"namespace {namespace.hex()} is not known to the master")
        blocks = len(keys) // KEY_BYTES
        if sum(pin.blocks for pin in self.by_id.values()) + blocks > KEYS_MAX:
            raise OverloadedError(f"at most {KEYS_MAX} blocks can be pinned")
        pin = self.by_id[self._next] = OperatorPin(self._next, label, namespace, now + ttl_s if ttl_s else None, blocks)
        self._next += 1
        return pin, self._take(pin, keys, remember=True)

    def load(self, pin_id: int, label: str, namespace: bytes, until: float | None, keys: bytes) -> None:
        """Take a pin that the catalog has."""
        self._index.space(namespace)
        pin = self.by_id[pin_id] = OperatorPin(pin_id, label, namespace, until, len(keys) // KEY_BYTES)
        self._next = max(self._next, pin_id + 1)
        for _ in self._take(pin, keys, remember=False):
            pass

    def _take(self, pin: OperatorPin, keys: bytes, *, remember: bool) -> Iterator[list[Effect]]:
        for start in range(0, len(keys), _SLICE_BYTES):
            if pin.ended:
                return
            part = keys[start : start + _SLICE_BYTES]
            pin.keys += part
            pin.present += len(self._index.hold(pin.namespace, part, pin.level))
            yield self._tell(pin, Keep(keep=(self._run(pin.namespace, part),)))
        if remember and not pin.ended:
            yield [_catalog(pin)]

    def chosen(self, ids: set[int], label: str, *, every: bool) -> list[OperatorPin]:
        """Return the pins that a wish to end some is about."""
        return [pin for pin in self.by_id.values() if every or pin.id in ids or (label and pin.label == label)]

    def end(self, pin: OperatorPin) -> Iterator[list[Effect]]:
        """End a pin; returns the slices that do."""
        if self.by_id.pop(pin.id, None) is None:
            return iter(())
        pin.ended = True
        return self._end(pin)

    def _end(self, pin: OperatorPin) -> Iterator[list[Effect]]:
        yield [PinEnded(pin.id)]
        for start in range(0, len(pin.keys), _SLICE_BYTES):
            part = bytes(pin.keys[start : start + _SLICE_BYTES])
            levels = self._index.let_go(pin.namespace, part, pin.level)
            free = np.frombuffer(part, np.uint8).reshape(-1, KEY_BYTES)[levels < HARD].tobytes()
            yield self._tell(pin, Keep(release=(self._run(pin.namespace, free),))) if free else []

    def expire(self, now: float) -> list[Iterator[list[Effect]]]:
        """End the soft pins whose time is over; returns the slices that do."""
        over = [pin for pin in self.by_id.values() if pin.until is not None and pin.until <= now]
        return [self.end(pin) for pin in over]

    # ---- nodes ---------------------------------------------------------------------------------

    def _run(self, namespace: bytes, keys: bytes) -> BlockRun:
        space: Space = self._index.space(namespace)
        return BlockRun(namespace, space.full or 1, 0, keys)

    def _tell(self, pin: OperatorPin, message: Keep) -> list[Effect]:
        if pin.level < HARD:
            return []
        return [Send(node.session, message) for node in self._nodes.values() if node.session is not None]

    def greet(self, node: Node) -> list[Iterator[list[Effect]]]:
        """Return the slices that tell a node that says hello what it must keep: it has forgotten earlier sessions.

        What is pinned, or ends, from now on it is told like every other node.
        """
        return [self._greet(node, node.session)] if self.by_id else []

    def _greet(self, node: Node, session: int | None) -> Iterator[list[Effect]]:
        kept: dict[bytes, bytearray] = {}
        room = GREETING_KEYS_MAX
        for pin in [pin for pin in self.by_id.values() if pin.level == HARD]:
            at = 0
            # A pin may end while the node is being greeted, and so may the session.
            while at < len(pin.keys) and not pin.ended and node.session == session:
                part = pin.keys[at : at + room * KEY_BYTES]
                kept.setdefault(pin.namespace, bytearray()).extend(part)
                at += len(part)
                room -= len(part) // KEY_BYTES
                if not room:
                    yield self._keep(session, kept)
                    kept, room = {}, GREETING_KEYS_MAX
        if kept and node.session == session:
            yield self._keep(session, kept)

    def _keep(self, session: int | None, kept: dict[bytes, bytearray]) -> list[Effect]:
        runs = tuple(self._run(namespace, bytes(keys)) for namespace, keys in kept.items())
        return [Send(session, Keep(keep=runs))] if session is not None else []

    def tell_again(self) -> list[Iterator[list[Effect]]]:
        """Return the slices that say every pin again, to a catalog that has lost it."""
        return [self._tell_again()] if self.by_id else []

    def _tell_again(self) -> Iterator[list[Effect]]:
        for pin in list(self.by_id.values()):
            if len(pin) == pin.blocks and not pin.ended:  # one that is being taken is said at its end
                yield [_catalog(pin)]

    def present(self, pin: OperatorPin) -> Iterator[int]:
        """Count, slice by slice, how many of a pin's blocks are there now."""
        for start in range(0, len(pin.keys), _SLICE_BYTES):
            part = bytes(pin.keys[start : start + _SLICE_BYTES])
            yield int((self._index.space(pin.namespace).table.find(as_words(part)) >= 0).sum())


def _catalog(pin: OperatorPin) -> Effect:
    return CatalogPin(pin.id, pin.label, pin.namespace, pin.until, bytes(pin.keys))
