"""A continuous-batching server for BDH models with an OpenAI-compatible API.

`from bdh_batch import LLM, SamplingParams` computes a model in the program itself, without a server. What that needs is
imported when it is asked for: `import bdh_batch` alone costs nothing. `__init__.pyi` has the types.
"""

import importlib

__version__ = "0.1.0"

_PYTHON_API = frozenset(
    (
        *("LLM", "AsyncLLM", "SamplingParams", "StructuredOutputsParams"),
        *("RequestOutput", "CompletionOutput", "Logprob", "EmbeddingRequestOutput", "EmbeddingOutput"),
        *("ScoringRequestOutput", "ScoringOutput", "State"),
        *("NeuronsRequestOutput", "TokenNeurons", "LayerNeurons", "Neuron"),
    )
)


def __getattr__(name: str) -> object:
    if name not in _PYTHON_API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("bdh_batch.llm"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PYTHON_API})
