"""What the proxy counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvpool.proxy.routing import Router

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class _Instances(Collector):
    """Reads the router as it is when somebody asks; it lives on the loop that answers."""

    def __init__(self, router: Router, waiting: Callable[[], int]) -> None:
        self._router = router
        self._waiting = waiting

    def collect(self) -> Iterable[Metric]:
        """Yield all families."""
        yield GaugeMetricFamily("kvpool_proxy_waiting", "Requests that wait for an instance", self._waiting())
        families = (
            ("up", "Whether the instance answers", "up"),
            ("draining", "Whether the instance gets nothing new", "draining"),
            ("requests", "Requests that run there", "requests"),
            ("backlog_tokens", "Tokens to be computed there before first tokens", "backlog"),
            ("kv_usage", "Share of its KV cache in use, as it says", "kv_usage"),
        )
        for name, text, attribute in families:
            family = GaugeMetricFamily(f"kvpool_proxy_instance_{name}", text, labels=["role", "instance"])
            for one in self._router.instances.values():
                family.add_metric([one.role, one.name], float(getattr(one, attribute)))
            yield family


class Metrics:
    """Counters of one proxy, in a registry of their own."""

    def __init__(self, router: Router, waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Instances(router, waiting))
        self.requests = Counter(
            "kvpool_proxy_requests", "Requests, by the status they ended with; 499: the client left; broken: the "
            "stream ended in an error", ["route", "status"], registry=self.registry,
        )  # fmt: skip
        self.attempts = Counter(
            "kvpool_proxy_attempts", "Requests to instances", ["role", "outcome"], registry=self.registry
        )
        self.prefills = Counter(
            "kvpool_proxy_prefills", "Prefill and decode: what became of the prefill", ["outcome"],
            registry=self.registry,
        )  # fmt: skip
        self.decode_starts = Counter(
            "kvpool_proxy_decode_starts", "Prefill and decode: when the decode instance was asked", ["when"],
            registry=self.registry,
        )  # fmt: skip
        self.prompt_tokens = Counter(
            "kvpool_proxy_prompt_tokens", "Tokens of prompts that were sent somewhere", ["role"],
            registry=self.registry,
        )  # fmt: skip
        self.held_tokens = Counter(
            "kvpool_proxy_held_tokens", "Those that the chosen instance held, by who says so", ["role", "source"],
            registry=self.registry,
        )  # fmt: skip
        self.lookups = Counter(
            "kvpool_proxy_lookups", "Prompts that the master was asked for", ["outcome"], registry=self.registry
        )
        self.first_byte = Histogram(
            "kvpool_proxy_first_byte_seconds", "Until the first byte of an answer", ["route"], buckets=BUCKETS,
            registry=self.registry,
        )  # fmt: skip

    def page(self) -> bytes:
        """Return the page."""
        return generate_latest(self.registry)
