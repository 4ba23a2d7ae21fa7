"""The rows of /v1/states in the table of endpoints."""

from __future__ import annotations

from bdh_batch.http.docs.endpoint import MODEL, WORK, Endpoint
from bdh_batch.http.states.bodies import StateBody
from bdh_batch.http.states.objects import StateDeleted, StateList, StateObject

ROOT = "/v1/states"
CONTENT = f"{ROOT}/content"
ONE = f"{ROOT}/{{id}}"
FILE = "application/octet-stream"
FULL = (507,)


def states() -> list[Endpoint]:
    return [
        Endpoint(
            *("createState", "states.create", "States", ROOT, "Save a state", StateObject),
            method="post",
            description="Of a prompt, a stored response, a completion (by its `x-request-id`) or another state.",
            bodies=[StateBody],
            errors=MODEL + WORK + FULL,
            requests={"prompt": {"prompt": "ROMEO:\n", "metadata": {"scene": "balcony"}, "ttl": 3600}},
        ),
        Endpoint(
            *("listStates", "states.list", "States", ROOT, "The caller's states, the newest first", StateList),
            query=("limit", "after"),
            errors=(404,),
        ),
        Endpoint(
            *("uploadState", "states.upload", "States", CONTENT, "Upload a state that was downloaded", StateObject),
            method="post",
            description="Of the `model` that the file names, if no other one is named.",
            query=("model", "ttl"),
            upload=FILE,
            errors=MODEL + WORK + FULL,
        ),
        Endpoint(
            *("getState", "states.show", "States", ONE, "A saved state", StateObject),
            errors=(404,),
        ),
        Endpoint(
            *("downloadState", "states.download", "States", f"{ONE}/content", "Download a state", FILE),
            description="A safetensors file, with the tokens that it has read in its metadata.",
            errors=MODEL + WORK + FULL,
        ),
        Endpoint(
            *("deleteState", "states.delete", "States", ONE, "Delete a saved state", StateDeleted),
            method="delete",
            description="Requests that have begun in it go on.",
            errors=(404,),
        ),
    ]
