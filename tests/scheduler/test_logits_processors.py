"""Sampling parameters outlast whatever becomes of the state: preemption, and steps that ran out of memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bdh_batch.checkpoint.checkpoint import load_model
from bdh_batch.engine.completion import Completion
from bdh_batch.engine.runner import Runner
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.kernels.torch_reference import TorchKernels
from bdh_batch.messages import FinishReason, LogitBias, LogitsProcessors, SamplingParams, distinct
from bdh_batch.scheduler.policy import Policy
from bdh_batch.scheduler.scheduler import Scheduler
from bdh_batch.scheduler.sequence import Client, Sequence
from bdh_batch.text.stream import TextStream
from bdh_batch.text.tokenizer import ByteTokenizer
from tests.scheduler.fakes import FakeOutbox

TINY = Path(__file__).parents[1] / "data" / "conformance" / "tiny"
CPU = torch.device("cpu")
PROMPT = b"a prompt that takes more than one step " * 2
STOPS = frozenset(range(0, 256, 3))
PARAMS = [
    SamplingParams(temperature=0.7, seed=1, frequency_penalty=1.0, logprobs=2),
    SamplingParams(temperature=0.0, repetition_penalty=1.5, presence_penalty=0.4, logprobs=0),
    SamplingParams(temperature=1.0, seed=2, logit_bias=LogitBias.of({101: 4.0, 32: -100.0}), min_p=0.02),
    SamplingParams(temperature=1.0, seed=3, logprobs=1),
    SamplingParams(temperature=0.0),
]


def run(slots: int, running: int, faults: set[int]) -> list[Sequence]:
    """All of PARAMS on so many slots, in time slices where more may run; the steps of `faults` run out of memory."""
    model = load_model(TINY, torch.float32, CPU)
    runner = Runner(TorchKernels(model.weights), StatePool(model.config, slots, CPU, host_slots=8))
    scheduler = Scheduler(slots, 32, Policy(host_slots=8, max_running=running, time_slice=3))
    sequences = [
        Sequence(
            str(number),
            Completion(
                PROMPT,
                max_tokens=12,
                sampling=params,
                text=TextStream(ByteTokenizer().decoder()),
                min_tokens=9,
                stop_token_ids=STOPS,
                processors=LogitsProcessors.of(params, PROMPT, distinct(STOPS), 9),
                prompt_logprobs=2 if number == 0 else None,
            ),
            Client(FakeOutbox()),
        )
        for number, params in enumerate(PARAMS)
    ]
    scheduler.submit(sequences)
    for number in range(1000):
        step = scheduler.plan(float(number))
        if step is None:
            break
        if number in faults:
            scheduler.out_of_memory(step)
            continue
        for sequence, delta in scheduler.commit(step, runner.run(step.plan), float(number)):
            sequence.client.outbox.put(0, delta)
    assert not scheduler.has_work
    return sequences


@pytest.fixture(scope="module")
def undisturbed() -> list[Sequence]:
    return run(slots=5, running=5, faults=set())


@pytest.mark.parametrize(("slots", "running", "faults"), [(1, 1, set()), (2, 5, set()), (5, 5, {1, 12})])
def test_disturbances_change_no_token_and_no_logprob(
    undisturbed: list[Sequence], slots: int, running: int, faults: set[int]
) -> None:
    for calm, disturbed in zip(undisturbed, run(slots, running, faults)):
        assert isinstance(calm.client.outbox, FakeOutbox)
        assert isinstance(disturbed.client.outbox, FakeOutbox)
        assert disturbed.generated == calm.generated
        assert disturbed.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        for deltas in zip(disturbed.client.outbox.deltas, calm.client.outbox.deltas, strict=True):
            mine, theirs = ([entry.logprob for _, entry in delta.logprobs or ()] for delta in deltas)
            assert mine == pytest.approx(theirs, abs=1e-4)


def test_nothing_that_stops_comes_before_min_tokens(undisturbed: list[Sequence]) -> None:
    for sequence in undisturbed:
        assert all(token % 3 for token in sequence.generated[:9])
        assert len(sequence.generated) >= 10


def test_logprobs_of_a_prompt_come_once_and_whole(undisturbed: list[Sequence]) -> None:
    for sequences in (undisturbed, run(slots=5, running=5, faults={1, 12})):
        assert isinstance(sequences[0].client.outbox, FakeOutbox)
        first, *later = sequences[0].client.outbox.deltas
        assert first.prompt_logprobs is not None
        assert [entry.token for entry in first.prompt_logprobs] == list(sequences[0].prompt[1:])
        assert [len(entry.top) for entry in first.prompt_logprobs] == [2] * (len(sequences[0].prompt) - 1)
        assert all(delta.prompt_logprobs is None for delta in later)
