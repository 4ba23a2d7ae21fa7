"""Restricts the tokens of a completion by the lists of its request: `allowed_token_ids` and `bad_words`.

What they allow is a bit per token, made once for a request. A sequence of tokens that must not come is banned at its
last token, where the response ends with the others (as in vLLM); an automaton says in one step where that is so.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from bdh_batch.errors import InvalidRequest
from bdh_batch.messages import Constraint
from bdh_batch.text.stop_strings import START, StopStrings
from bdh_batch.text.tokenizer import Tokenizer

UNKNOWN = -1


def sequences_of(word: str, tokenizer: Tokenizer) -> list[Sequence[int]]:
    """The sequences of tokens that spell `word`: at the start of a text, and behind a space where that is one token
    with what follows, as vLLM has them."""
    text = word.lstrip() or word
    plain = tokenizer.encode(text, add_special=False)
    spaced = tokenizer.encode(f" {text}", add_special=False)
    differs = word.strip() and len(spaced) == len(plain) and spaced[0] != plain[0]
    return [each for each in ((plain, spaced) if differs else (plain,)) if each]


class BannedSequences(StopStrings):
    """Sequences of tokens that must not come: each is a string to the automaton, with a character for each token."""

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        strings = {"".join(map(chr, sequence)) for sequence in sequences}
        super().__init__(sorted(strings))
        self._last: dict[int, list[int]] = {}  # by the node of what comes before, the tokens that complete a sequence
        for string in strings:
            node = START
            for code in map(ord, string[:-1]):
                node = self._after(node, code)
            self._last.setdefault(node, []).append(ord(string[-1]))
        self._next = array("i", [UNKNOWN]) * len(self._shorter)  # the longest end of a node's text that is in `_last`
        for node in range(len(self._next)):
            self._find_next(node)

    def after(self, state: int, token: int) -> int:
        return self._after(state, token)

    def banned(self, state: int) -> list[int]:
        """The tokens that must not come now, but for those that never may."""
        found: list[int] = []
        while state != START:
            found += self._last.get(state, ())
            state = self._next[state]
        return found

    @property
    def never(self) -> Sequence[int]:
        """The tokens that are sequences by themselves."""
        return self._last.get(START, ())

    def _find_next(self, node: int) -> None:
        path = []
        while self._next[node] == UNKNOWN:
            path.append(node)
            node = self._shorter[node]
            if node == START or node in self._last:
                break
        else:
            node = self._next[node]
        for passed in path:
            self._next[passed] = node


class Restriction:
    """The restriction that all completions of one request share.

    Args:
        size: of the vocabulary.
        allowed: the tokens that may come; None is all.
        banned: sequences that may not.
    """

    def __init__(self, size: int, allowed: Iterable[int] | None, banned: Sequence[Sequence[int]]) -> None:
        self.banned = BannedSequences(banned)
        self.param = "bad_words" if banned else "allowed_token_ids"  # what leaves no token, where none is left
        bits = bytearray(-(-size // 8)) if allowed is not None else bytearray(b"\xff") * -(-size // 8)
        for token in allowed or ():
            bits[token >> 3] |= 1 << (token & 7)
        bits[-1] &= 0xFF >> (-size & 7)  # what is beyond the vocabulary is no way out
        self._bits = _without(bits, self.banned.never)

    @property
    def allows_any(self) -> bool:
        """Whether there is a token to begin with."""
        return any(self._bits)

    def constraint(self, inner: Constraint | None) -> Constraint:
        """For one response, which may have to satisfy another constraint, too."""
        return RestrictedConstraint(self, inner)

    def bits(self, state: int) -> bytes:
        """What may come in a state of `banned`."""
        banned = self.banned.banned(state)
        return _without(bytearray(self._bits), banned) if banned else self._bits


class RestrictedConstraint:
    """One completion's way through a restriction and, if there is one, through an inner constraint."""

    def __init__(self, restriction: Restriction, inner: Constraint | None) -> None:
        self._restriction = restriction
        self._inner = inner
        self._state = START
        self._stuck = False

    @property
    def complete(self) -> bool:
        return self._inner is not None and self._inner.complete

    def mask(self) -> bytes | None:
        bits = self._restriction.bits(self._state)
        inner = None if self._inner is None else self._inner.mask()
        if inner is not None:
            bits = _both(bits, inner)
        self._stuck = not any(bits)
        return None if self._stuck else bits

    def accept(self, token: int) -> bool:
        if self._stuck:
            param = self._restriction.param
            raise InvalidRequest(f"The completion cannot go on: {param} leaves no token for it.", param)
        if self._inner is not None and not self._inner.accept(token):
            return False
        self._state = self._restriction.banned.after(self._state, token)
        return True


def _without(bits: bytearray, tokens: Iterable[int]) -> bytes:
    for token in tokens:
        bits[token >> 3] &= ~(1 << (token & 7))
    return bytes(bits)


def _both(one: bytes, other: bytes) -> bytes:
    """The bits that both have; the shorter one has none beyond its end."""
    size = min(len(one), len(other))
    return (int.from_bytes(one[:size], "little") & int.from_bytes(other[:size], "little")).to_bytes(size, "little")
