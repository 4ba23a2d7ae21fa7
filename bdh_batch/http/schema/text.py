"""Bodies of the endpoints that generate nothing: embeddings, text to tokens and back, models by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from bdh_batch.backends.base import RawPrompt
from bdh_batch.errors import InvalidRequest
from bdh_batch.http.request.sizes import BodyText, BodyTokens, Label
from bdh_batch.http.request.strict import Neutral, Wire
from bdh_batch.http.schema.chat import ConversationBody
from bdh_batch.http.schema.prompts import PromptList, Truncation, last_tokens, to_prompts
from bdh_batch.messages import GenerationRequest, Origin, Prompt, Text
from bdh_batch.settings import MAX_PRIORITY

NO_CALLS: Neutral = {"chat_template": (), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False)}
EMBEDDING: Neutral = {"embed_dtype": ("float32",), "endianness": ("little", "native"), "normalize": (True,)}


class EmbeddingOptions(Wire):
    """The fields that all requests for embeddings share."""

    unsupported: ClassVar[Neutral] = EMBEDDING

    model: Label | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    truncate_prompt_tokens: Truncation | None = None
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    # Labels: accepted, and left to the client's own records.
    user: Label | None = None
    request_id: Label | None = None

    def check_dimensions(self, width: int) -> None:
        """Raises InvalidRequest where it asks for more than the `width` of the model's hidden vectors."""
        if self.dimensions is not None and self.dimensions > width:
            raise InvalidRequest(f"dimensions: This model's embeddings have {width}.", "dimensions")

    def last_tokens(self, room: int | None) -> int | None:
        """How many of a prompt's last tokens are kept, where the model takes `room`; None is all of them."""
        return last_tokens(self.truncate_prompt_tokens, room, completion=0)

    def request(self, origin: Origin, prompts: Sequence[Prompt]) -> GenerationRequest:
        return GenerationRequest(origin, prompts, max_tokens=0, priority=self.priority or 0)


class EmbeddingBody(EmbeddingOptions):
    """The body of a request to /v1/embeddings for texts."""

    input: Annotated[list[Any], PromptList("max_inputs", mixed=True)]
    add_special_tokens: bool | None = None

    def prompts(self) -> list[RawPrompt]:
        prompts = to_prompts(self.input, self.add_special_tokens)
        if len(prompts) == 1:
            return [("input", prompts[0])]
        return [(f"input[{index}]", prompt) for index, prompt in enumerate(prompts)]


class EmbeddingChat(ConversationBody, EmbeddingOptions):
    """A conversation, which gets one vector."""

    unsupported: ClassVar[Neutral] = {**EMBEDDING, **NO_CALLS}
    ends_with_generation_prompt: ClassVar[bool] = False


class TokenizeText(Wire):
    """The body of a request to /tokenize for a text."""

    model: Label | None = None
    prompt: BodyText
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    def text(self) -> Text:
        return Text(self.prompt, self.add_special_tokens is not False)


class TokenizeChat(ConversationBody):
    """The body of a request to /tokenize for a conversation."""

    unsupported: ClassVar[Neutral] = NO_CALLS

    model: Label | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Wire):
    """The body of a request to /detokenize."""

    model: Label | None = None
    tokens: BodyTokens


class ModelBody(Wire):
    """The body of /models/load and /models/unload."""

    model: Label
