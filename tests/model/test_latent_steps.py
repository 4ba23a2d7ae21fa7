"""Latent steps through the engine: what is said after them equals what bdh-cq says, whatever else the engine does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bdh_batch.backends.base import Generation
from bdh_batch.backends.local import LocalBackend
from bdh_batch.checkpoint.checkpoint import fingerprint
from bdh_batch.engine.loading import state_layout
from bdh_batch.engine.mailbox import Mailbox
from bdh_batch.engine.runner import Runner
from bdh_batch.engine.state_io import StateIO
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.engine.worker import Worker
from bdh_batch.errors import ContextLengthExceeded, InvalidRequest
from bdh_batch.kernels.cpu import CpuKernels
from bdh_batch.kernels.torch_reference import TorchKernels
from bdh_batch.messages import (
    LATENT,
    LATENT_FROZEN,
    Copy,
    Delta,
    FinishReason,
    GenerationRequest,
    LatentSteps,
    Origin,
    Outcome,
    Plan,
    Progress,
    Prompt,
    SamplingParams,
    Segment,
    latent_positions,
)
from bdh_batch.scheduler.invariants import check_invariants
from bdh_batch.scheduler.policy import Policy
from bdh_batch.scheduler.scheduler import Scheduler
from bdh_batch.text.tokenizer import ByteTokenizer
from tests.reasoning import Reasoning, reasoning
from tests.scheduler.fakes import FakeObserver

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0)
PROMPT = b"The sweep shares this prompt: "
TOKENS = 16
STEPS = (0, 1, 4, 16)


class WatchedRunner(Runner):
    """Looks at the plans that it computes, and goes on after its first latent step only once it `may`."""

    plans: list[Plan]
    may: threading.Event

    @property
    def latent(self) -> list[tuple[int, Segment]]:
        """The latent steps, each with the index of its plan."""
        return [(at, s) for at, plan in enumerate([*self.plans]) for s in plan.segments if s.tokens[0] < 0]

    def run(self, plan: Plan) -> Outcome:
        if plan.segments:
            for segment in plan.segments:
                latent = latent_positions(segment.tokens)
                assert not latent or len(segment.tokens) == 1, "a latent step is a segment of its own"
            copied = [replace(segment, tokens=tuple(segment.tokens)) for segment in plan.segments]
            self.plans.append(Plan(copied, plan.copies))
            if self.latent:
                assert self.may.wait(300)
        return super().run(plan)


@dataclass
class Engine:
    """An engine in this process with a model of bdh-cq."""

    model: Reasoning
    backend: LocalBackend
    worker: Worker
    scheduler: Scheduler
    runner: WatchedRunner

    async def says(self, request: GenerationRequest) -> list[Delta]:
        """All that a request gained."""
        return await gained_of(await self.backend.generate(request))

    async def answer(
        self, steps: int, update: bool = True, prompt: Sequence[int] = PROMPT, **changes: Any
    ) -> list[int]:
        latent = LatentSteps(steps, frozen=not update)
        return tokens_of(await self.says(asked(prompt, latent=latent, **changes)))


async def gained_of(generation: Generation) -> list[Delta]:
    async with asyncio.timeout(300):
        gained = [delta async for deltas in generation for _, delta in deltas]
    generation.abort()
    for delta in gained:
        assert delta.error is None, delta.error
    return gained


@asynccontextmanager
async def started(
    slots: int = 8, host_slots: int = 0, prefill: int = 24, kernels: type[Any] = CpuKernels, **policy: Any
) -> AsyncIterator[Engine]:
    model = reasoning()
    pool = StatePool(model.config, slots, CPU, host_slots=host_slots, transfer_slots=4)
    chosen = Policy(
        **{"host_slots": host_slots, "transfer_slots": 4, "cache_prefixes": False, "min_shared": 8, **policy}
    )
    scheduler = Scheduler(slots, prefill, chosen)
    runner = WatchedRunner(kernels(model.weights), pool, model.weights.latent_embed)
    runner.plans, runner.may = [], threading.Event()
    runner.may.set()
    states = StateIO(pool, state_layout(pool, fingerprint(model.weights), 0))
    worker = Worker(scheduler, runner, FakeObserver(), 500, states=states)
    backend = LocalBackend(worker, ByteTokenizer(), model.config.vocab_size, 4096, 60.0, latent=True)
    yield Engine(model, backend, worker, scheduler, runner)
    worker.close()
    check_invariants(scheduler)


def asked(prompt: Sequence[int], max_tokens: int = TOKENS, **changes: Any) -> GenerationRequest:
    given = {"sampling": GREEDY, "ignore_eos": True, **changes}
    known = Prompt([*prompt], latents=latent_positions([*prompt]))
    return GenerationRequest(Origin("r"), [known], max_tokens, **given)


def tokens_of(gained: Sequence[Delta]) -> list[int]:
    return [token for delta in gained for token in delta.tokens]


@pytest.mark.parametrize("kernels", [TorchKernels, CpuKernels])
@pytest.mark.parametrize("update", [True, False])
async def test_answers_after_latent_steps_are_those_of_the_package(update: bool, kernels: type[Any]) -> None:
    async with started(kernels=kernels) as engine:
        expected = [engine.model.answer(PROMPT, steps, TOKENS, update) for steps in STEPS]
        assert len({*map(tuple, expected)}) == len(STEPS), "the steps make a difference"
        assert [await engine.answer(steps, update) for steps in STEPS] == expected


@pytest.mark.parametrize("kernels", [TorchKernels, CpuKernels])
async def test_among_31_other_requests_with_other_steps(kernels: type[Any]) -> None:
    prompts = [PROMPT[: 3 + index % 25] + bytes([65 + index]) for index in range(28)]
    plain = [(prompts[index], index % 7 * (index % 5), index % 2 == 0) for index in range(28)]
    requests = [*plain, *((PROMPT, steps, True) for steps in STEPS)]
    async with started(slots=32, kernels=kernels) as engine:
        answers = await asyncio.gather(*(engine.answer(k, update, prompt) for prompt, k, update in requests))
        batches = [sum(s.tokens[0] < 0 for s in plan.segments) for plan in engine.runner.plans]
        widths = [len(plan.segments) for plan in engine.runner.plans]
    for (prompt, steps, update), answer in zip(requests, answers):
        assert answer == reasoning().answer(prompt, steps, TOKENS, update), (prompt, steps, update)
    assert max(batches) > 4, "latent steps of several requests are in a step"
    assert any(0 < latent < width for latent, width in zip(batches, widths)), "and other requests' tokens beside them"


@pytest.mark.parametrize(
    ("options", "moves"),
    [
        ({"slots": 2, "host_slots": 9, "max_running": 8, "time_slice": 3}, True),  # by swap
        ({"slots": 1, "time_slice": 3}, False),  # by recompute
    ],
)
async def test_a_preempted_sequence_goes_on_with_its_vector(options: dict[str, Any], moves: bool) -> None:
    async with started(**options) as engine:
        engine.runner.may.clear()
        first = [asyncio.create_task(engine.answer(16, update, priority=1)) for update in (True, False)]
        while not engine.runner.latent:  # noqa: ASYNC110 - what is waited for happens in a thread
            await asyncio.sleep(0)
        urgent = [await engine.backend.generate(asked(PROMPT, latent=LatentSteps(steps))) for steps in STEPS]
        engine.runner.may.set()
        answers = [await each for each in first] + [tokens_of(await gained_of(each)) for each in urgent]
        assert engine.scheduler.counts.preemptions
        moved = {(at, copy.target) for at, plan in enumerate(engine.runner.plans) for copy in plan.copies}
        assert moves == any((at, segment.slot) in moved for at, segment in engine.runner.latent)
    model = reasoning()
    expected = [model.answer(PROMPT, 16, TOKENS), model.answer(PROMPT, 16, TOKENS, update=False)]
    assert answers == [*expected, *(model.answer(PROMPT, steps, TOKENS) for steps in STEPS)]


@pytest.mark.parametrize("host_dtype", [None, torch.bfloat16, torch.int8])
def test_a_vector_is_copied_as_it_is_whatever_becomes_of_the_state(host_dtype: torch.dtype | None) -> None:
    model = reasoning()
    pool = StatePool(model.config, 2, CPU, host_slots=2, transfer_slots=1, host_dtype=host_dtype)
    runner = Runner(TorchKernels(model.weights), pool, model.weights.latent_embed)
    hidden = runner.forward([Segment(0, 0, [*PROMPT], None)])[-1]
    runner.run(Plan([Segment(0, 0, [1, 2, 3], None)], [Copy(0, 3), Copy(3, 4), Copy(4, 2), Copy(2, 1)]))
    assert pool.vectors is not None
    assert torch.equal(pool.vectors.entering([1])[0], hidden)
    assert bytes(pool.vectors.memory(4)) == hidden.numpy().tobytes()


async def test_a_sweep_over_steps_computes_the_prompt_once() -> None:
    async with started(cache_prefixes=True) as engine:
        one_by_one = [await engine.answer(steps) for steps in STEPS]
        computed = sum(plan.tokens for plan in engine.runner.plans)
        together = await asyncio.gather(*(engine.answer(steps, prompt=PROMPT[::-1]) for steps in STEPS))
    model = reasoning()
    assert one_by_one == [model.answer(PROMPT, steps, TOKENS) for steps in STEPS]
    assert together == [model.answer(PROMPT[::-1], steps, TOKENS) for steps in STEPS]
    # But for its last token, which each computes itself before its own steps.
    assert computed <= len(PROMPT) - 1 + sum(1 + steps + TOKENS - 1 for steps in STEPS)


async def test_choices_share_their_latent_steps_and_differ_by_their_seeds() -> None:
    sampling = SamplingParams(temperature=1.0)
    request = asked(PROMPT, latent=LatentSteps(4), sampling=sampling, n=3, seeds=(1, 2, 3))
    async with started(cache_prefixes=True) as engine:
        generation = await engine.backend.generate(request)
        gained: dict[int, list[int]] = {}
        async for deltas in generation:
            for index, delta in deltas:
                gained.setdefault(index, []).extend(delta.tokens)
        usage = generation.usage(3 * TOKENS)
        generation.abort()
        alone = [tokens_of(await engine.says(replace(request, n=1, seeds=(seed,)))) for seed in (1, 2, 3)]
    assert [gained[index] for index in range(3)] == alone
    assert len({*map(tuple, alone)}) == 3
    assert (usage.prompt_tokens, usage.completion_tokens, usage.reasoning_tokens) == (len(PROMPT), 3 * (4 + TOKENS), 12)
    assert request.most_tokens == len(PROMPT) + 3 * (4 + TOKENS)


@pytest.mark.parametrize("known", [0, 1, 7])
@pytest.mark.parametrize("update", [True, False])
async def test_another_engine_goes_on_behind_what_was_received(known: int, update: bool) -> None:
    expected = reasoning().answer(PROMPT, 4, TOKENS, update)
    request = asked(PROMPT, latent=LatentSteps(4, frozen=not update))
    async with started() as engine:
        mailbox = Mailbox()
        submission = await engine.backend.submit(request, mailbox, [Progress(expected[:known])])
        gained: list[int] = []
        async with asyncio.timeout(300):
            while len(gained) < TOKENS - known:
                gained += [token for _, delta in await mailbox.take() for token in delta.tokens]
        submission.abandon()
    assert expected[:known] + gained == expected


async def test_latent_steps_of_earlier_turns_are_part_of_the_prompt() -> None:
    """As a conversation is stored: what was asked, latent steps, what was said, and what is asked next."""
    model, more = reasoning(), b" and then? "
    said = model.answer(PROMPT, 4, TOKENS)
    stages: list[torch.Tensor | int] = [torch.tensor([[*PROMPT]]), 4, torch.tensor([[*said, *more]]), 2]
    known = [*PROMPT, *[LATENT] * 4, *said, *more]
    async with started() as engine:
        assert await engine.answer(2, prompt=known) == model.after(stages, TOKENS, True, True, True, True)
        frozen = [LATENT_FROZEN if token < 0 else token for token in known]
        assert await engine.answer(2, prompt=frozen) == model.after(stages, TOKENS, True, False, True, True)
        penalised = replace(GREEDY, repetition_penalty=1.5, presence_penalty=0.5)
        assert len(await engine.answer(2, prompt=known, sampling=penalised)) == TOKENS


async def test_a_state_goes_on_in_a_latent_step_from_its_file(tmp_path: Path) -> None:
    model, path = reasoning(), tmp_path / "state"
    expected = model.answer(PROMPT, 4, TOKENS)
    async with started() as engine:
        # It has read the prompt, and its first token that is computed is a latent step.
        request = replace(asked(PROMPT, max_tokens=1), save_to=str(path))
        saved = (await engine.says(request))[-1].saved
        assert saved is not None
        assert saved.tokens == len(PROMPT)
        known = [*PROMPT, LATENT]
    async with started() as engine:
        request = asked(known, latent=LatentSteps(3), state=saved)
        assert tokens_of(await engine.says(request)) == expected
        assert sum(plan.tokens for plan in engine.runner.plans) == 4 + TOKENS - 1


async def test_prompt_logprobs_are_those_of_its_tokens_and_the_first_is_drawn_after_the_steps() -> None:
    async with started(prefill=7) as engine:
        plain = await engine.says(asked(PROMPT, prompt_logprobs=1))
        thought = await engine.says(asked(PROMPT, prompt_logprobs=1, latent=LatentSteps(4)))
        scored = [next(each.prompt_logprobs for each in gained if each.prompt_logprobs) for gained in (plain, thought)]
        assert tokens_of(thought) == reasoning().answer(PROMPT, 4, TOKENS)
    assert [each.token for each in scored[0]] == [*PROMPT[1:]]
    assert [each.token for each in scored[1]] == [*PROMPT[1:]]
    for one, other in zip(*scored):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)


async def test_logprobs_of_the_first_token_are_those_after_the_last_step() -> None:
    sampling = replace(GREEDY, logprobs=3)
    async with started() as engine:
        gained = await engine.says(asked(PROMPT, max_tokens=1, latent=LatentSteps(4), sampling=sampling))
    first = next(each.logprobs for each in gained if each.logprobs)[0][1]
    assert first.token == first.top[0][0] == reasoning().answer(PROMPT, 4, 1)[0]


async def test_latent_steps_have_to_fit_the_context() -> None:
    async with started() as engine:
        assert len(await engine.answer(4, prompt=PROMPT * 100, max_tokens=4096 - 100 * len(PROMPT) - 4)) > 1000
        with pytest.raises(ContextLengthExceeded, match="4 latent steps and"):
            await engine.answer(4, prompt=PROMPT * 100, max_tokens=4096 - 100 * len(PROMPT) - 3)


async def test_a_model_without_latent_steps_does_not_go_on_from_them() -> None:
    async with started() as engine:
        plain = LocalBackend(engine.worker, ByteTokenizer(), 256, None, 60.0)
        with pytest.raises(InvalidRequest, match="latent steps"):
            await plain.generate(asked([1, LATENT, 2]))
        with pytest.raises(InvalidRequest, match="latent steps"):
            await engine.backend.generate(asked([LATENT, 2]))


async def test_latent_steps_are_charged_as_generated_tokens_are() -> None:
    async with started() as engine:
        gained = await engine.says(asked(PROMPT, latent=LatentSteps(5)))
        assert gained[-1].finish_reason is FinishReason.LENGTH
        charged = engine.scheduler._tenants.join("", None).virtual_time
    async with started() as engine:
        await engine.says(asked(PROMPT, max_tokens=TOKENS + 5))
        assert engine.scheduler._tenants.join("", None).virtual_time == charged
