"""What follows from a step's segments without their tokens: bounds, rows of the state pool, packed parameters. The next
steps have the same while all that runs decodes, and nothing comes or goes: with many streams, asking each segment again
takes longer than packing them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, count
from typing import NamedTuple

from bdh_batch.engine.sampling.choosing import Chooser
from bdh_batch.engine.sampling.host_sampler import PackedParameters
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.messages import Plan, Segment

NUMBERS = count(1)  # of kept layouts; those of several runners may be computed by the same kernels


class Layout(NamedTuple):
    """How the tokens of S segments lie in a batch, and in which slots their states are."""

    bounds: list[int]  # S + 1 offsets into the tokens
    rows: list[int]  # of the state pool
    draws: list[bool]
    packed: PackedParameters | None = None  # where sampling parameters are all that a step of single tokens needs
    steady: int = 0  # the number of a layout that is kept


def layout_of(segments: Sequence[Segment], pool: StatePool) -> Layout:
    """Without sampling parameters."""
    return Layout(
        [0, *accumulate([len(segment.tokens) for segment in segments])],
        [pool.row(segment.slot) for segment in segments],
        [segment.sampling is not None for segment in segments],
    )


class Layouts:
    """Keeps the layout of the last step, if the next one may have the same. It holds nothing that a request does.

    Parameters that cannot be packed are not met here: they end their sequence with its first token.
    """

    def __init__(self, pool: StatePool, chooser: Chooser) -> None:
        self._pool = pool
        self._chooser = chooser
        self._steady = 0  # the number of the plans that `_kept` is for
        self._kept: Layout | None = None

    def of(self, plan: Plan) -> Layout:
        """The layout of the segments of `plan`, whose copies have been made: one may have moved a state."""
        if self._kept is not None and self._steady == plan.steady and not plan.copies:
            return self._kept
        layout = layout_of(plan.segments, self._pool)
        self._steady, self._kept = plan.steady, None
        if plan.steady:
            self._kept = layout = layout._replace(packed=self._packed(plan.segments), steady=next(NUMBERS))
        return layout

    def _packed(self, segments: Sequence[Segment]) -> PackedParameters | None:
        params = [
            segment.sampling
            for segment in segments
            if segment.sampling is not None and not (drawn_apart(segment) or segment.targets or segment.pool)
        ]
        return self._chooser.pack(params) if len(params) == len(segments) else None


def drawn_apart(segment: Segment) -> bool:
    """Whether drawing its token takes more than sampling parameters that are numbers."""
    if segment.sampling is None:
        return False
    return segment.processors is not None or segment.constraint is not None or segment.sampling.logprobs is not None
