"""Copies of states, and what a step's faults do to those in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bdh_batch.checkpoint.checkpoint import load_model
from bdh_batch.engine.runner import Runner
from bdh_batch.engine.sampling.draw import sample
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.errors import OutOfMemory
from bdh_batch.kernels.torch_reference import TorchKernels
from bdh_batch.messages import Copy, Plan, SamplingParams, Segment

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0)
TINY = Path(__file__).parent.parent / "data" / "conformance" / "tiny"


@pytest.fixture
def runner() -> Runner:
    """Two slots on the device, 0 and 1, and two in host memory, 2 and 3."""
    model = load_model(TINY, torch.float32, CPU)
    return Runner(TorchKernels(model.weights), StatePool(model.config, 2, CPU, host_slots=2))


def test_a_state_goes_on_where_it_was_copied_from(runner: Runner) -> None:
    (first,) = runner.run(Plan([Segment(0, 0, [1, 2, 3], GREEDY)])).drawn
    parked = [Copy(0, 3)]
    (straight,) = runner.run(Plan([Segment(0, 3, [5], GREEDY)], parked)).drawn
    runner.run(Plan([Segment(0, 0, [9, 9], GREEDY)]))
    (resumed,) = runner.run(Plan([Segment(1, 3, [5], GREEDY)], [Copy(3, 2), Copy(2, 1)])).drawn
    assert resumed == straight
    assert runner.run(Plan([], [Copy(1, 0)])).drawn == []
    assert first is not None


def test_a_row_that_cannot_be_drawn_ends_itself_alone(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = SamplingParams(seed=13)

    def picky(
        logits: torch.Tensor, params: list[SamplingParams], positions: list[int], masks: list[bytes | None]
    ) -> list[int | None]:
        if bad in params:
            raise RuntimeError("not with that seed")
        return list(sample(logits, params, positions, masks))

    monkeypatch.setattr(runner._chooser, "_sample", picky)
    drawn = runner.run(Plan([Segment(0, 0, [1, 2], GREEDY), Segment(1, 0, [1, 2], bad)])).drawn
    monkeypatch.undo()
    assert drawn[1] is None
    assert [drawn[0]] == list(runner.run(Plan([Segment(0, 0, [1, 2], GREEDY)])).drawn)


def test_hidden_vectors_are_summed_over_a_segment(runner: Runner) -> None:
    tokens = list(range(1, 40))
    whole = runner.forward([Segment(0, 0, tokens, None)])
    alone = runner.run(Plan([Segment(0, 0, tokens[:30], None, pool=True), Segment(1, 0, [5], GREEDY)]))
    beside = runner.run(Plan([Segment(1, 1, [6], GREEDY), Segment(0, 30, tokens[30:], None, pool=True)]))
    assert (list(alone.pooled), list(beside.pooled)) == ([0], [1])
    assert (alone.drawn[0], beside.drawn[1]) == (None, None)
    total = torch.tensor(alone.pooled[0]) + torch.tensor(beside.pooled[1])
    torch.testing.assert_close(total, whole.sum(dim=0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_running_out_of_memory_is_told_as_such(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def greedy(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(runner, "forward", greedy)
    with pytest.raises(OutOfMemory):
        runner.run(Plan([Segment(0, 0, [1], GREEDY)]))


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), OutOfMemory),
        (RuntimeError("another fault"), RuntimeError),
    ],
)
def test_a_want_of_main_memory_is_told_from_other_faults(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, fault: Exception, seen: type[Exception]
) -> None:
    def fail(*arguments: object) -> None:
        raise fault

    monkeypatch.setattr(TorchKernels, "forward", fail)
    with pytest.raises(seen):
        runner.run(Plan([Segment(0, 0, [1], GREEDY)]))


def test_steps_of_the_same_segments_give_what_others_give(runner: Runner) -> None:
    """Tokens are drawn by parameters of the first such step; what else a segment asks for is looked at in each step."""
    other = Runner(runner._kernels, StatePool(load_model(TINY, torch.float32, CPU).config, 2, CPU, host_slots=2))
    hot, few = SamplingParams(temperature=1.5, seed=3), SamplingParams(temperature=2.0, seed=4, top_k=5, top_p=0.9)
    kinds = [(hot, few), (few, hot), (hot, SamplingParams(seed=5, logprobs=2)), (GREEDY, GREEDY)]
    for number, params in enumerate(kinds, start=1):
        for start, steady in enumerate((0, number, number, number, 0, number)):
            copies = [Copy(0, 2), Copy(2, 1)] if start == 4 else []
            segments = [Segment(slot, start, [start + slot], each) for slot, each in enumerate(params)]
            found, wanted = runner.run(Plan(segments, copies, steady=steady)), other.run(Plan(segments, copies))
            assert found.drawn == wanted.drawn
            assert None not in found.drawn
            assert [(row, each[:2], [*each.top]) for row, each in found.logprobs.items()] == [
                (row, each[:2], [*each.top]) for row, each in wanted.logprobs.items()
            ]
