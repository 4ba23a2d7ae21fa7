"""Responses that have to follow schemas, expressions and grammars, and calls of tools, as clients see them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionMessageToolCall
from pydantic import BaseModel

from benchmarks.stress import constrained

if TYPE_CHECKING:
    from tests.conftest import ServeFactory, Server

CONFORMANCE = Path(__file__).parent.parent / "data" / "conformance"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES: list[Any] = [{"role": "user", "content": "x"}]
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "x", "max_tokens": 40},
    CHAT: {"messages": MESSAGES, "max_tokens": 40},
}
PATHS = pytest.mark.parametrize("path", [COMPLETIONS, CHAT])


class Colour(BaseModel):
    shade: Literal["red", "green"]
    dark: bool


class Weather(BaseModel):
    city: Literal["Rome", "Oslo"]
    days: Literal[1, 2]


SHADES = {"type": "object", "properties": {"shade": {"enum": ["red"]}}, "required": ["shade"]}


def tool(name: str, parameters: dict[str, Any] | None = None) -> Any:
    function: dict[str, Any] = {"name": name, "description": "Does something."}
    return {"type": "function", "function": function | ({"parameters": parameters} if parameters is not None else {})}


WEATHER = tool("weather", Weather.model_json_schema())
TOOLS: Any = [tool("now"), WEATHER]


def text_of(choice: dict[str, Any]) -> str:
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def streamed(events: list[dict[str, Any]], index: int) -> str:
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(c["text"] if "text" in c else c["delta"].get("content") or "" for c in choices)


def test_responses_of_any_temperature_are_what_was_asked_for_together(tiny: Server) -> None:
    def ask(each: tuple[str, dict[str, Any]]) -> str:
        case, body = each
        (choice,) = tiny.complete(**body)["choices"]
        constrained.check(case, choice)
        return str(choice["finish_reason"])

    with ThreadPoolExecutor(20) as pool:
        ends = list(pool.map(ask, constrained.bodies(60, seed=7)))
    assert set(ends) == {"stop", "length"}


@PATHS
@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"structured_outputs": {"regex": "[a-c]{3}-[0-9]{2}"}}, "[a-c]{3}-[0-9]{2}"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"grammar": 'start: "a" b\nb: /[xy]z/'}}, "a[xy]z"),
        ({"structured_outputs": {"json": SHADES | {"additionalProperties": False}}}, r'\{"shade": ?"red"\}'),
        ({"guided_json": json.dumps(SHADES | {"additionalProperties": False})}, r'\{"shade": ?"red"\}'),
        ({"guided_regex": "a{7}"}, "a{7}"),
        ({"guided_choice": ["ä€😀"]}, "ä€😀"),
        ({"guided_grammar": 'start: "q"'}, "q"),
        ({"response_format": {"type": "json_object"}}, r"\{.*\}"),
    ],
)
def test_every_way_to_ask_is_kept_to_streamed_or_not_by_every_response(
    tiny: Server, path: str, asked: dict[str, Any], pattern: str
) -> None:
    body = BODIES[path] | asked | {"n": 3, "seed": 4, "max_tokens": 60, "temperature": 1.5}
    choices = tiny.http.post(path, json=body).json()["choices"]
    events = tiny.events(path, **body)
    for choice in choices:
        assert streamed(events, choice["index"]) == text_of(choice)
        if choice["finish_reason"] == "stop":
            assert re.fullmatch(pattern, text_of(choice), re.DOTALL), choice
        else:
            assert asked == {"response_format": {"type": "json_object"}}


def test_a_response_ends_at_once_where_it_is_complete_though_it_is_cut_there(tiny: Server) -> None:
    body = {"prompt": "x", "structured_outputs": {"choice": ["yes"]}}
    for most, text, reason in ((2, "ye", "length"), (3, "yes", "stop"), (9, "yes", "stop")):
        (choice,) = tiny.complete(**body, max_tokens=most)["choices"]
        assert (choice["text"], choice["finish_reason"]) == (text, reason)
    assert tiny.complete(**body, stop="es")["choices"][0]["text"] == "y"


def test_a_response_may_be_nothing_at_all(tiny: Server) -> None:
    (choice,) = tiny.complete(prompt="x", structured_outputs={"choice": [""]})["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")


def test_before_min_tokens_only_structured_output_that_cannot_go_on_ends_a_response(tiny: Server) -> None:
    def ask(regex: str, **body: Any) -> tuple[str, str]:
        (choice,) = tiny.complete(prompt="x", seed=1, structured_outputs={"regex": regex}, **body)["choices"]
        return choice["text"], choice["finish_reason"]

    assert re.fullmatch("[0-9]{10,}", ask("[0-9]+", min_tokens=10, max_tokens=40)[0])
    assert len(ask("[0-9]+", ignore_eos=True, max_tokens=30)[0]) == 30
    assert ask("A{3}", min_tokens=5, max_tokens=9) == ("AAA", "stop")
    assert ask("A{3}", ignore_eos=True, max_tokens=9) == ("AAA", "stop")
    assert ask("A{3}", stop_token_ids=[65], max_tokens=9) == ("", "stop")
    assert ask("A{3}", stop_token_ids=[65], min_tokens=2, max_tokens=9) == ("AA", "stop")
    shown = {"logprobs": 0, "stop_token_ids": [65], "min_tokens": 2, "max_tokens": 2}
    (choice,) = tiny.complete(prompt="x", structured_outputs={"regex": "A{3}"}, **shown)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("AA", "length")
    assert choice["logprobs"]["tokens"] == ["A", "A"]


def test_others_are_answered_as_ever(tiny: Server) -> None:
    body = {"prompt": "abc", "max_tokens": 30, "seed": 5}
    alone = tiny.text(**body)
    with ThreadPoolExecutor(5) as pool:
        hard = {"prompt": "q", "structured_outputs": {"grammar": "start: start start | /[a-z]/ | "}, "max_tokens": 30}
        busy = [pool.submit(tiny.complete, **hard) for _ in range(4)]
        assert tiny.text(**body) == alone
        assert all(each.result()["choices"] for each in busy)


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("structured_outputs.regex", {"structured_outputs": {"regex": "(("}}),
    ("structured_outputs.regex", {"structured_outputs": {"regex": r"[^\s\S]"}}),
    ("structured_outputs.regex", {"structured_outputs": {"regex": 5}}),
    ("structured_outputs.regex", {"structured_outputs": {"regex": "a" * 530_000}}),
    ("structured_outputs.grammar", {"structured_outputs": {"grammar": "start: missing"}}),
    ("structured_outputs.choice", {"structured_outputs": {"choice": []}}),
    ("structured_outputs.choice[1]", {"structured_outputs": {"choice": ["a", 5]}}),
    ("structured_outputs.json", {"structured_outputs": {"json": "{"}}),
    ("structured_outputs.json", {"structured_outputs": {"json": {"$ref": "#"}}}),
    ("structured_outputs.regex", {"structured_outputs": {"json": {}, "regex": "a"}}),
    ("structured_outputs.structural_tag", {"structured_outputs": {"structural_tag": "x"}}),
    ("guided_regex", {"guided_regex": "(("}),
    ("response_format.json_schema.schema", {"guided_regex": "a", "response_format": {"type": "json_object"}}),
    ("response_format.type", {"response_format": {"type": "xml"}}),
    ("response_format.json_schema", {"response_format": {"type": "json_schema"}}),
    ("response_format.json_schema", {"response_format": {"type": "text", "json_schema": {"name": "a"}}}),
    ("response_format.json_schema.name", {"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}}),
    ("response_format.schema", {"response_format": {"type": "json_schema", "json_schema": {}, "schema": {}}}),
    ("response_format.schema", {"response_format": {"type": "json_object", "schema": {"type": "x"}}}),
    (
        "response_format.json_schema.schema",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "x"}}}},
    ),
]


@PATHS
@pytest.mark.parametrize(("param", "asked"), REFUSED)
def test_what_cannot_be_kept_to_is_refused_by_its_field(
    tiny: Server, path: str, param: str, asked: dict[str, Any]
) -> None:
    assert tiny.refusal(BODIES[path] | asked, path)["param"] == param


def test_nested_beyond_measure_is_refused(tiny: Server) -> None:
    for depth in (200, 900, 1500):
        schema = '{"items":' * depth + "{}" + "}" * depth
        content = b'{"prompt": "x", "structured_outputs": {"json": %b}}' % schema.encode()
        assert tiny.refusal(content=content)["message"]


def chained(count: int, definition: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    found = {f"d{i}": definition(f"#/$defs/d{i + 1}") for i in range(count)}
    return {"type": "object", "$ref": "#/$defs/d0", "$defs": found | {f"d{count}": {"type": "null"}}}


CHAIN = "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(3000)) + '\nr3000: "a"'
LEADING = chained(1200, lambda after: {"anyOf": [{}, {"$ref": after}]})
DEEP = chained(1200, lambda after: {"properties": {"a": {"$ref": after}}})
ENDLESS = {"type": "integer", "multipleOf": 99999989}
SMALLEST = {"const": -9223372036854775808}
INTERSECTION = "start: T\nT: " + " & ".join(f"/((a|b){{{k}}})*/" for k in (7, 11, 13, 17, 19, 23, 29, 31, 37, 41))


def of_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}


HOSTILE: list[tuple[str, str, dict[str, Any]]] = [
    (COMPLETIONS, "structured_outputs.grammar", {"structured_outputs": {"grammar": CHAIN}}),
    (COMPLETIONS, "structured_outputs.grammar", {"structured_outputs": {"grammar": INTERSECTION}}),
    (COMPLETIONS, "response_format.json_schema.schema", of_schema(LEADING)),
    (COMPLETIONS, "response_format.json_schema.schema", of_schema(DEEP)),
    (COMPLETIONS, "response_format.json_schema.schema", of_schema(SMALLEST)),
    (COMPLETIONS, "structured_outputs.json", {"structured_outputs": {"json": ENDLESS}}),
    (CHAT, "tools[0].function.parameters", {"tools": [tool("f", LEADING)]}),
    (CHAT, "tools", {"tools": [tool("f", DEEP)]}),
    (CHAT, "tools[0].function.parameters", {"tools": [tool("f", {"properties": {"a": SMALLEST}})]}),
]


@pytest.mark.parametrize(("path", "param", "asked"), HOSTILE)
def test_structured_output_that_its_compiler_cannot_take_is_refused_and_harms_no_one(
    tiny: Server, path: str, param: str, asked: dict[str, Any]
) -> None:
    with ThreadPoolExecutor(2) as pool:
        refusals = [pool.submit(tiny.refusal, BODIES[path] | asked, path) for _ in range(2)]
        while not all(each.done() for each in refusals):
            assert tiny.http.get("/health").status_code == 200
            assert tiny.complete(prompt="x", max_tokens=1)["choices"]
        for each in refusals:
            error = each.result()
            assert error["param"] == param
            assert len(error["message"]) < 500
    assert re.fullmatch("[ab]{3}", tiny.text(prompt="x", structured_outputs={"regex": "[ab]{3}"}))


def test_a_server_that_compiles_what_has_no_end_ends_when_it_is_told_to(serve: ServeFactory) -> None:
    with serve("structured_output.compile_seconds=600", model=CONFORMANCE / "tiny", cutting=True) as server:
        slow = {"prompt": "x", "structured_outputs": {"regex": "(.*a.{200}.*){3}x{1000}"}}
        endless = [{"prompt": "x", "structured_outputs": {"json": ENDLESS | {"minimum": i}}} for i in range(3)]
        streams = [server.raw(body) for body in [*endless, slow]]
        server.until(lambda metrics: metrics["bdh_sandbox_jobs_running{work=grammars}"] > 0)
        streams[0].close()
        assert server.http.get("/health").status_code == 200
        server.terminate()
        assert server.exit_code() == 0
        for stream in streams:
            stream.close()


def test_no_field_that_asks_for_nothing_constrains(tiny: Server) -> None:
    nothing: list[dict[str, Any]] = [
        {"structured_outputs": {}},
        {"response_format": {"type": "text"}},
        {"guided_json": None},
    ]
    for asked in nothing:
        assert tiny.text(prompt="x", seed=1, max_tokens=9, **asked) == tiny.text(prompt="x", seed=1, max_tokens=9)


def test_a_model_without_a_tokenizer_refuses_grammars(odd: Server) -> None:
    error = odd.refusal({"prompt": [1], "structured_outputs": {"regex": "a"}})
    assert (error["param"], error["code"]) == ("structured_outputs.regex", "unsupported_parameter")


def test_the_client_parses_responses_into_its_types(tiny: Server) -> None:
    with tiny.openai() as client:
        parsed = client.chat.completions.parse(model="tiny", messages=MESSAGES, response_format=Colour, temperature=2)
        with client.chat.completions.stream(model="tiny", messages=MESSAGES, response_format=Colour) as stream:
            final = stream.get_final_completion()
    assert isinstance(parsed.choices[0].message.parsed, Colour)
    assert isinstance(final.choices[0].message.parsed, Colour)
    assert final.choices[0].finish_reason == "stop"


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the client's own, at what it made of a response
def test_the_clients_typed_responses_can_be_sent_back_as_they_are(tiny: Server) -> None:
    """It sends what it made of them, too, and where in the stream they were."""
    tools = [openai.pydantic_function_tool(Weather)]
    with tiny.openai() as client:
        said = client.chat.completions.parse(model="tiny", messages=MESSAGES, response_format=Colour).choices[0].message
        with client.chat.completions.stream(
            model="tiny", messages=MESSAGES, tools=tools, tool_choice="required", parallel_tool_calls=False, seed=2
        ) as stream:
            called = stream.get_final_completion().choices[0].message
        (call,) = called.tool_calls or []
        reported: Any = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
        messages: list[Any] = [*MESSAGES, said, *MESSAGES, called, reported]
        ids: Any = {"return_token_ids": True}
        response = client.chat.completions.create(model="tiny", messages=messages, max_tokens=1, extra_body=ids)
    prompt = bytes(response.model_dump()["prompt_token_ids"]).decode()
    assert f"assistant: {said.content}\n" in prompt
    assert prompt.count("Weather") == 1
    assert "parsed" not in prompt


def sent_back(role: str, arguments: str) -> dict[str, Any]:
    """A conversation that begins with a call."""
    calls = [{"id": "1", "function": {"name": "f", "arguments": arguments}}]
    return {"messages": [{"role": role, "content": "a", "tool_calls": calls}]}


OBJECT = {"type": "json_object"}
UNKNOWN = {"type": "function", "function": {"name": "q"}}
BAD_TOOLS: list[tuple[str, dict[str, Any]]] = [
    ("tools[1].function.parameters", {"tools": [tool("a"), tool("b", {"not": {}})]}),
    ("tools[0].function.parameters", {"tools": [tool("a", {"type": "string"})]}),
    ("tools[0].function.name", {"tools": [tool("a b")]}),
    ("tools[1]", {"tools": [tool("a"), tool("a")]}),
    ("tools[0].type", {"tools": [{"type": "web_search"}]}),
    ("tools", {"tools": [tool(f"t{i}") for i in range(129)]}),
    ("tool_choice", {"tool_choice": "required"}),
    ("tool_choice.function.name", {"tools": TOOLS, "tool_choice": UNKNOWN}),
    ("structured_outputs.regex", {"tools": TOOLS, "structured_outputs": {"regex": "a"}}),
    ("response_format.json_schema.schema", {"tools": TOOLS, "tool_choice": "required", "response_format": OBJECT}),
    ("messages[0].tool_calls", sent_back("user", "{}")),
    ("messages[0].tool_calls[0].function.arguments", sent_back("assistant", '{"a":' * 40 + "1" + "}" * 40)),
    ("messages[0].content", {"messages": [{"role": "assistant"}]}),
]


def call_weather(client: OpenAI, seed: int) -> ChatCompletion:
    return client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=600,
        seed=seed,
    )


class TestTools:
    def test_a_call_that_is_required_is_typed_and_fits_its_schema(self, tiny: Server) -> None:
        choice: Any = {"type": "function", "function": {"name": "weather"}}
        with tiny.openai() as client:
            for required in ("required", choice):
                completion = client.chat.completions.create(
                    model="tiny",
                    messages=MESSAGES,
                    tools=TOOLS,
                    tool_choice=required,
                    n=2,
                    seed=2,
                    max_tokens=2000,
                )
                for response in completion.choices:
                    assert response.finish_reason == "tool_calls"
                    assert response.message.content is None
                    for call in response.message.tool_calls or pytest.fail("no call"):
                        assert isinstance(call, ChatCompletionMessageToolCall)
                        if call.function.name == "weather":
                            Weather.model_validate_json(call.function.arguments)
                        else:
                            assert (required, call.function.name) == ("required", "now")
                            assert json.loads(call.function.arguments) == {}

    def test_streamed_calls_are_those_of_the_whole_response(self, tiny: Server) -> None:
        body = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "required", "seed": 3, "n": 2}
        whole = tiny.http.post(CHAT, json=body).json()["choices"]
        events = tiny.events(CHAT, **body)
        for choice in whole:
            deltas = [c for event in events for c in event["choices"] if c["index"] == choice["index"]]
            assert deltas[-1]["finish_reason"] == choice["finish_reason"] == "tool_calls"
            pieces = [call for c in deltas for call in c["delta"].get("tool_calls", [])]
            for index, call in enumerate(choice["message"]["tool_calls"]):
                first, *rest = [piece for piece in pieces if piece["index"] == index]
                assert (first["type"], first["function"]["name"]) == ("function", call["function"]["name"])
                assert first["id"].startswith("call_")
                assert all(piece.keys() == {"index", "function"} for piece in rest)
                assert (
                    "".join(p["function"]["arguments"] for p in pieces if p["index"] == index)
                    == (call["function"]["arguments"])
                )

    @pytest.mark.parametrize("choice", ["required", "auto"])
    def test_streamed_calls_have_the_logprobs_of_the_whole_response(self, tiny: Server, choice: str) -> None:
        body = {"messages": MESSAGES, "tools": [WEATHER], "tool_choice": choice, "seed": 3, "max_tokens": 200}
        body |= {"n": 2, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}
        whole = tiny.http.post(CHAT, json=body).json()["choices"]
        events = tiny.events(CHAT, **body)
        for response in whole:
            deltas = [c for event in events for c in event["choices"] if c["index"] == response["index"]]
            entries = [entry for c in deltas if c["logprobs"] for entry in c["logprobs"]["content"]]
            assert entries == response["logprobs"]["content"]
            assert [byte for entry in entries for byte in entry["bytes"]] == response["token_ids"]
            assert all(entry["logprob"] <= 0 and len(entry["top_logprobs"]) in (2, 3) for entry in entries)

    def test_the_clients_stream_helper_parses_them(self, tiny: Server) -> None:
        with (
            tiny.openai() as client,
            client.chat.completions.stream(
                model="tiny", messages=MESSAGES, tools=[openai.pydantic_function_tool(Weather)], tool_choice="required"
            ) as stream,
        ):
            kinds = {event.type for event in stream}
            final = stream.get_final_completion()
        assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
        (call, *_) = final.choices[0].message.tool_calls or []
        assert isinstance(call.function.parsed_arguments, Weather)

    def test_only_one_is_called_where_they_may_not_be_parallel(self, tiny: Server) -> None:
        body = {"messages": MESSAGES, "tools": TOOLS[:1], "tool_choice": "required", "parallel_tool_calls": False}
        choices = tiny.http.post(CHAT, json=body | {"n": 8}).json()["choices"]
        assert [len(choice["message"]["tool_calls"]) for choice in choices] == [1] * 8

    @pytest.mark.parametrize("choice", ["none", "auto", None])
    def test_a_response_that_calls_nothing_is_text(self, tiny: Server, choice: str | None) -> None:
        body = {"messages": MESSAGES, "max_tokens": 20, "seed": 1, "tools": TOOLS, "tool_choice": choice}
        (response,) = tiny.http.post(CHAT, json=body).json()["choices"]
        assert response["finish_reason"] == "length"
        assert response["message"].keys() == {"role", "content", "refusal"}
        assert streamed(tiny.events(CHAT, **body), 0) == response["message"]["content"]

    def test_with_auto_a_response_follows_its_format_or_is_a_call(self, tiny: Server) -> None:
        response_format = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["x"]}}}
        body = {"messages": MESSAGES, "tools": TOOLS[:1], "response_format": response_format, "n": 12, "seed": 2}
        choices = tiny.http.post(CHAT, json=body).json()["choices"]
        said = {c["message"]["content"] for c in choices if c["finish_reason"] == "stop"}
        assert said == {'"x"'}
        assert any(c["finish_reason"] == "tool_calls" for c in choices)

    def test_a_call_that_is_cut_short_is_reported_as_far_as_it_came(self, tiny: Server) -> None:
        body = {"messages": MESSAGES, "tools": [WEATHER], "tool_choice": "required", "max_tokens": 58, "seed": 1}
        response = tiny.http.post(CHAT, json=body)
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        assert choice["finish_reason"] == "length"
        assert choice["message"]["tool_calls"][0]["function"]["arguments"].startswith("{")

    def test_calls_and_their_results_go_back_into_the_conversation(self, tiny: Server) -> None:
        with tiny.openai() as client:
            first = next(
                reply
                for seed in range(30)
                if (reply := call_weather(client, seed)).choices[0].finish_reason == "tool_calls"  # and is not cut
            )
        call = (first.choices[0].message.tool_calls or [])[0]
        sent = first.choices[0].message.model_dump(exclude_none=True)
        result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
        body = {"messages": [*MESSAGES, sent, result], "max_tokens": 1, "return_token_ids": True}
        response = tiny.http.post(CHAT, json=body)
        assert response.status_code == 200, response.text
        assert isinstance(call, ChatCompletionMessageToolCall)
        arguments = json.dumps(json.loads(call.function.arguments), ensure_ascii=False)
        assert bytes(response.json()["prompt_token_ids"]).decode() == (
            f'user: x\nassistant: <tool_call>{{"name": "weather", "arguments": {arguments}}}</tool_call>\n'
            "tool: rain\nassistant:"
        )

    def test_the_template_sees_the_tools(self, tiny: Server) -> None:
        body = {"messages": MESSAGES, "tools": [WEATHER], "max_tokens": 1, "return_token_ids": True}
        response = tiny.http.post(CHAT, json=body)
        assert response.status_code == 200, response.text
        assert '"name": "weather"' in bytes(response.json()["prompt_token_ids"]).decode()

    def test_a_stop_string_is_none_within_a_call(self, tiny: Server) -> None:
        body: dict[str, Any] = {"messages": MESSAGES, "tools": TOOLS[:1], "tool_choice": "required", "max_tokens": 80}
        body |= {"seed": 1, "parallel_tool_calls": False}
        for stop in ("ool_call", "arguments"):
            (choice,) = tiny.http.post(CHAT, json=body | {"stop": stop}).json()["choices"]
            assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
            deltas = [each["delta"] for event in tiny.events(CHAT, **body, stop=stop) for each in event["choices"]]
            assert not any(delta.get("content") for delta in deltas)
            pieces = [call["function"]["arguments"] for delta in deltas for call in delta.get("tool_calls", [])]
            assert "".join(pieces) == choice["message"]["tool_calls"][0]["function"]["arguments"]

    @pytest.mark.parametrize(("param", "asked"), BAD_TOOLS)
    def test_bad_tools_are_refused_by_their_field(self, tiny: Server, param: str, asked: dict[str, Any]) -> None:
        assert tiny.refusal(BODIES[CHAT] | asked, CHAT)["param"] == param

    def test_completions_have_no_tools(self, tiny: Server) -> None:
        assert tiny.refusal(BODIES[COMPLETIONS] | {"tools": TOOLS})["code"] == "unsupported_parameter"
