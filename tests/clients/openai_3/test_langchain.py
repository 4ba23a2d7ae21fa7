from __future__ import annotations

import asyncio

import openai
import pytest
from conftest import Endpoint
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from scene import Scene, fits, play


@pytest.fixture
def chat(endpoint: Endpoint) -> ChatOpenAI:
    return ChatOpenAI(model=endpoint.model, base_url=endpoint.url, api_key=endpoint.key, max_tokens=100)


def test_whole(chat: ChatOpenAI) -> None:
    reply = chat.invoke([SystemMessage("You are Romeo."), HumanMessage("Speak.")], max_tokens=20)
    assert reply.usage_metadata["output_tokens"] == 20
    assert reply.response_metadata["finish_reason"] == "length"


def test_stream(chat: ChatOpenAI) -> None:
    chunks = list(chat.stream("Speak.", max_tokens=20, stream_usage=True))
    assert len(chunks) > 10
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == 20


def test_batch_and_async(chat: ChatOpenAI) -> None:
    assert len(chat.batch(["a", "b", "c"], max_tokens=3)) == 3

    async def stream() -> list[str]:
        return [chunk.text async for chunk in chat.astream("Speak.", max_tokens=20)]

    assert len(asyncio.run(stream())) > 10


@pytest.mark.parametrize("choice", ["any", "required", "play", True])
def test_tools_and_the_way_back(chat: ChatOpenAI, choice: str | bool) -> None:
    bound = chat.bind_tools([play], tool_choice=choice, parallel_tool_calls=False)
    question = HumanMessage("Speak.")
    reply = bound.invoke([question])
    (call,) = reply.tool_calls
    assert call["name"] == "play"
    assert fits(call["args"])
    back = chat.invoke([question, reply, ToolMessage("done", tool_call_id=call["id"])], max_tokens=5)
    assert isinstance(back, AIMessage)


def test_streamed_tools(chat: ChatOpenAI) -> None:
    whole = None
    for chunk in chat.bind_tools([play], tool_choice="play").stream("Speak."):
        whole = chunk if whole is None else whole + chunk
    assert fits(whole.tool_calls[0]["args"])


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("strict", [None, True])
def test_structured(chat: ChatOpenAI, method: str, strict: bool | None) -> None:
    assert isinstance(chat.with_structured_output(Scene, method=method, strict=strict).invoke("Speak."), Scene)


def test_an_agent_that_calls_no_tool(chat: ChatOpenAI) -> None:
    agent = create_agent(chat, tools=[play], system_prompt="You are Romeo.")
    assert agent.invoke({"messages": [{"role": "user", "content": "Speak."}]})["messages"]


def test_logprobs(chat: ChatOpenAI) -> None:
    reply = chat.invoke("Speak.", logprobs=True, top_logprobs=2, max_tokens=3)
    assert len(reply.response_metadata["logprobs"]["content"]) == 3


def test_completions(endpoint: Endpoint) -> None:
    model = OpenAI(model=endpoint.model, base_url=endpoint.url, api_key=endpoint.key, max_tokens=20)
    assert model.invoke("ROMEO:")
    assert len(list(model.stream("ROMEO:"))) > 10
    assert len(model.generate(["a", "b"]).generations) == 2


def test_embeddings(endpoint: Endpoint) -> None:
    embedder = OpenAIEmbeddings(
        model=endpoint.model, base_url=endpoint.url, api_key=endpoint.key, check_embedding_ctx_length=False
    )
    vectors = embedder.embed_documents(["Verona", "Mantua"])
    assert len(vectors) == 2
    assert vectors[0] == pytest.approx(embedder.embed_query("Verona"), abs=1e-6)


def test_errors(endpoint: Endpoint, chat: ChatOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        ChatOpenAI(model="other", base_url=endpoint.url, api_key=endpoint.key).invoke("Speak.")
    with pytest.raises(openai.AuthenticationError):
        ChatOpenAI(model=endpoint.model, base_url=endpoint.url, api_key="wrong").invoke("Speak.")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chat.invoke("Speak.", temperature=3)


def test_a_refused_request_is_sent_again(busy: Endpoint) -> None:
    chat = ChatOpenAI(model=busy.model, base_url=busy.url, api_key=busy.key, max_tokens=3, max_retries=5)
    assert chat.invoke("Speak.").content
