"""What is seen of a model's neurons: what a request asks for, and what fired when a token was read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from bdh_batch.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class NeuronsAsked:
    """What a request wants to see of the neurons that its tokens fire.

    Args:
        top: how many of the strongest, by layer.
        prompt: whether those of the prompt's tokens, too; else those of generated ones alone.
    """

    top: int
    prompt: bool = False

    def check(self, tokens: int, limit: NeuronLimit) -> None:
        """Raises InvalidRequest where a response of so many `tokens` would contain too many."""
        if (total := tokens * limit.layers * self.top) > limit.most:
            text = (
                f"{tokens} tokens, with the {self.top} strongest of {limit.layers} layers each, make {total:,} neurons"
            )
            text = f"neurons: {text}; a response may contain {limit.most:,} (limits.max_neurons)."
            raise InvalidRequest(text, "neurons.top")


@dataclass(frozen=True, slots=True)
class NeuronLimit:
    """How many neurons a response may contain, of a model of so many layers."""

    layers: int
    most: int


class Neurons(NamedTuple):
    """The neurons that fired when a token was read, by layer: relu(x · encoder) at its position.

    Packed, as there are many: float32 and uint32, little-endian. A layer has as many `strongest` as it was asked for,
    or as it has neurons; where fewer fired, the `values` of the others are 0.

    Args:
        token: that was read.
        per_head: neurons of a head: number n of head h is h · per_head + n among the `strongest`, in the
            checkpoint's own order of neurons.
        active: float32 [layers], the share of all neurons that fired.
        strongest: uint32 [layers, top], the strongest first.
        values: float32 [layers, top], their activations.
    """

    token: int
    per_head: int
    active: bytes
    strongest: bytes
    values: bytes
