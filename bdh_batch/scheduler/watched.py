"""A sequence whose client wants to see which neurons its tokens fire.

A token fires when it is read, which is in the step after it was drawn. So its delta is held back for that step; and the
last token, which nothing comes after, is read in one step more, in which nothing is drawn.
"""

from __future__ import annotations

from typing import Any

from bdh_batch.messages import Delta, FinishReason, Gathering, Neurons, NeuronsAsked, Outcome, Segment
from bdh_batch.scheduler.sequence import Sequence


class WatchedSequence(Sequence):
    """A sequence that asks for the neurons of the tokens it reads. Each token's are returned once, however often a lost
    state has it read again."""

    watches = True

    def __init__(self, *args: Any, asked: NeuronsAsked, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._top = asked.top
        self._seen = 0 if asked.prompt else len(self.prompt)  # tokens whose neurons are known, or not asked for
        self._neurons: list[Neurons] = []  # known, and not returned yet
        self._held: Delta | None = None  # of the last token, which is not read yet

    @property
    def unwatched(self) -> int:
        return max(0, self._seen - self.computed)

    def segment(self, tokens: int) -> Segment:
        segment = super().segment(tokens)
        if segment.tokens[0] >= 0 and self.unwatched < tokens:
            segment.watch, segment.watch_from = self._top, self.unwatched
        if self._held is not None and self._held.finish_reason is not None:
            segment.sampling = None
        return segment

    def decode_segment(self) -> Segment:
        segment = super().decode_segment()
        if not segment.watch:  # another engine has shown its token's; those of the next ones are to be shown
            self.decoding = None
        return segment

    def take(self, segment: Segment, outcome: Outcome, row: int, now: float) -> Delta | None:
        """As that of `Sequence`, of the token before: the one that was drawn now has yet to be read."""
        if segment.watch:
            self._neurons += outcome.neurons[row]
        waiting = len(self.prompt) + len(self.generated)
        drawn = super().take(segment, outcome, row, now)
        self._seen = max(self._seen, self.computed)
        if self.computed < waiting:  # of what was lost, not all is computed again
            return drawn
        held, self._held = self._held, None
        if drawn is not None and drawn.tokens:
            self._hold(drawn)
            return None if held is None else self._with_neurons(held)
        if held is not None and drawn is not None:  # it ends without one more token
            both = Gathering()
            both.add(held)
            both.add(drawn)
            drawn = both.whole()
        elif held is not None:
            drawn = held
            self.finish_reason, self.error = held.finish_reason, held.error
        return None if drawn is None else self._with_neurons(drawn)

    def resume(self, tokens: Any) -> None:
        super().resume(tokens)
        if tokens:  # with them came what was asked for of the prompt
            self._seen = len(self.prompt) + len(tokens)

    def _hold(self, drawn: Delta) -> None:
        """Keeps the delta of a token until that is read; if it is the last one, the sequence goes on until then."""
        self._held = drawn
        if drawn.finish_reason is not None:
            self.finish_reason, self.decoding = None, None

    def _with_neurons(self, delta: Delta) -> Delta:
        if delta.finish_reason is not FinishReason.ERROR:
            delta.neurons, self._neurons = self._neurons, []
        return delta
