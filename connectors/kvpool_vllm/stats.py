"""The connector's counters in vLLM's log line and on vLLM's ``/metrics``.

Upstream contract: ``vllm.distributed.kv_transfer.kv_connector.v1.metrics``. Stats travel from every rank and
from the scheduler's side with each step in which something changed; vLLM adds the ranks up, and the sides.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvpool_vllm import LOGGER_NAME, tally

logger = logging.getLogger(LOGGER_NAME)

METRIC_PREFIX = "vllm:kvpool_"


@dataclass
class KVPoolStats(KVConnectorStats):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """What changed since the last step; ``data`` as ``tally.Data``."""

    def __post_init__(self) -> None:
        if not self.data:
            self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.data: tally.Data = tally.empty()

    def aggregate(self, other: KVPoolStats) -> KVPoolStats:
        """Add another rank's, the other side's, or a later step's."""
        tally.merge(self.data, other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return the interval for the log line."""
        return tally.summary(self.data)

    def is_empty(self) -> bool:
        """Whether nothing changed."""
        return not self.data["counters"] and not self.data["gauges"]


class KVPoolPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]  # as above
    """Every family of ``tally`` as ``vllm:kvpool_FAMILY``, with vLLM's labels and one of its own."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._metrics = {
            name: self._counter_cls(
                name=METRIC_PREFIX + name, documentation=family.text, labelnames=_labels(labelnames, family)
            )
            for name, family in tally.COUNTERS.items()
        } | {
            name: self._gauge_cls(
                name=METRIC_PREFIX + name,
                documentation=family.text,
                labelnames=_labels(labelnames, family),
                multiprocess_mode="mostrecent",
            )
            for name, family in tally.GAUGES.items()
        }
        self._gauges: dict[int, dict[str, dict[str, float]]] = {}
        self._failed = False
        # A counter without a label of its own is there from the start, so that it can be told from a missing one.
        for name, family in tally.COUNTERS.items():
            if not family.label:
                for engine in per_engine_labelvalues:
                    self._of(engine, name)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Take what changed."""
        try:
            self._observe(transfer_stats_data, engine_idx)
        except Exception:  # whatever it was: vLLM would end
            level = logging.DEBUG if self._failed else logging.ERROR
            self._failed = True
            logger.log(level, "kvpool: metrics were not counted", exc_info=True)

    def _observe(self, transfer_stats_data: dict[str, Any], engine_idx: int) -> None:
        for name, value in transfer_stats_data["counters"].items():
            self._of(engine_idx, name).inc(value)
        if transfer_stats_data["gauges"]:
            gauges = self._gauges.setdefault(engine_idx, {})
            for source, values in transfer_stats_data["gauges"].items():
                gauges.setdefault(source, {}).update(values)
            for name, value in tally.combined(gauges.values()).items():
                self._of(engine_idx, name).set(value)

    def _of(self, engine: int, name: str) -> Any:
        family, dot, label = name.partition(".")
        values = self.per_engine_labelvalues[engine]
        return self._metrics[family].labels(*values, *([label] if dot else []))


def _labels(names: list[str], family: tally.Family) -> list[str]:
    return [*names, family.label] if family.label else names
