"""How the CPU's passes lay things out: sizes, weights, and the arrays that they work in.

Everything is flat and float32, except for states that are bfloat16. Rows are padded with zeros to a multiple of 16
(`Shape.pitch`). The neurons of a head are grouped in panels of 32, the even members of 16 RoPE pairs and then the odd
ones, so that a pair is the same lane of two vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bdh_batch.kernels.vector import LANES

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
States = npt.NDArray[np.float32] | npt.NDArray[np.uint16]  # those of bfloat16, which numpy does not know

PANEL = 2 * LANES  # neurons
ROWS = 8  # of one product; with two vectors of columns its sums fill half of AVX-512's registers
MAX_TOKENS = 256  # of one round: more would not fit the caches, and gain nothing
MAX_TILE = 32  # tokens that share a reading of the weights
PANELS = 4  # that are gated before their decoder rows are added, all in the first two caches
FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2  # what the inputs of products are rounded to


class Shape(NamedTuple):
    """The sizes of a model, and how its arrays are laid out."""

    layers: int
    heads: int
    width: int  # D
    pitch: int  # elements from one row of a padded array to the next
    neurons: int  # N
    panels: int  # of a head
    list_pitch: int  # elements from one token's list of pairs in a head to the next
    fired_pitch: int  # the same for its activations
    rounding: int
    half_window: int  # tokens of a block; 0 attends to everything


class Packed(NamedTuple):
    """The weights as the passes read them."""

    embed: Floats  # [V, pitch]
    encoder: Floats  # [heads, panels, pitch, PANEL]
    encoder_v: Floats  # [heads, panels, PANEL, pitch], columns as rows
    decoder: Floats  # [heads, panels, PANEL, pitch], rows as they are
    frequencies: npt.NDArray[np.float64]  # [panels * 16], of each pair


class Work(NamedTuple):
    """What the passes of a round of T tokens share."""

    x: Floats  # [T, pitch]
    inputs: Floats  # [T + ROWS, pitch]: x as products take it
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
    normed: Floats  # [MAX_TILE + ROWS, pitch]: a tile's y after LayerNorm
    neurons: Integers  # [PANELS * PANEL]: those of some panels that one token fired, later those that passed their gate
    gated: Floats  # [PANELS * PANEL]: their activations, later times their gates
    gates: Floats  # [PANELS * PANEL]
    active: Longs  # [layers]: how many neurons have fired, in a row of cache lines that no other thread writes


class Round(NamedTuple):
    """At most MAX_TOKENS tokens: those of segment s are `bounds[s]` … `bounds[s + 1]` − 1, its slot `slots[s]`.

    A thread takes a group of segments at a time, `groups[g, 0]` … `groups[g, 1]` − 1: in one head of one layer, or,
    where the groups are to go `apart`, through the whole model without waiting for any other.
    """

    tokens: Longs
    positions: Longs
    bounds: Longs
    slots: Longs
    groups: Longs
    apart: bool
