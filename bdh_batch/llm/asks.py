"""Makes requests of the Python API: bodies, as clients of a server would send them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bdh_batch.http.schema.requests import ChatBody, CompletionBody
from bdh_batch.http.schema.text import EmbeddingBody
from bdh_batch.llm.outputs import State
from bdh_batch.llm.params import SamplingParams, spread
from bdh_batch.llm.prompts import Plain
from bdh_batch.llm.requests import Ask, encoded, named
from bdh_batch.llm.states import id_of

Fields = Mapping[str, Any]


class Parameters:
    """Sampling parameters as the members of a body; those of one object are encoded once.

    Args:
        given: those of all prompts, a list of one for each, or None for `default`.
        others: fields that all requests have.
    """

    def __init__(
        self, given: object, default: SamplingParams, count: int, chat: bool = False, others: Fields | None = None
    ) -> None:
        self._given: list[SamplingParams | None] = spread(given, count, "sampling_params", SamplingParams)
        self._default = default
        self._chat = chat
        self._others = {name: value for name, value in (others or {}).items() if value is not None}
        self._prefix = "sampling_params[{}]." if isinstance(given, list | tuple) else ""
        self._encoded: dict[int, tuple[bytes, int]] = {}

    def of(self, index: int) -> tuple[bytes, int, str]:
        """The members, how many sequences they ask for, and what errors put before their names.

        Raises InvalidRequest.
        """
        params, prefix = self._given[index] or self._default, self._prefix.format(index)
        if id(params) not in self._encoded:
            with named({"": prefix}):
                sequences = params.n if type(params.n) is int else 1  # what else it is, the body's own check says
                self._encoded[id(params)] = encoded(params.body(self._chat) | self._others), max(1, sequences)
        return *self._encoded[id(params)], prefix


def completions(
    prompts: Sequence[tuple[str, Plain]], parameters: Parameters, states: Sequence[State | str | None], extra: Fields
) -> Iterator[Ask[CompletionBody]]:
    """Requests to /v1/completions.

    Args:
        prompts: each after what errors call it.
        states: that they begin in.
        extra: a list for each of some fields, with one for each prompt.
    """
    for index, (name, prompt) in enumerate(prompts):
        members, sequences, prefix = parameters.of(index)
        own = {"prompt": prompt, **_own(index, states, extra)}
        with named({"prompt": name}):
            raw = b"{%b,%b}" % (encoded(own), members)
        names = {"prompt": name, "": prefix, "state": "state"}
        yield Ask(CompletionBody, raw, names, prompt if isinstance(prompt, str) else None, sequences)


def chats(
    conversations: Sequence[tuple[str, list[Any]]],
    parameters: Parameters,
    states: Sequence[State | str | None],
    extra: Fields,
) -> Iterator[Ask[ChatBody]]:
    """Requests to /v1/chat/completions."""
    for index, (name, messages) in enumerate(conversations):
        members, sequences, prefix = parameters.of(index)
        plain = [dict(each) if isinstance(each, Mapping) else each for each in messages]
        with named({"messages": name}):
            raw = b"{%b,%b}" % (encoded({"messages": plain, **_own(index, states, extra)}), members)
        yield Ask(ChatBody, raw, {"messages": name, "": prefix, "state": "state"}, None, sequences)


def embeddings(prompts: Sequence[tuple[str, Plain]], others: Fields) -> Iterator[Ask[EmbeddingBody]]:
    """Requests to /v1/embeddings."""
    shared = {name: value for name, value in others.items() if value is not None}
    for name, prompt in prompts:
        with named({"input": name}):
            raw = b"{%b}" % encoded({"input": prompt, **shared})
        yield Ask(EmbeddingBody, raw, {"input": name})


def scored(name: str, tokens: Sequence[int]) -> Ask[CompletionBody]:
    """A request for the logprobs of a prompt."""
    fields = {"prompt": [*tokens], "max_tokens": 0, "echo": True, "prompt_logprobs": 1}
    return Ask(CompletionBody, b"{%b}" % encoded(fields), {"prompt": name})


def neurons(name: str, prompt: Plain, top: int) -> Ask[CompletionBody]:
    """A request for the neurons of a prompt's tokens."""
    with named({"prompt": name, "neurons": "top"}):
        raw = encoded({"prompt": prompt, "max_tokens": 0, "echo": True, "neurons": {"top": top}})
    given = prompt if isinstance(prompt, str) else None
    return Ask(CompletionBody, b"{%b}" % raw, {"prompt": name, "neurons.top": "top"}, given)


def _own(index: int, states: Sequence[State | str | None], extra: Fields) -> dict[str, Any]:
    """The fields of one request alone. Raises InvalidRequest."""
    own = {name: values[index] for name, values in extra.items() if values[index] is not None}
    if (state := states[index]) is not None:
        own["state"] = id_of(state)
    return own
