"""The rows of KServe's REST endpoints in the table of endpoints."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from bdh_batch.http.docs.endpoint import MODEL, UPSTREAM, WORK, Endpoint, Open
from bdh_batch.http.kserve.bodies import GenerateBody, InferBody
from bdh_batch.http.kserve.responses import (
    GenerateEvent,
    GenerateResponse,
    InferResponse,
    KServeError,
    Live,
    ModelMetadata,
    ModelReady,
    Ready,
    ServerMetadata,
)
from bdh_batch.http.tensors.metadata import server_metadata


def kserve() -> list[Endpoint]:
    """A model's paths come twice, without a version and with one; longer paths first, as names may have slashes."""
    server: list[tuple[str, str, str, str, type[BaseModel]]] = [
        ("getKServe", "server", "/v2", "Name, version and extensions of the server", ServerMetadata),
        ("isKServeLive", "live", "/v2/health/live", "Alive and making progress?", Live),
        ("isKServeReady", "ready", "/v2/health/ready", "Ready for requests?", Ready),
    ]
    metadata = server_metadata()
    replies = {"getKServe": {"server": metadata}, "isKServeLive": {"live": {"live": True}}}
    rows = [
        Endpoint(
            *(id, f"kserve.{handler}", "KServe", path, summary, response),
            errors=(503,),
            error=KServeError,
            replies=replies.get(id, {}),
            open=Open.ALWAYS,
        )
        for id, handler, path, summary, response in server
    ]
    for suffix, root in (("OfVersion", "/v2/models/{id}/versions/{version}"), ("", "/v2/models/{id}")):
        rows += [_work(suffix, root, *work) for work in _WORK]
        rows += [
            Endpoint(
                *(f"{id}{suffix}", f"kserve.{handler}", "KServe", f"{root}{path}", summary, response),
                errors=MODEL,
                error=KServeError,
            )
            for id, handler, path, summary, response in (
                ("isKServeModelReady", "model_ready", "/ready", "Is the model ready?", ModelReady),
                ("getKServeModel", "model", "", "A model's inputs and outputs", ModelMetadata),
            )
        ]
    return rows


def _work(
    suffix: str,
    root: str,
    path: str,
    summary: str,
    body: type[BaseModel],
    response: type[BaseModel] | None,
    event: type[BaseModel] | None,
    request: dict[str, Any],
) -> Endpoint:
    words = "".join(word.capitalize() for word in path.split("_"))
    return Endpoint(
        *(f"kserve{words}{suffix}", f"kserve.{path}", "KServe", f"{root}/{path}", summary, response, "post"),
        bodies=[body],
        event=event,
        last_event="done",
        errors=MODEL + WORK + UPSTREAM,
        error=KServeError,
        requests={"text": request},
    )


_PROMPT = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["ROMEO:\n"]}
_INFER = {"inputs": [_PROMPT], "parameters": {"max_tokens": 8, "seed": 1}}
_GENERATE = {"text_input": "ROMEO:\n", "parameters": {"max_tokens": 8, "temperature": 0}}
_WORK = (
    ("infer", "Complete prompts, as tensors", InferBody, InferResponse, None, _INFER),
    ("generate", "Complete a prompt", GenerateBody, GenerateResponse, None, _GENERATE),
    ("generate_stream", "Complete a prompt, as a stream", GenerateBody, None, GenerateEvent, _GENERATE),
)
