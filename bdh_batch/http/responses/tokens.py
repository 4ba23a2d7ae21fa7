"""Tokens of a text as /tokenize reports them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import orjson

from bdh_batch.http.responses.json_pieces import in_pieces, one_list
from bdh_batch.text.tokenizer import Tokenizer

CACHED_NAMES = 2**16  # names of tokens


def tokenization(tokens: Sequence[int], max_model_len: int | None, tokenizer: Tokenizer | None) -> list[bytes]:
    """The pieces of the response; with a `tokenizer` also how its vocabulary spells each token."""
    head = orjson.dumps({"count": len(tokens), "max_model_len": max_model_len})[:-1]
    pieces = [head, b',"tokens":', *one_list(map(orjson.dumps, in_pieces(tokens)))]
    names = [b"null"]
    if tokenizer is not None:
        name = lru_cache(CACHED_NAMES)(tokenizer.name)
        names = one_list(orjson.dumps(list(map(name, piece))) for piece in in_pieces(tokens))
    return [*pieces, b',"token_strs":', *names, b"}"]
