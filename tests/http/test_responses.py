"""/v1/responses as OpenAI's official client sees it, and what is refused there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import openai
import pytest
from openai.types.responses import (
    easy_input_message_param,
    function_tool_param,
    input_token_count_params,
    response_create_params,
    response_function_tool_call_param,
    response_input_item_param,
    response_output_message_param,
    response_text_config_param,
    tool_choice_allowed_param,
)
from openai.types.shared_params import reasoning
from pydantic import BaseModel

from bdh_batch.http.request.strict import Wire
from bdh_batch.http.responses_api.bodies import (
    InputItem,
    InputTokensBody,
    ReasoningOptions,
    ResponseBody,
    ResponseFunction,
    ResponseStreamOptions,
    TextOptions,
    ToolSelection,
)
from bdh_batch.http.responses_api.responses import ResponseList, ResponseObject
from tests.conftest import eventually
from tests.http.response_events import in_order

if TYPE_CHECKING:
    from tests.conftest import ServeFactory, Server

TINY = Path(__file__).parent.parent / "data" / "conformance" / "tiny"
PATH, CHAT = "/v1/responses", "/v1/chat/completions"
KEYS = ("key-1-of-two", "key-2-of-two")
ENDS = ("completed", "incomplete", "failed")
SCHEMA: Any = {
    "type": "object",
    "properties": {"who": {"enum": ["Romeo", "Juliet"]}},
    "required": ["who"],
    "additionalProperties": False,
}
ENTER: Any = {"type": "function", "name": "enter", "parameters": SCHEMA, "strict": True}
GREEDY: Any = {"model": "bdh-shakespeare", "max_output_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.openai() as client:
        yield client


def ask(server: Server, **body: Any) -> dict[str, Any]:
    """The response to a request; it must be of its type."""
    response = server.http.post(PATH, json=GREEDY | body)
    assert response.status_code == 200, response.text
    ResponseObject.model_validate_json(response.content)
    found: dict[str, Any] = response.json()
    return found


def events_in(text: str) -> list[dict[str, Any]]:
    """The events of a whole stream."""
    *frames, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    found = []
    for frame in frames:
        name, data = frame.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] for part in item.get("content", ()))


class TestCreate:
    def test_says_what_chat_says(self, client: openai.OpenAI, server: Server) -> None:
        response = client.responses.create(**GREEDY, instructions="You are Romeo.", input="Speak!", metadata={"a": "b"})
        messages = [{"role": "system", "content": "You are Romeo."}, {"role": "user", "content": "Speak!"}]
        body = {"messages": messages, "max_tokens": 24, "temperature": 0}
        same = server.http.post(CHAT, json=body).json()
        assert response.output_text == same["choices"][0]["message"]["content"]
        assert (response.status, response.metadata) == ("incomplete", {"a": "b"})
        assert response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"
        assert response.usage is not None
        assert response.usage.input_tokens == same["usage"]["prompt_tokens"]

    @pytest.mark.parametrize(
        "body",
        [
            {"input": "Speak!"},
            {"input": "Speak!", "top_logprobs": 2},
            {"input": "Speak!", "tools": [ENTER], "tool_choice": "required", "max_output_tokens": 200},
            {"input": "Speak!", "stream_options": {"chunk_tokens": 5}},
        ],
    )
    def test_a_stream_has_its_events_in_order_and_says_the_same(self, server: Server, body: dict[str, Any]) -> None:
        streamed = in_order(events_in(server.http.post(PATH, json=GREEDY | body | {"stream": True}).text))
        whole = ask(server, **{name: value for name, value in body.items() if name != "stream_options"})
        plain = [{**item, "id": "", "call_id": ""} for item in streamed["output"]]
        assert plain == [{**item, "id": "", "call_id": ""} for item in whole["output"]]
        assert streamed["store"] is True

    def test_the_format_comes_back_with_all_of_its_fields(self, server: Server) -> None:
        form = {"type": "json_schema", "name": "entrance", "schema": SCHEMA}
        shown = ask(server, input="Speak!", text={"format": form}, max_output_tokens=1)["text"]["format"]
        assert shown == {**form, "description": None, "strict": False}

    def test_truncation_may_be_automatic_and_cuts_nothing(self, server: Server) -> None:
        asked: dict[str, Any] = {"input": "Speak!", "truncation": "auto"}
        assert ask(server, **asked, max_output_tokens=1)["truncation"] == "auto"
        assert server.refusal(asked | {"max_output_tokens": 2**30}, PATH)["param"] == "max_output_tokens"

    def test_calls_are_at_most_as_many_as_the_body_says(self, server: Server) -> None:
        asked: dict[str, Any] = {"input": "Speak!", "tools": [ENTER], "tool_choice": "required", "ignore_eos": True}
        two, any_number = (ask(server, **asked, max_tool_calls=most, max_output_tokens=300) for most in (2, None))
        assert (two["status"], len(two["output"])) == ("completed", 2)
        assert len(any_number["output"]) > 2

    def test_the_client_streams_and_parses(self, client: openai.OpenAI) -> None:
        class Entrance(BaseModel):
            sure: bool

        with client.responses.stream(**GREEDY, input="Speak!") as stream:
            text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert text
        parsed = client.responses.parse(**GREEDY | {"max_output_tokens": 80}, input="Speak!", text_format=Entrance)
        assert isinstance(parsed.output_parsed, Entrance)

    def test_a_function_is_called_and_its_output_goes_back(self, client: openai.OpenAI) -> None:
        asked: Any = GREEDY | {"max_output_tokens": 200, "tools": [ENTER]}
        first = client.responses.create(**asked, input="Speak!", tool_choice={"type": "function", "name": "enter"})
        (call,) = first.output
        assert call.type == "function_call"
        assert json.loads(call.arguments)["who"] in ("Romeo", "Juliet")
        output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Here."}
        after = client.responses.create(**asked, input=[output], previous_response_id=first.id, tool_choice="none")
        written: Any = [{"role": "user", "content": "Speak!"}, call.to_dict(), output]
        same = client.responses.create(**asked, input=written, tool_choice="none")
        assert after.output_text == same.output_text


class TestTurns:
    def test_a_turn_has_the_tokens_before_it_in_its_prompt_and_no_others(self, server: Server) -> None:
        said: list[dict[str, Any]] = []
        before: dict[str, Any] | None = None
        for _ in range(5):
            said.append({"role": "user", "content": f"Speak {len(said)}!"})
            id = None if before is None else before["id"]
            response = ask(server, input=said[-1:], previous_response_id=id)
            body = {"messages": said, "max_tokens": 24, "temperature": 0}
            same = server.http.post(CHAT, json=body).json()
            assert text_of(response) == same["choices"][0]["message"]["content"]
            assert response["usage"]["input_tokens"] == same["usage"]["prompt_tokens"]
            if before is not None:  # all but the token that was drawn last, and has not been read
                cached = response["usage"]["input_tokens_details"]["cached_tokens"]
                assert cached >= before["usage"]["total_tokens"] - 1
            said.append({"role": "assistant", "content": text_of(response)})
            before = response

    def test_instructions_are_not_carried_over(self, server: Server) -> None:
        first = ask(server, input="Speak!", instructions="You are Romeo.")
        after = ask(server, input="Again!", previous_response_id=first["id"])
        messages = [("user", "Speak!"), ("assistant", text_of(first)), ("user", "Again!")]
        plain = ask(server, input=[{"role": role, "content": content} for role, content in messages])
        assert (text_of(after), after["usage"]["input_tokens"]) == (text_of(plain), plain["usage"]["input_tokens"])

    def test_a_fork_says_what_it_says_alone(self, server: Server) -> None:
        first = ask(server, input="Speak!")
        ask(server, input="Again!", previous_response_id=first["id"])
        one, other = (ask(server, input="Well?", previous_response_id=first["id"]) for _ in range(2))
        assert text_of(one) == text_of(other)

    def test_items_are_listed_and_may_be_referred_to(self, client: openai.OpenAI, server: Server) -> None:
        first = ask(server, input="Speak!")
        after = ask(server, input="Again!", previous_response_id=first["id"])
        listed = client.responses.input_items.list(after["id"], order="asc", limit=2)
        assert [item.to_dict()["role"] for item in listed] == ["user", "assistant", "user"]
        parts: list[Any] = [{"role": "user", "content": "Speak!"}]
        parts.append({"type": "item_reference", "id": first["output"][0]["id"]})
        parts.append({"role": "user", "content": "Again!"})
        assert text_of(ask(server, input=parts)) == text_of(after)

    def test_tokens_are_counted_as_a_response_has_them(self, client: openai.OpenAI, server: Server) -> None:
        first = ask(server, input="Speak!")
        counted = client.responses.input_tokens.count(input="Again!", previous_response_id=first["id"])
        after = ask(server, input="Again!", previous_response_id=first["id"])
        assert counted.input_tokens == after["usage"]["input_tokens"]


class TestStored:
    def test_a_response_is_retrieved_until_it_is_deleted(self, client: openai.OpenAI, server: Server) -> None:
        response = ask(server, input="Speak!")
        assert client.responses.retrieve(response["id"]).to_dict() == response
        client.responses.delete(response["id"])
        for act in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
            with pytest.raises(openai.NotFoundError):
                act(response["id"])
        error = server.refusal({"input": "a", "previous_response_id": response["id"]}, PATH, 404)
        assert (error["param"], error["code"]) == ("previous_response_id", "previous_response_not_found")

    def test_they_are_listed_without_their_texts_the_newest_first(self, server: Server) -> None:
        first = ask(server, input="Speak!", metadata={"title": "a"})
        second = ask(server, input="Again!", previous_response_id=first["id"])
        page = server.http.get(PATH, params={"limit": 1}).json()
        rest = server.http.get(PATH, params={"limit": 1, "after": page["last_id"]}).json()
        assert [each["id"] for each in page["data"] + rest["data"]] == [second["id"], first["id"]]
        assert page["has_more"]
        assert page["data"][0]["previous_response_id"] == first["id"]
        assert rest["data"][0]["metadata"] == {"title": "a"}
        for name in ("incomplete_details", "usage"):
            assert rest["data"][0][name] == first[name]
        assert "output" not in rest["data"][0]
        ResponseList.model_validate(page)
        for query, status in (("limit=0", 400), ("limit=101", 400), ("order=asc", 400), ("after=resp_none", 404)):
            error = server.error(server.http.get(f"{PATH}?{query}"), status)
            assert error["param"] == query.partition("=")[0]

    def test_one_that_is_not_to_be_stored_is_not(self, server: Server) -> None:
        response = ask(server, input="Speak!", store=False)
        assert response["store"] is False
        assert server.http.get(f"{PATH}/{response['id']}").status_code == 404

    def test_belongs_to_its_key(self, serve: ServeFactory) -> None:
        with serve("auth.enabled=true", f"auth.api_keys={','.join(KEYS)}", model=TINY) as guarded:
            mine, other = guarded.openai(KEYS[0]), guarded.openai(KEYS[1])
            asked: Any = {"model": "tiny", "input": "a", "max_output_tokens": 2}
            response = mine.responses.create(**asked)
            assert mine.responses.retrieve(response.id).id == response.id
            for act in (other.responses.retrieve, other.responses.cancel, other.responses.delete):
                with pytest.raises(openai.NotFoundError):
                    act(response.id)
            with pytest.raises(openai.NotFoundError):
                other.responses.create(**asked, previous_response_id=response.id)
            listed = [guarded.http.get(PATH, headers={"x-api-key": key}).json()["data"] for key in KEYS]
            assert [len(each) for each in listed] == [1, 0]
            item: Any = {"type": "item_reference", "id": response.output[0].to_dict()["id"]}
            with pytest.raises(openai.NotFoundError):
                other.responses.create(**asked | {"input": [item]})


class TestBackground:
    def test_goes_on_by_itself_and_its_events_can_be_read(self, client: openai.OpenAI, server: Server) -> None:
        begun = client.responses.create(**GREEDY, input="Speak!", background=True)
        assert begun.status == "queued"
        eventually(lambda: client.responses.retrieve(begun.id).status == "incomplete")
        final = client.responses.retrieve(begun.id)
        assert final.output_text == text_of(ask(server, input="Speak!"))
        stream = events_in(server.http.get(f"{PATH}/{begun.id}", params={"stream": "true"}).text)
        assert in_order(stream)["id"] == begun.id
        rest = server.http.get(f"{PATH}/{begun.id}", params={"stream": "true", "starting_after": 3})
        assert events_in(rest.text) == stream[4:]

    def test_is_cancelled(self, client: openai.OpenAI, server: Server) -> None:
        begun = client.responses.create(**GREEDY | {"max_output_tokens": 50_000}, input="Speak!", background=True)
        assert client.responses.cancel(begun.id).status == "cancelled"
        assert client.responses.cancel(begun.id).status == "cancelled"
        server.until_idle()
        stream = server.http.get(f"{PATH}/{begun.id}", params={"stream": "true"}).text
        assert {event["type"].rpartition(".")[2] for event in events_in(stream)}.isdisjoint(ENDS)

    def test_only_one_in_the_background_is_cancelled(self, server: Server) -> None:
        response = ask(server, input="Speak!")
        server.error(server.http.post(f"{PATH}/{response['id']}/cancel"), 400)


BAD: list[tuple[str | None, dict[str, Any]]] = [
    ("input", {}),
    ("input", {"input": []}),
    ("input", {"input": 5}),
    ("input[0].content", {"input": [{"role": "user"}]}),
    ("input[0].role", {"input": [{"role": "tool", "content": "a"}]}),
    ("input[0]", {"input": [{"type": "reasoning", "id": "a"}]}),
    ("input[0].call_id", {"input": [{"type": "function_call_output", "output": "a"}]}),
    ("conversation", {"input": "a", "conversation": "conv_1"}),
    ("reasoning.effort", {"input": "a", "reasoning": {"effort": "high"}}),
    ("truncation", {"input": "a", "truncation": "none"}),
    ("max_tool_calls", {"input": "a", "max_tool_calls": 0}),
    ("background", {"input": "a", "background": True, "store": False}),
    ("tools[0]", {"input": "a", "tools": [{"type": "web_search"}]}),
    ("text.format.schema", {"input": "a", "text": {"format": {"type": "json_schema", "name": "a"}}}),
    ("tool_choice.name", {"input": "a", "tools": [ENTER], "tool_choice": {"type": "function", "name": "leave"}}),
    (
        "tool_choice.tools[1].name",
        {
            "input": "a",
            "tools": [ENTER],
            "tool_choice": {
                "type": "allowed_tools",
                "mode": "auto",
                "tools": [{"type": "function", "name": name} for name in ("enter", "leave")],
            },
        },
    ),
    ("stream_options", {"input": "a", "stream_options": {}}),
    ("messages", {"input": "a", "messages": []}),
    ("top_logprobs", {"input": "a", "top_logprobs": 21}),
    ("metadata.a", {"input": "a", "metadata": {"a": "b" * 513}}),
    (f"metadata.{'a' * 65}", {"input": "a", "metadata": {"a" * 65: "b"}}),
]


@pytest.mark.parametrize(("param", "body"), BAD)
def test_what_is_wrong_is_refused_by_name(server: Server, param: str | None, body: dict[str, Any]) -> None:
    assert server.refusal(body, PATH)["param"] == param


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (ResponseBody, response_create_params.ResponseCreateParamsBase),
        (InputTokensBody, input_token_count_params.InputTokenCountParams),
        (InputItem, easy_input_message_param.EasyInputMessageParam),
        (InputItem, response_input_item_param.Message),
        (InputItem, response_input_item_param.FunctionCallOutput),
        (InputItem, response_input_item_param.ItemReference),
        (InputItem, response_function_tool_call_param.ResponseFunctionToolCallParam),
        (InputItem, response_output_message_param.ResponseOutputMessageParam),
        (ResponseFunction, function_tool_param.FunctionToolParam),
        (ToolSelection, tool_choice_allowed_param.ToolChoiceAllowedParam),
        (TextOptions, response_text_config_param.ResponseTextConfigParam),
        (ReasoningOptions, reasoning.Reasoning),
        (ResponseStreamOptions, response_create_params.StreamOptions),
    ],
)
def test_all_fields_of_the_client_are_known(body: type[Wire], fields: type) -> None:
    """Each has its effect, or is refused by its own name."""
    assert {*get_type_hints(fields)} <= {*body.names, *body.unsupported}


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=101",
        "limit=a",
        "order=up",
        "after=none",
        "before=none",
        "include=message.output_text.logprobs",
    ],
)
def test_what_is_wrong_in_a_query_is_refused_by_name(server: Server, query: str) -> None:
    response = ask(server, input="Speak!")
    error = server.error(server.http.get(f"{PATH}/{response['id']}/input_items?{query}"), 400)
    assert error["param"] == query.partition("=")[0]


def test_what_is_wrong_in_the_query_of_a_retrieval_is_refused_by_name(server: Server) -> None:
    response = ask(server, input="Speak!")
    for query in ("stream=1", "stream=true", "starting_after=3", "include[]=all", "include_obfuscation=true", "a=b"):
        error = server.error(server.http.get(f"{PATH}/{response['id']}?{query}"), 400)
        assert error["param"] == query.partition("=")[0].removesuffix("[]")


def test_log_probabilities_are_retrieved_where_there_are_some(client: openai.OpenAI) -> None:
    included: Any = ["message.output_text.logprobs"]
    none: Any = []
    for asked in (none, included):
        made = client.responses.create(**GREEDY, input="Speak!", include=asked)
        if asked:
            assert client.responses.retrieve(made.id, include=included).to_dict() == made.to_dict()
        else:
            with pytest.raises(openai.BadRequestError, match="include"):
                client.responses.retrieve(made.id, include=included)
