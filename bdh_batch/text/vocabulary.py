"""A model's tokens as llguidance knows them: the text of each, and how a text that is forced is best cut into them.

Tokens that end a text are none of it, and neither are those that are not shown; what they are spelt with can still be
said, by others.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llguidance import LLTokenizer, TokenizerWrapper
from tokenizers import Tokenizer as Library

from bdh_batch.text.hugging_face import HuggingFaceTokenizer
from bdh_batch.text.tokenizer import BYTES, ByteTokenizer, Tokenizer

log = logging.getLogger(__name__)

NOT_KNOWN = "what its tokens say is not known"
NO_BYTES = "not every byte has a token that says no more than it, so that a completion could get stuck"
OF_UTF8 = frozenset(bytes([byte]) for byte in range(BYTES) if byte not in (0xC0, 0xC1) and byte < 0xF5)
NO_SPACE = {"prepend_scheme": "never", "add_prefix_space": False}

Cut = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a model, as the grammar library sees them.

    `ends` are the tokens of the model that end a text, if it has any; where it has none, one stands in for them.
    """

    tokens: LLTokenizer
    size: int
    ends: frozenset[int] = frozenset()

    def text(self, token: int) -> bytes:
        """What `token` adds to a response."""
        hidden = token >= self.tokens.vocab_size or self.tokens.is_special_token(token)
        return b"" if hidden else self.tokens.decode_bytes([token])

    def without_ends(self, mask: bytes) -> bytes:
        left = bytearray(mask)
        for token in self.tokens.eos_tokens:
            left[token >> 3] &= ~(1 << (token & 7))
        return bytes(left)


class _Known:
    """What llguidance asks of a tokenizer: `texts` of tokens, empty where they have none, and a way to `cut` a text."""

    bos_token_id = None

    def __init__(self, texts: Sequence[bytes], ends: Sequence[int], cut: Cut) -> None:
        self.eos_token_id = ends[0]
        count = max(len(texts), max(ends) + 1)
        texts = [*texts, *[b""] * (count - len(texts))]
        self.special_token_ids = [token for token in range(count) if not texts[token] or token in ends]
        self._hidden = frozenset(self.special_token_ids)
        self._texts = texts
        self._ids = {text: token for token, text in enumerate(texts) if token not in self._hidden}
        self._longest = max(map(len, self._ids))
        self._cut = cut
        self.tokens = list(texts)
        for token in self.special_token_ids:
            self.tokens[token] = f"<|{token}|>".encode()

    def __call__(self, text: str) -> Sequence[int]:
        tokens, raw = self._cut(text), text.encode()
        exact = b"".join(self._texts[token] for token in tokens) == raw
        return tokens if exact and self._hidden.isdisjoint(tokens) else self._longest_first(raw)

    def _longest_first(self, text: bytes) -> Sequence[int]:
        """Up to where no token goes on."""
        tokens: list[int] = []
        begin = 0
        while begin < len(text):
            ends = range(min(len(text), begin + self._longest), begin, -1)
            end = next((end for end in ends if text[begin:end] in self._ids), None)
            if end is None:
                break
            tokens.append(self._ids[text[begin:end]])
            begin = end
        return tokens


def vocabulary_of(tokenizer: Tokenizer, size: int, ends: frozenset[int] = frozenset()) -> Vocabulary | str:
    """Returns the vocabulary of a model of `size` tokens, of which `ends` end a text; or why there is none."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return hugging_face_vocabulary(tokenizer, size, sorted(ends))
    return byte_vocabulary(size, sorted(ends)) if isinstance(tokenizer, ByteTokenizer) else NOT_KNOWN


def setup_of(tokenizer: Tokenizer, size: int, ends: frozenset[int] = frozenset()) -> bytes:
    """Returns the data from which `vocabulary_from` makes the same vocabulary in another process."""
    text = tokenizer.json if isinstance(tokenizer, HuggingFaceTokenizer) else None
    return json.dumps({"tokenizer": text, "size": size, "ends": sorted(ends)}).encode()


def vocabulary_from(setup: bytes) -> Vocabulary | str:
    fields = json.loads(setup)
    if fields["tokenizer"] is None:
        return byte_vocabulary(fields["size"], fields["ends"])
    known = HuggingFaceTokenizer(Library.from_str(fields["tokenizer"]), Path("tokenizer.json"))
    return hugging_face_vocabulary(known, fields["size"], fields["ends"])


def byte_vocabulary(size: int, ends: Sequence[int] = ()) -> Vocabulary:
    """Returns the vocabulary of a model of bytes, padded to `size` tokens, whose texts end with one of `ends`."""
    known = list(ends) or [BYTES]
    tokens = _Known([bytes([byte]) for byte in range(BYTES)], known, lambda text: list(text.encode()))
    return Vocabulary(LLTokenizer(TokenizerWrapper(tokens), eos_token=known, slices=[]), size, frozenset(ends))


def hugging_face_vocabulary(tokenizer: HuggingFaceTokenizer, size: int, ends: Sequence[int] = ()) -> Vocabulary | str:
    """Returns the vocabulary of a model of `size` tokens, whose texts end with one of `ends`; or why there is none."""
    texts = [tokenizer.text(token) for token in range(tokenizer.size)]
    if None in texts or not OF_UTF8.issubset(texts):
        log.warning("structured output is not available: %s", NO_BYTES)
        return NO_BYTES
    known = list(ends) or [tokenizer.size]
    said = [text or b"" for text in texts]
    shown = frozenset(token for token, text in enumerate(said) if text and token not in known)
    tokens = _Known(said, known, _inside(json.loads(tokenizer.json), shown))
    return Vocabulary(LLTokenizer(TokenizerWrapper(tokens), eos_token=known), size, frozenset(ends))


def _inside(values: dict[str, Any], shown: frozenset[int]) -> Cut:
    """As a `tokenizer.json` cuts what neither begins a text nor has other added tokens in it than those `shown`."""
    values["added_tokens"] = [token | {"special": token["id"] not in shown} for token in values["added_tokens"]]
    for steps in ("normalizer", "pre_tokenizer"):
        (values[steps],) = _going_on([values[steps]]) or [None]
    library = Library.from_str(json.dumps(values))
    library.encode_special_tokens = True

    def cut(text: str) -> Sequence[int]:
        ids: list[int] = library.encode(text, add_special_tokens=False).ids
        return ids

    return cut


def _going_on(step: Any) -> Any:
    """As `step` of a tokenizer would be if it put nothing in front of a text."""
    if isinstance(step, list):
        return [_going_on(each) for each in step if not (isinstance(each, Mapping) and each.get("type") == "Prepend")]
    if not isinstance(step, Mapping):
        return step
    inner = {name: _going_on(value) for name, value in step.items()}
    return inner | {name: value for name, value in NO_SPACE.items() if name in step}
