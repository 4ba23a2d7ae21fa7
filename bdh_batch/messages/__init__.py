"""The types that packages share: requests, sampling parameters, steps and their outcomes, deltas."""

from bdh_batch.messages.extras import merged
from bdh_batch.messages.latent import LATENT, LATENT_FROZEN, LatentOptions, LatentSteps, latent_positions
from bdh_batch.messages.neurons import NeuronLimit, Neurons, NeuronsAsked
from bdh_batch.messages.request import (
    Constraint,
    GenerationRequest,
    Grammar,
    GrammarText,
    Origin,
    Progress,
    Prompt,
    Text,
    Written,
)
from bdh_batch.messages.response import UNKNOWN_TOKEN, Delta, FinishReason, Gathering, Taker, TokenLogprob, Usage
from bdh_batch.messages.sampling import NO_TOKENS, LogitBias, LogitsProcessors, SamplingParams, distinct
from bdh_batch.messages.state import SavedState, StateLayout
from bdh_batch.messages.step import Copy, Drawn, Outcome, Plan, Segment

__all__ = [
    "LATENT",
    "LATENT_FROZEN",
    "NO_TOKENS",
    "UNKNOWN_TOKEN",
    "Constraint",
    "Copy",
    "Delta",
    "Drawn",
    "FinishReason",
    "Gathering",
    "GenerationRequest",
    "Grammar",
    "GrammarText",
    "LatentOptions",
    "LatentSteps",
    "LogitBias",
    "LogitsProcessors",
    "NeuronLimit",
    "Neurons",
    "NeuronsAsked",
    "Origin",
    "Outcome",
    "Plan",
    "Progress",
    "Prompt",
    "SamplingParams",
    "SavedState",
    "Segment",
    "StateLayout",
    "Taker",
    "Text",
    "TokenLogprob",
    "Usage",
    "Written",
    "distinct",
    "latent_positions",
    "merged",
]
