"""Logprobs of tokens wait for the tokens' text: shown before it, they would reveal it."""

from __future__ import annotations

from bdh_batch.messages import TokenScore

Shown = list[tuple[int, TokenScore]]  # each with where its token's text begins


class Alignment:
    """Aligns the logprobs of one completion with its text. Tokens come in order, each with its effect on the text.

    The tokens of one character are shown with it, and all begin where it does.

    Args:
        shown: characters of the completion that are shown already; none is held back.
    """

    def __init__(self, shown: int = 0) -> None:
        self._shown = shown
        self._known = shown  # with those that are held back
        self._waiting: list[tuple[int, int, TokenScore]] = []  # begin, end

    def push(self, score: TokenScore, text: str, held: str, unfinished: bool) -> Shown:
        """The scores that may be shown now that `text` is.

        Args:
            held: text that is known and not shown.
            unfinished: whether the last character lacks some of its bytes.
        """
        begin = self._known
        self._shown += len(text)
        self._known = self._shown + len(held)
        self._waiting.append((begin, self._known, score))
        ready = 0
        for begin, end, _ in self._waiting:
            if end > self._shown or (begin == self._shown and (held or unfinished)):
                break
            ready += 1
        return self._release(ready)

    def end(self, score: TokenScore, text: str, cut: bool, hidden: bool) -> Shown:
        """The scores that are left to show at the completion's last token.

        Args:
            cut: whether the text ends before the last token's, at a stop string.
            hidden: whether the last token's text is not shown at all.
        """
        self._waiting.append((self._known, self._known, score))
        self._shown += len(text)
        ready = len(self._waiting) - hidden
        if cut:
            ready = sum(begin < self._shown for begin, *_ in self._waiting)
        return self._release(ready)

    def _release(self, ready: int) -> Shown:
        shown = [(begin, score) for begin, _, score in self._waiting[:ready]]
        del self._waiting[:ready]
        return shown
