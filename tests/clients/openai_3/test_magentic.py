from __future__ import annotations

from conftest import Endpoint
from magentic import Chat, OpenaiChatModel, StreamedStr, UserMessage
from scene import Scene


def chat(endpoint: Endpoint, kind: type) -> Chat:
    model = OpenaiChatModel(endpoint.model, base_url=endpoint.url, api_key=endpoint.key, max_tokens=100)
    return Chat([UserMessage("Speak.")], model=model, output_types=[kind])


def test_text_stream_and_object(endpoint: Endpoint) -> None:
    assert chat(endpoint, str).submit().last_message.content
    assert len(list(chat(endpoint, StreamedStr).submit().last_message.content)) > 10
    assert isinstance(chat(endpoint, Scene).submit().last_message.content, Scene)
