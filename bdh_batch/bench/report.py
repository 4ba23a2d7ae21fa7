"""What a run came to: the table that is printed, and the dictionary that is saved, with vLLM's lines and keys."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from bdh_batch import __version__
from bdh_batch.bench.arrivals import Ramp
from bdh_batch.bench.load import Measured
from bdh_batch.bench.metrics import Latency, Metrics
from bdh_batch.bench.options import Options

WIDTH = 50
SHOWN_FAILURES = 10


@dataclass(frozen=True)
class Report:
    """The figures of a run, as a table and as a result file."""

    options: Options
    model: str
    tokenizer: str
    date: datetime  # when the run began
    measured: Measured
    metrics: Metrics

    def table(self) -> str:
        return "\n".join(
            [
                f"{' Serving Benchmark Result ':=^{WIDTH}}",
                *self._counts(),
                *self._rates(),
                *(line for latency in self.metrics.latencies for line in _latency_lines(latency)),
                *self._failure_lines(),
                *self._client_lines(),
                "=" * WIDTH,
                *(f"WARNING: {note}" for note in self.notes()),
            ]
        )

    def notes(self) -> list[str]:
        """What one should know before one believes the figures."""
        metrics, measured = self.metrics, self.measured
        found = [f"the client or its machine may be the bottleneck: {sign}." for sign in measured.strain.signs()]
        if measured.interrupted:
            found.append(f"the run was interrupted; {measured.unfinished} requests are missing.")
        if not metrics.completed:
            found.append("no request was completed.")
        elif metrics.events != metrics.total_output:
            found.append(
                f"{metrics.total_output} tokens came in {metrics.events} events that show some; "
                "ITL is the time between such events."
            )
        if guessed := sum(n for whence, n in metrics.input_counted_by.items() if whence.startswith("guess")):
            found.append(
                f"the tokens of {guessed} prompts are a guess: the server reported no usage, and has no /tokenize."
            )
        return found

    def saved(self) -> dict[str, Any]:
        """As JSON can hold it; rates per second, latencies in milliseconds as their keys say, else in seconds."""
        options, metrics = self.options, self.metrics
        result: dict[str, Any] = {
            "date": self.date.strftime("%Y%m%d-%H%M%S"),
            "endpoint_type": options.backend,
            "backend": options.backend,
            "label": options.label,
            "model_id": self.model,
            "tokenizer_id": self.tokenizer,
            "num_prompts": options.num_prompts,
            **dict(options.metadata),
            "request_rate": _finite(options.request_rate),
            "burstiness": _finite(options.burstiness),
            "max_concurrency": options.max_concurrency,
            **self._ramp(),
            "duration": self.measured.duration,
            "completed": metrics.completed,
            "failed": metrics.failed,
            "total_input_tokens": metrics.total_input,
            "total_output_tokens": metrics.total_output,
            "request_throughput": metrics.request_throughput,
            "request_goodput": metrics.request_goodput,
            "output_throughput": metrics.output_throughput,
            "total_token_throughput": metrics.total_token_throughput,
            "max_output_tokens_per_s": metrics.max_output_tokens_per_s,
            "max_concurrent_requests": metrics.max_concurrent_requests,
        }
        for latency in metrics.latencies:
            result |= _latency_keys(latency, options.metric_percentiles)
        return result | self._ours() | (self._detailed() if options.save_detailed else {})

    def _ours(self) -> dict[str, Any]:
        """What vLLM's files do not contain."""
        options, metrics, strain = self.options, self.metrics, self.measured.strain
        return {
            "bench_version": __version__,
            "dataset_name": options.dataset_name,
            "seed": options.seed,
            "loop": "open" if options.open_loop else "closed",
            "latencies_count_from": self._from,
            "goodput": dict(options.limits) or None,
            "failures": dict(metrics.failures),
            "interrupted": self.measured.interrupted,
            "unfinished": self.measured.unfinished,
            "input_tokens_counted_by": dict(metrics.input_counted_by),
            "output_tokens_counted_by": dict(metrics.output_counted_by),
            "token_events": metrics.events,
            "client": {
                "cpu_share": strain.cpu_share,
                "loop_late_median_ms": 1e3 * strain.loop_late_median,
                "loop_late_p99_ms": 1e3 * strain.loop_late_p99,
                "send_late_p99_ms": None if strain.send_late_p99 is None else 1e3 * strain.send_late_p99,
                "bottleneck": strain.signs(),
            },
        }

    @property
    def _from(self) -> str:
        return "the time a request was due" if self.options.open_loop else "the time a slot was free"

    def _detailed(self) -> dict[str, Any]:
        """Of each request that was begun, in the order of the data; 0 and "" where nothing came."""
        outcomes, began = self.measured.outcomes, self.measured.began
        return {
            "input_lens": [one.prompt_tokens for one in outcomes],
            "output_lens": [one.output_tokens if one.complete else 0 for one in outcomes],
            "ttfts": [one.first - one.due if one.times else 0.0 for one in outcomes],
            "itls": [one.gaps for one in outcomes],
            "latencies": [one.ended - one.due if one.ended else 0.0 for one in outcomes],
            "start_times": [one.sent - began if one.sent else 0.0 for one in outcomes],
            "due_times": [one.due - began for one in outcomes],
            "queue_times": [one.begun - one.due if one.begun else 0.0 for one in outcomes],
            "generated_texts": [one.text for one in outcomes],
            "errors": ["" if one.failure is None else f"{one.failure.kind}: {one.failure}" for one in outcomes],
        }

    def _ramp(self) -> dict[str, Any]:
        options = self.options
        if options.ramp_up_strategy is None:
            return {}
        return {
            "ramp_up_strategy": options.ramp_up_strategy,
            "ramp_up_start_rps": options.ramp_up_start_rps,
            "ramp_up_end_rps": options.ramp_up_end_rps,
            "rps_change_events": list(self._rate_changes()),
        }

    def _rate_changes(self) -> Iterator[dict[str, Any]]:
        """When the rate reached each whole number, by the schedule."""
        options = self.options
        ramp = Ramp(options.ramp_up_strategy or "", options.ramp_up_start_rps or 0.0, options.ramp_up_end_rps or 0.0)
        reached = math.ceil(ramp.start) - 1
        outcomes = self.measured.outcomes
        for outcome in outcomes:
            whole = math.floor(ramp.rate(outcome.index / max(1, self.measured.wanted - 1)))
            moment = self.date + timedelta(seconds=outcome.due - self.measured.began)
            for value in range(reached + 1, whole + 1):
                yield {"rps": value, "timestamp": moment.isoformat()}
            reached = max(reached, whole)

    def _counts(self) -> Iterator[str]:
        options, metrics = self.options, self.metrics
        yield _line("Successful requests:", metrics.completed)
        yield _line("Failed requests:", metrics.failed)
        if options.max_concurrency is not None:
            yield _line("Maximum request concurrency:", options.max_concurrency)
        if math.isfinite(options.request_rate):
            yield _line("Request rate configured (RPS):", options.request_rate)
        yield _line("Benchmark duration (s):", self.measured.duration)
        yield _line("Total input tokens:", metrics.total_input)
        yield _line("Total generated tokens:", metrics.total_output)

    def _rates(self) -> Iterator[str]:
        metrics = self.metrics
        yield _line("Request throughput (req/s):", metrics.request_throughput)
        if metrics.request_goodput is not None:
            yield _line("Request goodput (req/s):", metrics.request_goodput)
        yield _line("Output token throughput (tok/s):", metrics.output_throughput)
        yield _line("Peak output token throughput (tok/s):", metrics.max_output_tokens_per_s)
        yield _line("Peak concurrent requests:", float(metrics.max_concurrent_requests))
        yield _line("Total token throughput (tok/s):", metrics.total_token_throughput)

    def _failure_lines(self) -> Iterator[str]:
        if not self.metrics.failures:
            return
        yield f"{'Failures by Kind':-^{WIDTH}}"
        for kind, number in sorted(self.metrics.failures.items()):
            yield _line(f"{kind}:", number)
        failures = {f"{one.failure.kind}: {one.failure}" for one in self.measured.failed if one.failure is not None}
        yield from sorted(failures)[:SHOWN_FAILURES]

    def _client_lines(self) -> Iterator[str]:
        strain = self.measured.strain
        yield f"{'This Client':-^{WIDTH}}"
        yield _line("CPU share of one core (%):", 100 * strain.cpu_share)
        yield _line("P99 event loop lateness (ms):", 1e3 * strain.loop_late_p99)
        if strain.send_late_p99 is not None:
            yield _line("P99 lateness of sending (ms):", 1e3 * strain.send_late_p99)
        yield _line("Latencies count from:", self._from)
        yield _line("Input tokens counted by:", ", ".join(sorted(self.metrics.input_counted_by)))
        yield _line("Output tokens counted by:", ", ".join(sorted(self.metrics.output_counted_by)))


def _line(name: str, value: float | str) -> str:
    """A whole number as it is, another one with two digits."""
    shown = f"{value:<10.2f}" if isinstance(value, float) else f"{value!s:<10}"
    return f"{name:<40} {shown}".rstrip()


def percent_name(percent: float) -> str:
    return f"{percent:.0f}" if percent == int(percent) else str(percent)


def _latency_lines(latency: Latency) -> Iterator[str]:
    yield f"{latency.header:-^{WIDTH}}"
    figures = latency.figures
    if figures is None:
        yield _line(f"Mean {latency.name} (ms):", "none")
        return
    yield _line(f"Mean {latency.name} (ms):", figures.mean)
    yield _line(f"Median {latency.name} (ms):", figures.median)
    for percent, value in figures.percentiles:
        yield _line(f"P{percent_name(percent)} {latency.name} (ms):", value)


def _latency_keys(latency: Latency, percents: Sequence[float]) -> Mapping[str, float | None]:
    names = [f"p{percent_name(percent)}_{latency.key}_ms" for percent in percents]
    figures = latency.figures
    keys: dict[str, float | None] = {
        f"mean_{latency.key}_ms": None if figures is None else figures.mean,
        f"median_{latency.key}_ms": None if figures is None else figures.median,
        f"std_{latency.key}_ms": None if figures is None else figures.std,
    }
    values = [None] * len(names) if figures is None else [value for _, value in figures.percentiles]
    return keys | dict(zip(names, values))


def _finite(value: float) -> float | str:
    """JSON has no infinity."""
    return value if math.isfinite(value) else "inf"
