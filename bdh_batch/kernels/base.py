"""The interface of the kernels, and their arguments: weights, states, and a ragged batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from bdh_batch.kernels.drawing import Doubles, Rows


@dataclass(frozen=True, slots=True)
class Scales:
    """What int8 weights are multiples of, float32: a number for each column of D of them, the weights of one neuron in
    a matrix, or of one token in the head."""

    encoder: Tensor  # [M, heads, N]
    encoder_v: Tensor  # [M, heads, N]
    decoder: Tensor  # [M, heads * N]
    lm_head: Tensor  # [V]


@dataclass(frozen=True, slots=True)
class Weights:
    """A BDH model's tensors. D is the width, N the neurons of one head.

    M, the sets of matrices, is 1 where all `layers` share theirs, else there is one for each layer. The matrices and
    the head have one dtype: float32, float16, bfloat16, or int8 with `scales`. `embed` has it too, but beside int8 it
    is float32; `frequencies` is float32 whatever theirs is.
    """

    layers: int
    embed: Tensor  # [V, D]
    encoder: Tensor  # [M, heads, D, N]
    encoder_v: Tensor  # [M, heads, D, N]
    decoder: Tensor  # [M, heads * N, D]
    lm_head: Tensor  # [D, V]
    frequencies: Tensor  # [N], RoPE turns per position; neurons 2i and 2i + 1 share one
    final_norm: bool = False  # one LayerNorm after the last layer, instead of one after every layer
    latent_embed: Tensor | None = None  # [D] float32, added to the vector that enters a latent step
    scales: Scales | None = None  # of int8

    @property
    def dtype(self) -> torch.dtype:
        """That of the matrices."""
        return self.encoder.dtype

    def set_of(self, layer: int) -> int:
        """The index of a layer's matrices."""
        return layer % len(self.encoder)


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """T tokens of several sequences, one behind the other; sequence s owns tokens `bounds[s]` … `bounds[s + 1]` − 1."""

    tokens: Tensor  # [T] int64; −1 − k is no token: row k of `vectors` enters the first layer as it is
    positions: Tensor  # [T] int64, of each token in its sequence
    bounds: Sequence[int]  # S + 1 offsets into the tokens
    slots: Sequence[int]  # S indices into the state pool, no two the same
    # For each segment, whether its last token is computed as in decoding: what follows it is drawn, or it is a latent
    # step. Empty: where it has one token.
    draws: Sequence[bool] = ()
    vectors: Tensor | None = None  # [K, D] float32, of latent steps
    # For each segment, whether its state is only read. Such a segment has one token. Empty: all are written.
    frozen: Sequence[bool] = ()
    # For each segment, the slot whose state is copied to its own before its first token; no other segment's slot, but
    # several may have the same one. Its own: nothing is copied. Empty: all are their own.
    sources: Sequence[int] = ()
    watched: Sequence[int] = ()  # W tokens, rising, whose neurons `forward` is to show
    # Batches with the same number, if that is not 0, have one token of each sequence and the same slots, and differ in
    # `tokens` and `positions` only.
    steady: int = 0


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """S sequences with one token each, in main memory, and how the tokens after them are drawn."""

    tokens: Sequence[int]  # S; as in RaggedBatch
    positions: Sequence[int]  # S, of these tokens
    slots: Sequence[int]  # S
    rows: Rows  # [S]
    uniform: Doubles  # [S], random numbers
    frozen: Sequence[bool] = ()  # as in RaggedBatch
    vectors: Tensor | None = None  # [K, D] float32, of latent steps, on the device


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a decode step leaves on the device, until the next one; and its tokens."""

    hidden: Tensor  # [S, D] float32
    logits: Tensor  # [S, V] float32
    tokens: Callable[[], list[int]]  # waits for them; `drawing.NO_TOKEN` where logits are not finite


def listed(slots: Sequence[int], frozen: Sequence[bool]) -> Sequence[int]:
    """Slots as the Triton kernels take them: −2 − s is slot s where the state is only read."""
    return (
        [-2 - slot if only_read else slot for slot, only_read in zip(slots, frozen, strict=True)] if frozen else slots
    )


def copy_sources(states: Tensor, batch: RaggedBatch) -> None:
    """Makes the copies of a batch's `sources`, for kernels that have no better way."""
    for slot, source in zip(batch.slots, batch.sources):
        if source != slot:
            states[slot].copy_(states[source])


class Kernels(Protocol):
    """An implementation, made once for a model's weights, which it may rearrange to its liking.

    It is also made for one window: 0 attends to everything before a token. An even W > 0 cuts every sequence in blocks
    of W / 2 tokens, at the multiples of W / 2; a token attends to its block and the block before it. `states` is
    [slots, layers, h, N, D] without a window. With one it is [slots, layers, 2, h, N, D]: the sum over those two
    blocks, and the sum over the earlier one, which is taken away when the next block begins. Slots stay contiguous.
    States are float32 or bfloat16.
    """

    def forward(
        self, states: Tensor, batch: RaggedBatch, active: Tensor | None = None, fired: Tensor | None = None
    ) -> Tensor:
        """Adds a batch's tokens to `states`, and returns their final hidden vectors.

        Args:
            states: float32 or bfloat16, of the shape above; changed in the slots of `batch`.
            batch: T tokens of S sequences.
            active: [layers] float32, or None; gets the share of neurons that fired in each layer, over all the tokens.
                Whether it is given changes no result.
            fired: [layers, W, h, N] float32, or None; gets the activations relu(x · encoder) of the watched tokens.
                Whether it is given changes no result.

        Returns:
            [T, D] float32, in the order of the tokens.
        """

    def warm(self, states: Tensor) -> None:
        """Prepares what depends on where `states` lie, before any request; may overwrite them."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns the logits [T, V] float32 of the next token for hidden vectors [T, D] float32."""


@runtime_checkable
class DecodeKernels(Kernels, Protocol):
    """Kernels that compute a step in which each sequence has one token with its logits and draws, in one go."""

    @property
    def most_decoded(self) -> int:
        """Sequences of the largest such step."""

    def decode(self, states: Tensor, batch: DecodeBatch) -> Decoded:
        """Queues a step: adds its tokens to `states` as `forward` does, with the same bits, and draws the next ones."""
