"""Tokens of a text as /tokenize tells of them."""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from bdh_batch.http.json_pieces import dump_list
from bdh_batch.text.tokenizer import Tokenizer


def tokenization(tokens: Sequence[int], max_model_len: int | None, tokenizer: Tokenizer | None) -> bytes:
    """The answer, as JSON; with a `tokenizer` also how its vocabulary spells each token."""
    head = {"count": len(tokens), "max_model_len": max_model_len}
    parts = [orjson.dumps(head)[:-1], b',"tokens":', dump_list(tokens)]
    if tokenizer is not None:
        names = {token: tokenizer.name(token) for token in set(tokens)}
        parts += [b',"token_strs":', dump_list([names[token] for token in tokens])]
    return b"".join([*parts, b"}"])
