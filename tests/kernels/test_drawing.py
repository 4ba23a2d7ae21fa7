"""What draws on a device, and the steps that hold it, without Triton and without a device: nothing waits or moves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bdh_batch.kernels.base import DecodeBatch
from bdh_batch.kernels.decode_steps import INPUTS, PADDING, DecodeSteps, Inputs, Outputs, Sent
from bdh_batch.kernels.drawing import NO_TOKEN, ROW, Rows
from benchmarks.engine.gpu_estimate import OPERATORS

CPU = torch.device("cpu")
WIDTH, VOCABULARY = 4, 23
VIEWS = {"device", "unsqueeze", "squeeze", "slice", "select", "view", "expand", "detach", "empty", "empty_like", "t"}
# What a graph cannot hold: values or shapes that the host needs, and numbers that it sends.
WAITING = {"_local_scalar_dense", "item", "nonzero", "unique", "masked_select", "lift_fresh", "_to_copy", "index_put_"}


class Noted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        stays = name == "_to_copy" and not (kwargs or {}).get("device")
        self.names.append("to_dtype" if stays else name)
        return func(*args, **(kwargs or {}))


class Table:
    """A model whose hidden vectors and logits are rows of tables; it notes its tokens, slots and vectors."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.embed = torch.randn(VOCABULARY, WIDTH, generator=generator)
        self.head = torch.randn(WIDTH, VOCABULARY, generator=generator)
        self.seen: list[tuple[list[int], list[int], Tensor | None]] = []

    def decode_forward(self, states: Tensor, inputs: Inputs, vectors: Tensor | None) -> Tensor:
        self.seen.append((inputs.tokens.tolist(), inputs.slots.tolist(), vectors))
        return self.embed[inputs.tokens]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.head


def rows_of(count: int, kept: int = 0) -> tuple[Rows, np.ndarray]:
    rows = np.zeros(count, ROW)
    rows["temperature"], rows["top_p"], rows["least"], rows["kept"] = 0.8, 0.9, -np.inf, kept
    return rows, np.linspace(0, 0.999, count)


def batch_of(slots: list[int], kept: int = 0, **more: Any) -> DecodeBatch:
    count = len(slots)
    return DecodeBatch(range(count), range(7, 7 + count), slots, *rows_of(count, kept), **more)


@pytest.mark.parametrize("filters", [False, True])
def test_a_step_is_of_operators_that_a_graph_can_hold(filters: bool) -> None:
    """On arrays that have shapes and no values: whatever would ask for a value, or for a shape that follows from one,
    fails. How many operators there are is what the estimate counts as launches."""

    class Shapes(Table):
        def decode_forward(self, states: Tensor, inputs: Inputs, vectors: Tensor | None) -> Tensor:
            return torch.empty(len(inputs.slots), WIDTH)

        def logits(self, hidden: Tensor) -> Tensor:
            return torch.empty(len(hidden), VOCABULARY)

    with FakeTensorMode(), Noted() as noted:
        steps = DecodeSteps(Shapes(), 8, VOCABULARY, CPU)
        inputs = Inputs.of(torch.empty(INPUTS, 8, dtype=torch.int64))
        noted.names.clear()
        outputs = steps.compute(torch.empty(1), inputs, filters)
    assert [each.shape for each in outputs] == [(8, WIDTH), (8, VOCABULARY), (8,)]
    assert WAITING.isdisjoint(noted.names)
    launched = [name for name in noted.names if name not in VIEWS]
    assert len(launched) == OPERATORS["filtered" if filters else "plain"], launched


def test_a_step_is_sent_in_one_copy_and_brings_its_tokens_in_another() -> None:
    """From and to where they always lie, whatever the size."""
    steps = DecodeSteps(Table(), 8, VOCABULARY, CPU)
    for slots in ([4, 0, 2], [1], [5, 3, 1]):
        decoded = steps.run(torch.empty(1), batch_of(slots))
        with Noted() as noted:
            steps.run(torch.empty(1), batch_of(slots))
        assert noted.names.count("copy_") == 2
        assert len(decoded.tokens()) == len(slots)
    pieces = [each for size in (1, 4) for each in (steps._sent(size).host_words, steps._sent(size).words)]
    assert {each.data_ptr() for each in pieces} == {steps._host_words.data_ptr(), steps._device_words.data_ptr()}
    assert all(each.is_contiguous() for each in pieces)


def test_padding_has_no_slot_and_frozen_sequences_and_vectors_are_where_the_kernels_look() -> None:
    table = Table()
    steps = DecodeSteps(table, 6, VOCABULARY, CPU, latent_width=2)
    vectors = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    steps.run(torch.empty(1), batch_of([5, 0, 1], frozen=[False, True, False], vectors=vectors))
    steps.run(torch.empty(1), batch_of([3]))
    steps.run(torch.empty(1), batch_of([4, 3, 2, 1, 0]))
    tokens, slots, seen = zip(*table.seen, strict=True)
    assert slots == ([5, -2, 1, PADDING], [3], [4, 3, 2, 1, 0, PADDING])
    assert tokens == ([0, 1, 2, 0], [0], [0, 1, 2, 3, 4, 0]), "what other sizes left there is no token"
    assert all(each is steps.vectors for each in seen)
    assert steps.vectors is not None
    assert steps.vectors.tolist() == [[1, 2], [3, 4], *[[0, 0]] * 4]


def test_a_sequence_whose_logits_are_no_numbers_gets_no_token_and_others_theirs() -> None:
    table = Table()
    table.embed[1] = torch.nan
    for kept in (0, 5):
        broken = DecodeSteps(table, 4, VOCABULARY, CPU).run(torch.empty(1), batch_of([0, 1, 2], kept)).tokens()
        whole = DecodeSteps(Table(), 4, VOCABULARY, CPU).run(torch.empty(1), batch_of([0, 1, 2], kept)).tokens()
        assert broken == [whole[0], NO_TOKEN, whole[2]]


def test_a_row_is_drawn_alike_whether_or_not_others_have_filters() -> None:
    steps = DecodeSteps(Table(), 8, VOCABULARY, CPU)
    states, inputs = torch.empty(1), steps._sent(8).inputs
    steps.run(states, batch_of(list(range(8))))
    assert torch.equal(steps.compute(states, inputs, True).tokens, steps.compute(states, inputs, False).tokens)


def test_a_graph_is_captured_once_for_each_size_pool_and_use_of_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU would record and replay; here they are counted."""
    captured: list[tuple[int, bool]] = []
    steps = DecodeSteps(Table(), 48, VOCABULARY, CPU)

    def capture(states: Tensor, sent: Sent, filters: bool) -> Callable[[], Outputs]:
        captured.append((len(sent.inputs.slots), filters))
        return lambda: steps.compute(states, sent.inputs, filters)

    monkeypatch.setattr(steps, "_captures", True)
    monkeypatch.setattr(steps, "_captured", capture)
    monkeypatch.setattr(steps, "_event", lambda: lambda: None)
    pool, other = torch.zeros(3), torch.zeros(3)
    for states in (pool, other):
        for kept in (0, 0, 5):
            steps.run(states, batch_of([0, 1, 2], kept))
    assert captured == [(4, False), (4, True)] * 2
    captured.clear()
    steps.capture_all(pool)
    assert captured == [(size, filters) for size in (1, 2, 8, 16, 32, 48) for filters in (False, True)]


def test_a_step_is_recorded_with_padding_alone_and_then_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By stand-ins for what torch records and replays with."""
    replays: list[object] = []
    graph = SimpleNamespace(replay=lambda: replays.append(None))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    table, states = Table(), torch.empty(1)
    steps = DecodeSteps(table, 8, VOCABULARY, CPU)
    steps.run(states, batch_of(list(range(8))))
    monkeypatch.setattr(steps, "_captures", True)
    monkeypatch.setattr(steps, "_event", lambda: lambda: None)
    table.seen.clear()
    for number in (1, 2):
        steps.run(states, batch_of([4, 0, 2]))
        assert [each[:2] for each in table.seen] == [([0] * 4, [PADDING] * 4)] * 2, "to compile, and to record"
        assert len(replays) == number
    inputs = steps._sent(4).inputs
    assert (inputs.tokens.tolist(), inputs.slots.tolist()) == ([0, 1, 2, 0], [4, 0, 2, PADDING])


def test_large_vocabularies_have_smaller_steps() -> None:
    """What graphs keep is bounded."""
    assert DecodeSteps(Table(), 2048, 256, CPU).most == 1024
    assert DecodeSteps(Table(), 2048, 50_257, CPU).most == 333
