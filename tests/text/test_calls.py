"""Calls in a text: read back however the text is cut, and forced by a grammar."""

from __future__ import annotations

import json
from itertools import pairwise

from hypothesis import given, strategies as st

from bdh_batch.text.calls import CLOSE, OPEN, Argued, Called, CallReader, Piece, Said, head

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
calls = st.tuples(st.sampled_from(["f", "fg", "get_it"]), st.dictionaries(st.text(), values, max_size=3))


def written(name: str, arguments: object) -> str:
    return f"{OPEN}{head(name)}{json.dumps(arguments, ensure_ascii=False)}}}{CLOSE}"


def read(pieces: list[str]) -> tuple[str, list[list[str]], CallReader]:
    """What was said, and the name and arguments of each call."""
    reader = CallReader(["f", "fg", "get_it"])
    found: list[Piece] = [piece for text in pieces for piece in reader.push(text)] + reader.flush()
    said = ""
    made: list[list[str]] = []
    for piece in found:
        if isinstance(piece, Called):
            assert piece.index == len(made)
            made.append([piece.name, ""])
        elif isinstance(piece, Argued):
            made[piece.index][1] += piece.text
        else:
            said += piece.text
    return said, made, reader


@given(st.text(), st.lists(calls, max_size=3), st.lists(st.integers(0, 400)), st.sampled_from(["", "\n"]))
def test_calls_are_read_back_however_their_text_is_cut(
    said: str, made: list[tuple[str, object]], cuts: list[int], gap: str
) -> None:
    text = said + gap.join(written(*call) for call in made) + (gap if made else "")
    ends = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    found, called, reader = read([text[a:b] for a, b in pairwise(ends)])
    assert found == said
    assert [(name, json.loads(arguments)) for name, arguments in called] == [(name, value) for name, value in made]
    assert reader.calls == len(made)
    assert not reader.inside


@given(st.integers(0, 80))
def test_of_a_call_that_is_cut_short_only_what_is_certain_is_reported(end: int) -> None:
    whole = written("fg", {"a": [1, "}"]})
    said, made, reader = read(list(whole[:end]))
    assert said == (whole[:end] if end < len(OPEN) else "")
    assert reader.calls == (end >= len(whole))
    assert reader.inside == (bool(made) and not reader.calls)
    for name, arguments in made:
        assert name == "fg"
        assert '{"a": [1, "}"]}'.startswith(arguments)


def test_what_only_looks_like_a_call_is_text() -> None:
    for text in ("<tool_call>", "<tool_call>{} ", '<tool_call>{"name": "other", "arguments": {}}', "a < b <tool_"):
        said, made, _ = read(list(text))
        assert not made
        assert said == ("" if text == OPEN else text)


def test_text_before_a_call_is_said() -> None:
    reader = CallReader(["f"])
    assert reader.push("Let me see <tool") == [Said("Let me see ")]


@given(
    st.lists(st.sampled_from([OPEN, CLOSE, "\n", " ", "x", head("f"), head("fg"), head("f")[:-3], "{}", "}", "[1]"])),
    st.lists(st.integers(0, 200)),
)
def test_what_is_read_does_not_depend_on_where_the_text_is_cut(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    whole, cut = (
        read([text[a:b] for a, b in pairwise(sorted({min(at, len(text)) for at in ends} | {0, len(text)}))])
        for ends in ((), cuts)
    )
    assert whole[1] == cut[1]
    assert "".join(whole[0].split()) == "".join(cut[0].split())  # between calls, space is passed over


def test_what_a_text_costs_does_not_depend_on_how_many_tools_there_are() -> None:
    class Counted(str):
        looks = 0

        def __gt__(self, other: str) -> bool:
            Counted.looks += 1
            return str.__gt__(self, other)

    names = [f"tool_{number}" for number in range(1024)]
    reader = CallReader(names)
    reader._heads = [Counted(each) for each in reader._heads]
    whole = written("tool_777", {"a": 1})
    pieces = [piece for character in whole for piece in reader.push(character)]
    assert Called(0, "tool_777") in pieces
    assert 0 < Counted.looks <= 11 * len(whole)


def test_many_calls_at_once_are_read_in_one_pass() -> None:
    """No part of a text is copied for each call in it."""
    reader = CallReader(["f"])
    text = written("f", {}) * 5000
    pieces = reader.push(text)
    assert reader.calls == 5000
    assert sum(len(piece.text) for piece in pieces if isinstance(piece, Argued)) == 2 * 5000
    assert (len(reader._text), reader._at) == (len(text), len(text))
