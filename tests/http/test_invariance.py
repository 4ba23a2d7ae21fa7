"""Who shares the batch does not change a response."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CONFORMANCE, ServeFactory, Server

TEXT = (Path(__file__).parents[1] / "data" / "shakespeare-validation.txt").read_text()
PROMPTS = [TEXT[53 * i : 53 * i + 1 + 7 * i % 90] for i in range(200)]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 4}
SEEDED: dict[str, Any] = {"temperature": 0.9, "seed": 11, "max_tokens": 4}


def responses(server: Server, prompts: list[str], sampling: dict[str, Any]) -> list[tuple[str, list[int]]]:
    """Text and tokens: where characters are no whole tokens, texts alone would hide differences."""
    choices = server.complete(prompt=prompts, **sampling, return_token_ids=True)["choices"]
    return [(choice["text"], choice["token_ids"]) for choice in choices]


def alone(server: Server, prompts: list[str], sampling: dict[str, Any]) -> list[tuple[str, list[int]]]:
    return [each for prompt in prompts for each in responses(server, [prompt], sampling)]


def test_200_prompts_greedy_and_seeded_say_the_same_alone_and_in_a_crowd(tiny: Server) -> None:
    halves = ((PROMPTS[::2], GREEDY), (PROMPTS[1::2], SEEDED))
    with ThreadPoolExecutor(2) as pool:
        crowds = [pool.submit(responses, tiny, prompts, sampling) for prompts, sampling in halves]
    for (prompts, sampling), crowd in zip(halves, crowds):
        assert alone(tiny, prompts, sampling) == crowd.result()


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_so_do_prompts_of_the_trained_model(server: Server, sampling: dict[str, Any]) -> None:
    assert alone(server, PROMPTS[:20], sampling) == responses(server, PROMPTS[:20], sampling)


def test_narrow_weights_and_states_and_a_window_change_nothing_about_that(serve: ServeFactory) -> None:
    options = ("model.dtype=int8", "engine.state_dtype=bfloat16", "model.attention_window=16")
    with serve(*options, model=CONFORMANCE / "tiny") as server:
        assert alone(server, PROMPTS[:20], SEEDED) == responses(server, PROMPTS[:20], SEEDED)
