"""What operators want to keep: hard pins are never evicted, soft ones last, as if they were leased.

A pin is about keys, whether their blocks are there or not (kvpool/core/holds.py). Nodes are told of hard ones, so
that they spare them on their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

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

GREETING_KEYS_MAX = 1 << 14
"""Keys in one message to a node that says hello: however many pins there are, the messages are few."""

LABEL_CHARS_MAX = 256

_SLICE_BYTES = ROWS_PER_SLICE * KEY_BYTES


@dataclass(slots=True)
class OperatorPin:
    """One pin: hard if ``until`` is None. ``keys`` grows while it is being taken."""

    id: int
    label: str
    namespace: bytes
    until: float | None
    keys: bytearray = field(default_factory=bytearray)
    present: int = 0  # blocks that were there when it was taken
    ended: bool = False

    @property
    def level(self) -> int:
        """SOFT or HARD."""
        return HARD if self.until is None else SOFT

    def __len__(self) -> int:
        """Return the number of blocks."""
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
        if sum(map(len, self.by_id.values())) + len(keys) // KEY_BYTES > KEYS_MAX:
            raise OverloadedError(f"at most {KEYS_MAX} blocks can be pinned")
        pin = OperatorPin(self._next, label, namespace, now + ttl_s if ttl_s else None)
        self._next += 1
        return pin, self._take(pin, keys, remember=True)

    def load(self, pin_id: int, label: str, namespace: bytes, until: float | None, keys: bytes) -> None:
        """Take a pin that the catalog has."""
        self._index.space(namespace)
        pin = OperatorPin(pin_id, label, namespace, until)
        self._next = max(self._next, pin_id + 1)
        for _ in self._take(pin, keys, remember=False):
            pass

    def _take(self, pin: OperatorPin, keys: bytes, *, remember: bool) -> Iterator[list[Effect]]:
        self.by_id[pin.id] = pin
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
        return [
            pin for pin in self.by_id.values() if every or pin.id in ids or (label and pin.label == label)
        ]

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

    def greet(self, node: Node) -> list[Effect]:
        """Tell a node that has just said hello what it must keep; it remembers nothing of earlier sessions."""
        if node.session is None:
            return []
        kept: dict[bytes, list[bytearray]] = {}
        for pin in self.by_id.values():
            if pin.level == HARD:
                kept.setdefault(pin.namespace, []).append(pin.keys)
        runs = (self._run(namespace, b"".join(parts)) for namespace, parts in kept.items())
        return [Send(node.session, Keep(keep=batch)) for batch in _batches(runs)]

    def tell_again(self) -> list[Effect]:
        """Say every pin again, to a catalog that has lost it."""
        return [_catalog(pin) for pin in self.by_id.values()]

    def present(self, pin: OperatorPin) -> Iterator[int]:
        """Count, slice by slice, how many of a pin's blocks are there now."""
        for start in range(0, len(pin.keys), _SLICE_BYTES):
            part = bytes(pin.keys[start : start + _SLICE_BYTES])
            yield int((self._index.space(pin.namespace).table.find(as_words(part)) >= 0).sum())


def _catalog(pin: OperatorPin) -> Effect:
    return CatalogPin(pin.id, pin.label, pin.namespace, pin.until, bytes(pin.keys))


def _batches(runs: Iterable[BlockRun]) -> Iterator[tuple[BlockRun, ...]]:
    """Group runs, split where needed, into messages of a bounded size."""
    batch: list[BlockRun] = []
    room = GREETING_KEYS_MAX
    for run in runs:
        at = 0
        while at < len(run.keys):
            keys = run.keys[at : at + room * KEY_BYTES]
            batch.append(replace(run, keys=keys))
            at += len(keys)
            room -= len(keys) // KEY_BYTES
            if not room:
                yield tuple(batch)
                batch, room = [], GREETING_KEYS_MAX
    if batch:
        yield tuple(batch)
