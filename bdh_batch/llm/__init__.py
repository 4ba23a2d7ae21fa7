"""The Python API: a model in the caller's own program, with the engine and the scheduler of the server."""

from bdh_batch.llm.async_llm import AsyncLLM
from bdh_batch.llm.llm import LLM
from bdh_batch.llm.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Logprob,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
    State,
)
from bdh_batch.llm.params import SamplingParams, StructuredOutputsParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "ScoringOutput",
    "ScoringRequestOutput",
    "State",
    "StructuredOutputsParams",
]
