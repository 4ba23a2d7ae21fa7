"""A step: the plan that the scheduler makes, and the outcome that the runner returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from bdh_batch.messages.neurons import Neurons
from bdh_batch.messages.request import Constraint
from bdh_batch.messages.response import TokenLogprob
from bdh_batch.messages.sampling import LogitsProcessors, SamplingParams


@dataclass(slots=True)
class Segment:
    """A sequence's share of a step: `tokens` enter its state, in `slot`, at positions `start`, `start` + 1, …

    A latent step (`latent.py`) is a segment of its own. A segment that starts at 0 begins with an empty state. With
    `sampling`, the token after its last one is drawn, among those that `constraint` allows; with `pool`, its tokens'
    final hidden vectors are summed.
    The scheduler may use it again for a later step; it does not change while its step is computed.
    Logprobs are computed for `targets`: token i of them is the one after token i of `tokens`.
    """

    slot: int
    start: int
    tokens: Sequence[int]
    sampling: SamplingParams | None
    processors: LogitsProcessors | None = None
    constraint: Constraint | None = None
    targets: Sequence[int] = ()
    top: int = 0  # how many likeliest tokens each target's logprobs contain
    pool: bool = False
    watch: int = 0  # how many of the strongest neurons are shown, by layer, of each token from `watch_from` on; 0: none
    watch_from: int = 0


class Copy(NamedTuple):
    """The state in slot `source` is copied over that in slot `target`; either may lie on the device or on the host.

    Of `parts` equal parts of it, those from `begin` to `end` are; the others, in order, in steps before and after.
    One that `moves` is made at once, as a whole: nobody needs what the source holds then.
    """

    source: int
    target: int
    begin: int = 0
    end: int = 1
    parts: int = 1
    moves: bool = False


class Plan(NamedTuple):
    """A step: copies, in their order, then releases, then one ragged batch of segments, each of a different slot on the
    device.

    Slots are numbered through: those on the device first, then those in the host's memory, then those for states on
    their way from and to files. The memory of the slots in
    `releases` goes back to the system; they hold no state that anyone needs. `watches` says whether a segment has
    `watch`. Plans with the same `steady`, if that is not 0, have the same segments, of one token each: only that and
    where it starts differ.
    """

    segments: Sequence[Segment]
    copies: Sequence[Copy] = ()
    releases: Sequence[int] = ()
    watches: bool = False
    steady: int = 0

    @property
    def tokens(self) -> int:
        return sum(len(segment.tokens) for segment in self.segments)


class Outcome(NamedTuple):
    """The outcome of a step: for each segment the next token, None where none was asked for or none could be drawn.

    By the index of their segment, `logprobs` has those of the drawn tokens, `target_logprobs` those of targets,
    `pooled` the sum [D] of the hidden vectors where that was asked for, and `neurons` those of the watched tokens.
    `active` is, by layer, the share of neurons that fired for its tokens; empty where that was not measured.
    """

    drawn: Sequence[int | None]
    logprobs: Mapping[int, TokenLogprob] = MappingProxyType({})
    target_logprobs: Mapping[int, Sequence[TokenLogprob]] = MappingProxyType({})
    pooled: Mapping[int, Sequence[float]] = MappingProxyType({})
    active: Sequence[float] = ()
    neurons: Mapping[int, Sequence[Neurons]] = MappingProxyType({})
