"""Bodies of the endpoints that generate nothing: embeddings, and text to tokens and back."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from bdh_batch.errors import InvalidRequest
from bdh_batch.http.request.sizes import BodyText, BodyTokens, Label
from bdh_batch.http.request.strict import Neutral, Wire
from bdh_batch.http.schema.chat import ConversationBody
from bdh_batch.http.schema.requests import PromptList, to_prompts
from bdh_batch.messages import GenerationRequest, Text
from bdh_batch.settings import MAX_PRIORITY


class EmbeddingBody(Wire):
    model: Label | None = None
    input: Annotated[list[Any], PromptList("max_inputs")]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    add_special_tokens: bool | None = None
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    user: Label | None = None  # a label

    def requests(self, request_id: str, width: int) -> list[GenerationRequest]:
        """
        Args:
            width: of the model's hidden vectors.
        """
        if self.dimensions is not None and self.dimensions > width:
            raise InvalidRequest(f"dimensions: This model's embeddings have {width}.", "dimensions")
        prompts = to_prompts(self.input, self.add_special_tokens)
        params = ["input"] if len(prompts) == 1 else [f"input[{index}]" for index in range(len(prompts))]
        priority = self.priority or 0
        return [
            GenerationRequest(request_id, prompt, max_tokens=0, prompt_param=param, priority=priority, pool=True)
            for prompt, param in zip(prompts, params)
        ]


class TokenizeText(Wire):
    model: Label | None = None
    prompt: BodyText
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    def text(self) -> Text:
        return Text(self.prompt, self.add_special_tokens is not False)


class TokenizeChat(ConversationBody):
    unsupported: ClassVar[Neutral] = {
        "chat_template": (),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
    }

    model: Label | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Wire):
    model: Label | None = None
    tokens: BodyTokens
