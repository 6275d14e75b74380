"""Reading out of this host's node's memory without asking it: no round trip, no pin.

Safe because of the order of things: see ``core/slot_table.py``. What is not found there, or not right, is read
again under a pin, which has the last word.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from kvpool.client_bytes import Blocks, CopyThreads, keys_at
from kvpool.core.slot_table import SlotFinder
from kvpool.model import KEY_BYTES

TOUCHES_MAX = 2048
TOUCH_EVERY_S = 0.05
"""The node is told of uses when so many blocks were read, or with the next read after so long: telling costs as much as
reading twenty small blocks. What nobody read after is told when the node is looked after, every few seconds."""

Copy = Callable[[Sequence[tuple[int, int, int, int]], Sequence[int], Blocks, bool, CopyThreads, list[str]], None]
Touch = Callable[[bytes, int, bytes], None]


class UnpinnedReads:
    """The blocks of one node's memory, for one process."""

    def __init__(self, memory: memoryview, copy: Copy, touch: Touch) -> None:
        """``copy`` moves bytes as for pinned slots; ``touch(namespace, shard, keys)`` tells the node of uses.

        Raises LookupError when the node keeps no table.
        """
        self._finder = SlotFinder(memory)
        self._copy = copy
        self._touch = touch
        self._lock = threading.Lock()
        self._used: dict[tuple[bytes, int], list[bytes]] = {}
        self._used_bytes = 0
        self._told_at = 0.0
        self.blocks = 0
        """Read so far."""
        self.changed = 0
        """Read in vain: their slots were given to others meanwhile."""

    def get(
        self,
        namespace: bytes,
        keys: bytes,
        blocks: Blocks,
        shard: int,
        layers: tuple[int, int],
        verify: bool,
        copies: CopyThreads,
    ) -> list[str]:
        """Fill the buffers of blocks that are found; returns "" for those, anything else for others.

        ``layers``: the first one wanted, and how many a slot has.
        """
        first_layer, slot_layers = layers
        step = blocks.layer_bytes
        seen = self._finder.find(namespace, keys, shard, slot_layers, slot_layers * step)
        reasons = ["not_here"] * len(blocks)
        if not seen.here:
            return reasons
        begin, end = first_layer, first_layer + blocks.layers
        items = [
            (number, offset + begin * step, row * slot_layers + begin, row * slot_layers + end)
            for row, (number, offset) in enumerate(zip(seen.here, seen.offsets.tolist(), strict=True))
        ]
        self._copy(items, tuple(seen.checksums.ravel().tolist()), blocks, verify, copies, reasons)
        same = self._finder.unchanged(seen)
        if not same.all():
            for number, right in zip(seen.here, same.tolist(), strict=True):
                if not right:
                    reasons[number] = "not_here"
            self.changed += len(same) - int(same.sum())
        self._note(namespace, shard, keys, reasons)
        return reasons

    def _note(self, namespace: bytes, shard: int, keys: bytes, reasons: list[str]) -> None:
        """Remember uses, and tell the node of them once in a while."""
        if any(reasons):
            keys = keys_at(keys, [number for number, reason in enumerate(reasons) if not reason])
        with self._lock:
            self._used.setdefault((namespace, shard), []).append(keys)
            self._used_bytes += len(keys)
            self.blocks += len(keys) // KEY_BYTES
            if self._used_bytes < TOUCHES_MAX * KEY_BYTES and time.monotonic() - self._told_at < TOUCH_EVERY_S:
                return
        self.tell()

    def tell(self) -> None:
        """Tell the node of the uses that it has not been told of."""
        with self._lock:
            used, self._used, self._used_bytes, self._told_at = self._used, {}, 0, time.monotonic()
        for (space, number), parts in used.items():
            # The node goes through them backwards, so that a chain's tail ages before its head.
            self._touch(space, number, b"".join(reversed(parts)))
