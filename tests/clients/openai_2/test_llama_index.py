from __future__ import annotations

import asyncio

import pytest
from conftest import Endpoint
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from scene import Scene, fits, play

MESSAGES = [ChatMessage(role="system", content="You are Romeo."), ChatMessage(role="user", content="Speak.")]


@pytest.fixture
def llm(endpoint: Endpoint) -> OpenAILike:
    return like(endpoint)


def like(endpoint: Endpoint, **options: object) -> OpenAILike:
    return OpenAILike(
        model=endpoint.model,
        api_base=endpoint.url,
        api_key=endpoint.key,
        is_chat_model=True,
        is_function_calling_model=True,
        max_tokens=120,
        **options,
    )


def test_whole_and_streamed(llm: OpenAILike) -> None:
    assert llm.chat(MESSAGES).raw.usage.completion_tokens == 120
    assert len(list(llm.stream_chat(MESSAGES))) > 10
    assert llm.complete("ROMEO:").text


def test_completions(endpoint: Endpoint) -> None:
    llm = OpenAILike(model=endpoint.model, api_base=endpoint.url, api_key=endpoint.key, max_tokens=20)
    assert llm.complete("ROMEO:").text
    assert len(list(llm.stream_complete("ROMEO:"))) > 10


def test_async(llm: OpenAILike) -> None:
    async def stream() -> int:
        return len([delta async for delta in await llm.astream_chat(MESSAGES)])

    assert asyncio.run(stream()) > 10


def test_tools_and_the_way_back(llm: OpenAILike) -> None:
    tool = FunctionTool.from_defaults(fn=play)
    reply = llm.chat_with_tools([tool], user_msg="Speak.", tool_required=True)
    (call,) = llm.get_tool_calls_from_response(reply)
    assert call.tool_name == "play"
    assert fits(call.tool_kwargs)
    result = ChatMessage(role="tool", content="done", additional_kwargs={"tool_call_id": call.tool_id})
    assert llm.chat([*MESSAGES, reply.message, result]).raw.choices


def test_structured(llm: OpenAILike) -> None:
    assert isinstance(llm.as_structured_llm(Scene).complete("Speak.").raw, Scene)


def test_a_refused_request_is_sent_again(busy: Endpoint) -> None:
    assert like(busy, max_retries=5).complete("Speak.").text
