"""Computes a plan: packs its segments into one ragged batch, runs the forward pass, draws the next tokens.

The runner owns every tensor. It knows slots, and nothing about requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from bdh_batch.engine.begun_copies import begun_copies
from bdh_batch.engine.hidden_vectors import HiddenVectors, latent_segments
from bdh_batch.engine.layout import Layout, Layouts, drawn_apart, layout_of
from bdh_batch.engine.neurons import NeuronView, watched
from bdh_batch.engine.sampling.choosing import Chooser
from bdh_batch.engine.sampling.draw import drawn_tokens, numbers
from bdh_batch.engine.sampling.host_sampler import PackedParameters
from bdh_batch.engine.sampling.logprobs import ROWS, index_of, rows_of, token_logprobs
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.errors import OutOfMemory
from bdh_batch.kernels.base import DecodeBatch, DecodeKernels, Kernels, RaggedBatch
from bdh_batch.messages import (
    LATENT,
    LATENT_FROZEN,
    Copy,
    LogitBias,
    LogitsProcessors,
    Outcome,
    Plan,
    SamplingParams,
    Segment,
    TokenLogprob,
    distinct,
)

NOTHING_DRAWN = SamplingParams(temperature=0.0)  # by a sequence for which nothing is drawn in this step
FIRST_LOOK, LOOK_EVERY = 8, 64  # steps, in which the share of neurons that fire is measured


class Runner:
    """Computes planned steps with the kernels, and draws the next tokens.

    Args:
        kernels: compute with `pool.rows`.
        pool: the states [slots, layers, h, N, D], or [slots, layers, 2, h, N, D] with a window; and hidden vectors,
            where the model has latent steps.
        latent_embed: [D] float32, added to a hidden vector that enters as a latent step.
        neuron_order: [N], the checkpoint's number of each of a head's neurons; None where the kernels' are the same.
    """

    def __init__(
        self,
        kernels: Kernels,
        pool: StatePool,
        latent_embed: Tensor | None = None,
        neuron_order: Tensor | None = None,
    ) -> None:
        self._kernels = kernels
        self._pool = pool
        self._latent_embed = latent_embed
        self._layers = pool.states.shape[1]
        self._steps = 0
        self._device = pool.states.device
        heads, neurons = pool.states.shape[-3:-1]
        self._chooser = Chooser(self._device)
        self._layouts = Layouts(pool, self._chooser)
        self._decoder = kernels if isinstance(kernels, DecodeKernels) else None
        self._view = NeuronView(self._layers, heads, neurons, self._device, neuron_order)

    @torch.inference_mode()
    def run(self, plan: Plan) -> Outcome:
        """Computes one step: adds each segment's tokens to its slot's state, and draws a token where it has `sampling`.

        Raises:
            OutOfMemory: the states of the segments are invalid then.
        """
        try:
            return self._run(plan)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise OutOfMemory(str(error).partition("\n")[0]) from error
        except RuntimeError as error:  # torch has no type of its own for want of main memory
            if "DefaultCPUAllocator" in str(error):
                raise OutOfMemory(str(error).partition("\n")[0]) from error
            raise

    def _run(self, plan: Plan) -> Outcome:
        self._pool.begin(segment.slot for segment in plan.segments)
        begun = begun_copies(plan, self._pool.can_be_begun_in)
        for copy in plan.copies:
            if begun.get(copy.target) is copy:  # left to the kernels
                self._pool.begin_copy(copy.source, copy.target)
            else:
                self._pool.copy(*copy)
        for slot in plan.releases:  # a state that is to be saved may have been copied from there
            self._pool.release(slot)
        if not plan.segments:
            return Outcome([])
        active = self._wanted_activity()
        watching = watched(plan.segments) if plan.watches else []
        if active is None and not (watching or begun) and (decoder := self._decoder_for(plan.segments)) is not None:
            return self._decode(decoder, plan.segments)
        fired = self._view.memory(len(watching)) if watching else None
        layout = self._layouts.of(plan)
        hidden = self.forward(plan.segments, active, watching, fired, begun, layout)
        if layout.packed is not None:
            return Outcome(self._draw_packed(plan.segments, layout.packed, hidden), active=shares_of(active))
        target_logprobs = self._target_logprobs(plan.segments, hidden)
        drawn, logprobs = self._draw(plan.segments, hidden)
        neurons = {} if fired is None else self._view.shown(plan.segments, fired)
        return Outcome(drawn, logprobs, target_logprobs, sums(hidden, plan.segments), shares_of(active), neurons)

    def _wanted_activity(self) -> Tensor | None:
        """Where the kernels put the share of neurons that fire in each layer, in one step of many."""
        self._steps += 1
        return torch.empty(self._layers, device=self._device) if self._steps % LOOK_EVERY == FIRST_LOOK else None

    def _draw_packed(self, segments: Sequence[Segment], packed: PackedParameters, hidden: Tensor) -> list[int | None]:
        """Draws the next token of each of the segments by sampling parameters that were packed; `hidden` is [S, D]."""
        positions = np.array([segment.start for segment in segments], np.int64)
        positions += 1
        return self._chooser.draw_packed(self._kernels.logits(hidden), packed, positions)

    def _decoder_for(self, segments: Sequence[Segment]) -> DecodeKernels | None:
        """The kernels, where they compute such a step in one go: one token of each sequence, as in decoding."""
        if self._decoder is None or len(segments) > self._decoder.most_decoded:
            return None
        decodes = all(
            len(each.tokens) == 1 and not each.targets and (each.sampling or each.tokens[0] == LATENT_FROZEN)
            for each in segments
        )
        return self._decoder if decodes else None

    def _decode(self, decoder: DecodeKernels, segments: Sequence[Segment]) -> Outcome:
        """Computes a step that draws its tokens as it goes, but for rows with logits processors, constraints, or
        log-probabilities: those are drawn from its logits."""
        tokens, positions = [segment.tokens[0] for segment in segments], [segment.start for segment in segments]
        vectors, frozen = self._begin(segments, tokens, positions)
        params = [segment.sampling or NOTHING_DRAWN for segment in segments]
        rows, uniform = numbers(params, [position + 1 for position in positions])
        slots = [self._pool.row(segment.slot) for segment in segments]
        batch = DecodeBatch(tokens, positions, slots, rows, uniform, frozen, vectors)
        decoded = decoder.decode(self._pool.rows, batch)
        self._keep(segments, decoded.hidden)
        others = [row for row, segment in enumerate(segments) if drawn_apart(segment)]
        chosen, logprobs = list[int | None](), dict[int, TokenLogprob]()
        if others:
            logits = rows_of(decoded.logits, others)
            chosen, logprobs = self._choose(logits, [segments[row] for row in others], [params[row] for row in others])
        drawn = drawn_tokens(decoded.tokens())
        for row, token in zip(others, chosen):
            drawn[row] = token
        drawn = [token if segment.sampling else None for token, segment in zip(drawn, segments)]
        return Outcome(drawn, {others[row]: each for row, each in logprobs.items()})

    def _draw(self, segments: Sequence[Segment], hidden: Tensor) -> tuple[list[int | None], dict[int, TokenLogprob]]:
        """Draws the next token of each segment that has `sampling`.

        Args:
            hidden: [T, D], of all tokens of the segments.

        Returns:
            A token or None for each segment; and logprobs by the segment's index, where they are asked for.
        """
        params = [segment.sampling for segment in segments if segment.sampling is not None]
        if len(params) == len(hidden):  # each is a token that decodes
            return self._choose(self._kernels.logits(hidden), segments, params)
        drawn: list[int | None] = [None] * len(segments)
        if not params:
            return drawn, {}
        indices = [index for index, segment in enumerate(segments) if segment.sampling is not None]
        ends = [*accumulate([len(segment.tokens) for segment in segments])]
        logits = self._kernels.logits(rows_of(hidden, [ends[index] - 1 for index in indices]))
        tokens, logprobs = self._choose(logits, [segments[index] for index in indices], params)
        for index, token in zip(indices, tokens):
            drawn[index] = token
        return drawn, {indices[row]: each for row, each in logprobs.items()}

    def _choose(
        self, logits: Tensor, drawing: Sequence[Segment], params: Sequence[SamplingParams]
    ) -> tuple[list[int | None], dict[int, TokenLogprob]]:
        """Draws from a row of `logits` for each segment. The device may still be at work on them: the time to find out
        what may be drawn."""
        masks = [None if segment.constraint is None else segment.constraint.mask() for segment in drawing]
        positions = [segment.start + len(segment.tokens) for segment in drawing]
        processors = [(row, each) for row, segment in enumerate(drawing) if (each := segment.processors) is not None]
        return self._chooser.choose(logits, params, positions, processors, masks)

    def _target_logprobs(self, segments: Sequence[Segment], hidden: Tensor) -> dict[int, list[TokenLogprob]]:
        """Returns the logprobs of each segment's targets, by the segment's index; `hidden` is [T, D]."""
        if not any(segment.targets for segment in segments):
            return {}  # as mostly
        begins = accumulate((len(segment.tokens) for segment in segments), initial=0)
        wanted = [
            (index, row, target, segment.top)
            for index, (segment, begin) in enumerate(zip(segments, begins))
            for row, target in enumerate(segment.targets, begin)
        ]
        found: dict[int, list[TokenLogprob]] = {}
        for at in range(0, len(wanted), ROWS):
            indices, rows, targets, tops = zip(*wanted[at : at + ROWS])
            logits = self._kernels.logits(rows_of(hidden, rows))
            for index, each in zip(indices, token_logprobs(logits, targets, tops, ranked=True)):
                found.setdefault(index, []).append(each)
        return found

    @torch.inference_mode()
    def forward(
        self,
        segments: Sequence[Segment],
        active: Tensor | None = None,
        watching: Sequence[int] = (),
        fired: Tensor | None = None,
        begun: Mapping[int, Copy] = MappingProxyType({}),
        layout: Layout | None = None,
    ) -> Tensor:
        """Adds the segments' tokens to their states, and returns the final hidden vectors of all tokens.

        Args:
            active: [layers] float32, or None; gets the share of neurons that fired in each layer.
            watching: indices of tokens, rising, whose activations `fired` [layers, W, h, N] gets.
            begun: copies that the segments in their targets begin with, by those.
            layout: of the segments, where it is known.

        Returns:
            [T, D], in the order of the segments' tokens.
        """
        layout = layout or layout_of(segments, self._pool)
        if layout.bounds[-1] == len(segments):  # each is a token that decodes
            tokens = [segment.tokens[0] for segment in segments]
            positions = [segment.start for segment in segments]
        else:
            tokens = [token for segment in segments for token in segment.tokens]
            positions = [p for segment in segments for p in range(segment.start, segment.start + len(segment.tokens))]
        vectors, frozen = self._begin(segments, tokens, positions)
        slots = [segment.slot for segment in segments] if begun else []
        sources = [begun[slot].source if slot in begun else slot for slot in slots]
        batch = RaggedBatch(
            tokens=index_of(tokens, self._device),
            positions=index_of(positions, self._device),
            bounds=layout.bounds,
            slots=layout.rows,
            draws=layout.draws,
            vectors=vectors,
            frozen=frozen,
            sources=[self._pool.row(source) for source in sources],
            watched=watching,
            steady=0 if begun else layout.steady,
        )
        hidden = self._kernels.forward(self._pool.rows, batch, active, fired)
        self._keep(segments, hidden)
        return hidden

    def _begin(
        self, segments: Sequence[Segment], tokens: list[int], positions: Sequence[int]
    ) -> tuple[Tensor | None, list[bool]]:
        """Clears the states that begin. Returns the vectors of the latent steps, [K, D] or None, by whose rows `tokens`
        then name them; and `frozen`."""
        if 0 in positions:
            for segment in segments:
                if segment.start == 0:
                    self._pool.clear(segment.slot)
        return (None, []) if self._pool.vectors is None else self._entering(self._pool.vectors, segments, tokens)

    def _keep(self, segments: Sequence[Segment], hidden: Tensor) -> None:
        if self._pool.vectors is not None:
            self._pool.vectors.keep(segments, hidden)

    def _entering(
        self, kept: HiddenVectors, segments: Sequence[Segment], tokens: list[int]
    ) -> tuple[Tensor | None, list[bool]]:
        """See `_begin`."""
        latent, frozen = latent_segments(segments)
        if not latent:
            return None, []
        begins = [*accumulate((len(segment.tokens) for segment in segments), initial=0)]
        for row, at in enumerate(latent):
            tokens[begins[at]] = -1 - row
        vectors = kept.entering([segments[at].slot for at in latent])
        return vectors if self._latent_embed is None else vectors + self._latent_embed, frozen

    def logits(self, segments: Sequence[Segment]) -> Tensor:
        """Returns the logits [T, V] float32 of the token after each token of the segments, in their order."""
        return self._kernels.logits(self.forward(segments))

    def warm(self, chunk: int) -> None:
        """Runs a prefill chunk and a decode step in slot 0, so that no request waits for what is done once."""
        self._pool.warm()
        self._kernels.warm(self._pool.rows)
        sampling = SamplingParams(top_k=1, repetition_penalty=2.0, logit_bias=LogitBias.of({0: 1.0}))
        processors = LogitsProcessors.of(sampling, [0], distinct([0]), early=1)
        self.run(Plan([Segment(0, 0, [0] * chunk, sampling, processors)]))
        self.run(Plan([Segment(0, chunk, [0], sampling, processors, watch=1)], watches=True))
        if self._pool.vectors is not None:
            self.run(Plan([Segment(0, chunk + 1, [LATENT], sampling, processors)]))


def shares_of(active: Tensor | None) -> list[float]:
    """The share of neurons that fired, by layer; none where that was not measured."""
    return [] if active is None else active.tolist()


def sums(hidden: Tensor, segments: Sequence[Segment]) -> dict[int, list[float]]:
    """Returns the sum [D] of `hidden` [T, D] over each segment that has `pool`, by the segment's index."""
    if not any(segment.pool for segment in segments):
        return {}
    bounds = pairwise([0, *accumulate(len(segment.tokens) for segment in segments)])
    return {
        at: hidden[begin:end].sum(dim=0, dtype=torch.float64).tolist()
        for at, (segment, (begin, end)) in enumerate(zip(segments, bounds))
        if segment.pool
    }
