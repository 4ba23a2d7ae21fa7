"""Kernels without a state: a token's context is computed from its start, as upstream's `generate` does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bdh_batch.kernels.base import RaggedBatch, Weights
from bdh_batch.kernels.torch_reference import layer_norm, project, rotate, rotation


class RecomputeKernels:
    """Implements `kernels.base.Kernels`; the tokens of each slot are all that it keeps."""

    def __init__(self, weights: Weights, window: int = 0) -> None:
        self._weights = weights
        self._block = window // 2
        self._known: dict[int, Tensor] = {}

    def forward(
        self, states: Tensor, batch: RaggedBatch, active: Tensor | None = None, fired: Tensor | None = None
    ) -> Tensor:
        if fired is not None or batch.vectors is not None:
            raise NotImplementedError("the baseline computes tokens, and shows no neurons")
        hidden = []
        if active is not None:
            active.zero_()
        for slot, begin, end in zip(batch.slots, batch.bounds, batch.bounds[1:]):
            known = self._known.get(slot, batch.tokens[:0])[: int(batch.positions[begin])]
            self._known[slot] = torch.cat([known, batch.tokens[begin:end]])
            hidden.append(self._whole(self._known[slot], end - begin, active))
        if active is not None:
            active /= len(batch.tokens)
        return torch.cat(hidden)

    def warm(self, states: Tensor) -> None:
        pass  # there is nothing to prepare

    def logits(self, hidden: Tensor) -> Tensor:
        return project(hidden, self._weights.lm_head)

    def _whole(self, tokens: Tensor, last: int, active: Tensor | None) -> Tensor:
        """The final hidden vectors of a sequence's `last` tokens; the shares of neurons that fired for them are added
        to `active`."""
        weights = self._weights
        positions = torch.arange(len(tokens), device=tokens.device)
        cos, sin = rotation(weights.frequencies, positions)
        out_of_sight = self._out_of_sight(positions)
        x = layer_norm(F.embedding(tokens, weights.embed).float())
        for layer in range(weights.layers):
            fired = project(x, weights.encoder[0]).relu()  # [h, T, N]
            if active is not None:
                active[layer] += last * (fired[:, -last:] != 0).float().mean()
            q = rotate(fired, cos, sin)
            y = (q @ q.mT).tril(-1).masked_fill(out_of_sight, 0.0) @ x
            gated = fired * project(layer_norm(y), weights.encoder_v[0]).relu()
            x = layer_norm(x + layer_norm(project(gated.transpose(0, 1).flatten(1), weights.decoder[0])))
        return x[-last:]

    def _out_of_sight(self, positions: Tensor) -> Tensor:
        """Which tokens [T, T] lie before the blocks that another one attends to."""
        if not self._block:
            return torch.zeros(1, 1, dtype=torch.bool, device=positions.device)
        blocks = positions // self._block
        return blocks[None] < blocks[:, None] - 1
