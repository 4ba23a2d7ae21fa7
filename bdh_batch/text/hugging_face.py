"""Any `tokenizer.json`, by Hugging Face's `tokenizers` library."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import zip_longest
from pathlib import Path

from tokenizers import Encoding, Tokenizer

from bdh_batch.errors import CheckpointError
from bdh_batch.messages import Text
from bdh_batch.system.documents import shown
from bdh_batch.text.pieces import PieceDecoder, Pieces
from bdh_batch.text.tokenizer import CALL, Decoder

LONG = 4096  # characters
LARGEST = 256 * 2**20  # bytes of a tokenizer.json; those of the largest vocabularies have some thirty MiB
UNKNOWN = "\U0010fffd"  # a character that no vocabulary has
SAMPLES = 256  # tokens of the vocabulary that are decoded both ways at the start


class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` library.

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
        # What stands for unknown characters is special, too, and comes of any text.
        unknown = tokenizer.encode(UNKNOWN, add_special_tokens=False).ids
        self._special_ids = frozenset(number for number, _ in self._special.values()).difference(unknown)
        self.special: Sequence[str] = sorted(self._special, key=len, reverse=True)  # the longest is matched first
        self.size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1  # ids are below it
        try:
            # The markers of a tool call are text: the parser of calls looks for them.
            hidden = frozenset(number for name, (number, _) in self._special.items() if name not in CALL)
            self._pieces = Pieces(tokenizer, hidden)
            self._check()
        except CheckpointError as error:
            raise CheckpointError(f"{file}: {error}") from error

    def encode(self, text: str, add_special: bool = True) -> Sequence[int]:
        ids: list[int] = _encode(self._tokenizer, text, add_special).ids
        return ids

    def encode_prompt(self, prompt: Text) -> tuple[Sequence[int], tuple[int, ...]]:
        if prompt.stand_ins is None:
            encoding = _encode(self._tokenizer, prompt.text, prompt.add_special)
            return encoding.ids, _breaks(encoding, prompt.ends, len(prompt.text))
        return self._encode_guarded(prompt, prompt.stand_ins)

    def decoder(self, first: bool = False, special: bool = False) -> Decoder:
        return PieceDecoder(self._all_pieces if special else self._pieces, first)

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

    def _encode_guarded(self, prompt: Text, stand_ins: Mapping[str, str]) -> tuple[Sequence[int], tuple[int, ...]]:
        """Only what stands in for a special token becomes one. Mostly nothing else spells one; then the library can
        have the text as it is spelt, and does what it always does."""
        pieces = re.split(f"([{re.escape(''.join(stand_ins))}])", prompt.text) if stand_ins else [prompt.text]
        tokens = [self._special[stand_ins[piece]][0] for piece in pieces[1::2]]
        spelt = "".join(stand_ins.get(piece, piece) for piece in pieces)
        encoding = _encode(self._tokenizer, spelt, prompt.add_special)
        if self._special_among(encoding) == tokens:
            ends = (_spelt_end(prompt.text, stand_ins, end) for end in prompt.ends)
            return encoding.ids, _breaks(encoding, ends, len(spelt))
        return self._encode_apart(pieces, stand_ins, prompt.add_special), ()

    def _special_among(self, encoding: Encoding) -> list[int]:
        """The special tokens that come from the text, and not from what the tokenizer adds around it."""
        known = self._special_ids
        found = [at for at, token in enumerate(encoding.ids) if token in known]
        if not found:
            return []
        added = encoding.special_tokens_mask
        return [encoding.ids[at] for at in found if not added[at]]

    def _encode_apart(self, pieces: Sequence[str], stand_ins: Mapping[str, str], add_special: bool) -> Sequence[int]:
        """Each run of text between special tokens goes by itself, through a tokenizer that knows no special tokens."""
        tokens: list[int] = []
        strip = False
        for text, stand_in in zip_longest(pieces[::2], pieces[1::2]):
            number, token = self._special[stand_ins[stand_in]] if stand_in else (None, None)
            tokens += self._plain(text, strip, token is not None and token.lstrip)
            if number is not None and token is not None:
                tokens.append(number)
                strip = token.rstrip
        if not add_special:
            return tokens
        around = self.encode("", add_special=True)  # a template that asks for them has none of its own
        return [*around, *tokens]

    def _plain(self, text: str, lstrip: bool, rstrip: bool) -> Sequence[int]:
        text = text.lstrip() if lstrip else text
        text = text.rstrip() if rstrip else text
        if not text:
            return []
        ids: list[int] = _encode(self._blind, text, add_special=False).ids
        if self._special_ids.isdisjoint(ids):
            return ids
        # The model itself has it among its pieces, as Unigram's do: it gets each spelling in two.
        cut = re.compile("|".join(f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in self.special))
        halves = [_encode(self._blind, half, add_special=False).ids for half in cut.split(text)]
        return [token for half in halves for token in half if token not in self._special_ids]

    @cached_property
    def _all_pieces(self) -> Pieces:
        """With those of special tokens, which few requests ask for."""
        return Pieces(self._tokenizer, frozenset())

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


def _breaks(encoding: Encoding, ends: Iterable[int], length: int) -> tuple[int, ...]:
    """The positions of tokens at which `ends` of a text of that `length` lie, where they can be determined."""
    found = (encoding.char_to_token(end) for end in ends if end < length)
    return tuple(at for at in found if at)


def _spelt_end(text: str, stand_ins: Mapping[str, str], end: int) -> int:
    """Where `end` lies once all special tokens are spelt."""
    return end + sum(text.count(character, 0, end) * (len(token) - 1) for character, token in stand_ins.items())


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
