"""A request of very many sequences: what they have in common is checked and made once, and others have their turn."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as Many
from typing import Any

import pytest

from bdh_batch.backends import generation
from bdh_batch.backends.local import LocalBackend
from bdh_batch.backends.tokenization import Tokenization
from bdh_batch.engine.completion import Completion
from bdh_batch.errors import InvalidRequest
from bdh_batch.http.schema.requests import CompletionBody, Defaults
from bdh_batch.messages import GenerationRequest, LogitBias, Origin, Prompt, SamplingParams, Text
from bdh_batch.scheduler.sequence import Sequence
from bdh_batch.text.tokenizer import ByteTokenizer

PROMPTS, CHOICES = 128, 16


class Engine:
    """Takes what it is given, and computes nothing."""

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []

    def submit(
        self, sequences: Many[Sequence], queue_timeout: float | None, timeout: float | None, resumed: bool
    ) -> None:
        self.sequences += sequences

    @property
    def completions(self) -> list[Completion]:
        return [each.completion for each in self.sequences if isinstance(each.completion, Completion)]


def backend_of(engine: Any, vocabulary: int = 256, max_model_len: int | None = None) -> LocalBackend:
    return LocalBackend(engine, ByteTokenizer(), vocabulary, max_model_len, 60.0)


def request(**changes: Any) -> GenerationRequest:
    prompts = [Prompt(f"prompt {number} ".encode() * 8) for number in range(PROMPTS)]
    seeds = tuple(range(PROMPTS * CHOICES))
    return GenerationRequest(
        Origin("r"), prompts, 10, **{"sampling": SamplingParams(), "seeds": seeds, "n": CHOICES, **changes}
    )


class Turns:
    """Counts how often the event loop comes to others."""

    def __init__(self) -> None:
        self.taken = 0
        self._task = asyncio.ensure_future(self._count())

    async def _count(self) -> None:
        while True:
            await asyncio.sleep(0)
            self.taken += 1

    def end(self) -> int:
        self._task.cancel()
        return self.taken


async def test_two_thousand_sequences_share_what_does_not_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    backend = backend_of(engine)
    checked: list[int] = []
    knows = Tokenization.knows

    def counted(self: Tokenization, tokens: Many[int]) -> bool:
        checked.append(len(tokens))
        return knows(self, tokens)

    monkeypatch.setattr(Tokenization, "knows", counted)
    sampling = SamplingParams(repetition_penalty=1.2, logit_bias=LogitBias.of({5: 1.0}))
    stops = tuple(range(200))
    asked = request(sampling=sampling, stop=("END",) * 16, stop_token_ids=stops, min_tokens=2)
    await backend.generate(asked)
    assert [each.sampling.seed for each in engine.completions if each.sampling] == list(asked.seeds)
    assert sorted(checked) == [1, len(stops)]  # the bias and the stop tokens: once, not for each sequence
    first, *others = engine.completions
    assert first.processors is not None
    for completion in others:
        assert completion.stop_token_ids is first.stop_token_ids
        assert completion.processors is not None
        assert completion.processors.bans is first.processors.bans
    # A response's own state is no one else's; the tokens of its prompt are those of its neighbours.
    for at in range(0, len(engine.completions), CHOICES):
        same = [s.processors for s in engine.completions[at : at + CHOICES] if s.processors is not None]
        assert len({id(each) for each in same}) == CHOICES
        assert len({id(each.prompt) for each in same}) == 1


async def test_others_have_their_turn_while_two_thousand_sequences_are_made() -> None:
    engine = Engine()
    backend = backend_of(engine)
    turns = Turns()
    await backend.generate(request())
    assert turns.end() >= PROMPTS * CHOICES // generation.SLICE // 2


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"stop_token_ids": (1, 256, 2)}, "stop_token_ids[1]"),
        ({"stop_token_ids": (1, -1)}, "stop_token_ids[1]"),
        ({"sampling": SamplingParams(logit_bias=LogitBias.of({3: 1.0, 700: 1.0}))}, "logit_bias.700"),
        ({"stop_token_ids": tuple(range(256)), "min_tokens": 1}, "stop_token_ids"),
    ],
)
async def test_a_token_that_is_not_the_models_is_named_and_nothing_starts(changes: dict[str, Any], param: str) -> None:
    engine = Engine()
    backend = backend_of(engine)
    with pytest.raises(InvalidRequest) as refused:
        await backend.generate(request(**changes))
    assert refused.value.param == param
    assert not engine.sequences
    assert backend.load() == 0


async def test_many_short_prompts_are_tokenized_off_the_event_loop_as_one_long_one_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    aside: list[object] = []
    to_thread = asyncio.to_thread

    async def counted(work: Any, *arguments: Any) -> Any:
        aside.append(work)
        return await to_thread(work, *arguments)

    monkeypatch.setattr(asyncio, "to_thread", counted)
    backend = backend_of(Engine())
    await backend.tokenized([("prompt", Text("a" * 1000))])
    assert not aside
    done = await backend.tokenized([("prompt", Text("a" * 1000)) for _ in range(PROMPTS)])
    assert len(aside) == 1
    assert [len(each.tokens) for each in done] == [1000] * PROMPTS


@pytest.mark.parametrize(
    ("max_model_len", "max_tokens", "default", "truncate", "kept"),
    [
        (None, 5, 256, -1, 40),
        (None, 5, 256, 7, 7),
        (20, 5, 256, -1, 15),
        (20, 0, 256, -1, 20),
        (20, None, 256, -1, 10),  # a default gives way, but not to one token
        (20, None, 2, -1, 18),
        (20, 5, 256, 3, 3),
        (100, 5, 256, -1, 40),
        (100, 5, 256, None, 40),
    ],
)
async def test_a_prompt_is_cut_to_what_leaves_room_for_its_response(
    max_model_len: int | None, max_tokens: int | None, default: int, truncate: int | None, kept: int
) -> None:
    text = "".join(map(chr, range(60, 100)))
    body = CompletionBody(prompt=[text], max_tokens=max_tokens, truncate_prompt_tokens=truncate, echo=True)
    last = body.last_tokens(Defaults(default), max_model_len)
    (cut,) = await backend_of(Engine()).tokenized([("prompt", Text(text, ends=(10, 35)))], last)
    assert bytes(cut.tokens).decode() == text[-kept:]
    assert cut.breaks == tuple(at - 40 + kept for at in (10, 35) if at > 40 - kept)


def test_no_prompt_is_cut_to_more_than_the_model_takes() -> None:
    with pytest.raises(InvalidRequest) as caught:
        CompletionBody(prompt=["a"], truncate_prompt_tokens=21).last_tokens(Defaults(), 20)
    assert caught.value.param == "truncate_prompt_tokens"


async def test_bad_words_are_looked_up_and_checked_once_for_all_responses() -> None:
    engine = Engine()
    await backend_of(engine).generate(request(bad_words=("ab", "c"), allowed_token_ids=(*b"abcd",)))
    constraints = [completion.constraint for completion in engine.completions]
    assert len({id(each) for each in constraints}) == PROMPTS * CHOICES
    masks = {each.mask() for each in constraints if each is not None}
    assert masks == {sum(1 << token for token in b"abd").to_bytes(32, "little")}
