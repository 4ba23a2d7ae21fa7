"""A row of the table of endpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from pydantic import BaseModel

from bdh_batch.http.docs.response_types import Error

MODEL = (403, 404, 503)  # of all that asks for the model
WORK = (429, 504)  # of all that the engine works on
UPSTREAM = (502,)  # of all that an upstream may work on instead


class Open(Enum):
    """What anyone may ask for as often as they like."""

    ALWAYS = "probes and the like"
    METRICS = "unless auth.protect_metrics is set"
    DOCS = "unless auth.protect_docs is set"


@dataclass(frozen=True)
class Endpoint:
    """One row of the table: a path, its handler, its access and its documentation.

    Args:
        handler: the method of `Routes` that handles it, or, as in `kserve.infer`, of one of its parts.
        open: whether it is; None is for callers only.
        documented: whether it is in the OpenAPI document.
        bodies: of which the request has one; none takes no body.
        query: parameters behind the `?` of the address.
        upload: the media type of a file that is the request's body.
        response: of status 200; a text is a media type, None an empty body.
        event: the chunk of a stream, where there can be one.
        last_event: what it ends with.
        errors: statuses that are not possible everywhere.
        error: the body of every error.
        requests: example bodies by name.
        replies: example responses by name.
    """

    id: str
    handler: str
    tag: str
    path: str
    summary: str
    response: type[BaseModel] | str | None
    method: str = "get"
    description: str = ""
    bodies: Sequence[type[BaseModel]] = ()
    query: Sequence[str] = ()
    upload: str | None = None
    event: type[BaseModel] | None = None
    last_event: str = "[DONE]"
    errors: Sequence[int] = ()
    error: type[BaseModel] = Error
    requests: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    replies: Mapping[str, Any] = field(default_factory=dict)
    open: Open | None = None
    documented: bool = True

    @property
    def generates(self) -> bool:
        return 504 in self.errors
