from bdh_batch.llm import (
    LLM as LLM,
    AsyncLLM as AsyncLLM,
    CompletionOutput as CompletionOutput,
    EmbeddingOutput as EmbeddingOutput,
    EmbeddingRequestOutput as EmbeddingRequestOutput,
    Logprob as Logprob,
    RequestOutput as RequestOutput,
    SamplingParams as SamplingParams,
    ScoringOutput as ScoringOutput,
    ScoringRequestOutput as ScoringRequestOutput,
    State as State,
    StructuredOutputsParams as StructuredOutputsParams,
)

__version__: str
