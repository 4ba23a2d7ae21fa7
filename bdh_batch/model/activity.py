"""How sparsely a model fires: looked at now and then, in one sequence, beside what is computed for it."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from bdh_batch.kernels.base import RaggedBatch, Weights
from bdh_batch.kernels.torch_reference import think
from bdh_batch.messages import Segment

FIRST, EVERY = 8, 1024  # steps; a look reads a whole state, some hundred times what a token reads of it


class Activity:
    def __init__(self, weights: Weights, window: int = 0) -> None:
        self._weights = weights
        self._window = window
        self._steps = 0

    def look(self, states: Tensor, segments: Sequence[Segment]) -> list[float]:
        """The share of neurons in each layer that fire for the first token of one of `segments`, which is to enter
        `states`; these stay as they are. From time to time only, else nothing."""
        self._steps += 1
        if self._steps % EVERY != FIRST:
            return []
        segment = max(segments, key=attrgetter("start"))
        if segment.start == 0:  # its state is not cleared yet
            return []
        batch = RaggedBatch(
            tokens=torch.tensor([segment.tokens[0]], device=states.device),
            positions=torch.tensor([segment.start], device=states.device),
            bounds=[0, 1],
            slots=[0],
        )
        state = states[segment.slot : segment.slot + 1].clone()
        shares = [(fired > 0).float().mean() for fired, _ in think(self._weights, state, batch, self._window)]
        return [float(share) for share in torch.stack(shares).tolist()]
