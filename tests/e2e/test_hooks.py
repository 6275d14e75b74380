"""What the engine gets when something of ours fails inside a hook: vLLM itself would end over the exception."""

from __future__ import annotations

import collections
import importlib
import logging
import sys
from functools import partial
from typing import Any

import pytest

from kvpool_vllm import LOGGER_NAME


class Broken:
    """A scheduler's side in which everything fails."""

    def __init__(self) -> None:
        self.counters = collections.Counter[str]()

    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)


def test_an_older_engine_is_told_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a sentence, where it begins with the connector."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import base

    monkeypatch.delattr(base, "KVConnectorWorkerMetadata")
    monkeypatch.delitem(sys.modules, "kvpool_vllm.connector", raising=False)
    with pytest.raises(ImportError, match=r"needs vLLM 0\.32 or later: cannot import name 'KVConnectorWorkerMetadata'"):
        importlib.import_module("kvpool_vllm.connector")


def test_a_hook_that_fails_is_a_miss(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is found, told or kept back, and it is said once; what loads depend on does not go on after a failure."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.v1.request import Request

    from kvpool_vllm.connector import KVPoolConnector

    connector, request = KVPoolConnector.__new__(KVPoolConnector), Request.__new__(Request)
    connector._role, connector.scheduler = KVConnectorRole.SCHEDULER, Broken()
    request.status = None
    with caplog.at_level(logging.INFO, LOGGER_NAME):
        assert connector.on_new_request(request) is None
        assert connector.get_num_new_matched_tokens(request, 0) == (0, False)
        assert connector.request_finished_all_groups(request, ([],)) == (False, None)
        assert connector.request_finished(request, []) == (False, None)
        assert not connector.take_events()
        assert connector.get_kv_connector_stats() is None
    assert connector.scheduler.counters == {"hook.errors": 6}
    assert [record.exc_info is not None for record in caplog.records] == [True]
    with pytest.raises(KeyError):
        connector.update_state_after_alloc(request, None, 16)


def test_metrics_that_cannot_be_counted_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """They are counted in the process that answers clients: an exception there ends all of their requests."""
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

    from kvpool_vllm.stats import METRIC_PREFIX, KVPoolPromMetrics

    registry = CollectorRegistry()
    kinds = {kind: partial(kind, registry=registry) for kind in (Counter, Gauge, Histogram)}
    config = type("Config", (), {"kv_transfer_config": None})()
    metrics = KVPoolPromMetrics(config, kinds, ["engine"], {0: ["0"]})
    with caplog.at_level(logging.INFO, LOGGER_NAME):
        for added in ({"breaker_rejected.a": -5}, {"no_such_metric": 1}, {"save_bytes": 7}):
            metrics.observe({"counters": added, "gauges": {}})
    assert len(caplog.records) == 1
    assert registry.get_sample_value(f"{METRIC_PREFIX}save_bytes_total", {"engine": "0"}) == 7
