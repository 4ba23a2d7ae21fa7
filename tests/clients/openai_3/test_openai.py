"""The official client's Responses API, as its own examples use it."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
from conftest import Endpoint, until
from scene import Scene, fits

ASKED = {"instructions": "You are Romeo.", "input": "Speak.", "max_output_tokens": 60, "temperature": 0}
ENDING = {"stop": ["e"], "include_stop_str_in_output": True}
PLAY = {
    "type": "function",
    "name": "play",
    "description": "Plays a scene.",
    "parameters": {
        "type": "object",
        "properties": {"act": {"enum": [1, 2, 3]}, "place": {"enum": ["Verona", "Mantua"]}},
        "required": ["act", "place"],
        "additionalProperties": False,
    },
    "strict": True,
}


@pytest.fixture
def client(endpoint: Endpoint):
    with openai.OpenAI(base_url=endpoint.url, api_key=endpoint.key) as client:
        yield client


@pytest.fixture
def asked(endpoint: Endpoint) -> dict[str, object]:
    return {"model": endpoint.model, **ASKED}


def test_turns(client: openai.OpenAI, asked: dict[str, object]) -> None:
    first = client.responses.create(**asked)
    second = client.responses.create(**asked | {"input": "Go on."}, previous_response_id=first.id)
    assert second.output_text
    assert second.usage.input_tokens > first.usage.total_tokens - 2
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1
    listed = [item.role for item in client.responses.input_items.list(second.id, order="asc")]
    assert listed == ["user", "assistant", "user"]
    assert client.responses.retrieve(first.id).output_text == first.output_text
    counted = client.responses.input_tokens.count(model=asked["model"], input="Go on.", previous_response_id=first.id)
    assert counted.input_tokens > 0
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_streams(client: openai.OpenAI, asked: dict[str, object]) -> None:
    kinds = [event.type for event in client.responses.create(**asked, stream=True)]
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.incomplete"
    # The model ends no text of its own accord, and to this one a response that ends by `max_output_tokens` is none.
    with client.responses.stream(**asked, extra_body=ENDING) as stream:
        assert "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().status == "completed"
    with client.responses.with_streaming_response.create(**asked) as response:
        assert json.loads(b"".join(response.iter_bytes()))["object"] == "response"
    raw = client.responses.with_raw_response.create(**asked)
    assert raw.parse().output_text


def test_an_object(client: openai.OpenAI, asked: dict[str, object]) -> None:
    parsed = client.responses.parse(**asked, text_format=Scene)
    assert isinstance(parsed.output_parsed, Scene)
    with client.responses.stream(**asked, text_format=Scene) as stream:
        stream.until_done()
        assert isinstance(stream.get_final_response().output_parsed, Scene)


def test_a_tool_and_the_way_back(client: openai.OpenAI, asked: dict[str, object]) -> None:
    asked |= {"max_output_tokens": 200, "tools": [PLAY]}
    first = client.responses.create(**asked, tool_choice="required", parallel_tool_calls=False)
    (call,) = first.output
    assert fits(json.loads(call.arguments))
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    after = client.responses.create(**asked | {"input": [output]}, previous_response_id=first.id, tool_choice="none")
    assert after.output_text
    # The same with all items in the input, as a client does that has nothing stored.
    items = [{"role": "user", "content": "Speak."}, *first.output, output]
    same = client.responses.create(**asked | {"input": items}, store=False, tool_choice="none")
    assert same.usage.input_tokens == after.usage.input_tokens


def test_in_the_background(client: openai.OpenAI, asked: dict[str, object]) -> None:
    begun = client.responses.create(**asked, background=True)
    until(lambda: client.responses.retrieve(begun.id).status == "incomplete")
    events = list(client.responses.retrieve(begun.id, stream=True, starting_after=2))
    assert events[0].sequence_number == 3
    assert events[-1].response.status == "incomplete"
    long = client.responses.create(**asked | {"max_output_tokens": 50_000}, background=True, stream=True)
    id = next(iter(long)).response.id
    long.close()
    assert client.responses.cancel(id).status == "cancelled"


def test_many_at_once(endpoint: Endpoint, asked: dict[str, object]) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=endpoint.url, api_key=endpoint.key) as client:
            first = await client.responses.create(**asked)
            more = [client.responses.create(**asked, previous_response_id=first.id) for _ in range(4)]
            texts = [response.output_text for response in await asyncio.gather(*more)]
            async with client.responses.stream(**asked) as stream:
                texts += [event.delta async for event in stream if event.type == "response.output_text.delta"]
            parsed = await client.responses.parse(**asked, text_format=Scene)
            assert isinstance(parsed.output_parsed, Scene)
            return texts

    assert all(asyncio.run(ask()))


def test_errors(client: openai.OpenAI, asked: dict[str, object]) -> None:
    with pytest.raises(openai.BadRequestError, match="effort"):
        client.responses.create(**asked, reasoning={"effort": "high"})
    with pytest.raises(openai.NotFoundError):
        client.responses.create(**asked, previous_response_id="resp_0")
