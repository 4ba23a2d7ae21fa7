"""The forward pass on a GPU: cuts a batch in rounds, and launches the Triton kernels. `decode_steps.py` replays them
where a step only decodes.

Also runs without a GPU, in Triton's interpreter, when TRITON_INTERPRET=1 is set before Triton is imported. Nothing in a
step waits for the GPU; all memory that steps work in is taken once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bdh_batch.kernels import triton_ops as ops
from bdh_batch.kernels.base import DecodeBatch, Decoded, RaggedBatch, Weights, copy_sources, listed
from bdh_batch.kernels.decode_steps import DecodeSteps, Inputs
from bdh_batch.kernels.tuning import Blocks, at_least_smallest, key_of, load_blocks

MAX_TOKENS = 2048  # of one round; the memory to work in is for as many
ANGLES = 256  # of one program
ROWS = 4  # of partial sums that one program adds at a time
LOGIT_TILE, LOGIT_DEPTH, LOGIT_STAGES = 32, 64, 3
Constants = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a model."""

    layers: int
    heads: int
    width: int
    neurons: int
    vocabulary: int
    half_window: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Round:
    """At most MAX_TOKENS tokens on the device: single ones, and segments that come before any single one of a slot."""

    tokens: Tensor  # [T]
    positions: Tensor  # [T]
    singles: Tensor  # [n], tokens that are computed one by one
    slots: Tensor  # [n], theirs; −1 pads, and −2 − s is slot s, whose state is only read
    segments: Tensor  # [m, 3], first token, end and slot of the others
    vectors: Tensor | None = None  # [K, D], of latent steps; None is for kernels that know none
    watched: Sequence[int] = ()  # w tokens whose neurons are to be shown


@dataclass(frozen=True, slots=True)
class Workspace:
    """What the kernels of a step hand each other."""

    x: Tensor  # [T, D]
    cos: Tensor  # [T, N / 2]
    sin: Tensor
    fired: Tensor  # [T, h, N]
    pairs: Tensor  # [T, h, parts, PART / 2] int16
    counts: Tensor  # [T, h, parts]
    reads: Tensor  # [T, h, parts, D]
    normed: Tensor  # [T, h, D]
    shares: Tensor  # [T, h * spans, D]


class TritonKernels:
    """`base.Kernels` in Triton.

    Args:
        blocks: what was tuned for this GPU and shape unless they are given.
        max_tokens: of one round.
        latent: whether the model has latent steps. It has the same kernels in every batch then.
    """

    def __init__(
        self,
        weights: Weights,
        window: int = 0,
        blocks: Blocks | None = None,
        max_tokens: int = MAX_TOKENS,
        latent: bool = False,
    ) -> None:
        _, heads, width, neurons = weights.encoder.shape
        self._device = weights.embed.device
        self._weights = arranged(weights)
        vocabulary, dtype = weights.lm_head.shape[1], weights.embed.dtype
        self._shape = Shape(weights.layers, heads, width, neurons, vocabulary, window // 2, dtype)
        chosen = blocks or load_blocks(key_for(self._device, self._shape))
        self._blocks = chosen.fitted(width, neurons, dtype.itemsize)
        self._constants = constants(self._shape, self._blocks)
        self._work = allocate(max_tokens, self._shape, self._blocks, self._device)
        self._max_tokens = max_tokens
        self._steps = DecodeSteps(self, max_tokens, vocabulary, self._device, width if latent else 0)
        # Of a decode step: its tokens, which are all single ones, and no segments.
        self._singles = torch.arange(self._steps.most, device=self._device)
        self._no_segments = torch.zeros(0, 3, dtype=torch.int64, device=self._device)

    def forward(
        self, states: Tensor, batch: RaggedBatch, active: Tensor | None = None, fired: Tensor | None = None
    ) -> Tensor:
        if not states.is_contiguous():
            raise ValueError("states must be contiguous")
        hidden = torch.empty(len(batch.tokens), self._shape.width, device=self._device)
        if active is not None:
            active.zero_()
        vectors, shown = self._vectors_of(batch), 0
        with on(self._device):
            copy_sources(states, batch)
            for first, bounds, slots, drawn in rounds(batch.bounds, *marked(batch), self._max_tokens):
                last = first + bounds[-1]
                watched = [token - first for token in batch.watched if first <= token < last]
                part = upload(batch.tokens[first:last], batch.positions[first:last], bounds, slots, drawn)
                part = replace(part, vectors=vectors, watched=watched)
                self.launch(states, part, active, None if fired is None else fired[:, shown:][:, : len(watched)])
                shown += len(watched)
                hidden[first:last] = self._work.x[: last - first]
        if active is not None:
            active /= len(batch.tokens) * self._shape.heads * self._shape.neurons
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        shape = self._shape
        out = torch.empty(len(hidden), shape.vocabulary, device=self._device)
        grid = (cdiv(shape.vocabulary, LOGIT_TILE), cdiv(len(hidden), LOGIT_TILE))
        with on(self._device):
            self._run(ops.logits_kernel, grid, hidden.contiguous(), self._weights.lm_head, out, len(hidden))
        return out

    @property
    def most_decoded(self) -> int:
        return self._steps.most

    def decode(self, states: Tensor, batch: DecodeBatch) -> Decoded:
        if not states.is_contiguous():
            raise ValueError("states must be contiguous")
        with on(self._device):
            return self._steps.run(states, batch)

    def decode_forward(self, states: Tensor, inputs: Inputs, vectors: Tensor | None) -> Tensor:
        """Launches the kernels of a decode step; see `decode_steps.Model`."""
        singles = self._singles[: len(inputs.slots)]
        self.launch(states, Round(inputs.tokens, inputs.positions, singles, inputs.slots, self._no_segments, vectors))
        return self._work.x[: len(singles)]

    def warm(self, states: Tensor) -> None:
        """Captures every decode step, so that no request waits for it."""
        with on(self._device):
            self._steps.capture_all(states)

    def launch(self, states: Tensor, part: Round, active: Tensor | None = None, fired: Tensor | None = None) -> None:
        """Queues a round's kernels; its hidden vectors will be the first rows of the workspace. How many neurons fired
        in each layer is added to `active`; `fired` [L, w, h, N] gets the activations of the watched tokens."""
        watched = None if fired is None else torch.tensor(part.watched, dtype=torch.int64, device=self._device)
        self.begin(part)
        for layer in range(self._shape.layers):
            self.compute_layer(layer, states, part)
            if active is not None:
                active[layer] += self._work.fired[: len(part.tokens)].count_nonzero()
            if fired is not None:
                fired[layer] = self._work.fired[watched]

    def _vectors_of(self, batch: RaggedBatch) -> Tensor | None:
        """What latent steps of a batch read; None of a model that has none."""
        return self._steps.vectors if batch.vectors is None else batch.vectors.contiguous()

    def begin(self, part: Round) -> None:
        """Looks the tokens up, and their angles."""
        shape, work, weights = self._shape, self._work, self._weights
        count = len(part.tokens)
        self._run(ops.embed_kernel, (count,), part.tokens, weights.embed, part.vectors, work.x)
        angles = (cdiv(shape.neurons // 2, ANGLES), count)
        self._run(ops.rotation_kernel, angles, part.positions, weights.frequencies, work.cos, work.sin)

    def compute_layer(self, layer: int, states: Tensor, part: Round) -> None:
        """Computes one layer for a round's tokens."""
        shape, blocks, work, weights = self._shape, self._blocks, self._work, self._weights
        matrices = weights.set_of(layer)
        encoder, gates, decoder = (each[matrices] for each in (weights.encoder, weights.encoder_v, weights.decoder))
        count, parts = len(part.tokens), cdiv(shape.neurons, blocks.part)
        grid = (parts, shape.heads, cdiv(count, blocks.encode_tokens))
        self._run(ops.encode_kernel, grid, work.x, encoder, work.fired, work.pairs, work.counts, count)
        if len(part.segments):
            self._run(
                ops.attend_chunk_kernel,
                (parts * cdiv(shape.width, blocks.chunk_values), shape.heads, len(part.segments)),
                work.x, work.fired, work.cos, work.sin, part.positions, part.segments, states, work.reads, layer,
            )  # fmt: skip
        if len(part.singles):  # after the longer ones, of some of which they are the last token
            self._run(
                ops.attend_token_kernel, (parts, shape.heads, len(part.singles)),
                work.x, work.fired, work.pairs, work.counts, work.cos, work.sin,
                part.positions, part.singles, part.slots, states, work.reads, layer,
                LATENT=part.vectors is not None,
            )  # fmt: skip
        self._run(ops.normalise_kernel, (count * shape.heads,), work.reads, work.normed)
        spans = (shape.heads * cdiv(shape.neurons, blocks.span), cdiv(count, blocks.contract_tokens))
        self._run(ops.contract_kernel, spans, work.normed, work.fired, gates, decoder, work.shares, count)
        norm = not weights.final_norm or layer == shape.layers - 1
        self._run(ops.finish_kernel, (count,), work.shares, work.x, NORM=norm)

    def _run(self, kernel: Any, grid: tuple[int, ...], *arguments: Tensor | int | None, **flags: bool) -> None:
        kernel[grid](*arguments, **self._constants[kernel.__name__], **flags)


def marked(batch: RaggedBatch) -> tuple[Sequence[int], Sequence[bool]]:
    """A batch's slots as the kernels take them, and which segments end in a token that is computed by itself: those
    after which one is drawn, and those whose state is only read."""
    draws = batch.draws or [end - begin == 1 for begin, end in pairwise(batch.bounds)]
    if not any(batch.frozen):
        return batch.slots, draws
    if any(frozen and end - begin != 1 for frozen, (begin, end) in zip(batch.frozen, pairwise(batch.bounds))):
        raise ValueError("a segment whose state is only read has one token")
    return listed(batch.slots, batch.frozen), [draw or frozen for draw, frozen in zip(draws, batch.frozen)]


def rounds(
    bounds: Sequence[int], slots: Sequence[int], draws: Sequence[bool], most: int
) -> Iterator[tuple[int, list[int], list[int], list[bool]]]:
    """Cuts a batch in rounds of at most `most` tokens: first token, and bounds counted from it, slots, and draws.

    A segment that fits a round stays whole, and a longer one is cut at multiples of `most`, so how it is computed does
    not depend on the others. Pieces of one segment are never in the same round: all but its last fill one.
    """
    first, cut = 0, [0]
    taken: list[int] = []
    drawn: list[bool] = []
    for (begin, end), slot, draw in zip(pairwise(bounds), slots, draws, strict=True):
        for piece in range(begin, end, most):
            size = min(most, end - piece)
            if cut[-1] + size > most:
                yield first, cut, taken, drawn
                first, cut, taken, drawn = piece, [0], [], []
            cut.append(cut[-1] + size)
            taken.append(slot)
            drawn.append(draw and piece + size == end)
    yield first, cut, taken, drawn


def upload(
    tokens: Tensor, positions: Tensor, bounds: Sequence[int], slots: Sequence[int], draws: Sequence[bool]
) -> Round:
    """Sorts tokens by what computes them, and sends the lists to the device in one copy.

    A token after which one is drawn is computed one by one, as in a decode step; every other one is not, and be it the
    only one of its segment. So how a token is computed does not depend on whether it had a step of its own.
    """
    singles: list[tuple[int, int]] = []
    longer: list[tuple[int, int, int]] = []
    for (first, end), slot, draw in zip(pairwise(bounds), slots, draws, strict=True):
        if draw:
            singles.append((end - 1, slot))
        if first < end - draw:
            longer.append((first, end - draw, slot))
    numbers = [*(first for first, _ in singles), *(slot for _, slot in singles)]
    numbers += [number for piece in longer for number in piece]
    device = tokens.device
    sent = torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)
    count = len(singles)
    return Round(tokens, positions, sent[:count], sent[count : 2 * count], sent[2 * count :].view(-1, 3))


def allocate(tokens: int, shape: Shape, blocks: Blocks, device: torch.device) -> Workspace:
    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(tokens, *sizes, dtype=dtype, device=device)

    heads, parts = shape.heads, cdiv(shape.neurons, blocks.part)
    return Workspace(
        x=empty(shape.width),
        cos=empty(shape.neurons // 2),
        sin=empty(shape.neurons // 2),
        fired=empty(heads, shape.neurons, dtype=shape.dtype),
        pairs=empty(heads, parts, blocks.part // 2, dtype=torch.int16),
        counts=empty(heads, parts, dtype=torch.int32),
        reads=empty(heads, parts, shape.width),
        normed=empty(heads, shape.width, dtype=shape.dtype),
        shares=empty(heads * cdiv(shape.neurons, blocks.span), shape.width),
    )


def constants(shape: Shape, blocks: Blocks) -> dict[str, Constants]:
    """What each kernel is compiled for, by its name."""
    # Three products of tf32 are as good as one of float32; one is better than the rounding of 16-bit weights.
    precision = "tf32x3" if shape.dtype == torch.float32 else "tf32"
    parts, spans = cdiv(shape.neurons, blocks.part), cdiv(shape.neurons, blocks.span)
    known = {
        "L": shape.layers, "H": shape.heads, "D": shape.width, "N": shape.neurons, "V": shape.vocabulary,
        "HALF": shape.half_window, "PART": blocks.part, "PARTS": parts, "SPAN": blocks.span,
        "SHARES": shape.heads * spans, "BLOCK_D": at_least_smallest(shape.width), "BLOCK_R": ROWS, "BLOCK_A": ANGLES,
        "PRECISION": precision,
    }  # fmt: skip
    special: dict[Any, Constants] = {
        ops.embed_kernel: {"num_warps": 1},
        ops.rotation_kernel: {"num_warps": 4},
        ops.encode_kernel: {
            "BLOCK_T": blocks.encode_tokens, "BLOCK_K": blocks.encode_depth,
            "num_warps": blocks.encode_warps, "num_stages": blocks.encode_stages,
        },
        ops.attend_token_kernel: {
            "BLOCK_P": blocks.token_pairs, "STAGES": blocks.token_stages, "num_warps": blocks.token_warps,
        },
        ops.attend_chunk_kernel: {
            "BLOCK_C": blocks.chunk_tokens, "BLOCK_V": blocks.chunk_values,
            "num_warps": blocks.chunk_warps, "num_stages": blocks.chunk_stages,
        },
        ops.normalise_kernel: {"num_warps": 2},
        ops.contract_kernel: {
            "BLOCK_T": blocks.contract_tokens, "BLOCK_N": blocks.contract_neurons, "BLOCK_K": blocks.contract_depth,
            "STAGES": blocks.contract_stages, "num_warps": blocks.contract_warps, "num_stages": blocks.contract_stages,
        },
        ops.finish_kernel: {"num_warps": 2},
        ops.logits_kernel: {
            "BLOCK_T": LOGIT_TILE, "BLOCK_N": LOGIT_TILE, "BLOCK_K": min(LOGIT_DEPTH, at_least_smallest(shape.width)),
            "num_warps": 4, "num_stages": LOGIT_STAGES,
        },
    }  # fmt: skip
    return {
        kernel.__name__: {name: value for name, value in known.items() if name in kernel.arg_names} | chosen
        for kernel, chosen in special.items()
    }


def arranged(weights: Weights) -> Weights:
    """As the kernels read them: contiguous, and encoder_v as [M, heads, N, D], a neuron's gate as a row."""
    names = ("embed", "encoder", "decoder", "lm_head", "frequencies")
    contiguous = {name: getattr(weights, name).contiguous() for name in names}
    return replace(weights, **contiguous, encoder_v=weights.encoder_v.mT.contiguous())


def key_for(device: torch.device, shape: Shape) -> str:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    return key_of(gpu, shape.heads, shape.width, shape.neurons, str(shape.dtype).removeprefix("torch."))


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def cdiv(number: int, by: int) -> int:
    return -(-number // by)
