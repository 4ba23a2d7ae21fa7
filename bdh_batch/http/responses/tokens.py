"""Tokens beside their text: as /tokenize reports them, and with the neurons that they fired."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import orjson

from bdh_batch.http.responses.json_pieces import in_pieces, one_list
from bdh_batch.messages import Neurons
from bdh_batch.text.tokenizer import Tokenizer

CACHED_NAMES = 2**16  # names of tokens
FLOAT, FLOATS = 4, orjson.OPT_SERIALIZE_NUMPY  # bytes of a float32; which is written in as few digits as it needs
PIECE = 32  # tokens with their neurons, of which each may have some thousand


def tokenization(tokens: Sequence[int], max_model_len: int | None, tokenizer: Tokenizer | None) -> list[bytes]:
    """The pieces of the response; with a `tokenizer` also how its vocabulary spells each token."""
    head = orjson.dumps({"count": len(tokens), "max_model_len": max_model_len})[:-1]
    pieces = [head, b',"tokens":', *one_list(map(orjson.dumps, in_pieces(tokens)))]
    names = [b"null"]
    if tokenizer is not None:
        name = lru_cache(CACHED_NAMES)(tokenizer.name)
        names = one_list(orjson.dumps(list(map(name, piece))) for piece in in_pieces(tokens))
    return [*pieces, b',"token_strs":', *names, b"}"]


def neurons(entries: Sequence[Neurons]) -> list[bytes]:
    """Encodes the neurons of tokens as a list of JSON, in pieces."""
    return one_list(orjson.dumps(list(map(fired, piece)), None, FLOATS) for piece in in_pieces(entries, PIECE))


def fired(entry: Neurons) -> dict[str, Any]:
    """The entry as a response has it, with numbers of numpy's."""
    layers = len(entry.active) // FLOAT
    values = np.frombuffer(entry.values, "<f4").reshape(layers, -1)
    heads, numbers = np.divmod(np.frombuffer(entry.strongest, "<u4").reshape(layers, -1), entry.per_head)
    counts = np.count_nonzero(values, axis=1).tolist()  # where fewer fired than were asked for, the rest is 0
    return {
        "token_id": entry.token,
        "layers": [
            {
                "active": active,
                "strongest": [
                    {"head": head, "neuron": number, "value": value}
                    for head, number, value in zip(heads[at, :count].tolist(), numbers[at].tolist(), values[at])
                ],
            }
            for at, (active, count) in enumerate(zip(np.frombuffer(entry.active, "<f4"), counts))
        ],
    }
