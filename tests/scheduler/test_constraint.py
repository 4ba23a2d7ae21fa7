"""A sequence and its constraint: what one says of the other's tokens."""

from __future__ import annotations

import pytest

from bdh_batch.engine.completion import Completion
from bdh_batch.errors import GenerationFailed, InvalidRequest
from bdh_batch.messages import FinishReason, Outcome, SamplingParams
from tests.scheduler.fakes import FakeText, make_sequence


class Upto:
    """Takes tokens below 100: so many, of which the last completes it."""

    def __init__(self, tokens: int, fault: Exception | None = None) -> None:
        self.taken: list[int] = []
        self.complete = False
        self._tokens = tokens
        self._fault = fault

    def mask(self) -> bytes | None:
        return None

    def accept(self, token: int) -> bool:
        if self._fault is not None:
            raise self._fault
        if token < 100:
            self.taken.append(token)
            self.complete = len(self.taken) == self._tokens
        return token < 100


def constrained(constraint: Upto) -> Completion:
    return Completion([1, 2], 5, SamplingParams(), FakeText(), constraint=constraint)


def test_a_completion_ends_with_the_token_that_completes_it_or_before_one_that_is_refused() -> None:
    completion = constrained(Upto(2))
    assert completion.accept(7).finish_reason is None
    end = completion.accept(8)
    assert (end.tokens, end.finish_reason) == ([8], FinishReason.STOP)
    end = constrained(Upto(2)).accept(100)
    assert (end.tokens, end.finish_reason) == ([], FinishReason.STOP)


def test_what_is_computed_again_is_not_taken_again() -> None:
    constraint = Upto(3)
    sequence = make_sequence([1, 2], 5, completion=constrained(constraint))
    sequence.slot = 0
    sequence.take(sequence.segment(2), Outcome([7]), 0, 1.0)
    sequence.restart()
    segment = sequence.segment(sequence.pending)
    assert (list(segment.tokens), segment.constraint) == ([1, 2, 7], constraint)
    sequence.take(segment, Outcome([8]), 0, 2.0)
    assert constraint.taken == sequence.generated == [7, 8]


@pytest.mark.parametrize(
    ("fault", "error"), [(InvalidRequest("stuck"), InvalidRequest), (KeyError(), GenerationFailed)]
)
def test_a_fault_of_a_constraint_ends_its_completion(fault: Exception, error: type[Exception]) -> None:
    end = constrained(Upto(3, fault)).accept(7)
    assert end.finish_reason is FinishReason.ERROR
    assert isinstance(end.error, error)
