"""A tiny model of bdh-cq with latent steps, as that package has it and as the engine does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from bdh_cq import BDH, BDHReasoningWrapper

from bdh_batch.checkpoint.checkpoint import save_model
from bdh_batch.checkpoint.config import BDHConfig
from bdh_batch.kernels.base import Weights

LAYERS, WIDTH, HEADS, NEURONS, VOCABULARY, ROTARY = 3, 16, 2, 24, 256, 8  # NEURONS of one head


@dataclass(frozen=True)
class Reasoning:
    """A model in both forms."""

    oracle: BDHReasoningWrapper
    config: BDHConfig
    weights: Weights

    def answer(self, prompt: Sequence[int], steps: int, tokens: int, update: bool = True) -> list[int]:
        """What the package generates greedily, after so many latent steps."""
        return self.after([torch.tensor([[*prompt]]), steps], tokens, True, update)

    def after(self, stages: Sequence[torch.Tensor | int], tokens: int, *updates: bool) -> list[int]:
        """The same, after prompts and latent steps in turn, each of which updates the state or only reads it."""
        with torch.no_grad():
            found: list[int] = self.oracle.generate(
                *stages, num_tokens=tokens, temperature=0, update_memory_per_stage=[*updates]
            )
        return found


@cache
def reasoning(seed: int = 5) -> Reasoning:
    """A random model whose latent steps make a difference to what it says."""
    torch.manual_seed(seed)
    bdh = BDH(
        dim=WIDTH, num_tokens=VOCABULARY, depth=LAYERS, heads=HEADS, dim_qk_heads=HEADS * NEURONS, rotary_dim=ROTARY
    )
    oracle = BDHReasoningWrapper(bdh, latent_step_embed=True).eval()
    with torch.no_grad():
        for parameter in (bdh.block.proj_up, oracle.latent_step_embed):
            parameter.normal_(std=0.3)
    config = BDHConfig(
        n_layer=LAYERS,
        n_embd=WIDTH,
        n_head=HEADS,
        mlp_internal_dim_multiplier=HEADS * NEURONS // WIDTH,
        vocab_size=VOCABULARY,
        norm="final",
        rope_theta=10_000.0,
        rotary_dim=ROTARY,
        latent_steps=True,
    )
    pairs = torch.arange(0, ROTARY, 2).float()
    turning = (10_000.0 ** (-pairs / ROTARY) / (2 * math.pi)).repeat_interleave(2)
    weights = Weights(
        layers=LAYERS,
        embed=bdh.token_embed.weight.detach().clone(),
        encoder=bdh.block.to_qk.weight.detach().view(1, HEADS, NEURONS, WIDTH).mT.contiguous(),
        encoder_v=bdh.block.proj_up.detach()[None].clone(),
        decoder=bdh.block.proj_out.weight.detach().T.contiguous()[None],
        lm_head=bdh.to_logits.weight.detach().T.contiguous(),
        frequencies=torch.cat((turning, torch.zeros(NEURONS - ROTARY))),
        final_norm=True,
        latent_embed=oracle.latent_step_embed.detach().clone(),
    )
    return Reasoning(oracle, config, weights)


def write_folder(folder: Path, generation: Mapping[str, Any]) -> Path:
    """The model as `bdh-batch serve` reads it."""
    model = reasoning()
    weights = model.weights
    assert weights.latent_embed is not None
    tensors = {
        "embed.weight": weights.embed,
        "encoder": weights.encoder[0],
        "encoder_v": weights.encoder_v[0],
        "decoder": weights.decoder[0],
        "lm_head": weights.lm_head,
        "latent_step_embed": weights.latent_embed,
    }
    save_model(folder, model.config, tensors, generation)
    return folder
