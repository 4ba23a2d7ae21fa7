"""Prompts as they come over the wire: their kinds, what is kept of them, and which share cached prefixes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, Field, GetCoreSchemaHandler, ValidationInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from bdh_batch.errors import InvalidRequest
from bdh_batch.http.request.sizes import AtMost, BodyText, BodyTokens, Label
from bdh_batch.messages import Text


@dataclass(frozen=True, slots=True)
class PromptList:
    """Marks a field that comes as a string, token ids, or a list of either, and is then a list of prompts.

    The bound on their number is looked at first, and the types of token ids all at once: a body may have a million.
    """

    option: str  # of `limits`: the most prompts
    mixed: bool = False  # whether a list may have texts and lists of token ids

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        written = core_schema.with_info_plain_validator_function
        return written(self._read, json_schema_input_schema=handler.generate_schema(self._written()))

    def _written(self) -> Any:
        texts = Annotated[list[Filled], Field(min_length=1), AtMost(self.option)]
        lists = Annotated[list[FilledTokens], Field(min_length=1), AtMost(self.option)]
        mixed = Annotated[list[Filled | FilledTokens], Field(min_length=1), AtMost(self.option)]
        return Filled | FilledTokens | mixed if self.mixed else Filled | texts | FilledTokens | lists

    def _read(self, value: object, info: ValidationInfo) -> list[Any]:
        if value in ([], ""):
            raise PydanticCustomError("empty", "Input should not be empty")
        if isinstance(value, str):
            return [value]
        if isinstance(value, list):
            if type(value[0]) is int and _are_all(value, int):
                return [value]
            AtMost(self.option).check(value, info)
            kinds = set(map(type, value))
            tokens = (prompt for prompt in value if type(prompt) is list)
            if kinds <= {str, list} and (self.mixed or len(kinds) == 1) and all(_are_all(each, int) for each in tokens):
                return value
        raise PydanticCustomError(
            "prompt_type", "Input should be a string, a list of strings, a list of token ids, or a list of such lists"
        )


def _are_all(values: list[Any], kind: type) -> bool:
    """Whether each of `values` is of that very type: True is no token."""
    return {kind}.issuperset(map(type, values))


def to_prompts(given: Sequence[str | Sequence[int]], add_special_tokens: bool | None) -> list[Text | Sequence[int]]:
    """A whole prompt may contain special tokens, spelt as text."""
    special = add_special_tokens is not False
    return [Text(prompt, special) if isinstance(prompt, str) else prompt for prompt in given]


def last_tokens(truncate: int | None, room: int | None, completion: int) -> int | None:
    """How many of a prompt's last tokens a request wants kept; None is all of them.

    Args:
        truncate: its `truncate_prompt_tokens`; -1 is as many as there is room for.
        room: tokens that the model takes; None is no limit.
        completion: tokens that have to fit behind the prompt.

    Raises:
        InvalidRequest: more than the model takes.
    """
    if truncate is None or (truncate < 0 and room is None):
        return None
    if room is None or 0 <= truncate <= room:
        return truncate
    if truncate < 0:
        return max(1, room - completion)
    text = f"truncate_prompt_tokens is more than the {room} tokens that this model takes (model.max_model_len)."
    raise InvalidRequest(text, "truncate_prompt_tokens")


def salted(salt: str | None) -> str:
    """A cache salt as an opaque label, of one length for all."""
    return "" if salt is None else hashlib.sha256(salt.encode()).hexdigest()


def _not_zero(value: int) -> int:
    if value == 0:
        raise PydanticCustomError("zero", "Input should be -1, or at least 1")
    return value


Filled = Annotated[BodyText, Field(min_length=1)]
FilledTokens = Annotated[BodyTokens, Field(min_length=1)]
Truncation = Annotated[int, Field(ge=-1, json_schema_extra={"not": {"const": 0}}), AfterValidator(_not_zero)]
Salt = Annotated[Label, Field(min_length=1)]
