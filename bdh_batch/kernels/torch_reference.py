"""BDH's forward pass over a ragged batch, as plainly as torch can say it: the specification of every other kernel.

Of pathwaycom/bdh, `bdh.py`, only the order of summation is changed. There the whole context is attended to for every
token, y_t = Σ_{s<t} (q_t · q_s) x_s. Here what came before a segment is read from the sequence's state
S = Σ_s q_s ⊗ x_s, one N × D matrix per layer and head, which has the same size at any length.

Shapes: T tokens, D width, h heads, N neurons per head. The matrices may be 16 or 8 bits wide; activations and sums are
float32. States are float32, or bfloat16: then they are rounded to the nearest when a segment has been added.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bdh_batch.kernels.base import RaggedBatch, Weights, copy_sources


class TorchKernels:
    """The specification as an implementation of `base.Kernels`."""

    def __init__(self, weights: Weights, window: int = 0) -> None:
        self._weights = weights
        self._window = window

    def forward(
        self, states: Tensor, batch: RaggedBatch, active: Tensor | None = None, fired: Tensor | None = None
    ) -> Tensor:
        return forward(self._weights, states, batch, self._window, active, fired)

    def warm(self, states: Tensor) -> None:
        pass  # nothing depends on where the states lie

    def logits(self, hidden: Tensor) -> Tensor:
        weights = self._weights
        return project(hidden, weights.lm_head, None if weights.scales is None else weights.scales.lm_head)


def forward(
    weights: Weights,
    states: Tensor,
    batch: RaggedBatch,
    window: int = 0,
    active: Tensor | None = None,
    shown: Tensor | None = None,
) -> Tensor:
    """The final hidden vectors [T, D] of a batch's tokens. Adds the tokens to `states`, laid out as `Kernels` says.

    `active` and `shown` are what `Kernels.forward` calls `active` and `fired`.
    """
    copy_sources(states, batch)
    cos, sin = rotation(weights.frequencies, batch.positions)
    x, scales = inputs(weights, batch), weights.scales
    for layer in range(weights.layers):
        matrices = weights.set_of(layer)
        of_encoder = None if scales is None else scales.encoder[matrices]
        of_gate = None if scales is None else scales.encoder_v[matrices]
        fired = project(x, weights.encoder[matrices], of_encoder).relu()  # [h, T, N]
        if active is not None:
            active[layer] = (fired != 0).float().mean()
        if shown is not None:
            shown[layer] = fired[:, list(batch.watched)].transpose(0, 1)
        y = attend(rotate(fired, cos, sin), x, states[:, layer], batch, window)
        gate = project(layer_norm(y), weights.encoder_v[matrices], of_gate).relu()
        gated = (fired * gate).transpose(0, 1).flatten(1)  # [T, h * N]
        if scales is not None:
            gated = gated * scales.decoder[matrices]
        x = x + layer_norm(project(gated, weights.decoder[matrices]))
        if not weights.final_norm or layer == weights.layers - 1:
            x = layer_norm(x)
    return x


def inputs(weights: Weights, batch: RaggedBatch) -> Tensor:
    """What enters the first layer, [T, D]: a token's embedding after LayerNorm, or a latent step's vector as it is."""
    x = layer_norm(F.embedding(batch.tokens.clamp(min=0), weights.embed).float())
    if batch.vectors is not None:
        latent = batch.tokens < 0
        x[latent] = batch.vectors[-1 - batch.tokens[latent]]
    return x


def project(x: Tensor, matrix: Tensor, scales: Tensor | None = None) -> Tensor:
    """x · matrix in the matrix's precision, given back as float32. One of int8 is widened to float32; `scales` are
    those of its columns, [..., N]."""
    if matrix.dtype != torch.int8:
        return (x.to(matrix.dtype) @ matrix).float()
    product = x @ matrix.float()
    return product if scales is None else product * scales[..., None, :]


def layer_norm(x: Tensor) -> Tensor:
    """Over the last axis, without parameters."""
    return F.layer_norm(x, x.shape[-1:])


def rotation(frequencies: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [T, N / 2] of each token's RoPE angles.

    A float32 frequency times a position below 2^29 is exact in float64, so whole turns drop out without error.
    """
    turns = positions[:, None].double() * frequencies[::2].double()
    angles = (turns % 1.0) * (2.0 * math.pi)
    return angles.cos().float(), angles.sin().float()


def rotate(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: turns each pair of neighbours (2i, 2i + 1) of q [..., T, N]."""
    even, odd = q[..., ::2], q[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def attend(q: Tensor, x: Tensor, states: Tensor, batch: RaggedBatch, window: int = 0) -> Tensor:
    """y [h, T, D] for q [h, T, N] and x [T, D]: what each token reads of those before it. Adds to `states` all but the
    tokens of frozen segments."""
    y = torch.empty(q.shape[0], *x.shape, dtype=x.dtype, device=x.device)
    frozen = batch.frozen or [False] * len(batch.slots)
    for slot, begin, end, only_read in zip(batch.slots, batch.bounds, batch.bounds[1:], frozen):
        tokens = slice(begin, end)
        if window:
            start = int(batch.positions[begin])
            y[:, tokens] = attend_window(q[:, tokens], x[tokens], states[slot], start, window // 2, only_read)
        else:
            y[:, tokens] = attend_segment(q[:, tokens], x[tokens], states[slot], only_read)
    return y


def attend_window(q: Tensor, x: Tensor, state: Tensor, start: int, block: int, only_read: bool = False) -> Tensor:
    """As `attend_segment`, from position `start` on, but each token reads only its block and the block before it.

    `state` [2, h, N, D] holds the sum over both blocks, and that over the earlier one. A block begins at its first
    position, whether or not that is added.
    """
    both, earlier = state
    y = []
    while len(x):
        inside = start % block
        if inside == 0:
            both -= earlier
            earlier.copy_(both)
        count = block - inside
        y.append(attend_segment(q[:, :count], x[:count], both, only_read))
        q, x, start = q[:, count:], x[count:], start + count
    return torch.cat(y, dim=1)


def attend_segment(q: Tensor, x: Tensor, state: Tensor, only_read: bool = False) -> Tensor:
    """One sequence: q [h, C, N], x [C, D], state [h, N, D]. A token reads the state and the segment's tokens before."""
    sums = state.float()  # the state itself, unless that is narrower
    y = q @ sums
    if len(x) > 1:
        y += (q @ q.mT).tril(-1) @ x
    if not only_read:
        sums += q.mT @ x
        state.copy_(sums)
    return y
