"""JSON that can be sent just as it was given."""

from __future__ import annotations

from typing import Any

import orjson


def check_sendable(held: Any) -> None:
    """Raises ValueError for half a surrogate pair in a text, a whole number beyond 64 bits, and what is too deep."""
    try:
        orjson.dumps(held)
    except orjson.JSONEncodeError as error:
        raise ValueError(f"cannot be sent as JSON: {error}") from None
