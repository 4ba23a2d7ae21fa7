"""The binary tensor data extension: contents stand behind the JSON of a body, as raw bytes, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import orjson
from starlette.datastructures import Headers
from starlette.responses import Response

from bdh_batch.errors import InvalidRequest
from bdh_batch.http.kserve.bodies import InferBody, InferInput
from bdh_batch.http.request.content import JSON_LENGTH
from bdh_batch.http.responses.json_pieces import JsonInPieces, between, dump_list, dump_text
from bdh_batch.http.tensors.tensor import BYTES, Tensor, elements, from_json, from_raw, to_raw
from bdh_batch.settings import Limits


def split(raw: bytes, headers: Headers) -> tuple[bytes, bytes]:
    """The JSON of a body, and what stands behind it. Raises InvalidRequest."""
    given = headers.get(JSON_LENGTH)
    if given is None:
        return raw, b""
    if not (given.isascii() and given.isdecimal() and len(given) < 19 and int(given) <= len(raw)):
        raise InvalidRequest(f"{JSON_LENGTH} should be the length of the body's JSON, at most {len(raw)}.", JSON_LENGTH)
    return raw[: int(given)], raw[int(given) :]


def read_inputs(body: InferBody, binary: bytes, limits: Limits) -> list[Tensor]:
    """The tensors of a body, whose raw contents are in `binary`. Raises InvalidRequest."""
    tensors, at = [], 0
    for number, each in enumerate(body.inputs):
        elements(each.name, each.datatype, each.shape, limits)
        size = _binary_size(number, each)
        if size is None:
            values = from_json(each.name, each.datatype, each.shape, each.data or ())
        elif size > len(binary) - at:
            text = f"inputs[{number}].parameters.binary_data_size is {size}, and {len(binary) - at} bytes are left."
            raise InvalidRequest(text, f"inputs[{number}].parameters.binary_data_size")
        else:
            values = from_raw(each.name, each.datatype, each.shape, binary[at : at + size])
            at += size
        tensors.append(Tensor(each.name, each.datatype, each.shape, values))
    if at != len(binary):
        raise InvalidRequest(f"{len(binary) - at} bytes behind the JSON are no input's (binary_data_size).", "inputs")
    return tensors


def _binary_size(number: int, given: InferInput) -> int | None:
    size = None if given.parameters is None else given.parameters.binary_data_size
    if (size is None) == (given.data is None):
        text = f"inputs[{number}] should have either data or parameters.binary_data_size."
        raise InvalidRequest(text, f"inputs[{number}].data")
    return size


def _data(tensor: Tensor) -> list[bytes]:
    """The elements as pieces of JSON."""
    if tensor.datatype != BYTES:
        return [dump_list(tensor.values)]
    return [b"[", *between(b",", map(dump_text, tensor.values)), b"]"]


def infer_response(envelope: dict[str, Any], tensors: Iterable[Tensor], binary: Iterable[bool]) -> Response:
    """The response with `tensors`; those that are `binary` stand behind the JSON."""
    outputs: list[Sequence[bytes]] = []
    behind: list[bytes] = []
    for tensor, is_binary in zip(tensors, binary, strict=True):
        head: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        if is_binary:
            behind.append(to_raw(tensor))
            outputs.append([orjson.dumps(head | {"parameters": {"binary_data_size": len(behind[-1])}})])
        else:
            outputs.append([orjson.dumps(head)[:-1], b',"data":', *_data(tensor), b"}"])
    pieces = [orjson.dumps(envelope)[:-1], b',"outputs":[', *between(b",", outputs), b"]}"]
    response = JsonInPieces([*pieces, *behind])
    if behind:
        response.headers["content-type"] = "application/octet-stream"
        response.headers[JSON_LENGTH] = str(sum(map(len, pieces)))
    return response
