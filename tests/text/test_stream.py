from __future__ import annotations

from hypothesis import example, given, strategies as st

from bdh_batch.text.stream import TextStream
from bdh_batch.text.tokenizer import ByteTokenizer, TokenIdsOnly

TOKENIZER = ByteTokenizer()


def pieces(tokens: bytes | list[int], stop: tuple[str, ...] = (), early: int = 0, before: str = "") -> list[str]:
    """What a stream shows for each token, until it stops, and at its end."""
    stream = TextStream(TOKENIZER.decoder(), stop, min_tokens=early, before=before)
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


def test_text_that_only_begins_like_a_stop_string_is_shown_at_the_end() -> None:
    assert pieces(b"one END", ("ENDING",)) == ["o", "n", "e", " ", "", "", "", "END"]


def test_a_stop_string_may_span_tokens_and_characters_of_several_bytes() -> None:
    assert "".join(pieces("grüße – ende".encode(), ("ße –",))) == "grü"


def test_a_model_without_a_tokenizer_has_no_text() -> None:
    stream = TextStream(TokenIdsOnly().decoder(), ("x",))
    assert stream.push(5) + stream.flush() == ""
