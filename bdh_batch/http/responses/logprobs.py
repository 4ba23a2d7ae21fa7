"""Scores of tokens in OpenAI's two shapes: columns for completions, a list of objects for chat.

A token is named by its text; where its bytes are no text, as `bytes:\\xf0`; where they are not known, by its id.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import orjson

from bdh_batch.http.responses.json_pieces import between, in_pieces, one_list
from bdh_batch.messages import TokenScore
from bdh_batch.text.tokenizer import Tokenizer

Scores = Iterable[tuple[int, TokenScore]]  # each with where its token's text begins
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


def columns(tokenizer: Tokenizer, first: Sequence[int], scores: Scores, base: int = 0) -> list[bytes]:
    """Of completions, in pieces of JSON. A token is always among its own `top_logprobs`, which may be one more for it.

    Args:
        first: the token that nothing came before, and that has no score; or none.
        base: where in the text the offsets of the scores begin.
    """
    encoded: list[list[bytes]] = [[] for _ in COLUMNS]
    if first:
        for column, value in zip(encoded, ([known(tokenizer, first[0])[0]], [None], [None], [0])):
            column.append(orjson.dumps(value))
    for piece in in_pieces(scores, PIECE):
        for column, values in zip(encoded, _columns(tokenizer, piece, base)):
            column.append(orjson.dumps(values))
    members = ([b'"%b":' % name.encode(), *one_list(each)] for name, each in zip(COLUMNS, encoded))
    return [b"{", *between(b",", members), b"}"]


def _columns(tokenizer: Tokenizer, scores: Scores, base: int) -> tuple[list[Any], ...]:
    names: list[str] = []
    logprobs: list[float] = []
    tops: list[dict[str, float]] = []
    offsets: list[int] = []
    for begin, score in scores:
        own = known(tokenizer, score.token)[0]
        top: dict[str, float] = {}
        for token, logprob in score.top:
            top.setdefault(known(tokenizer, token)[0], logprob)  # of several with one name, the likeliest
        top.setdefault(own, score.logprob)
        names.append(own)
        logprobs.append(score.logprob)
        tops.append(top)
        offsets.append(base + begin)
    return names, logprobs, tops, offsets


def objects(tokenizer: Tokenizer, scores: Scores) -> list[bytes]:
    """Of chat, as pieces of JSON."""
    pieces = ([_with_top(tokenizer, score) for _, score in piece] for piece in in_pieces(scores, PIECE))
    return [b'{"content":', *one_list(map(orjson.dumps, pieces)), b',"refusal":null}']


def _with_top(tokenizer: Tokenizer, score: TokenScore) -> dict[str, Any]:
    told = _object(tokenizer, score.token, score.logprob)
    told["top_logprobs"] = [_object(tokenizer, token, logprob) for token, logprob in score.top]
    return told


def _object(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    name, raw = known(tokenizer, token)
    return {"token": name, "logprob": logprob, "bytes": raw}
