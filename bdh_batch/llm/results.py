"""Makes what the Python API returns of what a request's sequences gained."""

from __future__ import annotations

from itertools import islice

import orjson

from bdh_batch.http.responses.embeddings import normalised
from bdh_batch.http.responses.logprobs import known
from bdh_batch.http.responses.tokens import fired
from bdh_batch.llm.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    LayerNeurons,
    Logprob,
    Neuron,
    NeuronsRequestOutput,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
    TokenNeurons,
)
from bdh_batch.llm.requests import Ended
from bdh_batch.messages import Delta, FinishReason, GenerationRequest, Neurons, TokenLogprob
from bdh_batch.text.tokenizer import Tokenizer


def request_output(ended: Ended, tokenizer: Tokenizer) -> RequestOutput:
    """The completions of one prompt."""
    started, first = ended.started, ended.ends[0]
    given = started.request.prompt_logprobs
    entries = first.prompt_logprobs
    return RequestOutput(
        request_id=started.id,
        prompt=started.prompt,
        prompt_token_ids=[*started.generation.prompts[0]],
        outputs=[completion(index, end, started.request, tokenizer) for index, end in enumerate(ended.ends)],
        prompt_logprobs=None
        if given is None
        else [None, *(_by_token(tokenizer, entry, given) for entry in entries or ())],
        num_cached_tokens=started.generation.cached_tokens[0],
        latent_token_ids=[] if started.request.latent is None else started.request.latent.tokens,
    )


def completion(index: int, delta: Delta, request: GenerationRequest, tokenizer: Tokenizer) -> CompletionOutput:
    """A completion, or the piece of one that a delta is."""
    top = None if request.sampling is None else request.sampling.logprobs
    return CompletionOutput(
        index=index,
        text=delta.text,
        token_ids=delta.tokens,
        cumulative_logprob=None if top is None else delta.logprob,
        logprobs=None if top is None else [_by_token(tokenizer, entry, top) for _, entry in delta.logprobs or ()],
        finish_reason=None if delta.finish_reason is None else str(delta.finish_reason),
        stop_reason=_stop_reason(delta, request),
    )


def embedding(ended: Ended, dimensions: int | None) -> EmbeddingRequestOutput:
    """The embedding of one prompt."""
    started, pooled = ended.started, ended.ends[0].pooled
    assert pooled is not None
    return EmbeddingRequestOutput(
        request_id=started.id,
        outputs=EmbeddingOutput(normalised(pooled[:dimensions])),
        prompt_token_ids=[*started.generation.prompts[0]],
        num_cached_tokens=started.generation.cached_tokens[0],
    )


def score(ended: Ended, begin: int) -> ScoringRequestOutput:
    """The score of a text: of the tokens from index `begin` on, which is 1 at least."""
    started = ended.started
    entries = [*islice(ended.ends[0].prompt_logprobs or (), begin - 1, None)]
    logprobs = [entry.logprob for entry in entries]
    tokens = [*started.generation.prompts[0]]
    return ScoringRequestOutput(
        request_id=started.id,
        outputs=ScoringOutput(
            score=sum(logprobs),
            token_ids=tokens[begin:],
            logprobs=logprobs,
            is_greedy=all(entry.top[0][0] == entry.token for entry in entries),
        ),
        prompt_token_ids=tokens[:begin],
        num_cached_tokens=started.generation.cached_tokens[0],
    )


def neurons(ended: Ended, tokenizer: Tokenizer) -> NeuronsRequestOutput:
    """The neurons of one prompt's tokens."""
    started, entries = ended.started, ended.ends[0].neurons or ()
    return NeuronsRequestOutput(
        request_id=started.id,
        prompt=started.prompt,
        prompt_token_ids=[*started.generation.prompts[0]],
        outputs=[TokenNeurons(each.token, known(tokenizer, each.token)[0], _layers(each)) for each in entries],
    )


def _layers(entry: Neurons) -> list[LayerNeurons]:
    return [
        LayerNeurons(
            layer["active"], [Neuron(each["head"], each["neuron"], each["value"]) for each in layer["strongest"]]
        )
        for layer in orjson.loads(fired(entry))["layers"]
    ]


def _stop_reason(delta: Delta, request: GenerationRequest) -> int | str | None:
    if delta.finish_reason is not FinishReason.STOP:
        return None
    if delta.stop is not None:
        return delta.stop
    last = delta.tokens[-1] if delta.tokens else None
    return last if last in request.stop_token_ids else None


def _by_token(tokenizer: Tokenizer, entry: TokenLogprob, most: int) -> dict[int, Logprob]:
    """The token itself, then the likeliest."""
    likeliest = [*islice(entry.top, most)]
    ranks = {token: rank for rank, (token, _) in enumerate(entry.top, 1)}
    found = {entry.token: (entry.logprob, entry.rank or ranks.get(entry.token))}
    for rank, (token, logprob) in enumerate(likeliest, 1):
        found.setdefault(token, (logprob, rank))
    return {token: Logprob(logprob, rank, known(tokenizer, token)[0]) for token, (logprob, rank) in found.items()}
