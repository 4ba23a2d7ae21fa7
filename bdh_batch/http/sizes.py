"""How large the parts of a request may be that cost more than their bytes."""

from __future__ import annotations

from collections.abc import Sequence

from bdh_batch.errors import InvalidRequest


def check_stops(stops: Sequence[str], most: int, most_bytes: int) -> None:
    """Raises InvalidRequest: they are too many, or one is too long. All of them are looked for after every token."""
    if len(stops) > most:
        raise InvalidRequest(f"A request may have {most} stop strings here (limits.max_stop).", "stop")
    for index, stop in enumerate(stops):
        if len(stop.encode()) > most_bytes:
            text = f"A stop string may have {most_bytes} bytes here (limits.max_stop_bytes)."
            raise InvalidRequest(text, f"stop[{index}]")
