"""Holds logprobs of tokens back until the tokens' text is returned, as they would reveal it before."""

from __future__ import annotations

from bdh_batch.messages import TokenLogprob

Shown = list[tuple[int, TokenLogprob]]  # each with where its token's text begins


class Alignment:
    """Aligns the logprobs of one completion with its text. Tokens come in order, each with its effect on the text.

    The tokens of one character are shown with it, and all begin where it does.

    Args:
        shown: characters of the completion that are shown already; none is held back.
    """

    def __init__(self, shown: int = 0) -> None:
        self._shown = shown
        self._known = shown  # with those that are held back
        self._waiting: list[tuple[int, int, TokenLogprob]] = []  # begin, end

    def push(self, logprob: TokenLogprob, text: str, held: str, unfinished: bool) -> Shown:
        """Adds a token's logprobs, and returns those that may be shown now that `text` is.

        Args:
            held: text that is known and not shown.
            unfinished: whether the last character lacks some of its bytes.
        """
        begin = self._known
        self._shown += len(text)
        self._known = self._shown + len(held)
        self._waiting.append((begin, self._known, logprob))
        ready = 0
        for begin, end, _ in self._waiting:
            if end > self._shown or (begin == self._shown and (held or unfinished)):
                break
            ready += 1
        return self._release(ready)

    def end(self, logprob: TokenLogprob, text: str, cut: bool, hidden: bool) -> Shown:
        """Adds the last token's logprobs, and returns all that are left to show.

        Args:
            cut: whether the text ends before the last token's, at a stop string.
            hidden: whether the last token's text is not shown at all.
        """
        self._waiting.append((self._known, self._known, logprob))
        self._shown += len(text)
        ready = len(self._waiting) - hidden
        if cut:
            ready = sum(begin < self._shown for begin, *_ in self._waiting)
        return self._release(ready)

    def _release(self, ready: int) -> Shown:
        shown = [(begin, logprob) for begin, _, logprob in self._waiting[:ready]]
        del self._waiting[:ready]
        return shown
