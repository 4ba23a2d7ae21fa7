"""Reads, after a start, the states of the responses that were used last, before a next turn asks for them.

That turn then finds its state as it would have without a restart: in the prefix cache of the one who may have it.
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Mapping
from functools import partial

from bdh_batch.backends.base import WarmedBackend
from bdh_batch.errors import StoreFailed
from bdh_batch.http.auth.keys import Key
from bdh_batch.http.responses_api.stored.records import KIND, Stored
from bdh_batch.http.serving import Serving
from bdh_batch.http.states.header import problem_of
from bdh_batch.messages import SavedState
from bdh_batch.messages.state import Warmed
from bdh_batch.store.record import RecordDamaged
from bdh_batch.store.sealing import SealingFailed

log = logging.getLogger(__name__)

MOST = 256  # states whose records are looked at
SECONDS = 300.0  # after a start; later, others are those used last
TENANT = ""  # whose the work is that is done aside: nobody's

Models = Mapping[str, WarmedBackend]  # by their revisions


async def warm(serving: Serving) -> None:
    """Has states read, one after the other, until there are no more, or there is no room for them.

    Only those in a folder of this machine are: others would have to be downloaded at each start.
    """
    store, models, cached = serving.records, _models(serving), 0
    if not (models and store.is_local):
        return
    try:
        async with asyncio.timeout(SECONDS):
            for id, owner in await store.latest(KIND, MOST):
                how = await _warm(serving, models, id, owner)
                cached += how == "cached"
                if how == "no room":
                    break
    except TimeoutError:
        log.info("no more states are read in advance: the engine has been at work since the start")
    except StoreFailed:  # which was counted; requests read what they need
        log.warning("no more states of responses are read in advance: the store has failed")
    if cached:
        log.info("states of %d stored responses were read in advance", cached)


async def _warm(serving: Serving, models: Models, id: str, owner: str) -> Warmed | None:
    """What has become of the state of a response; None where nobody could begin there. Raises StoreFailed."""
    store = serving.records
    namespace = namespace_of(owner, serving.admission.known_keys())
    if namespace is None:
        return None
    try:
        if (record := await store.peek(KIND, id, owner)) is None:
            return None
        known = await serving.off_loop.run(TENANT, partial(Stored.of, record))
    except (RecordDamaged, SealingFailed) as error:
        log.warning("the state of the response %s is not read in advance: %s", id, error)
        return None
    backend = models.get(known.model or "")
    if backend is None or known.prefix_salt is None or (file := await store.state_file(record)) is None:
        return None
    try:
        tokens = record.tokens[: array("i").itemsize * known.read]
        how = await backend.warm(SavedState(str(file.path), known.read), tokens, namespace, known.prefix_salt)
        if how == "unreadable":
            store.examine(str(file.path), problem_of)
        return how
    finally:
        file.close()


def namespace_of(owner: str, keys: Mapping[str, Key]) -> str | None:
    """The namespace of the prefixes of whoever owns a record (`Caller`); None where no caller does any more.

    Args:
        keys: those that are asked for, by their ids; none where no keys are.
    """
    if keys:
        return owner if owner in keys else None
    return "" if owner.startswith("@") else None


def _models(serving: Serving) -> Models:
    """Those whose engine is in this process. Elsewhere, nobody knows which engine a turn will come to."""
    found: dict[str, WarmedBackend] = {}
    for hosted in serving.gate.hosted:
        if (served := hosted.acquire()) is not None:
            if isinstance(served.backend, WarmedBackend):
                found[served.revision] = served.backend
            hosted.release()  # one in this process stays loaded
    return found
