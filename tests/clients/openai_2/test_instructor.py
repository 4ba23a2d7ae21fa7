from __future__ import annotations

import instructor
import pytest
from conftest import Endpoint
from openai import OpenAI
from scene import Scene

MESSAGES = [{"role": "user", "content": "Speak."}]
MODES = ["TOOLS", "TOOLS_STRICT", "JSON", "JSON_SCHEMA", "MD_JSON"]


def client(endpoint: Endpoint, mode: str) -> instructor.Instructor:
    return instructor.from_openai(
        OpenAI(base_url=endpoint.url, api_key=endpoint.key), mode=getattr(instructor.Mode, mode)
    )


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_an_object(endpoint: Endpoint, mode: str) -> None:
    asked = {"model": endpoint.model, "messages": MESSAGES, "max_tokens": 200}
    scene, whole = client(endpoint, mode).create_with_completion(response_model=Scene, **asked)
    assert isinstance(scene, Scene)
    assert whole.usage.completion_tokens > 0


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_parts_of_an_object(endpoint: Endpoint, mode: str) -> None:
    asked = {"model": endpoint.model, "messages": MESSAGES, "max_tokens": 200}
    parts = list(client(endpoint, mode).create_partial(response_model=Scene, **asked))
    assert len(parts) > 2
    Scene.model_validate(parts[-1].model_dump())
