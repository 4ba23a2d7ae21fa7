"""Engines as their processes have them, without the processes: fake models behind real sockets."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from bdh_batch import __version__
from bdh_batch.backends.address import Address, LocalAddress, NetworkAddress
from bdh_batch.backends.base import Generation
from bdh_batch.backends.engine_port import EnginePort
from bdh_batch.backends.local import LocalBackend
from bdh_batch.backends.recorder import StepRecorder, step_file
from bdh_batch.backends.remote import RemoteBackend
from bdh_batch.backends.replica import Replica, State
from bdh_batch.backends.wire import Welcome
from bdh_batch.engine.state_traffic import Done
from bdh_batch.engine.worker import Worker
from bdh_batch.messages import (
    Delta,
    FinishReason,
    GenerationRequest,
    Grammar,
    GrammarText,
    Outcome,
    Plan,
    SavedState,
    Segment,
    TokenLogprob,
)
from bdh_batch.scheduler.copies import Save
from bdh_batch.scheduler.policy import Policy
from bdh_batch.scheduler.scheduler import Scheduler
from bdh_batch.scheduler.transfers import Load
from bdh_batch.text.tokenizer import ByteTokenizer
from tests.scheduler.fakes import FakeObserver, FakeRunner

SECRET = "only for friends"
HEARTBEAT = 30.0
POISON = 255  # a token at which an engine dies; the fake model never says it
STEP_SECONDS = 0.002  # so that a test can come between two steps


class LogprobsRunner(FakeRunner):
    """Gives logprobs, too, and is not too fast to be disturbed. Draws follow from the tokens before and the seed."""

    def __init__(self, die: Callable[[], Coroutine[Any, Any, None]]) -> None:
        super().__init__()
        self.die = die
        self.loop = asyncio.get_running_loop()

    def run(self, plan: Plan) -> Outcome:
        if any(POISON in segment.tokens for segment in plan.segments):
            asyncio.run_coroutine_threadsafe(self.die(), self.loop).result()
            raise RuntimeError("nobody is there to be told")
        asyncio.run_coroutine_threadsafe(asyncio.sleep(STEP_SECONDS), self.loop).result()
        outcome = super().run(plan)
        logprobs, targets = {}, {}
        for row, (segment, token) in enumerate(zip(plan.segments, outcome.drawn, strict=True)):
            end = segment.start + len(segment.tokens)
            if token is not None and segment.sampling is not None and segment.sampling.logprobs is not None:
                logprobs[row] = token_logprob(token, end, segment.sampling.logprobs)
            if segment.targets:
                targets[row] = [
                    token_logprob(each, segment.start + at, segment.top) for at, each in enumerate(segment.targets)
                ]
        return outcome._replace(logprobs=logprobs, target_logprobs=targets)

    def _segment(self, segment: Segment) -> int | None:
        token = super()._segment(segment)
        if token is None or segment.sampling is None:
            return None
        return (token * 5 + segment.sampling.seed) % POISON


def token_logprob(token: int, position: int, top: int) -> TokenLogprob:
    likeliest = [(token, math.log(0.5)), *((token + rank, math.log(0.5 ** (rank + 2))) for rank in range(1, top))]
    return TokenLogprob(token, -1 / (1 + position), likeliest[:top], rank=0)


class FakeStates:
    """Keeps states in files, as tokens; `stuck`, it never comes to write one."""

    def __init__(self, runner: FakeRunner) -> None:
        self._runner = runner
        self.stuck = False

    def back(self, slot: int) -> None:
        """A fake state takes no memory."""

    def read(self, load: Load, done: Done) -> None:
        try:
            known = json.loads(Path(load.state.path).read_text())
        except OSError:
            done("there is no file.")
        else:
            self._runner.slots[load.slot] = known
            done(None)

    def read_ahead(self, load: Load, done: Done, goes_on: Callable[[], bool]) -> None:
        self.read(load, done)

    def write(self, save: Save, done: Done) -> None:
        if self.stuck:
            return
        Path(save.state.path).write_text(json.dumps(self._runner.slots[save.slot]))
        done(None)


class NoGrammars:
    async def compiled(self, text: GrammarText) -> Grammar:
        raise AssertionError


class FakeEngine:
    """An engine at a socket, which can be killed and started again.

    Args:
        apart: whether front ends see it as on another machine: it has a port, and they cannot read its record.
    """

    def __init__(self, socket: Path, slots: int = 8, most_queued: int = 64, apart: bool = False) -> None:
        self.socket = socket
        self.apart = apart
        self.address: Address = LocalAddress(socket)
        self._slots = slots
        self._most_queued = most_queued
        self.deaths = 0
        self.replica: Replica | None = None
        self._revival: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.runner = LogprobsRunner(self._die)
        self.states = FakeStates(self.runner)
        scheduler = Scheduler(self._slots, 16, Policy(max_running=self._slots, transfer_slots=2))
        self.worker = worker = Worker(
            scheduler,
            self.runner,
            FakeObserver(),
            self._most_queued,
            before=StepRecorder(step_file(self.socket)),
            states=self.states,
        )
        self.backend = LocalBackend(worker, ByteTokenizer(), 256, None, 60.0)
        welcome = Welcome(__version__, 1, "fake", "cpu", "same", 256, 1, self._slots, 0, 0)
        self.port = EnginePort(self.backend, NoGrammars(), welcome, SECRET, 0.05, lambda: worker.load)
        loop = asyncio.get_running_loop()
        if self.apart:
            known = self.address.port if isinstance(self.address, NetworkAddress) else 0
            self._server = await loop.create_server(self.port.new_connection, "127.0.0.1", known)
            port = self._server.sockets[0].getsockname()[1]
            self.address = NetworkAddress(self.socket.stem, "127.0.0.1", port, self.socket.with_suffix(".apart"))
            return
        self.socket.unlink(missing_ok=True)
        self._server = await loop.create_unix_server(self.port.new_connection, str(self.socket))

    async def kill(self) -> None:
        """As a signal would: nothing more is sent."""
        if self._revival is not None:
            await self._revival
        self._disconnect()
        await asyncio.to_thread(self.worker.close)

    def _disconnect(self) -> None:
        self._server.close()
        for connection in [*self.port.connections]:
            connection.disconnect()

    async def _die(self) -> None:
        """In the midst of a step. It is started again."""
        self._disconnect()
        self.deaths += 1
        self._revival = asyncio.create_task(self._revive(self.worker))

    async def _revive(self, dead: Worker) -> None:
        await asyncio.to_thread(dead.close)
        await until(lambda: self.replica is None or self.replica.state is not State.READY)  # a process takes seconds
        await self.start()


@asynccontextmanager
async def engines(*some: FakeEngine, max_failovers: int = 2) -> AsyncIterator[RemoteBackend]:
    """A backend that is connected to `some`."""
    backend = RemoteBackend(ByteTokenizer(), 256, max_failovers, None)
    for each in some:
        await each.start()
    for each in some:
        each.replica = connect(each.address, backend)
    backend.replicas = {each.socket.stem: each.replica for each in some if each.replica is not None}
    try:
        await until(lambda: all(replica.state is State.READY for replica in backend.replicas.values()))
        yield backend
    finally:
        for replica in backend.replicas.values():
            replica.close()
        for each in some:
            await each.kill()


def connect(address: Address, backend: RemoteBackend, secret: str = SECRET, version: str = __version__) -> Replica:
    return Replica(address, version, secret, HEARTBEAT, backend.changed, backend.lost, lambda _: None)


async def until(condition: object, within: float = 300.0) -> None:
    assert callable(condition)
    async with asyncio.timeout(within):
        while not condition():  # noqa: ASYNC110 - it waits for what other tasks and threads do
            await asyncio.sleep(0.001)


class Whole:
    """All that a reader gets of one sequence."""

    def __init__(self) -> None:
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs: list[tuple[int, TokenLogprob]] = []
        self.prompt_logprobs: list[Sequence[TokenLogprob]] = []
        self.neurons: list[tuple[int, int]] = []  # tokens, and what stands for their neurons: positions
        self.logprob = 0.0
        self.finish_reason: FinishReason | None = None
        self.error = ""
        self.saved: SavedState | str | None = None  # or why it was not

    def add(self, delta: Delta) -> None:
        if delta.saved is not None or delta.save_error is not None:
            assert self.saved is None
            self.saved = delta.saved or delta.save_error
            if delta.finish_reason is None:
                assert self.finish_reason is not None
                return
        assert self.finish_reason is None
        self.text += delta.text
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs or ()
        self.neurons += [(each.token, each.per_head) for each in delta.neurons or ()]
        self.logprob += delta.logprob
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs.append([*delta.prompt_logprobs])
        self.finish_reason = delta.finish_reason
        self.error = str(delta.error or "")

    def facts(self) -> tuple[object, ...]:
        logprobs = [(at, each.token, each.logprob, [*each.top]) for at, each in self.logprobs]
        prompt = [[(each.token, each.logprob) for each in some] for some in self.prompt_logprobs]
        shown = self.text, self.tokens, logprobs, prompt, self.neurons
        return *shown, round(self.logprob, 9), self.finish_reason, self.error


async def read(generation: Generation, wholes: list[Whole]) -> list[Whole]:
    """Reads to the end into `wholes`, which are there to be looked at meanwhile."""
    try:
        async for deltas in generation:
            for index, delta in deltas:
                wholes[index].add(delta)
    finally:
        generation.abort()
    return wholes


def empty(request: GenerationRequest) -> list[Whole]:
    return [Whole() for _ in range(len(request.prompts) * request.n)]
