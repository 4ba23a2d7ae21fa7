"""Requests and responses as protobuf messages. Contents are typed or raw; a response has them as its request had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.message import DecodeError, Message
from tritonclient.grpc import service_pb2

from bdh_batch.errors import InvalidRequest
from bdh_batch.http.request.off_loop import LARGE
from bdh_batch.http.tensors.inference import InferRequest
from bdh_batch.http.tensors.tensor import (
    BYTES,
    MAX_RANK,
    Tensor,
    check_count,
    check_range,
    elements,
    from_raw,
    numbers,
    text_of,
    to_raw,
)
from bdh_batch.kserve.status import Refusal
from bdh_batch.settings import Limits
from bdh_batch.system.protobuf import Counter, TooMany

# Where typed contents are. FP16 has none, and is always raw.
CONTENTS: Mapping[str, str] = {
    BYTES: "bytes_contents",
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}
ERROR_STATUS = "error_status"  # a parameter of a response with an error: the status that it has over HTTP
OPTIONS = {"fields": "limits.max_strings", "numbers": "limits.max_values"}  # that bound what a message has
FINAL = "triton_final_response"  # a parameter of a stream's responses: whether no other one follows


def parse(raw: bytes, kind: type[Message], limits: Limits) -> Any:
    """The message in `raw`. Raises InvalidRequest: it is none, or has too much in it."""
    if len(raw) > LARGE:
        try:
            Counter(limits.max_strings, limits.max_values).run(raw, kind.DESCRIPTOR)
        except TooMany as error:
            raise InvalidRequest(f"{error} ({OPTIONS[error.things]}).") from None
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise InvalidRequest(f"The bytes are no {kind.DESCRIPTOR.name}: {error}.", code="invalid_protobuf") from None


def infer_request(message: Any, limits: Limits) -> InferRequest:
    """What a ModelInferRequest asks for. Raises InvalidRequest."""
    check_labels(message, limits, "id", "model_name", "model_version")
    for name in ("inputs", "outputs", "parameters"):
        if len(getattr(message, name)) > limits.max_members:
            raise InvalidRequest(f"{name} should have at most {limits.max_members} (limits.max_members).", name)
    names = []
    for at, output in enumerate(message.outputs):
        _refuse_parameters(f"outputs[{at}]", output)
        names.append(output.name)
    return InferRequest(
        model=message.model_name,
        version=message.model_version,
        id=message.id,
        inputs=_inputs(message, limits),
        parameters={name: _parameter(name, value) for name, value in message.parameters.items()},
        outputs=names,
    )


def check_labels(message: Any, limits: Limits, *names: str) -> None:
    """Raises InvalidRequest: one of these fields is too long."""
    for name in names:
        if len(getattr(message, name)) > limits.max_label_length:
            text = f"{name} should have at most {limits.max_label_length} characters (limits.max_label_length)."
            raise InvalidRequest(text, name)


def _inputs(message: Any, limits: Limits) -> list[Tensor]:
    raw = message.raw_input_contents
    if len(raw) not in (0, len(message.inputs)):
        text = f"raw_input_contents has {len(raw)} elements, and there are {len(message.inputs)} inputs."
        raise InvalidRequest(text, "raw_input_contents")
    tensors = []
    for at, given in enumerate(message.inputs):
        name = given.name
        if not 0 < len(name) <= limits.max_label_length:
            text = f"inputs[{at}].name should have 1 to {limits.max_label_length} characters (limits.max_label_length)."
            raise InvalidRequest(text, f"inputs[{at}].name")
        _refuse_parameters(name, given)
        if len(given.shape) > MAX_RANK:
            text = f"{name}: the shape should have 1 to {MAX_RANK} dimensions, not {len(given.shape)}."
            raise InvalidRequest(text, name)
        shape = list(given.shape)
        elements(name, given.datatype, shape, limits)
        if raw and given.contents.ListFields():
            text = f"{name} has contents, and the request has raw_input_contents: all inputs are one or the other."
            raise InvalidRequest(text, name)
        read = from_raw(name, given.datatype, shape, raw[at]) if raw else _typed(name, given, shape)
        tensors.append(Tensor(name, given.datatype, shape, read))
    return tensors


def _typed(name: str, given: Any, shape: Sequence[int]) -> list[Any]:
    field = CONTENTS.get(given.datatype)
    if field is None:
        raise InvalidRequest(f"{name}: {given.datatype} comes in raw_input_contents only.", name)
    for other, _ in given.contents.ListFields():
        if other.name != field:
            text = f"{name}: the contents of {given.datatype} are in {field}, not in {other.name}."
            raise InvalidRequest(text, name)
    found = getattr(given.contents, field)
    check_count(name, shape, len(found))
    values = list(found)
    if given.datatype == BYTES:
        return [text_of(name, each) for each in values]
    if given.datatype.startswith("FP"):
        return numbers(name, given.datatype, values)
    check_range(name, given.datatype, values)
    return values


def _parameter(name: str, value: Any) -> Any:
    kind = value.WhichOneof("parameter_choice")
    if kind is None:
        raise InvalidRequest(f"The parameter {name[:128]} has no value.", name[:128])
    return getattr(value, kind)


def _refuse_parameters(where: str, tensor: Any) -> None:
    """Those of tensors are about shared memory and classification, which this server does not have."""
    for name in tensor.parameters:
        param = f"{where}.parameters.{name[:128]}"
        raise InvalidRequest(f"{param} is not supported by this server.", param, "unsupported_parameter")


def is_raw(message: Any) -> bool:
    """Whether a request has raw contents."""
    return len(message.raw_input_contents) > 0


def infer_response(name: str, version: str, id: str, tensors: Sequence[Tensor], raw: bool) -> Any:
    """A ModelInferResponse."""
    response = service_pb2.ModelInferResponse(model_name=name, model_version=version, id=id)
    for tensor in tensors:
        output = response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        if raw:
            response.raw_output_contents.append(to_raw(tensor))
        elif tensor.datatype == BYTES:
            output.contents.bytes_contents.extend([text.encode() for text in tensor.values])
        else:
            getattr(output.contents, CONTENTS[tensor.datatype]).extend(tensor.values)
    return response


def stream_response(response: Any, final: bool) -> bytes:
    """A ModelStreamInferResponse; `final`: the last one of its request."""
    response.parameters[FINAL].bool_param = final
    return bytes(service_pb2.ModelStreamInferResponse(infer_response=response).SerializeToString())


def stream_error(refusal: Refusal, id: str) -> bytes:
    """A ModelStreamInferResponse that ends a request with an error; programs read what kind it is in its parameters."""
    response = service_pb2.ModelInferResponse(id=id)
    response.parameters[ERROR_STATUS].int64_param = refusal.status
    for name, value in refusal.trailers:
        response.parameters[name.replace("-", "_")].string_param = value
    response.parameters[FINAL].bool_param = True
    failed = service_pb2.ModelStreamInferResponse(error_message=refusal.message, infer_response=response)
    return bytes(failed.SerializeToString())
