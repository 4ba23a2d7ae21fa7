from __future__ import annotations

import asyncio

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
from conftest import Endpoint
from openai import AsyncOpenAI
from scene import Place, Scene

set_tracing_disabled(True)
played: list[str] = []


@function_tool
def play(place: Place) -> str:
    """Plays a scene."""
    played.append(place)
    return "done"


def agent(endpoint: Endpoint, settings: ModelSettings | None = None, **options: object) -> Agent[None]:
    client = AsyncOpenAI(base_url=endpoint.url, api_key=endpoint.key)
    model = OpenAIChatCompletionsModel(model=endpoint.model, openai_client=client)
    return Agent(
        "Romeo",
        instructions="You are Romeo.",
        model=model,
        model_settings=settings or ModelSettings(max_tokens=60),
        **options,
    )


def test_text(endpoint: Endpoint) -> None:
    result = asyncio.run(Runner.run(agent(endpoint), "Speak."))
    assert result.final_output
    assert result.raw_responses[0].usage.output_tokens == 60


def test_stream(endpoint: Endpoint) -> None:
    async def stream() -> int:
        result = Runner.run_streamed(agent(endpoint, ModelSettings(max_tokens=60, include_usage=True)), "Speak.")
        return len([event async for event in result.stream_events() if event.type == "raw_response_event"])

    assert asyncio.run(stream()) > 10


def test_a_tool_and_the_way_back(endpoint: Endpoint) -> None:
    """The tool has to be called at first; what it said goes back, and the model ends with text."""
    played.clear()
    settings = ModelSettings(max_tokens=100, tool_choice="required", parallel_tool_calls=False)
    result = asyncio.run(Runner.run(agent(endpoint, settings, tools=[play]), "Speak."))
    assert len(played) >= 1
    assert len(result.raw_responses) >= 2


def test_an_object(endpoint: Endpoint) -> None:
    result = asyncio.run(Runner.run(agent(endpoint, output_type=Scene), "Speak."))
    assert isinstance(result.final_output, Scene)
