"""Request bodies as they come over the wire: types and ranges, and their translation into generation requests.

Types are strict: "5" is not a number. A field that the API knows but this server cannot honour yet is refused by name,
unless it says what leaving it out would say.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import orjson
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from bdh_batch.errors import InvalidRequest, UnknownParameter, UnsupportedParameter
from bdh_batch.http.sizes import check_stops
from bdh_batch.messages import GenerationRequest, SamplingParams
from bdh_batch.text.chat import ChatTemplate

Neutral = Mapping[str, tuple[Any, ...]]

# Known to the API, not built yet: the values besides null that ask for nothing.
GENERATION: Neutral = {
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "min_p", "min_tokens"), (0,)),
    **dict.fromkeys(("logprobs", "echo", "ignore_eos", "include_stop_str_in_output"), (False,)),
    **dict.fromkeys(("stop_token_ids", "tools", "functions"), ([],)),
    **dict.fromkeys(("logit_bias", "structured_outputs"), ({},)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    **dict.fromkeys(("audio", "prediction", "reasoning_effort", "verbosity", "web_search_options"), ()),
    "best_of": (1,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "suffix": ("",),
    "top_logprobs": (0,),
}
MESSAGE: Neutral = {"refusal": (), "audio": (), "function_call": (), "tool_calls": ([],), "annotations": ([],)}
STREAM_OPTIONS: Neutral = {"continuous_usage_stats": (False,), "include_obfuscation": (False,)}
MAX_PRIORITY = 1000


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a request that does not say gets, and how much it may ask for."""

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_n: int = 16
    max_prompts: int = 128
    max_stop: int = 16
    max_stop_bytes: int = 1024
    max_schema_bytes: int = 65536


def _prompts(value: object) -> object:
    """A string, token ids, or a list of either, to a list of prompts."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(_is_token(item) for item in value)):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if all(isinstance(item, list) and all(_is_token(token) for token in item) for item in value):
            return value
    if value == []:
        raise PydanticCustomError("prompt_empty", "The prompt is empty.")
    raise PydanticCustomError(
        "prompt_type", "Input should be a string, a list of strings, a list of token ids, or a list of such lists"
    )


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _stops(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _text(value: object) -> object:
    """Message content as a string: text parts are joined; parts of other kinds are refused."""
    if not isinstance(value, list):
        return value
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind is not None and kind != "text":
            raise PydanticCustomError(
                "unsupported", f"Content parts of type {kind!r} are not supported", {"index": index}
            )
        if kind is None or not isinstance(part.get("text"), str):
            raise PydanticCustomError("part", "Content parts are objects with type and text", {"index": index})
        texts.append(part["text"])
    return "".join(texts)


def _seed_bits(value: int) -> int:
    return value & 0xFFFFFFFFFFFFFFFF


Prompts = Annotated[list[Any], BeforeValidator(_prompts)]
Stops = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_stops)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**64 - 1), AfterValidator(_seed_bits)]


class Wire(BaseModel):
    """An object of a body. `unsupported` fields are refused by name, or dropped where they ask for nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
    unsupported: ClassVar[Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_unsupported(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        for name in values.keys() & cls.unsupported.keys():
            if values[name] is not None and not _asks_for_nothing(values[name], cls.unsupported[name]):
                text = "{field} is not supported by this server"
                raise PydanticCustomError("unsupported", text, {"field": name})
        return {name: value for name, value in values.items() if name not in cls.unsupported}


def _asks_for_nothing(value: object, neutral: tuple[Any, ...]) -> bool:
    # 1 == True in Python, but not in JSON.
    return any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in neutral)


class StreamOptions(Wire):
    unsupported = STREAM_OPTIONS

    include_usage: bool | None = None


class GenerationBody(Wire):
    """What completions and chat have in common."""

    unsupported = GENERATION

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    seed: Seed | None = None
    n: int | None = Field(None, ge=1)
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    stop: Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    # Labels: accepted, and left to the client's own records.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def _requests(
        self,
        request_id: str,
        prompts: Sequence[str | Sequence[int]],
        param: str,
        max_tokens: int | None,
        defaults: Defaults,
    ) -> list[GenerationRequest]:
        """n answers to each prompt, a prompt's side by side."""
        n = self.n or 1
        if n > defaults.max_n:
            raise InvalidRequest(f"n is limited to {defaults.max_n} here.", "n")
        if len(prompts) > defaults.max_prompts:
            raise InvalidRequest(f"A request may have {defaults.max_prompts} prompts here.", param)
        check_stops(self.stop or (), defaults.max_stop, defaults.max_stop_bytes)
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options goes with stream.", "stream_options")
        seed = secrets.randbits(64) if self.seed is None else self.seed
        return [
            GenerationRequest(
                id=request_id,
                prompt=prompt,
                prompt_param=param,
                max_tokens=max_tokens or defaults.max_tokens,
                max_tokens_asked=max_tokens is not None,
                sampling=SamplingParams(
                    temperature=defaults.temperature if self.temperature is None else self.temperature,
                    top_p=self.top_p or defaults.top_p,
                    top_k=max(0, defaults.top_k if self.top_k is None else self.top_k),
                    # Answers to one prompt must differ, and the first be that of n = 1.
                    seed=seed + answer & 0xFFFFFFFFFFFFFFFF,
                ),
                stop=tuple(self.stop or ()),
                n=n,
                priority=self.priority or 0,
            )
            for prompt in prompts
            for answer in range(n)
        ]


class CompletionBody(GenerationBody):
    prompt: Prompts

    def requests(self, request_id: str, defaults: Defaults) -> list[GenerationRequest]:
        return self._requests(request_id, self.prompt, "prompt", self.max_tokens, defaults)


class Message(Wire):
    unsupported = MESSAGE

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_text)]
    name: str | None = None
    tool_call_id: str | None = None


class ChatBody(GenerationBody):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    def requests(self, request_id: str, defaults: Defaults, template: ChatTemplate) -> list[GenerationRequest]:
        prompt = template.render([message.model_dump(exclude_none=True) for message in self.messages])
        max_tokens = self.max_completion_tokens or self.max_tokens
        return self._requests(request_id, [prompt], "messages", max_tokens, defaults)


Body = TypeVar("Body", bound=GenerationBody)


def parse(raw: bytes, kind: type[Body], unknown_fields: Literal["refuse", "ignore"]) -> Body:
    """A request body, checked.

    Raises:
        InvalidRequest: not JSON, or a field that does not fit; it is named.
    """
    try:
        values = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from error
    if not isinstance(values, dict):
        raise InvalidRequest("The body should be a JSON object.")
    try:
        return kind.model_validate(values, extra="ignore" if unknown_fields == "ignore" else "forbid")
    except ValidationError as error:
        raise _invalid(error) from error


def _invalid(error: ValidationError) -> InvalidRequest:
    problem = error.errors(include_url=False)[0]
    context = problem.get("ctx", {})
    # Validators of a whole object or list say in their context which part of it they mean.
    param = _path((*problem["loc"], *(context[key] for key in ("field", "index") if key in context)))
    if problem["type"] == "extra_forbidden":
        return UnknownParameter(f"Unknown parameter: {param}.", param)
    if problem["type"] == "unsupported":
        return UnsupportedParameter(f"{problem['msg']}.", param)
    return InvalidRequest(f"{param}: {problem['msg']}", param)


def _path(location: tuple[int | str, ...]) -> str:
    """('messages', 2, 'content') to 'messages[2].content'."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return path.removeprefix(".")
