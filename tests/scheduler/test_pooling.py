"""Sequences whose hidden vectors are summed, among others that generate."""

from __future__ import annotations

import pytest

from bdh_batch.engine.completion import Completion
from bdh_batch.errors import NotFinite
from bdh_batch.messages import FinishReason, SamplingParams
from bdh_batch.scheduler.invariants import check_invariants
from bdh_batch.scheduler.policy import Policy
from bdh_batch.scheduler.scheduler import Scheduler
from bdh_batch.scheduler.sequence import Sequence
from tests.scheduler.fakes import FakeOutbox, FakeRunner, FakeText, expected_tokens, make_sequence

PROMPT = [token % 251 for token in range(1, 101)]


def pooling(prompt: list[int]) -> Sequence:
    return make_sequence(prompt, 0, completion=Completion(prompt, 0, None, FakeText(), pool=True))


def run(scheduler: Scheduler, sequences: list[Sequence], spoil: int | None = None) -> None:
    """To the end; step `spoil` runs out of memory."""
    runner = FakeRunner()
    scheduler.submit(sequences)
    for number in range(1000):
        step = scheduler.plan(float(number))
        if step is None:
            break
        outcome = runner.run(step.plan)
        if number == spoil:
            scheduler.out_of_memory(step)
        else:
            for sequence, delta in scheduler.commit(step, outcome, number + 0.5):
                sequence.client.outbox.put(0, delta)
        check_invariants(scheduler)
    assert not scheduler.has_work


@pytest.mark.parametrize("spoil", [None, 2])
def test_each_gets_the_sum_over_its_whole_prompt_and_disturbs_nobody(spoil: int | None) -> None:
    scheduler = Scheduler(6, 32, Policy(cache_prefixes=True, host_slots=4))
    decoding = make_sequence(PROMPT[:40], 20)
    summed = [pooling(PROMPT), pooling(PROMPT), pooling(PROMPT[:1]), pooling(PROMPT[:2])]
    run(scheduler, [decoding, *summed], spoil)
    assert decoding.generated == expected_tokens(PROMPT[:40], 20)
    for sequence in summed:
        assert isinstance(sequence.client.outbox, FakeOutbox)
        (delta,) = sequence.client.outbox.deltas
        assert (delta.finish_reason, delta.tokens, sequence.prefix.cached) == (FinishReason.STOP, [], 0)
        assert delta.pooled == [float(sum(sequence.prompt)), float(len(sequence.prompt))]


def test_a_sum_that_is_not_finite_is_an_error() -> None:
    completion = Completion([1, 2], 0, None, FakeText(), pool=True)
    assert completion.add([1.0, 2.0], complete=False) is None
    delta = completion.add([float("nan"), 1.0], complete=True)
    assert delta is not None
    assert isinstance(delta.error, NotFinite)


def test_a_token_that_ends_a_text_ends_its_completion_unseen() -> None:
    first, second, *_ = expected_tokens(PROMPT, 2)
    stops = frozenset({second})
    completion = Completion(PROMPT, 20, SamplingParams(), FakeText(), stop_token_ids=stops)
    sequence = make_sequence(PROMPT, 20, completion=completion)
    run(Scheduler(2, 32), [sequence])
    assert (sequence.generated, sequence.finish_reason) == ([first, second], FinishReason.STOP)
    assert isinstance(sequence.client.outbox, FakeOutbox)
    assert "".join(delta.text for delta in sequence.client.outbox.deltas) == chr(0x100 + first)
