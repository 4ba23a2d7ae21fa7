from __future__ import annotations

from conftest import Endpoint
from haystack.components.embedders import OpenAITextEmbedder
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import create_tool_from_function
from haystack.utils import Secret
from scene import Scene, fits, play

QUESTION = ChatMessage.from_user("Speak.")


def generator(endpoint: Endpoint, **options: object) -> OpenAIChatGenerator:
    key = Secret.from_token(endpoint.key)
    return OpenAIChatGenerator(api_key=key, model=endpoint.model, api_base_url=endpoint.url, **options)


def test_whole_and_streamed(endpoint: Endpoint) -> None:
    (reply,) = generator(endpoint, generation_kwargs={"max_tokens": 20}).run([QUESTION])["replies"]
    assert reply.meta["usage"]["completion_tokens"] == 20
    chunks: list[object] = []
    generator(endpoint, generation_kwargs={"max_tokens": 20}, streaming_callback=chunks.append).run([QUESTION])
    assert len(chunks) > 10


def test_tools_and_the_way_back(endpoint: Endpoint) -> None:
    tool = create_tool_from_function(play)
    asked = {"max_tokens": 100, "tool_choice": "required", "parallel_tool_calls": False}
    (reply,) = generator(endpoint, generation_kwargs=asked).run([QUESTION], tools=[tool])["replies"]
    (call,) = reply.tool_calls
    assert call.tool_name == "play"
    assert fits(call.arguments)
    messages = [QUESTION, reply, ChatMessage.from_tool("done", origin=call)]
    assert generator(endpoint, generation_kwargs={"max_tokens": 5}).run(messages, tools=[tool])["replies"]


def test_an_object(endpoint: Endpoint) -> None:
    asked = {"response_format": Scene, "max_tokens": 200}
    (reply,) = generator(endpoint, generation_kwargs=asked).run([QUESTION])["replies"]
    Scene.model_validate_json(reply.text)


def test_embeddings(endpoint: Endpoint) -> None:
    key = Secret.from_token(endpoint.key)
    embedder = OpenAITextEmbedder(api_key=key, model=endpoint.model, api_base_url=endpoint.url)
    assert len(embedder.run("Verona")["embedding"]) > 8


def test_a_refused_request_is_sent_again(busy: Endpoint) -> None:
    assert generator(busy, max_retries=5, generation_kwargs={"max_tokens": 3}).run([QUESTION])["replies"]
