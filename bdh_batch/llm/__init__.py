"""The Python API: a model in the caller's own program, with the engine and the scheduler of the server."""

from bdh_batch.llm.async_llm import AsyncLLM
from bdh_batch.llm.llm import LLM
from bdh_batch.llm.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    LayerNeurons,
    Logprob,
    Neuron,
    NeuronsRequestOutput,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
    State,
    TokenNeurons,
)
from bdh_batch.llm.params import SamplingParams, StructuredOutputsParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "LayerNeurons",
    "Logprob",
    "Neuron",
    "NeuronsRequestOutput",
    "RequestOutput",
    "SamplingParams",
    "ScoringOutput",
    "ScoringRequestOutput",
    "State",
    "StructuredOutputsParams",
    "TokenNeurons",
]
