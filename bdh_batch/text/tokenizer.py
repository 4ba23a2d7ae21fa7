"""Tokenizers, and the incremental decoders that turn a stream of tokens into text which never splits a character."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from bdh_batch.errors import CheckpointError, InvalidRequest

BYTES = 256
NO_BYTE = b"\xff"  # tokens of a vocabulary padded past 256: no text led to them, and they decode as invalid bytes do


class Decoder(Protocol):
    """One sequence's tokens to text."""

    @property
    def unfinished(self) -> bool:
        """Whether the last character still lacks some of its bytes."""

    def push(self, token: int) -> str:
        """The characters that `token` completes."""

    def flush(self) -> str:
        """What is left at the end; unfinished characters as U+FFFD."""


class Tokenizer(Protocol):
    def encode(self, text: str) -> Sequence[int]: ...

    def decoder(self) -> Decoder: ...

    def token_bytes(self, token: int) -> bytes | None:
        """What `token` stands for; None where that is not known."""


class ByteTokenizer:
    """A token is a byte of UTF-8."""

    def encode(self, text: str) -> Sequence[int]:
        return text.encode()

    def decoder(self) -> Decoder:
        return ByteDecoder()

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < BYTES else NO_BYTE


class ByteDecoder:
    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(bytes([token]) if token < BYTES else NO_BYTE)

    @property
    def unfinished(self) -> bool:
        return bool(self._utf8.getstate()[0])

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class TokenIdsOnly:
    """For a model whose tokenizer is not known: prompts and answers are token ids, and there is no text."""

    def encode(self, text: str) -> Sequence[int]:
        raise InvalidRequest("This model has no tokenizer: send token ids, and ask for return_token_ids.")

    def decoder(self) -> Decoder:
        return NoText()

    def token_bytes(self, token: int) -> None:
        return None


class NoText:
    unfinished = False

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def load_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a model folder; without one, a vocabulary of 256 is bytes and any other is token ids only.

    Raises:
        CheckpointError: the folder asks for a tokenizer that cannot be had.
    """
    if (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder / 'tokenizer.json'}: Hugging Face tokenizers cannot be served yet")
    config = folder / "tokenizer_config.json"
    kind = _kind(config) if config.is_file() else "byte" if vocab_size == BYTES else None
    if kind is None:
        return TokenIdsOnly()
    if kind != "byte":
        raise CheckpointError(f'{config}: type is {kind!r}; "byte" is what can be served')
    if vocab_size < BYTES:
        raise CheckpointError(f"{config}: a byte tokenizer needs a vocabulary of 256; the model has {vocab_size}")
    return ByteTokenizer()


def _kind(config: Path) -> object:
    try:
        values = json.loads(config.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{config}: not JSON ({error})") from error
    return values.get("type") if isinstance(values, dict) else values
