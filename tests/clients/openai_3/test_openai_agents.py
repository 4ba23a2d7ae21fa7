from __future__ import annotations

import asyncio

import pytest
from agents import (
    Agent,
    Model,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_default_openai_client,
    set_tracing_disabled,
)
from conftest import Endpoint
from openai import AsyncOpenAI
from scene import Place, Scene

set_tracing_disabled(True)
# The model ends no text of its own accord, and to the framework a response that ends by `max_tokens` is an error.
ENDING = {"extra_body": {"stop": ["e"], "include_stop_str_in_output": True}}
played: list[str] = []


@function_tool
def play(place: Place) -> str:
    """Plays a scene."""
    played.append(place)
    return "done"


@pytest.fixture(params=[OpenAIResponsesModel, OpenAIChatCompletionsModel])
def kind(request: pytest.FixtureRequest) -> type[Model]:
    return request.param


def agent(
    endpoint: Endpoint, kind: type[Model], settings: ModelSettings | None = None, **options: object
) -> Agent[None]:
    client = AsyncOpenAI(base_url=endpoint.url, api_key=endpoint.key)
    model = kind(model=endpoint.model, openai_client=client)
    return Agent(
        "Romeo",
        instructions="You are Romeo.",
        model=model,
        model_settings=settings or ModelSettings(max_tokens=200, **ENDING),
        **options,
    )


def test_text(endpoint: Endpoint, kind: type[Model]) -> None:
    result = asyncio.run(Runner.run(agent(endpoint, kind), "Speak."))
    assert result.final_output
    assert result.raw_responses[0].usage.output_tokens > 0


def test_stream(endpoint: Endpoint, kind: type[Model]) -> None:
    async def stream() -> int:
        result = Runner.run_streamed(
            agent(endpoint, kind, ModelSettings(max_tokens=200, include_usage=True, **ENDING)), "Speak."
        )
        return len([event async for event in result.stream_events() if event.type == "raw_response_event"])

    assert asyncio.run(stream()) > 10


def test_a_tool_and_the_way_back(endpoint: Endpoint, kind: type[Model]) -> None:
    """The tool has to be called at first; what it said goes back, and the model ends with text."""
    played.clear()
    settings = ModelSettings(max_tokens=200, tool_choice="required", parallel_tool_calls=False, **ENDING)
    result = asyncio.run(Runner.run(agent(endpoint, kind, settings, tools=[play]), "Speak."))
    assert len(played) >= 1
    assert len(result.raw_responses) >= 2


def test_an_object(endpoint: Endpoint, kind: type[Model]) -> None:
    result = asyncio.run(Runner.run(agent(endpoint, kind, ModelSettings(max_tokens=200), output_type=Scene), "Speak."))
    assert isinstance(result.final_output, Scene)


def test_turns_by_the_id_of_the_response_before(endpoint: Endpoint) -> None:
    """As the framework does where nothing but its client and a model's name are given."""

    async def turns() -> None:
        set_default_openai_client(AsyncOpenAI(base_url=endpoint.url, api_key=endpoint.key), use_for_tracing=False)
        romeo = Agent(
            "Romeo", model=endpoint.model, model_settings=ModelSettings(max_tokens=200, temperature=0, **ENDING)
        )
        first = await Runner.run(romeo, "Speak.")
        assert first.last_response_id.startswith("resp_")
        second = await Runner.run(romeo, "Go on.", previous_response_id=first.last_response_id)
        usage = second.raw_responses[0].usage
        assert usage.input_tokens_details.cached_tokens >= first.raw_responses[0].usage.total_tokens - 1

    asyncio.run(turns())
