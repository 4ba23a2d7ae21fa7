"""BDH and its variants from their definitions: dense, over the whole context, in float64. Shares nothing with the
package but the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Rope = Callable[[Tensor], Tensor]  # q [h, T, N], of positions 0 to T − 1, to q turned


@dataclass(frozen=True)
class Dense:
    """A model: `encoder` [h, D, N], `encoder_v` [h, D, N] and `decoder` [h * N, D] of each layer."""

    embed: Tensor  # [V, D]
    layers: Sequence[tuple[Tensor, Tensor, Tensor]]
    head: Tensor  # [D, V]
    rope: Rope
    final_norm: bool = False

    def logits(self, tokens: Tensor) -> Tensor:
        x = norm(self.embed.double()[tokens])
        for encoder, encoder_v, decoder in self.layers:
            fired = (x @ encoder.double()).clamp(min=0)
            turned = self.rope(fired)
            seen = (turned @ turned.mT).tril(-1) @ x
            gate = (norm(seen) @ encoder_v.double()).clamp(min=0)
            x = x + norm((fired * gate).transpose(0, 1).flatten(1) @ decoder.double())
            x = x if self.final_norm else norm(x)
        x = norm(x) if self.final_norm else x
        return x @ self.head.double()


def norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def interleaved(theta: float, turning: int) -> Rope:
    """Neurons 2i and 2i + 1 of the first `turning` are one complex number each, turned by t · theta^(−2i / turning)."""

    def turn(q: Tensor) -> Tensor:
        first = torch.view_as_complex(q[..., :turning].reshape(*q.shape[:-1], -1, 2).contiguous())
        turned = torch.view_as_real(first * phases(q.shape[-2], theta, turning)).flatten(-2)
        return torch.cat((turned, q[..., turning:]), -1)

    return turn


def half(theta: float, turning: int) -> Rope:
    """Neurons i and i + turning / 2 of the first `turning` are one complex number each."""

    def turn(q: Tensor) -> Tensor:
        real, imaginary = q[..., :turning].chunk(2, -1)
        turned = torch.complex(real, imaginary) * phases(q.shape[-2], theta, turning)
        return torch.cat((turned.real, turned.imag, q[..., turning:]), -1)

    return turn


def still(q: Tensor) -> Tensor:
    """Of a model without positions."""
    return q


def phases(length: int, theta: float, turning: int) -> Tensor:
    angles = [[t * theta ** (-2 * i / turning) for i in range(turning // 2)] for t in range(length)]
    return torch.tensor([[complex(math.cos(angle), math.sin(angle)) for angle in row] for row in angles]).to(
        torch.complex128
    )
