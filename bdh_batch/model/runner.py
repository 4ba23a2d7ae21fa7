"""Computes a plan: packs its segments into one ragged batch, runs the forward pass, draws the next tokens.

Owns every tensor; knows nothing about requests, only slots.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from bdh_batch.errors import OutOfMemory
from bdh_batch.kernels.base import Kernels, RaggedBatch
from bdh_batch.messages import Outcome, Plan, SamplingParams, Segment
from bdh_batch.model.activity import Activity
from bdh_batch.model.sampling import sample
from bdh_batch.model.state import StatePool

log = logging.getLogger(__name__)


class Runner:
    def __init__(self, kernels: Kernels, pool: StatePool, activity: Activity | None = None) -> None:
        self._kernels = kernels
        self._activity = activity
        self._pool = pool
        self._device = pool.states.device

    @torch.inference_mode()
    def run(self, plan: Plan) -> Outcome:
        """One step. Every segment's tokens enter its slot's state; those with `sampling` get a next token.

        Raises:
            OutOfMemory: the states of the segments are then spoilt.
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
        for copy in plan.copies:
            self._pool.copy(copy.source, copy.target)
        if not plan.segments:
            return Outcome([])
        active = [] if self._activity is None else self._activity.look(self._pool.states, plan.segments)
        hidden = self.forward(plan.segments)
        ends = list(accumulate(len(segment.tokens) for segment in plan.segments))
        rows, params, positions = [], [], []
        for segment, end in zip(plan.segments, ends):
            if segment.sampling is not None:
                rows.append(end - 1)
                params.append(segment.sampling)
                positions.append(segment.start + len(segment.tokens))
        if not rows:
            return Outcome([None] * len(ends), active)
        last = hidden[torch.tensor(rows, device=self._device)]
        drawn = iter(draw(self._kernels.logits(last), params, positions))
        return Outcome([None if segment.sampling is None else next(drawn) for segment in plan.segments], active)

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """The final hidden vectors [T, D] of all tokens of the segments, in their order."""
        for segment in segments:
            if segment.start == 0:
                self._pool.clear(segment.slot)
        tokens = [token for segment in segments for token in segment.tokens]
        positions = [p for segment in segments for p in range(segment.start, segment.start + len(segment.tokens))]
        batch = RaggedBatch(
            tokens=torch.tensor(tokens, device=self._device),
            positions=torch.tensor(positions, device=self._device),
            bounds=[0, *accumulate(len(segment.tokens) for segment in segments)],
            slots=[segment.slot for segment in segments],
        )
        return self._kernels.forward(self._pool.states, batch)

    def logits(self, segments: Sequence[Segment]) -> Tensor:
        """Scores [T, V] of what follows each token of the segments, in their order."""
        return self._kernels.logits(self.forward(segments))

    def warm(self, chunk: int) -> None:
        """Runs a prefill chunk and a decode step in slot 0, so that no request pays for what is done once."""
        self._kernels.warm(self._pool.states)
        greedy = SamplingParams(temperature=0.0)
        for start, length in ((0, chunk), (chunk, 1)):
            self.run(Plan([Segment(slot=0, start=start, tokens=[0] * length, sampling=greedy)]))


def draw(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int | None]:
    """A token for each row. A row that cannot be drawn gets None, and does not keep the others from theirs."""
    try:
        return list(sample(logits, params, positions))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:
        log.exception("drawing %d tokens failed; they are drawn one by one", len(params))
    drawn: list[int | None] = []
    for row, (param, position) in enumerate(zip(params, positions, strict=True)):
        try:
            drawn += sample(logits[row : row + 1], [param], [position])
        except Exception:
            log.exception("drawing with %s failed", param)
            drawn.append(None)
    return drawn
