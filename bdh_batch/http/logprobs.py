"""Scores of tokens in OpenAI's two shapes: columns for completions, a list of objects for chat.

A token is named by its text; where its bytes are no text, as `bytes:\\xf0`; where they are not known, by its id.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bdh_batch.messages import TokenScore
from bdh_batch.text.tokenizer import Tokenizer

Scores = Iterable[tuple[int, TokenScore]]  # each with where its token's text begins


def name(tokenizer: Tokenizer, token: int) -> str:
    raw = tokenizer.token_bytes(token)
    if raw is None:
        return f"token_id:{token}"
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def columns(tokenizer: Tokenizer, first: Sequence[int], scores: Scores, base: int = 0) -> dict[str, list[Any]]:
    """Of completions. A token is always among its own `top_logprobs`, which may be one more for that.

    Args:
        first: the token that nothing came before, and that has no score; or none.
        base: where in the text the scores' places begin.
    """
    rows = [(name(tokenizer, token), None, None, 0) for token in first] + [*_rows(tokenizer, scores, base)]
    names, logprobs, tops, offsets = (list(column) for column in zip(*rows)) if rows else ([], [], [], [])
    return {"tokens": names, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def _rows(tokenizer: Tokenizer, scores: Scores, base: int) -> Iterator[tuple[str, Any, Any, int]]:
    for begin, score in scores:
        own = name(tokenizer, score.token)
        top: dict[str, float] = {}
        for token, logprob in score.top:
            top.setdefault(name(tokenizer, token), logprob)  # of several with one name, the likeliest
        top.setdefault(own, score.logprob)
        yield own, score.logprob, top, base + begin


def objects(tokenizer: Tokenizer, scores: Scores) -> dict[str, Any]:
    """Of chat."""
    content = []
    for _, score in scores:
        top = [_object(tokenizer, token, logprob) for token, logprob in score.top]
        content.append(_object(tokenizer, score.token, score.logprob) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _object(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token)
    return {"token": name(tokenizer, token), "logprob": logprob, "bytes": None if raw is None else list(raw)}
