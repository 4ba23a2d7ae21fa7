"""What a generation tells of its end, whoever computes it."""

from __future__ import annotations

from bdh_batch.backends.generation import Tally
from bdh_batch.messages import Delta, FinishReason

STOP = Delta("b", [2, 3], FinishReason.STOP)
FAILURE = Delta(finish_reason=FinishReason.ERROR)


def told(tally: Tally) -> list[tuple[int, Delta | None]]:
    found: list[tuple[int, Delta | None]] = []
    tally.on_end(lambda tokens, failure: found.append((tokens, failure)))
    tally.end()
    tally.end()
    return found


def test_its_end_is_told_once_with_all_tokens() -> None:
    tally = Tally(2)
    tally.add([(0, Delta("a", [1])), (1, STOP)])
    assert tally.open == 1
    tally.add([(0, STOP)])
    assert tally.open == 0
    assert told(tally) == [(5, None)]


def test_what_is_open_at_the_end_was_aborted_unless_something_failed_before() -> None:
    tally = Tally(2)
    tally.add([(0, STOP)])
    ((tokens, failure),) = told(tally)
    assert tokens == 2
    assert failure is not None
    assert failure.finish_reason is FinishReason.ABORT
    tally = Tally(2)
    tally.add([(0, FAILURE)])
    assert told(tally) == [(0, FAILURE)]
