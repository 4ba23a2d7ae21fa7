"""Which token logits and sampling parameters give, against a slow and obvious specification; and its logprobs."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from bdh_batch.engine.sampling import logits_processors
from bdh_batch.engine.sampling.choosing import Chooser
from bdh_batch.engine.sampling.draw import uniforms
from bdh_batch.engine.sampling.host_sampler import HostSampler
from bdh_batch.engine.sampling.logits_processors import process_in_main_memory, process_on_device
from bdh_batch.messages import NO_TOKENS, LogitBias, LogitsProcessors, SamplingParams, TokenLogprob, distinct

VOCABULARY = 23
LOGITS = torch.randn(12, VOCABULARY, generator=torch.Generator().manual_seed(5)) * 3
CHOOSER = Chooser(LOGITS.device)
tokens = st.integers(0, VOCABULARY - 1)


@dataclass
class Row:
    params: SamplingParams
    prompt: list[int]
    completion: list[int]
    banned: list[int]
    early: int

    @property
    def processor(self) -> LogitsProcessors | None:
        processor = LogitsProcessors.of(self.params, self.prompt, distinct(self.banned), self.early)
        for token in self.completion if processor else ():
            processor.count(token)  # type: ignore[union-attr]
        return processor


rows = st.builds(
    Row,
    params=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        top_p=st.sampled_from([1e-9, 0.37, 0.9, 1.0]),
        top_k=st.sampled_from([0, 1, 3, 22, 23, 1000]),
        min_p=st.sampled_from([0.0, 1e-9, 0.031, 0.4, 1.0]),
        presence_penalty=st.sampled_from([0.0, 0.7, -2.0, 2.0]),
        frequency_penalty=st.sampled_from([0.0, 0.3, -1.1, 2.0]),
        repetition_penalty=st.sampled_from([1.0, 1.3, 0.6, 10.0]),
        logit_bias=st.dictionaries(tokens, st.sampled_from([-100.0, -1.5, 0.7, 100.0]), max_size=4).map(LogitBias.of),
        logprobs=st.sampled_from([None, None, 0, 3, 20, 23, 99]),
        seed=st.integers(0, 2**64 - 1),
    ),
    prompt=st.lists(tokens, min_size=1, max_size=12),
    completion=st.lists(tokens, max_size=12),
    banned=st.lists(tokens, max_size=4, unique=True),
    early=st.integers(0, 12),
)


def processed(logits: np.ndarray, row: Row) -> np.ndarray:
    """The logits after everything that comes before temperature."""
    values, params = logits.astype(np.float64), row.params
    if params.logit_bias is not None:
        for token, amount in zip(params.logit_bias.tokens, params.logit_bias.amounts, strict=True):
            values[token] += amount
    for token in range(VOCABULARY):
        if token in row.prompt or token in row.completion:
            factor = params.repetition_penalty
            values[token] = values[token] / factor if values[token] > 0 else values[token] * factor
        values[token] -= params.frequency_penalty * row.completion.count(token)
        values[token] -= params.presence_penalty * (token in row.completion)
    if len(row.completion) < row.early:
        values[row.banned] = -np.inf
    return values


def softmax(values: np.ndarray) -> np.ndarray:
    odds = np.exp(values - values.max())
    return np.asarray(odds / odds.sum())


def probabilities(logits: np.ndarray, row: Row) -> np.ndarray:
    """Of each token to be drawn."""
    values, params = processed(logits, row), row.params
    if params.temperature == 0:
        return np.asarray(np.eye(VOCABULARY)[values.argmax()])
    found = softmax(values / params.temperature)
    found[found < params.min_p * found.max()] = 0
    order = np.argsort(-found, kind="stable")
    if params.top_k:
        found[order[params.top_k :]] = 0
    found /= found.sum()
    ahead = 0.0
    for token in order:
        share, found[token] = found[token], found[token] if ahead < params.top_p else 0
        ahead += share
    return np.asarray(found / found.sum())


def chosen(order: Sequence[int], given: Sequence[Row]) -> tuple[list[int | None], dict[int, TokenLogprob]]:
    """Of row `i` of LOGITS, at the position 100 + i, for each i of `order`."""
    processors = [
        (index, processor) for index, row in enumerate(order) if (processor := given[row].processor) is not None
    ]
    return CHOOSER.choose(
        LOGITS[list(order)], [given[row].params for row in order], [100 + row for row in order], processors
    )


@settings(deadline=None)
@given(st.lists(rows, min_size=1, max_size=12))
def test_draws_are_those_of_the_specification(given: list[Row]) -> None:
    drawn, _ = chosen(range(len(given)), given)
    for number, (row, token) in enumerate(zip(given, drawn)):
        assert token is not None
        expected = probabilities(LOGITS[number].numpy(), row)
        above = expected[: token + 1].sum()
        target = uniforms([row.params.seed], [100 + number]).item()
        if row.params.temperature == 0:
            assert expected[token] == 1
        else:
            assert expected[token] > 0
            assert above - expected[token] - 1e-5 <= target <= above + 1e-5


def plain(entry: TokenLogprob | None) -> tuple[int, float, list[tuple[int, float]]] | None:
    return None if entry is None else (entry.token, entry.logprob, list(entry.top))


@settings(deadline=None)
@given(st.lists(rows, min_size=1, max_size=12), st.data())
def test_a_row_has_the_same_token_and_logprobs_alone_and_in_any_company(given: list[Row], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(given))))
    drawn, logprobs = chosen(order, given)
    for index, row in enumerate(order):
        alone, entry = chosen([row], given)
        assert [drawn[index]] == alone
        assert plain(logprobs.get(index)) == plain(entry.get(0))


@settings(deadline=None)
@given(st.lists(rows, min_size=1, max_size=12))
def test_logprobs_are_of_the_models_logits_whatever_the_sampling_parameters(given: list[Row]) -> None:
    drawn, logprobs = chosen(range(len(given)), given)
    assert set(logprobs) == {number for number, row in enumerate(given) if row.params.logprobs is not None}
    for number, entry in logprobs.items():
        expected = np.log(softmax(LOGITS[number].double().numpy()))
        assert entry.token == drawn[number]
        np.testing.assert_allclose(entry.logprob, expected[entry.token], atol=1e-5)
        best = np.argsort(-expected, kind="stable")[: given[number].params.logprobs]
        assert [token for token, _ in entry.top] == best.tolist()
        np.testing.assert_allclose([logprob for _, logprob in entry.top], expected[best], atol=1e-5)


def test_absurd_penalties_leave_every_logit_a_number() -> None:
    for repetition in (5e-324, 1e-300, 1e300, 1.7e308):
        row = Row(SamplingParams(repetition_penalty=repetition, seed=1), list(range(20)), [1, 2], [], 0)
        drawn, _ = chosen([0], [row])
        assert drawn[0] is not None


def test_rows_without_logits_processors_keep_their_logits() -> None:
    logits = LOGITS.clone()
    params = [SamplingParams(frequency_penalty=2.0, logit_bias=LogitBias.of({3: 1.0})), SamplingParams()]
    processor = LogitsProcessors.of(params[0], [1], NO_TOKENS, 0)
    assert processor is not None
    processor.count(4)
    CHOOSER.choose(logits, [params[0], *[params[1]] * 11], range(12), [(0, processor)])
    changed = (logits != LOGITS).nonzero().tolist()
    assert changed == [[0, 3], [0, 4]]
    assert LogitsProcessors.of(params[1], [1], distinct([5]), 0) is None
    assert LogitsProcessors.of(params[1], [1], NO_TOKENS, 9) is None


@settings(deadline=None)
@given(st.lists(rows, min_size=1, max_size=12))
def test_logits_are_processed_alike_in_main_memory_and_on_a_device(given: list[Row]) -> None:
    """With what a GPU computes computed here: the same formulas in torch."""
    host, device = LOGITS[: len(given)].clone(), LOGITS[: len(given)].clone()
    processors = [(number, processor) for number, row in enumerate(given) if (processor := row.processor) is not None]
    process_in_main_memory(host, processors)
    process_on_device(device, processors)
    torch.testing.assert_close(host, device, rtol=1e-6, atol=0)


def test_a_row_whose_draw_fails_costs_no_other_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether its parameters are packed for many steps, or come with each."""
    params, positions = [SamplingParams(seed=row, top_p=0.9) for row in range(12)], range(12)
    packed, right, draw = CHOOSER.pack(params), CHOOSER.draw(LOGITS, params, positions), HostSampler.draw
    assert packed is not None
    failure: list[Exception] = [ValueError("broken")]

    def broken(*arguments: Any) -> list[int | None]:
        if 5 in arguments[3]:
            raise failure[0]
        return draw(*arguments)

    monkeypatch.setattr(HostSampler, "draw", broken)
    variants = [
        partial(CHOOSER.draw, LOGITS, params, positions),
        partial(CHOOSER.draw_packed, LOGITS, packed, np.arange(12)),
    ]
    for variant in variants:
        assert variant() == [*right[:5], None, *right[6:]]
    failure[0] = MemoryError()
    for variant in variants:
        with pytest.raises(MemoryError):
            variant()


def test_choices_for_one_prompt_share_what_does_not_differ_and_nothing_else() -> None:
    params = SamplingParams(repetition_penalty=2.0, logit_bias=LogitBias.of({3: 1.0}))
    first = LogitsProcessors.of(params, [5, 1, 5], distinct([7, 7, 2]), early=2)
    assert first is not None
    other = first.afresh()
    for token in (5, 9, 9):
        first.count(token)
    assert (first.prompt is other.prompt, first.sampling is other.sampling) == (True, True)
    assert list(first.prompt) == [1, 5]
    assert [list(each) for each in (first.generated, first.times, first.repeated)] == [[5, 9], [1, 2], [1, 0]]
    assert not other.generated
    assert (list(first.bans), list(other.bans)) == ([], [2, 7])


def test_what_a_step_changes_is_read_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Python object is made for an entry of a bias, of what was seen or of what is banned."""
    vocabulary = range(VOCABULARY)
    params = SamplingParams(repetition_penalty=2.0, logit_bias=LogitBias.of(dict.fromkeys(vocabulary, 1.0)))
    processor = LogitsProcessors.of(params, vocabulary, distinct(vocabulary), early=2)
    assert processor is not None
    processor.count(3)
    passed: list[object] = []
    for name in ("_add", "_repeat", "_penalise", "_ban"):
        monkeypatch.setattr(logits_processors, name, lambda _, *arrays: passed.extend(arrays))
    process_in_main_memory(LOGITS.clone(), [(0, processor)])
    assert params.logit_bias is not None
    counted = [processor.generated, processor.times, processor.repeated]
    kept: list[array[Any]] = [
        params.logit_bias.tokens,
        params.logit_bias.amounts,
        processor.prompt,
        *counted,
        processor.bans,
    ]
    lying = [each for each in passed if isinstance(each, np.ndarray)]
    assert [each.ctypes.data for each in lying] == [each.buffer_info()[0] for each in kept]


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_no_number_shows_whatever_the_sampling_parameters(broken: float) -> None:
    processor = LogitsProcessors.of(
        SamplingParams(repetition_penalty=2.0, logit_bias=LogitBias.of({3: 1.0})), [3, 4], NO_TOKENS, early=0
    )
    assert processor is not None
    for process in (process_in_main_memory, process_on_device):
        logits = LOGITS[:1].clone()
        logits[0, 3] = broken
        process(logits, [(0, processor)])
        assert not logits[0, 3].isfinite()
