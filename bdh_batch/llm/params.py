"""What a caller of the Python API asks for: vLLM's names and defaults, as the fields of a body of this server's API."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from bdh_batch.errors import InvalidRequest

FREE_SEED = -1  # what some callers write for a seed that is drawn


@dataclass(kw_only=True)
class StructuredOutputsParams:
    """What the text has to look like: one of these."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def body(self) -> dict[str, Any]:
        """The fields of a body. Raises InvalidRequest: it is none of them, or several."""
        given = [each.name for each in fields(self) if getattr(self, each.name) is not None]
        if len(given) != 1:
            one_of = ", ".join(each.name for each in fields(self))
            text = f"structured_outputs: One of {one_of} should be given, not {' and '.join(given) or 'none'}."
            raise InvalidRequest(text, "structured_outputs")
        if given != ["json_object"]:
            return {"structured_outputs": {given[0]: getattr(self, given[0])}}
        if self.json_object is not True:
            raise InvalidRequest(
                "structured_outputs.json_object: Input should be True.", "structured_outputs.json_object"
            )
        return {"response_format": {"type": "json_object"}}


@dataclass(kw_only=True)
class SamplingParams:
    """How tokens are chosen, and when a completion ends. Names and defaults are vLLM's.

    They are checked when they are used, by the same rules as a request over HTTP; the error names the field.

    Args:
        n: completions of each prompt. With a `seed`, the first one has that, and each other one the next.
        seed: of what is drawn; None draws one, too. With the same one, a prompt gets the same completion.
        max_tokens: None is the model's own default.
        logprobs: for each token, its log-probability and those of so many of the likeliest; None is none.
        prompt_logprobs: the same for the tokens of the prompt.
        structured_outputs: as `StructuredOutputsParams`, or a mapping of its fields.
        cache_salt: prompts of different salts share no cached prefixes.
        latent_steps: between a prompt and its completion, of a model that has them; None is what its folder says.
        update_latent_memory: whether they enter the state, as tokens do, or only read it.
        reasoning_effort: latent steps by name, as the model's folder has them.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    cache_salt: str | None = None
    latent_steps: int | None = None
    update_latent_memory: bool = True
    reasoning_effort: str | None = None
    # Fields that bodies have under the same name need no more than a line here: `body` passes them on.

    def body(self, chat: bool = False) -> dict[str, Any]:
        """The fields of a body of completions, or of chat. Raises InvalidRequest."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        if self.seed == FREE_SEED:
            values["seed"] = None
        values["logit_bias"] = _biases(self.logit_bias)
        if chat and self.logprobs is not None:
            values |= {"logprobs": True, "top_logprobs": self.logprobs}
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):  # JSON has no such numbers
                raise InvalidRequest(f"{name}: Input should be a finite number.", name)
        structured = values.pop("structured_outputs")
        if structured is not None:
            values |= _structured(structured).body()
        return {name: value for name, value in values.items() if value is not None}


def _biases(given: Mapping[int, float] | None) -> dict[str, Any] | None:
    """As JSON has them: by the token as a text."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise InvalidRequest("logit_bias: Input should be a mapping of token ids to numbers.", "logit_bias")
    for token, bias in given.items():
        if isinstance(bias, float) and not math.isfinite(bias):
            param = f"logit_bias.{token!s:.128}"
            raise InvalidRequest(f"{param}: Input should be a finite number.", param)
    return {str(token): bias for token, bias in given.items()}


def _structured(given: object) -> StructuredOutputsParams:
    if isinstance(given, StructuredOutputsParams):
        return given
    if not isinstance(given, Mapping):
        text = "structured_outputs: Input should be StructuredOutputsParams, or a mapping of its fields."
        raise InvalidRequest(text, "structured_outputs")
    known = {each.name for each in fields(StructuredOutputsParams)}
    if unknown := [name for name in given if name not in known]:
        param = f"structured_outputs.{unknown[0]!s:.128}"
        raise InvalidRequest(f"Unknown parameter: {param}.", param, "unknown_parameter")
    return StructuredOutputsParams(**given)


def spread(given: Any, count: int, name: str, kind: type | tuple[type, ...]) -> list[Any]:
    """What each of `count` prompts gets: all the same, or, of a list, each its own.

    Raises InvalidRequest: it is not of that kind, or the list has another length.
    """
    if given is None or isinstance(given, kind):
        return [given] * count
    if not isinstance(given, list | tuple):
        raise InvalidRequest(f"{name}: Input should be {_names(kind)}, or a list of one for each prompt.", name)
    if len(given) != count:
        raise InvalidRequest(f"{name}: {len(given)} were given for {count} prompts; give one, or one for each.", name)
    for index, each in enumerate(given):
        if not isinstance(each, kind):
            raise InvalidRequest(f"{name}[{index}]: Input should be {_names(kind)}.", f"{name}[{index}]")
    return [*given]


def _names(kind: type | tuple[type, ...]) -> str:
    return " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
