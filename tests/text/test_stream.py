from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, strategies as st

from bdh_batch.text.stop_strings import START, StopStrings
from bdh_batch.text.stream import TextStream
from bdh_batch.text.tokenizer import ByteTokenizer, TokenIdsOnly

TOKENIZER = ByteTokenizer()


def pieces(tokens: bytes | list[int], stop: tuple[str, ...] = (), early: int = 0, before: str = "") -> list[str]:
    """What a stream shows for each token, until it stops, and at its end."""
    stream = TextStream(TOKENIZER.decoder(), StopStrings(stop), min_tokens=early, before=before)
    shown = []
    for token in tokens:
        shown.append(stream.push(token))
        if stream.stopped:
            break
    return [*shown, stream.flush()]


@given(st.text())
def test_text_comes_back_whole_and_no_character_is_cut(text: str) -> None:
    shown = pieces(text.encode())
    assert "".join(shown) == text
    assert "\ufffd" not in "".join(shown) or "\ufffd" in text


@given(st.lists(st.integers(0, 300)))
def test_any_tokens_become_what_python_decodes_with_replacement(tokens: list[int]) -> None:
    raw = bytes(token if token < 256 else 0xFF for token in tokens)
    assert "".join(pieces(tokens)) == raw.decode(errors="replace")


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4))
def test_text_ends_before_the_first_stop_string_and_shows_nothing_of_it(text: str, stop: list[str]) -> None:
    shown = pieces(text.encode(), tuple(stop))
    # The stream stops at the token that completes a stop string: of what is known then, it cuts at the earliest.
    ends = [end for end in range(len(text) + 1) if any(s in text[:end] for s in stop)]
    known = text[: ends[0]] if ends else text
    cut = min((known.find(s) for s in stop if s in known), default=len(known))
    assert "".join(shown) == known[:cut]
    for end in range(len(shown)):
        assert known[:cut].startswith("".join(shown[:end]))


@given(
    st.text("abc", max_size=20),
    st.lists(st.text("abc<", min_size=1, max_size=4), min_size=1, max_size=4),
    st.text("abc<", max_size=9),
    st.integers(0, 9),
)
@example("a", ["<", "a<a"], "", 0)  # the first is complete before the other, which begins before it
def test_stop_strings_are_looked_for_up_to_a_text_and_not_from_there_on(
    text: str, stop: list[str], rest: str, early: int
) -> None:
    shown = "".join(pieces(text.encode(), tuple(stop), early))
    stopped = len("".join(pieces(text.encode() + b"..", tuple(stop), early))) < len(text) + 2
    with_more = "".join(pieces(f"{text}<abc>{rest}".encode(), tuple(stop), early, "<abc>"))
    assert with_more == (shown if stopped else f"{text}<abc>{rest}")
    assert "".join(pieces(f"{text}<ab".encode(), tuple(stop), early, "<abc>")) == "".join(
        pieces(f"{text}<ab".encode(), tuple(stop), early)
    )


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4))
def test_the_stop_string_that_ended_a_text_is_known(text: str, stop: list[str]) -> None:
    stream = TextStream(TOKENIZER.decoder(), StopStrings(stop), include_stop=True)
    shown = ""
    for token in text.encode():
        if not stream.stopped:
            shown += stream.push(token)
    assert (stream.found is not None) == stream.stopped == any(each in text for each in stop)
    if stream.found is not None:
        assert stream.found in stop
        assert shown.endswith(stream.found)


def test_text_that_only_begins_like_a_stop_string_is_shown_at_the_end() -> None:
    assert pieces(b"one END", ("ENDING",)) == ["o", "n", "e", " ", "", "", "", "END"]


def test_a_stop_string_may_span_tokens_and_characters_of_several_bytes() -> None:
    assert "".join(pieces("grüße – ende".encode(), ("ße –",))) == "grü"


def test_a_model_without_a_tokenizer_has_no_text() -> None:
    stream = TextStream(TokenIdsOnly().decoder(), StopStrings(("x",)))
    assert stream.push(5) + stream.flush() == ""


def naive(text: str, stop: list[str], ignored: int) -> tuple[int, int] | None:
    """Where the first stop string that is complete ends, and the length of the longest of those."""
    for end in range(ignored + 1, len(text) + 1):
        if lengths := [len(string) for string in stop if text[:end].endswith(string)]:
            return end, max(lengths)
    return None


@given(
    st.lists(st.text("aab", min_size=1, max_size=8) | st.text(min_size=1, max_size=3), max_size=5),
    st.lists(st.text("aaab", max_size=9) | st.text(max_size=3), max_size=9),
    st.integers(0, 12),
)
@example(["aab", "ab", "aabab"], ["aa", "", "baba"], 3)
def test_stop_strings_are_found_as_a_search_of_the_whole_text_finds_them(
    stop: list[str], text: list[str], ignored: int
) -> None:
    """In however many pieces it comes; and what may still become one is all that is held back, and nothing else."""
    automaton, state, known = StopStrings(stop), START, ""
    whole: tuple[int, int] | None = None
    for piece in text:
        state, found = automaton.scan(state, piece, max(0, ignored - len(known)))
        if found is not None:
            whole = (len(known) + found.end, found.length)
            break
        known += piece
        begun = [n for string in stop for n in range(1, len(string)) if known.endswith(string[:n])]
        assert automaton.unfinished(state) == max(begun, default=0)
    assert whole == naive("".join(text), stop, ignored)


class Counting(dict[tuple[int, int], int]):
    """The edges between strings, which are looked at once for each node that a character is compared with."""

    looks = 0

    def get(self, *key: Any) -> Any:
        self.looks += 1
        return super().get(*key)


@pytest.mark.parametrize(
    ("stop", "response"),
    [
        (["a" * length + "b" for length in range(1008, 1024)], "a" * 5000),
        (["a" * length + "b" for length in range(1008, 1024)], ("a" * 1023 + "c") * 4),
        (["ab" * 500 + "c", "ba" * 500 + "c"], "ab" * 2500),
        (["x" * 1024], ("x" * 1023 + "y") * 4),
        (["ab" * 511 + "c" * (at + 1) for at in range(16)], ("ab" * 511 + "b") * 4),
    ],
    ids=["a run", "a run that breaks off", "two that overlap", "one letter", "a period"],
)
def test_a_character_costs_the_same_whatever_the_stop_strings_are(stop: list[str], response: str) -> None:
    automaton = StopStrings(stop)
    automaton._branches = edges = Counting(automaton._branches)
    state, worst = START, 0
    for character in response:
        before = edges.looks
        state, found = automaton.scan(state, character)
        assert found is None
        worst = max(worst, edges.looks - before)
    assert worst <= 32
    assert edges.looks <= 2 * len(response)
