"""A sequence's text as it may be shown: whole characters, and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from bdh_batch.text.tokenizer import Decoder


class TextStream:
    """Takes tokens, gives text. After a stop string has been met, `stopped` is true and no more text comes.

    Args:
        include_stop: whether the text shows the stop string that ends it.
        min_tokens: a stop string that is complete with these first tokens is none.
        before: a text, if any, up to which stop strings are looked for; it and what follows it have none.
    """

    def __init__(
        self,
        decoder: Decoder,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        before: str = "",
    ) -> None:
        self.stopped = False
        self._held = ""  # the end of the text, while a stop string may be beginning there
        self._before = before
        self._coming = ""  # what comes after that, while what has no stop strings in it may be beginning there
        self._stale = 0  # characters of that which came too early to complete a stop string
        self._decoder = decoder
        self._stop = tuple(stop)
        self._beginnings = frozenset(each[0] for each in stop)
        self._include_stop = include_stop
        self._early = min_tokens  # tokens that come before one can complete a stop string

    def push(self, token: int) -> str:
        """The text that `token` makes certain."""
        text = self._take(self._decoder.push(token))
        self._early -= 1
        return text

    @property
    def held(self) -> str:
        """Text that is known but not certain."""
        return self._held + self._coming

    @property
    def unfinished(self) -> bool:
        """Whether the last character still lacks some of its bytes."""
        return self._decoder.unfinished

    def flush(self) -> str:
        """What is left when no more tokens come."""
        if self.stopped:
            return ""
        text = self._take(self._decoder.flush())
        coming, self._coming = self._coming, ""
        text += self._release(coming, self._stale)
        held, self._held = self._held, ""
        return text + held

    def _take(self, text: str) -> str:
        if not self._stop:
            return text
        text = self._coming + text
        if self._early > 0:
            self._stale = len(text)
        begun = text.find(self._before) if self._before else -1
        end = len(text) - _overlap(text, self._before) if begun < 0 else begun
        stale, self._stale = min(self._stale, end), max(0, self._stale - end)
        self._coming = text[end:]
        shown = self._release(text[:end], stale)
        if begun < 0 or self.stopped:
            return shown
        shown += self.held
        self._held, self._coming, self._stop = "", "", ()
        return shown

    def _release(self, text: str, stale: int) -> str:
        if not text or (not self._held and self._beginnings.isdisjoint(text)):
            return text
        known, text = len(self._held) + stale, self._held + text
        if (cut := self._cut(text, known)) is not None:
            self.stopped, self._held, self._coming = True, "", ""
            return text[:cut]
        keep = len(text) - max(_overlap(text, stop) for stop in self._stop)
        self._held = text[keep:]
        return text[:keep]

    def _cut(self, text: str, known: int) -> int | None:
        """Where `text` ends for a stop string that what follows its `known` beginning has completed: the first that is
        complete, and of those the longest, in however many pieces the text comes."""
        found = [(at, stop) for stop in self._stop if (at := text.find(stop, max(0, known - len(stop) + 1))) >= 0]
        if not found:
            return None
        at, stop = min(found, key=lambda each: (each[0] + len(each[1]), each[0]))
        return at + len(stop) if self._include_stop else at


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
