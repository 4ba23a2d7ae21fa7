"""Tensors of KServe v2 requests and responses, as far as texts and their parameters need them."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from tritonclient.grpc import service_pb2

from bdh_batch.upstreams.config import Tensor
from bdh_batch.upstreams.protocol import Fault, FaultKind

LENGTH = struct.Struct("<I")  # before each element of raw BYTES
# The member of the typed contents, and the code of a raw element, of each datatype.
CONTENTS: Mapping[str, tuple[str, str]] = {
    "BYTES": ("bytes_contents", ""),
    "BOOL": ("bool_contents", "?"),
    "INT8": ("int_contents", "b"),
    "INT16": ("int_contents", "h"),
    "INT32": ("int_contents", "i"),
    "INT64": ("int64_contents", "q"),
    "UINT8": ("uint_contents", "B"),
    "UINT16": ("uint_contents", "H"),
    "UINT32": ("uint_contents", "I"),
    "UINT64": ("uint64_contents", "Q"),
    "FP32": ("fp32_contents", "f"),
    "FP64": ("fp64_contents", "d"),
}
INTEGERS = frozenset(name for name in CONTENTS if "INT" in name)
MOST_DIMENSIONS = 8


def add_input(request: Any, tensor: Tensor, field: str, value: Any) -> None:
    """Adds a field of a client's request as a tensor of one element, or, where it is a list, of as many as it has.

    Raises:
        Fault: the value is none of the tensor's datatype.
    """
    values = value if isinstance(value, list) else [value]
    shape = [len(values)] if isinstance(value, list) else tensor.shape
    name, _ = CONTENTS[tensor.datatype]
    try:
        made = [_element(tensor.datatype, each) for each in values]
        entry = request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=shape)
        getattr(entry.contents, name).extend(made)
    except (TypeError, ValueError, OverflowError) as error:
        raise Fault(FaultKind.REFUSED, f"{field} should be {tensor.datatype}", field) from error


def _element(datatype: str, value: Any) -> Any:
    if datatype == "BYTES":
        return value.encode() if isinstance(value, str) else orjson.dumps(value)
    if datatype == "BOOL":
        return bool(value)
    return float(value) if datatype.startswith("FP") else int(value)


def add_parameter(request: Any, name: str, value: Any) -> None:
    """Adds a field of a client's request as a parameter; lists and objects become JSON."""
    parameter = request.parameters[name]
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int):
        if value >= 2**63:
            parameter.uint64_param = value
        else:
            parameter.int64_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    else:
        parameter.string_param = value if isinstance(value, str) else orjson.dumps(value).decode()


class ResponseTensors:
    """The tensors of one response, by name."""

    def __init__(self, response: Any) -> None:
        self._outputs = {output.name: (number, output) for number, output in enumerate(response.outputs)}
        self._raw = response.raw_output_contents
        if self._raw and len(self._raw) != len(response.outputs):
            raise Fault(FaultKind.MALFORMED, "raw contents of not all tensors")

    def find(self, names: Sequence[str]) -> str | None:
        """Returns the first of `names` that is there."""
        return next((name for name in names if name in self._outputs), None)

    def text(self, name: str) -> bytes:
        """Returns the one element of a tensor of BYTES. Raises Fault."""
        (value,) = self._values(name, frozenset(("BYTES",)), 1)
        assert isinstance(value, bytes)
        return value

    def integers(self, name: str) -> list[int]:
        """Returns the elements of a tensor of integers. Raises Fault."""
        return self._values(name, INTEGERS, None)

    def flag(self, name: str) -> bool:
        """Returns the one element of a tensor of BOOL. Raises Fault."""
        (value,) = self._values(name, frozenset(("BOOL",)), 1)
        return bool(value)

    def _values(self, name: str, datatypes: frozenset[str], expected: int | None) -> list[Any]:
        number, output = self._outputs[name]
        if output.datatype not in datatypes:
            raise Fault(FaultKind.MALFORMED, f"the tensor {name} is of {output.datatype[:32]!r}")
        shape = list(output.shape)
        if len(shape) > MOST_DIMENSIONS or min(shape, default=0) < 0:
            raise Fault(FaultKind.MALFORMED, f"the tensor {name} has no shape")
        count = math.prod(shape)
        member, code = CONTENTS[output.datatype]
        values = list(getattr(output.contents, member))
        if self._raw:
            values = _from_raw(self._raw[number], code, count)
        if len(values) != count or expected not in (None, count):
            raise Fault(FaultKind.MALFORMED, f"the tensor {name} has not as many elements as its shape says")
        return values


def _from_raw(raw: bytes, code: str, count: int) -> list[Any]:
    if code:
        item = struct.Struct(f"<{code}")
        if len(raw) != count * item.size:
            raise Fault(FaultKind.MALFORMED, "raw contents of another length")
        return [value for (value,) in item.iter_unpack(raw)]
    values: list[Any] = []
    at = 0
    while at < len(raw):
        end = at + LENGTH.size
        end += LENGTH.unpack_from(raw, at)[0] if end <= len(raw) else 1
        if end > len(raw) or len(values) == count:
            raise Fault(FaultKind.MALFORMED, "raw contents of another length")
        values.append(raw[at + LENGTH.size : end])
        at = end
    return values


def new_request(model: str, version: str, id: str) -> Any:
    """Returns an empty ModelInferRequest."""
    return service_pb2.ModelInferRequest(model_name=model, model_version=version, id=id)
