"""The trained model on real text: every implementation gives the specification's logits.

Random weights fire as often as they are made to; these fire as training left them, and what they say matters.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

if sys.platform != "linux":
    pytest.importorskip("triton", reason="triton is not installed")

from bdh_batch.checkpoint.checkpoint import load_model
from bdh_batch.kernels.base import RaggedBatch, Weights
from bdh_batch.kernels.cpu import CpuKernels
from bdh_batch.kernels.torch_reference import TorchKernels
from bdh_batch.kernels.tuning import Blocks
from tests.kernels.support import CPU, alone, states_for
from tests.kernels.test_triton import DEVICE, Poisoned, states_on_device

pytestmark = pytest.mark.no_cover  # tracing would more than double what the interpreter takes

MODEL = Path(__file__).parents[2] / "models" / "bdh-shakespeare"
VALIDATION = Path(__file__).parents[1] / "data" / "shakespeare-validation.txt"
TEXT = b"ROMEO:\nBut soft, what light through yonder"
TOLERANCE = 1e-4
CUTS = [35, 36, 37]  # a prompt, decode steps, a prompt's rest
WINDOWS = [0, 32]


class AsTheyAre(Blocks):
    """The interpreter has no shared memory to fit in, and takes its time for every program, not for what is in it."""

    def fitted(self, width: int, neurons: int, itemsize: int) -> Blocks:
        return self


BLOCKS = Blocks()
if DEVICE.type == "cpu":
    BLOCKS = AsTheyAre(
        part=512, encode_depth=128, token_pairs=256, chunk_tokens=32, chunk_values=128, span=1024,
        contract_neurons=512, contract_depth=128,
    )  # fmt: skip


@pytest.fixture(scope="module")
def weights() -> Weights:
    return load_model(MODEL, torch.float32, CPU).weights


@pytest.fixture(scope="module", params=WINDOWS, ids=["all", "window"])
def window(request: pytest.FixtureRequest) -> int:
    found: int = request.param
    return found


@pytest.fixture(scope="module")
def expected(weights: Weights, window: int) -> Tensor:
    """The text in one piece, which the others are fed in several."""
    return alone(TorchKernels(weights, window), states_for(weights, 1, window), tokens(), 0, [])


def tokens() -> Tensor:
    return torch.tensor(list(TEXT))


def error(logits: Tensor, expected: Tensor) -> float:
    """The largest difference, in the largest logit's size."""
    return float((logits - expected).abs().max() / expected.abs().max())


def test_the_text_is_no_riddle_to_it(weights: Weights) -> None:
    """Else the logits compared here would be noise."""
    states = states_for(weights, 1)
    kernels = TorchKernels(weights)
    batch = RaggedBatch(tokens(), torch.arange(len(TEXT)), [0, len(TEXT)], [0])
    logits = kernels.logits(kernels.forward(states, batch))
    loss = torch.nn.functional.cross_entropy(logits[:-1], tokens()[1:])
    assert 0.5 < loss < 2.2  # nats per byte; 1.5 on the validation split, 5.5 for a model that knows nothing


def test_the_specification_in_pieces(weights: Weights, window: int, expected: Tensor) -> None:
    logits = alone(TorchKernels(weights, window), states_for(weights, 1, window), tokens(), 0, CUTS)
    assert error(logits, expected) <= TOLERANCE


def test_cpu(weights: Weights, window: int, expected: Tensor) -> None:
    logits = alone(CpuKernels(weights, window), states_for(weights, 1, window), tokens(), 0, CUTS)
    assert error(logits, expected) <= TOLERANCE


def test_int8_costs_next_to_no_loss(weights: Weights) -> None:
    """On 2,000 bytes of the validation split. `python -m benchmarks.engine.loss` reads more."""
    text = torch.tensor(list(VALIDATION.read_bytes()[:2001]))

    def loss(weights: Weights) -> float:
        logits = alone(CpuKernels(weights, 512), states_for(weights, 1, 512), text[:-1], 0, [])
        return float(torch.nn.functional.cross_entropy(logits, text[1:]))

    assert loss(load_model(MODEL, torch.int8, CPU).weights) - loss(weights) <= 0.002


def test_triton(weights: Weights) -> None:
    """Of a model of this size the interpreter does a token in a second, so it gets the text's beginning, and computes
    it in two of the layers, which share their weights."""
    weights, start = replace(weights, layers=2), tokens()[:5]
    expected = alone(TorchKernels(weights), states_for(weights, 1), start, 0, [])
    kernels = Poisoned(weights, blocks=BLOCKS, max_tokens=16)
    assert error(alone(kernels, states_on_device(weights, 1), start, 0, [3, 4]), expected) <= TOLERANCE
