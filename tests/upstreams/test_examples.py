"""The seeds' example calls against a gateway, as they are written there."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from bdh_batch.client import BDHClient
from tests.conftest import HANG_SECONDS, Server
from tests.upstreams.fakes import Connection, Script, token
from tests.upstreams.gateway import Behind
from tests.upstreams.test_gradio import DEBUG, LATENCY, THOUGHT, value

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


def llamacpp(prompt: str) -> Sequence[str]:
    return [word if at == 0 else f" {word}" for at, word in enumerate(f"You said: {prompt}".split(" "))]


async def curl(server: Server, path: str, *arguments: str) -> str:
    """What curl prints."""
    words = ["curl", "--silent", "--show-error", "--noproxy", "*", f"{server.url}{path}", *arguments]
    process = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
    said, _ = await asyncio.wait_for(process.communicate(), HANG_SECONDS)
    assert process.returncode == 0
    return said.decode()


def posted(path: str, body: str, *headers: str) -> Sequence[str]:
    """The arguments of curl for a body that is written as in a README, over several lines."""
    of_headers = [word for header in ("Content-Type: application/json", *headers) for word in ("-H", header)]
    return [path, "-X", "POST", *of_headers, "-d", body]


async def parrot(request: Any, context: Any) -> AsyncIterator[Any]:
    """AnyServe's worker, with a model that says what it was told."""
    (prompt,) = [each.contents.bytes_contents[0] for each in request.inputs if each.name == "prompt"]
    for text in llamacpp(prompt.decode()):
        yield token(request, text)
    yield token(request, "", "stop")


@needs_curl
async def test_anyserves_curl_examples(behind: tuple[Server, Behind]) -> None:
    """examples/llamacpp/README.md: no request there names its model."""
    server, do = behind
    do.stream = parrot
    assert "llamacpp" in [model["id"] for model in json.loads(await curl(server, "/v1/models"))["data"]]
    body = """{
        "prompt": "Once upon a time",
        "max_tokens": 100,
        "temperature": 0.7
    }"""
    (choice,) = json.loads(await curl(server, *posted("/v1/completions", body)))["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("You said: Once upon a time", "stop")
    body = """{
        "prompt": "Once upon a time",
        "max_tokens": 100,
        "stream": true
    }"""
    *events, done, last = (await curl(server, *posted("/v1/completions", body))).split("\n\n")
    assert (done, last) == ("data: [DONE]", "")
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert "".join(choice["text"] for choice in choices) == "You said: Once upon a time"
    assert choices[-1]["finish_reason"] == "stop"
    body = """{
        "messages": [
            {"role": "user", "content": "Hello, how are you?"}
        ],
        "max_tokens": 100
    }"""
    (choice,) = json.loads(await curl(server, *posted("/v1/chat/completions", body)))["choices"]
    assert choice["message"]["content"] == "You said: user: Hello, how are you?\nassistant:"


async def test_anyserves_python_example(behind: tuple[Server, Behind]) -> None:
    """examples/llamacpp/README.md, with today's client."""
    server, do = behind
    do.stream = parrot
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="not-needed") as openai:
        response = await openai.completions.create(model="tinyllama", prompt="Once upon a time", max_tokens=100)
    assert response.choices[0].text == "You said: Once upon a time"


async def test_anyserves_client(behind: tuple[Server, Behind]) -> None:
    """examples/llamacpp/client.py: completions, whole and streamed, and the list of models."""
    seen: list[tuple[str, str]] = []

    def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        seen.append((request.model_name, request.model_version))
        return parrot(request, context)

    behind[1].stream = stream
    url = f"{behind[0].url}/v1"
    async with httpx.AsyncClient(timeout=HANG_SECONDS) as requests:
        payload = {"model": "llamacpp", "prompt": "Hello, world!", "max_tokens": 100, "stream": False}
        result = (await requests.post(f"{url}/completions", json=payload)).json()
        assert result["choices"][0]["text"] == "You said: Hello, world!"
        assert result["model"] == "llamacpp"
        assert result["usage"] | {"estimated": True} == result["usage"]
        said = ""
        async with requests.stream("POST", f"{url}/completions", json=payload | {"stream": True}) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    data = line[6:]
                    if data == "[DONE]":
                        break
                    said += json.loads(data).get("choices", [{}])[0].get("text", "")
        assert said == "You said: Hello, world!"
        chat = {"model": "llamacpp", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0.7}
        result = (await requests.post(f"{url}/chat/completions", json=chat)).json()
        assert result["choices"][0]["message"]["content"] == "You said: user: Hi\nassistant:"
        assert "llamacpp" in [model["id"] for model in (await requests.get(f"{url}/models")).json()["data"]]
    assert seen == [("generate_stream", "llamacpp")] * 3


def app(asked: list[Any]) -> Script:
    """BharatGen's app, which counts to three. `asked` gets what it is given."""

    async def script(connection: Connection) -> None:
        if connection.asked.method == "POST":
            asked.append(connection.asked.body["data"])
            await connection.json({"event_id": "e1"})
            return
        texts = [THOUGHT.format("Let me"), THOUGHT.format("Let me count.") + "\n\nOne,"]
        texts += [texts[-1] + " two,", texts[-1] + " two, three." + DEBUG + LATENCY]
        await connection.gradio(*(("generating", value(text)) for text in texts), ("complete", value(texts[-1])))

    return script


async def test_bharatgens_examples(behind: tuple[Server, Behind], client: AsyncOpenAI) -> None:
    """examples/basic_chat.py and test_openai_sdk.py: whole, streamed, several turns, parameters."""
    asked: list[Any] = []

    behind[1].web = app(asked)
    model = "bharatgen-param-17b"
    question: Any = [{"role": "user", "content": "Count from 1 to 3 and explain each number."}]
    whole = await client.chat.completions.create(model=model, messages=question, temperature=0.5, max_tokens=2048)
    assert whole.choices[0].message.content == "One, two, three."
    assert getattr(whole.choices[0].message, "reasoning_content") == "Let me count."  # noqa: B009
    assert whole.usage is not None
    assert whole.usage.model_dump()["estimated"] is True
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens > 0
    stream = await client.chat.completions.create(model=model, messages=question, temperature=0.5, stream=True)
    assert "".join([event.choices[0].delta.content or "" async for event in stream]) == "One, two, three."
    turns: Any = [
        {"role": "system", "content": "You are a helpful math tutor."},
        {"role": "user", "content": "What is 15 + 27?"},
        {"role": "assistant", "content": "42"},
        {"role": "user", "content": "Now multiply that result by 2."},
    ]
    await client.chat.completions.create(model=model, messages=turns, top_p=0.95)
    head: Any = "Count from 1 to 3 and explain each number.", [], "You are a helpful AI assistant."
    assert asked == [
        [*head, 0.5, 2048, 1.0, 50],
        [*head, 0.5, 2048, 1.0, 50],
        [turns[3]["content"], [["What is 15 + 27?", "42"]], turns[0]["content"], 0.7, 2048, 0.95, 50],
    ]


async def test_bharatgens_client_is_ours(behind: tuple[Server, Behind]) -> None:
    """README.md, where its own client has the interface of the official one."""
    server, do = behind
    asked: list[Any] = []
    do.web = app(asked)

    def example() -> list[str]:
        with BDHClient(server.url) as client:
            chat = client.openai.chat.completions
            question: Any = [{"role": "user", "content": "What is the capital of India?"}]
            response = chat.create(model="bharatgen-param-17b", messages=question, temperature=0.7)
            count: Any = [{"role": "user", "content": "Count from 1 to 5"}]
            stream = chat.create(model="bharatgen-param-17b", messages=count, stream=True)
            streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            return [response.choices[0].message.content or "", streamed]

    assert await asyncio.to_thread(example) == ["One, two, three."] * 2
    assert [data[0] for data in asked] == ["What is the capital of India?", "Count from 1 to 5"]


@needs_curl
async def test_bharatgens_curl_examples(behind: tuple[Server, Behind]) -> None:
    """examples/server_usage.sh, with a key that is not asked for here."""
    server, do = behind
    do.web = app([])
    key = "Authorization: Bearer sk-test-key"
    body = """{
    "model": "bharatgen-param-17b",
    "messages": [
      {"role": "user", "content": "What is the capital of India?"}
    ],
    "temperature": 0.7
  }"""
    whole = json.loads(await curl(server, *posted("/v1/chat/completions", body, key)))
    assert whole["choices"][0]["message"]["content"] == "One, two, three."
    body = """{
    "model": "bharatgen-param-17b",
    "messages": [
      {"role": "user", "content": "Count from 1 to 5"}
    ],
    "stream": true
  }"""
    *events, done, _ = (await curl(server, *posted("/v1/chat/completions", body, key))).split("\n\n")
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
    assert ("".join(delta.get("content") or "" for delta in deltas), done) == ("One, two, three.", "data: [DONE]")
    listed = json.loads(await curl(server, "/v1/models", "-H", key))
    assert "bharatgen-param-17b" in [model["id"] for model in listed["data"]]
    assert json.loads(await curl(server, "/health")) == {"status": "ok"}
