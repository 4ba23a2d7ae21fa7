"""Drafts in a step: how they are computed beside other segments, and which of them come true.

A draft comes true if it is what would have been drawn. A draw follows from seed and position alone, and the kernels
give a draft the bits of the token that it stands for: so a sequence has the same tokens with drafts as without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from bdh_batch.checkpoint.config import BDHConfig
from bdh_batch.errors import ConfigError
from bdh_batch.kernels.base import DraftKernels, Kernels
from bdh_batch.messages import Drawn, Segment, TokenLogprob
from bdh_batch.scheduler.drafts import NO_DRAFTS, DraftPolicy
from bdh_batch.settings import Speculative


def draft_policy(chosen: Speculative, kernels: Kernels, config: BDHConfig, window: int) -> DraftPolicy:
    """How an engine with these kernels makes drafts. Raises ConfigError: it can make none."""
    if chosen.method is None:
        return NO_DRAFTS
    if not isinstance(kernels, DraftKernels):
        raise ConfigError("speculative.method: ngram needs the cpu kernels; leave it out, or set model.device to cpu")
    if config.latent_steps:
        raise ConfigError("speculative.method: ngram does not go with a model that has latent steps; leave it out")
    return DraftPolicy(chosen.num_speculative_tokens, chosen.prompt_lookup_min, window // 2, kernels.most_tried)


def with_drafts(segments: Sequence[Segment]) -> list[Segment]:
    """The segments with their drafts among their tokens: what the forward pass computes."""
    return [replace(each, tokens=[*each.tokens, *each.draft]) if each.draft else each for each in segments]


def one_by_one(segments: Sequence[Segment]) -> list[Segment]:
    """The same tokens as segments that each draw one: that of a segment, and one for each of its drafts."""
    return [part for segment in segments for part in _parts(segment)]


def _parts(segment: Segment) -> list[Segment]:
    if not segment.draft:
        return [segment]
    first = segment.start + len(segment.tokens)
    drafts = [replace(segment, start=first + at, tokens=(token,), draft=()) for at, token in enumerate(segment.draft)]
    return [replace(segment, draft=()), *drafts]


def verify(
    segments: Sequence[Segment], drawn: Sequence[int | None], logprobs: Mapping[int, TokenLogprob]
) -> tuple[list[int | None], dict[int, TokenLogprob], dict[int, list[Drawn]]]:
    """What was drawn for `segments`, from what was drawn for them `one_by_one`.

    Returns:
        For each segment the next token; the logprobs of those by the segment's index; and by that, where drafts were
        right, the tokens after it: as many as drafts that came true.
    """
    tokens: list[int | None] = []
    of_tokens: dict[int, TokenLogprob] = {}
    more: dict[int, list[Drawn]] = {}
    at = 0
    for index, segment in enumerate(segments):
        tokens.append(drawn[at])
        if at in logprobs:
            of_tokens[index] = logprobs[at]
        true = 0
        while true < len(segment.draft) and drawn[at + true] == segment.draft[true]:
            true += 1
        if true:
            more[index] = [(drawn[row], logprobs.get(row)) for row in range(at + 1, at + 1 + true)]
        at += 1 + len(segment.draft)
    return tokens, of_tokens, more
