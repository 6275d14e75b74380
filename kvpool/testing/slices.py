"""Tiny slices, so that a few blocks are enough for something to come between two of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from kvpool.core import (
    backends,
    file_removals,
    index,
    keytable,
    nodes,
    operators,
    order,
    placement,
    recency,
    reporter,
    transfers,
)

_SMALL: tuple[tuple[ModuleType, str, float | tuple[float, ...]], ...] = (
    (index, "ROWS_PER_SLICE", 2),
    (operators, "ROWS_PER_SLICE", 2),
    (file_removals, "BATCH_FILES", 3),
    (file_removals, "REMOVE_RETRY_S", 1.0),
    (backends, "SCAN_RETRY_S", 1.0),
    (nodes, "ROWS_PER_SLICE", 2),
    (transfers, "SLICE_BLOCKS", 2),
    (transfers, "DROP_AGAIN_S", (0.5, 1.0, 8.0)),
    (placement, "CROWDED_FROM", 4),
    (placement, "_STEPS_PER_SLICE", 2),
    (placement, "_FREED_PER_SLICE", 2),
    (index, "ROWS_MARKED_PER_SLICE", 16),
    (recency, "SEGMENT", 16),
    (recency, "SLICE", 3),
    (keytable, "BUCKETS_MIN", 1),
    (keytable, "MOVE_BUCKETS", 16),
    (reporter, "DELTA_KEYS_MAX", 6),
    (reporter, "FILES_MAX", 6),
    (reporter, "INVENTORY_KEYS_MAX", 5),
    (order, "_STEP", 5),
    (order, "_SAMPLES_A_PART", 1),
    (reporter, "JOURNAL_DELTAS_MAX", 8),
    (reporter, "SPARED_MAX", 4),
)


@contextmanager
def small_slices() -> Iterator[None]:
    """Cut messages and the master's long work into tiny slices, so that a few blocks are enough to come between."""
    before = [vars(module)[name] for module, name, _ in _SMALL]
    for module, name, value in _SMALL:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(_SMALL, before, strict=True):
            setattr(module, name, value)
