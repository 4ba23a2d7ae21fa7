from __future__ import annotations

import dspy
from conftest import Endpoint


def test_text(endpoint: Endpoint) -> None:
    name = f"openai/{endpoint.model}"
    lm = dspy.LM(name, api_base=endpoint.url, api_key=endpoint.key, cache=False, max_tokens=20)
    assert lm("Speak.")
    assert lm.history[-1]["usage"]["completion_tokens"] == 20
