"""Who shares the batch does not change a response."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.conftest import CONFORMANCE, ServeFactory, Server

TEXT = (Path(__file__).parents[1] / "data" / "shakespeare-validation.txt").read_text()
PROMPTS = [TEXT[53 * i : 53 * i + 1 + 7 * i % 90] for i in range(200)]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 4}
SEEDED: dict[str, Any] = {"temperature": 0.9, "seed": 11, "max_tokens": 4}


def texts(server: Server, prompts: list[str], sampling: dict[str, Any]) -> list[str]:
    choices = server.complete(prompt=prompts, **sampling)["choices"]
    return [choice["text"] for choice in choices]


def test_200_prompts_greedy_and_seeded_say_the_same_alone_and_in_a_crowd(server: Server) -> None:
    """Every byte that the model has learned is a character, so the same text is the same tokens."""
    halves = ((PROMPTS[::2], GREEDY), (PROMPTS[1::2], SEEDED))
    with ThreadPoolExecutor(2) as pool:
        crowds = [pool.submit(texts, server, prompts, sampling) for prompts, sampling in halves]
    for (prompts, sampling), crowd in zip(halves, crowds):
        assert [server.text(prompt=prompt, **sampling) for prompt in prompts] == crowd.result()


def test_narrow_states_and_a_window_change_nothing_about_that(serve: ServeFactory) -> None:
    options = ("engine.state_dtype=bfloat16", "model.attention_window=16")
    with serve(*options, model=CONFORMANCE / "tiny") as server:
        crowd = texts(server, PROMPTS[:20], SEEDED)
        assert [server.text(prompt=prompt, **SEEDED) for prompt in PROMPTS[:20]] == crowd
        assert "in bfloat16" in server.log
        assert "attention window: 16 tokens" in server.log
