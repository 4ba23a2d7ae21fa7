"""A worker of KServe's protocol, and the requests that tests send it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2 as pb

if TYPE_CHECKING:
    from tests.conftest import Server

SERVICE = "/inference.GRPCInferenceService/"
NUMPY = {"BYTES": np.object_, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32, "BOOL": np.bool_}
WITHIN = 300.0  # seconds, or it is a failure


@dataclass
class Worker:
    """A server with gRPC, and the ways to speak to it."""

    server: Server
    address: str
    name: str

    @cached_property
    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self.address, options=[("grpc.max_send_message_length", -1)])

    @cached_property
    def triton(self) -> triton.InferenceServerClient:
        return triton.InferenceServerClient(self.address)

    def close(self) -> None:
        self.channel.close()
        self.triton.close()

    def call(self, method: str, message: Any, **options: Any) -> bytes:
        """The response to one call, as bytes. Raises grpc.RpcError."""
        raw = message if isinstance(message, bytes) else message.SerializeToString()
        return bytes(self.channel.unary_unary(SERVICE + method)(raw, timeout=options.pop("timeout", WITHIN), **options))

    def infer(self, request: Any, **options: Any) -> dict[str, list[Any]]:
        """The outputs of ModelInfer, by name."""
        return outputs(pb.ModelInferResponse.FromString(self.call("ModelInfer", request, **options)))

    def refused(self, method: str, message: Any, **options: Any) -> tuple[grpc.StatusCode, str, dict[str, str]]:
        """The status of a call that fails: code, text, and the metadata that come with it."""
        try:
            self.call(method, message, **options)
        except grpc.RpcError as error:
            return error.code(), error.details() or "", dict(error.trailing_metadata() or ())
        raise AssertionError("the call went well")

    def stream(self, requests: Iterable[Any], **options: Any) -> Any:
        """A call of ModelStreamInfer, whose responses can be iterated over."""
        method = self.channel.stream_stream(
            f"{SERVICE}ModelStreamInfer",
            request_serializer=lambda each: each if isinstance(each, bytes) else each.SerializeToString(),
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )
        return method(iter(requests), timeout=options.pop("timeout", WITHIN), **options)

    def idle(self) -> bool:
        """Whether nothing runs or waits in the engine."""
        return bool(self.server.http.get("/load").json()["server_load"] == 0)


def request(name: str, prompts: Sequence[str] = ("ROMEO:",), id: str = "", **parameters: Any) -> pb.ModelInferRequest:
    """A request with typed contents; what is in `parameters` are request parameters."""
    made = pb.ModelInferRequest(model_name=name, id=id)
    add(made, "prompt", "BYTES", [len(prompts)], [prompt.encode() for prompt in prompts])
    for key, value in parameters.items():
        kind = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
        setattr(made.parameters[key], kind, value)
    return made


def add(to: Any, name: str, datatype: str, shape: Sequence[int], values: Sequence[Any], field: str = "") -> None:
    """Adds an input with typed contents."""
    fields = {"BYTES": "bytes", "INT32": "int", "INT64": "int64", "FP32": "fp32", "FP64": "fp64", "BOOL": "bool"}
    given = to.inputs.add(name=name, datatype=datatype, shape=shape)
    getattr(given.contents, f"{field or fields[datatype]}_contents").extend(values)


def triton_input(name: str, datatype: str, values: Sequence[Any], kind: Any = triton.InferInput) -> Any:
    """An input as tritonclient makes it, with raw contents."""
    array: Any = np.array(values, NUMPY[datatype])
    made = kind(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def outputs(response: Any) -> dict[str, list[Any]]:
    """The outputs of a response with typed contents, by name."""
    found: dict[str, list[Any]] = {}
    for output in response.outputs:
        contents = output.contents
        texts = [each.decode() for each in contents.bytes_contents]
        numbers = contents.bool_contents if output.datatype == "BOOL" else contents.int_contents
        found[output.name] = texts if output.datatype == "BYTES" else list(numbers)
        assert list(output.shape) == [len(found[output.name])]
    return found


def by_request(responses: Iterable[Any]) -> Mapping[str, list[dict[str, list[Any]]]]:
    """The outputs of a stream's responses, by the ids of their requests. None may be an error."""
    found: dict[str, list[dict[str, list[Any]]]] = {}
    for response in responses:
        assert not response.error_message
        found.setdefault(response.infer_response.id, []).append(outputs(response.infer_response))
    return found


def said(steps: Iterable[Mapping[str, list[Any]]]) -> str:
    """The text of one request's stream, which must be as streams are."""
    *tokens, last = steps
    assert all(each["token"] != [""] and each["finish_reason"] == ["null"] for each in tokens)
    assert last["token"] == [""]
    assert last["finish_reason"][0] in ("stop", "length")
    assert [token for each in (*tokens, last) for token in each["token_ids"]]
    return "".join(each["token"][0] for each in tokens)


@contextlib.contextmanager
def worker_of(serve: Callable[..., Any], port: int, name: str, *options: str, **how: Any) -> Iterator[Worker]:
    """Starts a server with gRPC at `port`."""
    with serve(f"kserve.grpc_port={port}", *options, **how) as server:
        worker = Worker(server, f"127.0.0.1:{port}", name)
        try:
            yield worker
        finally:
            worker.close()
