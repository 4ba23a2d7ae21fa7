"""The shape of a BDH model: upstream's `BDHConfig` and what follows from it. Knows nothing about weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from bdh_batch.errors import CheckpointError
from bdh_batch.system.documents import brief, listed

ROPE_THETA = 2.0**16
LARGEST = {  # beyond any BDH, and far below where products of them would not fit 64 bits
    "n_layer": 4096,
    "n_embd": 2**17,
    "n_head": 2**13,
    "mlp_internal_dim_multiplier": 2**17,
    "vocab_size": 2**24,
}
UPSTREAM = frozenset((*LARGEST, "dropout"))  # its config's fields
LARGEST_CONTEXT = 2**40
LARGEST_STATE = 2**50  # bytes of one sequence, in float32 with a window


@dataclass(frozen=True)
class BDHConfig:
    """The shape of a model. Field names are those of upstream's `BDHConfig` (pathwaycom/bdh, `bdh.py`), and some more,
    whose defaults describe upstream's model.

    Attributes:
        trained_context: the longest context that the model has seen in training.
        attention_window: how far its author found it best to look back, if not that far; 0 is without end.
        head_neurons: of one head; None is `mlp_internal_dim_multiplier * n_embd // n_head`.
        norm: where LayerNorm is applied to the residual stream: after every layer, or once after the last.
        rope_theta: RoPE's base.
        rope_layout: which neurons turn together: 2i and 2i + 1, or i and i + `rotary_dim` / 2.
        rotary_dim: how many neurons of a head turn, its first ones; None is all. The others have no position.
        per_layer_weights: whether each layer has matrices of its own.
        latent_steps: whether the model has learnt to go on from its own final hidden vector instead of a token.
    """

    n_layer: int = 6
    n_embd: int = 256
    n_head: int = 4
    mlp_internal_dim_multiplier: int = 128
    vocab_size: int = 256
    dropout: float = 0.1
    trained_context: int | None = None
    attention_window: int | None = None
    head_neurons: int | None = None
    norm: Literal["every_layer", "final"] = "every_layer"
    rope_theta: float = ROPE_THETA
    rope_layout: Literal["interleaved", "half"] = "interleaved"
    rotary_dim: int | None = None
    per_layer_weights: bool = False
    latent_steps: bool = False

    def __post_init__(self) -> None:
        for name, most in LARGEST.items():
            self._check_integer(name, 1, most)
        if self.mlp_internal_dim_multiplier * self.n_embd % (2 * self.n_head):
            raise CheckpointError(
                "config: n_embd * mlp_internal_dim_multiplier must be a multiple of 2 * n_head: RoPE turns pairs; "
                f"{self.n_embd} * {self.mlp_internal_dim_multiplier} is not a multiple of {2 * self.n_head}"
            )
        for name, least in (("trained_context", 1), ("attention_window", 0)):
            if getattr(self, name) is not None:
                self._check_integer(name, least, LARGEST_CONTEXT)
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float) or not 0 <= self.dropout <= 1:
            raise CheckpointError(f"config: dropout must be a number from 0 to 1, not {brief(self.dropout)}")
        if (state := 2 * 4 * self.state_elements) > LARGEST_STATE:
            raise CheckpointError(
                f"config: n_layer {self.n_layer}, n_embd {self.n_embd} and mlp_internal_dim_multiplier "
                f"{self.mlp_internal_dim_multiplier} make states of {state:,} bytes, more than any machine has"
            )

    def _check_integer(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            kind = "a positive integer" if least else "a non-negative integer"
            raise CheckpointError(f"config: {name} must be {kind} of at most {most:,}, not {brief(value)}")

    @property
    def neurons_per_head(self) -> int:
        """N: rows of one head's state."""
        return self.mlp_internal_dim_multiplier * self.n_embd // self.n_head

    @property
    def neurons(self) -> int:
        """n = heads × N: rows of one layer's state."""
        return self.n_head * self.neurons_per_head

    @property
    def state_elements(self) -> int:
        """Numbers in one sequence's state, L × n × D, at any length."""
        return self.n_layer * self.neurons * self.n_embd

    @property
    def suggested_window(self) -> int:
        """Tokens that a token should look back on, 0 for all: an even number, as two blocks share it."""
        window = self.trained_context if self.attention_window is None else self.attention_window
        return window + window % 2 if window else 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of a checkpoint, by upstream's keys."""
        heads, width, neurons = self.n_head, self.n_embd, self.neurons_per_head
        return {
            "embed.weight": (self.vocab_size, width),
            "encoder": (heads, width, neurons),
            "encoder_v": (heads, width, neurons),
            "decoder": (heads * neurons, width),
            "lm_head": (width, self.vocab_size),
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields of upstream's config, and of the others those that say something."""
        plain = {field.name: field.default for field in fields(self) if field.name not in UPSTREAM}
        return {name: value for name, value in asdict(self).items() if name not in plain or value != plain[name]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BDHConfig:
        known = {field.name for field in fields(cls)}
        unknown = sorted(map(str, values.keys() - known))
        if unknown:
            names = listed(map(ascii, unknown), ", ")
            raise CheckpointError(
                f"config: unknown fields {names}; known: {', '.join(sorted(known))}. If they "
                "do not change the forward pass, put a config.json of the known ones beside the weights"
            )
        return cls(**values)


def rope_frequencies(neurons: int) -> Tensor:
    """Turns per position [N] of each neuron, float32; neighbours (2i, 2i + 1) share one. Upstream's `get_freqs`."""
    pairs = (torch.arange(neurons, dtype=torch.float32) / 2).floor() * 2
    return 1.0 / (ROPE_THETA ** (pairs / neurons)) / (2 * math.pi)


def bytes_per_sequence(config: BDHConfig, window: int = 0, dtype: torch.dtype = torch.float32) -> int:
    """A window keeps the sum over its earlier block besides the sum over all of it."""
    return config.state_elements * dtype.itemsize * (2 if window else 1)
