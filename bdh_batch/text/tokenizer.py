"""The interface of tokenizers, the two that need no files, and the decoder that never splits a character."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

from bdh_batch.errors import InvalidRequest
from bdh_batch.messages import Text

BYTES = 256
ASCII = 128  # tokens below it are characters by themselves
NO_BYTE = b"\xff"  # tokens of a vocabulary padded past 256: no text led to them, and they decode as invalid bytes do

CALL = ("<tool_call>", "</tool_call>")  # around a call of a tool, in a response


class Decoder(Protocol):
    """One sequence's tokens to text."""

    @property
    def unfinished(self) -> bool:
        """Whether the last character still lacks some of its bytes."""

    def push(self, token: int, /) -> str:
        """The characters that `token` completes."""

    def flush(self) -> str:
        """What is left at the end; unfinished characters as U+FFFD."""


class Tokenizer(Protocol):
    """JobQueue texts into tokens and back."""

    special: Sequence[str]  # texts that are one token with a meaning of its own, as `<|end|>`

    def encode(self, text: str, add_special: bool = True) -> Sequence[int]:
        """Tokens of `text`; with `add_special` also what belongs around a text, such as one that begins it."""

    def encode_prompt(self, prompt: Text) -> tuple[Sequence[int], tuple[int, ...]]:
        """Tokens of `prompt`, and those of its `ends` that can be determined, as positions among them."""

    def decoder(self, first: bool = False, special: bool = False) -> Decoder:
        """For tokens that continue a text, or, with `first`, begin one; `special` ones are shown, too, if asked for."""

    def name(self, token: int) -> str:
        """How the vocabulary spells `token`; empty where it has no such token."""

    def token_bytes(self, token: int) -> bytes | None:
        """What `token` stands for; None where that is not known."""

    def __hash__(self) -> int:
        """It is always itself: what is found of its tokens may be kept."""


class ByteTokenizer:
    """A token is a byte of UTF-8."""

    special: Sequence[str] = ()

    def encode(self, text: str, add_special: bool = True) -> Sequence[int]:
        return text.encode()

    def encode_prompt(self, prompt: Text) -> tuple[Sequence[int], tuple[int, ...]]:
        return prompt.text.encode(), tuple(len(prompt.text[:end].encode()) for end in prompt.ends)

    def decoder(self, first: bool = False, special: bool = False) -> Decoder:
        return ByteDecoder()

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < BYTES else NO_BYTE

    def name(self, token: int) -> str:
        return chr(token) if 0x20 <= token < 0x7F else f"<0x{token:02X}>" if token < BYTES else ""


class ByteDecoder:
    """Decodes tokens that are bytes of UTF-8."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.unfinished = False

    def push(self, token: int) -> str:
        if token < ASCII and not self.unfinished:  # most tokens, once for each of them
            return chr(token)
        text = self._utf8.decode(bytes([token]) if token < BYTES else NO_BYTE)
        self.unfinished = bool(self._utf8.getstate()[0])
        return text

    def flush(self) -> str:
        self.unfinished = False
        return self._utf8.decode(b"", final=True)


class TokenIdsOnly:
    """The tokenizer of a model that has none: prompts and completions are token ids, and there is no text."""

    special: Sequence[str] = ()

    def encode(self, text: str, add_special: bool = True) -> Sequence[int]:
        raise InvalidRequest("This model has no tokenizer: send token ids, and set return_token_ids.")

    def encode_prompt(self, prompt: Text) -> tuple[Sequence[int], tuple[int, ...]]:
        return self.encode(prompt.text), ()

    def decoder(self, first: bool = False, special: bool = False) -> Decoder:
        return NoText()

    def token_bytes(self, token: int) -> None:
        return None

    def name(self, token: int) -> str:
        return ""


class NoText:
    """The decoder of a model without a tokenizer: no token has a text."""

    unfinished = False

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def decode(tokenizer: Tokenizer, tokens: Sequence[int], special: bool = False) -> tuple[str, list[int]]:
    """The text of `tokens`, and where each one's begins; that of a part of a character where the character does."""
    decoder = tokenizer.decoder(first=True, special=special)
    pieces = [decoder.push(token) for token in tokens]
    begins = list(accumulate(map(len, pieces[:-1]), initial=0))
    return "".join([*pieces, decoder.flush()]), begins
