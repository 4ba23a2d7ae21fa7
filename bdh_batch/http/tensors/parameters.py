"""The fields of /v1/completions from tensors and request parameters: each is the field of its name.

What a value may be is left to `CompletionBody`, so that limits, defaults and errors are the same as over its own path.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import orjson

from bdh_batch.errors import InvalidRequest
from bdh_batch.http.request.json_text import ExceedsLimit, read_json
from bdh_batch.http.schema.requests import CompletionBody
from bdh_batch.http.tensors.tensor import BYTES, DTYPES, Tensor
from bdh_batch.settings import Limits

PROMPT = "prompt"
RESERVED = {
    "model": "the model is named by the request itself",
    "neurons": "no output contains them; /v1/completions shows them",
}


@cache
def kinds() -> Mapping[str, frozenset[str]]:
    """What JSON each field may be: "string", "array", "object" and so on."""
    schema = CompletionBody.model_json_schema()
    return {name: frozenset(_kinds(field, schema)) for name, field in schema["properties"].items()}


def _kinds(field: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[str]:
    if reference := field.get("$ref"):
        yield from _kinds(schema["$defs"][reference.rpartition("/")[2]], schema)
    if isinstance(kind := field.get("type"), str):
        yield kind
    for each in field.get("anyOf", ()):
        yield from _kinds(each, schema)


def body_values(tensors: Sequence[Tensor], parameters: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """The values of a `CompletionBody`, which are still to be checked.

    Raises:
        InvalidRequest: a field that is given twice, or whose tensor cannot be one.
    """
    values = {name: _parameter(name, value, limits) for name, value in parameters.items()}
    for tensor in tensors:
        if tensor.name in values:
            raise InvalidRequest(f"{tensor.name} is given twice.", tensor.name)
        values[tensor.name] = _prompts(tensor) if tensor.name == PROMPT else _value(tensor, limits)
    for name, reason in RESERVED.items():
        if name in values:
            raise InvalidRequest(f"{name} is no parameter here: {reason}.", name)
    return values


def _parameter(name: str, value: Any, limits: Limits) -> Any:
    """A parameter of gRPC is no list and no object: those come as JSON, where the field is never text."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidRequest(f"{name}: Input should be a finite number", name)
    of = kinds().get(name, frozenset())
    if not isinstance(value, str) or "string" in of or of.isdisjoint(("array", "object")):
        return value
    try:
        return read_json(value.encode(), limits)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"{name}: a string has to be JSON here: {error}.", name) from None
    except ExceedsLimit as error:
        raise InvalidRequest(f"{name} {error}.", name) from None


def _prompts(tensor: Tensor) -> Any:
    """Texts, or token ids in rows; those of rank 1 are one prompt."""
    if tensor.datatype == BYTES:
        return tensor.values
    if DTYPES[tensor.datatype].kind not in "iu":
        text = f"{tensor.name}: {tensor.datatype} is no prompt; BYTES are, and integers, as token ids."
        raise InvalidRequest(text, tensor.name)
    width = tensor.shape[-1]
    if len(tensor.shape) == 1 or not width:
        return tensor.values
    return [tensor.values[begin : begin + width] for begin in range(0, len(tensor.values), width)]


def _value(tensor: Tensor, limits: Limits) -> Any:
    """A list where the field takes one; else the value that all elements have."""
    if "array" in kinds().get(tensor.name, ()):
        return list(tensor.values)
    if not tensor.values:
        raise InvalidRequest(f"{tensor.name}: the tensor has no element.", tensor.name)
    first = tensor.values[0]
    if any(value != first for value in tensor.values):
        text = f"{tensor.name}: the elements differ; a request has one {tensor.name} for all its prompts."
        raise InvalidRequest(text, tensor.name)
    return _parameter(tensor.name, first, limits)
