"""The body of a request to /v1/states."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from bdh_batch.backends.base import RawPrompt
from bdh_batch.http.request.sizes import Label
from bdh_batch.http.request.strict import Wire
from bdh_batch.http.schema.prompts import PromptList, to_prompts

SOURCES = ("prompt", "response", "request", "state")
OF_PROMPTS = ("model", "add_special_tokens")
MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)]


class StateBody(Wire):
    """The body of a request to /v1/states: what the state is made of is one of four fields."""

    hints: ClassVar[bool] = False

    prompt: Annotated[list[Any], PromptList("max_prompts")] | None = None
    model: Label | None = None
    add_special_tokens: bool | None = None
    response: Label | None = None
    request: Label | None = None
    state: Label | None = None
    metadata: Metadata | None = None
    ttl: float | None = Field(None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _is_of_one_thing(self) -> Self:
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            text = f"One of {', '.join(SOURCES)} should be given"
            raise PydanticCustomError("source", text, {"field": given[1] if given else SOURCES[0]})
        if self.prompt is not None and len(self.prompt) > 1:
            raise PydanticCustomError("prompts", "A state has one prompt", {"field": "prompt"})
        for name in OF_PROMPTS if self.prompt is None else ():
            if getattr(self, name) is not None:
                raise PydanticCustomError(
                    "source", f"Can only be used with a prompt, not with {given[0]}", {"field": name}
                )
        return self

    def prompts(self) -> list[RawPrompt]:
        return [("prompt", prompt) for prompt in to_prompts(self.prompt or (), self.add_special_tokens)]
