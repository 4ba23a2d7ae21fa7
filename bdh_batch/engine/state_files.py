"""The files that states are kept in: safetensors, written whole or not at all, and checked when they are read.

A file holds one tensor, `state`, and says in its metadata which model's it is, and after which tokens. Where the model
has latent steps, a second one, `hidden`, is the final hidden vector of the last token. They are read to and written
from memory that the caller has.

Whether all numbers are finite is looked at when they are written, and where a client's file comes in: by HTTP
(`http/states/transfer.py`) or by the Python API (`llm/states.py`). The checksum says that they are still the same, and
a conversation waits for no more.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, Literal

from xxhash import xxh3_128  # finds damage as a cryptographic hash does, and sooner

from bdh_batch.engine.filling import CutOff, fill, filled
from bdh_batch.messages import StateLayout
from bdh_batch.system.durable import sync_folder
from bdh_batch.system.finite import is_finite
from bdh_batch.system.threads import Executor

TENSOR, HIDDEN = "state", "hidden"
METADATA = "__metadata__"
FORMAT = "1"
LARGEST_HEADER = 2**20  # bytes; who keeps a file may add to its metadata
PIECE = 2**20  # bytes that are written at a time, a whole number of numbers, which stay in the caches meanwhile
READ = 2**21  # that are read at a time: between two reads, a thread may have to wait for the interpreter's lock
LENGTH = 8  # bytes of the header's length, before it
UNKNOWN_HASH = "0" * 32  # stands where the tensor's will, once it is known
NOTHING = memoryview(b"")  # instead of a hidden vector

Header = Mapping[str, Any]
Dtype = Literal["F32", "BF16"]


class Interrupted(Exception):
    """A state was not read to its end, as that is not wanted any more. Raised while it is read."""


class BadState(Exception):
    """A file holds no state that can be used here. Raised while it is read; `str` is the reason, for the client."""


def read_state(
    path: Path,
    layout: StateLayout,
    tokens: bytes,
    into: memoryview,
    hidden: memoryview = NOTHING,
    helper: Executor | None = None,
    goes_on: Callable[[], bool] = lambda: True,
) -> None:
    """Reads the state after some tokens.

    Args:
        tokens: all that have entered it, as 32-bit integers.
        into: as many bytes as a state of the layout; what it holds after an error is no state.
        hidden: as many as its hidden vector.
        helper: has a thread that reads beside this one, if it is free.
        goes_on: is asked after each piece whether to read on.

    Raises:
        Interrupted
        BadState: it is damaged, is not of this layout, or is the state after other tokens.
        OSError: there is no such file, or it cannot be read.
    """
    with path.open("rb", buffering=0) as opened, _cut_off_is_bad():
        file = opened.fileno()
        header, begin = _read_header(file)
        metadata = _check(header, layout, os.fstat(file).st_size - begin)
        _check_tokens(metadata, tokens)
        digest = xxh3_128()
        pieces = [piece for piece, _ in _pieces(layout, into, hidden, READ)]
        with closing(filled(file, pieces, begin, helper)) as read:
            for piece in read:
                digest.update(piece)
                if not goes_on():
                    raise Interrupted
        if digest.hexdigest() != metadata.get("xxh3_128"):
            raise BadState("it is damaged: its checksum differs.")


def write_state(
    path: Path, layout: StateLayout, tokens: bytes, state: memoryview, hidden: memoryview = NOTHING
) -> None:
    """Writes the state after some tokens. Under its final name there is the whole of it or, after an error, nothing.

    Args:
        tokens: all that have entered it, as 32-bit integers.
        hidden: its hidden vector.

    Raises:
        OSError: it cannot be written.
        BadState: it has numbers that are not finite.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("xb", buffering=0) as file:
            _write(file, _header(layout, tokens, UNKNOWN_HASH))
            digest = xxh3_128()
            for piece, dtype in _pieces(layout, state, hidden, PIECE):
                if not is_finite(piece, dtype):
                    raise BadState("it has numbers that are not finite.")
                digest.update(piece)
                _write(file, piece)
            file.seek(0)
            _write(file, _header(layout, tokens, digest.hexdigest()))
            os.fsync(file.fileno())
        partial.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):  # who keeps the folder clears it out, too
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _header(layout: StateLayout, tokens: bytes, digest: str) -> bytes:
    metadata = {
        "format": FORMAT,
        "fingerprint": layout.fingerprint,
        "window": str(layout.window),
        "tokens": str(len(tokens) // 4),
        "tokens_sha256": sha256(tokens).hexdigest(),
        "xxh3_128": digest,
    }
    text = json.dumps({METADATA: metadata, **_tensors(layout)}, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + LENGTH) % 64)  # so that the tensor is aligned in the file
    return len(text).to_bytes(LENGTH, "little") + text


def _tensors(layout: StateLayout) -> dict[str, Any]:
    size, vector = layout.size, 4 * layout.hidden
    state = {"dtype": layout.dtype, "shape": list(layout.shape), "data_offsets": [0, size]}
    hidden = {"dtype": "F32", "shape": [layout.hidden], "data_offsets": [size, size + vector]}
    return {TENSOR: state} | ({HIDDEN: hidden} if layout.hidden else {})


def _pieces(
    layout: StateLayout, state: memoryview, hidden: memoryview, most: int
) -> Iterator[tuple[memoryview, Dtype]]:
    """The pieces of a state, of at most so many bytes, and of its hidden vector, as a file has them; each with its
    dtype."""
    for at in range(0, layout.size, most):
        yield state[at : at + most], layout.dtype
    if layout.hidden:
        yield hidden, "F32"


def _read_header(file: int) -> tuple[Header, int]:
    """Returns the header, and where the tensor begins."""
    length = bytearray(LENGTH)
    fill(file, memoryview(length), 0)
    size = int.from_bytes(length, "little")
    if size > LARGEST_HEADER:
        raise BadState(f"its header would have {size:,} bytes, and may have {LARGEST_HEADER:,}.")
    text = bytearray(size)
    fill(file, memoryview(text), LENGTH)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or not isinstance(header.get(METADATA), dict):
        raise BadState("its header is not that of a safetensors file with a state.")
    return header, LENGTH + size


def _check(header: Header, layout: StateLayout, size: int) -> Mapping[str, Any]:
    """Checks all but the tokens and the tensor itself; `size` is what follows the header. Returns the metadata."""
    metadata: Mapping[str, Any] = header[METADATA]
    expected, tensor = _tensors(layout), header.get(TENSOR)
    if header.keys() != {METADATA, *expected} or not isinstance(tensor, dict) or metadata.get("format") != FORMAT:
        raise BadState("its header is not that of a safetensors file with a state.")
    if (problem := layout.problem(metadata, tensor)) is not None:
        raise BadState(problem)
    whole = layout.size + 4 * layout.hidden
    if any(header[name] != each for name, each in expected.items()) or size != whole:
        raise BadState(f"it is cut off or has too much: it should have {whole:,} bytes of {' and '.join(expected)}.")
    return metadata


def _check_tokens(metadata: Mapping[str, Any], tokens: bytes) -> None:
    if metadata.get("tokens") != str(len(tokens) // 4) or metadata.get("tokens_sha256") != sha256(tokens).hexdigest():
        raise BadState("the prompt does not begin with the tokens that it is the state after.")


@contextlib.contextmanager
def _cut_off_is_bad() -> Iterator[None]:
    try:
        yield
    except CutOff as error:
        raise BadState("it is cut off.") from error


def _write(file: BinaryIO, piece: bytes | memoryview) -> None:
    left = memoryview(piece)
    while left:
        left = left[file.write(left) :]
