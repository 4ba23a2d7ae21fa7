"""What /openapi.json says is valid, complete and true of the server; /docs shows it, and needs nobody for it."""

from __future__ import annotations

import os
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hatchling.builders.wheel import WheelBuilder
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from pydantic import BaseModel
from starlette.routing import Route

from bdh_batch.http.anthropic import responses as messages
from bdh_batch.http.docs import response_types as responses
from bdh_batch.http.docs.endpoint import Endpoint
from bdh_batch.http.docs.field_help import HELP, help_of
from bdh_batch.http.docs.openapi import openapi
from bdh_batch.http.docs.page import VIEWS
from bdh_batch.http.docs.parameters import QUERY
from bdh_batch.http.endpoints import ENDPOINTS
from bdh_batch.http.gate import Gate
from bdh_batch.http.kserve import responses as kserve
from bdh_batch.http.request.strict import Wire
from bdh_batch.http.responses_api import responses as conversations
from bdh_batch.http.routes import Routes
from bdh_batch.http.serving import Serving
from bdh_batch.observability.metrics import Metrics
from bdh_batch.settings import Settings
from tests.http.fuzzing import Fuzzer, check_stream, event_validators

if TYPE_CHECKING:
    from tests.conftest import Server

ROOT = Path(__file__).parent.parent.parent
CASES = int(os.environ.get("FUZZ_CASES", "360"))
DOCUMENTED = [each for each in ENDPOINTS if each.documented]
SEED = int(os.environ.get("FUZZ_SEED", "0"))
USER = {"role": "user", "content": "a"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
PROMPT = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["a"]}
MAX = {"max_tokens": 3}
PARAMETERS = {"properties": {"a": {"type": "boolean"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}
USABLE = {"name": "f", "input_schema": PARAMETERS}
SHAPES: list[tuple[str, dict[str, Any], type[BaseModel]]] = [
    ("/v1/completions", {"prompt": "a"}, responses.Completion),
    (
        "/v1/completions",
        {"prompt": ["ab", "c"], "n": 2, "best_of": 3, "echo": True, "logprobs": 3, "return_token_ids": True},
        responses.Completion,
    ),
    ("/v1/completions", {"prompt": "abc", "echo": True, "logprobs": 0, "max_tokens": 0}, responses.Completion),
    ("/v1/chat/completions", {"messages": [USER], "stop": ["e"]}, responses.ChatCompletion),
    (
        "/v1/chat/completions",
        {"messages": [USER], "logprobs": True, "top_logprobs": 2, "return_token_ids": True, "n": 2},
        responses.ChatCompletion,
    ),
    (
        "/v1/chat/completions",
        {"messages": [USER], "tools": [TOOL], "tool_choice": "required", "max_tokens": 200},
        responses.ChatCompletion,
    ),
    (
        "/v1/completions",
        {"prompt": ["abc", "d"], "echo": True, "logprobs": 1, "prompt_logprobs": 3, "return_tokens_as_token_ids": True}
        | {"neurons": {"top": 2}},
        responses.Completion,
    ),
    ("/v1/chat/completions", {"messages": [USER], "prompt_logprobs": 0, "echo": True}, responses.ChatCompletion),
    ("/v1/embeddings", {"input": ["a", "b"]}, responses.Embeddings),
    ("/v1/embeddings", {"messages": [USER], "truncate_prompt_tokens": 2}, responses.Embeddings),
    ("/v1/embeddings", {"input": [1, 2], "encoding_format": "base64"}, responses.Embeddings),
    ("/tokenize", {"prompt": "aé", "return_token_strs": True}, responses.Tokenization),
    ("/v1/tokenize", {"messages": [USER]}, responses.Tokenization),
    ("/detokenize", {"tokens": [255, 65]}, responses.Detokenization),
    ("/v1/completions", {"prompt": ""}, responses.Error),
    ("/v1/chat/completions", {"messages": []}, responses.Error),
    ("/v1/embeddings", {"input": "a", "model": "none"}, responses.Error),
    ("/v2/models/tiny/infer", {"inputs": [PROMPT], "parameters": MAX}, kserve.InferResponse),
    ("/v2/models/tiny/versions/1/infer", {"id": "a", "inputs": [PROMPT | {"shape": [2]}]}, kserve.KServeError),
    ("/v2/models/tiny/generate", {"text_input": "a", "parameters": {"top_k": 5}}, kserve.GenerateResponse),
    ("/v2/models/tiny/generate", {"prompt": "a", "logprobs": 1, "return_token_ids": True}, kserve.GenerateResponse),
    ("/v2/models/none/generate", {"text_input": "a"}, kserve.KServeError),
    ("/v1/messages", {"messages": [USER], "stop_sequences": ["e"], "max_tokens": 3}, messages.MessageResponse),
    (
        "/v1/messages",
        {"messages": [USER], "tools": [USABLE], "tool_choice": {"type": "any"}, "max_tokens": 200},
        messages.MessageResponse,
    ),
    ("/v1/responses", {"input": "a", "max_output_tokens": 3}, conversations.ResponseObject),
    ("/v1/responses", {"input": [USER], "top_logprobs": 2, "max_output_tokens": 3}, conversations.ResponseObject),
    ("/v1/responses", {"input": []}, responses.Error),
    ("/v1/responses/input_tokens", {"input": "a"}, conversations.ResponseInputTokens),
    ("/v1/messages", {"messages": [USER]}, messages.AnthropicError),
    ("/v1/messages/count_tokens", {"messages": [USER]}, messages.InputTokens),
]
ERRORS = (responses.Error, kserve.KServeError, messages.AnthropicError)


@cache
def document() -> dict[str, Any]:
    return openapi(Settings())


def validator(name: str, reported: dict[str, Any]) -> Draft202012Validator:
    """Of the type of that name."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": reported["components"]}
    return Draft202012Validator(schema)


class TestDocument:
    def test_is_valid(self, tiny: Server) -> None:
        response = tiny.http.get("/openapi.json")
        assert response.headers["content-type"] == "application/json"
        assert response.json()["openapi"].startswith("3.1.")
        validate(response.json())

    def test_is_that_of_the_settings(self, tiny: Server) -> None:
        assert tiny.http.get("/openapi.json").json() == document()

    def test_has_every_route_and_no_other(self) -> None:
        routes = Routes(Serving.of(Settings(), Gate(), Metrics("tiny"))).table()
        served = {(method.lower(), _template(route)) for route in routes for method in (route.methods or set())}
        reported = {(method, path) for path, methods in document()["paths"].items() for method in methods}
        undocumented = ("/openapi.json", "/docs", "/ui", "/ui/{id}", "/watch/stream")
        assert {each for each in served if each[0] != "head"} == reported | {("get", path) for path in undocumented}

    def test_names_every_operation_once(self) -> None:
        names = [each.id for each in DOCUMENTED]
        assert len(set(names)) == len(names)

    def test_explains_every_field_of_a_request_and_knows_no_others(self) -> None:
        used = set()
        for name, kind in _subclasses(Wire).items():
            for field, reported in kind.model_fields.items():
                assert help_of(name, reported.alias or field)
                used |= {reported.alias or field, f"{name}.{reported.alias or field}"}
        assert HELP.keys() <= used

    @pytest.mark.parametrize("operation", DOCUMENTED, ids=lambda operation: str(operation.id))
    def test_has_examples_that_fit_it(self, operation: Endpoint) -> None:
        reported = document()
        for body in operation.requests.values():
            fits = [kind for kind in operation.bodies if validator(kind.__name__, reported).is_valid(body)]
            assert len(fits) == 1, body
        assert bool(operation.requests) == bool(operation.bodies)
        for reply in operation.replies.values():
            assert isinstance(operation.response, type)
            validator(operation.response.__name__, reported).validate(reply)
            operation.response.model_validate(reply)

    def test_says_the_limits_of_the_settings(self) -> None:
        reported = openapi(
            Settings.model_validate(
                {
                    "limits": {"max_n": 3, "max_prompts": 2, "max_inputs": 2, "max_stop": 1, "max_stop_bytes": 4},
                    "model": {"max_model_len": 50},
                }
            )
        )
        checks = validator("CompletionBody", reported)
        fitting: dict[str, Any] = {"prompt": ["a", "b"], "n": 3, "best_of": 3, "stop": ["abcd"], "max_tokens": 50}
        checks.validate(fitting)
        wrong = {"prompt": ["a"] * 3, "n": 4, "best_of": 4, "stop": ["a", "b"], "max_tokens": 51}
        for field, value in wrong.items():
            assert not checks.is_valid(fitting | {field: value}), field
        assert not checks.is_valid(fitting | {"stop": "abcde"})
        assert not validator("EmbeddingBody", reported).is_valid({"input": [[1]] * 3})

    @pytest.mark.parametrize("choice", ["refuse", "ignore"])
    def test_says_what_becomes_of_unknown_fields(self, choice: str) -> None:
        reported = openapi(Settings.model_validate({"api": {"unknown_fields": choice}}))
        body: dict[str, Any] = {"messages": [USER | {"content": [{"type": "text", "text": "a", "spare": 1}]}]}
        assert validator("ChatBody", reported).is_valid(body) == (choice == "ignore")

    def test_asks_for_a_key_where_the_server_does(self) -> None:
        def guarded(**auth: bool) -> set[str]:
            paths = openapi(Settings.model_validate({"auth": auth}))["paths"]
            return {path for path, methods in paths.items() if any("security" in each for each in methods.values())}

        assert guarded() == set()
        closed = guarded(enabled=True)
        assert {"/v1/completions", "/server_info"} <= closed
        assert closed.isdisjoint({"/health", "/metrics", "/"})
        assert "/metrics" in guarded(enabled=True, protect_metrics=True)

    @pytest.mark.parametrize(
        ("body", "fits"),
        [
            ({"prompt": "a", "logit_bias": {"5": 100}}, True),
            ({"prompt": "a", "logit_bias": {"05": 1}}, False),
            ({"prompt": [1, "a"]}, False),
            ({"prompt": []}, False),
            ({"prompt": "a", "suffix": ""}, True),
            ({"prompt": "a", "suffix": "b"}, False),
            ({"prompt": "a", "temperature": 2.1}, False),
            ({"prompt": "a", "top_p": 0}, True),
            ({"prompt": "a", "spare": None}, True),
            ({"prompt": "a", "spare": 0}, False),
            ({"prompt": "a", "seed": 2**64}, False),
            ({"prompt": "a", "stream_options": {"include_usage": 1}}, False),
            ({"prompt": "a", "guided_json": '{"type": "null"}'}, True),
            ({"prompt": "a", "guided_choice": []}, False),
            ({"prompt": "a", "stop": ""}, False),
            ({}, False),
        ],
    )
    def test_says_what_the_server_does(self, tiny: Server, body: dict[str, Any], fits: bool) -> None:
        assert validator("CompletionBody", document()).is_valid(body) == fits
        response = tiny.http.post("/v1/completions", json=body | {"max_tokens": 1})
        assert response.status_code == (200 if fits else 400), response.text

    @pytest.mark.parametrize(
        ("body", "fits"),
        [
            ({"messages": [USER]}, True),
            ({"messages": [{"role": "user"}]}, False),
            ({"messages": [{"role": "user", "content": None}]}, False),
            ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, True),
            ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, False),
            ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "foo": 1}]}]}, False),
            ({"messages": [{"role": "tool", "content": "a"}]}, False),
            ({"messages": [{"role": "tool", "content": "a", "tool_call_id": None}]}, False),
            ({"messages": [{"role": "tool", "content": "a", "tool_call_id": "1"}]}, True),
            ({"messages": [{"role": "assistant", "tool_calls": [CALL]}]}, True),
            ({"messages": [{"role": "assistant", "tool_calls": [CALL | {"index": -1}]}]}, False),
            ({"messages": [USER], "tools": [TOOL], "tool_choice": {"type": "function"}}, False),
            ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, True),
            ({"messages": [{"role": "assistant"}]}, False),
            ({"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]}, False),
            ({"messages": [USER | {"spare": {"a": [1]}}]}, True),
            ({"messages": [{"role": "critic", "content": None}]}, True),
            ({"messages": [{"role": "", "content": "a"}]}, False),
            ({"messages": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}]}, True),
            ({"messages": [{"role": "user", "content": [{"type": "refusal", "text": "No."}]}]}, False),
            (
                {"messages": [{"role": "user", "content": ["a", {"type": "text", "text": "b", "cache_control": {}}]}]},
                True,
            ),
            ({"messages": [USER], "response_format": {"type": "json_schema"}}, False),
            ({"messages": [USER], "response_format": {"type": "text"}}, True),
            ({"messages": [USER], "response_format": {"type": "text", "json_schema": {"name": "a"}}}, False),
            ({"messages": [USER], "response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, True),
            ({"messages": [USER], "response_format": {"type": "json_schema", "json_schema": {}}}, True),
            ({"messages": [USER], "response_format": {"type": "json_object", "schema": {"type": "object"}}}, True),
            ({"messages": [USER], "response_format": {"type": "text", "schema": {}}}, False),
            ({"messages": [USER], "tools": [TOOL], "tool_choice": "any"}, True),
            ({"messages": [USER], "tools": [TOOL], "tool_choice": "some"}, False),
            ({"messages": [{"role": "function", "name": "f", "content": "a"}]}, True),
            ({"messages": [USER], "chat_template_kwargs": {"messages": []}}, False),
        ],
    )
    def test_says_what_the_server_does_with_chats(self, tiny: Server, body: dict[str, Any], fits: bool) -> None:
        assert validator("ChatBody", document()).is_valid(body) == fits
        response = tiny.http.post("/v1/chat/completions", json=body | {"max_tokens": 1})
        assert response.status_code == (200 if fits else 400), response.text


class TestQueries:
    @pytest.mark.parametrize("operation", [each for each in DOCUMENTED if each.query], ids=lambda each: str(each.id))
    def test_bounds_are_those_of_the_server(self, tiny: Server, operation: Endpoint) -> None:
        """What is wrong with a parameter is found before what it is asked of."""
        least = {name: schema["minimum"] for name in operation.query if "minimum" in (schema := QUERY[name]["schema"])}
        beyond = [({name: value - 1}, name) for name, value in least.items()]
        beyond += [({name: most + 1}, name) for name in least if (most := QUERY[name]["schema"].get("maximum"))]
        streams = {"stream": "true"} if "stream" in operation.query else {}
        for wrong, at_fault in (({}, None), *beyond):
            response = tiny.http.request(
                operation.method, operation.path.replace("{id}", "none"), params=least | streams | wrong
            )
            param = response.json().get("error", {}).get("param")
            assert param == at_fault if at_fault else param not in least, response.text


class TestResponses:
    @pytest.mark.parametrize(("path", "body", "shape"), SHAPES)
    def test_have_their_shapes(self, tiny: Server, path: str, body: dict[str, Any], shape: type[BaseModel]) -> None:
        generates = "completions" in path or path.endswith("/generate")
        response = tiny.http.post(path, json=({"max_tokens": 3, "seed": 1} if generates else {}) | body)
        assert (response.status_code >= 400) == (shape in ERRORS), response.text
        shape.model_validate_json(response.content)
        validator(shape.__name__, document()).validate(response.json())

    @pytest.mark.parametrize(("path", "body", "shape"), [shape for shape in SHAPES[:6] if "best_of" not in shape[1]])
    @pytest.mark.parametrize("options", [None, {"include_usage": True}, {"continuous_usage_stats": True}])
    def test_have_their_shapes_in_streams(
        self, tiny: Server, path: str, body: dict[str, Any], shape: type[BaseModel], options: dict[str, bool] | None
    ) -> None:
        asked = {"max_tokens": 3, "seed": 1} | body | {"stream": True, "stream_options": options}
        response = tiny.http.post(path, json=asked)
        assert response.status_code == 200, response.text
        check_stream(response.text, event_validators(document())[path])

    @pytest.mark.parametrize(
        "operation",
        [
            each
            for each in DOCUMENTED
            if each.method == "get" and each.tag not in ("Responses", "States") and not each.query
        ],
        ids=lambda operation: str(operation.id),
    )
    def test_of_what_takes_no_body_have_their_shapes(self, tiny: Server, operation: Endpoint) -> None:
        response = tiny.http.get(operation.path.replace("{id}", "tiny").replace("{version}", "1"))
        assert response.status_code == 200
        if isinstance(operation.response, type):
            operation.response.model_validate_json(response.content)
            validator(operation.response.__name__, document()).validate(response.json())

    @pytest.mark.parametrize(
        "path", ["/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/embeddings", "/tokenize"]
    )
    def test_of_the_bundled_model_are_as_in_the_examples(self, server: Server, path: str) -> None:
        (operation,) = [each for each in DOCUMENTED if each.path == path]
        for name, body in operation.requests.items():
            reported = operation.replies.get(name)
            brief = {"max_tokens": min(8, body["max_tokens"])} if reported is None and "max_tokens" in body else {}
            response = server.http.post(path, json=body | brief)
            assert response.status_code == 200, response.text
            if reported is not None:
                given = response.json()
                for varies in ("id", "created", "data", "usage"):
                    given[varies] = reported.get(varies)
                assert {key: value for key, value in given.items() if value is not None} == {
                    key: value for key, value in reported.items() if value is not None
                }


def test_nothing_that_fits_the_document_or_does_not_breaks_the_server(tiny: Server) -> None:
    """`make fuzz` asks for many more cases."""
    fuzzer = Fuzzer(tiny.url, SEED)
    found = fuzzer.run(CASES)
    assert found.cases.total() >= CASES
    assert found.cases.keys() == {
        f"{each.method.upper()} {each.path} {mode}" for each in DOCUMENTED for mode in ("positive", "negative")
    }
    assert found.statuses[200] > 0
    assert found.statuses[400] > 0
    assert not found.wrong, "\n".join(found.wrong[:10])
    tiny.until_idle()


class Page(HTMLParser):
    """What a page refers to, shows and names."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: set[str] = set()
        self.ids: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), "scripts in attributes are not run"
            if name in ("href", "src", "action", "srcset", "data", "poster", "formaction", "style"):
                self.links.add(f"{name}={value}")
            if name == "id" and value:
                self.ids.append(value)

    def handle_data(self, data: str) -> None:
        self.text += data


class TestPage:
    @pytest.fixture(scope="class")
    @staticmethod
    def page(tiny: Server) -> Page:
        response = tiny.http.get("/docs")
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        page = Page()
        page.feed(response.text)
        return page

    def test_shows_every_operation_and_type(self, page: Page) -> None:
        reported = document()
        assert {each.id for each in DOCUMENTED} <= set(page.ids)
        assert reported["components"]["schemas"].keys() <= set(page.ids)
        assert len(page.ids) == len(set(page.ids))
        for path in reported["paths"]:
            assert path in page.text
        for field in reported["components"]["schemas"]["ChatBody"]["properties"].values():
            assert field["description"].replace("`", "") in page.text

    def test_refers_to_nothing_outside(self, page: Page, tiny: Server) -> None:
        own = {"href=openapi.json", "href=docs", "href=ui", "href=ui/icon.svg", *(f"href=ui#{view}" for view in VIEWS)}
        assert page.links - own <= {f"href=#{id}" for id in page.ids}
        assert page.tags.count("link") == 1  # the icon
        assert {"img", "iframe", "base", "object", "embed"}.isdisjoint(page.tags)
        source = tiny.http.get("/docs").text
        assert not re.search(r"https?:|url\(|@import|[\"'(=]//", source)

    def test_may_load_nothing_from_outside(self, tiny: Server) -> None:
        policy = tiny.http.get("/docs").headers["content-security-policy"]
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        assert rules["default-src"] == "'none'"
        assert rules["connect-src"] == "'self'"
        assert rules.pop("require-trusted-types-for") == "'script'"
        assert all(re.fullmatch(r"'(none|self|sha256-[\w+/=]+)'", value) for value in rules.values())

    def test_comes_with_the_wheel(self) -> None:
        files = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
        assert {"bdh_batch/http/docs/page.css", "bdh_batch/http/docs/page.js"} <= files


def _template(route: Route) -> str:
    return route.path.replace(":path}", "}")


def _subclasses(kind: type[Wire]) -> dict[str, type[Wire]]:
    found: dict[str, type[Wire]] = {}
    for each in kind.__subclasses__():
        found |= {each.__name__: each} | _subclasses(each)
    return found
