"""A sequence's text as it may be shown: whole characters, and never a part of a stop string."""

from __future__ import annotations

from bdh_batch.text.stop_strings import START, StopStrings
from bdh_batch.text.tokenizer import Decoder

NO_STOPS = StopStrings(())


class TextStream:
    """Takes tokens, gives text. After a stop string has been met, `stopped` is true, `found` is that string, and no
    more text comes.

    Args:
        stop: the stop strings, which the streams of one request share.
        include_stop: whether the text shows the stop string that ends it.
        min_tokens: a stop string that is complete with these first tokens is none.
        before: a text, if any, up to which stop strings are looked for; it and what follows it have none.
    """

    def __init__(
        self,
        decoder: Decoder,
        stop: StopStrings = NO_STOPS,
        include_stop: bool = False,
        min_tokens: int = 0,
        before: str = "",
    ) -> None:
        self.stopped = False
        self.found: str | None = None
        self._held = ""  # the end of the text, while it may be a prefix of a stop string
        self._before = before
        self._coming = ""  # what comes after that, while it may be a prefix of the text that has no stop strings
        self._stale = 0  # characters of that which came too early to complete a stop string
        self._decoder = decoder
        self._stop = stop or NO_STOPS  # compared by identity, as is done for every token
        self._state = START  # of the stop strings, after the text that is held
        self._include_stop = include_stop
        self._early = min_tokens  # tokens that come before one can complete a stop string

    def push(self, token: int) -> str:
        """Returns the text that a token makes certain. Without stop strings, that is what it decodes to."""
        text = self._decoder.push(token)
        if self._stop is not NO_STOPS:
            text = self.add(text)
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
        text = self.add(self._decoder.flush())
        coming, self._coming = self._coming, ""
        text += self._release(coming, self._stale)
        held, self._held = self._held, ""
        return text + held

    def add(self, text: str) -> str:
        """The text that more of it makes certain, where it comes without tokens."""
        if self._stop is NO_STOPS:
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
        self._held, self._coming, self._stop, self._state = "", "", NO_STOPS, START
        return shown

    def _release(self, text: str, stale: int) -> str:
        """What is certain after `text`; no stop string is complete in its first `stale` characters."""
        self._state, found = self._stop.scan(self._state, text, stale)
        if found is not None:
            whole = (self._held + text)[: len(self._held) + found.end]
            begin = len(whole) - found.length
            self.found = whole[begin:]
            shown = whole if self._include_stop else whole[:begin]
            self.stopped, self._held, self._coming = True, "", ""
            return shown
        text = self._held + text
        certain = len(text) - self._stop.unfinished(self._state)
        self._held = text[certain:]
        return text[:certain]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a prefix of `stop`, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
