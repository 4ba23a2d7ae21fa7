"""Drafts: what is found to go on with, and when it is tried."""

from __future__ import annotations

import random
from array import array

import pytest
from hypothesis import given, strategies as st

from bdh_batch.engine.completion import Completion
from bdh_batch.messages import LogitsProcessors, Outcome, Plan, SamplingParams, Segment
from bdh_batch.scheduler.cost import CERTAIN, StepCost
from bdh_batch.scheduler.drafts import NO_DRAFTS, DraftPolicy, Drafts
from bdh_batch.scheduler.ngrams import CAUGHT_UP, MOST_SLOTS, Ngrams
from bdh_batch.scheduler.sequence import Sequence
from tests.scheduler.fakes import FakeText, make_sequence

TEXT = [1, 2, 3, 4, 5, 6, 7, 8]


@given(tokens=st.lists(st.integers(0, 2), max_size=60), least=st.integers(1, 4), split=st.integers(0, 60))
def test_a_match_is_of_the_last_tokens_and_goes_on_as_it_did_there(tokens: list[int], least: int, split: int) -> None:
    ngrams = Ngrams(least, 100)
    while len(ngrams._tokens) < len(tokens):
        ngrams.follow(tokens[:split], tokens[split:])
    found = ngrams.follow(tokens[:split], tokens[split:])
    assert found == (ngrams.matched > 0)
    if found:
        assert ngrams.matched >= least
        source, end = ngrams._source, len(tokens)
        assert tokens[source - ngrams.matched : source] == tokens[end - ngrams.matched :]
        for token in ngrams.draft(10):  # what reaches up to the end repeats itself
            assert token == tokens[source]
            tokens, source = [*tokens, token], source + 1


def test_the_index_is_bounded_and_takes_a_long_prompt_bit_by_bit() -> None:
    prompt = random.Random(0).choices(range(100_000), k=CAUGHT_UP * 3)
    ngrams = Ngrams(4, 10**12)
    assert len(ngrams._table) == MOST_SLOTS
    assert [ngrams.follow([*prompt, *prompt[:5]], []) for _ in range(4)] == [False, False, False, True]
    assert ngrams.draft(3) == prompt[5:8]


def stream(prompt: list[int], **options: object) -> tuple[Sequence, Segment]:
    completion = Completion(prompt, 100, SamplingParams(), FakeText(), **options)  # type: ignore[arg-type]
    sequence = make_sequence(prompt, 100, completion=completion)
    sequence.generated, sequence.computed, sequence.slot = [TEXT[0]], len(prompt), 0
    return sequence, sequence.decode_segment()


def drafts(stream_share: float = 0.1, most: int = 6, **policy: int) -> Drafts:
    """Steps take a second, of which each stream has so much."""
    cost = StepCost()
    for count in [1, 2, 3, 4] * CERTAIN:
        cost.observe(count, 0, 1 - stream_share + stream_share * count)
    return Drafts(DraftPolicy(most, 4, **policy), cost)


def propose(made: Drafts, *streams: tuple[Sequence, Segment]) -> list[list[int]]:
    made.propose([sequence for sequence, _ in streams], [segment for _, segment in streams])
    found = [[*segment.draft] for _, segment in streams]
    for _, segment in streams:
        segment.draft = ()
    return found


def test_text_that_repeats_has_drafts_and_other_text_has_none() -> None:
    repeats, other = stream([*TEXT, *TEXT]), stream([*range(50, 70)])
    assert propose(drafts(), repeats) == [TEXT[1:3]]
    assert propose(drafts(), other) == [[]]
    assert propose(drafts(), repeats, other) == [[], []], "no stream loses time for another's drafts"
    assert propose(Drafts(NO_DRAFTS, drafts()._cost), repeats) == [[]]


def test_drafts_leave_a_step_no_larger_than_the_kernels_take() -> None:
    made = drafts(most=64, step=100)
    made._each = 1e-9
    many = [stream([*TEXT, *TEXT]) for _ in range(24)]
    assert {len(draft) for draft in propose(made, *many)} == {3}


def test_a_draft_ends_before_a_stop_token_a_block_and_the_last_token() -> None:
    made = drafts()
    made._each = 1e-9  # they take next to nothing
    assert propose(made, stream([*TEXT, *TEXT])) == [TEXT[1:7]]
    assert propose(made, stream([*TEXT, *TEXT], stop_token_ids=frozenset({4}))) == [TEXT[1:3]]
    made = drafts(block=20)  # the next token is at 16
    made._each = 1e-9
    assert propose(made, stream([*TEXT, *TEXT])) == [TEXT[1:4]]
    almost, segment = stream([*TEXT, *TEXT])
    almost.completion.max_tokens = 3
    assert propose(made, (almost, segment)) == [TEXT[1:2]]


@pytest.mark.parametrize("field", ["presence_penalty", "frequency_penalty"])
def test_what_depends_on_the_tokens_just_before_has_no_drafts(field: str) -> None:
    processors = LogitsProcessors.of(SamplingParams(**{field: 0.5}), TEXT, array("q"), 0)  # type: ignore[arg-type]
    assert propose(drafts(), stream([*TEXT, *TEXT], processors=processors)) == [[]]


def test_drafts_that_do_not_come_true_are_given_up_and_tried_again_seldom() -> None:
    made, (sequence, segment) = drafts(), stream([*TEXT, *TEXT])
    tried = 0
    for _ in range(300):
        [draft] = propose(made, (sequence, segment))
        if draft:
            tried += len(draft)
            segment.draft = draft
            made.verify([sequence], Plan([segment], drafts=len(draft)), Outcome([0]))
            segment.draft = ()  # as its sequence does
    assert 2 <= tried <= 12
    assert (made.counts.tokens, made.counts.accepted) == (tried, 0)


def test_drafts_that_take_too_long_are_given_up() -> None:
    made, repeats = drafts(), stream([*TEXT, *TEXT])
    tried = 0
    for _ in range(300):
        [draft] = propose(made, repeats)
        if draft:
            tried += 1
            made.computed(Plan([], drafts=len(draft)), 1, 1.0 + 2.0 * len(draft))
    assert tried < 15
