"""What the kernels are measured against in torch, a dense recurrence and recomputing, and how far results differ."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from bdh_batch.kernels.base import RaggedBatch, Weights
from bdh_batch.kernels.torch_reference import layer_norm, project, rotate, rotation


def relative_error(mine: Iterable[Tensor], right: Iterable[Tensor]) -> float:
    """The largest over some tensors, in the Frobenius norm; NaN where any is."""
    errors = [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(mine, right, strict=True)]
    return max(errors) if all(error == error for error in errors) else float("nan")


def dense_batched(weights: Weights, states: Tensor, batch: RaggedBatch) -> Tensor:
    """A decode step of all sequences [B, L, h, N, D] in torch, as public stateful implementations write it.

    Per layer `y = q @ S` and `S += q.mT @ x` for the whole batch in one tensor, which moves the whole state.
    """
    cos, sin = rotation(weights.frequencies, batch.positions)
    x = layer_norm(F.embedding(batch.tokens, weights.embed).float())
    for layer in range(weights.layers):
        fired = project(x, weights.encoder[0]).relu()
        q = rotate(fired, cos, sin).transpose(0, 1)  # [B, h, N]
        y = (q[:, :, None] @ states[:, layer]).squeeze(2)
        flat = states[:, layer].view(len(x), -1, x.shape[-1])
        flat.baddbmm_(q.reshape(len(x), -1, 1).to(flat.dtype), x[:, None].to(flat.dtype))
        gated = fired * project(layer_norm(y).transpose(0, 1), weights.encoder_v[0]).relu()
        x = layer_norm(x + layer_norm(project(gated.transpose(0, 1).flatten(1), weights.decoder[0])))
    return project(x, weights.lm_head)


def recompute(weights: Weights, contexts: Tensor, together: int = 4) -> Tensor:
    """The next token's logits for contexts [B, T], from their start, as upstream's `generate` does for every token.

    Args:
        together: contexts computed at once, as many as fit.
    """
    length = contexts.shape[1]
    cos, sin = rotation(weights.frequencies, torch.arange(length, device=contexts.device))
    rows = []
    for tokens in torch.split(contexts, together):
        x = layer_norm(weights.embed[tokens].float())[:, None]
        for _ in range(weights.layers):
            fired = project(x, weights.encoder[0]).relu()
            q = rotate(fired, cos, sin)
            y = layer_norm((q @ q.mT).tril(-1) @ x)
            gated = fired * project(y, weights.encoder_v[0]).relu()
            z = project(gated.transpose(1, 2).reshape(len(tokens), 1, length, -1), weights.decoder[0])
            x = layer_norm(x + layer_norm(z))
        rows.append(project(x[:, 0, -1], weights.lm_head))
    return torch.cat(rows)
