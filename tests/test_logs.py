"""The log of a server for programs: a line of JSON for every event of every process, without text and without keys."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
from openai import OpenAI
from tritonclient.grpc.service_pb2 import ModelInferRequest

from bdh_batch.http.auth.keys import KeyFile, new_key
from bdh_batch.observability.logs import ACCESS, JsonFormatter
from tests.conftest import CONFORMANCE, HANG_SECONDS, eventually, free_port

if TYPE_CHECKING:
    from tests.conftest import Cli, ServeFactory, Server

TINY = CONFORMANCE / "tiny"
SECRET = "the-secret-word"


def events(server: Server) -> list[dict[str, Any]]:
    """All that the server's processes have written, to either stream."""
    return [json.loads(line) for line in server.log.splitlines()]


def requests(server: Server) -> list[dict[str, Any]]:
    return [event for event in events(server) if event["logger"] == ACCESS]


def record(message: str, *args: object, **more: object) -> logging.LogRecord:
    found = logging.LogRecord("a.logger", logging.ERROR, "file", 1, message, args, None)
    found.__dict__.update(more)
    return found


class TestFormatter:
    def test_writes_an_event_as_a_line(self) -> None:
        line = JsonFormatter("engine-0").format(record("two\nlines of %s", "\udc80\u2028", fields={"request_id": "a"}))
        assert len(line.splitlines()) == 1
        event = json.loads(line)
        assert event.pop("time").endswith("+00:00")
        assert event.pop("pid") > 0
        assert event == {
            "level": "error",
            "logger": "a.logger",
            "message": "two\nlines of \udc80\u2028",
            "process": "engine-0",
            "request_id": "a",
        }

    def test_writes_where_an_exception_came_from(self) -> None:
        try:
            raise ValueError(SECRET)
        except ValueError:
            event = json.loads(JsonFormatter().format(record("failed", exc_info=sys.exc_info())))
        assert event["error"] == "ValueError"
        assert "test_logs.py" in event["traceback"]

    def test_leaves_out_what_libraries_attach(self) -> None:
        assert SECRET not in JsonFormatter().format(record("asked", body=SECRET))


def test_a_request_is_an_event_with_counts_and_times_and_no_text(serve: ServeFactory, tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    key = keys.add(partial(new_key, name="first", rights={}))
    tenant, port = keys.read()[0].id, free_port()
    options = ("server.log_format=json", "auth.enabled=true", f"auth.api_keys_file={keys.path}")
    with serve(*options, f"kserve.grpc_port={port}", model=TINY) as server:
        server.http.headers["authorization"] = f"Bearer {key}"
        ask = {"prompt": SECRET, "max_tokens": 5, "seed": 1, "user": SECRET}
        for id, body in {"whole": ask, "stream": ask | {"stream": True}, "two": ask | {"n": 2}}.items():
            headers = {"x-request-id": id}
            assert server.http.post("/v1/completions", json=body, headers=headers).status_code == 200
        server.http.post("/v1/completions", json=ask | {"model": SECRET}, headers={"x-request-id": "other"})
        server.http.get(f"/v1/models/{SECRET}", headers={"x-request-id": "path"})
        bearer = {"authorization": f"Bearer {SECRET}"}
        httpx.post(f"{server.url}/v1/completions", json=ask, headers=bearer, timeout=HANG_SECONDS)
        with OpenAI(base_url=f"{server.url}/v1", api_key=key) as client:
            ended = client.responses.create(input=SECRET, background=True, max_output_tokens=5)
            eventually(lambda: client.responses.retrieve(ended.id).status in ("completed", "incomplete"))
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            infer(channel, key)
        eventually(lambda: len([each for each in requests(server) if "prompt_tokens" in each]) >= 5)
        found = requests(server)
    by_id = {each["request_id"]: each for each in found}
    whole = by_id["whole"]
    times = {"time", "pid", "message", "seconds", "first_byte_seconds"}
    assert {name: value for name, value in whole.items() if name not in times} == {
        "level": "info",
        "logger": ACCESS,
        "request_id": "whole",
        "tenant": tenant,
        "model": "tiny",
        "method": "POST",
        "route": "/v1/completions",
        "status": 200,
        "prompt_tokens": len(SECRET),
        "cached_tokens": 0,
        "completion_tokens": 5,
    }
    assert 0 < by_id["stream"]["first_byte_seconds"] <= by_id["stream"]["seconds"]
    assert by_id["stream"]["completion_tokens"] == 5
    assert by_id["two"]["completion_tokens"] == 10
    assert by_id["other"]["status"] == 404
    assert "completion_tokens" not in by_id["other"]
    assert by_id["path"]["route"] == "/v1/models/{id}"
    (refused,) = [each for each in found if each.get("status") == 401]
    assert refused["tenant"].startswith("@")
    (behind,) = [each for each in found if each.get("background")]
    assert (behind["completion_tokens"], behind["tenant"], behind["model"]) == (5, tenant, "tiny")
    (called,) = [each for each in found if each.get("route", "").endswith("/ModelInfer")]
    assert (called["status"], called["tenant"], called["completion_tokens"]) == (200, tenant, 4)
    assert not {"/health", "/readyz", "/metrics"} & {each.get("route") for each in found}  # asked again and again
    ready = [each for each in events(server) if each.get("url") == server.url]
    assert len(ready) == 1
    assert SECRET not in server.log
    assert key not in server.log


def infer(channel: grpc.Channel, key: str) -> None:
    request = ModelInferRequest(model_name="tiny")
    tensor = request.inputs.add(name="prompt", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(SECRET.encode())
    request.parameters["max_tokens"].int64_param = 4
    call = channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=ModelInferRequest.SerializeToString,
        response_deserializer=bytes,
    )
    call(request, metadata=[("authorization", f"Bearer {key}")], timeout=HANG_SECONDS)


def test_every_process_logs_so(serve: ServeFactory) -> None:
    options = ("server.log_format=json", "server.workers=2", "engine.replicas=1", "engine.threads=1")
    with serve(*options, model=TINY, cutting=True, env={"BDH_PORT": "1"}) as server:
        server.complete(prompt=SECRET, max_tokens=3)
        eventually(lambda: any(each.get("route") == "/v1/completions" for each in events(server)))
        found = events(server)
    (asked,) = [each for each in found if each.get("route") == "/v1/completions"]
    assert asked["process"] in ("front-0", "front-1")
    assert (asked["model"], asked["prompt_tokens"], asked["completion_tokens"]) == ("tiny", len(SECRET), 3)
    kinds = {each.get("process", "").partition("-")[0] for each in events(server)}
    assert kinds == {"", "front", "engine"}  # the supervisor has no name
    assert any(each["level"] == "warning" and "BDH_PORT" in each["message"] for each in found)


@pytest.mark.parametrize("told", [True, False])
def test_requests_are_logged_in_text_where_that_is_asked_for(serve: ServeFactory, told: bool) -> None:
    options = ["server.access_log=true"] if told else []
    with serve(*options, model=TINY) as server:
        assert server.http.post("/v1/completions", json={"prompt": "ab", "max_tokens": 3}).status_code == 200
        if told:
            eventually(lambda: "POST /v1/completions: 200 in " in server.log)
            assert ", 2 + 3 tokens" in server.log
    assert (ACCESS in server.log) is told


def test_why_a_server_cannot_start_is_an_event_too(cli: Cli) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        options = ("--port", taken.getsockname()[1], "--model", TINY, "--set", "server.log_format=json")
        done = cli("serve", *options)
    assert done.returncode == 2
    assert done.stdout == ""
    *_, last = map(json.loads, done.stderr.splitlines())
    assert (last["level"], last["logger"]) == ("critical", "bdh_batch.launch")
    assert str(options[1]) in last["message"]


def test_what_nobody_catches_is_an_event(tmp_path: Path) -> None:
    code = """
import threading, warnings
from bdh_batch.observability.logs import set_up
set_up("info", True, True, "engine-0")
thread = threading.Thread(target=lambda: 1 / 0, name="worker")
thread.start()
thread.join()
warnings.warn("be careful", stacklevel=1)
raise OSError("no disk")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 1
    assert [each["level"] for each in found] == ["error", "warning", "critical"]
    assert [each.get("error") for each in found] == ["ZeroDivisionError", None, "OSError"]
    assert {each["process"] for each in found} == {"engine-0"}
