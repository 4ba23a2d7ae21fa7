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
def test_of_a_call_that_is_cut_short_only_what_is_certain_is_told(end: int) -> None:
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
