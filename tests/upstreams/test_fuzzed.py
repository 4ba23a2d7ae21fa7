"""Whatever an upstream says is read, or is a Fault: no other exception, which would be logged as this server's own."""

from __future__ import annotations

import contextlib
from typing import Any

import orjson
from hypothesis import given, settings, strategies as st
from tritonclient.grpc import service_pb2

from bdh_batch.upstreams.config import GradioUpstream, HtmlSections, KServeUpstream
from bdh_batch.upstreams.gradio import Reader
from bdh_batch.upstreams.html import Cleaner
from bdh_batch.upstreams.kserve import _parsed, _Reader
from bdh_batch.upstreams.openai import _piece
from bdh_batch.upstreams.protocol import Fault
from tests.upstreams.fakes import tensor

NAMES = [
    *("choices", "index", "delta", "message", "text", "content", "finish_reason", "logprobs", "tool_calls", "function"),
    *("name", "arguments", "id", "type", "usage", "prompt_tokens", "completion_tokens", "prompt_tokens_details"),
    *("cached_tokens", "estimated", "token_ids", "prompt_token_ids", "stop_reason", "error", "param"),
    *("reasoning_content", "refusal", "value", "role", "metadata", "title"),
]
SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=6)
)
WORDS = st.sampled_from(["stop", "error", "assistant", "user", "<b>x", "&#x", "\ud7ff"])
JSON: st.SearchStrategy[Any] = st.recursive(
    SCALARS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=20,
)
CHOICE = st.dictionaries(st.sampled_from(NAMES), JSON, max_size=6)
DATATYPES = st.sampled_from(["BYTES", "BOOL", "INT8", "INT32", "INT64", "UINT64", "FP32", "FP16", "", "BYTES\0"])
TENSORS = st.sampled_from(
    ["text", "token", "finish_reason", "token_ids", "prompt_tokens", "usage_estimated", "prompt_token_ids", "x"]
)


@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4), st.lists(CHOICE, max_size=2), st.booleans())
def test_any_event_of_openais_api(event: dict[str, Any], choices: list[Any], chat: bool) -> None:
    for value in (event, {**event, "choices": choices}):
        with contextlib.suppress(Fault):
            piece = _piece(value, chat)
            assert isinstance(piece.text, str)
            orjson.dumps([piece.extras, [*piece.tokens], piece.prompt_tokens, piece.completion_tokens, piece.stop])


@given(st.lists(st.tuples(st.sampled_from(["generating", "complete", "error", "heartbeat", "x"]), JSON), max_size=4))
async def test_any_events_of_gradio(events: list[tuple[str, Any]]) -> None:
    upstream = GradioUpstream(id="up", kind="gradio", url="http://h", reasoning=True)
    reader = Reader(upstream, Cleaner("up", HtmlSections()))
    for event, data in events:
        with contextlib.suppress(Fault):
            await reader.read(event, orjson.dumps([data]).decode())


@st.composite
def responses(draw: Any) -> Any:
    made = service_pb2.ModelStreamInferResponse()
    for _ in range(draw(st.integers(0, 4))):
        output = tensor(draw(TENSORS), draw(st.lists(st.binary(max_size=4), max_size=3)))
        output.datatype = draw(DATATYPES)
        output.shape[:] = draw(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 3), max_size=3))
        output.contents.int_contents.extend(draw(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=3)))
        output.contents.int64_contents.extend(draw(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3)))
        output.contents.bool_contents.extend(draw(st.lists(st.booleans(), max_size=2)))
        made.infer_response.outputs.append(output)
    made.infer_response.raw_output_contents.extend(draw(st.lists(st.binary(max_size=9), max_size=4)))
    return made


@settings(max_examples=300)
@given(responses(), st.integers(0, 200), st.binary(max_size=3))
def test_any_response_of_kserve(response: Any, at: int, spoilt: bytes) -> None:
    raw = response.SerializeToString()
    upstream = KServeUpstream(id="up", kind="kserve", endpoints=["h:1"])
    for message in (raw, raw[:at] + spoilt + raw[at + len(spoilt) :]):
        with contextlib.suppress(Fault):
            piece = _Reader(upstream, "r").read(_parsed(service_pb2.ModelStreamInferResponse, message))
            assert isinstance(piece.text, str)
