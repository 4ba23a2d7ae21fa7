"""Sums of hidden vectors to embeddings, in OpenAI's shape."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from bdh_batch.backends.base import Generation
from bdh_batch.http.generation import collect
from bdh_batch.http.wire_text import EmbeddingBody


async def embeddings(generation: Generation, body: EmbeddingBody, model: str, request: Request) -> Response:
    """The answer in one piece.

    Raises:
        BDHError: the one that a sequence ended with.
        ClientDisconnect
    """
    ends = await collect(generation, request)
    data = []
    for index, end in enumerate(ends):
        assert end.pooled is not None
        vector = normalised(end.pooled[: body.dimensions])
        shown = to_base64(vector) if body.encoding_format == "base64" else vector
        data.append({"object": "embedding", "index": index, "embedding": shown})
    tokens = sum(map(len, generation.prompts))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    answer: dict[str, Any] = {"object": "list", "data": data, "model": model, "usage": usage}
    return Response(orjson.dumps(answer), media_type="application/json")


def normalised(vector: Sequence[float]) -> list[float]:
    """Of length 1: a sum then points where the mean does. A vector of zeros stays as it is."""
    length = math.hypot(*vector) or 1.0
    return [value / length for value in vector]


def to_base64(vector: Sequence[float]) -> str:
    """Little-endian float32, as OpenAI's client reads them."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
