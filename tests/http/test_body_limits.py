"""Every part of a body is bounded by an option, and what exceeds one is refused before it costs anything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard

import orjson
import pytest
from hypothesis import given, settings, strategies as st
from pydantic import ValidationError

from bdh_batch.errors import InvalidRequest
from bdh_batch.http.request.body import parse
from bdh_batch.http.request.json_text import ExceedsLimit, deeper, read_json
from bdh_batch.http.request.sizes import MARK, Context
from bdh_batch.http.request.strict import Wire
from bdh_batch.http.schema.requests import ChatBody, CompletionBody, Defaults
from bdh_batch.http.schema.text import DetokenizeBody, EmbeddingBody, TokenizeChat, TokenizeText
from bdh_batch.messages import Origin, Prompt
from bdh_batch.settings import Limits

if TYPE_CHECKING:
    from tests.conftest import Server

BODIES: list[type[Wire]] = [CompletionBody, ChatBody, EmbeddingBody, TokenizeText, TokenizeChat, DetokenizeBody]
USER = {"role": "user", "content": "a"}
MANY = 100_000  # more than any list may have, fewer than the values of a body
MOST_ERRORS = 64  # there are that many fields, and no list or object adds more than one


def refusal(kind: type[Wire], body: object, limits: Limits | None = None) -> InvalidRequest:
    """The error that `body` gets, which must be the only thing that was made of it."""
    raw = body if isinstance(body, bytes) else orjson.dumps(body)
    with pytest.raises(InvalidRequest) as caught:
        parse(raw, kind, limits or Limits())
    assert len(caught.value.message) < 1000
    if isinstance(cause := caught.value.__cause__, ValidationError):
        assert cause.error_count() <= MOST_ERRORS
    return caught.value


def call(arguments: str) -> dict[str, Any]:
    return {"id": "1", "function": {"name": "f", "arguments": arguments}}


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER]} | fields


class TestLists:
    @pytest.mark.parametrize(
        ("kind", "body", "param", "option"),
        [
            (CompletionBody, {"prompt": ["a"] * MANY}, "prompt", "max_prompts"),
            (CompletionBody, {"prompt": [[1]] * 60_000}, "prompt", "max_prompts"),
            (CompletionBody, {"prompt": "a", "stop": ["a"] * MANY}, "stop", "max_stop"),
            (CompletionBody, {"prompt": "a", "stop": ["a" * 1025]}, "stop[0]", "max_stop_bytes"),
            (CompletionBody, {"prompt": "a", "stop": "é" * 513}, "stop[0]", "max_stop_bytes"),
            (CompletionBody, {"prompt": "a", "stop_token_ids": [0] * MANY}, "stop_token_ids", "max_stop_token_ids"),
            (
                CompletionBody,
                {"prompt": "a", "logit_bias": {str(token): 0 for token in range(MANY)}},
                "logit_bias",
                "max_logit_bias",
            ),
            (CompletionBody, {"prompt": "a", "guided_choice": ["a"] * MANY}, "guided_choice", "max_choices"),
            (
                CompletionBody,
                {"prompt": "a", "structured_outputs": {"choice": ["a"] * MANY}},
                "structured_outputs.choice",
                "max_choices",
            ),
            (CompletionBody, {"prompt": "a", "guided_regex": "a" * 524_289}, "guided_regex", "max_schema_bytes"),
            (
                CompletionBody,
                {"prompt": "a", "guided_json": {"enum": [99999] * MANY}},
                "guided_json",
                "max_schema_bytes",
            ),
            (CompletionBody, {"prompt": "a", "guided_json": '"' + "a" * 6 * MANY}, "guided_json", "max_schema_bytes"),
            (CompletionBody, {"prompt": "a", "user": "a" * MANY}, "user", "max_label_length"),
            (CompletionBody, {"prompt": "a", "model": "a" * MANY}, "model", "max_label_length"),
            (
                CompletionBody,
                {"prompt": "a", "metadata": dict.fromkeys(map(str, range(MANY)))},
                "metadata",
                "max_members",
            ),
            (CompletionBody, {"prompt": "a", "n": 17}, "n", "max_n"),
            (CompletionBody, {"prompt": "a", "best_of": 17}, "best_of", "max_n"),
            (ChatBody, {"messages": [USER] * 4097}, "messages", "max_messages"),
            (
                ChatBody,
                {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 1025}]},
                "messages[0].content",
                "max_parts",
            ),
            (
                ChatBody,
                {"messages": [{"role": "assistant", "tool_calls": [call("{}")] * 129}]},
                "messages[0].tool_calls",
                "max_tools",
            ),
            (
                ChatBody,
                chat(tools=[{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]),
                "tools",
                "max_tools",
            ),
            (
                ChatBody,
                chat(chat_template_kwargs=dict.fromkeys(map(str, range(1025)))),
                "chat_template_kwargs",
                "max_members",
            ),
            (EmbeddingBody, {"input": ["a"] * 2049}, "input", "max_inputs"),
        ],
    )
    def test_have_a_bound_that_is_named(self, kind: type[Wire], body: object, param: str, option: str) -> None:
        error = refusal(kind, body)
        assert error.param == param
        assert f"limits.{option}" in error.message

    @pytest.mark.parametrize(
        ("kind", "body"),
        [
            (CompletionBody, {"prompt": ["a"] * 128, "n": 16, "stop": ["é" * 512] * 16}),
            (CompletionBody, {"prompt": [997] * 500_000}),
            (CompletionBody, {"prompt": '[{,\\"' * 800_000}),
            (CompletionBody, {"prompt": "a", "stop_token_ids": list(range(1024))}),
            (CompletionBody, {"prompt": "a", "logit_bias": {str(token): -100 for token in range(1024)}}),
            (CompletionBody, {"prompt": "a", "guided_choice": ["a"] * 8192}),
            (CompletionBody, {"prompt": "a", "metadata": {"a": [[[]]] * 10_000}}),
            (ChatBody, {"messages": [{"role": "user", "content": "a" * 900}] * 4096}),
            (ChatBody, {"messages": [{"role": "assistant", "tool_calls": [call('{"a":[{}]}')] * 128}] * 60}),
            (EmbeddingBody, {"input": [[1, 2]] * 2048}),
            (TokenizeText, {"prompt": "a" * 4_000_000}),
            (DetokenizeBody, {"tokens": [1] * 500_000}),
        ],
    )
    def test_may_have_as_much_as_any_client_needs(self, kind: type[Wire], body: object) -> None:
        parse(orjson.dumps(body), kind, Limits(max_body_bytes=2**23))


class TestErrors:
    """One is enough, however much is wrong."""

    @pytest.mark.parametrize(
        ("kind", "body", "param"),
        [
            (ChatBody, {"messages": [0] * 4096}, "messages[0]"),
            (ChatBody, {"messages": [USER, *[{}] * 4000]}, "messages[1].role"),
            (ChatBody, {"messages": [{"role": "user", "content": [0] * 1024}]}, "messages[0].content[0]"),
            (ChatBody, {"messages": [{"role": "assistant", "tool_calls": [0] * 128}]}, "messages[0].tool_calls[0]"),
            (ChatBody, chat(tools=[0] * 128), "tools[0]"),
            (ChatBody, chat(**dict.fromkeys(map(str, range(60_000)), 0)), "0"),
            (ChatBody, {"messages": [USER | dict.fromkeys(map(str, range(60_000)), 0)]}, "messages[0]"),
            (CompletionBody, {"prompt": "a", "stop": [0] * 16}, "stop[0]"),
            (CompletionBody, {"prompt": "a", "stop_token_ids": [-1] * 1024}, "stop_token_ids[0]"),
            (CompletionBody, {"prompt": "a", "logit_bias": {str(i): "a" for i in range(1024)}}, "logit_bias.0"),
            (CompletionBody, {"prompt": "a", "logit_bias": {f"a{i}": 0 for i in range(1024)}}, "logit_bias.a0"),
            (CompletionBody, {"prompt": "a", "guided_choice": [0] * 8192}, "guided_choice[0]"),
            (CompletionBody, {"prompt": ["a"] * 127 + [0]}, "prompt"),
            (DetokenizeBody, {"tokens": ["a"] * MANY}, "tokens[0]"),
        ],
    )
    def test_do_not_multiply(self, kind: type[Wire], body: object, param: str) -> None:
        assert refusal(kind, body).param == param

    def test_name_no_more_of_a_name_than_helps(self) -> None:
        for body in ({"prompt": "a", "x" * MANY: 0}, {"prompt": "a", "logit_bias": {"x" * MANY: 0}}):
            error = refusal(CompletionBody, body)
            assert error.param is not None
            assert len(error.param) < 200

    def test_do_not_repeat_what_was_sent(self) -> None:
        for kind in ("x" * MANY, ["x"] * MANY):
            assert refusal(ChatBody, {"messages": [{"role": "user", "content": [{"type": kind}]}]}).param

    def test_of_known_fields_come_before_those_of_unknown_ones(self) -> None:
        assert refusal(CompletionBody, dict.fromkeys(map(str, range(1000)))).param == "prompt"

    @pytest.mark.parametrize("kind", BODIES)
    def test_are_few_whatever_comes(self, kind: type[Wire]) -> None:
        names = st.sampled_from([*sorted(kind.names), "a", "b", "c", "type", "function", "text", "role"])
        wide = st.sampled_from([[0] * 300, dict.fromkeys(map(str, range(300))), [{}] * 300])
        values = st.recursive(
            st.none() | st.booleans() | st.integers(0, 99) | st.text(max_size=3) | wide,
            lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
            max_leaves=8,
        )

        @settings(max_examples=40, deadline=None, database=None, derandomize=True)
        @given(st.dictionaries(names, values, max_size=12))
        def few(body: dict[str, Any]) -> None:
            try:
                kind.model_validate(body, context=Context(Limits()))
                errors = 0
            except ValidationError as error:
                errors = error.error_count()
            assert errors <= MOST_ERRORS

        few()


class TestJson:
    """What stands outside of strings is counted before it is parsed."""

    @pytest.mark.parametrize(
        ("raw", "option"),
        [
            (b'{"a":[' + b",".join([b"[]"] * MANY) + b"]}", "max_containers"),
            (b'{"a":[' + b",".join([b"{}"] * MANY) + b"]}", "max_containers"),
            (b"[" * MANY + b"0", "valid JSON"),
            (b'{"a":[' + b",".join([b"0"] * 2**19) + b"]}", "max_values"),
            (b"{" + b",".join([b'"a":0'] * 2**18) + b"}", "max_strings"),
            (b'{"a":[' + b",".join([b'""'] * 2**18) + b"]}", "max_strings"),
            (b'{"a":' + b"[" * 128 + b"]" * 128 + b"}", "max_depth"),
        ],
    )
    def test_of_too_many_values_is_refused_unread(
        self, monkeypatch: pytest.MonkeyPatch, raw: bytes, option: str
    ) -> None:
        read: list[int] = []
        monkeypatch.setattr("bdh_batch.http.request.json_text.orjson", _Recording(read))
        assert option in refusal(CompletionBody, raw).message
        assert bool(read) == (option in ("max_depth", "valid JSON"))

    @pytest.mark.parametrize("field", ["arguments", "guided_json"])
    def test_in_strings_is_bounded_as_well(self, field: str) -> None:
        for text, option in (("[" + "{}," * 200 + "0]", "max_containers"), ("[" * 200 + "]" * 200, "max_depth")):
            limits = Limits.model_validate({option: 100})
            inner = '{"a":' + text + "}"
            if field == "arguments":
                error = refusal(ChatBody, {"messages": [{"role": "assistant", "tool_calls": [call(inner)]}]}, limits)
                assert error.param == "messages[0].tool_calls[0].function.arguments"
            else:
                error = refusal(CompletionBody, {"prompt": "a", "guided_json": inner}, limits)
                assert error.param == "guided_json"
            assert f"limits.{option}" in error.message

    def test_that_is_nested_too_deep_names_its_field(self) -> None:
        nested: object = []
        for _ in range(200):
            nested = [nested]
        error = refusal(CompletionBody, {"prompt": "a", "metadata": {"a": nested}})
        assert (error.param, "limits.max_depth" in error.message) == ("metadata", True)

    @given(
        st.recursive(
            st.none() | st.integers(0, 9) | st.text('a"\\[]{},:\n', max_size=6),
            lambda inner: (
                st.lists(inner, max_size=4) | st.dictionaries(st.text('a"\\[,', max_size=3), inner, max_size=4)
            ),
            max_leaves=12,
        ),
        st.sampled_from(["max_containers", "max_strings", "max_depth", "max_values"]),
        st.integers(1, 8),
    )
    @settings(deadline=None, database=None, derandomize=True, max_examples=400)
    def test_is_counted_exactly(self, value: object, option: str, most: int) -> None:
        limits = Limits.model_validate({option: most})
        counted = {
            "max_containers": sum(isinstance(each, list | dict) for each in _values(value)),
            "max_strings": sum(isinstance(each, str) for each in _values(value)) + sum(map(_names, _values(value))),
            "max_depth": next(depth for depth in range(99) if not deeper(value, depth)),
            # Commas and brackets are counted: an empty list or object counts one more than it is.
            "max_values": 1
            + sum(max(0, len(each) - 1) + 1 for each in _values(value) if isinstance(each, list | dict)),
        }[option]
        if counted > most:
            with pytest.raises(ExceedsLimit, match=option):
                read_json(json.dumps(value).encode(), limits)
        else:
            assert read_json(json.dumps(value).encode(), limits) == value


class _Recording:
    """orjson, for a module that is to be watched."""

    JSONDecodeError = orjson.JSONDecodeError

    def __init__(self, read: list[int]) -> None:
        self._read = read

    def loads(self, raw: bytes) -> object:
        self._read.append(len(raw))
        return orjson.loads(raw)


def _values(value: object) -> Iterator[object]:
    yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _values(item)


def _names(value: object) -> int:
    return len(value) if isinstance(value, dict) else 0


class TestTypes:
    """Nothing of unbounded size is in a type of the API."""

    # Texts, which may fill a body; a new one is a decision.
    TEXTS: ClassVar = {
        "prompt",
        "input",
        "content",
        "text",
        "description",
        "arguments",
        "refusal",
        "text_input",
        "system",
        "instructions",
        "output",
        "data",  # of an image
        "url",  # which may hold one
    }

    def test_have_a_bound_for_each_list_object_and_string(self) -> None:
        kinds = _subclasses(Wire)
        assert {kind.__name__ for kind in BODIES} <= {kind.__name__ for kind in kinds}
        unbounded = []
        for kind in kinds:
            schema = kind.model_json_schema()
            for name, field in schema.get("properties", {}).items():
                unbounded += [f"{kind.__name__}.{name}: {part}" for part in _unbounded(field, name in self.TEXTS)]
        assert not unbounded, "\n".join(unbounded)

    def test_the_look_finds_what_has_none(self) -> None:
        class Loose(Wire):
            texts: list[str]
            free: dict[str, Any]
            anything: Any

        fields = Loose.model_json_schema()["properties"]
        assert {name: len(list(_unbounded(field, False))) for name, field in fields.items()} == {
            "texts": 2,
            "free": 1,
            "anything": 1,
        }

    @pytest.mark.parametrize("kind", BODIES)
    def test_end_each_list_with_its_first_error(self, kind: type[Wire]) -> None:
        parts = _values(kind.__pydantic_core_schema__)
        assert [part for part in parts if _is_list(part) and not part["fail_fast"]] == []


def _is_list(part: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(part, dict) and part.get("type") == "list" and part.get("items_schema", {}).get("type") != "any"


def _unbounded(schema: dict[str, Any], may_be_text: bool) -> Iterator[dict[str, Any]]:
    if {"$ref", "enum", "const"} & schema.keys():
        return
    if "anyOf" in schema:
        for each in schema["anyOf"]:
            yield from _unbounded(each, may_be_text)
        return
    kind = schema.get("type")
    bound = {"string": "maxLength", "array": "maxItems", "object": "maxProperties"}.get(kind or "")
    if kind in ("integer", "number", "boolean", "null"):
        return
    if MARK not in schema and bound not in schema:
        yield schema
    if kind == "string" and schema.get(MARK) == "max_body_bytes" and not may_be_text:
        yield schema
    if kind == "array":
        yield from _unbounded(schema["items"], may_be_text)


def _subclasses(kind: type[Wire]) -> set[type[Wire]]:
    known = {each for each in kind.__subclasses__() if each.__module__.startswith("bdh_batch.")}
    return known.union(*map(_subclasses, known))


class TestFanOut:
    def test_shares_what_does_not_differ(self) -> None:
        body = CompletionBody(prompt=["a"] * 128, n=16, stop_token_ids=list(range(1024)), logit_bias={"1": 1.0}, seed=5)
        request = body.request(Origin("id"), [Prompt(b"a")] * 128, Defaults(), None)
        assert (request.n, len(request.prompts), len(request.seeds)) == (16, 128, 128 * 16)
        assert list(request.seeds[:17]) == [*range(5, 21), 5]


class TestServer:
    """The smallest inputs that once held a server up, and their relatives; between them it answers as ever."""

    @pytest.mark.parametrize(
        ("path", "raw", "option"),
        [
            ("/v1/chat/completions", b'{"messages":[' + b"0," * 2_000_000 + b"0]}", "max_values"),
            ("/v1/chat/completions", b'{"messages":[{' + b'"a":0,' * 600_000 + b'"b":0}]}', "max_strings"),
            ("/v1/completions", b'{"prompt":[' + b"[]," * 1_300_000 + b"[]]}", "max_containers"),
            ("/v1/completions", b'{"prompt":"a","guided_choice":[' + b'"a",' * 1_000_000 + b'"a"]}', "max_strings"),
            ("/v1/embeddings", b'{"input":[' + b"[0]," * 1_000_000 + b"[0]]}", "max_containers"),
            ("/detokenize", b'{"tokens":[' + b"[],{}," * 600_000 + b"0]}", "max_containers"),
            ("/tokenize", b'{"messages":[' + b'{"role":"user"},' * 250_000 + b"0]}", "max_strings"),
        ],
    )
    def test_refuses_what_is_too_much(self, tiny: Server, path: str, raw: bytes, option: str) -> None:
        assert len(raw) <= 4 * 2**20
        assert f"limits.{option}" in tiny.refusal(path=path, content=raw)["message"]
        assert tiny.http.get("/health").status_code == 200

    def test_reports_the_tokens_of_a_large_text(self, tiny: Server) -> None:
        text = "aé\n" * 50_000
        reported = tiny.http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
        assert reported["tokens"] == list(text.encode())
        assert reported["count"] == len(reported["token_strs"]) == 4 * 50_000
        assert reported["token_strs"][:4] == ["a", "<0xC3>", "<0xA9>", "<0x0A>"]
        assert tiny.http.post("/detokenize", json={"tokens": reported["tokens"]}).json() == {"prompt": text}

    def test_echoes_and_logprobs_are_alike_at_once_and_in_pieces(self, tiny: Server) -> None:
        prompt = "To be. " * 250
        asked: dict[str, Any] = {"echo": True, "logprobs": 20, "max_tokens": 2, "temperature": 0}
        (whole,) = tiny.complete(prompt=prompt, **asked)["choices"]
        columns = whole["logprobs"]
        assert whole["text"].startswith(prompt)
        assert {len(column) for column in columns.values()} == {len(prompt) + 2}
        assert columns["text_offset"][: len(prompt)] == list(range(len(prompt)))
        assert "".join(columns["tokens"][: len(prompt)]) == prompt
        streamed = [event["choices"][0]["logprobs"] for event in tiny.events(prompt=prompt, **asked)]
        assert [token for part in streamed if part for token in part["tokens"]] == columns["tokens"]
