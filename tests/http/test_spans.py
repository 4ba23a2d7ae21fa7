"""Spans as a collector gets them: a real server, real OTLP, and a small HTTP server at its other end."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from tritonclient.grpc.service_pb2 import ModelInferRequest

from bdh_batch import settings
from bdh_batch.errors import ConfigError
from bdh_batch.observability import spans as module
from bdh_batch.observability.spans import Spans, traces_url
from bdh_batch.processes.service import open_spans
from tests.conftest import free_port

if TYPE_CHECKING:
    from tests.conftest import ServeFactory, Server

TINY = Path(__file__).parent.parent / "data" / "conformance" / "tiny"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SECRET = "the-secret-word"
ERROR = Status.STATUS_CODE_ERROR
WITHIN = 300.0  # seconds, or it is a failure


def plain(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    return [plain(each) for each in value.array_value.values] if kind == "array_value" else getattr(value, str(kind))


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Reported:
    """A span that has arrived."""

    def __init__(self, span: Span) -> None:
        self.name, self.state = span.name, span.trace_state
        self.trace, self.id, self.parent = span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()
        self.seconds = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
        self.began = span.start_time_unix_nano
        self.failed = span.status.code == ERROR
        self.attributes = {each.key: plain(each.value) for each in span.attributes}

    def __getitem__(self, name: str) -> Any:
        return self.attributes[name]


class Collector:
    """Takes spans; while it is `held` it lets those who bring some wait."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.spans: list[Reported] = []
        self.service: dict[str, Any] = {}
        self.waiting = 0
        self.held = False

    def take(self, path: str, headers: dict[str, str], body: bytes) -> None:
        assert path == "/v1/traces"
        with self.changed:
            self.waiting += 1
            self.changed.notify_all()
            self.changed.wait_for(lambda: not self.held)
            self.waiting -= 1
            self.bodies.append(body)
            self.headers.append(headers)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                self.service = {each.key: plain(each.value) for each in resource.resource.attributes}
                self.spans += [Reported(span) for scope in resource.scope_spans for span in scope.spans]
            self.changed.notify_all()

    def hold(self, held: bool) -> None:
        with self.changed:
            self.held = held
            self.changed.notify_all()

    def until_waited_for(self) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.waiting > 0, WITHIN)

    def of(self, request_id: str, generations: int) -> tuple[Reported, list[Reported]]:
        """The spans of a request, once there are so many, and no others with it."""

        def found() -> list[Reported]:
            return [span for span in self.spans if span["gen_ai.request.id"] == request_id]

        with self.changed:
            assert self.changed.wait_for(lambda: len(found()) >= 1 + generations, WITHIN), [
                s.attributes for s in found()
            ]
            requests = [span for span in found() if span.name == "request"]
            below = [span for span in found() if span.name == "generation"]
        assert (len(requests), len(below)) == (1, generations)
        assert all((span.trace, span.parent) == (requests[0].trace, requests[0].id) for span in below)
        return requests[0], below


@contextmanager
def listening(collector: Collector) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            collector.take(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            """Nothing: the tests look at what came."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        collector.hold(False)
        http.shutdown()
        thread.join()
        http.server_close()


@pytest.fixture(scope="module")
def grpc_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def traced(serve: ServeFactory, grpc_port: int) -> Iterator[tuple[Server, Collector]]:
    collector = Collector()
    environment = {"OTEL_BSP_SCHEDULE_DELAY": "50", "OTEL_EXPORTER_OTLP_HEADERS": "x-tenant=team-a"}
    with listening(collector) as url:
        option = f"telemetry.otlp_endpoint={url}"
        options = (option, "limits.max_n=4", f"kserve.grpc_port={grpc_port}")
        with serve(*options, model=TINY, env=environment) as server:
            yield server, collector


def test_a_call_of_grpc_is_part_of_its_clients_trace(traced: tuple[Server, Collector], grpc_port: int) -> None:
    _, collector = traced
    asked = ModelInferRequest(model_name="tiny")
    asked.inputs.add(name="prompt", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"a")
    asked.parameters["max_tokens"].int64_param = 3
    metadata = [("x-request-id", "called"), ("traceparent", f"00-{TRACE}-{PARENT}-01")]
    with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        route = "/inference.GRPCInferenceService/ModelInfer"
        channel.unary_unary(route)(asked.SerializeToString(), metadata=metadata, timeout=WITHIN)
    request, (generation,) = collector.of("called", 1)
    assert (request.trace, request.parent, request.failed) == (TRACE, PARENT, False)
    assert (request["http.route"], request["http.response.status_code"]) == (route, 200)
    assert generation["gen_ai.usage.completion_tokens"] == 3


def ask(server: Server, id: str, path: str = "/v1/completions", status: int = 200, **body: Any) -> httpx.Response:
    headers = {"x-request-id": id} | body.pop("headers", {})
    response = server.http.post(path, json=body, headers=headers)
    assert response.status_code == status, response.text
    return response


def test_a_request_is_part_of_its_clients_trace_and_reports_what_the_metrics_do(
    traced: tuple[Server, Collector],
) -> None:
    server, collector = traced
    before = server.metrics()
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=state"}
    sampling: dict[str, Any] = {"temperature": 0.5, "top_p": 0.75}
    response = ask(server, "whole", headers=headers, prompt="ab", max_tokens=5, ignore_eos=True, **sampling).json()
    request, (generation,) = collector.of("whole", 1)
    after = server.metrics()

    assert (request.trace, request.parent, request.state) == (TRACE, PARENT, "vendor=state")
    assert not request.failed
    assert not generation.failed
    assert request["http.route"] == "/v1/completions"
    assert request["http.request.method"] == "POST"
    assert request["http.response.status_code"] == 200
    assert {name: value for name, value in generation.attributes.items() if ".latency." not in name} == {
        "gen_ai.request.id": "whole",
        "gen_ai.request.n": 1,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.75,
        "gen_ai.response.model": response["model"],
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.prompt_tokens": response["usage"]["prompt_tokens"],
        "gen_ai.usage.completion_tokens": 5,
    }
    for attribute, metric in (
        ("time_in_queue", "request_queue_time_seconds"),
        ("time_to_first_token", "time_to_first_token_seconds"),
        ("e2e", "e2e_request_latency_seconds"),
    ):
        grown = after[f"bdh_{metric}_sum"] - before.get(f"bdh_{metric}_sum", 0)
        assert generation[f"gen_ai.latency.{attribute}"] == pytest.approx(grown, abs=1e-9), attribute
    assert generation.seconds == pytest.approx(generation["gen_ai.latency.e2e"], abs=1e-6)
    assert generation.began >= request.began
    assert collector.headers[-1]["x-tenant"] == "team-a"
    assert collector.service["service.name"] == "bdh_batch"


def test_every_sequence_has_a_span_and_an_embedding_is_one(traced: tuple[Server, Collector]) -> None:
    server, collector = traced
    ask(server, "several", prompt=["a", "b"], n=2, max_tokens=2, ignore_eos=True)
    _, responses = collector.of("several", 4)
    assert [span["gen_ai.request.n"] for span in responses] == [2] * 4
    ask(server, "embedding", "/v1/embeddings", input="abc")
    _, (pooled,) = collector.of("embedding", 1)
    assert pooled["gen_ai.usage.completion_tokens"] == 0
    assert pooled.attributes.keys().isdisjoint(("gen_ai.request.temperature", "gen_ai.latency.time_to_first_token"))


def test_a_trace_that_is_not_sampled_stays_so_and_a_wrong_one_is_none(traced: tuple[Server, Collector]) -> None:
    """Spans come in their order: what is not there before the last one's does not come any more."""
    server, collector = traced
    ask(server, "unsampled", headers={"traceparent": f"00-{TRACE}-{PARENT}-00"}, prompt="a", max_tokens=1)
    server.http.get("/health", headers={"x-request-id": "probe"})
    for wrong in ("", "00-abc", f"00-{'0' * 32}-{PARENT}-01", "x" * 4000):
        ask(server, "wrong", headers={"traceparent": wrong, "tracestate": "=,=;" * 40}, prompt="a", max_tokens=1)
    two = [("traceparent", f"00-{TRACE}-{PARENT}-01")] * 2
    server.http.get("/v1/models", headers=[*two, ("x-request-id", "two")])
    request, _ = collector.of("two", 0)
    assert (request.parent, request["http.route"]) == ("", "/v1/models")
    seen = [span for span in collector.spans if span.name == "request"]
    assert not {"unsampled", "probe"} & {span["gen_ai.request.id"] for span in seen}
    assert [span.parent for span in seen if span["gen_ai.request.id"] == "wrong"] == [""] * 4


def test_a_client_that_leaves_its_stream_is_seen(traced: tuple[Server, Collector]) -> None:
    server, collector = traced
    body = {"prompt": "a", "max_tokens": 100_000, "ignore_eos": True, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body, headers={"x-request-id": "left"}) as response:
        next(response.iter_raw())
    request, (generation,) = collector.of("left", 1)
    assert generation["gen_ai.response.finish_reasons"] == ["abort"]
    assert 0 < generation["gen_ai.usage.completion_tokens"] < 100_000
    for span in (request, generation):
        assert span.failed
        assert span["error.type"] == "abort"
    assert request["http.response.status_code"] == 200


def test_a_response_that_fails_says_by_what(traced: tuple[Server, Collector]) -> None:
    server, collector = traced
    body = {"prompt": "a", "max_tokens": 100_000, "ignore_eos": True}
    for id, stream, seconds in (("late", False, "0.1"), ("late-stream", True, "0.4")):
        headers = {"x-request-id": id, "x-request-timeout": seconds}
        response = server.http.post("/v1/completions", json=body | {"stream": stream}, headers=headers)
        assert "timeout_error" in response.text
        request, (generation,) = collector.of(id, 1)
        assert request["http.response.status_code"] == response.status_code  # 200 once the stream had begun
        assert generation["gen_ai.response.finish_reasons"] == ["error"]
        assert request.failed
        assert generation.failed
        assert request["error.type"] == generation["error.type"]
        assert generation["error.type"] in ("RunTimeout", "QueueTimeout")  # the latter where others keep the cores


def test_a_refused_request_has_a_span_and_no_span_reports_what_was_said(traced: tuple[Server, Collector]) -> None:
    server, collector = traced
    bearer = {"authorization": f"Bearer {SECRET}"}
    ask(server, "ok", headers=bearer, prompt=SECRET, user=SECRET, stop=[SECRET], max_tokens=1)
    ask(server, "refused", status=400, headers=bearer, prompt=SECRET, temperature=SECRET)
    ask(server, "nowhere", f"/{SECRET}", status=404, headers=bearer)
    collector.of("ok", 1)
    for id, status, route in (("refused", 400, "/v1/completions"), ("nowhere", 404, "other")):
        request, _ = collector.of(id, 0)
        assert request.failed
        assert (request["http.response.status_code"], request["http.route"]) == (status, route)
        assert request["error.type"] == str(status)
    assert not any(SECRET.encode() in body for body in collector.bodies)


def test_only_who_asks_for_spans_or_grpc_loads_what_they_need() -> None:
    program = "import sys, bdh_batch.server, bdh_batch.processes.front_end, bdh_batch.processes.local_engine"
    found = subprocess.run(
        [sys.executable, "-c", f"{program}; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert {"opentelemetry", "grpc", "tritonclient", "google.protobuf"}.isdisjoint(found.stdout.split())


def test_a_server_that_lacks_the_extra_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "bdh_batch.observability.spans")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)  # as where it is not installed
    endpoint = settings.Telemetry.model_validate({"otlp_endpoint": "http://localhost:4318"})
    with pytest.raises(ConfigError, match=r"^telemetry.otlp_endpoint: .*pip install 'bdh-batch\[otel\]'$"):
        open_spans(settings.Settings(telemetry=endpoint), "model")
    assert open_spans(settings.Settings(), "model") is None


def test_a_collectors_password_is_not_shown() -> None:
    url = f"https://user:{SECRET}@host/v1/traces?key={SECRET}"
    shown = settings.load(None, [("telemetry.otlp_endpoint", url)]).show()
    assert "otlp_endpoint: https://***@host/v1/traces  #" in shown
    assert SECRET not in shown
    with pytest.raises(ConfigError, match=r"^telemetry.otlp_endpoint ") as refused:
        settings.load(None, [("telemetry.otlp_endpoint", f"grpc://user:{SECRET}@host")])
    assert SECRET not in str(refused.value)


@pytest.fixture
def quick_to_give_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.1")


@pytest.mark.usefixtures("quick_to_give_up")
async def test_a_collector_that_is_away_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        spans = Spans(f"http://127.0.0.1:{closed.getsockname()[1]}", "model")
        for number in range(5000):  # more than it keeps
            spans.begin(str(number), "POST", {}).end("/", 200)
        await asyncio.to_thread(eventually, lambda: bool(caplog.records))
        await spans.close()
    levels = [record.levelno for record in caplog.records if record.name != "asyncio"]
    assert levels == [logging.WARNING]


async def test_a_collector_that_hangs_does_not_keep_a_server_from_ending(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.1)
    collector = Collector()
    collector.hold(True)
    with listening(collector) as url:
        spans = Spans(f"{url}/v1/traces/", "model")
        spans.begin("kept", "POST", {}).end("/", 200)
        await spans.close()
        assert ["lost" in record.getMessage() for record in caplog.records] == [True]
        collector.hold(False)
        collector.of("kept", 0)


def test_warnings_are_counted_while_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    logger, heard = logging.Logger("any"), list[str]()
    monkeypatch.setattr(module.log, "warning", lambda text, *values: heard.append(text % values))
    monkeypatch.setattr(time, "monotonic", iter((100, 110, 159, 160, 161)).__next__)
    logger.addHandler(module.Seldom(60))
    for number in range(5):
        logger.warning("number %d", number)
    logger.info("not of interest")
    reported = "(%d such warnings since the last one logged)"
    assert heard == [f"number 0 {reported % 0}", f"number 3 {reported % 2}"]


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://host:4318", "http://host:4318/v1/traces"),
        ("https://host/otlp/", "https://host/otlp/v1/traces"),
        ("http://host/v1/traces", "http://host/v1/traces"),
        ("http://host/?key=a", "http://host/v1/traces?key=a"),
    ],
)
def test_the_path_of_traces_is_added_where_it_is_missing(endpoint: str, url: str) -> None:
    assert traces_url(endpoint) == url


def test_an_option_of_the_environment_that_cannot_be_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "0")
    with pytest.raises(ConfigError, match="max_queue_size"):
        Spans("http://localhost", "model")


def test_requests_do_not_wait_for_a_collector_and_its_spans_are_sent_at_the_end(
    traced: tuple[Server, Collector],
) -> None:
    """The last of this module: it ends the server."""
    server, collector = traced
    collector.hold(True)
    ask(server, "first", prompt="a", max_tokens=1)
    collector.until_waited_for()
    ask(server, "last", prompt="a", max_tokens=1)  # has spans behind those that nobody takes
    server.terminate()
    eventually(lambda: "sending the last spans" in server.log)
    collector.hold(False)
    assert server.exit_code() == 0
    collector.of("last", 1)
    assert server.log.count("such warnings") <= 1  # of all the odd headers above
