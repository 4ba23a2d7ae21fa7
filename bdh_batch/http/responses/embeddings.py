"""Sums of hidden vectors to embeddings, in OpenAI's shape."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence

import orjson
from starlette.responses import Response

from bdh_batch.backends.base import Generation
from bdh_batch.http.request.client import Client
from bdh_batch.http.request.off_loop import Aside
from bdh_batch.http.responses.generation import collect
from bdh_batch.http.responses.json_pieces import JsonInPieces, between
from bdh_batch.http.schema.text import EmbeddingOptions


async def embeddings(
    generation: Generation, body: EmbeddingOptions, model: str, client: Client, aside: Aside
) -> Response:
    """The response in one piece; `aside` is where one is encoded that takes long.

    Raises:
        BDHError: the one that a sequence ended with.
        ClientDisconnect
    """
    ends = await collect(generation, client)
    sums = [end.pooled[: body.dimensions] for end in ends if end.pooled is not None]
    assert len(sums) == len(ends)
    tokens = sum(map(len, generation.prompts))
    packed = body.encoding_format == "base64"
    return JsonInPieces(await aside.run(sum(map(len, sums)), encoded, sums, packed, model, tokens))


def encoded(sums: Sequence[Sequence[float]], packed: bool, model: str, tokens: int) -> list[bytes]:
    """The pieces of the response for sums [N][D] of hidden vectors, as base64 if `packed`."""
    vectors = []
    for index, pooled in enumerate(sums):
        vector = normalised(pooled)
        shown = to_base64(vector) if packed else vector
        vectors.append([orjson.dumps({"object": "embedding", "index": index, "embedding": shown})])
    end = orjson.dumps({"model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})
    return [b'{"object":"list","data":[', *between(b",", vectors), b"],", end[1:]]


def normalised(vector: Sequence[float]) -> list[float]:
    """Of length 1: a sum then points where the mean does. A vector of zeros stays as it is."""
    length = math.hypot(*vector) or 1.0
    return [value / length for value in vector]


def to_base64(vector: Sequence[float]) -> str:
    """Little-endian float32, as OpenAI's client reads them."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
