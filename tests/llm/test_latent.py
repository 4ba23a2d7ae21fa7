"""Latent steps through the Python API, and at the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from bdh_batch import LLM, SamplingParams
from bdh_batch.errors import InvalidRequest
from bdh_batch.shell.session import Session
from bdh_batch.shell.talk import COMMANDS
from tests.reasoning import reasoning, write_folder
from tests.support import ending_in

PROMPT = "What is behind the seventh door? "
TOKENS = 8


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("model") / "thinker"
    write_folder(folder, {"latent_steps": 2, "reasoning_effort": {"high": 4}})
    with LLM(folder) as llm:
        yield llm


def answer(steps: int, update: bool = True) -> list[int]:
    return [*reasoning().answer(PROMPT.encode(), steps, TOKENS, update)]


def test_answers_after_latent_steps_are_those_of_the_package(thinker: LLM) -> None:
    asked = [(0, True), (1, True), (4, False), (4, True)]
    params = [
        SamplingParams(temperature=0, max_tokens=TOKENS, latent_steps=steps, update_latent_memory=update)
        for steps, update in asked
    ]
    outputs = thinker.generate([PROMPT] * len(asked), params, use_tqdm=False)
    for output, (steps, update) in zip(outputs, asked, strict=True):
        assert output.outputs[0].token_ids == answer(steps, update)
        assert bytes(output.prompt_token_ids) == PROMPT.encode()
        assert output.latent_token_ids == [-1 if update else -2] * steps
    [by_default] = thinker.generate(PROMPT, SamplingParams(temperature=0, max_tokens=TOKENS))
    [by_effort] = thinker.generate(PROMPT, SamplingParams(temperature=0, max_tokens=TOKENS, reasoning_effort="high"))
    assert by_default.outputs[0].token_ids == answer(2)
    assert by_effort.outputs[0].token_ids == answer(4)


def test_a_state_has_read_the_latent_steps_too(thinker: LLM, tmp_path: Path) -> None:
    whole = SamplingParams(temperature=0, max_tokens=TOKENS, latent_steps=3)
    half = SamplingParams(temperature=0, max_tokens=TOKENS // 2, latent_steps=3)
    [expected], [begun] = thinker.generate(PROMPT, whole), thinker.generate(PROMPT, half)
    *before, last = begun.outputs[0].token_ids
    begun.outputs[0].token_ids = before
    state = thinker.save_state(begun)
    assert state.tokens == len(PROMPT) + 3 + len(before)
    rest = SamplingParams(temperature=0, max_tokens=TOKENS // 2, latent_steps=0)
    [on] = thinker.generate([[last]], rest, state=state)
    assert [*before, last, *on.outputs[0].token_ids] == expected.outputs[0].token_ids
    path = tmp_path / "state.safetensors"
    thinker.export_state(state, path)
    path.write_bytes(ending_in(path.read_bytes(), math.nan))  # in the hidden vector
    with pytest.raises(InvalidRequest, match="finite"):
        thinker.import_state(path)


def test_at_the_terminal(thinker: LLM) -> None:
    session = Session(thinker, False)
    COMMANDS["/latent"].run(session, "4")
    assert session.given == {"latent_steps": 4}
    session.set("temperature", 0)
    session.set("max_tokens", TOKENS)
    assert "".join(session.respond(PROMPT)) == thinker.detokenize(answer(4))
    with pytest.raises(InvalidRequest, match="latent_steps"):
        COMMANDS["/latent"].run(session, "1000")
    COMMANDS["/latent"].run(session, "")
    assert "latent_steps" not in session.given
