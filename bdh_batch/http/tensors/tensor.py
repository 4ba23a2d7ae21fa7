"""Tensors of KServe's protocol: their datatypes and shapes, and their elements as raw bytes or as JSON.

Elements are Python values in row-major order. Errors name the tensor, and what of it is wrong.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bdh_batch.errors import InvalidRequest
from bdh_batch.settings import Limits

MAX_RANK = 8
LENGTH = struct.Struct("<I")  # before each element of raw BYTES
DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    **{f"INT{8 * size}": np.dtype(f"<i{size}") for size in (1, 2, 4, 8)},
    **{f"UINT{8 * size}": np.dtype(f"<u{size}") for size in (1, 2, 4, 8)},
    **{f"FP{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
}
BYTES = "BYTES"
CHARACTERS = 16  # that are encoded in a microsecond


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named tensor. `values` are its elements, row by row."""

    name: str
    datatype: str
    shape: Sequence[int]
    values: Sequence[Any]

    @classmethod
    def of(cls, name: str, datatype: str, values: Sequence[Any]) -> Tensor:
        """One of rank 1."""
        return cls(name, datatype, (len(values),), values)

    @property
    def cost(self) -> int:
        """About how many microseconds it takes to encode it."""
        return len(self.values) + (sum(map(len, self.values)) // CHARACTERS if self.datatype == BYTES else 0)


def elements(name: str, datatype: str, shape: Sequence[int], limits: Limits) -> int:
    """How many elements a tensor has. Raises InvalidRequest: its datatype or shape is none."""
    if datatype != BYTES and datatype not in DTYPES:
        known = ", ".join((BYTES, *DTYPES))
        raise InvalidRequest(f"{name}: the datatype {datatype[:32]!r} is not supported; these are: {known}.", name)
    if not 1 <= len(shape) <= MAX_RANK:
        raise InvalidRequest(f"{name}: the shape should have 1 to {MAX_RANK} dimensions, not {len(shape)}.", name)
    if min(shape) < 0:
        raise InvalidRequest(f"{name}: the shape {list(shape)} has a negative dimension.", name)
    option = "max_strings" if datatype == BYTES else "max_values"
    count, most = math.prod(shape), getattr(limits, option)
    if count > most:
        text = f"{name}: the shape {list(shape)} has {count} elements; the limit is {most} (limits.{option})."
        raise InvalidRequest(text, name)
    return count


def check_count(name: str, shape: Sequence[int], given: int) -> None:
    """Raises InvalidRequest: not as many elements as the shape says."""
    expected = math.prod(shape)
    if given != expected:
        text = f"{name}: the shape {list(shape)} has {expected} elements, and the contents have {given}."
        raise InvalidRequest(text, name)


def from_raw(name: str, datatype: str, shape: Sequence[int], raw: bytes) -> list[Any]:
    """The elements of raw contents, little-endian, those of BYTES each behind its length. Raises InvalidRequest."""
    if datatype == BYTES:
        return [text_of(name, each) for each in _split(name, shape, raw)]
    dtype = DTYPES[datatype]
    if len(raw) != math.prod(shape) * dtype.itemsize:
        expected = math.prod(shape) * dtype.itemsize
        text = f"{name}: {datatype} of shape {list(shape)} takes {expected} bytes, and the contents have {len(raw)}."
        raise InvalidRequest(text, name)
    return numbers(name, datatype, np.frombuffer(raw, dtype))


def _split(name: str, shape: Sequence[int], raw: bytes) -> Iterator[bytes]:
    at = given = 0
    expected = math.prod(shape)
    while at < len(raw) and given <= expected:
        end = at + LENGTH.size
        if end <= len(raw):
            end += LENGTH.unpack_from(raw, at)[0]
        if end > len(raw):
            raise InvalidRequest(f"{name}: the raw contents end inside element {given}.", name)
        yield raw[at + LENGTH.size : end]
        at, given = end, given + 1
    check_count(name, shape, given)


def numbers(name: str, datatype: str, given: Sequence[Any] | np.ndarray[Any, Any]) -> list[Any]:
    """The elements as numbers of Python. Raises InvalidRequest: NaN or infinite ones."""
    array: np.ndarray[Any, Any] = np.asarray(given, DTYPES[datatype])
    if array.dtype.kind != "f":
        values: list[Any] = array.tolist()
        return values
    if not np.isfinite(array).all():
        raise InvalidRequest(f"{name}: Input should be a finite number", name)
    # What was written as 0.7 is 0.7, and not the 0.699999988079071 that is nearest to it in FP32.
    return [float(str(value)) for value in array]


def text_of(name: str, raw: bytes) -> str:
    """The text of an element of BYTES. Raises InvalidRequest: it is none."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{name}: Input should be UTF-8; byte {error.start} is not.", name) from None


def to_raw(tensor: Tensor) -> bytes:
    """The elements as raw contents."""
    if tensor.datatype != BYTES:
        return np.array(tensor.values, DTYPES[tensor.datatype]).tobytes()
    encoded = [value.encode() for value in tensor.values]
    return b"".join(part for each in encoded for part in (LENGTH.pack(len(each)), each))


def from_json(name: str, datatype: str, shape: Sequence[int], data: Sequence[Any]) -> list[Any]:
    """The elements of JSON, flat or nested as the shape is. Raises InvalidRequest."""
    flat = _flattened(name, shape, data)
    check_count(name, shape, len(flat))
    kinds = _kinds(datatype)
    for at, value in enumerate(flat):
        if type(value) not in kinds:
            raise InvalidRequest(f"{name}: element {at} is no {datatype}.", name)
    check_range(name, datatype, flat)
    return flat


def _flattened(name: str, shape: Sequence[int], data: Sequence[Any]) -> list[Any]:
    flat = list(data)
    for _ in range(len(shape) - 1):
        if not any(isinstance(value, list) for value in flat):
            break
        if not all(isinstance(value, list) for value in flat):
            raise InvalidRequest(f"{name}: the data are nested unevenly.", name)
        flat = [value for inner in flat for value in inner]
    return flat


def _kinds(datatype: str) -> tuple[type, ...]:
    if datatype == BYTES:
        return (str,)
    kind = DTYPES[datatype].kind
    return (bool,) if kind == "b" else (int,) if kind in "iu" else (int, float)


def check_range(name: str, datatype: str, values: Sequence[Any]) -> None:
    """Raises InvalidRequest: an integer does not fit the datatype."""
    dtype = DTYPES.get(datatype)
    if dtype is None or dtype.kind not in "iu" or not values:
        return
    bounds = np.iinfo(dtype)
    for value in (min(values), max(values)):
        if not bounds.min <= value <= bounds.max:
            raise InvalidRequest(f"{name}: {value} is no {datatype}.", name)
