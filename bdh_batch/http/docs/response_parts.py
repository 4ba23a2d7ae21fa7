"""Parts of responses, for their types in `response_types.py`: usage, and the neurons of tokens."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]


class ResponseModel(BaseModel):
    """A field with a default factory may be absent; none is there that is not listed."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class PromptTokensDetails(ResponseModel):
    """The part of the prompt that came from the prefix cache."""

    cached_tokens: Count = Field(description="Tokens of the prompt that came from the prefix cache.")


class CompletionTokensDetails(ResponseModel):
    """Of the tokens of the completions, those that were latent steps."""

    reasoning_tokens: Count


class Usage(ResponseModel):
    """The tokens that a request used."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = Field(
        default_factory=lambda: None, description="Absent where the model has no latent steps."
    )
    estimated: bool = Field(
        default_factory=bool,
        description="Whether an upstream did not say, and has no tokenizer here: estimates. Absent where they are not.",
    )


class StrongNeuron(ResponseModel):
    """A neuron that fired."""

    head: Count
    neuron: Count = Field(description="Its number in the head, in the checkpoint's order.")
    value: float = Field(gt=0, description="Its activation.")


class LayerNeurons(ResponseModel):
    """What fired in one layer."""

    active: float = Field(ge=0, le=1, description="The share of the layer's neurons that fired.")
    strongest: list[StrongNeuron] = Field(description="The strongest first; fewer than `top` where fewer fired.")


class TokenNeurons(ResponseModel):
    """The neurons that fired when a token was read."""

    token_id: Count
    layers: list[LayerNeurons] = Field(description="The first layer first.")
