"""What the connector counts, in the words of its metrics: one table for the log line and for ``/metrics``.

Both sides and the client count under names of their own, since their start. A ``Tally`` turns that into what
changed since the last step, under ``FAMILY`` or ``FAMILY.LABEL``. Plain data, without vLLM.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kvpool_vllm import LOGGER_NAME

logger = logging.getLogger(LOGGER_NAME)

Data = dict[str, dict[str, Any]]
"""``counters``: name to what was added; ``gauges``: source (a rank, or the scheduler) to name to value."""


def say_once(counters: Counter[str], counter: str, text: str) -> None:
    """Count an exception that is being handled; all but the first are too many for the log."""
    logger.log(logging.DEBUG if counters[counter] else logging.ERROR, text, exc_info=True)
    counters[counter] += 1


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: the name of its label, if it has one, and what it says."""

    label: str
    text: str


COUNTERS = {
    "hit_tokens": Family("tier", "Prompt tokens loaded from the pool instead of computed."),
    "load_bytes": Family("tier", "Bytes loaded, all ranks together."),
    "load_seconds": Family("", "Seconds that loads took, all ranks together."),
    "save_bytes": Family("", "Bytes stored, all ranks together."),
    "save_seconds": Family("", "Seconds that saves took, all ranks together."),
    "save_blocks": Family("result", "Blocks that were stored, existed, were dropped before, or failed for a reason."),
    "miss_blocks": Family("reason", "Blocks of a prompt that were not found, or not loaded though found."),
    "lookups": Family("result", "Lookups asked, and how they ended."),
    "gate": Family("decision", "Loads found in the pool: loaded, skipped as slower than computing, or tried anyway."),
    "gate_skipped_tokens": Family("", "Prompt tokens computed because loading would have taken longer."),
    "breaker_opened": Family("target", "How often a node or the master was left alone after failures in a row."),
    "breaker_rejected": Family("target", "Calls answered as a miss because their target was left alone."),
    "prefetch_blocks": Family("", "Blocks that were begun to be read from files while their request waited."),
    "transfers": Family("event", "Prompts to other engines: opened, sealed, ended; from them: received, incomplete."),
    "transfer_misses": Family("reason", "Prompts that were to be moved between engines, and were not."),
    "errors": Family("operation", "Loads, saves, lookups and answers to the engine that ended in an unexpected error."),
}

GAUGES = {
    "queue_depth": Family("queue", "Jobs and blocks on their way, all ranks together."),
    "breaker_open": Family("target", "1 while a node or the master is left alone."),
    "tokens_per_second": Family("source", "Measured speed of computing (prefill) and of loading from each tier."),
}

_NAMES = {
    "get.local_bytes": "load_bytes.local",
    "get.remote_bytes": "load_bytes.remote",
    "get.fs_bytes": "load_bytes.fs",
    "prefetch.blocks": "prefetch_blocks",
    "put.bytes": "save_bytes",
    "put.stored": "save_blocks.stored",
    "put.existed": "save_blocks.existed",
    "save.dropped_blocks": "save_blocks.dropped",
    "load.errors": "errors.load",
    "save.errors": "errors.save",
    "lookup.errors": "errors.lookup",
    "hook.errors": "errors.hook",
    "gate.skipped_tokens": "gate_skipped_tokens",
}
_PREFIXES = {
    "put.failed.": "save_blocks.",
    "miss.": "miss_blocks.",
    "lookup.": "lookups.",
    "gate.": "gate.",
    "transfer.miss.": "transfer_misses.",
    "transfer.": "transfers.",
    "hit_tokens.": "hit_tokens.",
    "breaker.opened.": "breaker_opened.",
    "breaker.rejected.": "breaker_rejected.",
}
_MICROSECONDS = {"load.us": "load_seconds", "save.us": "save_seconds"}
_BREAKER_OPEN = "breaker.open."

_HIGHEST = {"breaker_open", "tokens_per_second"}
"""Gauges of which the sources' highest value counts, not their sum."""


def _named(raw: str) -> str:
    """Return the metric that a counter belongs to; "" for counters that are no metric."""
    name = _NAMES.get(raw, "")
    if not name:
        for prefix, family in _PREFIXES.items():
            if raw.startswith(prefix):
                return family + raw.removeprefix(prefix)
    return name


class Tally:
    """Takes one side's counters and tells what changed."""

    def __init__(self, source: str) -> None:
        """``source`` names this side among the engine's."""
        self._source = source
        self._names: dict[str, str] = {}
        self._counters: dict[str, int] = {}
        self._gauges: dict[str, float] = {}
        self._last: tuple[Mapping[str, int], Mapping[str, float]] = ({}, {})

    def take(self, counters: Mapping[str, int], gauges: Mapping[str, float]) -> Data | None:
        """Return what changed since the last call, None where nothing did: quick, for it is asked in every step.

        Both are kept, so pass what nobody changes any more.
        """
        if counters == self._last[0] and gauges == self._last[1]:
            return None
        self._last = (counters, gauges)
        added: dict[str, float] = {}
        now = dict(gauges)
        for raw, value in counters.items():
            if raw.startswith(_BREAKER_OPEN):
                now["breaker_open." + raw.removeprefix(_BREAKER_OPEN)] = value
                continue
            before = self._counters.get(raw, 0)
            if value <= before:  # lower where a thread undid what another added; vLLM ends over a counter that falls
                continue
            self._counters[raw] = value
            if raw in _MICROSECONDS:
                added[_MICROSECONDS[raw]] = (value - before) / 1e6
                continue
            name = self._names.get(raw)
            if name is None:
                name = self._names[raw] = _named(raw)
            if name:
                added[name] = added.get(name, 0) + value - before
        changed = {name: value for name, value in now.items() if self._gauges.get(name) != value}
        self._gauges.update(changed)
        if not added and not changed:
            return None
        return {"counters": added, "gauges": {self._source: changed} if changed else {}}


def empty() -> Data:
    """Return data of nothing."""
    return {"counters": {}, "gauges": {}}


def merge(into: Data, other: Data) -> None:
    """Add counters; take gauges of the same source over."""
    counters = into["counters"]
    for name, value in other["counters"].items():
        counters[name] = counters.get(name, 0) + value
    for source, values in other["gauges"].items():
        into["gauges"].setdefault(source, {}).update(values)


def combined(gauges: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return one value for each gauge of several sources."""
    found: dict[str, float] = {}
    for values in gauges:
        for name, value in values.items():
            if name not in found:
                found[name] = value
            elif name.partition(".")[0] in _HIGHEST:
                found[name] = max(found[name], value)
            else:
                found[name] += value
    return found


def summary(data: Data) -> dict[str, int | float]:
    """Return an interval for a log line: bytes in MB, what did not happen left out."""
    line: dict[str, int | float] = {}
    for name, value in sorted(data["counters"].items()):
        family, dot, label = name.partition(".")
        if family.endswith("_bytes"):
            line[family.removesuffix("_bytes") + "_MB" + dot + label] = round(value / 1e6, 1)
        elif value:
            line[name] = round(value, 3)
    for name, value in sorted(combined(data["gauges"].values()).items()):
        if value:
            line[name] = round(value)
    return line
