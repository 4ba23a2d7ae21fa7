"""A gateway as its clients see it; behind it are fakes, and servers like this one."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anthropic
import grpc
import httpx
import pytest
from openai import APIStatusError, AsyncOpenAI, BadRequestError, NotFoundError
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.conftest import CONFORMANCE, HANG_SECONDS, ServeFactory, Server, clean_environment, eventually, free_port
from tests.launcher import Launcher
from tests.support import event_lines
from tests.upstreams.fakes import Connection, chunk, token
from tests.upstreams.gateway import Behind, gateway, options

STREAMS = 64
PROMPTS = [f"prompt {number}: é" for number in range(STREAMS)]


async def test_the_models_of_all_upstreams_are_listed_by_their_names(client: AsyncOpenAI) -> None:
    models = (await client.models.list()).data
    assert [model.id for model in models] == ["llamacpp", "tinyllama", "gpt", "gpt-4", "bharatgen-param-17b"]
    assert {model.owned_by for model in models} == {"upstream"}
    assert {model.model_dump()["fingerprint"] for model in models} == {None}  # who knows what is behind them
    assert (await client.models.retrieve("gpt-4")).id == "gpt-4"
    with pytest.raises(APIStatusError) as missing:
        await client.models.retrieve("other")
    assert missing.value.status_code == 404


async def test_a_whole_response_has_what_the_upstream_said(behind: tuple[Server, Behind], client: AsyncOpenAI) -> None:
    logprobs = {"content": [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}]}

    async def script(connection: Connection) -> None:
        head = {"choices": [{"index": 0, "delta": {"reasoning_content": "Hm."}}]}
        first = {"choices": [{"index": 0, "delta": {"content": "a"}, "logprobs": logprobs}]}
        usage = {"prompt_tokens": 9, "completion_tokens": 3}
        await connection.events(head, first, chunk("b", "stop", chat=True), {"choices": [], "usage": usage})

    behind[1].web = script
    got = await client.chat.completions.create(
        model="gpt-4", messages=[{"role": "user", "content": "q"}], logprobs=True, presence_penalty=0.5
    )
    assert got.model == "gpt-4"
    (choice,) = got.choices
    assert (choice.message.content, choice.finish_reason) == ("ab", "stop")
    assert getattr(choice.message, "reasoning_content") == "Hm."  # noqa: B009
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert choice.logprobs.content[0].logprob == -0.5
    assert got.usage is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (9, 3)
    assert "estimated" not in got.usage.model_dump()


async def test_calls_of_tools_are_streamed_through(behind: tuple[Server, Behind], client: AsyncOpenAI) -> None:
    parts = [
        {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}},
        {"index": 0, "function": {"arguments": "{}"}},
    ]

    async def script(connection: Connection) -> None:
        assert connection.asked.body["tools"]
        deltas = ({"choices": [{"index": 0, "delta": {"tool_calls": [part]}}]} for part in parts)
        await connection.events(*deltas, chunk(None, "tool_calls", chat=True))

    behind[1].web = script
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    stream = await client.chat.completions.create(
        model="gpt", messages=[{"role": "user", "content": "q"}], tools=[tool], stream=True
    )
    choices = [event.choices[0] async for event in stream]
    calls = [call.function for choice in choices for call in choice.delta.tool_calls or () if call.function]
    assert [(call.name, call.arguments) for call in calls] == [("f", ""), (None, "{}")]
    assert choices[-1].finish_reason == "tool_calls"


async def test_messages_are_passed_on_as_a_chat_and_come_back_as_messages(
    behind: tuple[Server, Behind], client: AsyncOpenAI
) -> None:
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    asked: list[Any] = []

    async def script(connection: Connection) -> None:
        asked.append(connection.asked.body)
        deltas: list[dict[str, Any]] = [{"reasoning_content": "Hm."}, {"content": "So:"}, {"tool_calls": [call]}]
        events = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
        if len(asked) == 1:
            await connection.events(*events, chunk(None, "tool_calls", chat=True))
        else:
            last = chunk("a", "stop", chat=True)
            last["choices"][0]["stop_reason"] = "b"
            await connection.events(last)

    behind[1].web = script
    tool: Any = {"name": "f", "input_schema": {"type": "object"}}
    async with anthropic.AsyncAnthropic(base_url=behind[0].url, api_key="none", max_retries=0) as messages:
        user: Any = {"role": "user", "content": "q"}
        first = await messages.messages.create(model="gpt", max_tokens=9, system="s", messages=[user], tools=[tool])
        assert [block.to_dict() for block in first.content] == [
            {"type": "text", "text": "So:"},
            {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
        ]
        assert first.stop_reason == "tool_use"
        result: Any = {"type": "tool_result", "tool_use_id": "c1", "content": "r"}
        turns: Any = [user, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
        async with messages.messages.stream(
            model="gpt", max_tokens=9, messages=turns, stop_sequences=["b"], metadata={"user_id": "u"}
        ) as stream:
            second = await stream.get_final_message()
        assert (second.stop_reason, second.stop_sequence) == ("stop_sequence", "b")
        counted = await messages.messages.count_tokens(model="gpt", messages=turns)
        assert counted.input_tokens > 0
    function = {"name": "f", "parameters": {"type": "object"}}
    assert asked[0].items() >= {"max_tokens": 9, "tools": [{"type": "function", "function": function}]}.items()
    assert asked[0]["messages"] == [{"role": "system", "content": "s"}, user]
    made = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    assert asked[1]["messages"][1:] == [
        {"role": "assistant", "content": "So:", "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "c1", "content": "r"},
    ]
    assert asked[1]["stop"] == ["b"]
    assert "user" not in asked[1]


async def test_an_error_before_the_first_token_has_its_status(
    behind: tuple[Server, Behind], client: AsyncOpenAI
) -> None:
    async def script(connection: Connection) -> None:
        connection.writer.transport.abort()

    behind[1].web = script
    for stream in (False, True):
        with pytest.raises(APIStatusError) as failed:
            await client.completions.create(model="gpt", prompt="x", stream=stream)
        assert failed.value.status_code == 502
        assert failed.value.body == {
            "message": "The upstream 'gpt' ended the response before it was complete.",
            "type": "upstream_error",
            "param": None,
            "code": "upstream_closed",
        }


async def test_an_unknown_model_at_the_upstream_is_not_found(
    behind: tuple[Server, Behind], client: AsyncOpenAI
) -> None:
    async def over_http(connection: Connection) -> None:
        await connection.json({"detail": "Not Found"}, 404)

    async def over_grpc(request: Any, context: Any) -> AsyncIterator[Any]:
        await context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
        yield

    behind[1].web, behind[1].stream = over_http, over_grpc
    lacking = {
        "gpt-4": "The upstream 'gpt' does not have the model 'gpt'.",
        "llamacpp": "The upstream 'llamacpp' does not have the model 'generate'.",
        "bharatgen-param-17b": "The upstream 'bharatgen-param-17b' does not have the endpoint 'chat_fn_1'.",
    }
    for model, message in lacking.items():
        with pytest.raises(NotFoundError) as missing:
            await client.chat.completions.create(model=model, messages=[{"role": "user", "content": "q"}])
        expected = {"type": "not_found_error", "param": "model", "code": "upstream_not_found"}
        assert missing.value.body == {"message": message, **expected}


async def test_an_error_within_a_stream_is_its_last_event_and_no_other_stream_notices(
    behind: tuple[Server, Behind], client: AsyncOpenAI
) -> None:
    async def script(connection: Connection) -> None:
        fails = connection.asked.body["prompt"] == "bad"
        await connection.events(*[chunk("x")] * 50, chunk("", "stop"), done=False) if not fails else None
        if fails:
            await connection.events(*[chunk("x")] * 50, {"error": {"message": "out of luck"}})

    behind[1].web = script

    async def ask(prompt: str) -> tuple[str, str | None]:
        text, error = "", None
        body = {"model": "gpt", "prompt": prompt, "stream": True}
        async with (
            httpx.AsyncClient(timeout=HANG_SECONDS) as http,
            http.stream("POST", f"{behind[0].url}/v1/completions", json=body) as response,
        ):
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    error = event.get("error", {}).get("message", error)
                    text += "".join(choice["text"] for choice in event.get("choices", ()))
        return text, error

    found = await asyncio.gather(*(ask("bad" if number % 4 == 0 else "good") for number in range(16)))
    for number, (text, error) in enumerate(found):
        assert text == "x" * 50
        assert (error is None) == bool(number % 4)
        assert error is None or "'gpt'" in error


async def test_the_gateway_lives_beside_a_hostile_upstream(behind: tuple[Server, Behind], client: AsyncOpenAI) -> None:
    async def script(connection: Connection) -> None:
        await connection.send(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: ", *[b"x" * 65536] * 1600
        )

    behind[1].web = script
    asking = [asyncio.create_task(client.completions.create(model="gpt", prompt="x")) for _ in range(4)]
    async with httpx.AsyncClient(timeout=HANG_SECONDS) as http:
        while not all(task.done() for task in asking):
            assert (await http.get(f"{behind[0].url}/health")).status_code == 200
    for task in asking:
        error = task.exception()
        assert isinstance(error, APIStatusError)
        assert error.status_code == 502
    failures = await metric(behind[0], "bdh_upstream_failures_total", upstream="gpt", kind="too_large")
    assert failures >= 4


async def metric(server: Server, name: str, **labels: str) -> float:
    found = await asyncio.to_thread(server.metrics)
    return found[name + "{" + ",".join(f"{key}={labels[key]}" for key in sorted(labels)) + "}"]


async def test_what_an_upstream_cannot_express_is_refused_by_name(client: AsyncOpenAI) -> None:
    with pytest.raises(APIStatusError) as refused:
        await client.completions.create(model="llamacpp", prompt="x", presence_penalty=0.5)
    body: Any = refused.value.body
    assert (refused.value.status_code, body["param"], body["code"]) == (
        400,
        "presence_penalty",
        "unsupported_parameter",
    )
    with pytest.raises(APIStatusError) as refused:
        await client.embeddings.create(model="gpt", input="x")
    assert refused.value.status_code == 400


PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "low"}}


async def test_what_only_the_upstream_knows_is_passed_on_to_it(behind: tuple[Server, Behind]) -> None:
    server, do = behind
    bodies: list[Any] = []

    async def script(connection: Connection) -> None:
        bodies.append(connection.asked.body)
        await connection.events(chunk("ok", "stop", chat="messages" in connection.asked.body))

    do.web = script
    parts = [{"type": "text", "text": "what is this?", "prompt_cache_breakpoint": {}}, PICTURE]
    messages = [{"role": "user", "content": parts}, {"role": "user", "content": [PICTURE]}]
    passed = {
        **{"reasoning_effort": "low", "verbosity": "low", "documents": [{"text": "d"}], "service_tier": "priority"},
        **{"thinking": {"type": "enabled"}, "user": "u-1", "chat_template_kwargs": {"enable_thinking": True}},
    }
    labels = {"metadata": {"a": "b"}, "store": True}
    chat = {"model": "gpt-4", "messages": messages, **passed, **labels}
    assert (await asyncio.to_thread(server.http.post, "/v1/chat/completions", json=chat)).status_code == 200
    del passed["verbosity"]
    wanted = {"model": "gpt", "messages": messages, **passed, "stream": True, "stream_options": {"include_usage": True}}
    assert bodies == [wanted]
    text = {"model": "gpt", "prompt": "a", "suffix": "b", "num_beams": 2}
    assert (await asyncio.to_thread(server.http.post, "/v1/completions", json=text)).status_code == 200
    assert (bodies[1]["suffix"], bodies[1]["num_beams"]) == ("b", 2)


@pytest.mark.parametrize(
    ("model", "change", "param"),
    [
        ("gpt", {"web_search_options": {}}, "web_search_options"),  # it would not be passed back
        ("gpt", {"modalities": ["text", "audio"]}, "modalities"),
        ("gpt", {"thinkng": {}}, "thinkng"),
        ("gpt", {"stream_options": {"thinking": 1}, "stream": True}, "stream_options.thinking"),
        (
            "gpt",
            {"stream_options": {"include_obfuscation": True}, "stream": True},
            "stream_options.include_obfuscation",
        ),
        ("gpt", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ("llamacpp", {"reasoning_effort": "low"}, "reasoning_effort"),
        ("llamacpp", {"thinking": {}}, "thinking"),
        ("llamacpp", {"messages": [{"role": "user", "content": [PICTURE]}]}, "messages[0].content[0]"),
        ("bharatgen-param-17b", {"messages": [{"role": "user", "content": [PICTURE]}]}, "messages[0].content[0]"),
        ("missing", {"verbosity": "low"}, "verbosity"),
    ],
)
async def test_what_nobody_knows_is_refused_by_name(
    behind: tuple[Server, Behind], model: str, change: dict[str, Any], param: str
) -> None:
    chat = {"model": model, "messages": [{"role": "user", "content": "a"}], **change}
    refused = behind[0].http.post("/v1/chat/completions", json=chat)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


PIXELS: Any = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
LINK: Any = {"type": "url", "url": "https://example.org/a.png"}


def shown(source: Any) -> Any:
    return {"type": "image", "source": source}


async def test_images_of_messages_are_passed_on_as_parts(behind: tuple[Server, Behind]) -> None:
    asked: list[Any] = []

    async def script(connection: Connection) -> None:
        asked.append(connection.asked.body)
        await connection.events(chunk("a cat", "stop", chat=True))

    behind[1].web = script
    use: Any = {"type": "tool_use", "id": "c1", "name": "f", "input": {}}
    result: Any = {"type": "tool_result", "tool_use_id": "c1", "content": [shown(LINK)], "is_error": True}
    text: Any = {"type": "text", "text": "What is it?"}
    turns: Any = [
        {"role": "user", "content": [text, shown(PIXELS), {**shown(LINK), "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result, text]},
    ]
    async with anthropic.AsyncAnthropic(base_url=behind[0].url, api_key="none", max_retries=0) as messages:
        got = await messages.messages.create(model="gpt", max_tokens=9, messages=turns)
        assert [block.to_dict() for block in got.content] == [{"type": "text", "text": "a cat"}]
        assert (await messages.messages.count_tokens(model="gpt", messages=turns)).input_tokens > 0
    pixels = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    link = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    first, _, third, fourth = asked[0]["messages"]
    assert first == {"role": "user", "content": [text, pixels, link]}
    assert third == {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "Error: "}, link]}
    assert fourth == {"role": "user", "content": "What is it?"}


@pytest.mark.parametrize(
    ("model", "block", "param"),
    [
        ("llamacpp", shown(LINK), ""),
        ("bharatgen-param-17b", shown(PIXELS), ""),
        ("missing", shown(PIXELS), ""),
        ("gpt", {"type": "document", "source": LINK}, ""),
        ("gpt", {"type": "image"}, ".source"),
        ("gpt", {**shown(LINK), "text": "a"}, ".text"),
        ("gpt", shown({"type": "file", "file_id": "f"}), ".source"),
        ("gpt", shown({"type": "base64", "data": "aa"}), ".source.media_type"),
        ("gpt", shown({**PIXELS, "media_type": "image/tiff"}), ".source.media_type"),
        ("gpt", shown({**PIXELS, "url": "https://example.org"}), ".source.url"),
        ("gpt", shown({"type": "url"}), ".source.url"),
        ("gpt", {"type": "text", "text": "a", "source": LINK}, ".source"),
    ],
)
async def test_images_of_messages_that_cannot_be_passed_on_are_refused_by_name(
    behind: tuple[Server, Behind], model: str, block: dict[str, Any], param: str
) -> None:
    body = {"model": model, "max_tokens": 9, "messages": [{"role": "user", "content": [block]}]}
    refused = await asyncio.to_thread(behind[0].http.post, "/v1/messages", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, f"messages[0].content[0]{param}")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "a", "state": "st_1"}, "state"),
        ("/v1/completions", {"prompt": "a", "neurons": {"top": 1}}, "neurons"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "state": "st_1"}, "state"),
        ("/v1/responses", {"input": "a", "state": "st_1"}, "state"),
        ("/v1/states", {"prompt": "a"}, "model"),
    ],
)
async def test_upstreams_have_no_states(
    behind: tuple[Server, Behind], path: str, body: dict[str, Any], param: str
) -> None:
    error = await asyncio.to_thread(behind[0].refusal, {"model": "gpt", **body}, path)
    assert (error["param"], error["code"]) == (param, "unsupported_parameter")


async def test_estimated_usage_is_marked_over_kserve_too(behind: tuple[Server, Behind]) -> None:
    server, do = behind

    async def silent(request: Any, context: Any) -> AsyncIterator[Any]:
        yield token(request, "twelve bytes", "stop")

    async def reported(connection: Connection) -> None:
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "estimated": connection.asked.body["prompt"] == "guess"}
        await connection.events(chunk("x", "stop"), {"choices": [], "usage": usage})

    do.stream, do.web = silent, reported
    wanted = [("llamacpp", "a", (1, 3, True)), ("gpt", "a", (3, 2, False)), ("gpt", "guess", (3, 2, True))]
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=HANG_SECONDS) as http,
        grpc.aio.insecure_channel(f"127.0.0.1:{do.grpc_port}") as channel,
    ):
        grpc_stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for model, prompt, usage in wanted:
            infer = {"inputs": [{"name": "prompt", "datatype": "BYTES", "shape": [1], "data": [prompt]}]}
            response = await http.post(f"/v2/models/{model}/infer", json=infer)
            found = {each["name"]: each["data"] for each in response.json()["outputs"]}
            assert tuple(found[name][0] for name in USAGE) == usage
            response = await http.post(f"/v2/models/{model}/generate", json={"text_input": prompt})
            assert generated(response.json()) == usage
            response = await http.post(f"/v2/models/{model}/generate_stream", json={"text_input": prompt})
            assert generated(json.loads(response.text.split("data: ")[-1])) == usage
            request = service_pb2.ModelInferRequest(model_name=model)
            request.inputs.add(name="prompt", datatype="BYTES", shape=[1]).contents.bytes_contents.append(
                prompt.encode()
            )
            assert tensors(await grpc_stub.ModelInfer(request)) == usage
            *_, last = [each async for each in grpc_stub.ModelStreamInfer(iter([request]))]
            assert tensors(last.infer_response) == usage


USAGE = ("prompt_tokens", "completion_tokens", "usage_estimated")


def generated(response: Any) -> tuple[int, int, bool]:
    usage = response["usage"]
    return usage["prompt_tokens"], usage["completion_tokens"], usage.get("estimated", False)


def tensors(response: Any) -> tuple[Any, ...]:
    found = {each.name: [*each.contents.int_contents, *each.contents.bool_contents] for each in response.outputs}
    return tuple(found[name][0] for name in USAGE)


async def test_a_gateway_behind_a_gateway_is_no_engine(serve: ServeFactory, behind: tuple[Server, Behind]) -> None:
    """It takes token ids and all parameters, and says so; but what it is asked goes on as the client wrote it."""
    _, do = behind
    asked: list[Any] = []

    async def script(request: Any, context: Any) -> AsyncIterator[Any]:
        asked.append({each.name for each in request.inputs} | set(request.parameters))
        yield token(request, "twelve bytes", "stop")

    do.stream = script
    up = {"id": "far", "kind": "kserve", "endpoints": [f"127.0.0.1:{do.grpc_port}"], "model": "llamacpp"}
    async with gateway(serve, up) as front, front.async_openai() as client:
        got = await client.completions.create(model="far", prompt="a", max_tokens=5)
        assert got.choices[0].text == "twelve bytes"
        assert got.usage is not None
        assert got.usage.model_dump()["estimated"] is True
        with pytest.raises(BadRequestError, match="presence_penalty"):
            await client.completions.create(model="far", prompt="a", presence_penalty=0.5)
    assert asked == [{"prompt", "max_tokens"}]


# Servers like this one behind the gateway.


FIELDS: dict[str, Any] = {"max_tokens": 160, "temperature": 0.9, "min_p": 0.01}


@pytest.fixture(scope="module")
def direct(serve: ServeFactory) -> Iterator[tuple[Server, int]]:
    """A server like this one, and its port of gRPC."""
    port = free_port()
    with serve(f"kserve.grpc_port={port}", model=CONFORMANCE / "tiny") as server:
        yield server, port


@pytest.fixture(scope="module")
async def wanted(direct: tuple[Server, int]) -> list[str]:
    """What it says to 64 prompts."""
    return await texts(direct[0], "tiny", **FIELDS)


def is_ready(server: Server) -> bool:
    try:
        return server.http.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


async def texts(server: Server, model: str, begun: asyncio.Event | None = None, **fields: Any) -> list[str]:
    """The texts of 64 streams at once; `begun` is set when more than half of them have had their third event."""
    left = STREAMS // 2 + 2

    async def one(http: httpx.AsyncClient, number: int) -> str:
        nonlocal left
        body = {"model": model, "prompt": PROMPTS[number], "seed": number, "stream": True, **fields}
        said: list[str] = []
        async with http.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            async for line in event_lines(response):
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    said += [choice["text"] for choice in event["choices"]]
                    left -= len(said) == 3
                    if begun is not None and not left:
                        begun.set()
        return "".join(said)

    async with httpx.AsyncClient(timeout=HANG_SECONDS, limits=httpx.Limits()) as http:
        return await asyncio.gather(*(one(http, number) for number in range(STREAMS)))


async def through_openai(server: Server, model: str, **fields: Any) -> list[str]:
    """As `texts`, by OpenAI's client."""

    async def one(client: AsyncOpenAI, number: int) -> str:
        stream = await client.completions.create(
            model=model, prompt=PROMPTS[number], seed=number, stream=True, extra_body=fields
        )
        return "".join([event.choices[0].text async for event in stream])

    async with server.async_openai() as client:
        return await asyncio.gather(*(one(client, number) for number in range(STREAMS)))


async def test_clients_that_leave_end_their_requests(serve: ServeFactory, direct: tuple[Server, int]) -> None:
    server, port = direct
    kserve = {"id": "by-kserve", "kind": "kserve", "endpoints": [f"127.0.0.1:{port}"], "model": "tiny"}
    openai = {"id": "by-openai", "kind": "openai", "url": f"{server.url}/v1", "model": "tiny"}
    async with gateway(serve, kserve, openai) as front, httpx.AsyncClient(timeout=HANG_SECONDS) as http:
        for model in ("by-kserve", "by-openai"):
            body = {"model": model, "prompt": "a", "n": 2, "max_tokens": 10_000, "stream": True}
            async with http.stream("POST", f"{front.url}/v1/completions", json=body) as response:
                assert response.status_code == 200
        for each in (front, server):
            each.until(lambda m: m["bdh_http_requests_in_flight"] == 1)  # the scrape


async def test_texts_through_both_protocols_are_those_of_the_direct_way(
    serve: ServeFactory, direct: tuple[Server, int], wanted: list[str]
) -> None:
    server, port = direct
    kserve = {"id": "by-kserve", "kind": "kserve", "endpoints": [f"127.0.0.1:{port}"], "model": "tiny"}
    openai = {"id": "by-openai", "kind": "openai", "url": f"{server.url}/v1", "model": "tiny"}
    async with gateway(serve, kserve, openai) as front:
        # Both are found out to be servers like this one; then all parameters of theirs can be expressed.
        assert await through_openai(front, "by-kserve", **FIELDS) == wanted
        assert await texts(front, "by-openai", **FIELDS) == wanted
        async with front.async_openai() as client:
            for model in ("by-kserve", "by-openai"):
                got = await client.completions.create(
                    model=model, prompt="ROMEO", max_tokens=7, stop=["\0nowhere"], presence_penalty=0.5
                )
                assert got.usage is not None
                assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (5, 7)
                assert "estimated" not in got.usage.model_dump()
                with pytest.raises(BadRequestError, match="guided_regex"):
                    await client.completions.create(model=model, prompt="a", extra_body={"guided_regex": "((("})
        conversation = {
            "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I am"}],
            "continue_final_message": True,  # which template makes the prompt is no matter
            **{"seed": 3, "max_tokens": 9},
        }
        asked = [(server, "tiny"), (front, "by-kserve"), (front, "by-openai")]
        said = [each.http.post("/v1/chat/completions", json=conversation | {"model": name}) for each, name in asked]
        assert len({each.json()["choices"][0]["message"]["content"] for each in said}) == 1


async def test_an_upstream_stands_beside_the_servers_own_model(serve: ServeFactory, direct: tuple[Server, int]) -> None:
    up = {"id": "theirs", "kind": "openai", "url": f"{direct[0].url}/v1", "model": "tiny"}
    context = serve(options(up), model=CONFORMANCE / "tiny")
    server = await asyncio.to_thread(context.__enter__)
    try:
        async with server.async_openai() as client:
            owners = {model.id: model.owned_by for model in (await client.models.list()).data}
            assert owners == {"tiny": "bdh_batch", "theirs": "upstream"}
            own, theirs = [
                (await client.completions.create(model=model, prompt="x", seed=1, max_tokens=9)).choices[0].text
                for model in ("tiny", "theirs")
            ]
        assert own == theirs
    finally:
        await asyncio.to_thread(context.__exit__, None, None, None)


@pytest.mark.parametrize("kind", ["kserve", "openai"])
async def test_after_kill_9_of_one_of_two_all_64_streams_go_on(
    kind: str, serve: ServeFactory, direct: tuple[Server, int], wanted: list[str], launcher: Launcher, tmp_path: Path
) -> None:
    for number in range(10):
        if await killed_in_the_midst(kind, serve, direct, wanted, launcher, tmp_path / f"log-{number}"):
            return
    raise AssertionError("no server was killed while some of its streams had begun and others had not")


async def killed_in_the_midst(
    kind: str, serve: ServeFactory, direct: tuple[Server, int], wanted: list[str], launcher: Launcher, log_file: Path
) -> bool:
    """Kills one of two; returns whether some of its streams had begun by then, and others had not."""
    survivor, survivors_port = direct
    with log_file.open("wb") as log:
        port, grpc_port = free_port(), free_port()
        arguments = ["serve", "--port", str(port), "--model", str(CONFORMANCE / "tiny")]
        # So few run at once that many of its half have not begun when it is killed, and some are under way.
        arguments += ["--set", f"kserve.grpc_port={grpc_port}", "--set", "scheduler.max_running=4"]
        victim = launcher.start(arguments, clean_environment(), log)
    doomed = Server(victim, port, log_file)
    await asyncio.to_thread(eventually, lambda: is_ready(doomed))
    addresses = {
        "kserve": [f"127.0.0.1:{grpc_port}", f"127.0.0.1:{survivors_port}"],
        "openai": [f"http://127.0.0.1:{port}/v1", f"{survivor.url}/v1"],
    }
    up = {"id": "up", "kind": kind, "endpoints": addresses[kind], "model": "tiny", "health_seconds": 600}
    async with gateway(serve, up) as front:
        begun = asyncio.Event()
        asking = asyncio.create_task(texts(front, "up", begun, **FIELDS))
        await asyncio.wait_for(begun.wait(), HANG_SECONDS)
        victim.send_signal(signal.SIGKILL)
        assert await asking == wanted
        metrics = await asyncio.to_thread(front.metrics)
    doomed.http.close()
    victim.wait(HANG_SECONDS)
    names = [f"bdh_upstream_failovers_total{{begun={begun},upstream=up}}" for begun in ("true", "false")]
    return all(metrics.get(name, 0) > 0 for name in names)
