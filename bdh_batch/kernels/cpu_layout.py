"""How the CPU's passes lay things out: sizes, weights, and the arrays that they work in.

Everything is flat and float32, except for states that are bfloat16, and for what is multiplied where weights are int8,
or bfloat16 that the processor multiplies: that lies in pairs (`Terms`, `simd_terms.py`). Rows are padded with zeros to
a multiple of 16 elements (`Shape.pitch`, `Shape.input_pitch`). The neurons of a head are grouped in panels of 32, the
even members of 16 RoPE pairs and then the odd ones, so that a pair is the same lane of two vectors.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from bdh_batch.kernels.base import Weights
from bdh_batch.kernels.vector import LANES

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Terms = npt.NDArray[np.float32] | npt.NDArray[np.uint32] | npt.NDArray[np.int32] | npt.NDArray[np.uint16]
States = npt.NDArray[np.float32] | npt.NDArray[np.uint16]  # those of bfloat16, which numpy does not know

PANEL = 2 * LANES  # neurons
ROWS = 8  # of one product; with two vectors of columns its sums fill half of AVX-512's registers
MAX_TOKENS = 256  # of one round: more would not fit the caches, and gain nothing
MAX_TILE = 32  # tokens that share a reading of the weights
PANELS = 4  # that are gated before their decoder rows are added, all in the first two caches
FLOAT32, FLOAT16, BFLOAT16, INTEGERS = 0, 1, 2, 3  # what the inputs of products are rounded to
ROUNDING = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16, torch.int8: INTEGERS}
DTYPES = {rounding: dtype for dtype, rounding in ROUNDING.items()}
NO_SCALES = np.empty(0, np.float32)
LARGEST_SUM, LARGEST_INPUT, LARGEST_WEIGHT = 2**31 - 1, 2**15 - 1, 2**7  # of integers


class Shape(NamedTuple):
    """The sizes of a model, and how its arrays are laid out."""

    layers: int
    sets: int  # of matrices: 1 for all layers, or one for each
    heads: int
    width: int  # D
    pitch: int  # elements from one row of a padded array to the next
    input_pitch: int  # the same of what products multiply: half of it where that is pairs
    depth: int  # elements of a row that products multiply
    neurons: int  # N
    panels: int  # of a head
    list_pitch: int  # elements from one token's list of pairs in a head to the next
    fired_pitch: int  # the same for its activations
    rounding: int
    largest_input: float  # integer, of which D products with int8 cannot be more than a sum holds
    half_window: int  # tokens of a block; 0 attends to everything
    final_norm: bool  # one LayerNorm after the last layer, instead of one after every layer


class Packed(NamedTuple):
    """The weights as the passes read them."""

    embed: Floats  # [V, pitch]
    encoder: Terms  # [sets, heads, panels, input_pitch, PANEL]
    encoder_v: Terms  # [sets, heads, panels, PANEL, input_pitch], columns as rows
    decoder: Terms  # [sets, heads, panels, PANEL, input_pitch], rows as they are
    encoder_scales: Floats  # [sets, heads, panels, PANEL] of int8, else empty
    gated_scales: Floats  # likewise, of encoder_v times that of the decoder
    frequencies: npt.NDArray[np.float64]  # [panels * 16], of each pair


class Columns(NamedTuple):
    """The head, with which hidden vectors are multiplied, and what the sums of integers are multiples of."""

    numbers: Terms  # [panels, input_pitch, PANEL]
    scales: Floats  # [panels, PANEL] of int8, else empty


class Work(NamedTuple):
    """What the passes of a round of T tokens share."""

    x: Floats  # [T, pitch]
    x_apart: Floats  # [T, pitch]: x in the order in which states of bfloat16 are loaded
    inputs: Terms  # [T + ROWS, input_pitch]: x as products take it
    scales: Floats  # [T]: what they are multiples of, where they are integers
    cos: Floats  # [T, list_pitch]
    sin: Floats
    z: Floats  # [T, heads, pitch]: each head's share of the decoder's sum


class Scratch(NamedTuple):
    """Scratch buffers of one thread, for some tokens in one head: row 0 is the first of those tokens."""

    fired: Floats  # [tokens, fired_pitch]
    starts: Integers  # [tokens, panels + 1]: where a panel's entries begin in the three lists after this one
    pairs: Integers  # [tokens, list_pitch]: the pairs that fired, rising
    even: Floats  # [tokens, list_pitch]: their activations after RoPE
    odd: Floats
    y: Floats  # [tokens, pitch]
    products: Floats  # [ROWS, PANEL]
    normed: Terms  # [MAX_TILE + ROWS, input_pitch]: a tile's y after LayerNorm
    normed_scales: Floats  # [MAX_TILE]
    neurons: Integers  # [PANELS * PANEL]: those of some panels that one token fired, later those that passed their gate
    gated: Floats  # [PANELS * PANEL]: their activations, later times their gates
    gates: Floats  # [PANELS * PANEL]
    active: Longs  # [layers]: how many neurons have fired, in a row of cache lines that no other thread writes


class Round(NamedTuple):
    """At most MAX_TOKENS tokens: those of segment s are `bounds[s]` … `bounds[s + 1]` − 1, its slot `slots[s]`.

    A thread takes a group of segments at a time, `groups[g, 0]` … `groups[g, 1]` − 1, in one head of one layer.
    """

    tokens: Longs  # −1 − k: row k of `vectors`
    positions: Longs
    bounds: Longs
    slots: Longs
    sources: Longs  # of each segment, the slot whose state it begins in; its own: none is copied
    frozen: Flags  # of each segment, whether its state is only read
    groups: Longs
    vectors: Floats  # [K, D], the batch's
    watched: Longs  # tokens whose activations are shown, rising
    shown: Floats  # where: [layers, watched, heads, N], with rows of other rounds' between the layers
    shown_pitch: int  # elements from one layer to the next


def shape_of(weights: Weights, window: int, pairs: bool) -> Shape:
    """`pairs`: products multiply pairs."""
    sets, heads, width, neurons = weights.encoder.shape
    panels = round_up(neurons, PANEL) // PANEL
    terms = 2 if pairs else 1  # in each element of what products multiply
    pitch = round_up(width, terms * LANES)
    return Shape(
        layers=weights.layers,
        sets=sets,
        heads=heads,
        width=width,
        pitch=pitch,
        input_pitch=pitch // terms,
        depth=round_up(width, terms) // terms,
        neurons=neurons,
        panels=panels,
        # An odd number of vectors: powers of two would put all tokens' rows in the same few sets of the caches.
        list_pitch=(panels | 1) * LANES,
        fired_pitch=(2 * panels + 1) * LANES,
        rounding=ROUNDING[weights.dtype],
        largest_input=float(min(LARGEST_INPUT, LARGEST_SUM // (LARGEST_WEIGHT * width))),
        half_window=window // 2,
        final_norm=weights.final_norm,
    )


def pack(weights: Weights, shape: Shape) -> Packed:
    """The weights in the passes' layouts."""
    frequencies = torch.zeros(shape.panels * LANES, dtype=torch.float64)
    frequencies[: shape.neurons // 2] = weights.frequencies[::2].double()
    embed = aligned(len(weights.embed), shape.pitch).zero_()
    embed[:, : shape.width] = weights.embed
    encoder, encoder_v, scales = weights.encoder.flatten(0, 1), weights.encoder_v.flatten(0, 1), weights.scales
    return Packed(
        embed=embed.view(-1).numpy(),
        encoder=pack_columns(pair_up(encoder), shape),
        encoder_v=pack_rows(pair_up(encoder_v).mT, shape),
        decoder=pack_rows(pair_up(weights.decoder.view_as(encoder.mT).mT).mT, shape),
        encoder_scales=pack_scales(None if scales is None else scales.encoder),
        gated_scales=pack_scales(
            None if scales is None else scales.encoder_v * scales.decoder.view_as(scales.encoder_v)
        ),
        frequencies=frequencies.numpy(),
    )


def pair_up(matrix: Tensor) -> Tensor:
    """Columns [..., N] in the order of the panels, zeros where a panel is not full."""
    neurons = matrix.shape[-1]
    padded = matrix.new_zeros(*matrix.shape[:-1], round_up(neurons, PANEL))
    padded[..., :neurons] = matrix
    return padded.view(*padded.shape[:-1], -1, LANES, 2).transpose(-1, -2).flatten(-3)


def pack_columns(matrices: Tensor, shape: Shape) -> Terms:
    """[heads, D, columns] as [heads, panels, input_pitch, PANEL]"""
    heads, width, columns = matrices.shape
    panels = round_up(columns, PANEL) // PANEL
    packed = padded(shape, weight_dtype(shape), heads, panels * PANEL)
    packed[:, :columns, :width] = matrices.mT
    terms = shape.pitch // shape.input_pitch
    target = torch.empty(heads, panels, shape.input_pitch, PANEL, terms, dtype=packed.dtype)
    target.copy_(packed.view(heads, panels, PANEL, shape.input_pitch, terms).transpose(2, 3))
    return as_terms(target)


def pack_rows(matrices: Tensor, shape: Shape) -> Terms:
    """[heads, rows, D] as [heads, rows, input_pitch]"""
    heads, rows, width = matrices.shape
    packed = padded(shape, weight_dtype(shape), heads, rows)
    packed[..., :width] = matrices
    return as_terms(packed)


def pack_scales(scales: Tensor | None) -> Floats:
    """[sets, heads, N] as [sets, heads, panels, PANEL]; empty where there are none."""
    return np.empty(0, np.float32) if scales is None else cast(Floats, pair_up(scales).flatten().numpy())


def head_scales(weights: Weights) -> Floats:
    """[panels, PANEL] of the head; empty where there are none."""
    if weights.scales is None:
        return pack_scales(None)
    scales = weights.scales.lm_head
    return cast(Floats, F.pad(scales, (0, -len(scales) % PANEL)).numpy())


def rows_of(hidden: Tensor, shape: Shape) -> tuple[Terms, Floats]:
    """Hidden vectors [T, D] as products take them, [T + ROWS, input_pitch], and what they are multiples of, [T], where
    they are integers."""
    if shape.rounding == FLOAT32:  # by numpy, whose operators begin sooner than torch's
        plain = np.zeros((len(hidden) + ROWS, shape.input_pitch), np.float32)
        plain[: len(hidden), : shape.width] = hidden.numpy()
        return plain.reshape(-1), NO_SCALES
    rows = padded(shape, input_dtype(shape), len(hidden) + ROWS)
    if shape.rounding != INTEGERS:
        rows[: len(hidden), : shape.width] = hidden.to(DTYPES[shape.rounding])
        return as_terms(rows), NO_SCALES
    largest = hidden.abs().amax(dim=1, keepdim=True)  # NaN where one is
    multiples = (hidden * (shape.largest_input / largest)).nan_to_num(0.0, 0.0, 0.0)
    rows[: len(hidden), : shape.width] = multiples.round()
    return as_terms(rows), cast(Floats, (largest / shape.largest_input).flatten().numpy())


def padded(shape: Shape, dtype: torch.dtype, *sizes: int) -> Tensor:
    """Zeros [*sizes, pitch]."""
    return torch.zeros(*sizes, shape.pitch, dtype=dtype)


def weight_dtype(shape: Shape) -> torch.dtype:
    """That of what products multiply inputs with."""
    return torch.int8 if shape.rounding == INTEGERS else input_dtype(shape)


def input_dtype(shape: Shape) -> torch.dtype:
    if shape.rounding == INTEGERS:
        return torch.int16
    return torch.float32 if shape.input_pitch == shape.pitch else torch.bfloat16


def as_terms(tensor: Tensor) -> Terms:
    """A flat array of what products multiply: float32, or pairs by `simd_terms.py`'s dtypes."""
    flat = tensor.view(-1)
    if flat.dtype == torch.float32:
        return flat.numpy()
    if flat.dtype == torch.int8:
        return flat.view(torch.int16).numpy().view(np.uint16)
    pairs = flat.view(torch.int32).numpy()
    return pairs if flat.dtype == torch.int16 else pairs.view(np.uint32)


def allocate(tokens: int, shape: Shape) -> Work:
    return Work(
        x=_floats(tokens * shape.pitch),
        x_apart=_floats(tokens * shape.pitch),
        inputs=as_terms(padded(shape, input_dtype(shape), tokens + ROWS)),
        scales=_floats(tokens),
        cos=_floats(tokens * shape.list_pitch),
        sin=_floats(tokens * shape.list_pitch),
        z=_floats(tokens * shape.heads * shape.pitch),
    )


def allocate_scratch(threads: int, shape: Shape) -> Scratch:
    """Scratch buffers for all threads: every array has an axis [threads] in front."""

    def integers(*sizes: int) -> Integers:
        return np.empty((threads, *sizes), np.int32)

    lists = MAX_TOKENS * shape.list_pitch
    return Scratch(
        fired=_floats(threads, MAX_TOKENS * shape.fired_pitch),
        starts=integers(MAX_TOKENS * (shape.panels + 1)),
        pairs=integers(lists),
        even=_floats(threads, lists),
        odd=_floats(threads, lists),
        y=_floats(threads, MAX_TOKENS * shape.pitch),
        products=_floats(threads, ROWS * PANEL),
        normed=as_terms(padded(shape, input_dtype(shape), threads, MAX_TILE + ROWS)).reshape(threads, -1),
        normed_scales=_floats(threads, MAX_TILE),
        neurons=integers(PANELS * PANEL + LANES),
        gated=_floats(threads, PANELS * PANEL + LANES),
        gates=_floats(threads, PANELS * PANEL + LANES),
        active=np.zeros((threads, round_up(shape.layers, LANES) + LANES), np.int64),
    )


def _floats(*sizes: int) -> Floats:
    return cast(Floats, aligned(*sizes).numpy())


def aligned(*sizes: int) -> Tensor:
    """torch aligns to 64 bytes, a vector; numpy to 16."""
    return torch.empty(*sizes, dtype=torch.float32)


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
