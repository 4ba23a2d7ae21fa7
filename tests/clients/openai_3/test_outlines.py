from __future__ import annotations

import re
from typing import Literal

import outlines
import pytest
from conftest import Endpoint
from openai import OpenAI
from outlines.types import CFG, Regex
from scene import Scene

MAKERS = ["from_openai", "from_vllm"]


def model(endpoint: Endpoint, maker: str) -> outlines.models.base.Model:
    return getattr(outlines, maker)(OpenAI(base_url=endpoint.url, api_key=endpoint.key), endpoint.model)


@pytest.mark.parametrize("maker", MAKERS)
def test_text_and_object(endpoint: Endpoint, maker: str) -> None:
    assert model(endpoint, maker)("Speak.", max_tokens=20)
    assert len(list(model(endpoint, maker).stream("Speak.", max_tokens=20))) > 10
    Scene.model_validate_json(model(endpoint, maker)("Speak.", Scene, max_tokens=200))


def test_vllm_s_other_forms(endpoint: Endpoint) -> None:
    ask = model(endpoint, "from_vllm")
    assert ask("Speak.", Literal["Verona", "Mantua"], max_tokens=50) in ("Verona", "Mantua")
    assert re.fullmatch("[0-9]{3}", ask("Speak.", Regex("[0-9]{3}"), max_tokens=50))
    assert ask("Speak.", CFG('start: "to be" | "not to be"'), max_tokens=50) in ("to be", "not to be")
