from __future__ import annotations

import json

import pytest
from conftest import Endpoint
from scene import Scene, fits
from smolagents import OpenAIModel, ToolCallingAgent, tool

MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "Speak."}]}]


@tool
def play(act: int, place: str) -> str:
    """Plays a scene.

    Args:
        act: The act's number.
        place: Where it is.
    """
    return "done"


@pytest.fixture
def model(endpoint: Endpoint) -> OpenAIModel:
    return OpenAIModel(endpoint.model, api_base=endpoint.url, api_key=endpoint.key, max_tokens=100)


def test_whole_and_streamed(model: OpenAIModel) -> None:
    reply = model.generate(MESSAGES)
    assert reply.content
    assert reply.token_usage.output_tokens == 100
    assert len(list(model.generate_stream(MESSAGES))) > 10


def test_an_object(model: OpenAIModel) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "scene", "schema": Scene.model_json_schema()}}
    Scene.model_validate_json(model.generate(MESSAGES, response_format=form).content)


def test_a_tool(model: OpenAIModel) -> None:
    play.inputs["act"]["enum"], play.inputs["place"]["enum"] = [1, 2, 3], ["Verona", "Mantua"]
    (call, *_) = model.generate(MESSAGES, tools_to_call_from=[play]).tool_calls
    assert call.function.name == "play"
    arguments = call.function.arguments
    assert fits(json.loads(arguments) if isinstance(arguments, str) else arguments)


def test_an_agent(model: OpenAIModel) -> None:
    """Whether it ends by its own response or at its last step, every request that it sends is answered."""
    agent = ToolCallingAgent(tools=[play], model=model, max_steps=3, verbosity_level=0)
    agent.run("Speak.")
    assert not [step for step in agent.memory.steps if "Error code" in str(getattr(step, "error", ""))]
