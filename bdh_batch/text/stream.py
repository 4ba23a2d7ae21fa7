"""A sequence's text as it may be shown: whole characters, and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from bdh_batch.text.tokenizer import Decoder


class TextStream:
    """Takes tokens, gives text. After a stop string has been met, `stopped` is true and no more text comes.

    Args:
        include_stop: whether the text shows the stop string that ends it.
        min_tokens: a stop string that is complete with these first tokens is none.
    """

    def __init__(
        self, decoder: Decoder, stop: Sequence[str] = (), include_stop: bool = False, min_tokens: int = 0
    ) -> None:
        self.stopped = False
        self.held = ""  # the end of the text, while a stop string may be beginning there
        self._decoder = decoder
        self._stop = tuple(stop)
        self._beginnings = frozenset(each[0] for each in stop)
        self._include_stop = include_stop
        self._early = min_tokens  # tokens that come before one can complete a stop string

    def push(self, token: int) -> str:
        """The text that `token` makes certain."""
        text = self._release(self._decoder.push(token))
        self._early -= 1
        return text

    @property
    def unfinished(self) -> bool:
        """Whether the last character still lacks some of its bytes."""
        return self._decoder.unfinished

    def flush(self) -> str:
        """What is left when no more tokens come."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.flush())
        held, self.held = self.held, ""
        return text + held

    def _release(self, text: str) -> str:
        if not text or (not self.held and self._beginnings.isdisjoint(text)):
            return text
        known, text = len(self.held), self.held + text
        if self._early <= 0 and (cut := self._cut(text, known)) is not None:
            self.stopped, self.held = True, ""
            return text[:cut]
        keep = len(text) - max(_overlap(text, stop) for stop in self._stop)
        self.held = text[keep:]
        return text[:keep]

    def _cut(self, text: str, known: int) -> int | None:
        """Where `text` ends for a stop string that what follows its `known` beginning has completed."""
        found = [(at, stop) for stop in self._stop if (at := text.find(stop, max(0, known - len(stop) + 1))) >= 0]
        if not found:
            return None
        at, stop = min(found, key=lambda each: each[0])
        return at + len(stop) if self._include_stop else at


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
