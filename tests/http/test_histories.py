"""Conversations as clients send them back: what this server, other servers and other models put into them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from bdh_batch.http.schema.history import PastFunction

if TYPE_CHECKING:
    from tests.conftest import Server

CHAT, TOKENIZE = "/v1/chat/completions", "/tokenize"
USER = {"role": "user", "content": "a"}


def rendered(server: Server, *messages: dict[str, Any]) -> str:
    """The prompt that the server makes of them; a chat and /tokenize must agree on what they take."""
    body = {"messages": [*messages], "add_generation_prompt": False}
    assert server.http.post(CHAT, json=body | {"max_tokens": 1}).status_code == 200
    response = server.http.post(TOKENIZE, json=body)
    assert response.status_code == 200, response.text
    return bytes(response.json()["tokens"]).decode()


def called(arguments: object, **more: Any) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call | more]}


BLANK: tuple[object, ...] = ("", " ", "\n\t", "null", " null ", "{}", "[]", None, {})


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        *[(blank, "{}") for blank in BLANK],
        ('{"city": "Par', '{"city": "Par'),
        ('{"a": 1}{"b": 2}', '{"a": 1}{"b": 2}'),
        ("city=Paris", "city=Paris"),
        ("[1]", "[1]"),
        ('"Paris"', '"Paris"'),
        ("5", "5"),
        ('{"city":"é"}', '{"city": "é"}'),
        ({"city": "é"}, '{"city": "é"}'),
    ],
)
def test_arguments_are_shown_to_the_model_whatever_they_are(tiny: Server, arguments: object, shown: str) -> None:
    expected = f'assistant: <tool_call>{{"name": "f", "arguments": {shown}}}</tool_call>\n'
    assert rendered(tiny, called(arguments)) == expected


def test_a_call_may_lack_what_nobody_needs_and_have_what_others_add(tiny: Server) -> None:
    bare = {"role": "assistant", "tool_calls": [{"function": {"name": "f.x:0"}}]}
    assert '"name": "f.x:0", "arguments": {}' in rendered(tiny, bare)
    added = called("{}", index=0, extra_content={"google": {"thought_signature": "x"}}, cache_control=None)
    assert '"name": "f"' in rendered(tiny, added)


@pytest.mark.parametrize(
    "more",
    [
        *({"refusal": None}, {"refusal": ""}, {"reasoning_content": "Hm."}, {"reasoning": None}, {"name": None}),
        *({"cache_control": {"type": "ephemeral"}}, {"annotations": []}, {"annotations": [{"type": "url_citation"}]}),
        *({"audio": None}, {"function_call": None}, {"tool_calls": None}, {"tool_calls": []}, {"parsed": {"a": 1}}),
        *({"id": "msg_1", "status": "completed"}, {"type": "text"}, {"provider_specific_fields": {"a": [1, {}]}}),
    ],
    ids=str,
)
def test_what_comes_beside_the_content_changes_nothing(tiny: Server, more: dict[str, Any]) -> None:
    assert rendered(tiny, {"role": "assistant", "content": "Yes."} | more) == "assistant: Yes.\n"


@pytest.mark.parametrize(
    "message",
    [
        *({"content": None}, {"content": ""}, {"content": []}, {"content": None, "tool_calls": []}, {"tool_calls": []}),
        *({"content": None, "function_call": None, "audio": None, "refusal": None}, {"reasoning_content": "Hm."}),
    ],
    ids=str,
)
def test_the_assistant_may_have_said_nothing(tiny: Server, message: dict[str, Any]) -> None:
    assert rendered(tiny, {"role": "assistant"} | message) == "assistant: \n"


def test_a_refusal_is_what_was_said(tiny: Server) -> None:
    assert rendered(tiny, {"role": "assistant", "content": None, "refusal": "No."}) == "assistant: No.\n"
    part = {"type": "refusal", "refusal": "No."}
    assert rendered(tiny, {"role": "assistant", "content": [part]}) == "assistant: No.\n"


@pytest.mark.parametrize(
    "part",
    [
        *("a", {"type": "text", "text": "a"}, {"type": "input_text", "text": "a"}),
        {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
        {"type": "output_text", "text": "a", "annotations": [{"type": "url_citation"}], "logprobs": []},
    ],
    ids=str,
)
def test_texts_may_be_parts_of_several_kinds(tiny: Server, part: object) -> None:
    assert rendered(tiny, {"role": "user", "content": [part, part]}) == "user: aa\n"


def test_calls_of_the_older_kind_are_calls(tiny: Server) -> None:
    before = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a":1}'}}
    reported = rendered(tiny, USER, before, {"role": "function", "name": "f", "content": "rain"})
    call = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    assert reported == f"user: a\nassistant: {call}\ntool: rain\n"


@pytest.mark.parametrize("role", ["ipython", "context", "Critic 7", "é"])
def test_roles_that_the_api_does_not_define_are_the_templates(tiny: Server, role: str) -> None:
    assert rendered(tiny, {"role": role, "content": "x"}) == f"{role}: x\n"


DEEP: Any = {}
for _ in range(40):
    DEEP = {"a": DEEP}


WIDE = {f"x{number}": 1 for number in range(1025)}


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user"}, "content"),
        ({"role": "user", "content": None}, "content"),
        ({"role": "system", "content": 5}, "content"),
        ({"role": "tool", "content": "a"}, "tool_call_id"),
        ({"role": "", "content": "a"}, "role"),
        ({"role": None, "content": "a"}, "role"),
        ({"role": "assistant"}, "content"),
        ({"role": "user", "content": "a", "tool_calls": called("{}")["tool_calls"]}, "tool_calls"),
        ({"role": "user", "content": "a", "function_call": {"name": "f"}}, "function_call"),
        ({"role": "user", "content": "a", "spare": DEEP}, "spare"),
        ({"role": "user", "content": "a", **WIDE}, ""),
        ({"role": "user", "content": [{"type": "text"}]}, "content[0].text"),
        ({"role": "user", "content": [{"type": "text", "refusal": "a"}]}, "content[0].text"),
        (called("{}", type="custom"), "tool_calls[0].type"),
        *(
            (called(wrong), "tool_calls[0].function.arguments")
            for wrong in (5, True, [1], DEEP, json.dumps(DEEP), WIDE)
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_wrong_is_named(tiny: Server, message: dict[str, Any], param: str) -> None:
    reported = tiny.refusal({"messages": [message], "max_tokens": 1}, CHAT)["param"]
    assert reported == f"messages[0].{param}".rstrip(".")


@pytest.mark.parametrize(
    ("number", "kept"),
    [("12345678901234567890123", False), ("0.1234567890123456789", False), ("9.90", True), ("7", True)],
)
def test_numbers_of_past_calls_are_as_they_were_written(number: str, kept: bool) -> None:
    call = PastFunction.model_validate({"name": "f", "arguments": f'{{"x": {number}}}'})
    assert call.arguments == ({"x": float(number)} if kept else f'{{"x": {number}}}')
