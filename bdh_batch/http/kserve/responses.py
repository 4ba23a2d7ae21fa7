"""The types of KServe's responses, for the OpenAPI document; tests hold real responses to them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from bdh_batch.http.docs.response_parts import Count, ResponseModel, Usage
from bdh_batch.http.docs.response_types import CompletionLogprobs, SchemaWarning, Tokens

Reason = Literal["stop", "length"]


class KServeError(ResponseModel):
    """The body of every error below /v2."""

    error: str
    type: str
    param: str | None = Field(description="The field at fault, as in `inputs[2].shape`.")
    code: str | None


class ServerMetadata(ResponseModel):
    """The response of /v2."""

    name: str
    version: str
    extensions: list[str]


class Live(ResponseModel):
    """The response of /v2/health/live."""

    live: Literal[True]


class Ready(ResponseModel):
    """The response of /v2/health/ready."""

    ready: Literal[True]


class ModelReady(ResponseModel):
    """The response of a model's `ready`."""

    name: str
    ready: Literal[True]


class TensorMetadata(ResponseModel):
    """An input or output of a model; -1 is a dimension of any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(ResponseModel):
    """The response of /v2/models/{id}."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class BinaryDataSize(ResponseModel):
    """The parameters of an output that stands behind the JSON, as raw bytes."""

    binary_data_size: Count


class InferOutput(ResponseModel):
    """An output tensor."""

    name: str
    datatype: str
    shape: list[Count]
    data: list[Any] = Field(default_factory=list)
    parameters: BinaryDataSize | None = Field(default_factory=lambda: None)


class InferResponse(ResponseModel):
    """The response of `infer`."""

    model_name: str
    model_version: str
    id: str = Field("", description="The request's, if it has one.")
    outputs: list[InferOutput]


class GenerateCommon(ResponseModel):
    """What the responses of `generate` and the events of `generate_stream` have in common.

    A request with `text_input` gets `text_output`; one with `prompt` the names of the output tensors.
    """

    model_name: str
    model_version: str
    id: str = Field("", description="The request's, if it has one.")
    text_output: str = ""
    logprobs: CompletionLogprobs | None = Field(default_factory=lambda: None)
    token_ids: Tokens = Field(default_factory=list, description="With `return_token_ids`.")
    usage: Usage | None = Field(default_factory=lambda: None)
    warnings: list[SchemaWarning] = Field(default_factory=list)


class GenerateResponse(GenerateCommon):
    """The response of `generate`."""

    text: str = ""
    finish_reason: Reason
    usage: Usage


class GenerateEvent(GenerateCommon):
    """An event of `generate_stream`; the last one is `done`, and its text is empty."""

    token: str = ""
    finish_reason: Reason | None
    done: bool
