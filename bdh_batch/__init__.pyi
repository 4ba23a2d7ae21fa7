from bdh_batch.llm import (
    LLM as LLM,
    AsyncLLM as AsyncLLM,
    CompletionOutput as CompletionOutput,
    EmbeddingOutput as EmbeddingOutput,
    EmbeddingRequestOutput as EmbeddingRequestOutput,
    LayerNeurons as LayerNeurons,
    Logprob as Logprob,
    Neuron as Neuron,
    NeuronsRequestOutput as NeuronsRequestOutput,
    RequestOutput as RequestOutput,
    SamplingParams as SamplingParams,
    ScoringOutput as ScoringOutput,
    ScoringRequestOutput as ScoringRequestOutput,
    State as State,
    StructuredOutputsParams as StructuredOutputsParams,
    TokenNeurons as TokenNeurons,
)

__version__: str
