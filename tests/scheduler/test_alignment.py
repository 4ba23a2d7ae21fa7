"""Logprobs wait for their tokens' text."""

from __future__ import annotations

from hypothesis import given, strategies as st

from bdh_batch.engine.completion import Completion
from bdh_batch.messages import Delta, Gathering, SamplingParams, TokenLogprob
from bdh_batch.text.stop_strings import StopStrings
from bdh_batch.text.stream import TextStream
from bdh_batch.text.tokenizer import ByteTokenizer, TokenIdsOnly, decode

TOKENIZER = ByteTokenizer()


def deltas(
    tokens: bytes, stop: tuple[str, ...] = (), stop_tokens: frozenset[int] = frozenset(), show: bool = False
) -> list[Delta]:
    """What a completion gains from these tokens, one by one, until it ends."""
    completion = Completion(
        prompt=[1],
        max_tokens=len(tokens),
        sampling=SamplingParams(logprobs=0),
        text=TextStream(TOKENIZER.decoder(), StopStrings(stop), show),
        stop_token_ids=stop_tokens,
        show_stop_token=show,
    )
    gained = []
    for index, token in enumerate(tokens):
        gained.append(completion.accept(token, TokenLogprob(token, -float(index), ())))
        if gained[-1].finish_reason is not None:
            break
    return gained


@given(
    st.one_of(st.text(max_size=12).map(str.encode), st.binary(max_size=12)).filter(bool),
    st.lists(st.text(min_size=1, max_size=3), max_size=3),
    st.booleans(),
)
def test_logprobs_come_in_order_with_the_text_and_never_before(tokens: bytes, stop: list[str], show: bool) -> None:
    gained = deltas(tokens, tuple(stop), show=show)
    gathering = Gathering()
    for delta in gained:
        gathering.add(delta)
        assert all(begin < len(gathering.whole().text) for begin, _ in delta.logprobs or ())
    whole = gathering.whole()
    entries = whole.logprobs or []
    known = tokens[: len(gained)]
    text, begins = decode(TOKENIZER, known)
    assert text.startswith(whole.text)
    # All tokens that have a part in the text are returned, and no others.
    assert [begin for begin, _ in entries] == [begin for begin in begins if begin < len(whole.text)]
    assert [entry.token for _, entry in entries] == list(known[: len(entries)])
    assert whole.logprob == -sum(range(len(gained)))


@given(st.text("ab", min_size=1, max_size=9), st.booleans())
def test_a_token_that_stops_is_returned_only_where_it_is_shown(text: str, show: bool) -> None:
    gained = deltas(text.encode(), stop_tokens=frozenset(b"b"), show=show)
    known = text[: text.index("b") + show] if "b" in text else text
    assert "".join(delta.text for delta in gained) == known
    assert [entry.token for delta in gained for _, entry in delta.logprobs or ()] == list(known.encode())
    assert sum(len(delta.tokens) for delta in gained) == len(known) + ("b" in text and not show)


def test_a_token_without_any_text_is_returned_at_once() -> None:
    completion = Completion([1], 3, SamplingParams(logprobs=0), TextStream(TokenIdsOnly().decoder()))
    for token in (5, 6, 7):
        delta = completion.accept(token, TokenLogprob(token, -1.0, ()))
        assert [entry.token for _, entry in delta.logprobs or ()] == [token]
