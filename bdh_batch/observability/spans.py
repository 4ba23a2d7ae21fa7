"""OpenTelemetry spans: a `request` for each HTTP request, and below it a `generation` for each of its sequences.

Imported only where a collector is set: what it needs is an extra. Attributes are named as vLLM's; they contain no text,
no keys, and no paths or messages, which may have some of either in them. The SDK's own environment variables hold
(OTEL_EXPORTER_OTLP_HEADERS, OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, …).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Mapping, Sequence as Many
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from bdh_batch import __version__
from bdh_batch.engine.worker import Observer
from bdh_batch.errors import ConfigError
from bdh_batch.messages import Delta, FinishReason
from bdh_batch.observability.access import cause
from bdh_batch.scheduler.batch import Step
from bdh_batch.scheduler.sequence import Sequence

log = logging.getLogger(__name__)

TRACES = "/v1/traces"
FLUSH_SECONDS = 3.0  # that a server's end waits for a collector
WARNING_SECONDS = 60.0  # between two warnings that OpenTelemetry has
FAILED = 400  # a refusal is an error to who looks for the end of a request, whosever fault it is


class Spans:
    """Makes spans, and hands them to a thread that sends them; where that falls behind, the oldest are dropped.

    Args:
        endpoint: the collector's URL; /v1/traces is added where it does not end so.

    Raises:
        ConfigError: the environment has an option for OpenTelemetry that cannot be used.
    """

    def __init__(self, endpoint: str, model_name: str) -> None:
        _speak_seldom(logging.getLogger("opentelemetry"))
        self._model_name = model_name
        self._propagator = TraceContextTextMapPropagator()
        ours = Resource({"service.name": "bdh_batch", "service.version": __version__})
        try:
            resource = ours.merge(OTELResourceDetector().detect())
            self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
            self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(traces_url(endpoint))))
        except ValueError as error:
            raise ConfigError(f"telemetry.otlp_endpoint: OpenTelemetry cannot be set up so ({error})") from error
        self._tracer = self._provider.get_tracer("bdh_batch", __version__)

    def begin(self, request_id: str, method: str, trace_headers: Mapping[str, str]) -> RequestSpan:
        """A request has come, perhaps as part of the trace that its W3C `trace_headers` name."""
        span = self._tracer.start_span(
            "request",
            self._propagator.extract(trace_headers),
            SpanKind.SERVER,
            {"gen_ai.request.id": request_id, "http.request.method": method},
        )
        return RequestSpan(span)

    def beside(self, observer: Observer) -> Observer:
        """The same observer, but sequences that end have spans, too."""
        return _Beside(observer, self)

    def finished(self, sequence: Sequence, now: float) -> None:
        """A sequence has ended, whichever way."""
        if not isinstance(sequence.client.span, RequestSpan):
            return
        to_unix = time.time_ns() - time.monotonic_ns()
        span = self._tracer.start_span(
            "generation",
            sequence.client.span.context,
            attributes=self._attributes(sequence, now),
            start_time=to_unix + int(sequence.times.arrived * 1e9),
        )
        if sequence.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
            _fail(span, cause(sequence))
        span.end(to_unix + int(now * 1e9))

    def _attributes(self, sequence: Sequence, now: float) -> dict[str, AttributeValue]:
        assert sequence.finish_reason is not None
        sampling = sequence.completion.sampling
        attributes: dict[str, AttributeValue | None] = {
            "gen_ai.request.id": sequence.id,
            "gen_ai.request.n": sequence.client.n,
            "gen_ai.request.max_tokens": sequence.completion.max_tokens,
            "gen_ai.request.temperature": None if sampling is None else sampling.temperature,
            "gen_ai.request.top_p": None if sampling is None else sampling.top_p,
            "gen_ai.response.model": self._model_name,
            "gen_ai.response.finish_reasons": [sequence.finish_reason.value],
            "gen_ai.usage.prompt_tokens": len(sequence.prompt) - (thought := sequence.completion.latent_steps),
            "gen_ai.usage.completion_tokens": len(sequence.generated) + thought,
            "gen_ai.latency.time_in_queue": sequence.times.in_queue,
            "gen_ai.latency.time_to_first_token": sequence.times.to_first_token,
            "gen_ai.latency.e2e": now - sequence.times.arrived,
        }
        return {name: value for name, value in attributes.items() if value is not None}

    async def close(self) -> None:
        """Sends what is left, as far as the collector takes it in FLUSH_SECONDS."""
        log.info("sending the last spans for up to %.0f s", FLUSH_SECONDS)
        closing = threading.Thread(target=self._provider.shutdown, name="bdh-spans", daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, FLUSH_SECONDS)
        if closing.is_alive():
            log.warning("the collector did not take the last spans within %.0f s; they are lost", FLUSH_SECONDS)


class RequestSpan:
    """The span of one HTTP request, until its response has ended. Used on the event loop; `context` anywhere."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._failed = False
        self.context = set_span_in_context(span)

    def generation_ended(self, tokens: int, failure: Delta | None) -> None:
        """For `Generation.on_end`: a stream that breaks off has begun with a 200, and has failed all the same."""
        if failure is not None:
            self.fail(cause(failure))

    def fail(self, why: str) -> None:
        """The first cause stays."""
        if not self._failed:
            self._failed = True
            _fail(self._span, why)

    def end(self, route: str, status: int) -> None:
        """`status` is the response's; 0 where there is none."""
        self._span.set_attributes({"http.route": route, "http.response.status_code": status})
        if not 0 < status < FAILED:
            self.fail(str(status))
        self._span.end()


class _Beside:
    def __init__(self, observer: Observer, spans: Spans) -> None:
        self._observer = observer
        self._spans = spans

    def stepped(self, step: Step, seconds: float) -> None:
        self._observer.stepped(step, seconds)

    def looked(self, active: Many[float]) -> None:
        self._observer.looked(active)

    def gained(self, sequences: Many[Sequence]) -> None:
        self._observer.gained(sequences)

    def finished(self, sequence: Sequence, now: float) -> None:
        self._observer.finished(sequence, now)
        self._spans.finished(sequence, now)


class Seldom(logging.Handler):
    """Passes on one record in so many `seconds`, and says how many it has kept to itself."""

    def __init__(self, seconds: float) -> None:
        super().__init__(logging.WARNING)
        self._seconds = seconds
        self._next = 0.0
        self._kept = 0

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if now < self._next:
            self._kept += 1
            return
        log.warning("%s (%d such warnings since the last one logged)", record.getMessage(), self._kept)
        self._next, self._kept = now + self._seconds, 0


def _speak_seldom(logger: logging.Logger) -> None:
    """A collector that is away, or a client that sends odd headers, must not fill the log."""
    logger.handlers = [Seldom(WARNING_SECONDS)]
    logger.propagate = False


def traces_url(endpoint: str) -> str:
    """'http://host:4318' to 'http://host:4318/v1/traces', which it may also be already."""
    parts = urlsplit(endpoint)
    return parts._replace(path=parts.path.rstrip("/").removesuffix(TRACES) + TRACES).geturl()


def _fail(span: Span, why: str) -> None:
    span.set_status(Status(StatusCode.ERROR))
    span.set_attribute("error.type", why)
