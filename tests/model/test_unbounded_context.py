"""A model that was trained at 128 bytes goes on for ever with its window, and falls apart without.

It was made by `make train TEXT=tinyshakespeare.txt OUT=trained-at-128 ARGS="--stages 16x128:2500 --layers 4 --width 64
--heads 4 --multiplier 16 --dropout 0.05 --lr 3e-3"`, which did not see the text used here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bdh_batch.checkpoint.checkpoint import Model, load_model
from bdh_batch.engine.loading import attention_window
from bdh_batch.engine.runner import Runner
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.kernels.cpu import CpuKernels
from bdh_batch.messages import Segment

DATA = Path(__file__).parents[1] / "data"
CPU = torch.device("cpu")
FAR = 10_000
TEXT = torch.tensor(list((DATA / "shakespeare-validation.txt").read_bytes()[: FAR + 4096 + 1]))


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(DATA / "trained-at-128", torch.float32, CPU)


def losses(model: Model, window: int, tokens: Tensor) -> Tensor:
    """Nats of each token but the first, in one context from its start."""
    runner = Runner(CpuKernels(model.weights, window), StatePool(model.config, 1, CPU, window))
    chunks = [
        runner.logits([Segment(0, start, tokens[start : start + 512].tolist(), None)])
        for start in range(0, len(tokens) - 1, 512)
    ]
    return F.cross_entropy(torch.cat(chunks)[: len(tokens) - 1], tokens[1:], reduction="none")


@pytest.fixture(scope="module")
def inside(model: Model) -> float:
    """The loss within the trained context, of the text that lies past FAR tokens."""
    contexts = TEXT[FAR : FAR + 4096].view(-1, 128)
    return float(torch.stack([losses(model, 0, context) for context in contexts]).mean())


def test_with_its_window_the_loss_stays(model: Model, inside: float) -> None:
    assert attention_window(None, model.config) == 128
    far = float(losses(model, 128, TEXT)[FAR:].mean())
    assert abs(far - inside) <= 0.1


def test_without_it_is_lost(model: Model, inside: float) -> None:
    assert float(losses(model, 0, TEXT)[FAR:].mean()) > inside + 0.5
