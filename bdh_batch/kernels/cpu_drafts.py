"""Drafts on the CPU: tokens that are tried. They read what was before them, and each other, as if they had been
written; into the states go only those that are accepted, when that is known.

A panel of the state is copied before drafts go over it, and the copy is forgotten. What each of them would have
written, its list of pairs and its x in every layer, is kept until `add_kept`, which goes the usual way
(`cpu_state.py`): both give the bits that the tokens would have had one by one.
"""

from __future__ import annotations

from typing import NamedTuple

import numba

from bdh_batch.kernels import cpu_state, simd
from bdh_batch.kernels.cpu_layout import Longs, Round, Scratch, Shape, States, Work
from bdh_batch.kernels.vector import LANES, compiled, in_parallel, inlined


class Accepted(NamedTuple):
    """The accepted drafts of some segments: those of segment s are `first[s]` … `first[s]` + `counts[s]` − 1 of the
    kept ones."""

    first: Longs
    counts: Longs
    positions: Longs  # of the first of each
    slots: Longs


@compiled
def try_tokens(
    first: int, last: int, first_row: int, position: int, state: int, shape: Shape, states: States, work: Work,
    scratch: Scratch,
) -> None:  # fmt: skip
    """As `cpu_state.attend_tokens`, with the same bits, but leaves the states as they are."""
    for i in range(first_row * shape.pitch, (first_row + last - first) * shape.pitch):
        scratch.y[i] = 0
    size = 2 * shape.width
    for panel in range(shape.panels):
        start = panel * LANES * size
        copy_pairs(first_row, first_row + last - first, panel, state, size, shape, states, scratch)
        for token in range(first, last):
            rows = cpu_state.rows_of(scratch.tried, -start, position + token - first, work)
            cpu_state.fold_panel(rows, panel, token, first_row + token - first, shape, scratch)
    cpu_state.settle(states, first_row, first_row + last - first, shape, scratch)


@inlined
def copy_pairs(
    first_row: int, last_row: int, panel: int, state: int, size: int, shape: Shape, states: States, scratch: Scratch
) -> None:
    """Copies the state rows of a panel's pairs that any of some tokens fired."""
    fired = 0
    for row in range(first_row, last_row):
        cursor = row * (shape.panels + 1) + panel
        for entry in range(scratch.starts[cursor], scratch.starts[cursor + 1]):
            fired |= 1 << (scratch.pairs[row * shape.list_pitch + entry] - panel * LANES)
    for pair in range(LANES):
        if fired >> pair & 1:
            source = state + (panel * LANES + pair) * size
            for i in range(size):
                scratch.tried[pair * size + i] = states[source + i]


@compiled
def keep_tokens(
    first: int, last: int, first_row: int, to: int, layer: int, head: int, shape: Shape, work: Work, scratch: Scratch
) -> None:
    """Keeps what drafts would write in one head of a layer, as the kept ones from `to` on."""
    starts = shape.panels + 1
    for i in range(last - first):
        row, target = first_row + i, to + i
        for panel in range(starts):
            work.kept_starts[layer, head, target * starts + panel] = scratch.starts[row * starts + panel]
        source, into = row * shape.list_pitch, target * shape.list_pitch
        for entry in range(scratch.starts[row * starts + shape.panels]):
            work.kept_pairs[layer, head, into + entry] = scratch.pairs[source + entry]
            work.kept_even[layer, head, into + entry] = scratch.even[source + entry]
            work.kept_odd[layer, head, into + entry] = scratch.odd[source + entry]
        if head == 0:  # one of them is enough, as all have the same x
            source, into = (first + i) * shape.pitch, target * shape.pitch
            for k in range(shape.pitch):
                work.kept_x[layer, into + k] = work.x[source + k]
                work.kept_apart[layer, into + k] = work.x_apart[source + k]


@compiled
def attend_drafts(
    first: int, last: int, first_row: int, segment: int, layer: int, head: int, state: int, part: Round, shape: Shape,
    states: States, work: Work, scratch: Scratch,
) -> None:  # fmt: skip
    """The drafts of a segment in one head of a layer."""
    try_tokens(first, last, first_row, part.positions[first], state, shape, states, work, scratch)
    keep_tokens(first, last, first_row, part.kept[segment], layer, head, shape, work, scratch)


@in_parallel
def add_kept(
    accepted: Accepted, shape: Shape, states: States, work: Work, scratches: Scratch, counters: Longs, threads: int
) -> None:  # fmt: skip
    """Adds accepted drafts to the states."""
    counters[0] = 0
    for thread in numba.prange(threads):
        add_some(thread, accepted, shape, states, work, scratches, counters)


@compiled
def add_some(
    thread: int, accepted: Accepted, shape: Shape, states: States, work: Work, scratches: Scratch, counters: Longs
) -> None:
    elements = shape.neurons * shape.width
    layer_size = elements * shape.heads * (2 if shape.half_window else 1)
    while True:
        piece = simd.take_work(counters, 0)
        segment, layer = piece // (shape.layers * shape.heads), piece // shape.heads % shape.layers
        head = piece % shape.heads
        if segment >= len(accepted.first):
            return
        state = (accepted.slots[segment] * shape.layers + layer) * layer_size + head * elements
        first, last = accepted.first[segment], accepted.first[segment] + accepted.counts[segment]
        inputs = Work(
            work.kept_x[layer], work.kept_apart[layer], work.inputs, work.cos, work.sin, work.z, work.kept_starts,
            work.kept_pairs, work.kept_even, work.kept_odd, work.kept_x, work.kept_apart,
        )  # fmt: skip
        lists = Scratch(
            scratches.fired[thread], work.kept_starts[layer, head], work.kept_pairs[layer, head],
            work.kept_even[layer, head], work.kept_odd[layer, head], scratches.y[thread], scratches.products[thread],
            scratches.normed[thread], scratches.neurons[thread], scratches.gated[thread], scratches.gates[thread],
            scratches.active[thread], scratches.tried[thread],
        )  # fmt: skip
        cpu_state.attend_tokens(first, last, first, accepted.positions[segment], state, shape, states, inputs, lists)
