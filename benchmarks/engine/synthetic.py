"""Weights whose neurons fire as often as asked: those of a trained model are sparse, random ones fire half the time."""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

from bdh_batch.checkpoint.config import BDHConfig, rope_frequencies
from bdh_batch.kernels.base import Weights

COMMON = 4.0  # of what all tokens share in their hidden vector, in standard deviations of the rest


def synthetic_weights(config: BDHConfig, density: float, seed: int = 0, dtype: torch.dtype = torch.float32) -> Weights:
    """A random model in which about `density` of the neurons fire for a token: exactly none at 0, all of them at 1.

    BDH has no biases. Here every hidden vector holds one common direction, which plays the part of one: the encoder's
    columns point away from it, or along it.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    heads, width, neurons = config.n_head, config.n_embd, config.neurons_per_head
    common = normal(width)
    common = (common - common.mean()) / common.std(correction=0)
    embed = normal(config.vocab_size, width) + COMMON * common
    noise = normal(heads, width, neurons)
    noise -= (common @ noise)[:, None] * common[:, None] / width
    tilt = NormalDist().inv_cdf(min(max(density, 1e-9), 1 - 1e-9))
    encoder = noise * 0.02 + tilt * 0.02 * common[:, None] / (COMMON * width**0.5)
    if density in (0.0, 1.0):
        encoder = (density * 2 - 1) * common[:, None].expand_as(noise).contiguous() * 0.02 + 1e-4 * noise
    gated = max(1.0, config.neurons * density / 2)
    decoder = normal(heads * neurons, width) + COMMON / gated**0.5 * common  # layers keep the common direction
    return Weights(
        layers=config.n_layer,
        embed=embed.to(dtype),
        encoder=encoder[None].to(dtype),
        encoder_v=(normal(1, heads, width, neurons) * 0.02).to(dtype),
        decoder=(decoder[None] * 0.02).to(dtype),
        lm_head=(normal(width, config.vocab_size) * 0.02).to(dtype),
        frequencies=rope_frequencies(neurons),
    )
