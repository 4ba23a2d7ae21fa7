"""Tensors: what is written is read, and what is counted before it is parsed is what is parsed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from tritonclient.grpc import service_pb2 as pb

from bdh_batch.errors import InvalidRequest
from bdh_batch.http.tensors.parameters import body_values
from bdh_batch.http.tensors.tensor import DTYPES, Tensor, elements, from_json, from_raw, to_raw
from bdh_batch.kserve.calls import client_address
from bdh_batch.kserve.messages import parse
from bdh_batch.settings import Limits
from bdh_batch.system.protobuf import Counter, TooMany

TEXTS = st.lists(st.text(max_size=9), min_size=1, max_size=9)


def read_or_refused(work: Callable[..., Any], *arguments: Any) -> Any:
    """How much was read; of a refusal, which field it names."""
    try:
        found = work(*arguments)
    except InvalidRequest as refused:
        return refused.param
    return len(found) if isinstance(found, list) else found


@given(TEXTS)
def test_texts_are_read_as_they_are_written(texts: list[str]) -> None:
    raw = to_raw(Tensor.of("a", "BYTES", texts))
    assert from_raw("a", "BYTES", (len(texts),), raw) == texts
    assert from_json("a", "BYTES", (len(texts), 1), [[text] for text in texts]) == texts


@pytest.mark.parametrize("datatype", DTYPES)
def test_numbers_are_read_as_they_are_written(datatype: str) -> None:
    dtype = DTYPES[datatype]
    values = [True, False] if dtype.kind == "b" else [0, 1, 100] if dtype.kind in "iu" else [0.0, 0.5, 0.7]
    raw = to_raw(Tensor.of("a", datatype, values))
    assert len(raw) == len(values) * dtype.itemsize
    assert from_raw("a", datatype, (len(values),), raw) == values


@given(st.binary(max_size=40), st.integers(0, 4))
def test_any_raw_contents_are_read_or_refused(raw: bytes, count: int) -> None:
    for datatype in ("BYTES", "INT32", "FP32"):
        assert read_or_refused(from_raw, "a", datatype, (count,), raw) in (count, "a")


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5))
def test_a_shape_has_as_many_elements_as_its_product_or_is_refused(shape: list[int]) -> None:
    assert read_or_refused(elements, "a", "INT32", shape, Limits()) in (math.prod(shape), "a")


@pytest.mark.parametrize(
    ("datatype", "shape", "data"),
    [
        ("INT32", [2], [1, True]),
        ("INT32", [1], [1.0]),
        ("INT8", [1], [128]),
        ("UINT64", [1], [-1]),
        ("BOOL", [1], [1]),
        ("BYTES", [1], [1]),
        ("BYTES", [2, 2], [["a", "b"], "c"]),
        ("BYTES", [2], ["a"]),
        ("FP32", [1], ["0.5"]),
        ("INT32", [1], [[1]]),
    ],
)
def test_json_that_is_no_such_tensor_is_refused(datatype: str, shape: list[int], data: list[Any]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        from_json("a", datatype, shape, data)
    assert refused.value.param == "a"


def test_fields_come_as_tensors_of_their_kind() -> None:
    tensors = [
        Tensor("prompt", "INT32", (2, 2), [1, 2, 3, 4]),
        Tensor("temperature", "FP32", (2, 1), [0.7, 0.7]),
        Tensor("stop", "BYTES", (1,), ["a"]),
        Tensor("stop_token_ids", "INT64", (0,), []),
        Tensor("structured_outputs", "BYTES", (1,), ['{"regex": "a"}']),
    ]
    assert body_values(tensors, {"user": "{}", "logit_bias": '{"1": 2}'}, Limits()) == {
        "prompt": [[1, 2], [3, 4]],
        "temperature": 0.7,
        "stop": ["a"],
        "stop_token_ids": [],
        "structured_outputs": {"regex": "a"},
        "user": "{}",
        "logit_bias": {"1": 2},
    }


def message(texts: list[str], numbers: list[int], parameters: dict[str, int]) -> Any:
    made = pb.ModelInferRequest(model_name="m")
    made.inputs.add(name="a", shape=[1, 2]).contents.bytes_contents.extend([text.encode() for text in texts])
    made.inputs.add(name="b").contents.int64_contents.extend(numbers)
    made.inputs.add(name="c").contents.fp32_contents.extend([1.0] * len(numbers))
    for name, value in parameters.items():
        made.parameters[name].int64_param = value
    return made


@given(
    TEXTS,
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9),
    st.dictionaries(st.text(max_size=3), st.integers(0, 9), max_size=4),
)
def test_what_is_counted_is_what_there_is(texts: list[str], numbers: list[int], parameters: dict[str, int]) -> None:
    made = message(texts, numbers, parameters)
    raw, kind = made.SerializeToString(), pb.ModelInferRequest
    packed = 2 + 2 * len(numbers)
    exact = Counter(10_000, packed)
    exact.run(raw, kind.DESCRIPTOR)
    assert exact._numbers == packed
    with pytest.raises(TooMany, match="numbers"):
        Counter(10_000, packed - 1).run(raw, kind.DESCRIPTOR)
    with pytest.raises(TooMany, match="fields"):
        Counter(len(texts), 10_000).run(raw, kind.DESCRIPTOR)


@given(st.binary(max_size=200))
def test_any_bytes_are_counted_and_parsed_or_refused(raw: bytes) -> None:
    Counter(1000, 1000).run(raw, pb.ModelInferRequest.DESCRIPTOR)
    read_or_refused(parse, raw, pb.ModelInferRequest, Limits())


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("ipv4:10.0.0.1:5000", "", "10.0.0.1"),
        ("ipv4:10.0.0.1:5000", "1.2.3.4", "1.2.3.4"),
        ("ipv4:10.0.0.1:5000", "1.2.3.4, 10.0.0.2", "1.2.3.4"),
        ("ipv4:9.9.9.9:5000", "1.2.3.4", "9.9.9.9"),
        ("ipv6:%5B::1%5D:5000", "", "::1"),
        ("ipv6:%5B::ffff:10.0.0.1%5D:5000", "1.2.3.4", "1.2.3.4"),
        ("unix:", "1.2.3.4", "unix"),
    ],
)
def test_an_address_is_the_clients(peer: str, forwarded: str, address: str) -> None:
    assert client_address(peer, forwarded, ["10.0.0.0/8"]) == address


def test_half_precision_is_what_was_written() -> None:
    assert from_raw("a", "FP16", (2,), np.array([0.7, 0.1], "<f2").tobytes()) == [0.7, 0.1]
    with pytest.raises(InvalidRequest, match="finite"):
        from_raw("a", "FP16", (1,), np.array([np.inf], "<f2").tobytes())
