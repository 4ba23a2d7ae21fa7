"""Has a model read a text, and shows what fires for each token. Knows nothing of words or contexts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bdh_batch.checkpoint.checkpoint import Model, load_model
from bdh_batch.engine.loading import attention_window, choose_device, given_by, set_threads
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.kernels.base import Kernels, RaggedBatch
from bdh_batch.kernels.select import select_kernels
from bdh_batch.settings import Settings

FIRED_BYTES = 2**26  # of activations at a time
MOST_AT_ONCE = 512  # tokens


@dataclass
class Reader:
    """A model that reads one text, in sequences of `length` tokens, each of which begins with an empty state."""

    model: Model
    kernels: Kernels
    pool: StatePool
    length: int

    @classmethod
    def of(cls, settings: Settings, path: Path, length: int) -> Reader:
        """Loads the model at `path`. Raises ConfigError, CheckpointError."""
        set_threads(settings.engine.threads)
        device = choose_device(settings.model.device)
        model = load_model(path, getattr(torch, settings.model.dtype), device, given_by(settings.model))
        window = attention_window(settings.model.attention_window, model.config)
        kernels, _ = select_kernels(settings.engine.kernels, model.weights, window, latent=model.config.latent_steps)
        pool = StatePool(model.config, 1, device, window)
        kernels.warm(pool.states)
        return cls(model, kernels, pool, length)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, heads, and neurons of a head."""
        config = self.model.config
        return config.n_layer, config.n_head, config.neurons_per_head

    @torch.inference_mode()
    def read(self, tokens: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yields what some tokens fire, [layers, T, heads · N] float32 in the checkpoint's order of neurons, with the
        index of the first of them. The memory is used again for the next ones."""
        layers, heads, neurons = self.shape
        most = max(1, min(MOST_AT_ONCE, self.length, FIRED_BYTES // (4 * layers * heads * neurons)))
        device, order = self.pool.states.device, self.model.neuron_order
        inverse = None if order is None else torch.argsort(order).to(device)
        memory = torch.empty(layers * most * heads * neurons, device=device)
        for begin in range(0, len(tokens), self.length):
            self.pool.clear(0)
            end = min(begin + self.length, len(tokens))
            for first in range(begin, end, most):
                count = min(most, end - first)
                fired = memory[: layers * count * heads * neurons].view(layers, count, heads, neurons)
                batch = RaggedBatch(
                    tokens=torch.tensor([*tokens[first : first + count]], device=device),
                    positions=torch.arange(first - begin, first - begin + count, device=device),
                    bounds=[0, count],
                    slots=[0],
                    draws=[False],
                    watched=range(count),
                )
                self.kernels.forward(self.pool.states, batch, fired=fired)
                yield first, (fired if inverse is None else fired[..., inverse]).flatten(2)
