from __future__ import annotations

import asyncio

import pytest
from conftest import Endpoint
from pydantic_ai import Agent, ModelHTTPError, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from scene import Scene, play


def model(endpoint: Endpoint, name: str | None = None) -> OpenAIChatModel:
    provider = OpenAIProvider(base_url=endpoint.url, api_key=endpoint.key)
    return OpenAIChatModel(name or endpoint.model, provider=provider, settings={"max_tokens": 100})


def test_text(endpoint: Endpoint) -> None:
    result = Agent(model(endpoint), instructions="You are Romeo.").run_sync("Speak.")
    assert result.output
    assert result.usage.output_tokens == 100


def test_stream(endpoint: Endpoint) -> None:
    async def stream() -> int:
        async with Agent(model(endpoint)).run_stream("Speak.") as result:
            return len([text async for text in result.stream_text(delta=True, debounce_by=None)])

    assert asyncio.run(stream()) > 10


@pytest.mark.parametrize("kind", [ToolOutput, NativeOutput])
def test_an_object(endpoint: Endpoint, kind: type) -> None:
    result = Agent(model(endpoint), output_type=kind(Scene)).run_sync("Speak.")
    assert isinstance(result.output, Scene)


def test_tools(endpoint: Endpoint) -> None:
    """The model either calls the tool, which is then told to it, or ends with the object."""
    agent = Agent(model(endpoint), output_type=Scene, tools=[play], retries=5)
    result = agent.run_sync("Speak.")
    assert isinstance(result.output, Scene)
    again = agent.run_sync("Again.", message_history=result.all_messages())
    assert isinstance(again.output, Scene)


def test_errors(endpoint: Endpoint) -> None:
    with pytest.raises(ModelHTTPError, match="does not exist"):
        Agent(model(endpoint, "other")).run_sync("Speak.")


def test_a_refused_request_is_sent_again(busy: Endpoint) -> None:
    assert Agent(model(busy)).run_sync("Speak.").output
