"""Prometheus metrics of a process that serves HTTP; those of engines are in `engine_metrics.py`."""

from __future__ import annotations

from collections import Counter as Counting
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from bdh_batch.observability.merging import merge
from bdh_batch.observability.usage import Usage
from bdh_batch.observability.vllm_names import vllm_names
from bdh_batch.observability.watched import Watched

disable_created_metrics()  # type: ignore[no-untyped-call]


def process_registry() -> CollectorRegistry:
    """Makes a registry that reports the memory, the processor time and the descriptors of this process."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


def exposition(registry: CollectorRegistry) -> bytes:
    """Returns what a registry has, in Prometheus' text format."""
    return generate_latest(registry)


class SandboxLoad(Protocol):
    """How busy a sandbox is, and how its jobs have ended so far."""

    @property
    def waiting(self) -> int: ...

    @property
    def running(self) -> int: ...

    @property
    def outcomes(self) -> Mapping[str, int]: ...


class StoreFigures(Protocol):
    """What a store holds, and what has happened in it: each by its kind."""

    def held(self) -> Mapping[str, int]: ...

    @property
    def evictions(self) -> Mapping[str, int]: ...

    @property
    def failures(self) -> Mapping[str, int]: ...


class ModelStatus(Protocol):
    """What is known of a model in this process."""

    @property
    def name(self) -> str: ...

    @property
    def is_loaded(self) -> bool: ...

    def engines(self) -> Iterable[Mapping[str, object]]:
        """Returns what is known of each engine process: its `state`, among other things."""


class Metrics:
    """What a process that serves HTTP counts.

    Args:
        model_name: the label of what is counted before a request has named its model.
        with_vllm_names: whether a page has some gauges under vLLM's names, too.
    """

    def __init__(self, model_name: str, with_vllm_names: bool = False) -> None:
        self.registry = process_registry()
        self.usage = Usage()
        self.watched = Watched(self.registry, self.usage)
        self._with_vllm_names = with_vllm_names
        self._name = ""
        self._others: Callable[[], Awaitable[Mapping[str, bytes]]] | None = None
        self._model_name = model_name
        self._sandboxes = _SandboxCollector()
        self.registry.register(self._sandboxes)

        labels = ("model_name", "reason")
        self._refused = Counter("bdh_admission_rejections", "Requests refused", labels, registry=self.registry)

        labels, text = ("model_name", "keyword"), "Keywords left out of schemas that requests asked to follow"
        self._left_out = Counter("bdh_schema_keywords_left_out", text, labels, registry=self.registry)

        labels, text = ("model_name", "reason"), "Streams that were resumed on another engine, by what became of theirs"
        self._failovers = Counter("bdh_failovers", text, labels, registry=self.registry)

        labels, text = ("model_name", "outcome"), "Requests whose responses may be kept, and responses that were"
        self._response_cache = Counter("bdh_response_cache", text, labels, registry=self.registry)

        self._rate_storage = self._counter(
            "rate_limit_storage_failures", "Requests whose rate was counted here instead"
        )

        labels = ("route", "status")
        self.http_requests = Counter("bdh_http_requests", "HTTP responses", labels, registry=self.registry)
        self.http_in_flight = Gauge("bdh_http_requests_in_flight", "Open HTTP requests", registry=self.registry)

    def watch_connections(self, open: Callable[[], int]) -> None:
        """From now on, scrapes report how many connections are open at their moment."""
        self._gauge("http_connections", "Open connections", open)

    def watch_response_cache(self, held: Callable[[], int]) -> None:
        """From now on, scrapes report how many bytes of responses are kept at their moment."""
        self._gauge("response_cache_bytes", "Bytes of responses that are kept in memory", held)

    def watch_store(self, store: StoreFigures) -> None:
        """From now on, scrapes report what the store holds, and how often it had to make room, or failed."""
        self.registry.register(_StoreCollector(store))

    def watch_buffered(self, held: Callable[[], int]) -> None:
        """From now on, scrapes report how many bytes of requests are held at their moment."""
        self._gauge("http_buffered_bytes", "Bytes of requests that are held until their responses", held)

    def watch_sandboxes(self, model: str, loads: Mapping[str, Callable[[], SandboxLoad]]) -> None:
        """From now on, scrapes report a model's sandboxes, by what they do; without `loads`, no longer."""
        self._sandboxes.loads[model] = loads

    def watch_models(self, models: Callable[[], Iterable[ModelStatus]]) -> None:
        """From now on, scrapes report which models are loaded, and their engine processes."""
        self.registry.register(_ModelCollector(models))

    def join(self, name: str, others: Callable[[], Awaitable[Mapping[str, bytes]]]) -> None:
        """From now on a page has what `others` counts, too.

        Args:
            name: of this process, among the names of the others.
        """
        self._name, self._others = name, others

    async def page(self) -> bytes:
        """What Prometheus scrapes."""
        page = self.exposition()
        if self._others is not None:
            page = merge({self._name: page, **await self._others()})
        return page + vllm_names(page) if self._with_vllm_names else page

    def exposition(self) -> bytes:
        """What is counted in this process."""
        return exposition(self.registry)

    def refused(self, reason: str, model: str | None = None) -> None:
        self._refused.labels(self._model_name if model is None else model, reason).inc()

    def failed_over(self, model: str, reason: str, streams: int) -> None:
        """Counts streams that go to another engine, as theirs was lost or replaced."""
        self._failovers.labels(model, reason).inc(streams)

    def left_out(self, model: str, warnings: Iterable[Mapping[str, str]]) -> None:
        """`warnings` are of one request."""
        for warning in warnings:
            self._left_out.labels(model, warning["keyword"]).inc()

    def response_cache(self, model: str, outcome: str) -> None:
        """Counts a request whose response was found or not, or a response that is kept, or a fault of the cache."""
        self._response_cache.labels(model, outcome).inc()

    def rate_storage_failed(self) -> None:
        self._rate_storage.inc()

    def refused_unread(self, status: int) -> None:
        """Counts requests that were refused before any route was called."""
        self.http_requests.labels("unread", status).inc()

    def _gauge(self, name: str, text: str, value: Callable[[], int]) -> None:
        Gauge(f"bdh_{name}", text, registry=self.registry).set_function(value)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"bdh_{name}", text, ("model_name",), registry=self.registry).labels(self._model_name)


class _ModelCollector(Collector):
    def __init__(self, models: Callable[[], Iterable[ModelStatus]]) -> None:
        self._models = models

    def collect(self) -> Iterable[GaugeMetricFamily]:
        loaded = GaugeMetricFamily("bdh_model_loaded", "Whether a model is loaded: 1 or 0", labels=["model_name"])
        engines = GaugeMetricFamily("bdh_engines", "Engine processes by their state", labels=["model_name", "state"])
        for model in self._models():
            loaded.add_metric([model.name], model.is_loaded)
            for state, count in Counting(str(engine["state"]) for engine in model.engines()).items():
                engines.add_metric([model.name, state], count)
        yield from (loaded, engines)


class _StoreCollector(Collector):
    def __init__(self, store: StoreFigures) -> None:
        self._store = store

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        store, texts = self._store, {"records": "Stored records", "states": "Files of states", "bytes": "Their bytes"}
        held = store.held()
        for name, text in texts.items():
            yield GaugeMetricFamily(f"bdh_store_{name}", f"{text}, as of this process's last write", held.get(name, 0))
        evictions = CounterMetricFamily("bdh_store_evictions", "What was removed from the store", labels=["kind"])
        failures = CounterMetricFamily("bdh_store_failures", "Calls of the store that failed", labels=["call"])
        for family, counts in ((evictions, store.evictions), (failures, store.failures)):
            for kind, count in [*counts.items()]:
                family.add_metric([kind], count)
            yield family


class _SandboxCollector(Collector):
    """Reports what each model's sandboxes do: `loads` has them by model, then by their work."""

    def __init__(self) -> None:
        self.loads: dict[str, Mapping[str, Callable[[], SandboxLoad]]] = {}

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        labels = ["model_name", "work"]
        waiting = GaugeMetricFamily("bdh_sandbox_jobs_waiting", "Jobs that wait for a process", labels=labels)
        running = GaugeMetricFamily("bdh_sandbox_jobs_running", "Jobs that run", labels=labels)
        ended = CounterMetricFamily("bdh_sandbox_jobs", "Jobs that ended, by outcome", labels=[*labels, "outcome"])
        for model, loads in [*self.loads.items()]:
            for work, look in loads.items():
                load, values = look(), [model, work]
                waiting.add_metric(values, load.waiting)
                running.add_metric(values, load.running)
                for outcome, count in load.outcomes.items():
                    ended.add_metric([*values, outcome], count)
        yield from (waiting, running, ended)
