from __future__ import annotations

import litellm
import pytest
from conftest import Endpoint
from scene import Scene

MESSAGES = [{"role": "system", "content": "You are Romeo."}, {"role": "user", "content": "Speak."}]
litellm.telemetry = False


def asked(endpoint: Endpoint, provider: str, **more: object) -> dict[str, object]:
    address = {"model": f"{provider}/{endpoint.model}", "api_base": endpoint.url, "api_key": endpoint.key}
    return {**address, "messages": MESSAGES, "max_tokens": 120, **more}


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_whole_and_streamed(endpoint: Endpoint, provider: str) -> None:
    assert litellm.completion(**asked(endpoint, provider)).usage.completion_tokens == 120
    stream = litellm.completion(**asked(endpoint, provider), stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert len(chunks) > 10
    assert chunks[-1].usage.completion_tokens == 120


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_tools_and_the_way_back(endpoint: Endpoint, provider: str) -> None:
    tool = {"type": "function", "function": {"name": "play", "parameters": Scene.model_json_schema()}}
    reply = litellm.completion(**asked(endpoint, provider, tools=[tool], tool_choice="required")).choices[0].message
    calls = reply.tool_calls
    assert calls
    Scene.model_validate_json(calls[0].function.arguments)
    told = [{"role": "tool", "tool_call_id": call.id, "content": "done"} for call in calls]
    back = asked(endpoint, provider) | {"messages": [*MESSAGES, reply, *told]}
    assert litellm.completion(**back).choices


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_an_object(endpoint: Endpoint, provider: str) -> None:
    reply = litellm.completion(**asked(endpoint, provider, response_format=Scene))
    Scene.model_validate_json(reply.choices[0].message.content)


def test_text_completion_and_embedding(endpoint: Endpoint) -> None:
    address = {"api_base": endpoint.url, "api_key": endpoint.key}
    text = litellm.text_completion(
        model=f"text-completion-openai/{endpoint.model}", prompt="ROMEO:", max_tokens=20, **address
    )
    assert text.choices[0].text
    found = litellm.embedding(f"openai/{endpoint.model}", ["Verona", "Mantua"], **address)
    assert len(found.data) == 2


def test_errors(endpoint: Endpoint) -> None:
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**asked(endpoint, "openai") | {"model": "openai/other"})
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**asked(endpoint, "openai") | {"api_key": "wrong"})
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**asked(endpoint, "openai"), top_p=3)
