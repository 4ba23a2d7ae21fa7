"""What /v1/neurons returns, and what the lines of a `neurons.json` have to look like."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from bdh_batch.http.docs.response_parts import Count, ResponseModel

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Size = Annotated[int, Field(ge=1)]


class Study(ResponseModel):
    """The text that `bdh-batch model neurons` had the model read."""

    text: str = Field(description="The name of its file.")
    tokens: Size
    length: Size = Field(description="Tokens that were read with one state.")


class NeuronMap(ResponseModel):
    """The neurons that a model has."""

    model: str
    layers: Size
    heads: Size
    neurons_per_head: Size
    max_neurons: Size = Field(
        description="How many a response may show: tokens x layers x `neurons.top` (limits.max_neurons)."
    )
    study: Study | None = Field(
        description="What /v1/neurons/contexts knows of; null where there is no `neurons.json`."
    )


class Context(ResponseModel):
    """Where in the text a neuron fired."""

    position: Count = Field(description="The number of the token in the text.")
    byte: Count = Field(description="Where in the text the token begins.")
    value: float = Field(gt=0, allow_inf_nan=False, description="The neuron's activation.")
    before: str
    token: str
    after: str


class NeuronContexts(ResponseModel):
    """Where in the text one neuron fires most."""

    layer: Count
    head: Count
    neuron: Count = Field(description="Its number in the head, in the checkpoint's order.")
    active: Share = Field(description="The share of the text's tokens that it fires for.")
    contexts: list[Context] = Field(description="The strongest first; none where it never fired.")
