"""What is known of one sequence for its drafts: where its last tokens were before, and how often drafts came true."""

from __future__ import annotations

from bdh_batch.scheduler.ngrams import Ngrams

HOPED = 0.8  # how often a draft token comes true, as long as none was tried
LEARN, REVIVE = 0.2, 0.001  # the weight of one more draft token; and of hope, where a step had no draft
CLASSES = 8  # of how long a match is: by powers of two


class Rates:
    """How often a draft token of one sequence comes true, by the length of the match before it."""

    __slots__ = ("_rates",)

    def __init__(self) -> None:
        self._rates = [HOPED] * CLASSES

    def of(self, matched: int) -> float:
        return self._rates[_class(matched)]

    def learn(self, matched: int, true: int, tried: int) -> None:
        """Of `tried` draft tokens the first `true` were right; those after a wrong one say nothing."""
        for at in range(min(true + 1, tried)):
            which = _class(matched + at)
            self._rates[which] += LEARN * ((at < true) - self._rates[which])

    def revive(self, matched: int) -> None:
        """No draft was tried: what has not come true for long may do so again."""
        which = _class(matched)
        self._rates[which] += REVIVE * (HOPED - self._rates[which])


def _class(matched: int) -> int:
    return min((matched >> 2).bit_length(), CLASSES - 1)


class Drafter:
    """What is known of one sequence for its drafts."""

    __slots__ = ("ngrams", "rates")

    def __init__(self, ngrams: Ngrams) -> None:
        self.ngrams = ngrams
        self.rates = Rates()
