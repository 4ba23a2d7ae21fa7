"""The request bodies of KServe's REST endpoints."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from bdh_batch.errors import LONGEST_NAME, InvalidRequest
from bdh_batch.http.request.sizes import AnyJson, AtMost, FreeObject, Label
from bdh_batch.http.request.strict import Open, Wire
from bdh_batch.http.schema.prompts import Filled

Integer = Literal["INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"]
Datatype = Literal["BYTES", "BOOL", Integer, "FP16", "FP32", "FP64"]
Shape = Annotated[list[Annotated[int, Field(ge=0, le=2**53)]], Field(min_length=1, max_length=8)]
Data = Annotated[list[AnyJson], AtMost("max_values")]


class InputParameters(Wire):
    """The parameters of an input tensor."""

    binary_data_size: int | None = Field(None, ge=0)


class InferInput(Wire):
    """An input tensor."""

    name: Annotated[Label, Field(min_length=1)]
    datatype: Datatype
    shape: Shape
    data: Data | None = None
    parameters: InputParameters | None = None


class OutputParameters(Wire):
    """The parameters of an output that is asked for."""

    binary_data: bool | None = None


class RequestedOutput(Wire):
    """An output that is asked for."""

    name: Label
    parameters: OutputParameters | None = None


class InferBody(Wire):
    """The body of a request to `infer`."""

    id: Label | None = None
    parameters: FreeObject | None = None
    inputs: Annotated[list[InferInput], Field(min_length=1), AtMost("max_members")]
    outputs: Annotated[list[RequestedOutput], AtMost("max_members")] | None = None


class GenerateBody(Open):
    """The body of a request to `generate` and `generate_stream`. Any parameter may stand beside the text, too."""

    id: Label | None = None
    text_input: Filled | None = None
    prompt: Filled | None = None
    parameters: FreeObject | None = None

    def the_prompt(self) -> tuple[str, str]:
        """What the request calls its prompt, and the prompt. Raises InvalidRequest: there is none, or two."""
        given = [(name, text) for name in ("text_input", "prompt") if (text := getattr(self, name)) is not None]
        if len(given) != 1:
            problem = "Field required" if not given else "text_input and prompt are the same: one of them is enough"
            raise InvalidRequest(f"text_input: {problem}", "text_input")
        return given[0]

    def parameter_values(self) -> dict[str, Any]:
        """All parameters. Raises InvalidRequest: one is given twice."""
        inner = self.parameters or {}
        for name in ("prompt", *self.others):
            if name in inner:
                raise InvalidRequest(f"{name} is given twice.", f"parameters.{name}"[:LONGEST_NAME])
        return {**self.others, **inner}
