"""Counts the tokens of texts: exactly with a tokenizer, else by their length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bdh_batch.text.tokenizer import Tokenizer

BYTES_A_TOKEN = 4  # of UTF-8, about, for the tokenizers in use


class TokenCount:
    """Counts the tokens of one choice as its text comes.

    `estimated` says whether a part of the count is an estimate.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.estimated = False
        self._bytes = 0  # of the text that no exact number is known of
        self._guessed = 0  # tokens that it counts as

    def add(self, text: str, exact: int | None) -> int:
        """Returns how many tokens more there are."""
        if exact is not None:
            self.tokens += exact
            return exact
        self._bytes += len(text.encode())
        new = estimate(self._bytes) - self._guessed
        self._guessed += new
        self.tokens += new
        self.estimated = self.estimated or bool(text)
        return new

    def report(self, tokens: int, estimated: bool = False) -> None:
        """Takes the upstream's own number, or that of a tokenizer."""
        self.tokens, self.estimated = tokens, estimated


def estimate(size: int) -> int:
    """Returns about how many tokens a text of `size` bytes has: one, where it is not empty."""
    return -(-size // BYTES_A_TOKEN)


def encoded_length(tokenizer: Tokenizer, text: str, add_special: bool) -> int:
    """Returns the number of tokens of a text."""
    return len(tokenizer.encode(text, add_special))


def conversation_size(messages: Sequence[Mapping[str, Any]]) -> int:
    """Returns the bytes of all texts of a conversation."""
    return sum(len(text.encode()) for message in messages for text in texts_of(message.get("content")))


def texts_of(content: object) -> list[str]:
    """Returns the texts of a message's content: a text, or a list of parts."""
    if isinstance(content, str):
        return [content]
    parts = content if isinstance(content, list) else []
    found = [part.get("text") or part.get("refusal") for part in parts if isinstance(part, dict)]
    return [text for text in found if isinstance(text, str)] + [part for part in parts if isinstance(part, str)]
