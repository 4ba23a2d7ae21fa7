"""Shows which neurons the watched tokens of a step fired. The kernels have computed them anyway, and copy them out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from bdh_batch.engine.strongest import on_device, on_host
from bdh_batch.messages import Neurons, Segment

WATCHED_BYTES = 16 * 2**20  # of activations in one step, at most: about 20 ms of a CPU to find the strongest


class NeuronView:
    """Lends the kernels memory for what watched tokens fire, and finds the strongest in it.

    Args:
        layers, heads, neurons: of the model; `neurons` are those of a head.
        order: [neurons], the checkpoint's number of each as the kernels number them; None where these are the same.
    """

    def __init__(self, layers: int, heads: int, neurons: int, device: torch.device, order: Tensor | None) -> None:
        self._layers, self._heads, self._neurons = layers, heads, neurons
        self._device = device
        self._order = None if order is None else order.to(device)
        self._find = on_host if device.type == "cpu" else on_device
        self._memory = torch.empty(0, device=device)  # used by one step after the other

    def memory(self, tokens: int) -> Tensor:
        """Returns memory [layers, tokens, heads, neurons] for their activations, which holds until the next call."""
        shape = self._layers, tokens, self._heads, self._neurons
        size = tokens * self._layers * self._heads * self._neurons
        if len(self._memory) < size:
            self._memory = torch.empty(size, device=self._device)
        return self._memory[:size].view(shape)

    def shown(self, segments: Sequence[Segment], fired: Tensor) -> dict[int, list[Neurons]]:
        """Returns the neurons of each segment's watched tokens, by the segment's index.

        Args:
            fired: [layers, W, heads, neurons], of the watched tokens of all `segments`, in their order.
        """
        watching = [(at, segment) for at, segment in enumerate(segments) if segment.watch]
        most = min(max(segment.watch for _, segment in watching), self._heads * self._neurons)
        active, numbers, values = self._find(fired, most, self._order)
        found: dict[int, list[Neurons]] = {}
        row = 0
        for at, segment in watching:
            top, neurons = segment.watch, []
            for token in segment.tokens[segment.watch_from :]:
                packed = active[row].tobytes(), numbers[row, :, :top].tobytes(), values[row, :, :top].tobytes()
                neurons.append(Neurons(token, self._neurons, *packed))
                row += 1
            found[at] = neurons
        return found


def watched(segments: Sequence[Segment]) -> list[int]:
    """Returns the indices of the watched tokens among those of all segments."""
    begins = accumulate((len(segment.tokens) for segment in segments), initial=0)
    return [
        at
        for segment, begin in zip(segments, begins)
        if segment.watch
        for at in range(begin + segment.watch_from, begin + len(segment.tokens))
    ]


def most_watched(layers: int, heads: int, neurons: int) -> int:
    """Returns how many tokens of one step may be watched: that of a stream and one of a prompt, at least."""
    return max(2, WATCHED_BYTES // (4 * layers * heads * neurons))
