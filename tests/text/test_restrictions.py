"""What a request's own lists of tokens and texts leave for its responses."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings, strategies as st

from bdh_batch.errors import InvalidRequest
from bdh_batch.messages import Constraint
from bdh_batch.text.restrictions import BannedSequences, Restriction, sequences_of
from bdh_batch.text.tokenizer import ByteTokenizer

few = st.lists(st.integers(0, 3), min_size=1, max_size=5)


def allowed(constraint: Constraint) -> set[int]:
    mask = constraint.mask()
    assert mask is not None
    return {token for token in range(8 * len(mask)) if mask[token >> 3] >> (token & 7) & 1}


def banned_by_definition(sequences: Sequence[Sequence[int]], past: Sequence[int]) -> set[int]:
    """The last token of each sequence whose other tokens are the last that came."""
    fitting = [each for each in sequences if len(each) <= len(past) + 1]
    return {each[-1] for each in fitting if [*past[len(past) - len(each) + 1 :]] == [*each[:-1]]}


@settings(max_examples=300, deadline=None)
@given(st.lists(few, max_size=8), st.lists(st.integers(0, 5), max_size=30), st.none() | st.sets(st.integers(0, 12)))
def test_what_is_banned_is_what_the_definition_bans(
    sequences: list[list[int]], past: list[int], only: set[int] | None
) -> None:
    constraint = Restriction(13, only, sequences).constraint(None)
    for at, token in enumerate([*past, 0]):
        left = (set(range(13)) if only is None else only) - banned_by_definition(sequences, past[:at])
        if not left:
            assert constraint.mask() is None
            with pytest.raises(InvalidRequest, match="leaves no token"):
                constraint.accept(token)
            return
        assert allowed(constraint) == left
        assert constraint.accept(token)  # whether it was allowed or not: what came is what counts
    assert not constraint.complete


def test_a_step_costs_what_is_banned_in_it_and_not_how_much_is_listed() -> None:
    words = [[7] * length for length in range(2, 130)] + [[1, 2, number] for number in range(3, 90)]
    found = BannedSequences(words)
    state = 0
    for _ in range(5):
        state = found.after(state, 1)
        assert found.banned(state) == []
    for run in range(1, 140):
        state = found.after(state, 7)
        assert found.banned(state) == [7] * min(run, 128)


class Digits:
    """An inner constraint: digits, and after three of them the end."""

    def __init__(self) -> None:
        self.taken = 0

    @property
    def complete(self) -> bool:
        return self.taken == 3

    def mask(self) -> bytes | None:
        return sum(1 << digit for digit in b"0123456789").to_bytes(12, "little")

    def accept(self, token: int) -> bool:
        self.taken += 1
        return True


def test_another_constraint_holds_too() -> None:
    constraint = Restriction(256, None, [[*b"1"], [*b"23"]]).constraint(Digits())
    assert allowed(constraint) == {*b"023456789"}
    assert constraint.accept(ord("2"))
    assert allowed(constraint) == {*b"02456789"}
    assert constraint.accept(ord("0"))
    assert not constraint.complete
    assert constraint.accept(ord("0"))
    assert constraint.complete


@pytest.mark.parametrize(
    ("word", "found"),
    [("ab", [b"ab"]), ("  ab", [b"ab"]), (" ", [b" "]), ("\n", [b"\n"]), ("a b", [b"a b"]), ("é", ["é".encode()])],
)
def test_words_are_the_tokens_that_spell_them(word: str, found: list[bytes]) -> None:
    assert sequences_of(word, ByteTokenizer()) == found
