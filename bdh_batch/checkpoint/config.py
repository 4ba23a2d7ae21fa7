"""The description of a BDH model: upstream's `BDHConfig`, the fields in which variants differ from it, and what follows
from them. Knows nothing about weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

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
LARGEST_HEAD = 2**34  # the product of the largest width and multiplier
LARGEST_CONTEXT = 2**40
LARGEST_THETA = 1e30  # its powers fit float32
LARGEST_STATE = 2**50  # bytes of one sequence, in float32 with a window
MATRICES = ("encoder", "encoder_v", "decoder")  # what layers may have of their own
SCALES = tuple(f"{name}_scales" for name in MATRICES)  # likewise, of matrices that are int8

Norm = Literal["every_layer", "final"]
RopeLayout = Literal["interleaved", "half"]


@dataclass(frozen=True, slots=True)
class Given:
    """What the caller says about a model where its file leaves it open; None is nothing. It may not contradict.

    The names are those of the section `model` in the settings.
    """

    layers: int | None = None
    norm: Norm | None = None
    rope_layout: RopeLayout | None = None
    rope_theta: float | None = None
    rotary_dim: int | None = None

    def fields(self) -> dict[str, tuple[str, Any]]:
        """The option and the value of each field of `BDHConfig` that is given."""
        renamed = {"layers": "n_layer"}
        return {
            renamed.get(name, name): (f"model.{name}", value)
            for name, value in asdict(self).items()
            if value is not None
        }


NOTHING = Given()


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
    norm: Norm = "every_layer"
    rope_theta: float = ROPE_THETA
    rope_layout: RopeLayout = "interleaved"
    rotary_dim: int | None = None
    per_layer_weights: bool = False
    latent_steps: bool = False

    def __post_init__(self) -> None:
        for name, most in LARGEST.items():
            self._check_integer(name, 1, most)
        self._check_neurons()
        for name, least in (("trained_context", 1), ("attention_window", 0)):
            if getattr(self, name) is not None:
                self._check_integer(name, least, LARGEST_CONTEXT)
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float) or not 0 <= self.dropout <= 1:
            raise CheckpointError(f"config: dropout must be a number from 0 to 1, not {brief(self.dropout)}")
        for name, known in (("norm", get_args(Norm)), ("rope_layout", get_args(RopeLayout))):
            if getattr(self, name) not in known:
                raise CheckpointError(f"config: {name} must be {' or '.join(known)}, not {brief(getattr(self, name))}")
        self._check_rope()
        for name in ("per_layer_weights", "latent_steps"):
            if not isinstance(getattr(self, name), bool):
                raise CheckpointError(f"config: {name} must be true or false, not {brief(getattr(self, name))}")
        if (state := 2 * 4 * self.state_elements) > LARGEST_STATE:
            raise CheckpointError(
                f"config: n_layer {self.n_layer}, n_embd {self.n_embd} and mlp_internal_dim_multiplier "
                f"{self.mlp_internal_dim_multiplier} make states of {state:,} bytes, more than any machine has"
            )

    def _check_neurons(self) -> None:
        if self.head_neurons is not None:
            self._check_integer("head_neurons", 2, LARGEST_HEAD)
        if (neurons := self.neurons_per_head) % 2 or not neurons:
            origin = (
                f"n_embd {self.n_embd} * mlp_internal_dim_multiplier {self.mlp_internal_dim_multiplier} // "
                f"n_head {self.n_head}"
                if self.head_neurons is None
                else "head_neurons"
            )
            raise CheckpointError(
                f"config: {origin} makes {neurons} neurons of a head, and it should be an even number: RoPE turns pairs"
            )

    def _check_rope(self) -> None:
        theta, rotary = self.rope_theta, self.rotary_dim
        if isinstance(theta, bool) or not isinstance(theta, int | float) or not 1 < theta <= LARGEST_THETA:
            raise CheckpointError(
                f"config: rope_theta must be a number from 1 to {LARGEST_THETA:.0e}, not {brief(theta)}"
            )
        if rotary is not None:
            self._check_integer("rotary_dim", 0, LARGEST_HEAD)
            if rotary % 2 or rotary > self.neurons_per_head:
                text = f"an even number of at most {self.neurons_per_head:,}, the neurons of a head"
                raise CheckpointError(f"config: rotary_dim must be {text}, not {rotary}")

    def _check_integer(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            kind = "a positive integer" if least else "a non-negative integer"
            raise CheckpointError(f"config: {name} must be {kind} of at most {most:,}, not {brief(value)}")

    @property
    def neurons_per_head(self) -> int:
        """N: rows of one head's state."""
        if self.head_neurons is not None:
            return self.head_neurons
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

    @property
    def turning(self) -> int:
        """Neurons of a head that RoPE turns, its first ones."""
        return self.neurons_per_head if self.rotary_dim is None else self.rotary_dim

    def matrix_keys(self, name: str) -> list[str]:
        """The keys of one of `MATRICES`: one for each set of weights."""
        return [f"{name}.{layer}" for layer in range(self.n_layer)] if self.per_layer_weights else [name]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of a checkpoint, by upstream's keys; with weights for each layer `encoder.0` and so on."""
        heads, width, neurons = self.n_head, self.n_embd, self.neurons_per_head
        up, down = (heads, width, neurons), (heads * neurons, width)
        matrices = dict(zip(MATRICES, (up, up, down)))
        return {
            "embed.weight": (self.vocab_size, width),
            **{key: shape for name, shape in matrices.items() for key in self.matrix_keys(name)},
            "lm_head": (width, self.vocab_size),
        }

    def frequencies(self) -> Tensor:
        """RoPE's turns per position [N] of each neuron of a head, float32, in the checkpoint's order of neurons."""
        return rope_frequencies(self.neurons_per_head, self.rope_theta, self.turning, self.rope_layout)

    def neuron_order(self) -> Tensor | None:
        """The checkpoint's numbers of a head's neurons as the kernels number them, [N]; None where they are the same.

        Kernels turn neighbours, 2i and 2i + 1.
        """
        if self.rope_layout == "interleaved" or not self.turning:
            return None
        order = torch.arange(self.neurons_per_head)
        order[: self.turning] = order[: self.turning].view(2, -1).T.flatten()
        return order

    def variant(self, base: str) -> str:
        """In words, what distinguishes the model from others of its sizes; `base` is RoPE's."""
        norm = {"every_layer": "norm after every layer", "final": "norm after the last layer"}[self.norm]
        which = "all" if self.turning == self.neurons_per_head else f"{self.turning:,} of {self.neurons_per_head:,}"
        rope = f"RoPE of base {base}, {self.rope_layout}, in {which} neurons of a head" if self.turning else "no RoPE"
        facts = [norm, rope, "weights for each layer" if self.per_layer_weights else "shared weights"]
        return ", ".join(facts + ["latent steps"] * self.latent_steps)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields of upstream's config, and of the others those that say something."""
        plain = {field.name: field.default for field in fields(self) if field.name not in UPSTREAM}
        values = {name: value for name, value in asdict(self).items() if name not in plain or value != plain[name]}
        if self.head_neurons is not None:
            del values["mlp_internal_dim_multiplier"]  # which says it otherwise
        return values

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


def rope_frequencies(
    neurons: int, theta: float = ROPE_THETA, turning: int | None = None, layout: RopeLayout = "interleaved"
) -> Tensor:
    """Turns per position [N] of each neuron, float32; those that turn together share one. By default upstream's
    `get_freqs`.

    Args:
        turning: the first so many turn, the others do not; None is all.
        layout: which turn together: 2i and 2i + 1, or i and i + turning / 2.
    """
    count = neurons if turning is None else turning
    index = torch.arange(count, dtype=torch.float32)
    pairs = (index / 2).floor() * 2 if layout == "interleaved" else index % max(1, count // 2) * 2
    turns = 1.0 / (theta ** (pairs / max(1, count))) / (2 * math.pi)
    return torch.cat((turns, torch.zeros(neurons - count)))


def bytes_per_sequence(config: BDHConfig, window: int = 0, dtype: torch.dtype = torch.float32) -> int:
    """A window keeps the sum over its earlier block besides the sum over all of it."""
    return config.state_elements * dtype.itemsize * (2 if window else 1)
