"""Upstreams of KServe v2: the seed's tables, streams and whole responses, and workers that misbehave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from pydantic import ValidationError
from tritonclient.grpc import service_pb2

from bdh_batch.errors import (
    BDHError,
    InvalidRequest,
    Unavailable,
    UnsupportedParameter,
    UpstreamFailed,
    UpstreamLacksModel,
    UpstreamTimeout,
)
from bdh_batch.messages import FinishReason, Usage
from bdh_batch.processes.upstreams import revision_of
from bdh_batch.upstreams.config import KServeUpstream
from tests.upstreams.fakes import StreamScript, Worker, tensor, token, worker
from tests.upstreams.support import HANG_SECONDS, Response, upstream


def streamed(*texts: str | bytes, reason: str = "stop") -> StreamScript:
    async def script(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        for text in texts:
            yield token(request, text)
        yield token(request, "", reason)

    return script


def sent(*responses: Callable[[Any], Any]) -> StreamScript:
    async def script(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        for make in responses:
            yield make(request)

    return script


async def asked(
    script: StreamScript, *arguments: Any, options: dict[str, Any] | None = None, **fields: Any
) -> tuple[Response, Worker]:
    async with worker(script) as fake, upstream(kind="kserve", endpoints=[fake.address], **(options or {})) as gateway:
        return await gateway.ask(*arguments, **fields), fake


async def test_a_request_is_the_seeds_table() -> None:
    """AnyServe's front: a capability as the model's name, one for streams, and inputs by their names."""
    options = {"model": "generate", "stream_model": "generate_stream", "version": "llamacpp"}
    fields = {"max_tokens": 100, "temperature": 0.5, "top_p": 0.75, "top_k": 40}
    got, fake = await asked(streamed("Hel", "lo"), "Hello, world!", options=options, **fields)
    assert (got.text, got.reasons, got.error) == ("Hello", [FinishReason.STOP], None)
    (request,) = fake.asked
    assert (request.model_name, request.model_version) == ("generate_stream", "llamacpp")
    found = {each.name: (each.datatype, list(each.shape), each.contents) for each in request.inputs}
    assert found["prompt"][:2] == ("BYTES", [1])
    assert list(found["prompt"][2].bytes_contents) == [b"Hello, world!"]
    assert found["max_tokens"][0] == "INT32"
    assert list(found["max_tokens"][2].int_contents) == [100]
    assert (found["temperature"][0], list(found["temperature"][2].fp32_contents)) == ("FP32", [0.5])
    assert list(found["top_p"][2].fp32_contents) == [0.75]
    assert (found["top_k"][0], list(found["top_k"][2].int_contents)) == ("INT32", [40])
    assert not request.parameters


async def test_a_worker_without_streams_is_asked_for_all_at_once() -> None:
    def whole(request: Any) -> Any:
        outputs = [tensor("text", "all of it"), tensor("model", "m")]
        return service_pb2.ModelInferResponse(model_name=request.model_name, id=request.id, outputs=outputs)

    async def none(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        yield

    async with worker(none, whole) as fake, upstream(kind="kserve", endpoints=[fake.address]) as gateway:
        for _ in range(2):
            got = await gateway.ask(max_tokens=5)
            assert (got.text, got.reasons) == ("all of it", [FinishReason.STOP])
        assert len(fake.asked) == 3  # once the stream was tried


async def test_after_a_while_a_worker_without_streams_may_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bdh_batch.upstreams.kserve.BELIEVED_SECONDS", 0.0)
    upgraded = False

    def whole(request: Any) -> Any:
        return service_pb2.ModelInferResponse(id=request.id, outputs=[tensor("text", "whole")])

    async def script(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        if not upgraded:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        yield token(request, "streamed", "stop")

    async with worker(script, whole) as fake, upstream(kind="kserve", endpoints=[fake.address]) as gateway:
        assert (await gateway.ask()).text == "whole"
        upgraded = True
        assert (await gateway.ask()).text == "streamed"


@pytest.mark.parametrize("passed", [False, True])
async def test_the_workers_ids_are_not_the_clients(passed: bool) -> None:
    options = {"pass_request_id": passed}
    async with worker(streamed("a")) as fake, upstream(kind="kserve", endpoints=[fake.address], **options) as gateway:
        for _ in range(2):
            assert (await gateway.ask()).text == "a"
    ids = [each.id for each in fake.asked]
    assert ids == ["r-1", "r-1"] if passed else len({"r-1", *ids}) == 3


async def test_names_of_tensors_and_parameters_can_be_chosen() -> None:
    options = {
        "prompt": {"name": "text_input", "datatype": "BYTES", "shape": [1, 1]},
        "inputs": {
            "max_tokens": {"name": "n_predict", "datatype": "INT64"},
            "stop_token_ids": {"name": "s", "datatype": "INT32"},
        },
        "parameters": ["seed", "min_p", "ignore_eos", "logit_bias"],
        "outputs": {"text": ["text_output"]},
        "defaults": {"max_tokens": 7},
    }
    script = sent(lambda request: token(request, "ok", "stop", name="text_output"))
    fields = {"seed": 2**63, "min_p": 0.5, "ignore_eos": True, "logit_bias": {"1": 2}, "stop_token_ids": [4, 5]}
    got, fake = await asked(script, options=options, **fields)
    assert got.text == "ok"
    (request,) = fake.asked
    found = {each.name: each for each in request.inputs}
    assert list(found["text_input"].shape) == [1, 1]
    assert list(found["n_predict"].contents.int64_contents) == [7]
    assert list(found["s"].contents.int_contents) == [4, 5]
    parameters = request.parameters
    assert (parameters["seed"].uint64_param, parameters["min_p"].double_param) == (2**63, 0.5)
    assert (parameters["ignore_eos"].bool_param, parameters["logit_bias"].string_param) == (True, '{"1":2}')


async def test_raw_contents_ids_and_usage_are_read() -> None:
    def raw(request: Any) -> Any:
        made = token(request, "", "", tensor("token_ids", [], "INT64", [2]), tensor("prompt_tokens", [], "INT32"))
        for output in made.infer_response.outputs:
            output.ClearField("contents")
        texts = [b"\x02\0\0\0hi", b"\x06\0\0\0length"]
        numbers = [(1).to_bytes(8, "little") + (2).to_bytes(8, "little"), (9).to_bytes(4, "little")]
        made.infer_response.raw_output_contents.extend(texts + numbers)
        return made

    got, _ = await asked(sent(raw))
    assert (got.text, got.reasons, got.usage) == ("hi", [FinishReason.LENGTH], Usage(9, 2))


async def test_characters_may_be_cut_between_responses() -> None:
    got, _ = await asked(streamed(b"\xe2", b"\x82", b"\xac!"))
    assert got.text == "€!"


async def test_texts_are_cut_at_stop_strings_here() -> None:
    cancelled = asyncio.Event()

    async def endless(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        try:
            yield token(request, "one END")
            while True:
                yield token(request, " two")
                await asyncio.sleep(0)
        finally:
            cancelled.set()

    async with worker(endless) as fake, upstream(kind="kserve", endpoints=[fake.address]) as gateway:
        got = await gateway.ask(stop=["END two"])
        assert (got.text, got.reasons) == ("one ", [FinishReason.STOP])
        await asyncio.wait_for(cancelled.wait(), HANG_SECONDS)
    got, _ = await asked(streamed("one END", " t"), stop=["END two"])
    assert got.text == "one END t"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"seed": 1}, "seed"),
        ({"logprobs": 2}, "logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"max_completion_tokens": 5, "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{}]}, "tools"),
        ({"best_of": 2}, "best_of"),
    ],
)
async def test_what_it_cannot_express_is_refused_by_name_or_dropped(fields: dict[str, Any], param: str) -> None:
    async with worker(streamed("ok")) as fake:
        options: dict[str, Any] = {"kind": "kserve", "endpoints": [fake.address]}
        async with upstream(**options) as gateway:
            with pytest.raises(UnsupportedParameter) as refused:
                await gateway.ask(**fields)
            assert refused.value.param == param
        if param == "best_of":
            return
        async with upstream(**options, drop=[param]) as gateway:
            assert (await gateway.ask(**fields)).text == "ok"
        assert param not in {each.name for each in fake.asked[0].inputs}


async def test_what_asks_for_nothing_is_left_out() -> None:
    nothing: dict[str, Any] = {
        "presence_penalty": 0,
        "n": 1,
        "logprobs": False,
        "echo": False,
        "tools": [],
        "tool_choice": "auto",
    }
    got, fake = await asked(streamed("ok"), max_completion_tokens=3, **nothing)
    assert got.text == "ok"
    assert sorted(each.name for each in fake.asked[0].inputs) == ["max_tokens", "prompt"]


@pytest.mark.parametrize(("field", "value"), [("max_tokens", 2**40), ("top_k", 2**31)])
async def test_a_value_that_the_tensor_cannot_hold_is_refused(field: str, value: int) -> None:
    fields: dict[str, Any] = {field: value}
    got, fake = await asked(streamed("ok"), **fields)
    assert isinstance(got.error, InvalidRequest)
    assert got.error.param == field
    assert not fake.asked


async def test_token_ids_are_refused_by_a_worker_of_texts() -> None:
    got, _ = await asked(streamed("ok"), [1, 2, 3])
    assert isinstance(got.error, InvalidRequest)
    assert got.error.param == "prompt"


def wrong_id(request: Any) -> Any:
    made = token(request, "x")
    made.infer_response.id = "another"
    return made


def wrong_type(request: Any) -> Any:
    made = token(request, "x")
    made.infer_response.outputs[0].CopyFrom(tensor("token", [7], "INT32"))
    return made


def wrong_shape(request: Any) -> Any:
    made = token(request, "x")
    made.infer_response.outputs[0].shape[:] = [3]
    return made


def negative_shape(request: Any) -> Any:
    made = token(request, "x")
    made.infer_response.outputs[0].shape[:] = [-1]
    return made


def no_contents(request: Any) -> Any:
    made = token(request, "x")
    made.infer_response.outputs[0].ClearField("contents")
    return made


def raw_of_one(request: Any) -> Any:
    made = token(request, "x")
    made.infer_response.raw_output_contents.append(b"\x01\0\0\0x")
    return made


def raw_cut(request: Any) -> Any:
    made = token(request, "x")
    made.infer_response.raw_output_contents.extend([b"\xff\xff\xff\x7fx", b"\x04\0\0\0null"])
    return made


def empty(request: Any) -> Any:
    return service_pb2.ModelStreamInferResponse()


def says_error(request: Any) -> Any:
    return service_pb2.ModelStreamInferResponse(error_message="out of memory")


def ends_with_error(request: Any) -> Any:
    return token(request, "", "error")


def large(request: Any) -> Any:
    return token(request, b"x" * (5 * 2**20))


def many_outputs(request: Any) -> Any:
    made = service_pb2.ModelStreamInferResponse()
    made.infer_response.outputs.extend([service_pb2.ModelInferResponse.InferOutputTensor()] * 400_000)
    return made


def many_parameters(request: Any) -> Any:
    made = token(request, "x")
    for number in range(80_000):
        made.infer_response.parameters[str(number)].bool_param = True
    return made


def many_elements(request: Any) -> Any:
    made = token(request, "x")
    made.infer_response.outputs.append(tensor("spare", [b""] * 400_000))
    return made


def token_of_int64(request: Any) -> Any:
    return token(request, "x", "null", tensor("token_ids", [2**40], "INT64"))


def negative_token(request: Any) -> Any:
    return token(request, "x", "null", tensor("token_ids", [-5], "INT32"))


def not_utf8(request: Any) -> Any:
    return token(request, b"\xff\xfe")


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (wrong_id, "wrong_request"),
        (wrong_type, "malformed"),
        (wrong_shape, "malformed"),
        (negative_shape, "malformed"),
        (no_contents, "malformed"),
        (raw_of_one, "malformed"),
        (raw_cut, "malformed"),
        (empty, "malformed"),
        (not_utf8, "malformed"),
        (token_of_int64, "malformed"),
        (negative_token, "malformed"),
        (says_error, "error"),
        (ends_with_error, "error"),
        (large, "too_large"),
        (many_outputs, "too_large"),
        (many_parameters, "too_large"),
        (many_elements, "too_large"),
    ],
)
@pytest.mark.parametrize("before", [0, 50])
async def test_a_worker_that_misbehaves_is_named_and_counted_by_how(
    make: Callable[[Any], Any], kind: str, before: int
) -> None:
    script = sent(*[lambda request: token(request, "x")] * before, make)
    async with worker(script) as fake, upstream(kind="kserve", endpoints=[fake.address]) as gateway:
        got = await gateway.ask()
    assert got.text == "x" * before
    assert isinstance(got.error, UpstreamFailed)
    assert got.error.code == f"upstream_{kind}"
    assert "'up'" in got.error.message
    assert gateway.seen.failures == {kind: 1}


async def test_a_worker_without_any_method_is_named() -> None:
    async with worker(sent()) as fake, upstream(kind="kserve", endpoints=[fake.address], streaming=False) as gateway:
        got = await gateway.ask()
    assert isinstance(got.error, UpstreamFailed)
    assert "ModelInfer" in got.error.message


@pytest.mark.parametrize(
    ("status", "error"), [(400, InvalidRequest), (429, Unavailable), (503, Unavailable), (500, UpstreamFailed)]
)
async def test_an_error_with_a_status_is_what_it_is_over_http(status: int, error: type[BDHError]) -> None:
    def refuses(request: Any) -> Any:
        made = service_pb2.ModelStreamInferResponse(error_message="no room")
        made.infer_response.parameters["error_status"].int64_param = status
        made.infer_response.parameters["error_param"].string_param = "prompt"
        return made

    got, _ = await asked(sent(refuses))
    assert type(got.error) is error
    assert isinstance(got.error, InvalidRequest) <= (getattr(got.error, "param", None) == "prompt")


@pytest.mark.parametrize("message", [b"\xff", b"\x1a\0" * 100_000], ids=["no message", "many parts"])
async def test_an_endpoint_whose_own_words_are_hostile_is_down(message: bytes) -> None:
    async def say(raw: bytes, context: Any) -> bytes:
        return message

    server = grpc.aio.server()
    method = grpc.unary_unary_rpc_method_handler(say)  # bytes as they are
    handlers = dict.fromkeys(("ServerReady", "ServerMetadata", "ModelMetadata"), method)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        async with upstream(checked=True, kind="kserve", endpoints=[address]) as gateway:
            assert [endpoint.up for endpoint in gateway.backend.endpoints.all] == [False]
    finally:
        await server.stop(0)


async def test_usage_that_is_no_number_of_tokens_is_malformed() -> None:
    usage = tensor("completion_tokens", [2**63 - 1] * 3, "INT64", (3,))
    got, _ = await asked(sent(lambda request: token(request, "x", "stop", usage)))
    assert isinstance(got.error, UpstreamFailed)
    assert got.error.code == "upstream_malformed"


@pytest.mark.parametrize("name", ["x-secret-bin", "grpc-timeout", "x!y"])
@pytest.mark.parametrize("option", ["headers", "pass_headers"])
def test_names_that_metadata_cannot_have_are_refused(name: str, option: str) -> None:
    given: Any = {name: "1"} if option == "headers" else [name]
    with pytest.raises(ValidationError, match="gRPC has no metadata"):
        KServeUpstream(id="up", kind="kserve", endpoints=["h:1"], **{option: given})


async def test_a_stream_that_just_ends_is_cut_off_where_reasons_were_said() -> None:
    got, _ = await asked(sent(lambda request: token(request, "x")))
    assert isinstance(got.error, UpstreamFailed)
    assert got.error.code == "upstream_closed"

    def plain(request: Any) -> Any:
        made = token(request, "x")
        del made.infer_response.outputs[1]
        return made

    got, _ = await asked(sent(plain, plain))
    assert (got.text, got.reasons) == ("xx", [FinishReason.STOP])


async def test_bytes_that_are_no_message_are_malformed() -> None:
    async def nonsense(requests: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"

    handlers = {"ModelStreamInfer": grpc.unary_stream_rpc_method_handler(nonsense)}
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers)])
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with upstream(kind="kserve", endpoints=[address]) as gateway:
        got = await gateway.ask()
    await server.stop(0)
    assert isinstance(got.error, UpstreamFailed)
    assert got.error.code == "upstream_malformed"


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequest),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Unavailable),
        (grpc.StatusCode.UNAVAILABLE, UpstreamFailed),
        (grpc.StatusCode.INTERNAL, UpstreamFailed),
        (grpc.StatusCode.UNAUTHENTICATED, UpstreamFailed),
        (grpc.StatusCode.NOT_FOUND, UpstreamLacksModel),
        (grpc.StatusCode.DEADLINE_EXCEEDED, UpstreamTimeout),
    ],
)
async def test_a_status_is_what_it_means(code: grpc.StatusCode, error: type[Exception]) -> None:
    async def script(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        await context.abort(code, "why it is so")
        yield

    got, _ = await asked(script)
    assert type(got.error) is error
    assert ("why it is so" in str(got.error)) == (code is grpc.StatusCode.INVALID_ARGUMENT)


async def test_a_worker_that_is_down_or_slow_is_given_up(unused_tcp_port: int) -> None:
    async with upstream(kind="kserve", endpoints=[f"127.0.0.1:{unused_tcp_port}"]) as gateway:
        got = await gateway.ask()
    assert isinstance(got.error, UpstreamFailed)
    assert got.error.code == "upstream_connect"

    async def stalls(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        yield token(request, "x")
        await asyncio.sleep(HANG_SECONDS)

    got, _ = await asked(stalls, options={"gap_seconds": 0.2})
    assert isinstance(got.error, UpstreamTimeout)
    assert got.error.code == "upstream_gap_timeout"


async def test_a_client_that_leaves_cancels_the_call() -> None:
    cancelled = asyncio.Event()

    async def endless(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        try:
            while True:
                yield token(request, "x")
                await asyncio.sleep(0.01)
        finally:
            cancelled.set()

    async with worker(endless) as fake, upstream(kind="kserve", endpoints=[fake.address]) as gateway:
        generation = await gateway.start()
        async for _ in generation:
            break
        generation.abort()
        await asyncio.wait_for(cancelled.wait(), 300)


async def test_metadata_is_the_settings_and_what_they_pass_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UP_KEY", "sk-1")
    options = {"key_env": "UP_KEY", "headers": {"x-team": "a"}, "pass_headers": ["x-trace"]}
    _, fake = await asked(streamed("ok"), "hi", None, {"x-trace": "7"}, options=options)
    (metadata,) = fake.metadata
    assert (metadata["authorization"], metadata["x-team"], metadata["x-trace"]) == ("Bearer sk-1", "a", "7")


def test_other_headers_or_another_template_make_it_another_upstream(tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"

    def revision(header: str) -> str:
        options: Any = {"headers": {"x-team": header}, "template": template}
        return revision_of(KServeUpstream(id="up", kind="kserve", endpoints=["h:1"], **options))

    template.write_text("a")
    found = {revision("one"), revision("two"), revision("one")}
    template.write_text("b")
    assert len(found | {revision("one")}) == 3
