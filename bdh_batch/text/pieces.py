"""Finds what each token of a Hugging Face tokenizer adds to a text, so that a stream costs the same for every token.

The library decodes all tokens of a text at once. Its decoders look at no more than whether a token is the first and
whether it is the last; so what a token adds is found once, by decoding it beside a known neighbour, and kept. Bytes are
an exception: those of a character may be spread over tokens, and are put together by an incremental UTF-8 decoder.
Bytes that are not UTF-8 become U+FFFD as Python replaces them, one for each longest prefix of a character.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from bdh_batch.errors import CheckpointError

NEIGHBOUR = "a"
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
LOCAL = frozenset({"Replace", "ByteFallback", "Metaspace", "WordPiece", "BPEDecoder", "Strip"})  # before any Fuse
Step = Mapping[str, Any]


class Piece(NamedTuple):
    """What one token adds to a text."""

    raw: bytes
    tail: bytes = b""  # what follows if another token does


class Pieces:
    """What each token of a vocabulary adds to a text.

    Args:
        skip: tokens that are not shown.

    Raises:
        CheckpointError: a decoder that looks further than a token's neighbours.
    """

    def __init__(self, tokenizer: Tokenizer, skip: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip
        self._known: dict[tuple[int, bool], Piece | None] = {}
        steps = list(_flatten(_specification(tokenizer)))
        kinds = [str(step["type"]) for step in steps]
        self._byte_level = kinds[:1] == ["ByteLevel"]
        self._byte_fallback = "ByteFallback" in kinds
        fused = 1 if self._byte_level else kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
        after = [step for step in steps[fused:] if step["type"] != "Fuse"]
        self.strip = _strip(after)
        if not set(kinds[:fused]) <= (LOCAL | {"ByteLevel"} if fused == 1 else LOCAL):
            raise CheckpointError(f"its decoder ({', '.join(kinds)}) is of a kind that cannot be streamed")
        self._decode = _decoder([step for step in steps[:fused] if step["type"] != "ByteFallback"])

    def of(self, token: int, first: bool) -> Piece | None:
        """What `token` adds to a text, of which it may be the first; None where it is not shown at all."""
        key = (token, first)
        try:
            return self._known[key]
        except KeyError:
            piece = self._known[key] = self._find(token, first)
            return piece

    def _find(self, token: int, first: bool) -> Piece | None:
        name = None if token in self._skip else self._tokenizer.id_to_token(token)
        if name is None:
            return None
        if self._byte_level:
            return Piece(_byte_level(name))
        if self._byte_fallback and (byte := BYTE.fullmatch(name)):
            return Piece(bytes([int(byte[1], 16)]))
        decode = self._decode
        before, after = decode([NEIGHBOUR]), decode([NEIGHBOUR] * 2)
        beside = decode([NEIGHBOUR, name])
        between = decode([NEIGHBOUR, name, NEIGHBOUR])
        tail = between[len(beside) : len(between) - (len(after) - len(before))]
        return Piece((decode([name]) if first else beside[len(before) :]).encode(), tail.encode())


class PieceDecoder:
    """One text's tokens to characters, in constant time each."""

    def __init__(self, pieces: Pieces, first: bool) -> None:
        self._pieces = pieces
        self._first = first
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._tail = b""
        self._padding, self._strip = pieces.strip if first else ("", 0)

    def push(self, token: int) -> str:
        piece = self._pieces.of(token, self._first)
        if piece is None:
            return ""
        text = self._utf8.decode(self._tail + piece.raw)
        self._first, self._tail = False, piece.tail
        return self._unpad(text) if self._strip else text

    @property
    def unfinished(self) -> bool:
        return bool(self._utf8.getstate()[0])

    def flush(self) -> str:
        self._tail = b""
        return self._unpad(self._utf8.decode(b"", final=True))

    def _unpad(self, text: str) -> str:
        while self._strip and text:
            if text[0] != self._padding:
                self._strip = 0
                break
            text, self._strip = text[1:], self._strip - 1
        return text


def _specification(tokenizer: Tokenizer) -> Step | None:
    if tokenizer.decoder is None:
        return None
    values: Step = json.loads(tokenizer.decoder.__getstate__())
    return values


def _flatten(step: Step | None) -> Iterator[Step]:
    if step is None:
        return
    if step["type"] == "Sequence":
        for inner in step["decoders"]:
            yield from _flatten(inner)
    else:
        yield step


def _strip(after: Sequence[Step]) -> tuple[str, int]:
    """The character, and how many of it, that are taken from the start of a whole text."""
    if not after:
        return "", 0
    step, *more = after
    if more or step["type"] != "Strip" or step["stop"]:
        kinds = ", ".join(str(one["type"]) for one in after)
        raise CheckpointError(f"its decoder changes whole texts ({kinds}), which cannot be streamed")
    return str(step["content"]), int(step["start"])


def _decoder(steps: Sequence[Step]) -> Any:
    """Tokens, spelt as in the vocabulary, to a text, by the library's own `steps`."""
    if not steps:
        return " ".join
    empty = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
    decoder = {"type": "Sequence", "decoders": list(steps)}
    return Tokenizer.from_str(json.dumps({"model": empty, "decoder": decoder})).decoder.decode


def _byte_level(name: str) -> bytes:
    """GPT-2's spelling of bytes; an added token that is not spelt so stands for itself."""
    try:
        return bytes(UNSPELL[character] for character in name)
    except KeyError:
        return name.encode()


def _unspell() -> dict[str, int]:
    """Bytes that can be printed spell themselves; the others follow from 256 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + at): byte for at, byte in enumerate(others)}


UNSPELL = _unspell()
