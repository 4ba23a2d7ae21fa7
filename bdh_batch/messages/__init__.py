"""The types that packages share: requests, sampling parameters, steps and their outcomes, deltas."""

from bdh_batch.messages.request import (
    Constraint,
    GenerationRequest,
    Grammar,
    GrammarText,
    Origin,
    Progress,
    Prompt,
    Text,
)
from bdh_batch.messages.response import Delta, FinishReason, Gathering, TokenScore, Usage
from bdh_batch.messages.sampling import NO_TOKENS, Adjustment, LogitBias, SamplingParams, distinct
from bdh_batch.messages.step import Copy, Outcome, Plan, Segment

__all__ = [
    "NO_TOKENS",
    "Adjustment",
    "Constraint",
    "Copy",
    "Delta",
    "FinishReason",
    "Gathering",
    "GenerationRequest",
    "Grammar",
    "GrammarText",
    "LogitBias",
    "Origin",
    "Outcome",
    "Plan",
    "Progress",
    "Prompt",
    "SamplingParams",
    "Segment",
    "Text",
    "TokenScore",
    "Usage",
    "distinct",
]
