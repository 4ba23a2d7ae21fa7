"""What no client of the protocol sends: each gets an error of its own, and the worker serves the next one."""

from __future__ import annotations

import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from tritonclient.grpc import service_pb2 as pb

from tests.kserve.support import SERVICE, add, request

if TYPE_CHECKING:
    from tests.kserve.support import Worker

INVALID, EXHAUSTED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED
BODY = 4 * 2**20  # limits.max_body_bytes


def made(change: Callable[[Any], object], prompts: tuple[str, ...] = ("a",)) -> Any:
    asked = request("tiny", prompts, max_tokens=1)
    change(asked)
    return asked


def raw(datatype: str, shape: list[int], content: bytes) -> Any:
    asked = pb.ModelInferRequest(model_name="tiny")
    asked.inputs.add(name="prompt", datatype=datatype, shape=shape)
    asked.raw_input_contents.append(content)
    return asked


def shaped(*shape: int) -> Callable[[Any], None]:
    def change(asked: Any) -> None:
        del asked.inputs[0].shape[:]
        asked.inputs[0].shape.extend(shape)

    return change


def with_input(*parts: Any) -> Any:
    return made(lambda asked: add(asked, *parts))


REQUESTS: list[tuple[str, Any, str]] = [
    ("negative shape", made(shaped(-1)), "prompt: the shape"),
    ("no shape", made(shaped()), "1 to 8 dimensions, not 0"),
    ("many dimensions", made(shaped(*[1] * 9)), "1 to 8 dimensions, not 9"),
    ("huge shape", made(shaped(2**62, 2**62)), "limits.max_strings"),
    ("more elements than the shape says", made(shaped(1), ("a", "b")), "has 1 elements, and the contents have 2"),
    ("no elements", made(shaped(0), ()), "Input should not be empty"),
    ("unknown datatype", made(lambda a: setattr(a.inputs[0], "datatype", "TEXT")), "'TEXT' is not supported"),
    ("contents of another type", with_input("top_k", "INT32", [1], [1], "int64"), "in int_contents, not in int64"),
    ("a range", with_input("top_k", "INT32", [1], [-5]), "top_k: Input should be greater than or equal to -1"),
    ("a parameter and an input", with_input("max_tokens", "FP32", [1], [1.0]), "max_tokens is given twice"),
    ("a fraction", with_input("seed", "FP32", [1], [1.5]), "seed: Input should be a valid integer"),
    ("text for a number", with_input("seed", "BYTES", [1], [b"5"]), "seed: Input should be a valid integer"),
    ("not a number", with_input("temperature", "FP32", [1], [float("nan")]), "temperature: Input should be a finite"),
    ("infinite", made(lambda a: setattr(a.parameters["top_p"], "double_param", float("inf"))), "top_p: Input should"),
    ("values that differ", with_input("seed", "INT64", [2], [1, 2]), "seed: the elements differ"),
    ("no value", with_input("seed", "INT64", [0], []), "seed: the tensor has no element"),
    ("an unknown input", with_input("spare", "INT64", [1], [1]), "Unknown parameter: spare"),
    ("an input twice", with_input("prompt", "BYTES", [1], [b"b"]), "prompt is given twice"),
    ("an input without a name", with_input("", "BYTES", [1], [b"b"]), "inputs[1].name"),
    ("a reserved name", with_input("model", "BYTES", [1], [b"b"]), "model is no parameter here"),
    ("an unknown output", made(lambda a: a.outputs.add(name="logits")), "'logits' is no output"),
    ("an output of streams", made(lambda a: a.outputs.add(name="token")), "'token' is no output"),
    ("an output without its parameter", made(lambda a: a.outputs.add(name="logprobs")), "needs the parameter logprobs"),
    ("a parameter without a value", made(lambda a: a.parameters["seed"].SetInParent()), "parameter seed has no value"),
    ("shared memory", made(lambda a: a.inputs[0].parameters["shared_memory_region"].SetInParent()), "not supported"),
    ("no UTF-8", made(lambda a: a.inputs[0].contents.bytes_contents.__setitem__(0, b"\xff")), "should be UTF-8"),
    ("no JSON", made(lambda a: setattr(a.parameters["logit_bias"], "string_param", "{")), "logit_bias: a string has"),
    ("deep JSON", made(lambda a: setattr(a.parameters["metadata"], "string_param", "[" * 200 + "]" * 200)), "metadata"),
    ("a stream", made(lambda a: setattr(a.parameters["stream"], "bool_param", True)), "stream cannot be used here"),
    ("raw and typed", made(lambda a: a.raw_input_contents.append(b"\1\0\0\0a")), "all inputs are one or the other"),
    ("raw contents of nothing", made(lambda a: a.raw_input_contents.extend([b"", b""])), "raw_input_contents has 2"),
    ("raw that ends early", raw("BYTES", [1], b"\5\0\0\0ab"), "end inside element 0"),
    ("raw without a length", raw("BYTES", [1], b"\5\0"), "end inside element 0"),
    ("raw of too many", raw("BYTES", [1], b"\0\0\0\0" * 4), "has 1 elements, and the contents have"),
    ("raw of a wrong size", raw("INT32", [2], b"\0" * 7), "INT32 of shape [2] takes 8 bytes"),
    ("raw floats as a prompt", raw("FP32", [1], struct.pack("<f", 1)), "FP32 is no prompt"),
    ("a token that is not the model's", raw("INT32", [1], struct.pack("<i", 70_000)), "prompt"),
    ("a negative timeout", made(lambda a: setattr(a.parameters["timeout"], "int64_param", -1)), "timeout"),
    ("a long name", request("n" * 5000, max_tokens=1), "model_name should have at most 4096"),
    ("no inputs", pb.ModelInferRequest(model_name="tiny"), "prompt: Field required"),
]

RIGHT_IN_STREAMS = ("a stream", "an output of streams")


@pytest.mark.parametrize(("name", "asked", "text"), REQUESTS, ids=[name for name, _, _ in REQUESTS])
def test_a_wrong_request_is_refused_by_name(worker: Worker, name: str, asked: Any, text: str) -> None:
    code, message, _ = worker.refused("ModelInfer", asked)
    assert code == INVALID, message
    assert text in message
    errors = [each.error_message for each in worker.stream([asked]) if each.error_message]
    assert (not errors) == (name in RIGHT_IN_STREAMS)
    assert all(text in error for error in errors)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (b"\xff", "no ModelInferRequest"),
        (b"\x0a\xff\xff\xff\xff\x0f", "no ModelInferRequest"),
        (b"\x2a\x00" * (BODY // 2 - 8), "limits.max_strings"),  # empty inputs
        (b"\x22\x00" * (BODY // 2 - 8), "limits.max_strings"),  # empty parameters
        (b"\xa0\x06\x01" * (BODY // 3 - 8), "limits.max_strings"),  # a field that there is not
        (b"\x0b" * (BODY - 8), "limits.max_strings"),  # groups that begin
    ],
    ids=["a tag", "a length", "inputs", "parameters", "unknown fields", "groups"],
)
def test_bytes_that_would_take_long_to_parse_are_refused(worker: Worker, message: bytes, text: str) -> None:
    code, details, _ = worker.refused("ModelInfer", message)
    assert code == INVALID
    assert text in details


def test_many_numbers_are_refused_before_they_are_parsed(worker: Worker) -> None:
    asked = pb.ModelInferRequest(model_name="tiny")
    add(asked, "prompt", "INT32", [3 * 2**20], [1] * (3 * 2**20))
    assert worker.refused("ModelInfer", asked)[:2] == (
        INVALID,
        "The message has more than 524288 numbers (limits.max_values).",
    )


def test_a_message_that_is_too_large_is_refused(worker: Worker) -> None:
    assert worker.refused("ModelInfer", b"\0" * 100_000_000)[0] == EXHAUSTED
    assert worker.refused("ModelInfer", b"\0" * (BODY * 8), compression=grpc.Compression.Gzip)[0] == EXHAUSTED
    assert worker.infer(request("tiny", max_tokens=1), compression=grpc.Compression.Gzip)["completion_tokens"] == [1]


def test_a_message_of_a_stream_that_is_too_large_ends_its_call(worker: Worker) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        list(worker.stream([request("tiny", id="1", max_tokens=1), b"\0" * (BODY * 2)]))
    assert refused.value.code() == EXHAUSTED
    worker.server.until_idle()


def test_metadata_that_are_too_large_are_refused(worker: Worker) -> None:
    code, _, _ = worker.refused("ModelInfer", request("tiny"), metadata=[("x-spare", "a" * 100_000)])
    assert code == EXHAUSTED


def test_unknown_methods_are_unimplemented(worker: Worker) -> None:
    for method in ("RepositoryModelUnload", "Nothing"):
        assert worker.refused(method, b"")[0] == grpc.StatusCode.UNIMPLEMENTED


def test_a_call_without_a_message_is_refused(worker: Worker) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        worker.channel.stream_unary(f"{SERVICE}ModelInfer")(iter(()), timeout=300)
    assert refused.value.code() == INVALID


def test_health_is_said_and_others_are_served_beside_hostile_calls(worker: Worker) -> None:
    """Several clients send all of it at once, again and again, while others ask how the server is."""
    large = (b"\xa0\x06\x01" * (BODY // 3 - 8), b"\x0b" * (BODY - 8), b"\0" * (BODY * 2))
    messages: list[Any] = [*large, *(asked for _, asked, _ in REQUESTS)]
    with ThreadPoolExecutor(4) as pool:
        attackers = [
            pool.submit(lambda: [worker.refused("ModelInfer", each)[0] for each in messages]) for _ in range(4)
        ]
        while not all(attacker.done() for attacker in attackers):
            assert worker.server.http.get("/health").status_code == 200
            assert worker.triton.is_server_live()
            assert worker.infer(request("tiny", max_tokens=1))["completion_tokens"] == [1]
    for attacker in attackers:
        assert set(attacker.result()) == {INVALID, EXHAUSTED}
    worker.server.until_idle()
