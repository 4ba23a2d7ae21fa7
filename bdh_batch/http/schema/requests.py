"""Request bodies as they come over the wire: types and ranges, and their translation into generation requests.

Types are strict: "5" is not a number. A field that the API knows but this server cannot honour yet is refused by name,
unless it says what leaving it out would say.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationInfo,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from bdh_batch.backends.base import RawPrompt
from bdh_batch.errors import InvalidRequest
from bdh_batch.http.request.sizes import AtMost, FreeObject, Label, passed_on
from bdh_batch.http.request.strict import Wire
from bdh_batch.http.schema.chat import ConversationBody
from bdh_batch.http.schema.other_names import CHAT, COMPLETION, GENERATION, STREAM_OPTIONS, UNRELAYED
from bdh_batch.http.schema.prompts import PromptList, Salt, Truncation, last_tokens, salted, to_prompts
from bdh_batch.http.schema.response_format import Formatted
from bdh_batch.messages import (
    GenerationRequest,
    Grammar,
    LatentOptions,
    LatentSteps,
    LogitBias,
    NeuronsAsked,
    Origin,
    Prompt,
    SamplingParams,
)
from bdh_batch.messages.latent import refuse_latent_steps
from bdh_batch.settings import MAX_PRIORITY
from bdh_batch.text.calls import OPEN
from bdh_batch.text.sources import Source

MAX_LOGPROBS = 20
MAX_CHUNK = 1024
MAX_NEURONS, SHOWN_NEURONS = 128, 16  # of one layer, for a token; at most, and where a request does not say


@dataclass(frozen=True, slots=True)
class Defaults:
    """The defaults of sampling parameters that a request leaves out."""

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    latent: LatentOptions | None = None  # None: the model has no latent steps


def _stops(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _biases(values: object, one: Callable[[object], dict[str, float]]) -> dict[str, float]:
    """Token ids to biases, validated one by one: the first that is wrong is the only one that is reported."""
    if not isinstance(values, dict):
        return one(values)
    biases: dict[str, float] = {}
    for token, bias in values.items():
        # More digits than int64 has: no vocabulary is so large.
        if not (token.isascii() and token.isdecimal() and token == str(int(token[:18]))):
            raise PydanticCustomError("token", "Keys should be token ids", {"field": token})
        biases |= one({token: bias})
    return biases


def _seed_bits(value: int) -> int:
    return value & 0xFFFFFFFFFFFFFFFF


TokenIds = list[Annotated[int, Field(ge=0)]]
StopString = Annotated[str, Field(min_length=1), AtMost("max_stop_bytes")]
StopStrings = Annotated[list[StopString], AtMost("max_stop")]
Stops = Annotated[StopStrings, BeforeValidator(_stops, json_schema_input_type=StopString | StopStrings)]
Bias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    Field(json_schema_extra={"propertyNames": {"pattern": "^(0|[1-9][0-9]{0,17})$"}}),
    WrapValidator(_biases),
    AtMost("max_logit_bias"),
]
Seed = Annotated[int, Field(ge=-(2**63), le=2**64 - 1), AfterValidator(_seed_bits)]
ChoiceCount = Annotated[int, Field(ge=1), AtMost("max_n")]
BadWord = Annotated[str, Field(min_length=1), AtMost("max_bad_word_bytes")]
AllowedTokens = Annotated[TokenIds, Field(min_length=1), AtMost("max_allowed_token_ids")]


class StreamOptions(Wire):
    """The field `stream_options`: what a stream contains besides text."""

    unsupported = STREAM_OPTIONS

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    chunk_tokens: int | None = Field(None, ge=1, le=MAX_CHUNK)


class NeuronFields(Wire):
    """The field `neurons`: what the response shows of the neurons that its tokens fire."""

    top: int | None = Field(None, ge=1, le=MAX_NEURONS)


class SamplingFields(Wire):
    """The fields that say how tokens are chosen, and when a completion ends: the same in all APIs that have them."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, allow_inf_nan=False)
    logit_bias: Bias | None = None
    seed: Seed | None = None
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    stop: Stops | None = None
    stop_token_ids: Annotated[TokenIds, AtMost("max_stop_token_ids")] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0)
    bad_words: Annotated[list[BadWord], AtMost("max_bad_words")] | None = None
    allowed_token_ids: AllowedTokens | None = None
    skip_special_tokens: bool | None = None
    cache_salt: Salt | None = None
    latent_steps: int | None = Field(None, ge=0)
    update_latent_memory: bool | None = None


class GenerationBody(Formatted, SamplingFields):
    """The fields that completions and chat share."""

    unsupported = GENERATION
    relayed = frozenset(GENERATION) - UNRELAYED

    model: Label | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: ChoiceCount | None = None
    reasoning_effort: Annotated[Label, Field(min_length=1)] | None = None
    truncate_prompt_tokens: Truncation | None = None
    state: Label | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    neurons: NeuronFields | None = None
    return_tokens_as_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    # Labels: accepted, and left to the client's own records.
    user: Label | None = None
    safety_identifier: Label | None = None
    request_id: Label | None = None
    prompt_cache_key: Label | None = None
    metadata: FreeObject | None = None
    store: bool | None = None
    labels: ClassVar[frozenset[str]] = frozenset(
        ("user", "safety_identifier", "request_id", "prompt_cache_key", "metadata", "store")
    )
    _written: Mapping[str, Any] = PrivateAttr(default_factory=dict)
    _passed_on: frozenset[str] = PrivateAttr(frozenset())

    @model_validator(mode="wrap")
    @classmethod
    def _as_it_came(cls, values: object, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        if not isinstance(values, dict):
            return handler(values)
        more = passed_on(info)
        unknown = frozenset(more or ()) - cls.names
        made = handler({name: value for name, value in values.items() if name not in unknown})
        made._written = values
        if more is not None:
            made._passed_on = cls.relayed.union(more)
        return made

    @property
    def written(self) -> Mapping[str, Any]:
        """The fields that say something, as they came, without labels: for those who pass a request on."""
        names = (self.names - self.labels) | self._passed_on
        return {name: value for name, value in self._written.items() if value is not None and name in names}

    @property
    def options(self) -> StreamOptions:
        return self.stream_options or StreamOptions()

    @property
    def tries(self) -> int:
        """Choices for each prompt that are computed."""
        return self.n or 1

    @property
    def top(self) -> int | None:
        """Likeliest tokens that are returned with each log-probability; None where none of it is."""
        raise NotImplementedError

    @property
    def echoes(self) -> bool:
        return False

    @property
    def said(self) -> str:
        """What each response begins with that is no part of what is generated."""
        return ""

    @property
    def stop_before(self) -> str:
        """A text from which on a response has no stop strings in it; empty where there is none."""
        return ""

    @property
    def asked(self) -> tuple[int | None, str]:
        """The most tokens of a completion, if it says so, and in which field."""
        return self.max_tokens, "max_tokens"

    def check(self, defaults: Defaults) -> None:
        """Raises InvalidRequest where its fields contradict each other."""
        asked, _ = self.asked
        max_tokens = defaults.max_tokens if asked is None else asked
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options can only be used with stream: true.", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest("prompt_logprobs cannot be used with stream.", "prompt_logprobs")
        if self.state is not None:
            for name, given in (("prompt_logprobs", self.prompt_logprobs is not None), ("echo", self.echoes)):
                if given:
                    raise InvalidRequest(f"{name} cannot be used with state: its tokens are not computed again.", name)
        if self.min_tokens is not None and self.min_tokens > max_tokens:
            raise InvalidRequest(f"min_tokens should be at most max_tokens, which is {max_tokens}.", "min_tokens")

    def latent(self, defaults: Defaults) -> LatentSteps | None:
        """The latent steps that it asks for; None where the model has none. Raises InvalidRequest."""
        asked = self.latent_steps, self.reasoning_effort, self.update_latent_memory is False
        if defaults.latent is None:
            refuse_latent_steps(*asked)
            return None
        return defaults.latent.asked(*asked, scores=self.max_tokens == 0)

    def last_tokens(self, defaults: Defaults, room: int | None) -> int | None:
        """How many of a prompt's last tokens are kept, where the model takes `room`; None is all of them."""
        asked, _ = self.asked
        # A default gives way, but not to one token.
        completion = min(defaults.max_tokens, (room or 0) // 2) if asked is None else asked
        return last_tokens(self.truncate_prompt_tokens, room, completion)

    def request(
        self, origin: Origin, prompts: Sequence[Prompt], defaults: Defaults, grammar: Grammar | None
    ) -> GenerationRequest:
        asked, param = self.asked
        return GenerationRequest(
            origin=origin,
            prompts=prompts,
            max_tokens=defaults.max_tokens if asked is None else asked,
            max_tokens_param=None if asked is None else param,
            sampling=self._sampling(defaults),
            seeds=self._seeds(len(prompts)),
            n=self.tries,
            stop=tuple(self.stop or ()),
            stop_before=self.stop_before,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            include_stop=bool(self.include_stop_str_in_output),
            ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0,
            bad_words=tuple(self.bad_words or ()),
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            show_special=self.skip_special_tokens is False,
            prompt_logprobs=self._prompt_logprobs(),
            neurons=None if self.neurons is None else NeuronsAsked(self.neurons.top or SHOWN_NEURONS, self.echoes),
            grammar=grammar,
            salt=salted(self.cache_salt),
            priority=self.priority or 0,
        )

    def _prompt_logprobs(self) -> int | None:
        """Returns how many likeliest tokens the prompt's logprobs have to contain; None where none are needed."""
        wanted = [self.prompt_logprobs, self.top if self.echoes else None]
        return max((each for each in wanted if each is not None), default=None)

    def _seeds(self, prompts: int) -> list[int]:
        """One for each response: those to one prompt differ, and each is that of a request of its own, as in vLLM."""
        if self.seed is None:
            return [secrets.randbits(64) for _ in range(prompts * self.tries)]
        return [self.seed + choice & 0xFFFFFFFFFFFFFFFF for choice in range(self.tries)] * prompts

    def _sampling(self, defaults: Defaults) -> SamplingParams:
        ranked = self.tries > (self.n or 1)
        return SamplingParams(
            temperature=defaults.temperature if self.temperature is None else self.temperature,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            top_k=max(0, defaults.top_k if self.top_k is None else self.top_k),
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            logit_bias=LogitBias.of({int(token): bias for token, bias in (self.logit_bias or {}).items()}),
            logprobs=0 if ranked and self.top is None else self.top,
        )


class CompletionBody(GenerationBody):
    """The body of a request to /v1/completions."""

    unsupported = COMPLETION

    prompt: Annotated[list[Any], PromptList("max_prompts")]
    add_special_tokens: bool | None = None
    max_tokens: int | None = Field(None, ge=0)
    best_of: ChoiceCount | None = None
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def tries(self) -> int:
        return self.best_of or self.n or 1

    @property
    def top(self) -> int | None:
        return self.logprobs

    @property
    def echoes(self) -> bool:
        return bool(self.echo)

    def check(self, defaults: Defaults) -> None:
        n = self.n or 1
        if self.tries < n:
            raise InvalidRequest(f"best_of should be at least n, which is {n}.", "best_of")
        if self.tries > n and self.stream:
            raise InvalidRequest("best_of cannot be used with stream: the best are known at the end.", "best_of")
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("max_tokens should be at least 1; 0 can only be used with echo.", "max_tokens")
        super().check(defaults)

    def prompts(self) -> list[RawPrompt]:
        return [("prompt", prompt) for prompt in to_prompts(self.prompt, self.add_special_tokens)]


class ChatBody(ConversationBody, GenerationBody):
    """The body of a request to /v1/chat/completions."""

    unsupported = CHAT

    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None

    @property
    def top(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    @property
    def said(self) -> str:
        """What a response begins with: with `echo`, what the assistant said last, if it was the last to speak."""
        last = self.messages[-1]
        return (last.content or "") if self.echo and last.role == "assistant" else ""

    @property
    def stop_before(self) -> str:
        return OPEN if self.may_call else ""

    @property
    def asked(self) -> tuple[int | None, str]:
        if self.max_completion_tokens is None:
            return self.max_tokens, "max_tokens"
        return self.max_completion_tokens, "max_completion_tokens"

    def check(self, defaults: Defaults) -> None:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs can only be used with logprobs: true.", "top_logprobs")
        if self.max_completion_tokens is not None and self.max_tokens not in (None, self.max_completion_tokens):
            raise InvalidRequest(
                "max_tokens and max_completion_tokens should be equal where both are set.", "max_tokens"
            )
        super().check(defaults)

    def source(self) -> Source | None:
        return self.calls(self.structured_output(), super().source()) if self.may_call else super().source()
