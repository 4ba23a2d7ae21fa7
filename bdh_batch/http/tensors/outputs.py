"""What is generated, as output tensors: of a whole response, and of each step of a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from bdh_batch.errors import InvalidRequest
from bdh_batch.http.responses.frames import CompletionFrames, ResponseOptions
from bdh_batch.http.responses.logprobs import of_prompt
from bdh_batch.http.schema.requests import CompletionBody
from bdh_batch.http.tensors.tensor import BYTES, Tensor
from bdh_batch.messages import UNKNOWN_TOKEN, Delta, Usage
from bdh_batch.text.tokenizer import Tokenizer

UNFINISHED = "null"  # the finish_reason of a stream's responses before the last


@dataclass(frozen=True, slots=True)
class Output:
    """An output that a response may have.

    Args:
        streamed, whole: whether a stream's responses have it, and whole ones.
        parameter: without which it is not there.
        last: whether only the last response of a stream has it.
    """

    datatype: str
    shape: tuple[int, ...]
    help: str
    whole: bool = True
    streamed: bool = True
    parameter: str | None = None
    last: bool = False


OUTPUTS: Mapping[str, Output] = {
    "text": Output(BYTES, (-1,), "The completion of each choice.", streamed=False),
    "token": Output(BYTES, (1,), "The text that a step adds to a choice; empty in its last response.", whole=False),
    "finish_reason": Output(BYTES, (-1,), "stop or length, of each choice; null in a stream before the last response."),
    "index": Output("INT32", (1,), "The choice that the response is of.", whole=False),
    "token_ids": Output("INT32", (-1,), "The tokens of the completions, one choice after the other."),
    "token_count": Output("INT32", (-1,), "How many of the token_ids are each choice's.", streamed=False),
    "prompt_token_ids": Output(
        "INT32", (-1,), "The tokens of the prompts, one choice after the other.", True, False, "return_token_ids"
    ),
    "prompt_token_count": Output(
        "INT32", (-1,), "How many of the prompt_token_ids are each choice's.", True, False, "return_token_ids"
    ),
    "logprobs": Output(BYTES, (-1,), "JSON of each choice, as in /v1/completions.", parameter="logprobs"),
    "prompt_logprobs": Output(
        BYTES, (-1,), "JSON of each choice, as in /v1/completions.", True, False, "prompt_logprobs"
    ),
    "prompt_tokens": Output("INT32", (1,), "Tokens of all prompts.", last=True),
    "completion_tokens": Output("INT32", (1,), "Tokens of all completions.", last=True),
    "cached_tokens": Output("INT32", (1,), "Tokens of prompts that came from the prefix cache.", last=True),
    "reasoning_tokens": Output(
        "INT32", (1,), "Of the completion_tokens, those that were latent steps; where the model has such.", last=True
    ),
    "usage_estimated": Output("BOOL", (1,), "Whether these are estimates, as an upstream did not say.", last=True),
    "warnings": Output(
        BYTES, (1,), "JSON: what was left out of a schema that is not strict; where something was.", last=True
    ),
}


def selection(names: Sequence[str], streamed: bool, body: CompletionBody) -> frozenset[str]:
    """The outputs that a response has: the named ones; all, where none is named. Raises InvalidRequest."""
    known = [name for name, output in OUTPUTS.items() if (output.streamed if streamed else output.whole)]
    for at, name in enumerate(names):
        if name not in known:
            of = "of a stream" if streamed else "of a whole response"
            text = f"{name[:128]!r} is no output {of}; these are: {', '.join(known)}."
            raise InvalidRequest(text, f"outputs[{at}].name")
        if (needed := OUTPUTS[name].parameter) is not None and getattr(body, needed) in (None, False):
            raise InvalidRequest(f"The output {name} needs the parameter {needed}.", f"outputs[{at}].name")
    return frozenset(names or known)


class Outputs(CompletionFrames):
    """Makes the output tensors of one request.

    Args:
        selected: the names of the outputs that are returned.
    """

    def __init__(self, options: ResponseOptions, tokenizer: Tokenizer, selected: frozenset[str]) -> None:
        super().__init__(options, tokenizer)
        self._selected = selected
        self._unsaid_ids: dict[int, list[int]] = {}  # of tokens whose text is still held back
        self._left_out = ""

    def warn(self, warnings: Sequence[Mapping[str, str]]) -> None:
        self._left_out = orjson.dumps(list(warnings)).decode() if warnings else ""

    def tensors(self, prompts: Sequence[Sequence[int]], usage: Usage, ends: Sequence[Delta]) -> Sequence[Tensor]:
        """The outputs of a whole response; `ends` holds all that each sequence gained."""
        self._begin(prompts)
        rows = self._best(ends)
        parts = [self._parts(row, ends[row]) for row in rows]
        tokens, of_prompts = [_known(ends[row].tokens) for row in rows], [prompts[row] for row in rows]
        found: dict[str, list[Any]] = {
            "text": [text for text, _ in parts],
            "finish_reason": [str(ends[row].finish_reason) for row in rows],
            "token_ids": [token for each in tokens for token in each],
            "token_count": [*map(len, tokens)],
            **self._of_usage(usage),
        }
        options = self._options
        if options.token_ids:
            found["prompt_token_ids"] = [token for prompt in of_prompts for token in prompt]
            found["prompt_token_count"] = [*map(len, of_prompts)]
        if options.logprobs is not None:
            found["logprobs"] = [b"".join(pieces).decode() for _, pieces in parts]
        if (most := options.prompt_logprobs) is not None:
            encoded = (of_prompt(self._tokenizer, ends[row].prompt_logprobs or (), most) for row in rows)
            found["prompt_logprobs"] = [b"".join(pieces).decode() for pieces in encoded]
        return self._made(found)

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """Has a stream begin."""
        self._begin(prompts)

    def step(self, index: int, delta: Delta, usage: Usage | None) -> Sequence[Sequence[Tensor]]:
        """The outputs of each of the responses of a stream that a delta becomes.

        One has the text, and where the choice ends, another one why; none where nothing can be shown yet.

        Args:
            usage: so far, where the last response has it.
        """
        text, logprobs = self._parts(index, delta)
        ids = self._unsaid_ids.pop(index, []) + _known(delta.tokens)
        ended = delta.finish_reason is not None
        if not text and not (delta.logprobs or ended):
            self._unsaid_ids[index] = ids
            return []
        found: list[dict[str, list[Any]]] = []
        if text or delta.logprobs:
            found.append({"token": [text], "finish_reason": [UNFINISHED], "index": [index], "token_ids": ids})
            ids = []
            if self._options.logprobs is not None:
                found[-1]["logprobs"] = [b"".join(logprobs).decode()]
        if ended:
            reason = str(delta.finish_reason)
            found.append({"token": [""], "finish_reason": [reason], "index": [index], "token_ids": ids})
        if usage is not None:
            found[-1] |= self._of_usage(usage)
        return [self._made(each) for each in found]

    def _of_usage(self, usage: Usage) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {
            "prompt_tokens": [usage.prompt_tokens],
            "completion_tokens": [usage.completion_tokens],
            "cached_tokens": [usage.cached_tokens],
            "usage_estimated": [usage.estimated],
        }
        if usage.reasoning_tokens is not None:
            found["reasoning_tokens"] = [usage.reasoning_tokens]
        return found | ({"warnings": [self._left_out]} if self._left_out else {})

    def _made(self, found: Mapping[str, list[Any]]) -> list[Tensor]:
        return [
            Tensor.of(name, OUTPUTS[name].datatype, values) for name, values in found.items() if name in self._selected
        ]


def _known(tokens: list[int]) -> list[int]:
    """The tokens' ids; none where an upstream did not say them."""
    return [] if UNKNOWN_TOKEN in tokens else tokens
