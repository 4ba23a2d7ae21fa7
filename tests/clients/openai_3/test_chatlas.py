from __future__ import annotations

import pytest
from chatlas import ChatOpenAI, ChatOpenAICompletions
from conftest import Endpoint
from scene import Scene


@pytest.mark.parametrize("kind", [ChatOpenAI, ChatOpenAICompletions])
def test_text_and_object(endpoint: Endpoint, kind: type[ChatOpenAI | ChatOpenAICompletions]) -> None:
    chat = kind(base_url=endpoint.url, model=endpoint.model, api_key=endpoint.key, system_prompt="You are Romeo.")
    chat.set_model_params(max_tokens=100)
    assert str(chat.chat("Speak.", echo="none"))
    assert len(list(chat.stream("Go on.", echo="none"))) > 10
    assert isinstance(chat.chat_structured("Where?", data_model=Scene), Scene)
