"""What a run's outcomes come to."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bdh_batch.bench.figures import Figures
from bdh_batch.bench.load import Measured
from bdh_batch.bench.options import Options
from bdh_batch.bench.outcome import Outcome

MS = 1e3
Values = Callable[[Outcome], Iterator[float]]


def _ttft(outcome: Outcome) -> Iterator[float]:
    yield outcome.first - outcome.due


def _ttft_from_send(outcome: Outcome) -> Iterator[float]:
    yield outcome.first - outcome.sent


def _tpot(outcome: Outcome) -> Iterator[float]:
    if outcome.per_token is not None:
        yield outcome.per_token


def _itl(outcome: Outcome) -> Iterator[float]:
    yield from outcome.gaps


def _e2el(outcome: Outcome) -> Iterator[float]:
    yield outcome.ended - outcome.due


def _e2el_from_send(outcome: Outcome) -> Iterator[float]:
    yield outcome.ended - outcome.sent


def _client_queue_time(outcome: Outcome) -> Iterator[float]:
    yield outcome.begun - outcome.due


# By what --percentile-metrics calls them: what is reported of each, as (key, name, header, seconds of an outcome).
REPORTED: Mapping[str, Sequence[tuple[str, str, str, Values]]] = {
    "ttft": (
        ("ttft", "TTFT", "Time to First Token", _ttft),
        ("ttft_from_send", "TTFT from Send", "Time to First Token, from the real send", _ttft_from_send),
    ),
    "tpot": (("tpot", "TPOT", "Time per Output Token (excl. 1st token)", _tpot),),
    "itl": (("itl", "ITL", "Inter-token Latency", _itl),),
    "e2el": (
        ("e2el", "E2EL", "End-to-end Latency", _e2el),
        ("e2el_from_send", "E2EL from Send", "End-to-end Latency, from the real send", _e2el_from_send),
    ),
    "client_queue_time": (("client_queue_time", "Client Queue Time", "Client-side Queueing", _client_queue_time),),
    "e2el_including_client_queue": (
        ("e2el_including_client_queue", "E2EL incl. Client Queue", "Queue-inclusive End-to-end Latency", _e2el),
    ),
}


@dataclass(frozen=True)
class Latency:
    """Of one quantity: milliseconds."""

    key: str
    name: str
    header: str
    figures: Figures | None


@dataclass(frozen=True)
class Metrics:
    """Rates are per second of the run, and only of requests that were completed."""

    completed: int
    failed: int
    failures: Mapping[str, int]  # by kind
    total_input: int
    total_output: int
    request_throughput: float
    request_goodput: float | None
    output_throughput: float
    total_token_throughput: float
    max_output_tokens_per_s: float
    max_concurrent_requests: int
    input_counted_by: Mapping[str, int]  # requests by whence their count of tokens is
    output_counted_by: Mapping[str, int]
    events: int  # that bore tokens
    latencies: Sequence[Latency]


def metrics_of(measured: Measured, options: Options, input_counter: str) -> Metrics:
    """`input_counter` is who counted prompts of which the server reported nothing."""
    completed, duration = measured.completed, measured.duration
    inputs = sum(outcome.prompt_tokens for outcome in completed)
    outputs = sum(outcome.output_tokens for outcome in completed)
    good = sum(is_good(outcome, options.limits) for outcome in completed)
    reported = [row for name, rows in REPORTED.items() if name in options.percentile_metrics for row in rows]
    return Metrics(
        completed=len(completed),
        failed=len(measured.failed),
        failures=Counter(outcome.failure.kind for outcome in measured.failed if outcome.failure is not None),
        total_input=inputs,
        total_output=outputs,
        request_throughput=len(completed) / duration,
        request_goodput=good / duration if options.limits else None,
        output_throughput=outputs / duration,
        total_token_throughput=(inputs + outputs) / duration,
        max_output_tokens_per_s=peak_rate(completed),
        max_concurrent_requests=peak_concurrency(completed),
        input_counted_by=Counter(
            input_counter if outcome.reported_prompt_tokens is None else "usage" for outcome in completed
        ),
        output_counted_by=Counter(outcome.counted_by for outcome in completed),
        events=sum(len(outcome.times) for outcome in completed),
        latencies=[
            Latency(
                key,
                name,
                header,
                Figures.of((MS * value for one in completed for value in values(one)), options.metric_percentiles),
            )
            for key, name, header, values in reported
        ],
    )


def is_good(outcome: Outcome, limits: Mapping[str, float]) -> bool:
    """Whether a response is within all limits, in milliseconds; one token alone takes no time per further one."""
    found = {
        "ttft": outcome.first - outcome.due,
        "tpot": outcome.per_token or 0.0,
        "e2el": outcome.ended - outcome.due,
    }
    return all(MS * found[name] <= most for name, most in limits.items())


def peak_rate(completed: Sequence[Outcome]) -> float:
    """Tokens in the fullest second, by whole seconds from the first send on; all events of a response have the same."""
    begin = min((outcome.sent for outcome in completed), default=0.0)
    seconds: dict[int, float] = defaultdict(float)
    for outcome in completed:
        for time in outcome.times:
            seconds[int(time - begin)] += outcome.output_tokens / len(outcome.times)
    return max(seconds.values(), default=0.0)


def peak_concurrency(completed: Sequence[Outcome]) -> int:
    """The most requests that were under way at one moment; one that ends at it does not count."""
    changes = [(outcome.sent, 1) for outcome in completed] + [(outcome.ended, -1) for outcome in completed]
    running = most = 0
    for _, change in sorted(changes):
        running += change
        most = max(most, running)
    return most
