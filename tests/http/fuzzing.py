"""Asks a server what its OpenAPI document allows (positive) and what it does not (negative), and checks responses.

Each must have a status, a content type and a shape that the document declares; none may be a fault of the server, and
every stream must end as streams do. The requests are schemathesis's; this only keeps responses short.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import jsonschema
import pydantic
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed as seeded, settings
from schemathesis import APIOperation, Case, GenerationMode, Response
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.http import message_events, response_events

Operation = APIOperation[Any, Any, Any, Any]
AnyCase = Case[Any]

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
WRONG = (
    AssertionError,
    FailureGroup,
    jsonschema.ValidationError,
    pydantic.ValidationError,
    requests.RequestException,
)
RESPONSE_SECONDS = 300.0  # a response that is not there by then is a hang
WITHOUT_BODY = 5  # cases of an operation that has but its headers to vary, of each mode
MOST_TOKENS = 4
MOST_WAITED = 0.01  # seconds
MOST_EVENTS = 1_000_000  # streams are read to their ends
EVENT = "data: "
RESPONSES = "/v1/responses"
NAMED = "event: "  # before it, where the events of an API have names
TIMEOUT = "x-request-timeout"


@dataclass
class Found:
    """What came of it: how many cases there were of each kind, and what was wrong with some."""

    cases: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    streams: int = 0
    slowest: float = 0.0
    wrong: list[str] = field(default_factory=list)


class Fuzzer:
    def __init__(self, url: str, seed: int = 0) -> None:
        self._url = url
        self._seed = seed
        self._session = requests.Session()
        config = schemathesis.Config.from_dict({"max-stream-events": MOST_EVENTS})
        self._schema = schemathesis.openapi.from_url(f"{url}/openapi.json", config=config)
        self._events = event_validators(self._schema.raw_schema)
        self.found = Found()
        self._stored: list[str] = []  # the ids of responses, and of items of theirs

    def run(self, cases: int) -> Found:
        """At least so many over all operations; those with bodies have the most."""
        operations = [found.ok() for found in self._schema.get_all_operations() if isinstance(found, Ok)]
        with_body = sum(bool(operation.body) for operation in operations)
        without = (len(operations) - with_body) * 2 * WITHOUT_BODY
        share = math.ceil((cases - without) / (2 * with_body))
        with self._session:
            for operation in operations:
                for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                    self._run(operation, mode, share if operation.body else WITHOUT_BODY)
        return self.found

    def _run(self, operation: Operation, mode: GenerationMode, cases: int) -> None:
        @seeded(self._seed)
        @settings(
            max_examples=cases,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy(generation_mode=mode))
        def ask(case: AnyCase) -> None:
            self.found.cases[f"{operation.label} {mode.value}"] += 1
            case.body = _whole_numbers(case.body)
            self._ask(self._going_on(_patient(_brief(case))))

        ask()

    def _going_on(self, case: AnyCase) -> AnyCase:
        """Where it names a response or an item: every other time one that is there, or was."""
        if not self._stored or not case.operation.path.startswith(RESPONSES) or sum(self.found.cases.values()) % 2:
            return case
        response, item = self._stored
        if "id" in (case.path_parameters or {}):
            case.path_parameters["id"] = response
        if isinstance(body := case.body, dict):
            if isinstance(body.get("previous_response_id"), str):
                body["previous_response_id"] = response
            items = body.get("input")
            for each in items if isinstance(items, list) else ():
                if isinstance(each, dict) and each.get("type") == "item_reference" and isinstance(each.get("id"), str):
                    each["id"] = item
        return case

    def _remember(self, text: str) -> None:
        """Notes the response in the body of one, or in the last event of a stream."""
        *_, last = (line.removeprefix(EVENT) for line in text.split("\n") if line.startswith((EVENT, "{")))
        response = json.loads(last)
        response = response.get("response", response)
        if response.get("store") and response["output"]:
            self._stored = [response["id"], response["output"][0]["id"]]

    def _ask(self, case: AnyCase) -> None:
        began = time.perf_counter()
        try:
            response = case.call_and_validate(self._url, self._session, checks=CHECKS, timeout=RESPONSE_SECONDS)
            self._look(case, response)
        except WRONG as error:
            self.found.wrong.append(f"{case.operation.label}: {error!r}\n{case.headers!r}\n{case.body!r}")
        self.found.slowest = max(self.found.slowest, time.perf_counter() - began)

    def _look(self, case: AnyCase, response: Response) -> None:
        self.found.statuses[response.status_code] += 1
        assert not response.stream_cut_short
        text = response.content.decode()
        assert response.status_code == 200 or "Traceback (most recent call last)" not in text
        if response.status_code == 200 and case.operation.path == RESPONSES:
            self._remember(text)
        if response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
            self.found.streams += 1
            check_stream(text, self._events[case.operation.path])


def check_stream(text: str, chunk: jsonschema.Draft202012Validator) -> None:
    """Each event of a whole stream is of its kind, and the last ends it."""
    *events, rest = text.split("\n\n")
    assert rest == ""
    events = [event.partition("\n")[2] if event.startswith(NAMED) else event for event in events]
    assert all(event.startswith(EVENT) for event in events)
    reported = [event.removeprefix(EVENT) for event in events]
    if "sequence_number" in json.loads(reported[0]):
        assert reported.pop() == "[DONE]"
        response_events.in_order([json.loads(event) for event in reported])
    elif json.loads(reported[0]).get("type") == "message_start":
        message_events.in_order([json.loads(event) for event in reported])
    elif reported[-1] == "[DONE]":
        reported.pop()
        assert not any("error" in json.loads(event) for event in reported)
    elif json.loads(reported[-1]).get("done"):
        assert not any("error" in json.loads(event) for event in reported)
    else:
        assert "error" in json.loads(reported[-1])
    for event in reported:
        chunk.validate(json.loads(event))


def event_validators(document: dict[str, Any]) -> dict[str, jsonschema.Draft202012Validator]:
    """Of the events of the paths that can stream."""
    found = {}
    for path, methods in document["paths"].items():
        content = methods.get("post", {}).get("responses", {}).get("200", {}).get("content", {})
        if (stream := content.get("text/event-stream")) is not None:
            data, *_ = stream["schema"]["properties"]["data"]["anyOf"]
            found[path] = jsonschema.Draft202012Validator(
                data["contentSchema"] | {"components": document["components"]}
            )
    return found


def _whole_numbers(value: Any) -> Any:
    """Integers without a fraction: 1.0 is one in JSON Schema, but not here, and would hide all else that is wrong."""
    if isinstance(value, dict):
        return {key: _whole_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _brief(case: AnyCase) -> AnyCase:
    """Wherever its response would be long, ask for a short one: what is no number, or negative, is left as it is."""
    body = case.body
    if case.operation.path in ("/v1/completions", "/v1/chat/completions") and isinstance(body, dict):
        names = [name for name in ("max_tokens", "max_completion_tokens") if name in body]
        for name in names:
            value = body[name]
            if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > MOST_TOKENS):
                body[name] = MOST_TOKENS
        if not names:
            body["max_tokens"] = MOST_TOKENS
        elif len(names) == 2 and None not in (body[names[0]], body[names[1]]):
            body[names[0]] = body[names[1]]  # they must agree
    if case.operation.path == "/v1/messages" and isinstance(body, dict):
        value = body.get("max_tokens")
        if isinstance(value, int) and not isinstance(value, bool) and value > MOST_TOKENS:
            body["max_tokens"] = MOST_TOKENS
    if case.operation.path == "/v1/responses" and isinstance(body, dict):
        value = body.get("max_output_tokens")
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > MOST_TOKENS):
            body["max_output_tokens"] = MOST_TOKENS
    if case.operation.path.startswith("/v2/") and isinstance(body, dict):
        given = body.get("parameters")
        if given is None or isinstance(given, dict):
            body["parameters"] = {**(given or {}), "max_tokens": MOST_TOKENS}
    if isinstance(
        (query := case.query or {}).get("seconds"), int | float
    ):  # that steps of an idle engine are waited for
        query["seconds"] = min(query["seconds"], MOST_WAITED)
    return case


def _patient(case: AnyCase) -> AnyCase:
    """Where it gives its response a time, ask for one that a busy machine can keep to, too: else its 504 were right."""
    try:
        given = float(case.headers[TIMEOUT]) if case.headers and TIMEOUT in case.headers else 0.0
    except ValueError:
        return case
    if 0 < given < RESPONSE_SECONDS:
        case.headers[TIMEOUT] = str(RESPONSE_SECONDS)
    return case
