"""Keeps for each neuron of a model where it fired most, and how often: in arrays, whatever the size of the text."""

from __future__ import annotations

import torch
from torch import Tensor


class Contexts:
    """The strongest activations of each neuron so far.

    Attributes:
        values: [layers, neurons, kept] float32, the strongest first; 0 where it has not fired so often.
        positions: [layers, neurons, kept] int64, of the tokens that it fired for.
        counts: [layers, neurons] int64, how many tokens it fired for.
        tokens: how many were read.
    """

    def __init__(self, layers: int, neurons: int, kept: int, device: torch.device) -> None:
        self.values = torch.zeros(layers, neurons, kept, device=device)
        self.positions = torch.zeros(layers, neurons, kept, dtype=torch.int64, device=device)
        self.counts = torch.zeros(layers, neurons, dtype=torch.int64, device=device)
        self.tokens = 0

    def add(self, first: int, fired: Tensor) -> None:
        """Adds what tokens from position `first` on fired, [layers, T, neurons].

        After a while few neurons fire more strongly than they did before: only those are looked at closely.
        """
        count = fired.shape[1]
        self.tokens += count
        self.counts += fired.sign().sum(dim=1).long()
        positions = torch.arange(first, first + count, device=fired.device)
        stronger = fired.amax(dim=1) > self.values[:, :, -1]
        kept = self.values.shape[2]
        for layer in range(len(fired)):
            rows = stronger[layer].nonzero()[:, 0]
            if not len(rows):
                continue
            both = torch.cat([self.values[layer, rows], fired[layer].T[rows]], dim=1)
            where = torch.cat([self.positions[layer, rows], positions.expand(len(rows), -1)], dim=1)
            values, best = both.topk(kept, dim=1)
            self.values[layer, rows], self.positions[layer, rows] = values, where.gather(1, best)
