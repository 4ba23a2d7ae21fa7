"""bdh-cq, the package of that name on PyPI: a BDH with one norm at the end and latent reasoning steps.

Its matrices are those of upstream, transposed where it has linear layers. Its RoPE turns the first neurons of a head,
by frequencies in radians; its wrapper for reasoning may have an embedding of latent steps. Its depth is in no file.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bdh_batch.checkpoint.config import rope_frequencies
from bdh_batch.checkpoint.dialects.keys import EMBED, HEAD, LATENT, RADIANS
from bdh_batch.checkpoint.files import State
from bdh_batch.errors import CheckpointError
from bdh_batch.system.documents import listed

NAMES = {
    "token_embed.weight": EMBED,
    "block.to_qk.weight": "encoder",
    "block.proj_up": "encoder_v",
    "block.proj_out.weight": "decoder",
    "to_logits.weight": HEAD,
    "rope.freqs": RADIANS,
    "latent_step_embed": LATENT,
}
MARKS = frozenset(NAMES) - {"rope.freqs", "latent_step_embed"}
THETA = 10_000.0  # the package's own, which no file says


def translate(state: State) -> dict[str, Any]:
    """Turns the matrices in `state`, which are by upstream's names, as upstream has them; what is missing stays so.

    Returns:
        The fields of the config that are known of every bdh-cq, and by its shapes.

    Raises:
        CheckpointError: the shapes do not go together.
    """
    facts: dict[str, Any] = {"norm": "final", "rope_layout": "interleaved", "latent_steps": True}
    if (radians := state.get(RADIANS)) is not None:
        facts |= _rope(radians)
    up = state.get("encoder_v")
    if up is None:
        return facts
    if up.ndim != 3:
        raise CheckpointError(f"block.proj_up should be [heads, D, N], is {list(up.shape)}")
    heads, width, neurons = up.shape
    _check(state, heads, width, neurons)
    if (to_qk := state.get("encoder")) is not None:
        state["encoder"] = to_qk.reshape(heads, neurons, width).mT
    for name in ("decoder", HEAD):
        if name in state:
            state[name] = state[name].mT
    if neurons % 2:
        _pad(state, heads)
    return facts


def _rope(radians: Tensor) -> dict[str, Any]:
    """How many neurons turn; and by which base, where it is the package's: they may have been learnt."""
    turning = 2 * radians.numel()
    usual = rope_frequencies(turning, THETA)[::2].double() * 2 * torch.pi
    tolerance = 1e-4 if radians.dtype.itemsize >= 4 else 2.0**-7
    known = radians.is_floating_point() and torch.allclose(radians.flatten().double(), usual, tolerance, 0.0)
    return {"rotary_dim": turning} | ({"rope_theta": THETA} if known else {})


def _check(state: State, heads: int, width: int, neurons: int) -> None:
    expected = {
        "block.to_qk.weight": (heads * neurons, width),
        "block.proj_out.weight": (width, heads * neurons),
        "to_logits.weight": (len(state[EMBED]) if EMBED in state and state[EMBED].ndim else 0, width),
    }
    problems = [
        f"{name} has shape {list(state[NAMES[name]].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if NAMES[name] in state and state[NAMES[name]].shape != shape
    ]
    if problems:
        raise CheckpointError(listed(problems) + f", as block.proj_up is {[heads, width, neurons]}")


def _pad(state: State, heads: int) -> None:
    """Gives each head one neuron more, which never fires: kernels take neurons by pairs."""
    for name in ("encoder", "encoder_v"):
        if name in state:
            state[name] = F.pad(state[name], (0, 1))
    if (down := state.get("decoder")) is not None:
        state["decoder"] = F.pad(down.reshape(heads, -1, down.shape[-1]), (0, 0, 0, 1)).flatten(0, 1)
