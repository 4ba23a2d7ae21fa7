"""Finds the neurons that fired most: on a device by torch's operators, in main memory in one compiled pass, which takes
a fifth of their time for a token or two."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdh_batch.kernels import simd
from bdh_batch.kernels.vector import LANES, compiled, inlined

Floats = np.ndarray[Any, np.dtype[np.float32]]
Integers = np.ndarray[Any, np.dtype[np.uint32]]
Longs = np.ndarray[Any, np.dtype[np.int64]]

Found = tuple[Floats, Integers, Floats]

LEAST = -1.0  # less than any activation
FEW = 32  # of more, torch keeps order faster
NO_ORDER = np.empty(0, np.int64)


def on_device(fired: Tensor, most: int, order: Tensor | None) -> Found:
    """Finds the `most` strongest neurons of tokens in each layer.

    Args:
        fired: [layers, W, h, N], of W tokens.
        order: [N] int64, the number of each of a head's neurons; None where they are as they are.

    Returns:
        The share of neurons above 0, [W, layers]; the numbers of the strongest among all h · N, [W, layers, most], the
        strongest first; and their activations.
    """
    neurons, flat = fired.shape[-1], fired.flatten(2)
    values, strongest = flat.topk(most, dim=2)
    if order is not None:
        strongest = strongest - strongest % neurons + order[strongest % neurons]
    active = flat.sign().mean(dim=2).T.contiguous().numpy(force=True)
    numbers = strongest.to(torch.int32).transpose(0, 1).contiguous().numpy(force=True)
    return active, numbers.view(np.uint32), values.transpose(0, 1).contiguous().numpy(force=True)


def on_host(fired: Tensor, most: int, order: Tensor | None) -> Found:
    """As `on_device`, of main memory; of equal activations, the first neurons' where they are few."""
    if most > FEW:
        return on_device(fired, most, order)
    layers, tokens = fired.shape[:2]
    active = np.empty((tokens, layers), np.float32)
    numbers, values = np.empty((tokens, layers, most), np.uint32), np.empty((tokens, layers, most), np.float32)
    find_strongest(
        fired.view(-1).numpy(), tokens, layers, fired[0, 0].numel(), NO_ORDER if order is None else order.numpy(), most,
        active.reshape(-1), numbers.reshape(-1), values.reshape(-1),
    )  # fmt: skip
    return active, numbers, values


@compiled
def find_strongest(
    fired: Floats, tokens: int, layers: int, width: int, order: Longs, top: int, active: Floats, strongest: Integers,
    values: Floats,
) -> None:  # fmt: skip
    """Finds the `top` strongest neurons of each token in each layer, of equal ones the first.

    Args:
        fired: [layers, tokens, width], not negative.
        order: the numbers of a head's neurons, by which those of `strongest` are counted; empty: they are the same.
        top: at most `width`.
        active: [tokens, layers], gets the share of neurons above 0.
        strongest: [tokens, layers, top], gets their numbers among all of the layer, the strongest first.
        values: [tokens, layers, top], gets their activations.
    """
    for row in range(tokens * layers):
        token, layer = row // layers, row % layers
        begin, to = (layer * tokens + token) * width, row * top
        last = to + top - 1
        for at in range(to, last + 1):
            strongest[at], values[at] = 0, LEAST
        above = 0
        for block in range(0, width // LANES * LANES, LANES):
            vector = simd.load(fired, begin + block)
            above += simd.count_bits(simd.nonzero(vector))
            if simd.nonzero(simd.relu(simd.subtract(vector, simd.splat(values[last])))):
                for neuron in range(block, block + LANES):
                    _insert(neuron, fired[begin + neuron], to, last, strongest, values)
        for neuron in range(width // LANES * LANES, width):
            above += fired[begin + neuron] > 0
            _insert(neuron, fired[begin + neuron], to, last, strongest, values)
        active[row] = above / width
        for at in range(to, last + 1):
            values[at] = max(values[at], np.float32(0))  # where an activation is not a number, and so above nothing
            if len(order):
                inside = strongest[at] % len(order)
                strongest[at] += order[inside] - inside


@inlined
def _insert(neuron: int, value: float, to: int, last: int, strongest: Integers, values: Floats) -> None:
    """Adds a neuron to the strongest, from `to` to `last`, if it is one of them."""
    if not value > values[last]:
        return
    at = last
    while at > to and values[at - 1] < value:
        strongest[at], values[at] = strongest[at - 1], values[at - 1]
        at -= 1
    strongest[at], values[at] = neuron, value
