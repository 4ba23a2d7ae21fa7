"""Scores of tokens in OpenAI's two shapes, columns for completions and a list of objects for chat, and in vLLM's for
those of a prompt.

A token is named by its text; where its bytes are no text, as `bytes:\\xf0`; where they are not known, by its id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

import orjson

from bdh_batch.http.responses.json_pieces import between, in_pieces, one_list
from bdh_batch.messages import TokenScore
from bdh_batch.text.tokenizer import Tokenizer

Scores = Iterable[tuple[int, TokenScore]]  # each with where its token's text begins
Name = Callable[[int], tuple[str, Sequence[int] | None]]  # of a token: what it is called, and its bytes
PIECE = 512  # scores; each may have twenty more tokens in it
COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


@lru_cache(2**16)
def known(tokenizer: Tokenizer, token: int) -> tuple[str, Sequence[int] | None]:
    """The token's name, and its bytes."""
    raw = tokenizer.token_bytes(token)
    if raw is None:
        return f"token_id:{token}", None
    try:
        return raw.decode(), tuple(raw)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), tuple(raw)


def by_id(tokenizer: Tokenizer, token: int) -> tuple[str, Sequence[int] | None]:
    """As `known`, but that the name is the token's id, as all names are then."""
    return f"token_id:{token}", known(tokenizer, token)[1]


def columns(name: Name, first: Sequence[int], scores: Scores, most: int, base: int = 0) -> list[bytes]:
    """Of completions, in pieces of JSON. A token is always among its own `top_logprobs`, which may be one more for it.

    Args:
        first: the token that nothing came before, and that has no score; or none.
        most: of the likeliest tokens that scores have, so many are shown.
        base: where in the text the offsets of the scores begin.
    """
    encoded: list[list[bytes]] = [[] for _ in COLUMNS]
    if first:
        for column, value in zip(encoded, ([name(first[0])[0]], [None], [None], [0])):
            column.append(orjson.dumps(value))
    for piece in in_pieces(scores, PIECE):
        for column, values in zip(encoded, _columns(name, piece, most, base)):
            column.append(orjson.dumps(values))
    members = ([b'"%b":' % heading.encode(), *one_list(each)] for heading, each in zip(COLUMNS, encoded))
    return [b"{", *between(b",", members), b"}"]


def _columns(name: Name, scores: Scores, most: int, base: int) -> tuple[list[Any], ...]:
    names: list[str] = []
    logprobs: list[float] = []
    tops: list[dict[str, float]] = []
    offsets: list[int] = []
    for begin, score in scores:
        own = name(score.token)[0]
        top: dict[str, float] = {}
        for token, logprob in islice(score.top, most):
            top.setdefault(name(token)[0], logprob)  # of several with one name, the likeliest
        top.setdefault(own, score.logprob)
        names.append(own)
        logprobs.append(score.logprob)
        tops.append(top)
        offsets.append(base + begin)
    return names, logprobs, tops, offsets


def objects(name: Name, scores: Scores) -> list[bytes]:
    """Of chat, as pieces of JSON."""
    pieces = ([_with_top(name, score) for _, score in piece] for piece in in_pieces(scores, PIECE))
    return [b'{"content":', *one_list(map(orjson.dumps, pieces)), b',"refusal":null}']


def _with_top(name: Name, score: TokenScore) -> dict[str, Any]:
    fields = _object(name, score.token, score.logprob)
    fields["top_logprobs"] = [_object(name, token, logprob) for token, logprob in score.top]
    return fields


def _object(name: Name, token: int, logprob: float) -> dict[str, Any]:
    text, raw = name(token)
    return {"token": text, "logprob": logprob, "bytes": raw}


def of_prompt(tokenizer: Tokenizer, scores: Iterable[TokenScore], most: int) -> list[bytes]:
    """Of a prompt's tokens, as vLLM has them, in pieces of JSON: by token id, the token itself and the likeliest; null
    for the first, which nothing came before. Tokens are named by their texts in any case, as they have ids."""
    pieces = ([_ranked(tokenizer, score, most) for score in piece] for piece in in_pieces(scores, PIECE))
    return one_list([b"[null]", *map(orjson.dumps, pieces)])


def _ranked(tokenizer: Tokenizer, score: TokenScore, most: int) -> dict[str, Any]:
    found = [(score.token, score.logprob, score.rank)]
    likeliest = islice(score.top, most)
    found += [(token, logprob, rank) for rank, (token, logprob) in enumerate(likeliest, 1) if token != score.token]
    return {
        str(token): {"logprob": logprob, "rank": rank, "decoded_token": known(tokenizer, token)[0]}
        for token, logprob, rank in found
    }
