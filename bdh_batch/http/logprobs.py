"""Scores of tokens in OpenAI's two shapes: columns for completions, a list of objects for chat.

A token is named by its text; where its bytes are no text, as `bytes:\\xf0`; where they are not known, by its id.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from bdh_batch.messages import TokenScore
from bdh_batch.text.tokenizer import Tokenizer

Scores = Iterable[tuple[int, TokenScore]]  # each with where its token's text begins


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


def columns(tokenizer: Tokenizer, first: Sequence[int], scores: Scores, base: int = 0) -> dict[str, list[Any]]:
    """Of completions. A token is always among its own `top_logprobs`, which may be one more for that.

    Args:
        first: the token that nothing came before, and that has no score; or none.
        base: where in the text the scores' places begin.
    """
    names = [known(tokenizer, token)[0] for token in first]
    logprobs: list[float | None] = [None] * len(first)
    tops: list[dict[str, float] | None] = [None] * len(first)
    offsets = [0] * len(first)
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
    return {"tokens": names, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def objects(tokenizer: Tokenizer, scores: Scores) -> dict[str, Any]:
    """Of chat."""
    content = []
    for _, score in scores:
        told = _object(tokenizer, score.token, score.logprob)
        told["top_logprobs"] = [_object(tokenizer, token, logprob) for token, logprob in score.top]
        content.append(told)
    return {"content": content, "refusal": None}


def _object(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    name, raw = known(tokenizer, token)
    return {"token": name, "logprob": logprob, "bytes": raw}
