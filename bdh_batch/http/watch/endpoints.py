"""The rows of what operators watch in the table of endpoints."""

from __future__ import annotations

from typing import Any

from bdh_batch.http.docs.endpoint import Endpoint
from bdh_batch.http.watch.response_types import RecordedSteps, WatchHistory

SAMPLE: dict[str, Any] = {
    "time": 1764432000.0,
    "generated": 1507.5,
    "prompt": 212.0,
    "steps": 210.5,
    "occupancy": 7.16,
    "step_seconds": 0.004431,
    "prefix_hits": 0.62,
    "preemptions": 0,
    "running": 7,
    "waiting": 0,
    "swapped": 0,
    "slots": 32,
    "cached_prefixes": 12,
    "in_flight": 8,
    "first_token": [0.0183, 0.0391, 0.0521],
    "between_tokens": [0.0048, 0.0067, 0.0091],
    "queue_time": [0.05, 0.095, 0.099],
    "rejections": {},
    "failovers": {},
    "ended": {"length": 14},
    "responses": {"2xx": 14},
    "models": {"bdh-shakespeare": {"running": 7, "waiting": 0, "slots": 32, "generated": 1507.5, "prompt": 212.0}},
}
STEP: dict[str, Any] = {
    "step": 4711,
    "planned": 1234.567,
    "seconds": 0.0044,
    "error": None,
    "decodes": 1,
    "prompt_tokens": 0,
    "copies": 0,
    "slots": 1,
    "running": 1,
    "sequences": [
        {
            "request": "my-request-1",
            "index": 0,
            "tenant": "9a3b1c5d7e9f0a1b",
            "priority": 0,
            "prompt": 7,
            "generated": 3,
            "tokens": 1,
            "position": 9,
            "phase": "decode",
        }
    ],
    "waiting_total": 1,
    "waiting": [
        {
            "request": "my-request-2",
            "index": 0,
            "tenant": "9a3b1c5d7e9f0a1b",
            "priority": 0,
            "prompt": 7,
            "generated": 0,
            "reason": "max_running",
            "seconds": 0.012,
        }
    ],
}


def watch() -> list[Endpoint]:
    return [
        Endpoint(
            *("getWatchHistory", "watch.history", "Operation", "/watch/history"),
            *("Samples of the last 15 minutes", WatchHistory),
            description="One every `seconds`, of all processes of the server together.",
            replies={"one sample": {"seconds": 2.0, "samples": [SAMPLE]}},
        ),
        Endpoint(
            *("getWatchSteps", "watch.steps", "Operation", "/watch/steps", "The next steps of a model", RecordedSteps),
            description="Which sequences each step computes, who waits, and why; for operators' keys.",
            query=("model", "steps", "seconds"),
            errors=(403, 404, 503),
            replies={"a step": {"model": "bdh-shakespeare", "engines": [{"process": "server", "steps": [STEP]}]}},
        ),
        Endpoint(
            *("streamWatch", "watch.stream", "Operation", "/watch/stream", "Samples as they come", "text/event-stream"),
            errors=(503,),
            documented=False,  # it has no end
        ),
    ]
