"""What the processes of a server ask each other: their metrics, what operators watch, and, of front ends, recent
completions and the events of responses in the background."""

from __future__ import annotations

import asyncio
import json
from array import array
from base64 import b64decode, b64encode
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence

from bdh_batch.errors import Unavailable
from bdh_batch.http.responses_api.shared_events import SharedEvents
from bdh_batch.observability.figures import Figures
from bdh_batch.observability.watched import StepRecord, Watched
from bdh_batch.processes.folder import RuntimeFolder
from bdh_batch.processes.questions import Answer, ask, first, follow
from bdh_batch.store.recent import Completion, Recent

METRICS, FIGURES, STEPS = "metrics", "figures", "steps"
COMPLETION, EARLIEST_EVENT, EVENTS = "completion", "earliest event", "events"
SECONDS = 2.0  # within which a process has to answer
KEEPALIVE_SECONDS = 15.0  # between signs of life of whoever sends events, where clients are to get none
SILENT_SECONDS, SILENT_KEEPALIVES = 60.0, 4  # without any after which it is given up: the longer of both
FIGURES_SECONDS = 1.0
STEPS_SECONDS = 10.0  # within which recorded steps, some megabytes at most, have to be there once they are recorded


def answers_of(exposition: Callable[[], bytes], watched: Watched) -> dict[str, Answer]:
    """What every process answers."""

    async def metrics() -> AsyncGenerator[bytes, None]:
        yield exposition()

    async def figures() -> AsyncGenerator[bytes, None]:
        yield watched.figures().dump()

    async def steps(model: str, count: int, seconds: float) -> AsyncGenerator[bytes, None]:
        """Each step in a line of its own: no process encodes or parses many at once."""
        try:
            recorded = await watched.steps(model, count, seconds)
        except Unavailable as error:
            yield _line({"error": str(error), "retry_after": error.retry_after})
            return
        yield _line({"has_model": recorded is not None})
        for step in recorded or ():
            yield _line(step)
            await asyncio.sleep(0)

    return {METRICS: metrics, FIGURES: figures, STEPS: steps}


def answers_of_front_end(recent: Recent, shared: SharedEvents) -> dict[str, Answer]:
    """What only a front end answers."""

    async def completion(owner: str, id: str) -> AsyncGenerator[bytes, None]:
        if (found := recent.get(owner, id)) is not None:
            yield _line([found.model, found.salt, b64encode(found.tokens().tobytes()).decode()])

    async def earliest_event(owner: str, id: str) -> AsyncGenerator[bytes, None]:
        if (log := shared.own(owner, id)) is not None:
            yield str(log.earliest).encode()

    async def events(owner: str, id: str, after: int, keepalive: float) -> AsyncGenerator[bytes, None]:
        if (log := shared.own(owner, id)) is not None:
            async for piece in log.read(after, keepalive):
                yield piece

    return {COMPLETION: completion, EARLIEST_EVENT: earliest_event, EVENTS: events}


class Others:
    """The other processes of a server. Implements `observability.watched.OtherProcesses`, and that of
    `http.responses_api.shared_events`.

    Args:
        name: of this process, which is not asked.
    """

    def __init__(self, folder: RuntimeFolder, name: str) -> None:
        self._folder = folder
        self._name = name

    async def metrics(self) -> Mapping[str, bytes]:
        """Returns the metrics of each, by its name."""
        return await self._ask(SECONDS, METRICS)

    async def completion(self, owner: str, id: str) -> Completion | None:
        """Returns what another process remembers of a recent request. Raises Unavailable."""
        if (found := await self._first(COMPLETION, owner, id)) is None:
            return None
        model, salt, tokens = json.loads(found[1])
        return Completion(model, salt, array("i", b64decode(tokens)))

    async def earliest_event(self, owner: str, id: str) -> tuple[str, int] | None:
        found = await self._first(EARLIEST_EVENT, owner, id)
        return None if found is None else (found[0], int(found[1]))

    def events(self, process: str, owner: str, id: str, after: int, keepalive: float) -> AsyncIterator[bytes]:
        keepalive = keepalive or KEEPALIVE_SECONDS
        silent = max(SILENT_SECONDS, SILENT_KEEPALIVES * keepalive)
        return follow(self._folder.questions(process), silent, EVENTS, owner, id, after, keepalive)

    async def figures(self) -> Mapping[str, Figures]:
        return {name: Figures.load(each) for name, each in (await self._ask(FIGURES_SECONDS, FIGURES)).items()}

    async def steps(self, model: str, count: int, seconds: float) -> Mapping[str, Sequence[StepRecord]]:
        found = {}
        for name, answer in (await self._ask(seconds + STEPS_SECONDS, STEPS, model, count, seconds)).items():
            head, *lines = answer.splitlines()
            known = json.loads(head)
            if "error" in known:
                raise Unavailable(known["error"], known["retry_after"])
            if known["has_model"]:
                found[name] = [await _parsed(line) for line in lines]
        return found

    async def _first(self, *question: object) -> tuple[str, bytes] | None:
        """The first answer of another front end. Raises Unavailable: there is none, and some have not answered."""
        sockets = {name: path for name, path in self._folder.front_ends().items() if name != self._name}
        try:
            return await first(sockets, SECONDS, *question)
        except TimeoutError as error:
            raise Unavailable("Some processes of the server did not answer in time.", 1) from error

    async def _ask(self, seconds: float, *question: object) -> Mapping[str, bytes]:
        sockets = {name: path for name, path in self._folder.answering().items() if name != self._name}
        return await ask(sockets, seconds, *question)


def _line(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


async def _parsed(line: bytes) -> StepRecord:
    await asyncio.sleep(0)
    found: StepRecord = json.loads(line)
    return found
