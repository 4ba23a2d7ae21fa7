"""The headers of state files, which are safetensors: as an engine writes them, and as clients get and send them.

A file has one tensor, `state`, and where the model has latent steps a second one, `hidden`. Its metadata say which
model's it is and after how many tokens; a client's copy has the tokens themselves, too. Knows nothing of the numbers in
the tensors: the engine looks at those.
"""

from __future__ import annotations

import hashlib
import os
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from xxhash import xxh3_128

from bdh_batch.errors import InvalidRequest
from bdh_batch.http.request.json_text import outside_strings
from bdh_batch.http.responses.json_pieces import dump_list
from bdh_batch.messages.state import INVALID, SIZES, StateLayout

TENSOR, HIDDEN, METADATA = "state", "hidden", "__metadata__"
LENGTH = 8  # bytes of the header's length, before it
MOST = 4 * 2**20  # bytes of a header: that of a client's copy has the tokens
MOST_LISTS, MOST_QUOTES, MOST_VALUES = (
    2**14,
    2**16,
    2**14,
)  # in a header: far more than the texts of a client's own have
ALIGNED = 64
READ = 2**20  # bytes that are read at a time
PIECE = 2**14  # characters of a list of tokens that are read at once
DTYPES = {"F32": "float32", "BF16": "bfloat16"}
MOST_DIMENSIONS, LONGEST = 8, 2**31
IDS = re.compile(r"[\d\s,]*(?:-[12]\b[\d\s,]*)*", re.ASCII)  # and latent steps
CHECKSUM = re.compile("[0-9a-f]{32}")
FILE = "file"  # what errors call a file that was uploaded
# What engines write; all else is the server's own, or the client's.
OF_ENGINES = ("format", "fingerprint", "window", "xxh3_128")
TOKEN_IDS, COUNT, TOKENS_DIGEST = "token_ids", "tokens", "tokens_sha256"


@dataclass(frozen=True, slots=True)
class Header:
    """A header that has been read, and fits together.

    Args:
        tensor: `dtype`, `shape` and `data_offsets` of the state.
        size: bytes of all tensors.
        hidden: as `tensor`, of the hidden vector; None where there is none.
    """

    metadata: Mapping[str, str]
    tensor: Mapping[str, Any]
    size: int
    hidden: Mapping[str, Any] | None = None

    @property
    def dtype(self) -> str:
        return DTYPES[self.tensor["dtype"]]

    @property
    def parts(self) -> Sequence[tuple[int, str]]:
        """The bytes of each tensor, as they lie one behind the other, and its dtype."""
        tensors = [self.tensor, *([] if self.hidden is None else [self.hidden])]
        return [(end - begin, each["dtype"]) for each in tensors for begin, end in [each["data_offsets"]]]

    @property
    def fingerprint(self) -> str:
        return self.metadata["fingerprint"]

    @property
    def read(self) -> int:
        """How many tokens have entered the state."""
        return int(self.metadata[COUNT])

    def encoded(self, metadata: Mapping[str, str]) -> bytes:
        """What a file with these tensors begins with, where it has other metadata."""
        hidden = {} if self.hidden is None else {HIDDEN: self.hidden}
        text = orjson.dumps({METADATA: dict(sorted(metadata.items())), TENSOR: self.tensor, **hidden})
        text += b" " * (-(LENGTH + len(text)) % ALIGNED)
        return len(text).to_bytes(LENGTH, "little") + text

    def of_engine(self, tokens: array[int]) -> bytes:
        """What an engine's file begins with."""
        known = {name: self.metadata[name] for name in OF_ENGINES if name in self.metadata}
        return self.encoded(known | {COUNT: str(len(tokens)), TOKENS_DIGEST: digest(tokens)})

    def check(self, layout: StateLayout | None, param: str) -> None:
        """Raises InvalidRequest: no engine whose states are of that layout can begin in it."""
        if layout is not None and (problem := layout.problem(self.metadata, self.tensor)) is not None:
            raise InvalidRequest(f"The state cannot be used: {problem}", param, INVALID)

    def tokens(self) -> array[int]:
        """The tokens in a client's copy. Raises InvalidRequest: there are none, or they are not those of the state."""
        text = self.metadata.get(TOKEN_IDS)
        if text is None:
            raise _bad(f"its metadata have no {TOKEN_IDS}")
        try:
            tokens = _listed(text)
        except (ValueError, OverflowError):
            tokens = array("i")
        if not tokens or tokens[0] < 0:
            raise _bad(f"its {TOKEN_IDS} are no list of token ids")
        if self.metadata.get(COUNT) != str(len(tokens)):
            raise _bad(f"it has {len(tokens)} {TOKEN_IDS}, and says that it has read {self.metadata.get(COUNT)!r:.40}")
        if self.metadata.get(TOKENS_DIGEST, known := digest(tokens)) != known:
            raise _bad(f"its {TOKEN_IDS} are not those that its {TOKENS_DIGEST} is of")
        return tokens


def length_in(begin: bytes | bytearray) -> int:
    """The bytes of a header, by the first ones of its file. Raises InvalidRequest: no header is so long."""
    length = int.from_bytes(begin[:LENGTH], "little")
    if not 2 <= length <= MOST:
        raise _bad(f"its header would have {length} bytes, and may have {MOST}")
    return length


def parsed(text: bytes) -> Header:
    """The header that the bytes are. Raises InvalidRequest."""
    if text.count(b"[") + text.count(b"{") > MOST_LISTS or text.count(b'"') > MOST_QUOTES:
        raise _bad("its header has too many parts")  # millions of them would keep the interpreter's lock for long
    if outside_strings(text).count(b",") > MOST_VALUES:
        raise _bad("its header has too many values")
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        found = None
    metadata = found.get(METADATA) if isinstance(found, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad("it is no safetensors file with metadata")
    tensors = {name: found[name] for name in (TENSOR, HIDDEN) if name in found}
    if found.keys() != {METADATA, TENSOR, *tensors} or not all(isinstance(each, dict) for each in tensors.values()):
        raise _bad(f"it should have the tensor {TENSOR!r}, and where its model has latent steps {HIDDEN!r}")
    size = 0
    for name, tensor in tensors.items():
        begin, size = size, size + _size_of(tensor.get("dtype"), tensor.get("shape"))
        if tensor.get("data_offsets") != [begin, size] or tensor.keys() != {"dtype", "shape", "data_offsets"}:
            problem = f"its tensor {name!r} of that dtype and shape has {size - begin} bytes"
            raise _bad(f"{problem}, which its data_offsets do not say")
    if not metadata.get("fingerprint"):
        raise _bad("its metadata have no fingerprint of its model")
    if CHECKSUM.fullmatch(metadata.get("xxh3_128", "")) is None:
        raise _bad("its metadata have no checksum of its tensor (xxh3_128)")
    return Header(metadata, tensors[TENSOR], size, tensors.get(HIDDEN))


def read(path: Path) -> Header:
    """The header of a file that an engine has written. Raises OSError, InvalidRequest."""
    with path.open("rb") as file:
        found = parsed(file.read(length_in(file.read(LENGTH))))
        if os.fstat(file.fileno()).st_size != file.tell() + found.size:
            raise _bad("it is cut off, or has too much")
        return found


def problem_of(path: Path) -> str | None:
    """What is wrong with a file that an engine has written; None where nothing is. It is read whole. Raises OSError."""
    try:
        found = read(path)
    except InvalidRequest as error:
        return error.message
    digest, piece = xxh3_128(), bytearray(READ)
    with path.open("rb", buffering=0) as file:
        file.seek(-found.size, os.SEEK_END)
        while count := file.readinto(piece):
            digest.update(memoryview(piece)[:count])
    return None if digest.hexdigest() == found.metadata["xxh3_128"] else "its checksum differs"


def digest(tokens: array[int]) -> str:
    return hashlib.sha256(tokens.tobytes()).hexdigest()


def written(tokens: Sequence[int]) -> str:
    """The tokens as metadata have them."""
    return dump_list(tokens).decode()


def _listed(text: str) -> array[int]:
    """The tokens that were written so, read in pieces: each keeps the interpreter's lock for a short while only.

    Raises ValueError, OverflowError: there are others than 32-bit integers and latent steps in it, or it is no list.
    """
    tokens, at, last = array("i"), 1, len(text) - 1
    if text[:1] != "[" or text[last:] != "]":
        raise ValueError
    while at < last:
        end = text.find(",", at + PIECE)
        end = last if end < 0 else end
        piece = text[at:end]
        if IDS.fullmatch(piece) is None:
            raise ValueError
        tokens.extend(orjson.loads(f"[{piece}]"))
        at = end + 1
    return tokens


def _size_of(dtype: object, shape: object) -> int:
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise _bad(f"the dtype of its tensor should be {' or '.join(SIZES)}")
    if not isinstance(shape, list) or not 0 < len(shape) <= MOST_DIMENSIONS:
        raise _bad("its tensor has no shape of a state")
    size = SIZES[dtype]
    for length in shape:
        if type(length) is not int or not 0 < length < LONGEST:
            raise _bad("its tensor has no shape of a state")
        size *= length
    return size


def _bad(problem: str) -> InvalidRequest:
    return InvalidRequest(f"The file is no state: {problem}.", FILE, INVALID)
