"""Prometheus metrics of one engine. Names and buckets follow vLLM's, with the prefix `bdh_`: dashboards carry over."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence as Sequences
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from bdh_batch.engine.worker import Load
from bdh_batch.errors import NotFinite
from bdh_batch.scheduler.batch import Step
from bdh_batch.scheduler.sequence import Sequence

FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
BETWEEN_TOKENS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2),
    *(0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10),
)
WHOLE_REQUEST = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
SEQUENCES = tuple(2**power for power in range(13))


class EngineMetrics:
    """All metrics of the engine of one model. Implements the worker's `Observer`."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self.registry = registry
        self._model_name = model_name
        self._steps = self._many(("bdh_step_duration_seconds",), "Duration of a step", BETWEEN_TOKENS)
        labels = ("model_name", "layer")
        text = "Share of neurons that fired, for a token looked at now and then"
        self._active = Gauge("bdh_active_neuron_fraction", text, labels, registry=self.registry)
        self._occupancy = self._many(("bdh_batch_occupancy",), "Sequences in a step", SEQUENCES)
        self._step_tokens = self._many(("bdh_iteration_tokens_total",), "Tokens in a step", TOKENS)
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens computed")
        self._generated = self._counter("generation_tokens", "Tokens generated")
        self._latent = self._counter("latent_steps", "Latent steps of requests that ended")
        self._first = self._histogram("time_to_first_token_seconds", "From arrival to the first token", FIRST_TOKEN)
        # vLLM called it the second way before: dashboards ask for either.
        names = ("bdh_inter_token_latency_seconds", "bdh_time_per_output_token_seconds")
        self._between = self._many(names, "Between tokens of a sequence", BETWEEN_TOKENS)
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time between a request's tokens", BETWEEN_TOKENS
        )
        self._whole = self._histogram("e2e_request_latency_seconds", "From arrival to the end", WHOLE_REQUEST)
        self._queue = self._histogram("request_queue_time_seconds", "Waiting for a slot", WHOLE_REQUEST)
        self._prefill = self._histogram("request_prefill_time_seconds", "From slot to first token", WHOLE_REQUEST)
        self._decode = self._histogram("request_decode_time_seconds", "From first to last token", WHOLE_REQUEST)
        self._inference = self._histogram("request_inference_time_seconds", "From slot to last token", WHOLE_REQUEST)
        self._request_prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request", TOKENS)
        self._request_generated = self._histogram("request_generation_tokens", "Tokens a request generated", TOKENS)
        self._max_tokens = self._histogram("request_params_max_tokens", "max_tokens of a request", TOKENS)
        self._n = self._histogram("request_params_n", "n of a request", TOKENS[:6])
        labels = ("model_name", "finished_reason")
        self._ended = Counter("bdh_request_success", "Requests that ended, by reason", labels, registry=self.registry)
        self._not_finite = self._counter("non_finite_logits", "Requests ended by NaN or infinite logits")

    def watch(self, load: Callable[[], Load]) -> None:
        """From now on, scrapes report the engine's load as it is at their moment."""
        self.registry.register(_LoadCollector(load, self._model_name))

    def describe_cache(self, **facts: object) -> None:
        """Reports the memory for states, in labels: dashboards join other metrics with them."""
        labels = ("model_name", *facts)
        info = Gauge("bdh_cache_config_info", "The memory for states, in its labels", labels, registry=self.registry)
        info.labels(self._model_name, *facts.values()).set(1)

    def stepped(self, step: Step, seconds: float) -> None:
        self._steps.observe(seconds)
        self._occupancy.observe(len(step.sequences))
        self._step_tokens.observe(step.decodes + step.prefill_tokens)
        if step.prefill_tokens:
            self._prompt_tokens.inc(step.prefill_tokens)

    def looked(self, active: Sequences[float]) -> None:
        """`active` is the share of neurons that fired, by layer."""
        for layer, share in enumerate(active):
            self._active.labels(self._model_name, layer).set(share)

    def gained(self, sequences: Sequences[Sequence]) -> None:
        self._generated.inc(sum(sequence.times.gained_tokens for sequence in sequences))
        gaps: dict[float, int] = {}  # those of one step are mostly the same
        for sequence in sequences:
            if len(sequence.generated) > sequence.times.gained_tokens:
                gap = sequence.times.gap
                gaps[gap] = gaps.get(gap, 0) + 1
            elif (seconds := sequence.times.to_first_token) is not None:
                self._first.observe(seconds)
        for gap, count in gaps.items():
            self._between.observe(gap, count)

    def finished(self, sequence: Sequence, now: float) -> None:
        assert sequence.finish_reason is not None
        self._ended.labels(self._model_name, sequence.finish_reason.value).inc()
        if isinstance(sequence.error, NotFinite):
            self._not_finite.inc()
        self._whole.observe(now - sequence.times.arrived)
        self._request_prompt.observe(len(sequence.prompt) - sequence.completion.latent_steps)
        self._latent.inc(max(0, min(sequence.computed - len(sequence.prompt), 0) + sequence.completion.latent_steps))
        self._request_generated.observe(len(sequence.generated))
        self._max_tokens.observe(sequence.completion.max_tokens)
        self._n.observe(sequence.client.n)
        if (seconds := sequence.times.in_queue) is not None:
            self._queue.observe(seconds)
        times = sequence.times
        if times.scheduled is not None and times.first_token is not None and times.last_token is not None:
            decode = times.last_token - times.first_token
            self._prefill.observe(times.first_token - times.scheduled)
            self._decode.observe(decode)
            self._inference.observe(times.last_token - times.scheduled)
            if len(sequence.generated) > 1:
                self._per_token.observe(decode / (len(sequence.generated) - 1))

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        family = Histogram(f"bdh_{name}", text, ("model_name",), buckets=tuple(buckets), registry=self.registry)
        return family.labels(self._model_name)

    def _many(self, names: Sequences[str], text: str, buckets: Iterable[float]) -> ManyHistogram:
        """What is observed in every step, which locks would make dear."""
        histogram = ManyHistogram(names, text, self._model_name, buckets)
        self.registry.register(histogram)
        return histogram

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"bdh_{name}", text, ("model_name",), registry=self.registry).labels(self._model_name)


class ManyHistogram(Collector):
    """A histogram, under one name or several, that takes one observation of a value, or many at once. Written by one
    thread."""

    def __init__(self, names: Sequences[str], text: str, model_name: str, buckets: Iterable[float]) -> None:
        self._names, self._text, self._model_name = names, text, model_name
        self._bounds = [*buckets, math.inf]
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def collect(self) -> Iterable[HistogramMetricFamily]:
        bounds = ["+Inf" if bound == math.inf else str(float(bound)) for bound in self._bounds]
        buckets = list(zip(bounds, accumulate(self._counts)))
        for name in self._names:
            family = HistogramMetricFamily(name, self._text, labels=["model_name"])
            family.add_metric([self._model_name], buckets, self._sum)
            yield family


class _LoadCollector(Collector):
    def __init__(self, load: Callable[[], Load], model_name: str) -> None:
        self._load = load
        self._model_name = model_name

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        load = self._load()
        usage = load.running / load.slots
        for name, text, value in (
            ("num_requests_running", "Sequences that run", load.running),
            ("num_requests_waiting", "Sequences that wait for their first slot", load.waiting),
            ("num_requests_swapped", "Sequences that are preempted by swap", load.swapped),
            ("state_slots", "Slots to run in", load.slots),
            ("state_slots_usage_perc", "Share of the slots to run in that are held, 0 to 1", usage),
            ("kv_cache_usage_perc", "The same, under the name that it has in vLLM", usage),
            ("prefix_cache_states", "Prefixes that are cached for later requests", load.cached_states),
        ):
            family = GaugeMetricFamily(f"bdh_{name}", text, labels=["model_name"])
            family.add_metric([self._model_name], value)
            yield family
        for name, text, count in (
            ("num_preemptions", "Times that a sequence was preempted", load.preemptions),
            ("prefix_cache_queries", "Prompt tokens that were looked up", load.cache_queries),
            ("prefix_cache_hits", "Prompt tokens that were found", load.cache_hits),
            ("prompt_tokens_cached", "Prompt tokens that did not have to be computed", load.cache_hits),
            ("spec_decode_num_drafts", "Drafts that were tried", load.drafts.drafts),
            ("spec_decode_num_draft_tokens", "Tokens of drafts that were tried", load.drafts.tokens),
            ("spec_decode_num_accepted_tokens", "Tokens of drafts that came true", load.drafts.accepted),
        ):
            counter = CounterMetricFamily(f"bdh_{name}", text, labels=["model_name"])
            counter.add_metric([self._model_name], count)
            yield counter
