"""Grammars without a model: every way through them ends in what was asked for, and what is no grammar is refused."""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings, strategies as st
from llguidance import LLMatcher
from tokenizers import AddedToken, Tokenizer

from bdh_batch.errors import InvalidRequest, UnsupportedParameter
from bdh_batch.messages import Constraint
from bdh_batch.text import probation
from bdh_batch.text.calls import CLOSE, OPEN, Tool, from_tools, head
from bdh_batch.text.compiler import compile_grammar
from bdh_batch.text.constraints import CompiledGrammar
from bdh_batch.text.grammar import Grammars, open_sandbox
from bdh_batch.text.grammar_cache import LEAST_WEIGHT, Compiled, GrammarCache
from bdh_batch.text.hugging_face import HuggingFaceTokenizer
from bdh_batch.text.job_queue import QueueLimits
from bdh_batch.text.sandbox_process import Prepared, Refused
from bdh_batch.text.schemas import problem_of
from bdh_batch.text.sources import Source, from_choice, from_lark, from_regex, from_schema
from bdh_batch.text.tokenizer import ByteTokenizer, TokenIdsOnly
from bdh_batch.text.vocabulary import Vocabulary, byte_vocabulary, setup_of, vocabulary_of
from tests.text import tokenizers
from tests.text.inline import Inline, inline_grammars

T = TypeVar("T")

PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that GPT-2's alphabet writes as themselves
ALPHABET = {byte: chr(byte if byte in PLAIN else 256 + byte - sum(p < byte for p in PLAIN)) for byte in range(256)}
MERGES = [("a", "b"), ("ab", "c"), ("1", "2"), ('"', ":"), ("t", "o"), ("to", "o"), ("too", "l"), (">", "{")]
PIECES = [*ALPHABET.values(), *("".join(pair) for pair in MERGES)]
ENDING = len(PIECES)


def byte_level() -> Tokenizer:
    """A small one of byte-level pieces, and a token that ends texts."""
    end = {"id": ENDING, "content": "<|end|>", "special": True}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(PIECES)}, "merges": MERGES}
    values = {"added_tokens": [end], "pre_tokenizer": byte_level, "decoder": byte_level, "model": model}
    return Tokenizer.from_str(json.dumps(values))


def with_calls(special: bool) -> Tokenizer:
    """As Qwen and Hermes have it: a call is written with tokens of its own."""
    tokenizer = tokenizers.byte_level()
    tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text in (OPEN, CLOSE)])
    return tokenizer


def vocabulary_for(tokenizer: Tokenizer, ends: Iterable[int] = (), size: int = 0) -> Vocabulary:
    """Of a model of so many tokens, or of a few more than the tokenizer has."""
    known = HuggingFaceTokenizer(tokenizer, Path("tokenizer.json"))
    vocabulary = vocabulary_of(known, size or known.size + 8, frozenset(ends))
    assert isinstance(vocabulary, Vocabulary), vocabulary
    return vocabulary


def vocabularies() -> list[Vocabulary]:
    return [
        byte_vocabulary(256),
        byte_vocabulary(300),
        byte_vocabulary(256, [0]),
        byte_vocabulary(300, [ord("\t"), 299]),
        vocabulary_for(byte_level(), [ENDING], ENDING + 1),
        vocabulary_for(byte_level(), [PIECES.index("\u0109"), ENDING], ENDING + 1),
        vocabulary_for(byte_level(), (), ENDING + 1),
        vocabulary_for(with_calls(special=False)),
        vocabulary_for(with_calls(special=True), [3]),
        vocabulary_for(tokenizers.byte_fallback(), [3]),
    ]


@pytest.fixture(scope="module")
async def sandboxed() -> AsyncIterator[Grammars]:
    """Of bytes, with a sandbox as a server has it, but for less time."""
    sandbox = open_sandbox(setup_of(ByteTokenizer(), 256), 1.0, 48 * 2**20, QueueLimits())
    sandbox.warm_up()
    yield Grammars(byte_vocabulary(256), sandbox)
    sandbox.close()


def allowed(constraint: Constraint, size: int) -> list[int]:
    mask = constraint.mask()
    return (
        list(range(size)) if mask is None else [t for t in range(min(size, len(mask) * 8)) if mask[t // 8] >> t % 8 & 1]
    )


def walk(constraint: Constraint, vocabulary: Vocabulary, rng: random.Random, most: int = 300) -> tuple[bytes, bool]:
    """A random response, and whether it ended by itself."""
    text = b""
    for _ in range(most):
        choices = allowed(constraint, vocabulary.size)
        if not choices:  # a grammar may lead to where nothing can follow: that ends the completion with an error
            with pytest.raises(InvalidRequest, match="cannot go on"):
                constraint.accept(0)
            return text, False
        token = rng.choice(choices)
        if not constraint.accept(token):
            return text, True
        text += b"" if token in vocabulary.ends else vocabulary.tokens.decode_bytes([token])
        if constraint.complete:
            return text, True
    return text, False


@pytest.mark.parametrize("small", [0, 4096])
@pytest.mark.parametrize("vocabulary", vocabularies())
async def test_every_way_through_a_grammar_ends_in_what_was_asked_for(vocabulary: Vocabulary, small: int) -> None:
    grammars, rng = inline_grammars(vocabulary, small=small), random.Random(3)
    pattern = re.compile(r"(a|b1?)+(c: \{12\})?")
    checks: list[tuple[Source, Callable[[str], Any]]] = [
        (from_regex(pattern.pattern.replace(": ", ":"), "r"), re.compile(r"(a|b1?)+(c:\{12\})?").fullmatch),
        (from_choice(["ab", "abc", "1"], "c"), {"ab", "abc", "1"}.__contains__),
        (from_lark('start: "{" start "}" | "a"', "g"), lambda text: text.count("{") == text.count("}")),
        (
            from_schema({"type": "object", "additionalProperties": {"enum": [1, 12]}}, "s"),
            lambda t: json.loads(t) is not None,
        ),
    ]
    for source, check in checks:
        grammar = await grammars.compile(source)
        ended = 0
        for _ in range(20):
            text, by_itself = walk(grammar.constraint(), vocabulary, rng)
            ended += by_itself
            assert not by_itself or check(text.decode()), (source, text)
        assert ended


async def test_where_it_may_end_a_model_without_a_token_for_it_ends_by_drawing_something_else() -> None:
    grammar = await inline_grammars(byte_vocabulary(256)).compile(from_regex("[0-9]+", "r"))
    constraint = grammar.constraint()
    assert allowed(constraint, 256) == list(b"0123456789")
    assert constraint.accept(ord("1"))
    assert constraint.mask() is None
    assert constraint.accept(ord("2"))
    assert not constraint.accept(ord("x"))
    other = grammar.constraint()
    with pytest.raises(InvalidRequest, match="cannot go on"):
        other.accept(ord("x"))


@pytest.mark.parametrize("vocabulary", [byte_vocabulary(300), vocabulary_for(byte_level(), (), 300)])
async def test_what_stands_in_for_that_token_is_never_part_of_a_response(vocabulary: Vocabulary) -> None:
    constraint = (await inline_grammars(vocabulary).compile(from_regex("a+", "r"))).constraint()
    for token in vocabulary.tokens.tokenize_str("aa"):
        assert constraint.accept(token)
    assert vocabulary.tokens.eos_token < vocabulary.size
    assert not constraint.accept(vocabulary.tokens.eos_token)


@pytest.mark.parametrize("vocabulary", [each for each in vocabularies() if each.ends])
async def test_a_model_with_a_token_for_the_end_draws_it_or_goes_on(vocabulary: Vocabulary) -> None:
    compiled = await inline_grammars(vocabulary).compile(from_regex(r"[a\t\x00]\te?|a+e?", "r"))
    for end in vocabulary.ends:
        constraint = compiled.constraint()
        assert not vocabulary.ends & set(allowed(constraint, vocabulary.size))
        for token in vocabulary.tokens.tokenize_str("aa"):
            assert constraint.accept(token)
        following = set(allowed(constraint, vocabulary.size))
        assert following >= vocabulary.ends
        assert {vocabulary.text(token) for token in following - vocabulary.ends} == {b"a", b"e"}
        assert constraint.accept(end)
        assert constraint.complete


@pytest.mark.parametrize("vocabulary", vocabularies())
async def test_a_response_does_not_end_early_as_long_as_it_can_go_on(vocabulary: Vocabulary) -> None:
    grammars, rng = inline_grammars(vocabulary), random.Random(2)
    asked: list[tuple[Source, float, str, bool]] = [
        (from_regex("c+x?", "r"), 4, "c{4,}|c+x", True),
        (from_regex("c*", "r"), math.inf, "c{40}", False),
        (from_regex("c?x?", "r"), math.inf, "c?x", True),
        (from_choice([""], "c"), 5, "", True),
    ]
    for source, early, pattern, ends in asked:
        grammar = await grammars.compile(source)
        for _ in range(10):
            text, ended = walk(grammar.constraint(early), vocabulary, rng, 40)
            assert re.fullmatch(pattern, text.decode()), text
            assert ended is ends or len(text) == 40


async def test_calls_go_on_as_long_as_they_can() -> None:
    source = from_tools([Tool("g", None, "p")], "tools", most=None, required=False)
    grammar = await inline_grammars(byte_vocabulary(256)).compile(source)
    call = f"{OPEN}{head('g')}{{}}}}{CLOSE}".encode()
    for early, may_end in ((0, True), (len(call), True), (len(call) + 1, False), (math.inf, False)):
        constraint = grammar.constraint(early)
        assert all(map(constraint.accept, call))
        assert (constraint.mask() is None) == may_end


@pytest.mark.parametrize("vocabulary", vocabularies())
async def test_after_its_trigger_a_free_text_follows_the_grammar(vocabulary: Vocabulary) -> None:
    source = from_tools([Tool("abc", {}, "p")], "tools", most=1, required=False)
    constraint = (await inline_grammars(vocabulary).compile(source)).constraint()
    for token in vocabulary.tokens.tokenize_str("ab < c <tool") + vocabulary.tokens.tokenize_str("_call"):
        assert constraint.mask() is None
        assert constraint.accept(token)
    past = vocabulary.tokens.tokenize_str(">{")  # one token, where there is such a one
    assert constraint.accept(past[0])
    texts = {vocabulary.tokens.decode_bytes([token]) for token in allowed(constraint, vocabulary.size)}
    assert texts == ({b'"'} if len(past) == 1 else {b"\n", b"{"})
    assert not constraint.complete


@pytest.mark.parametrize("vocabulary", vocabularies())
async def test_what_is_a_token_by_itself_can_be_said(vocabulary: Vocabulary) -> None:
    """Whether that is shown or not, or ends texts: a syntax that spells it is no call for that token."""
    tool = Tool("g", None, "p")
    call = f"{OPEN}{head('g')}{{}}}}{CLOSE}"
    asked: list[tuple[Source, set[str]]] = [
        (
            from_choice(["<|im_end|>", "a<s>b", "<think> it</think>"], "c"),
            {"<|im_end|>", "a<s>b", "<think> it</think>"},
        ),
        (from_regex(r"<\|im_end\|>x", "r"), {"<|im_end|>x"}),
        (from_schema({"enum": ["<s>", "<|end|>"]}, "s"), {'"<s>"', '"<|end|>"'}),
        (from_tools([tool], "tools", most=1, required=True), {call}),
        (from_tools([tool], "tools", most=1, required=False), {f"Well, {call}"}),
    ]
    grammars, rng = inline_grammars(vocabulary), random.Random(1)
    for source, texts in asked:
        grammar = await grammars.compile(source)
        said = set()
        for _ in range(12):
            constraint, text = grammar.constraint(), b""
            for token in vocabulary.tokens.tokenize_str(f"Well, {OPEN}") if source.trigger else ():
                assert constraint.accept(token)
                text += vocabulary.text(token)
            rest, ended = walk(constraint, vocabulary, rng)
            assert ended
            said.add((text + rest).replace(b"\n", b"").decode())
        assert said == texts


def test_a_call_that_has_tokens_of_its_own_is_shown_and_begins_with_them() -> None:
    for special in (False, True):
        tokenizer = with_calls(special)
        begin, end, hidden = map(tokenizer.get_vocab().__getitem__, [OPEN, CLOSE, "<s>"])
        assert vocabulary_for(tokenizer, [3]).tokens.tokenize_str(f"{OPEN}x")[0] == begin
        decoder = HuggingFaceTokenizer(tokenizer, Path("t")).decoder()
        assert "".join(map(decoder.push, [begin, hidden, end])) == OPEN + CLOSE


async def test_calls_are_of_the_tools_and_of_their_schemas() -> None:
    tools = [Tool("f", {"properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}, "p0"), Tool("g", None, "p1")]
    vocabulary, rng = byte_vocabulary(256), random.Random(5)
    grammars = inline_grammars(vocabulary)
    one = await grammars.compile(from_tools(tools, "tools", most=1, required=True))
    either = await grammars.compile(from_tools(tools, "tools", 1, False, from_schema({"enum": ["no"]}, "f")))
    several = (await grammars.compile(from_tools(tools[1:], "tools", most=None, required=True))).constraint()
    for _ in range(10):
        text, ended = walk(one.constraint(), vocabulary, rng, 4000)
        assert not ended or re.fullmatch(rf'{OPEN}\n?\{{"name": "[fg]", .*\}}\n?{CLOSE}', text.decode(), re.DOTALL)
    texts = {walk(either.constraint(), vocabulary, rng, 60)[0][:1] for _ in range(20)}
    assert texts == {b'"', b"<"}
    call = f"{OPEN}{head('g')}{{}}}}{CLOSE}"
    for byte in f"{call}\n{call}".encode():
        assert several.accept(byte)
    assert several.mask() is None
    assert not several.accept(ord("x"))
    two = (await grammars.compile(from_tools(tools[1:], "tools", most=2, required=True))).constraint()
    assert all(two.accept(byte) for byte in f"{call}\n{call}".encode())
    assert not two.accept(ord("<")), "the start of a third"


strict_schema = partial(from_schema, strict=True)
LOOP = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
DEEP: dict[str, Any] = {"type": "string"}
for _ in range(300):
    DEEP = {"type": "array", "items": DEEP}
PAIRS = [{"anyOf": [{"required": [f"p{i}_{j}"], "type": "object"} for j in range(4)]} for i in range(10)]
REFUSED: list[tuple[Callable[[Any, str], Source], Any]] = [
    (from_regex, "(("),
    (from_regex, "(?!a)b"),
    (from_regex, r"a[^\s\S]"),
    (from_lark, "start: missing"),
    (from_lark, "not lark at all ("),
    (from_lark, 'start: start "a"'),
    (from_lark, ""),
    (strict_schema, LOOP),
    (strict_schema, {"$ref": "#"}),
    (strict_schema, {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
    (strict_schema, {"$ref": "http://127.0.0.1/x"}),
    (strict_schema, {"$ref": "#/nowhere"}),
    (strict_schema, {"type": "integer", "minimum": 3, "maximum": 2}),
    (strict_schema, {"type": "array", "uniqueItems": True}),
    (strict_schema, {"type": "object", "minProperties": 2}),
    (strict_schema, {"type": "object", "additionalProperties": {"enum": [1]}, "required": ["a"], "minProperties": 2}),
    (strict_schema, {"patternProperties": {"^[ab]$": {}}, "additionalProperties": False, "minProperties": 2}),
    (strict_schema, {"allOf": [{"additionalProperties": {"type": "null"}}, {"minProperties": 2}], "type": "object"}),
    (strict_schema, {"$ref": "#/else/0", "else": [{"type": "object", "minProperties": 2}]}),
    (strict_schema, {"not": {}}),
    (strict_schema, {"type": 5}),
    (strict_schema, {"enum": []}),
    (strict_schema, {"type": "string", "pattern": "("}),
    (strict_schema, {"allOf": PAIRS}),
    (strict_schema, {"type": "integer", "multipleOf": 999999999}),
    (from_schema, {"not": {}}),
    (from_schema, {"$ref": "#/nowhere"}),
    (strict_schema, DEEP),
]
ACCEPTED: list[tuple[Callable[[Any, str], Source], Any]] = [
    (from_regex, "(.*a.{15}.*){3}"),
    (from_regex, "((a{1,1000}){1,1000}){1,1000}"),
    (from_regex, "(a?){500}a{500}"),
    (from_regex, "a/b\r\n\x00"),
    (from_lark, 'start: start start | "a" | '),
    (from_schema, {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False}),
    (from_schema, {"type": "object", "minProperties": 1}),
    (from_schema, {"type": "object", "required": ["a", "b"], "minProperties": 2}),
    (from_schema, {"properties": {"minProperties": {"const": 5}}, "required": ["minProperties"]}),
    (from_schema, {"enum": [f"v{i}" for i in range(10_000)]}),
    (from_choice, [f"v{i}" for i in range(10_000)]),
    (from_choice, [f"{i} " * 8 for i in range(3000)]),
    (from_choice, ['"', "\\", "\n", "\x00", "😀", "", "/"]),
]


@pytest.mark.parametrize(("kind", "asked"), REFUSED)
async def test_what_nothing_satisfies_or_is_no_grammar_is_refused_by_its_field(
    sandboxed: Grammars, kind: Any, asked: Any
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await sandboxed.compile(kind(asked, "the.field"))
    assert refused.value.param == "the.field"
    assert refused.value.message.startswith("the.field: ")
    assert len(refused.value.message) < 500
    assert "\n" not in refused.value.message


@pytest.mark.parametrize(("kind", "asked"), ACCEPTED)
async def test_hard_grammars_are_walked(kind: Any, asked: Any) -> None:
    vocabulary = byte_vocabulary(256)
    grammar = await inline_grammars(vocabulary, 2**18).compile(kind(asked, "p"))
    walk(grammar.constraint(), vocabulary, random.Random(1), 100)


async def test_a_tool_whose_schema_is_at_fault_is_named() -> None:
    tools = [Tool("f", None, "tools[0].function.parameters"), Tool("g", {"not": {}}, "tools[1].function.parameters")]
    with pytest.raises(InvalidRequest) as refused:
        await inline_grammars(byte_vocabulary(256)).compile(from_tools(tools, "tools", None, True))
    assert refused.value.param == "tools[1].function.parameters"


def test_a_schema_that_leads_to_itself_in_countless_ways_is_decided_at_once() -> None:
    names = [f"d{i}" for i in range(40)]
    definitions: dict[str, Any] = {
        name: {"anyOf": [{"$ref": f"#/$defs/{after}"}] * 2} for name, after in zip(names, [*names[1:], "d0"])
    }
    schema = {"$ref": "#/$defs/d0", "$defs": definitions}
    assert "without an end" in str(problem_of(schema))
    definitions["d39"]["anyOf"].append({"type": "null"})
    assert problem_of(schema) is None


async def test_grammars_are_bounded_in_bytes_whatever_they_are_made_of() -> None:
    grammars = inline_grammars(byte_vocabulary(256), 1000)
    long = {"enum": ["a" * 1001]}
    calls = from_tools([Tool("f", None, "t0"), Tool("g", long, "t1")], "tools", most=None, required=True)
    several = from_tools([Tool(f"f{i}", {"enum": ["a" * 300]}, f"t{i}") for i in range(4)], "tools", None, True)
    asked: list[tuple[Source, str]] = [
        (from_regex("a" * 1001, "p"), "p"),
        (from_lark("é" * 501, "p"), "p"),
        (from_choice(["a"] * 1001, "p"), "p"),
        (from_schema(long, "p"), "p"),
        (calls, "t1"),
        (several, "tools"),
    ]
    for source, param in asked:
        with pytest.raises(InvalidRequest, match=r"limit of 1000.*limits\.max_schema_bytes") as refused:
            await grammars.compile(source)
        assert refused.value.param == param


async def test_without_a_tokenizer_grammars_are_refused() -> None:
    byte_model = vocabulary_of(ByteTokenizer(), 256, frozenset({0}))
    assert isinstance(byte_model, Vocabulary)
    assert byte_model.ends == {0}
    with pytest.raises(UnsupportedParameter) as refused:
        await Grammars(vocabulary_of(TokenIdsOnly(), 97), None).compile(from_regex("a", "p"))
    assert refused.value.param == "p"


@pytest.mark.parametrize(
    "kind", [tokenizers.metaspace, tokenizers.word_piece, tokenizers.end_of_word, tokenizers.words]
)
async def test_where_not_every_byte_can_be_said_grammars_are_refused(kind: Callable[[], Tokenizer]) -> None:
    """Else a response could come to where the grammar goes on and no token does."""
    known = HuggingFaceTokenizer(kind(), Path("tokenizer.json"))
    with pytest.raises(UnsupportedParameter, match="not every byte") as refused:
        await Grammars(vocabulary_of(known, known.size), None).compile(from_regex("a", "p"))
    assert refused.value.param == "p"


def chain(rules: int) -> str:
    return "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(rules)) + f'\nr{rules}: "a"'


def terminals(count: int) -> str:
    return "start: T0\n" + "\n".join(f'T{i}: "b" T{i + 1}' for i in range(count)) + f'\nT{count}: "a"'


def definitions(count: int) -> dict[str, Any]:
    found: dict[str, Any] = {f"d{i}": {"anyOf": [{}, {"$ref": f"#/$defs/d{i + 1}"}]} for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": found | {f"d{count}": {"type": "null"}}}


def properties(count: int) -> dict[str, Any]:
    found: dict[str, Any] = {f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": found | {f"d{count}": {"type": "null"}}}


INTERSECTION = "start: T\nT: " + " & ".join(f"/((a|b){{{k}}})*/" for k in (7, 11, 13, 17, 19, 23, 29, 31, 37, 41))
HOSTILE: list[tuple[Callable[[Any, str], Source], Any, str]] = [
    (from_lark, chain(3000), "too deeply"),
    (from_lark, terminals(3500), "too deeply"),
    (from_schema, definitions(1200), "400 deep"),
    (from_schema, properties(1200), "too deeply"),
    (from_schema, {"const": -9223372036854775808}, "#/const"),
    (from_schema, {"type": "integer", "multipleOf": 999983}, r"structured_output\."),
    (from_schema, {"type": "integer", "multipleOf": 99999989}, r"structured_output\."),
    (from_lark, INTERSECTION, r"structured_output\."),
]


@pytest.mark.parametrize(("kind", "asked", "reported"), HOSTILE)
async def test_what_would_end_the_server_or_never_end_is_refused(
    sandboxed: Grammars, kind: Any, asked: Any, reported: str
) -> None:
    with pytest.raises(InvalidRequest, match=reported) as refused:
        await sandboxed.compile(kind(asked, "the.field"))
    assert refused.value.param == "the.field"
    assert (await sandboxed.compile(from_regex("[0-9]+", "p"))).constraint().mask()


NUMBERS = st.sampled_from([0, 1, -1, 7, 97, 2**31, 2**53, 2**63 - 1, -(2**63) + 1, -(2**63), 0.1, -0.0, 1e-300, 1e308])
EXPRESSIONS = st.lists(
    st.sampled_from([*"ab.()|*+?", "[^a]", "{3}", "{0,200}", r"\w", r"\p{L}", "(?=", "é", "&"]), max_size=12
).map("".join)
SCHEMAS: st.SearchStrategy[Any] = st.recursive(
    st.just({})
    | st.fixed_dictionaries({"const": NUMBERS})
    | st.dictionaries(st.sampled_from(["minimum", "maximum", "multipleOf"]), NUMBERS).map(
        lambda bounds: {"type": "number"} | bounds
    )
    | st.fixed_dictionaries({"type": st.just("string"), "pattern": EXPRESSIONS, "maxLength": NUMBERS})
    | st.sampled_from([{"$ref": "#"}, {"$ref": "#/properties/a"}, {"type": "null"}]),
    lambda inner: (
        st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=3)})
        | st.fixed_dictionaries({"type": st.just("array"), "items": inner, "minItems": NUMBERS})
        | st.fixed_dictionaries(
            {"type": st.just("object"), "properties": st.dictionaries(st.sampled_from("ab"), inner)}
        )
    ),
    max_leaves=6,
)
LARK = st.lists(
    st.sampled_from(
        ["start:", "\na:", "\nB:", "a", "B", "|", "(", ")", "*", "&", "~", '"x"', "/y+/", "{2,9}", "start"]
    ),
    max_size=14,
).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(
    EXPRESSIONS.map(lambda regex: from_regex(regex, "p"))
    | SCHEMAS.map(lambda schema: from_schema(schema, "p"))
    | LARK.map(lambda grammar: from_lark(f"start: a\n{grammar}", "p"))
)
async def test_whatever_is_asked_for_is_followed_or_refused(sandboxed: Grammars, source: Source) -> None:
    (outcome,) = await asyncio.gather(sandboxed.compile(source), return_exceptions=True)
    if isinstance(outcome, CompiledGrammar):
        walk(outcome.constraint(), byte_vocabulary(256), random.Random(1), 30)
    else:
        assert isinstance(outcome, InvalidRequest)
        assert outcome.param == "p"


async def test_a_tool_that_the_compiler_crashes_on_is_refused(sandboxed: Grammars) -> None:
    tool = Tool("g", properties(1200) | {"type": "object"}, "tools[0].function.parameters")
    with pytest.raises(InvalidRequest, match="too deeply") as refused:
        await sandboxed.compile(from_tools([tool], "tools", None, True))
    assert refused.value.param == "tools"


@pytest.mark.parametrize("rule", ['start start start start | "a" | start "b" start | ', 'start start start | "a" | '])
def test_the_most_ambiguous_grammars_end_by_the_limits_of_a_step(rule: str) -> None:
    """Else each token costs more than the one before it; work is bounded by items, whatever the machine."""
    matcher = compile_grammar(byte_vocabulary(256).tokens, f"start: {rule}")
    assert isinstance(matcher, LLMatcher)
    steps = 0
    while any(matcher.compute_bitmask()) and matcher.consume_token(ord("a")):
        steps += 1
        assert steps < 1000
    assert "Too many items" in matcher.get_error() or "Current row" in matcher.get_error()


async def test_a_grammar_whose_tokens_cost_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long they take is measured; here, any time is too long."""
    grammars = inline_grammars(byte_vocabulary(256))
    monkeypatch.setattr(probation, "SLOW", -1.0)
    with pytest.raises(InvalidRequest, match="too ambiguous"):
        await grammars.compile(from_lark('start: start start | "a" | ', "p"))


async def test_a_grammar_that_seemed_slow_once_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processor time is not the grammar's alone where the machine is a virtual one."""
    seconds = iter([1.0, *([0.0] * probation.WALKS)])
    monkeypatch.setattr(probation, "follow", lambda matcher, choose: next(seconds))
    await inline_grammars(byte_vocabulary(256)).compile(from_lark('start: "a" | "b"', "p"))
    assert next(seconds, None) is None, "the first walk was taken twice, the others once"


async def test_what_was_compiled_and_what_was_refused_is_known_the_next_time() -> None:
    counting = Counting(byte_vocabulary(256))
    grammars = Grammars(byte_vocabulary(256), counting)
    for _ in range(3):
        assert (await grammars.compile(from_regex("a+", "p"))).constraint().mask()
        with pytest.raises(InvalidRequest, match=r"^q: "):
            await grammars.compile(from_regex("((", "q"))
    assert counting.jobs == 2


async def test_the_bytes_of_grammars_that_are_kept_are_bounded() -> None:
    counting = Counting(byte_vocabulary(256))
    grammars = Grammars(byte_vocabulary(256), counting, cache_bytes=3 * LEAST_WEIGHT)
    for i in (0, 1, 2, 0, 3, 0, 1):  # when the fourth comes, the second goes
        assert (await grammars.compile(from_regex(f"a{i}", "p"))).constraint().mask()
    assert counting.jobs == 5
    cache = GrammarCache(100 * LEAST_WEIGHT)
    matcher = compile_grammar(byte_vocabulary(256).tokens, "start: /a/")
    assert isinstance(matcher, LLMatcher)
    assert not cache.add(b"small", Compiled(matcher, "", 0))
    assert cache.add(b"huge", Compiled(matcher, "", 100 * LEAST_WEIGHT)) == [matcher]
    assert (len(cache), cache.get(b"small")) == (1, None)


async def test_requests_for_one_grammar_share_its_compilation_until_none_of_them_waits() -> None:
    held = Held()
    grammars = Grammars(byte_vocabulary(256), held)
    source = from_regex("a+", "p")
    first, second = (asyncio.ensure_future(grammars.compile(source, "a")) for _ in range(2))
    other = asyncio.ensure_future(grammars.compile(source, "b"))
    await asyncio.wait_for(held.come(2), 300)
    assert held.tenants == ["a", "b"]
    first.cancel()
    await asyncio.wait([first])
    assert held.cancelled == []
    second.cancel()
    await asyncio.wait([second])
    assert held.cancelled == ["a"]
    held.release.set()
    with pytest.raises(InvalidRequest):
        await other


class Counting(Inline):
    """Counts the jobs that run."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(Prepared(probation.work_for(vocabulary)))
        self.jobs = 0

    async def run(self, job: bytes, tenant: str, then: Callable[[bytes], Awaitable[T]]) -> T:
        self.jobs += 1
        return await super().run(job, tenant, then)


class Held:
    """Runs nothing until it is told to, and then refuses."""

    def __init__(self) -> None:
        self.tenants: list[str] = []
        self.cancelled: list[str] = []
        self.release = asyncio.Event()
        self._came = asyncio.Event()

    async def run(self, job: bytes, tenant: str, then: Callable[[bytes], Awaitable[T]]) -> T:
        self.tenants.append(tenant)
        self._came.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled.append(tenant)
            raise
        raise Refused("no")

    async def come(self, count: int) -> None:
        while len(self.tenants) < count:
            self._came.clear()
            await self._came.wait()


async def test_what_one_completion_wears_out_is_compiled_anew_and_nobody_elses(sandboxed: Grammars) -> None:
    endings = " | ".join(f"/(b|c)*b(b|c){{{length}}}d/" for length in range(20, 220))
    source = from_lark(f'start: /a{{60}}/ t* "zzz"\nt: {endings}', "p")
    other = await sandboxed.compile(source, "other")
    worn = await sandboxed.compile(source, "mine")
    chance, constraint = random.Random(1), worn.constraint()

    def wear_out() -> None:
        for _ in range(3000):
            constraint.accept(chance.choice([t for t in allowed(constraint, 256) if t not in b"zd"] or [0]))

    with pytest.raises(InvalidRequest, match="lexer"):
        wear_out()
    for grammar in (other, await sandboxed.compile(source, "mine")):
        fresh = grammar.constraint()
        assert [fresh.accept(token) for token in b"aaaaa"] == [True] * 5
