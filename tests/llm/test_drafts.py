"""Drafts change no response, whatever was asked for."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from bdh_batch import LLM, RequestOutput, SamplingParams, StructuredOutputsParams
from bdh_batch.errors import ConfigError
from bdh_batch.scheduler import drafts
from bdh_batch.scheduler.drafts import DraftCounts, Drafts

SPECULATIVE = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 2}
EXTRAS: list[dict[str, Any]] = [
    *({}, {"temperature": 0.7}, {"temperature": 0.9, "top_k": 9}, {"top_p": 0.8, "temperature": 1.0}),
    *({"logprobs": 2}, {"prompt_logprobs": 1}, {"min_p": 0.1, "temperature": 1.0}, {"n": 2, "temperature": 0.8}),
    *({"presence_penalty": 0.5}, {"frequency_penalty": 0.4}, {"repetition_penalty": 1.2}),
    *(
        {"logit_bias": {97: 3.0}},
        {"min_tokens": 9, "max_tokens": 30, "stop_token_ids": [97, 98, 99]},
        {"stop_token_ids": [101, 120]},
    ),
    *({"stop_token_ids": [101, 120]}, {"stop": ["ab", "x"]}, {"allowed_token_ids": [97, 98, 99]}, {"bad_words": ["a"]}),
    {"structured_outputs": StructuredOutputsParams(regex="[ab]{1,12}")},
]


def requests(count: int) -> tuple[list[str], list[SamplingParams]]:
    """Short texts that repeat themselves, with all kinds of parameters; of few tokens, so that completions repeat."""
    chance = random.Random(18)
    prompts, params = [], []
    for number in range(count):
        piece = "".join(chance.choices("abcdefg ", k=chance.randint(1, 9)))
        prompts.append(piece * chance.randint(1, 6))
        own: dict[str, Any] = {"temperature": 0.0, "logit_bias": {97 + at: 20.0 for at in range(3)}}
        own |= {"max_tokens": chance.randint(1, 40), "ignore_eos": chance.random() < 0.5}
        params.append(SamplingParams(**own | EXTRAS[number % len(EXTRAS)], seed=number))
    return prompts, params


def answers(llm: LLM, few: int) -> list[Any]:
    prompts, params = requests(180)
    found: list[RequestOutput] = []
    for at in range(0, len(prompts), few):
        found += llm.generate(prompts[at : at + few], params[at : at + few], use_tqdm=False)
    return [(each.prompt_logprobs, each.outputs) for each in found]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> list[Drafts]:
    """Drafts are tried wherever there can be any, as if they took no time."""
    made: list[Drafts] = []

    class Free(Drafts):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

        def computed(self, *_: object) -> None:
            """They take none."""

    monkeypatch.setattr(drafts, "GUESS", 0.0)
    monkeypatch.setattr("bdh_batch.scheduler.batch.Drafts", Free)
    return made


@pytest.mark.parametrize("window", [0, 16])
def test_drafts_change_no_response(folder: Path, always: list[Drafts], window: int) -> None:
    with LLM(folder, attention_window=window) as plain:
        expected = answers(plain, 12)
    counts = DraftCounts()
    with LLM(folder, attention_window=window, speculative=SPECULATIVE) as llm:
        assert answers(llm, 12) == expected
        counts = always[-1].counts
    assert counts.tokens > counts.accepted > counts.drafts > 100


def test_drafts_are_refused_where_there_can_be_none(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"speculative\.method: ngram needs the cpu kernels"):
        LLM(folder, speculative=SPECULATIVE, engine={"kernels": "torch"})
