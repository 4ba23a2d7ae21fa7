"""One engine on a virtual clock: the server's scheduler, and steps that take as long as a model of their cost says."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence as Many
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Protocol, cast

from bdh_batch.checkpoint.checkpoint import Model
from bdh_batch.checkpoint.config import BDHConfig
from bdh_batch.engine.completion import Completion
from bdh_batch.engine.loading import LoadedEngine, copy_limits, scheduler_for
from bdh_batch.engine.worker import StepRunner
from bdh_batch.messages import Copy, GenerationRequest, Outcome, SamplingParams
from bdh_batch.plan.sizing import Planner
from bdh_batch.scheduler.batch import Step
from bdh_batch.scheduler.scheduler import Scheduler
from bdh_batch.scheduler.sequence import Client, Prefix, Sequence, Times
from bdh_batch.settings import Settings
from benchmarks.engine.play import Silent

TOKEN = 1  # what every draw gives
PARAMS = SamplingParams()


class Costs(Protocol):
    """Seconds of a step; `copies` are whole states, or parts of them, that it copies."""

    def of(self, decodes: int, prefill_tokens: int, copies: float) -> float: ...


class Planned:
    """The costs that `bdh-batch plan` reckons with."""

    def __init__(self, planner: Planner, copied_per_s: float) -> None:
        self._planner = planner
        self._steps: dict[int, float] = {}  # by the streams in them
        self._prompt = sum(planner.prompt().values())
        self._copy = planner.costs.state_bytes / copied_per_s

    def of(self, decodes: int, prefill_tokens: int, copies: float) -> float:
        if (step := self._steps.get(decodes)) is None:
            step = self._steps[decodes] = sum(self._planner.step(decodes).values())
        return step + self._prompt * prefill_tokens + self._copy * copies


def scheduler_of(settings: Settings, config: BDHConfig, slots: int, state_bytes: int) -> Scheduler:
    """The scheduler of a server with these settings and so many slots, without a GPU."""
    copies = copy_limits(state_bytes, None)
    model, runner = cast(Model, SimpleNamespace(config=config)), cast(StepRunner, None)  # nothing is computed
    return scheduler_for(settings, LoadedEngine(model, runner, slots, 0, grows=True, copies=copies))


def copied(copies: Many[Copy]) -> float:
    """How many whole states these are."""
    return sum((copy.end - copy.begin) / copy.parts for copy in copies)


@dataclass(frozen=True, slots=True)
class Gained:
    """What a step brought one request."""

    key: int
    tokens: int
    computed: int  # tokens that were computed for it by this engine, at its end
    cached: int
    ended: bool


class Engine:
    """Computes requests step by step. Who calls it keeps the clock.

    Args:
        costs: of its steps.
    """

    def __init__(self, scheduler: Scheduler, costs: Costs) -> None:
        self.scheduler = scheduler
        self.computed = 0  # tokens, of prompts and of completions
        self._costs = costs
        self._step: Step | None = None
        self._keys: dict[Sequence, int] = {}

    @property
    def idle(self) -> bool:
        """Whether no step is under way."""
        return self._step is None

    @property
    def load(self) -> int:
        """Sequences that run or wait."""
        return len(self._keys)

    def submit(self, key: int, request: GenerationRequest, generated: Many[int], now: float) -> None:
        """Takes in a request under a number; `generated` are the tokens that other engines have returned of it."""
        silent, (prompt,) = Silent(), request.prompts
        sequence = Sequence(
            id=request.origin.id,
            completion=Completion(prompt.tokens, request.max_tokens, PARAMS, silent),
            client=Client(silent),
            prefix=Prefix(request.origin.cache_namespace, request.salt, prompt.breaks),
            times=Times(arrived=now),
        )
        sequence.resume(generated)
        self._keys[sequence] = key
        self.scheduler.submit([sequence])

    def begin(self, now: float) -> float | None:
        """Begins a step, and returns when it will be done; None where there is nothing to do."""
        step = self._step = self.scheduler.plan(now)
        if step is None:
            return None
        return now + self._costs.of(step.decodes, step.prefill_tokens, copied(step.plan.copies))

    def finish(self, now: float) -> list[Gained]:
        """Ends the step that was begun."""
        step, self._step = self._step, None
        assert step is not None
        self.computed += step.plan.tokens
        drawn = Outcome([TOKEN if segment.sampling else None for segment in step.plan.segments])
        gained = []
        for sequence, delta in self.scheduler.commit(step, drawn, now):
            ended = delta.finish_reason is not None
            key = self._keys.pop(sequence) if ended else self._keys[sequence]
            gained.append(Gained(key, len(delta.tokens), *self._work(sequence), ended))
        return gained

    def lose(self) -> list[tuple[int, int, int, bool]]:
        """The process is gone: of each request its number, the tokens of its state, how many of these were cached, and
        whether it was in the step without a token of this engine, as the record of a real one says."""
        suspects = self._suspects()
        lost = [(key, *self._work(sequence), sequence in suspects) for sequence, key in self._keys.items()]
        self._keys.clear()
        return lost

    def _suspects(self) -> Collection[Sequence]:
        step = () if self._step is None else self._step.sequences
        return {sequence for sequence in step if sequence.times.last_token is None}

    @staticmethod
    def _work(sequence: Sequence) -> tuple[int, int]:
        return sequence.computed - sequence.prefix.cached, sequence.prefix.cached


Make = Callable[[], Engine]
