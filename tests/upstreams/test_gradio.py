"""Upstreams that are Gradio apps: what they are given, and what becomes of values that come again and again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from bdh_batch.errors import InvalidRequest, Unavailable, UnsupportedParameter, UpstreamFailed
from bdh_batch.messages import FinishReason, Usage, merged
from tests.upstreams.fakes import HEAD, Connection, Script, Web, web
from tests.upstreams.support import Response, leave, upstream

QUESTION = {"role": "user", "content": "What is 15 + 27?"}
TUTOR = {"role": "system", "content": "You are a helpful math tutor."}
TURNS = [TUTOR, QUESTION, {"role": "assistant", "content": "42"}, {"role": "user", "content": "Times 2?"}]
THOUGHT = "<details class='thought'><summary>🧠 Thinking...</summary>{}</details>"
DEBUG = "<details style='opacity:0.6;font-size:0.85em'><summary>🔍 Debug: Raw Response</summary>raw</details>"
LATENCY = "<div style='color:#666;border-top:1px solid'>Latency: 1.2 s</div>"


def value(text: str, parts: bool = True) -> list[Any]:
    """What the app's outputs are once it has said so much: BharatGen's shape."""
    content: Any = [{"type": "text", "text": text}] if parts else text
    return [[{"role": "user", "content": "q"}, {"role": "assistant", "content": content}], ""]


def says(*events: tuple[str, Any]) -> Script:
    async def script(connection: Connection) -> None:
        if connection.asked.method == "POST":
            await connection.json({"event_id": "e-1"})
        else:
            await connection.gradio(*events)

    return script


async def asked(
    script: Script, options: dict[str, Any] | None = None, messages: Any = (QUESTION,), **fields: Any
) -> tuple[Response, Web]:
    async with web(script) as fake, upstream(kind="gradio", url=fake.url, **(options or {})) as gateway:
        return await gateway.ask(None, messages, **fields), fake


async def test_bharatgens_app_is_given_its_seven_inputs() -> None:
    options = {
        "api": "chat_fn_1",
        "inputs": ["{message}", "{history}", "{system}", "{temperature}", "{max_tokens}", "{top_p}", 50],
        "history": "pairs",
        "system": "You are a helpful AI assistant. You think step-by-step.",
        "defaults": {"temperature": 0.7, "max_tokens": 2048, "top_p": 1.0},
    }
    script = says(("generating", value("8")), ("heartbeat", None), ("complete", value("84")))
    got, fake = await asked(script, options, TURNS, temperature=0.25)
    assert (got.text, got.reasons) == ("84", [FinishReason.STOP])
    post, get = fake.asked
    assert (post.method, post.path) == ("POST", "/gradio_api/call/chat_fn_1")
    history = [["What is 15 + 27?", "42"]]
    assert post.body == {"data": ["Times 2?", history, "You are a helpful math tutor.", 0.25, 2048, 1.0, 50]}
    assert (get.method, get.path) == ("GET", "/gradio_api/call/chat_fn_1/e-1")
    _, fake = await asked(script, options)
    assert fake.asked[0].body["data"][1:3] == [[], "You are a helpful AI assistant. You think step-by-step."]


async def test_history_can_be_messages() -> None:
    _, fake = await asked(says(("complete", ["ok"])), {"inputs": ["{message}", "{history}", "{seed}"]}, TURNS)
    assert fake.asked[0].body == {"data": ["Times 2?", TURNS[1:3], None]}


@pytest.mark.parametrize("parts", [True, False])
async def test_html_is_taken_off_and_thoughts_with_it(parts: bool) -> None:
    texts = [
        THOUGHT.format("I wonder"),
        THOUGHT.format("I wonder &amp; ponder"),
        THOUGHT.format("I wonder &amp; ponder") + "\n\nHello! <b>How</b>",
        THOUGHT.format("I wonder &amp; ponder") + "\n\nHello! <b>How</b> are you?",
    ]
    final = texts[-1] + DEBUG + LATENCY
    script = says(*(("generating", value(text, parts)) for text in texts), ("complete", value(final, parts)))
    got, _ = await asked(script)
    assert got.text == "Hello! How are you?"
    assert not got.extras
    got, _ = await asked(script, {"reasoning": True})
    assert got.text == "Hello! How are you?"
    assert merged(got.extras) == {"delta": {"reasoning_content": "I wonder & ponder"}}
    assert got.usage == Usage(4, 5, estimated=True)


async def test_texts_of_an_app_without_html_stay_as_they_are() -> None:
    got, _ = await asked(says(("complete", ["a <b> & c "])), {"html": None})
    assert got.text == "a <b> & c "


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (["plain"], "plain"),
        ([None], ""),
        ([[["q", "a"], ["q2", "a2"]]], "a2"),
        ([[["q", None]]], ""),
        ([{"role": "assistant", "content": "alone"}], "alone"),
        ([{"value": [{"role": "assistant", "content": "wrapped"}], "__type__": "update"}], "wrapped"),
        ([[{"role": "user", "content": "q"}]], ""),
        ([[{"role": "user", "content": "q"}, {"role": "assistant", "content": {"path": "x.png"}}]], ""),
        ([[{"role": "assistant", "content": "old"}, {"role": "user", "content": "q"}]], ""),
        (
            [
                [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "thought", "metadata": {"title": "Thinking"}},
                    {"role": "assistant", "content": "said", "metadata": {}},
                ]
            ],
            "said",
        ),
    ],
)
async def test_a_text_is_found_in_all_shapes_that_apps_have(data: Any, text: str) -> None:
    got, _ = await asked(says(("complete", data)))
    assert (got.text, got.error) == (text, None)


async def test_text_that_is_taken_back_ends_the_stream_with_an_error() -> None:
    got, _ = await asked(says(("generating", ["Hello wor"]), ("complete", ["Hello there"])))
    assert isinstance(got.error, UpstreamFailed)
    assert got.error.code == "upstream_rewritten"
    assert got.text == "Hello wor"


async def test_a_placeholder_is_no_text_that_is_taken_back() -> None:
    script = says(("generating", ["Thinking..."]), ("complete", ["Hello"]))
    got, _ = await asked(script, {"html": {"placeholders": ["Thinking..."]}})
    assert got.text == "Hello"


async def garbage(connection: Connection) -> None:
    await connection.send(HEAD, b"\xff\xfe\n\n")


async def no_event_id(connection: Connection) -> None:
    await connection.json({"event_id": "../../../config"})


async def no_json(connection: Connection) -> None:
    await connection.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\nconnection: close\r\n\r\n<html>")


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        (says(("generating", ["be"]), ("error", None)), "error"),
        (says(("generating", ["be"])), "closed"),
        (says(("complete", [])), "malformed"),
        (says(("complete", {"a": 1})), "malformed"),
        (says(("complete", [7])), "malformed"),
        (says(("complete", [[7]])), "malformed"),
        (says(("complete", [[["only one"]]])), "malformed"),
        (says(("complete", [[{"role": "assistant", "content": 7}]])), "malformed"),
        (says(("complete", ["<div>" * 100_000])), "too_large"),
        (says(("complete", ["x" * (5 * 2**20)])), "too_large"),
        (garbage, "malformed"),
        (no_event_id, "malformed"),
        (no_json, "malformed"),
    ],
)
async def test_an_app_that_fails_is_named_and_counted_by_how(script: Script, kind: str) -> None:
    got, _ = await asked(script)
    assert isinstance(got.error, UpstreamFailed)
    assert got.error.code == f"upstream_{kind}"
    assert "'up'" in got.error.message


async def test_what_the_app_says_of_its_error_is_passed_on() -> None:
    for data in ("No luck", {"error": "No luck"}):
        got, _ = await asked(says(("error", data)))
        assert "No luck" in str(got.error)


async def test_a_full_queue_is_to_be_asked_later() -> None:
    async def full(connection: Connection) -> None:
        await connection.json({"detail": "Queue is full. Max size is 1 and size is 1."}, 503)

    got, _ = await asked(full)
    assert isinstance(got.error, Unavailable)


@pytest.mark.parametrize(
    "messages",
    [
        [TUTOR],
        [QUESTION, {"role": "assistant", "content": "42"}],
        [{"role": "tool", "content": "7", "tool_call_id": "c"}, QUESTION],
    ],
)
async def test_conversations_that_no_app_takes_are_refused(messages: Any) -> None:
    got, fake = await asked(says(), messages=messages)
    assert isinstance(got.error, InvalidRequest)
    assert got.error.param == "messages"
    assert not fake.asked


async def test_fields_without_an_input_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedParameter) as refused:
        await asked(says(), temperature=0.5)
    assert refused.value.param == "temperature"
    got, _ = await asked(says(("complete", ["ok"])), {"drop": ["temperature"]}, temperature=0.5)
    assert got.text == "ok"


async def test_cookies_are_those_of_one_request() -> None:
    """A session that one client gets is not the next one's; but both parts of one request have it."""
    seen: list[str | None] = []

    async def script(connection: Connection) -> None:
        seen.append(connection.asked.headers.get("cookie"))
        if connection.asked.method == "POST":
            head = b"HTTP/1.1 200 OK\r\nset-cookie: who=%d; path=/\r\nconnection: close\r\n\r\n" % len(seen)
            await connection.send(head, b'{"event_id": "e-1"}')
        else:
            await connection.gradio(("complete", ["ok"]))

    async with web(script) as fake, upstream(kind="gradio", url=fake.url) as gateway:
        for _ in range(2):
            assert (await gateway.ask(None, [QUESTION])).text == "ok"
    assert seen == [None, "who=1", None, "who=3"]


async def test_a_client_that_leaves_closes_the_events() -> None:
    gone = asyncio.Event()

    async def script(connection: Connection) -> None:
        if connection.asked.method == "POST":
            await connection.json({"event_id": "e-1"})
            return
        await connection.gradio(("generating", ["be"]))
        await connection.until_left()
        gone.set()

    async with web(script) as fake, upstream(kind="gradio", url=fake.url) as gateway:
        await leave(await gateway.start(None, [QUESTION]))
        await asyncio.wait_for(gone.wait(), 300)


async def test_an_event_that_its_client_did_not_wait_for_is_followed_and_left() -> None:
    """The app would work it off to its end, for nobody."""
    joined, release, followed, gone = asyncio.Event(), asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def script(connection: Connection) -> None:
        if connection.asked.method == "POST":
            joined.set()
            await release.wait()
            await connection.json({"event_id": "e-1"})
            return
        followed.set()
        await connection.gradio()
        await connection.until_left()
        gone.set()

    async with web(script) as fake, upstream(kind="gradio", url=fake.url) as gateway:
        generation = await gateway.start(None, [QUESTION])
        await asyncio.wait_for(joined.wait(), 300)
        generation.abort()
        assert not followed.is_set()
        release.set()
        await asyncio.wait_for(gone.wait(), 300)
    assert fake.asked[-1].path == "/gradio_api/call/chat/e-1"


async def test_an_app_that_never_begins_is_waited_for_no_longer_than_the_settings_say() -> None:
    asked, gone = asyncio.Event(), asyncio.Event()

    async def script(connection: Connection) -> None:
        asked.set()
        await connection.until_left()
        gone.set()

    async with web(script) as fake, upstream(kind="gradio", url=fake.url) as gateway:
        generation = await gateway.start(None, [QUESTION])
        await asyncio.wait_for(asked.wait(), 300)
        connector: Any = gateway.backend._route.connector  # it is connected: from here on, patience is short
        connector._upstream = connector._upstream.model_copy(update={"connect_seconds": 0.05})
        generation.abort()
        await asyncio.wait_for(gone.wait(), 300)
