"""Decode steps on a GPU, each one graph: forward pass, logits, draws. One copy sends what a step reads, one brings its
tokens back, and nothing between them waits.

A step is an ordinary function of arrays whose addresses do not change, `DecodeSteps.compute`: without a GPU it is
called, with one it is captured once for each size and replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bdh_batch.kernels.base import DecodeBatch, Decoded, listed
from bdh_batch.kernels.drawing import NO_TOKEN, WORDS, Draws, draw, finite

MOST = 1024  # sequences of the largest step that is a graph
MOST_LOGITS = 2**24  # of such a step: graphs keep theirs, in float32, and what drawing takes is a dozen times as much
INPUTS = 3 + WORDS  # of 8 bytes, of a sequence
PADDING = -1  # the slot of no sequence


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a step reads: views of one array."""

    tokens: Tensor  # [B] int64
    positions: Tensor  # [B] int64
    slots: Tensor  # [B] int64, PADDING behind the last sequence
    draws: Draws

    @classmethod
    def of(cls, words: Tensor) -> Inputs:
        """The views of `words` [INPUTS, B] int64."""
        return cls(words[0], words[1], words[2], Draws.of(words[3:]))


class Model(Protocol):
    """What a step is made of. Neither may wait for the device, or have shapes that depend on what is in an array."""

    def decode_forward(self, states: Tensor, inputs: Inputs, vectors: Tensor | None) -> Tensor:
        """Returns the final hidden vectors [B, D], which lie where they always do; `vectors` [K, D] are those of latent
        steps, None for kernels that know none."""

    def logits(self, hidden: Tensor) -> Tensor: ...


class Sent(NamedTuple):
    """The inputs of one size: in main memory, pinned, and on the device. Those of all sizes lie in the same memory."""

    host_words: Tensor
    host: Inputs
    words: Tensor
    inputs: Inputs


class Outputs(NamedTuple):
    """What a step leaves on the device."""

    hidden: Tensor  # [B, D]
    logits: Tensor  # [B, V]
    tokens: Tensor  # [B] int64


class DecodeSteps:
    """Pads steps to a few sizes, and captures each of them once, with and without filters.

    Args:
        model: launches the kernels.
        most: sequences of the largest step.
        vocabulary: of the logits.
        latent_width: of the vectors of latent steps; 0 where the model has none.
    """

    def __init__(self, model: Model, most: int, vocabulary: int, device: torch.device, latent_width: int = 0) -> None:
        self.most = max(1, min(MOST, most, MOST_LOGITS // vocabulary))
        self.vectors = torch.zeros(self.most, latent_width, device=device) if latent_width else None
        self._model = model
        self._captures = device.type == "cuda"
        self._graphs: dict[tuple[int, int, bool], Callable[[], Outputs]] = {}
        self._device_words = torch.zeros(INPUTS * self.most, dtype=torch.int64, device=device)
        self._host_words = torch.zeros(INPUTS * self.most, dtype=torch.int64, pin_memory=self._captures)
        self._host_tokens = torch.zeros(self.most, dtype=torch.int64, pin_memory=self._captures)
        self._sizes: dict[int, Sent] = {}
        self._wait: Callable[[], object] = lambda: None

    def run(self, states: Tensor, batch: DecodeBatch) -> Decoded:
        """Queues a step. What it leaves on the device stays until the next one."""
        count = len(batch.slots)
        sent = self._sent(bucket(count, self.most))
        compute = self._step(states, sent, filters=bool(batch.rows["kept"].any()))
        self._wait()  # until the last step has read what is written now: its tokens have mostly been awaited
        clear(sent.host_words, sent.host)
        write(sent.host, batch)
        sent.words.copy_(sent.host_words, non_blocking=True)
        if self.vectors is not None and batch.vectors is not None:
            self.vectors[: len(batch.vectors)].copy_(batch.vectors, non_blocking=True)
        hidden, logits, tokens = compute()
        self._host_tokens[:count].copy_(tokens[:count], non_blocking=True)
        self._wait = self._event()
        return Decoded(hidden[:count], logits[:count], self._tokens_of(count))

    def compute(self, states: Tensor, inputs: Inputs, filters: bool) -> Outputs:
        """The step that a graph holds. With `filters`, some sequences may have a top_k or a top_p. A token is NO_TOKEN
        where logits are not finite."""
        hidden = self._model.decode_forward(states, inputs, self.vectors)
        logits = self._model.logits(hidden)
        tokens = draw(logits, inputs.draws, filters)
        return Outputs(hidden, logits, tokens.masked_fill(~finite(logits), NO_TOKEN))

    def capture_all(self, states: Tensor) -> None:
        """Every step, before the first request comes."""
        size = 1
        while size <= self.most:
            size = bucket(size, self.most)
            for filters in (False, True):
                self._step(states, self._sent(size), filters)
            size += 1

    def _step(self, states: Tensor, sent: Sent, filters: bool) -> Callable[[], Outputs]:
        """Computes a step of that size, whose inputs are on the device by then."""
        if not self._captures:
            return lambda: self.compute(states, sent.inputs, filters)
        key = len(sent.inputs.slots), states.data_ptr(), filters
        if key not in self._graphs:
            self._graphs[key] = self._captured(states, sent, filters)
        return self._graphs[key]

    def _captured(self, states: Tensor, sent: Sent, filters: bool) -> Callable[[], Outputs]:
        """Runs the step once with padding alone, which compiles what is not compiled and changes no state, and once
        more to record it."""
        clear(sent.words, sent.inputs)
        self.compute(states, sent.inputs, filters)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = self.compute(states, sent.inputs, filters)

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay

    @cached_property
    def _pool(self) -> Any:
        """Of the memory that all graphs work in, one after the other."""
        return torch.cuda.graph_pool_handle()

    def _sent(self, size: int) -> Sent:
        if size not in self._sizes:
            host, device = (
                words[: INPUTS * size].view(INPUTS, size) for words in (self._host_words, self._device_words)
            )
            self._sizes[size] = Sent(host, Inputs.of(host), device, Inputs.of(device))
        return self._sizes[size]

    def _event(self) -> Callable[[], object]:
        """Waits until all that is queued by now is done."""
        if not self._captures:
            return lambda: None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event.synchronize

    def _tokens_of(self, count: int) -> Callable[[], list[int]]:
        wait = self._wait

        def tokens() -> list[int]:
            wait()
            found: list[int] = self._host_tokens[:count].tolist()
            return found

        return tokens


def clear(words: Tensor, inputs: Inputs) -> None:
    """Makes all of it padding, with a token that there is: kernels look it up."""
    words.zero_()
    inputs.slots.fill_(PADDING)


def write(host: Inputs, batch: DecodeBatch) -> None:
    """Writes a batch, padded behind, to where it is sent from."""
    count = len(batch.slots)
    host.tokens.numpy()[:count] = batch.tokens
    host.positions.numpy()[:count] = batch.positions
    host.slots.numpy()[:count] = listed(batch.slots, batch.frozen)
    host.draws.write(batch.rows, batch.uniform)


def bucket(count: int, most: int) -> int:
    """The power of two that holds `count`, at most `most`."""
    return min(1 << (count - 1).bit_length(), most)
