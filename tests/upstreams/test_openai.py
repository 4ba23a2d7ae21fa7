"""Upstreams of OpenAI's API: what they are asked, and what clients get of their responses, good and bad."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import orjson
import pytest
from pydantic import ValidationError

from bdh_batch.errors import InvalidRequest, Unavailable, UnsupportedParameter, UpstreamFailed, UpstreamTimeout
from bdh_batch.messages import FinishReason, Usage, merged
from bdh_batch.upstreams.config import OpenAIUpstream
from bdh_batch.upstreams.protocol import Fault, FaultKind
from bdh_batch.upstreams.sse import events
from bdh_batch.upstreams.web import asked as web_asked
from tests.upstreams.fakes import HEAD, Connection, Script, chunk, web
from tests.upstreams.support import Response, leave, upstream

USER = {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "ann"}


async def asked(script: Script, *arguments: Any, options: dict[str, Any] | None = None, **fields: Any) -> Response:
    async with web(script) as fake, upstream(kind="openai", url=f"{fake.url}/v1", **(options or {})) as gateway:
        return await gateway.ask(*arguments, **fields)


async def test_a_completion_is_passed_on_as_it_came_and_streamed_back() -> None:
    async def script(connection: Connection) -> None:
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
        await connection.events(chunk("He"), chunk("llo"), chunk("", "length"), {"choices": [], "usage": usage})

    async with web(script) as fake:
        options: dict[str, Any] = {"model": "theirs", "headers": {"X-Team": "a"}, "pass_headers": ["x-trace"]}
        async with upstream(kind="openai", url=f"{fake.url}/v1", **options) as gateway:
            got = await gateway.ask("hi", headers={"x-trace": "7"}, temperature=0.25, top_k=3, n=1, stop=["x"])
    assert (got.text, got.reasons, got.error) == ("Hello", [FinishReason.LENGTH], None)
    assert got.usage == Usage(3, 2, 1)
    (request,) = fake.asked
    assert (request.method, request.path) == ("POST", "/v1/completions")
    wanted = {"prompt": "hi", "temperature": 0.25, "top_k": 3, "stop": ["x"]}
    assert request.body == wanted | {"model": "theirs", "stream": True, "stream_options": {"include_usage": True}}
    assert (request.headers["x-team"], request.headers["x-trace"]) == ("a", "7")
    assert "authorization" not in request.headers


@pytest.mark.parametrize(("text", "kind"), [("has no attribute 'getpeername'", Fault), ("another", AttributeError)])
async def test_a_connection_that_is_lost_as_it_opens_is_a_connection_that_failed(text: str, kind: type) -> None:
    """anyio asks the socket for its peer, and uvloop's transport has none left."""

    def lost(_request: httpx.Request) -> httpx.Response:
        raise AttributeError(text)

    async with httpx.AsyncClient(transport=httpx.MockTransport(lost)) as client:
        with pytest.raises(kind) as failed:
            async with web_asked(client, "GET", "http://127.0.0.1/", {}):
                pass
    if isinstance(failed.value, Fault):
        assert failed.value.kind is FaultKind.CONNECT


async def test_a_chat_with_thoughts_and_calls_of_tools_comes_back_whole() -> None:
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a"'}}
    rest = {"index": 0, "function": {"arguments": ": 1}"}}

    async def script(connection: Connection) -> None:
        deltas: list[dict[str, Any]] = [
            {"role": "assistant", "content": None},
            {"reasoning_content": "Let "},
            {"reasoning": "me see."},
            {"content": "So:"},
            {"tool_calls": [call]},
            {"tool_calls": [rest]},
        ]
        await connection.events(
            *({"choices": [{"index": 0, "delta": delta}]} for delta in deltas), chunk(None, "tool_calls", chat=True)
        )

    got = await asked(script, messages=[USER], tools=[{"type": "function", "function": {"name": "f"}}])
    assert (got.text, got.reasons) == ("So:", [FinishReason.TOOL_CALLS])
    assert merged(got.extras) == {
        "delta": {
            "reasoning_content": "Let me see.",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
        }
    }


async def test_messages_stay_as_they_were_written() -> None:
    async def script(connection: Connection) -> None:
        assert connection.asked.path == "/v1/chat/completions"
        assert connection.asked.body["messages"] == [USER]
        await connection.events(chunk("ok", "stop", chat=True))

    assert (await asked(script, messages=[USER])).text == "ok"


async def test_a_server_that_does_not_stream_is_read_whole() -> None:
    async def script(connection: Connection) -> None:
        message = {"index": 0, "message": {"role": "assistant", "content": "all"}, "finish_reason": "stop"}
        await connection.json({"choices": [message], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})

    got = await asked(script, messages=[USER])
    assert (got.text, got.usage) == ("all", Usage(1, 1))


async def test_several_choices_are_several_requests_with_seeds_of_their_own() -> None:
    async def script(connection: Connection) -> None:
        await connection.events(chunk(str(connection.asked.body["seed"]), "stop"))

    assert (await asked(script, n=3, seed=5)).texts == ["5", "6", "7"]


async def test_without_a_usage_it_is_estimated_and_says_so() -> None:
    async def script(connection: Connection) -> None:
        await connection.events(chunk("eight ch"), chunk("ars", "stop"))

    assert (await asked(script, "12345")).usage == Usage(2, 3, estimated=True)


async def test_a_sum_of_tokens_is_no_more_than_all_protocols_can_say() -> None:
    most = 2**31 - 1
    usage = {"prompt_tokens": 5, "completion_tokens": most, "prompt_tokens_details": {"cached_tokens": most}}

    async def reports(connection: Connection) -> None:
        await connection.events(chunk("x", "stop"), {"choices": [], "usage": usage})

    assert (await asked(reports, n=3)).usage == Usage(5, most, 5)


async def script_down(connection: Connection) -> None:
    connection.writer.transport.abort()


async def script_closes(connection: Connection) -> None:
    await connection.events(chunk("be"), chunk("gun"), done=False)


async def script_no_reason(connection: Connection) -> None:
    await connection.events(chunk("be"), chunk("gun"))


async def script_not_http(connection: Connection) -> None:
    await connection.send(b"220 smtp.example ESMTP\r\n\r\n")


async def script_not_json(connection: Connection) -> None:
    await connection.send(HEAD, b"data: {nonsense\n\n")


async def script_no_object(connection: Connection) -> None:
    await connection.events([1, 2])


async def script_wrong_types(connection: Connection) -> None:
    await connection.events({"choices": [{"index": 0, "text": 7}]})


async def script_token_of_int64(connection: Connection) -> None:
    await connection.events({"choices": [{"index": 0, "text": "x", "token_ids": [2**40]}]})


async def script_another_choice(connection: Connection) -> None:
    await connection.events({"choices": [{"index": 1, "text": "x"}]})


async def script_two_choices(connection: Connection) -> None:
    await connection.events({"choices": [{"index": 0, "text": "x"}, {"index": 1, "text": "y"}]})


async def script_not_utf8(connection: Connection) -> None:
    await connection.send(HEAD, b'data: {"choices": [{"text": "\xff\xfe"}]}\n\n')


async def script_no_event_stream(connection: Connection) -> None:
    await connection.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\nconnection: close\r\n\r\n<html>")


async def script_bomb(connection: Connection) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: gzip\r\nconnection: close\r\n\r\n"
    await connection.send(head, b"\x1f\x8b" + b"\0" * 64)


async def script_endless_line(connection: Connection) -> None:
    await connection.send(HEAD, b"data: ", *[b"x" * 65536] * 1600)


async def script_endless_event(connection: Connection) -> None:
    await connection.send(HEAD, *[b"data: x\n" * 8192] * 1600)


async def script_endless_json(connection: Connection) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n"
    await connection.send(head, *[b" " * 65536] * 1600)


async def script_error_event(connection: Connection) -> None:
    await connection.events(*[chunk("x")] * 50, {"error": {"message": "out of luck", "type": "e"}})


async def script_deep(connection: Connection) -> None:
    await connection.send(
        HEAD, b'data: {"choices": [{"text": "", "logprobs": {"x":' + b"[" * 500 + b"]" * 500 + b"}}]}\n\n"
    )


async def script_many_choices(connection: Connection) -> None:
    await connection.send(HEAD, b'data: {"choices": [' + b"[]," * 300_000 + b"[]]}\n\n")


async def script_many_calls(connection: Connection) -> None:
    await connection.send(HEAD, b'data: {"choices": [{"delta": {"tool_calls": [' + b"{}," * 20_000 + b"{}]}}]}\n\n")


async def script_fails(connection: Connection) -> None:
    await connection.json({"error": {"message": "Incorrect API key sk-secret"}}, 401)


async def script_moved(connection: Connection) -> None:
    await connection.send(b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\nconnection: close\r\n\r\n")


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        (script_down, "closed"),
        (script_closes, "closed"),
        (script_no_reason, "closed"),
        (script_not_http, "malformed"),
        (script_not_json, "malformed"),
        (script_no_object, "malformed"),
        (script_wrong_types, "malformed"),
        (script_not_utf8, "malformed"),
        (script_another_choice, "wrong_request"),
        (script_two_choices, "wrong_request"),
        (script_token_of_int64, "malformed"),
        (script_no_event_stream, "malformed"),
        (script_bomb, "malformed"),
        (script_deep, "malformed"),
        (script_endless_line, "too_large"),
        (script_endless_event, "too_large"),
        (script_endless_json, "too_large"),
        (script_many_choices, "too_large"),
        (script_error_event, "error"),
        (script_fails, "unauthorized"),
        (script_moved, "error"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
async def test_an_upstream_that_fails_is_named_and_counted_by_how(script: Script, kind: str) -> None:
    async with web(script) as fake, upstream(kind="openai", url=fake.url) as gateway:
        got = await gateway.ask()
    assert isinstance(got.error, UpstreamFailed)
    assert got.error.code == f"upstream_{kind}"
    assert "'up'" in got.error.message
    assert "secret" not in got.error.message
    assert "127.0.0.1" not in got.error.message
    assert gateway.seen.failures == {kind: 1}
    assert gateway.seen.outcomes == {"error": 1}


async def test_an_event_has_so_many_calls_of_tools_and_no_more() -> None:
    got = await asked(script_many_calls, messages=[{"role": "user", "content": "x"}])
    assert isinstance(got.error, UpstreamFailed)
    assert got.error.code == "upstream_malformed"


async def test_brackets_in_a_text_are_text() -> None:
    text = '[{"\\' * 20_000
    assert (await asked(lambda connection: connection.events(chunk(text, "stop")))).text == text


async def test_interim_responses_are_passed_over_however_many() -> None:
    async def script(connection: Connection) -> None:
        await connection.send(b"HTTP/1.1 100 Continue\r\n\r\n" * 8192)
        await connection.events(chunk("ok", "stop"))

    assert (await asked(script)).text == "ok"


class AtOnce(httpx.AsyncByteStream):
    """A body all of whose chunks have arrived."""

    def __init__(self, *chunks: bytes) -> None:
        self._chunks = chunks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for each in self._chunks:
            yield each


@pytest.mark.parametrize(
    "chunks",
    [
        [b"\n" * 65536, b"data: x\n\n"],
        [*[b"\n"] * 2048, b"data: x\n\n"],
        [b": ", *[b"a"] * 2048, b"\n\n", b"data: x\n\n"],
    ],
    ids=["blank lines", "chunks of blank lines", "chunks of a comment"],
)
async def test_others_have_their_turns_while_nothing_is_said(chunks: list[bytes]) -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    beside = asyncio.create_task(other())
    head = {"content-type": "text/event-stream"}
    response = httpx.Response(200, headers=head, stream=AtOnce(*chunks))
    assert [event.data async for event in events(response, 2**20)] == ["x"]
    assert turns >= 15
    beside.cancel()


async def test_what_came_before_an_error_has_been_passed_on() -> None:
    got = await asked(script_error_event)
    assert got.text == "x" * 50
    assert got.error is not None
    assert "out of luck" in got.error.message


async def test_a_refusal_is_the_clients_and_names_its_field() -> None:
    async def script(connection: Connection) -> None:
        await connection.json({"error": {"message": "top_k is unknown", "param": "top_k"}}, 400)

    got = await asked(script, top_k=3)
    assert isinstance(got.error, InvalidRequest)
    assert (got.error.param, got.error.code) == ("top_k", "upstream_refused")
    assert "top_k is unknown" in got.error.message


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (400, "upstream_refused", "The upstream 'up' refused the request: its words"),
        (451, "upstream_refused", "The upstream 'up' refused the request: its words"),
        (404, "upstream_not_found", "The upstream 'up' does not have the model 'gpt'."),
        (410, "upstream_not_found", "The upstream 'up' does not have the model 'gpt'."),
        (401, "upstream_unauthorized", "The upstream 'up' does not accept the key that it gets: status 401"),
        (403, "upstream_unauthorized", "The upstream 'up' does not accept the key that it gets: status 403"),
        (405, "upstream_error", "The upstream 'up' failed: status 405"),
        (529, None, "The upstream 'up' refuses requests at present: status 529"),
    ],
)
async def test_a_status_is_about_the_request_the_model_the_key_or_the_time(
    status: int, code: str | None, message: str
) -> None:
    async def refuses(connection: Connection) -> None:
        await connection.json({"error": {"message": "its words"}}, status)

    async with (
        web(refuses) as first,
        web(refuses) as second,
        upstream(kind="openai", model="gpt", endpoints=[first.url, second.url], failures=1) as gateway,
    ):
        for _ in range(2 if code else 1):  # but for a busy one, it is not the endpoint's fault
            got = await gateway.ask()
            assert got.error is not None
            assert (getattr(got.error, "code", None), got.error.message) == (code, message)
    assert len(first.asked) + len(second.asked) == (4 if code not in (None, "upstream_refused") else 2)


async def test_a_busy_upstream_is_to_be_asked_later() -> None:
    async def script(connection: Connection) -> None:
        await connection.json({"error": {"message": "slow down"}}, 429)

    got = await asked(script)
    assert isinstance(got.error, Unavailable)
    assert got.error.retry_after >= 1


async def test_slow_upstreams_are_given_up(unused_tcp_port: int) -> None:
    async def silent(connection: Connection) -> None:
        await connection.until_left()

    async def stalls(connection: Connection) -> None:
        await connection.events(chunk("be"), done=False)
        await connection.until_left()

    # A request may take what a connection and a first token may take together.
    quick = {"first_token": {"first_token_seconds": 0.2, "connect_seconds": 2}, "gap": {"gap_seconds": 0.2}}
    for script, what in ((silent, "first_token"), (stalls, "gap")):
        got = await asked(script, options=quick[what])
        assert isinstance(got.error, UpstreamTimeout)
        assert got.error.code == f"upstream_{what}_timeout"
    async with upstream(kind="openai", url=f"http://127.0.0.1:{unused_tcp_port}") as gateway:
        got = await gateway.ask()
    assert isinstance(got.error, UpstreamFailed)
    assert got.error.code == "upstream_connect"


async def test_a_client_that_leaves_ends_the_request_at_the_upstream() -> None:
    gone = asyncio.Semaphore(0)

    async def script(connection: Connection) -> None:
        if connection.asked.body["prompt"] == "stay":
            await connection.events(chunk("be", "stop"))
            return
        await connection.events(chunk("be"), done=False)
        await connection.until_left()
        gone.release()

    options: dict[str, Any] = {"kind": "openai", "max_requests": 1}  # and two connections
    async with web(script) as fake, upstream(url=fake.url, **options) as gateway, asyncio.timeout(300):
        for _ in range(4):
            await leave(await gateway.start())
            await gone.acquire()
        assert (await gateway.ask("stay")).text == "be"
        assert gateway.backend.load() == 0
        await gateway.backend.drain(1)
    assert gateway.seen.outcomes == {"abort": 4, "stop": 1}


async def test_a_slow_reader_has_the_upstream_wait() -> None:
    sent = 0

    async def script(connection: Connection) -> None:
        nonlocal sent
        await connection.send(HEAD)
        for _ in range(20_000):
            await connection.send(b"data: " + orjson.dumps(chunk("x" * 4000)) + b"\n\n")
            sent += 1

    async with web(script) as fake, upstream(kind="openai", url=fake.url) as gateway:
        generation = await gateway.start()
        before = -1
        while sent != before:  # until nothing moves any more
            before = sent
            await asyncio.sleep(0.3)
        assert sent < 10_000
        generation.abort()


async def test_keys_come_from_the_environment_or_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("UP_KEY", "sk-1")
    file = tmp_path / "key"
    file.write_text("sk-2\n")
    seen = []

    async def script(connection: Connection) -> None:
        seen.append(connection.asked.headers["authorization"])
        await connection.events(chunk("ok", "stop"))

    for option in ({"key_env": "UP_KEY"}, {"key_file": str(file)}):
        await asked(script, options=option)
    assert seen == ["Bearer sk-1", "Bearer sk-2"]


@pytest.mark.parametrize("field", ["return_token_ids", "prompt_logprobs"])
async def test_what_is_not_passed_back_is_refused_by_name(field: str) -> None:
    fields: dict[str, Any] = {field: True}
    with pytest.raises(UnsupportedParameter) as refused:
        await asked(script_down, **fields)
    assert refused.value.param == field


@pytest.mark.parametrize(("before", "code"), [((), "first_token_timeout"), (("a",), "gap_timeout")])
async def test_events_with_nothing_in_them_are_no_tokens(before: tuple[str, ...], code: str) -> None:
    async def script(connection: Connection) -> None:
        await connection.events(*map(chunk, before), done=False)
        while True:
            await connection.send(b'data: {"choices":[{"text":""}]}\n\n')
            await asyncio.sleep(0.01)

    seconds: dict[str, Any] = {"gap_seconds": 0.2} if before else {"connect_seconds": 2, "first_token_seconds": 0.2}
    async with web(script) as fake, upstream(kind="openai", url=fake.url, **seconds) as gateway:
        got = await gateway.ask()
    assert isinstance(got.error, UpstreamTimeout)
    assert got.error.code == f"upstream_{code}"


async def test_what_an_upstream_says_is_not_logged_where_it_may_be_the_clients(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def malformed(connection: Connection) -> None:
        await connection.send(HEAD, b"data: secret \xff\n\n")

    async def refuses(connection: Connection) -> None:
        await connection.json({"error": {"message": "bad: secret"}}, 400)

    async def fails(connection: Connection) -> None:
        await connection.events({"error": {"message": "one\ntwo" + "x" * 9999}})

    caplog.set_level("INFO", "bdh_batch")

    for script in (malformed, refuses, fails):
        async with web(script) as fake, upstream(kind="openai", url=fake.url) as gateway:
            assert (await gateway.ask()).error is not None
    logged = [each for each in caplog.records if each.name.startswith("bdh_batch")]
    assert [each.levelname for each in logged] == ["WARNING", "INFO", "WARNING"]  # clients may be refused at will
    texts = [each.getMessage() for each in logged]
    assert not any("secret" in each or "\n" in each or len(each) > 2000 for each in texts)


async def test_a_list_of_models_that_is_none_ends_no_checks() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n{"data":5}')
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, upstream(checked=True, kind="openai", url=url) as gateway:
        assert [each.up for each in gateway.backend.endpoints.all] == [True]


@pytest.mark.parametrize("url", ["http://h:99999", "http://h:0", "http://h:x", "http://a b", "http://[::1"])
def test_urls_that_nobody_can_be_asked_at_are_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="a URL as in"):
        OpenAIUpstream(id="up", kind="openai", url=url)


@pytest.mark.parametrize("field", ["messages", "prompt", "model", "stream"])
def test_what_a_request_consists_of_is_no_field_to_pass_on(field: str) -> None:
    with pytest.raises(ValidationError, match="pass_fields"):
        OpenAIUpstream(id="up", kind="openai", url="http://h/v1", pass_fields=[field])


def test_what_the_settings_send_is_not_the_clients_to_say() -> None:
    for own in ({"headers": {"authorization": "a"}}, {"key_env": "KEY"}):
        with pytest.raises(ValidationError, match="cannot be passed on"):
            OpenAIUpstream(id="up", kind="openai", url="http://h", pass_headers=["Authorization"], **own)
