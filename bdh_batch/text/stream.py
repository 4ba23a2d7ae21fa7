"""A sequence's text as it may be shown: whole characters, and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from bdh_batch.text.tokenizer import Decoder


class TextStream:
    """Takes tokens, gives text. After a stop string has been met, `stopped` is true and no more text comes."""

    def __init__(self, decoder: Decoder, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._decoder = decoder
        self._stop = tuple(stop)
        self._held = ""  # the end of the text, while a stop string may be beginning there

    def push(self, token: int) -> str:
        """The text that `token` makes certain."""
        return self._release(self._decoder.push(token))

    def flush(self) -> str:
        """What is left when no more tokens come."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.flush())
        held, self._held = self._held, ""
        return text + held

    def _release(self, text: str) -> str:
        if not self._stop or not text:
            return text
        text = self._held + text
        cut = min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=None)
        if cut is not None:
            self.stopped, self._held = True, ""
            return text[:cut]
        keep = len(text) - max(_overlap(text, stop) for stop in self._stop)
        self._held = text[keep:]
        return text[:keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
