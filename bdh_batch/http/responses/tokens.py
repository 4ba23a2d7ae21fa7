"""Tokens beside their text: as /tokenize reports them, and with the neurons that they fired."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import orjson

from bdh_batch.http.responses.json_pieces import in_pieces, one_list
from bdh_batch.messages import Neurons
from bdh_batch.text.tokenizer import Tokenizer

CACHED_NAMES = 2**16  # names of tokens
CACHED_FORMATS = 256  # of layers with so many neurons, of some kilobytes
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
    return one_list(b"[%b]" % b",".join(map(fired, piece)) for piece in in_pieces(entries, PIECE))


def fired(entry: Neurons) -> bytes:
    """The entry as a response has it: floats in as few digits as they need."""
    layers = len(entry.active) // FLOAT
    values = np.frombuffer(entry.values, "<f4")
    counts = [len(values) // layers] * layers
    numbers = np.frombuffer(entry.strongest, "<u4")
    if not values.all():  # fewer fired in some layer than were asked for: the rest is 0
        counts = np.count_nonzero(values.reshape(layers, -1), axis=1).tolist()
        values, numbers = values[values != 0], numbers[values != 0]
    heads = numbers // entry.per_head
    parts: list[object] = [None] * (3 * len(values))
    parts[::3], parts[1::3] = heads.tolist(), (numbers - heads * entry.per_head).tolist()
    parts[2::3] = orjson.dumps(values, None, FLOATS)[1:-1].split(b",") if len(values) else []
    active = orjson.dumps(np.frombuffer(entry.active, "<f4"), None, FLOATS)[1:-1].split(b",")
    at = 0
    for layer, count in enumerate(counts):
        parts.insert(at, active[layer])
        at += 1 + 3 * count
    layers_format = b",".join(map(_layer_format, counts))
    return b'{"token_id":%d,"layers":[%b]}' % (entry.token, layers_format % tuple(parts))


@lru_cache(CACHED_FORMATS)
def _layer_format(count: int) -> bytes:
    """The format of a layer with so many neurons."""
    return b'{"active":%%b,"strongest":[%b]}' % b",".join([b'{"head":%d,"neuron":%d,"value":%b}'] * count)
