from __future__ import annotations

import pytest
from conftest import Endpoint
from scene import Scene
from strands import Agent
from strands.models.openai import OpenAIModel
from strands.types.exceptions import MaxTokensReachedException

BRIEF = {"max_tokens": 2000, "stop": [" "]}


def agent(endpoint: Endpoint, params: dict[str, object], **options: object) -> Agent:
    arguments = {"base_url": endpoint.url, "api_key": endpoint.key}
    model = OpenAIModel(client_args=arguments, model_id=endpoint.model, params=params)
    return Agent(model=model, callback_handler=None, system_prompt="You are Romeo.", **options)


def test_text(endpoint: Endpoint) -> None:
    """A response that was cut off is an error of this client's."""
    with pytest.raises(MaxTokensReachedException):
        agent(endpoint, {"max_tokens": 30})("Speak.")
    result = agent(endpoint, BRIEF)("Speak.")
    assert result.stop_reason == "end_turn"
    assert result.metrics.accumulated_usage["outputTokens"] > 0


def test_an_object(endpoint: Endpoint) -> None:
    """It lets the model speak first, and has it call a tool with the object then."""
    result = agent(endpoint, BRIEF)("Speak.", structured_output_model=Scene)
    assert isinstance(result.structured_output, Scene)
