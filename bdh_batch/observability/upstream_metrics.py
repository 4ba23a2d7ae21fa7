"""Prometheus metrics of upstreams: what they were asked, how they failed, and which of their endpoints are up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from bdh_batch.observability.engine_metrics import FIRST_TOKEN


class EndpointState(Protocol):
    """One endpoint of an upstream."""

    @property
    def address(self) -> str: ...

    @property
    def outstanding(self) -> int: ...

    @property
    def up(self) -> bool: ...


class UpstreamMetrics:
    """The metrics of all upstreams of one server. Implements their `Observer`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._first = Histogram(
            "bdh_upstream_time_to_first_token_seconds",
            "From a request to an upstream to its first token",
            ("upstream",),
            buckets=FIRST_TOKEN,
            registry=registry,
        )
        self._failed = self._counter("failures", "Requests that an endpoint failed, by how", "kind")
        self._moved = self._counter("failovers", "Requests that went to another endpoint, begun or not", "begun")
        self._ended = self._counter("requests", "Requests that ended, by how", "finished_reason")
        self._tokens = self._counter("tokens", "Tokens of requests, counted or estimated", "kind")

    def watch(self, endpoints: Callable[[], Mapping[str, Sequence[EndpointState]]]) -> None:
        """From now on, scrapes report the endpoints of each upstream as they are at their moment."""
        self._registry.register(_EndpointCollector(endpoints))

    def answered(self, upstream: str, seconds: float) -> None:
        self._first.labels(upstream).observe(seconds)

    def failed(self, upstream: str, kind: str) -> None:
        self._failed.labels(upstream, kind).inc()

    def went_elsewhere(self, upstream: str, begun: bool) -> None:
        self._moved.labels(upstream, str(begun).lower()).inc()

    def ended(self, upstream: str, outcome: str, prompt_tokens: int, completion_tokens: int) -> None:
        self._ended.labels(upstream, outcome).inc()
        self._tokens.labels(upstream, "prompt").inc(prompt_tokens)
        self._tokens.labels(upstream, "completion").inc(completion_tokens)

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(f"bdh_upstream_{name}", text, ("upstream", label), registry=self._registry)


class _EndpointCollector(Collector):
    def __init__(self, endpoints: Callable[[], Mapping[str, Sequence[EndpointState]]]) -> None:
        self._endpoints = endpoints

    def collect(self) -> Iterable[GaugeMetricFamily]:
        labels = ["upstream", "endpoint"]
        up = GaugeMetricFamily("bdh_upstream_endpoint_up", "Whether the endpoint is up, 0 or 1", labels=labels)
        outstanding = GaugeMetricFamily("bdh_upstream_requests_in_flight", "Requests under way", labels=labels)
        for upstream, endpoints in self._endpoints().items():
            for endpoint in endpoints:
                up.add_metric([upstream, endpoint.address], float(endpoint.up))
                outstanding.add_metric([upstream, endpoint.address], endpoint.outstanding)
        yield from (up, outstanding)
