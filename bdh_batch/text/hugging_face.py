"""Any `tokenizer.json`, by Hugging Face's `tokenizers` library."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Encoding, Tokenizer

from bdh_batch.documents import shown
from bdh_batch.errors import CheckpointError
from bdh_batch.messages import Text
from bdh_batch.text.pieces import PieceDecoder, Pieces
from bdh_batch.text.tokenizer import CALL, Decoder

LONG = 4096  # characters
LARGEST = 256 * 2**20  # bytes of a tokenizer.json; those of the largest vocabularies have some thirty MiB
SAMPLES = 256  # tokens of the vocabulary that are decoded both ways at the start


class HuggingFaceTokenizer:
    """
    Args:
        file: is named in errors.

    Raises:
        CheckpointError: its decoder cannot be streamed.
    """

    def __init__(self, tokenizer: Tokenizer, file: Path) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token.content: (number, token) for number, token in added.items() if token.special}
        self.special: Sequence[str] = sorted(self._special, key=len, reverse=True)  # the longest is matched first
        self.size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1  # ids are below it
        try:
            # What a call is written with is text: who reads the answer looks for it.
            hidden = frozenset(number for name, (number, _) in self._special.items() if name not in CALL)
            self._pieces = Pieces(tokenizer, hidden)
            self._check()
        except CheckpointError as error:
            raise CheckpointError(f"{file}: {error}") from error

    def encode(self, text: str, add_special: bool = True) -> Sequence[int]:
        ids: list[int] = _encode(self._tokenizer, text, add_special).ids
        return ids

    def encode_prompt(self, prompt: Text) -> tuple[Sequence[int], tuple[int, ...]]:
        if prompt.mark:
            return self._encode_marked(prompt), ()
        if not prompt.ends:
            return self.encode(prompt.text, prompt.add_special), ()
        encoding = _encode(self._tokenizer, prompt.text, prompt.add_special)
        breaks = [encoding.char_to_token(end) for end in prompt.ends if end < len(prompt.text)]
        return encoding.ids, tuple(at for at in breaks if at)

    def decoder(self, first: bool = False) -> Decoder:
        return PieceDecoder(self._pieces, first)

    def name(self, token: int) -> str:
        return self._tokenizer.id_to_token(token) or ""

    def token_bytes(self, token: int) -> bytes | None:
        piece = self._pieces.of(token, first=False)
        name = self.name(token)
        return piece.raw if piece is not None else name.encode() if name else None

    def text(self, token: int) -> bytes | None:
        """What `token` adds to a text that goes on with it, which may be nothing; None where what follows has a say."""
        piece = self._pieces.of(token, first=False)
        if piece is None:
            return b""
        return None if piece.tail else piece.raw

    @property
    def json(self) -> str:
        """As it would be in a `tokenizer.json`."""
        text: str = self._tokenizer.to_str()
        return text

    def token_id(self, name: str) -> int | None:
        number: int | None = self._tokenizer.token_to_id(name)
        return number

    def _encode_marked(self, prompt: Text) -> Sequence[int]:
        """What a mark precedes is text, whatever it spells; each run of text between special tokens goes by itself."""
        pattern = re.compile(f"({re.escape(prompt.mark)})?({'|'.join(map(re.escape, self.special))})")
        tokens: list[int] = []
        begin, strip = 0, False
        for match in pattern.finditer(prompt.text):
            if match[1]:
                continue
            number, token = self._special[match[2]]
            tokens += self._plain(prompt, prompt.text[begin : match.start()], strip, token.lstrip)
            tokens.append(number)
            begin, strip = match.end(), token.rstrip
        tokens += self._plain(prompt, prompt.text[begin:], strip, False)
        if not prompt.add_special:
            return tokens
        around = self.encode("", add_special=True)  # a template that asks for them has none of its own
        return [*around, *tokens]

    def _plain(self, prompt: Text, text: str, lstrip: bool, rstrip: bool) -> Sequence[int]:
        text = text.replace(prompt.mark, "")
        text = text.lstrip() if lstrip else text
        text = text.rstrip() if rstrip else text
        if not text:
            return []
        ids: list[int] = _encode(self._blind, text, add_special=False).ids
        return ids

    @cached_property
    def _blind(self) -> Tokenizer:
        """A copy that takes special tokens for the text that they are spelt with; few servers ever need it."""
        copy = Tokenizer.from_str(self._tokenizer.to_str())
        copy.encode_special_tokens = True
        return copy

    def _check(self) -> None:
        """Raises CheckpointError where pieces do not add up to what the library decodes."""
        step = max(1, self.size // SAMPLES)
        names = ((token, self.name(token)) for token in range(0, self.size, step))
        tokens = [token for token, name in names if not name.startswith("<0x") and name not in CALL]
        for first in range(0, len(tokens), 16):
            some = tokens[first : first + 16]
            decoder = self.decoder(first=True)
            text = "".join(map(decoder.push, some)) + decoder.flush()
            if text != self._tokenizer.decode(some):
                raise CheckpointError("its decoder is of a kind that cannot be streamed: tokens do not add up to texts")


def _encode(tokenizer: Tokenizer, text: str, add_special: bool) -> Encoding:
    """The call for batches lets other threads run meanwhile, and that for one text does not, but is quicker."""
    if len(text) < LONG:
        return tokenizer.encode(text, add_special_tokens=add_special)
    return tokenizer.encode_batch([text], add_special_tokens=add_special)[0]


def load_hugging_face(file: Path) -> HuggingFaceTokenizer:
    """
    Raises:
        CheckpointError: not a tokenizer that the library can read, or that can be streamed.
    """
    if (size := file.stat().st_size) > LARGEST:
        raise CheckpointError(f"{file}: has {size:,} bytes; a tokenizer has {LARGEST:,} at most")
    try:
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.encode("What cannot be encoded is found now, and not by a request.")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises nothing more specific, and its panics are not even Exceptions
        raise CheckpointError(f"{file}: not a tokenizer that can be read ({shown(error)})") from error
    return HuggingFaceTokenizer(tokenizer, file)
