from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import torch

from bdh_batch.checkpoint.checkpoint import load_model
from bdh_batch.engine.completion import Completion
from bdh_batch.engine.mailbox import BACKLOG, Mailbox
from bdh_batch.engine.runner import Runner
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.engine.worker import Worker
from bdh_batch.errors import GenerationFailed, InvalidRequest, OutOfMemory, QueueFull, Unavailable
from bdh_batch.kernels.torch_reference import TorchKernels
from bdh_batch.messages import Delta, FinishReason, Outcome, Plan, SamplingParams
from bdh_batch.scheduler.policy import Policy
from bdh_batch.scheduler.scheduler import Scheduler
from bdh_batch.scheduler.sequence import Sequence
from tests.scheduler.fakes import FakeObserver, FakeOutbox, FakeRunner, FakeText, expected_tokens, make_sequence
from tests.support import resident

TINY = Path(__file__).parents[1] / "data" / "conformance" / "tiny"


class GatedRunner(FakeRunner):
    """Runs a step only when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.may_run = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)

    def run(self, plan: Plan) -> Outcome:
        self.entered.release()
        assert self.may_run.acquire(timeout=300)
        return super().run(plan)


async def until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in a thread
            await asyncio.sleep(0.001)


@pytest.fixture
async def gated() -> AsyncIterator[tuple[Worker, GatedRunner]]:
    runner = GatedRunner()
    worker = Worker(Scheduler(slots=2, prefill_tokens=16), runner, FakeObserver(), max_queued=3)
    yield worker, runner
    for _ in range(1000):
        runner.may_run.release()
    worker.close()
    worker.close()  # idempotent


async def test_every_token_reaches_its_mailbox_in_order() -> None:
    observer = FakeObserver()
    worker = Worker(Scheduler(slots=3, prefill_tokens=16), FakeRunner(), observer, max_queued=100)
    outboxes = [FakeOutbox() for _ in range(10)]
    for index, outbox in enumerate(outboxes):
        worker.submit([make_sequence([index] * (1 + 7 * index), 20, outbox=outbox)])
    await until(lambda: all(outbox.deltas and outbox.deltas[-1].finish_reason for outbox in outboxes))
    worker.close()
    for index, outbox in enumerate(outboxes):
        assert outbox.tokens == expected_tokens([index] * (1 + 7 * index), 20)
    assert (observer.tokens, observer.ends) == (200, 10)


async def test_one_more_than_the_queue_holds_is_refused_and_nothing_is_lost(
    gated: tuple[Worker, GatedRunner],
) -> None:
    worker, runner = gated
    outboxes = [FakeOutbox() for _ in range(5)]
    worker.submit([make_sequence([1], 1, outbox=outbox) for outbox in outboxes[:2]])
    await asyncio.to_thread(runner.entered.acquire)  # both slots are taken
    worker.submit([make_sequence([2], 1, outbox=outbox) for outbox in outboxes[2:4]])
    with pytest.raises(QueueFull) as refusal:
        worker.submit([make_sequence([3], 1), make_sequence([3], 1)])
    assert refusal.value.retry_after >= 1
    worker.submit([make_sequence([2], 1, outbox=outboxes[4])])
    assert worker.load.waiting == 3
    for _ in range(10):
        runner.may_run.release()
    await until(lambda: all(outbox.deltas for outbox in outboxes))
    assert worker.load.waiting == 0


async def test_a_request_that_fitted_once_fits_again_when_all_has_ended() -> None:
    worker = Worker(Scheduler(slots=4, prefill_tokens=16), FakeRunner(), FakeObserver(), max_queued=1)
    for _ in range(3):
        outbox = FakeOutbox()
        worker.submit([make_sequence([1], 3, outbox=outbox) for _ in range(5)])
        await until(lambda outbox=outbox: len(outbox.tokens) == 15)  # type: ignore[misc]
        await until(lambda: worker.load.running == 0)
    with pytest.raises(InvalidRequest, match="5 completions"):
        worker.submit([make_sequence([1], 3) for _ in range(6)])
    worker.close()


async def test_clients_get_their_end_even_if_what_observes_the_worker_kills_it() -> None:
    class Broken(FakeObserver):
        def finished(self, sequence: Sequence, now: float) -> None:
            raise RuntimeError("no such metric")

    worker = Worker(Scheduler(slots=1, prefill_tokens=16), FakeRunner(), Broken(), max_queued=10)
    outboxes = [FakeOutbox() for _ in range(3)]
    for outbox in outboxes:
        worker.submit([make_sequence([1], 2, outbox=outbox)])
    await until(lambda: all(outbox.deltas and outbox.deltas[-1].finish_reason for outbox in outboxes))
    worker.close()


async def test_a_hung_step_does_not_keep_the_server_from_ending(
    gated: tuple[Worker, GatedRunner], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker, runner = gated
    monkeypatch.setattr("bdh_batch.engine.worker.STEP_SECONDS", 0.01)
    worker.submit([make_sequence([1], 1)])
    await asyncio.to_thread(runner.entered.acquire)
    worker.close()
    assert "left behind" in caplog.text


async def test_an_abort_frees_the_slot_before_the_next_plan(gated: tuple[Worker, GatedRunner]) -> None:
    worker, runner = gated
    running = make_sequence([1], 100)
    worker.submit([running, make_sequence([2], 100)])
    await asyncio.to_thread(runner.entered.acquire)
    successor = make_sequence([5], 1)
    worker.submit([successor])
    worker.abort([running])
    for _ in range(2):  # the step under way, and the next
        runner.may_run.release()
    await until(lambda: successor.finish_reason is FinishReason.LENGTH)
    assert running.finish_reason is FinishReason.ABORT


async def test_a_failed_step_is_reported_and_the_worker_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    runner = FakeRunner()
    runner.fail_next = True
    worker = Worker(Scheduler(slots=1, prefill_tokens=16), runner, FakeObserver(), max_queued=10)
    lost, good = FakeOutbox(), FakeOutbox()
    worker.submit([make_sequence([1], 3, outbox=lost), make_sequence([2], 3, outbox=good)])
    await until(lambda: len(good.tokens) == 3)
    worker.close()
    assert lost.deltas[-1].finish_reason is FinishReason.ERROR
    assert "on fire" not in str(lost.deltas[-1].error)
    assert "on fire" in caplog.text


async def test_a_dead_engine_ends_what_waits_and_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(slots=1, prefill_tokens=16)
    worker = Worker(scheduler, FakeRunner(), FakeObserver(), max_queued=10)
    assert worker.alive

    def broken(now: float) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(scheduler, "plan", broken)
    outbox = FakeOutbox()
    worker.submit([make_sequence([1], 3, outbox=outbox)])
    await until(lambda: bool(outbox.deltas))
    assert outbox.deltas[-1].finish_reason is FinishReason.ERROR
    await until(lambda: not worker.alive)
    with pytest.raises(Unavailable):
        worker.submit([make_sequence([1], 3)])


async def test_closing_ends_what_still_runs() -> None:
    runner = GatedRunner()
    worker = Worker(Scheduler(slots=1, prefill_tokens=16), runner, FakeObserver(), max_queued=10)
    outboxes = [FakeOutbox() for _ in range(3)]
    for outbox in outboxes:
        worker.submit([make_sequence([1], 3, outbox=outbox)])
    closing = asyncio.create_task(asyncio.to_thread(worker.close))
    await until(lambda: not worker.alive)  # it is asked to stop, and in its first step
    runner.may_run.release()
    await closing
    await until(lambda: all(outbox.deltas for outbox in outboxes))
    assert all(outbox.deltas[-1].finish_reason is FinishReason.ERROR for outbox in outboxes)


async def test_stalling_is_time_without_a_step_while_there_is_work(gated: tuple[Worker, GatedRunner]) -> None:
    worker, runner = gated
    assert worker.stalled_for() == 0
    worker.submit([make_sequence([1], 1)])
    await asyncio.to_thread(runner.entered.acquire)
    await until(lambda: worker.stalled_for() > 0.02)
    runner.may_run.release()
    await until(lambda: worker.stalled_for() == 0)


async def test_a_mailbox_keeps_deltas_apart_for_a_reader_that_keeps_up_and_merges_them_for_one_that_does_not() -> None:
    mailbox = Mailbox()
    mailbox.put(0, Delta("a", [1]))
    mailbox.put(1, Delta("b", [2]))
    assert await mailbox.take() == [(0, Delta("a", [1])), (1, Delta("b", [2]))]
    for index in range(1000):
        mailbox.put(index % 2, Delta(str(index % 10), [index]))
    mailbox.put(0, Delta("!", [7], FinishReason.LENGTH))
    deltas = await mailbox.take()
    assert len(deltas) == BACKLOG
    assert [token for index, delta in deltas if index == 0 for token in delta.tokens] == [*range(0, 1000, 2), 7]
    assert "".join(delta.text for index, delta in deltas if index == 1) == "13579" * 100
    assert [delta.finish_reason for _, delta in deltas if delta.finish_reason] == [FinishReason.LENGTH]


async def test_failures_on_end_are_unhealthy_until_a_step_succeeds(caplog: pytest.LogCaptureFixture) -> None:
    runner = FakeRunner()
    worker = Worker(Scheduler(slots=1, prefill_tokens=16), runner, FakeObserver(), max_queued=10, failed_steps=2)
    for failures, well in ((1, True), (2, False)):
        runner.fail_next = True
        outbox = FakeOutbox()
        worker.submit([make_sequence([1], 1, outbox=outbox)])
        await until(lambda outbox=outbox: bool(outbox.deltas))  # type: ignore[misc]
        assert (worker.health(60.0) is None) == well, failures
    good = FakeOutbox()
    worker.submit([make_sequence([1], 1, outbox=good)])
    await until(lambda: bool(good.tokens))
    assert worker.health(60.0) is None
    worker.close()
    assert caplog.text.count("Traceback") == 1


async def test_running_out_of_memory_is_reported_and_loses_nobody(caplog: pytest.LogCaptureFixture) -> None:
    class Small(FakeRunner):
        def run(self, plan: Plan) -> Outcome:
            if plan.tokens > 20:
                raise OutOfMemory("no more than 20 tokens fit")
            return super().run(plan)

    worker = Worker(Scheduler(slots=2, prefill_tokens=64), Small(), FakeObserver(), max_queued=10)
    outbox = FakeOutbox()
    worker.submit([make_sequence([3] * 100, 5, outbox=outbox)])
    await until(lambda: len(outbox.tokens) == 5)
    worker.close()
    assert outbox.tokens == expected_tokens([3] * 100, 5)
    assert "at most 16 prompt tokens" in caplog.text


async def test_a_stall_is_logged_once_with_its_plan(
    gated: tuple[Worker, GatedRunner], caplog: pytest.LogCaptureFixture
) -> None:
    worker, runner = gated
    worker.submit([make_sequence([1], 1, name="the one")])
    await asyncio.to_thread(runner.entered.acquire)
    await until(lambda: worker.health(0.01) is not None)
    assert worker.health(0.01) is not None
    assert caplog.text.count("the one") == 1
    runner.may_run.release()
    await until(lambda: worker.health(0.01) is None)


async def test_memory_that_is_idle_goes_back_though_nothing_is_asked_for() -> None:
    model = load_model(TINY, torch.float32, torch.device("cpu"))
    pool = StatePool(model.config, 4, torch.device("cpu"))
    scheduler = Scheduler(slots=4, prefill_tokens=16, policy=Policy(idle_release=0.05))
    observer = FakeObserver()
    worker = Worker(scheduler, Runner(TorchKernels(model.weights), pool), observer, max_queued=10)

    async def ask(count: int) -> list[list[int]]:
        outboxes = [FakeOutbox() for _ in range(count)]
        for outbox in outboxes:
            completion = Completion([1, 2, 3], 4, SamplingParams(temperature=0.0), FakeText())
            sequence = make_sequence([1, 2, 3], 4, outbox=outbox, completion=completion)
            worker.submit([sequence])
        await until(lambda: all(len(outbox.tokens) == 4 for outbox in outboxes))
        return [outbox.tokens for outbox in outboxes]

    first = await ask(3)
    steps = observer.steps
    await until(lambda: not any(resident(state) for state in pool.states[:3]))
    assert observer.steps == steps, "nothing was computed for it"
    assert await ask(3) == first
    worker.close()


class Held:
    """In the place of `Anticipation`: the next plan waits for a tenant, however long it takes."""

    awaited: str | None = None

    def until(self, now: float) -> float:
        return now if self.awaited is None else now + 600.0

    def left(self, tenant: str, goes_first: bool, seconds: float, now: float) -> None:
        pass

    def arrived(self, tenant: str, now: float) -> None:
        if tenant == self.awaited:
            self.awaited = None


async def test_ends_are_published_though_a_plan_waits_for_a_tenant(gated: tuple[Worker, GatedRunner]) -> None:
    worker, runner = gated
    worker._scheduler.anticipation = held = Held()  # type: ignore[assignment]
    outbox = FakeOutbox()
    worker.submit([make_sequence([1], 100, outbox=outbox)])
    await asyncio.to_thread(runner.entered.acquire)
    held.awaited = "lone"
    runner.may_run.release()
    await until(lambda: len(outbox.tokens) == 1)
    worker.fail_all(GenerationFailed("the engine is unloaded"))
    await until(lambda: outbox.deltas[-1].finish_reason is FinishReason.ERROR)


async def test_a_plan_waits_for_a_tenant_and_takes_in_what_comes_meanwhile(gated: tuple[Worker, GatedRunner]) -> None:
    worker, runner = gated
    worker._scheduler.anticipation = held = Held()  # type: ignore[assignment]
    others = [make_sequence([1], 100, tenant="flood") for _ in range(2)]
    worker.submit(others)
    await asyncio.to_thread(runner.entered.acquire)
    held.awaited = "lone"
    runner.may_run.release()
    await until(lambda: len(others[0].generated) == 1)
    worker.abort(others[:1])  # is taken in, but ends no wait
    await until(lambda: others[0].finish_reason is FinishReason.ABORT)
    assert not runner.entered.acquire(blocking=False), "no step has begun"
    lone = make_sequence([2], 1, tenant="lone")
    worker.submit([lone])
    await asyncio.to_thread(runner.entered.acquire)
    held.awaited = "lone"
    runner.may_run.release()
    await until(lambda: lone.finish_reason is FinishReason.LENGTH)
    assert len(others[1].generated) == 2, "it was in the step that followed"
    runner.may_run.release()
    worker.close()  # after one step more, though a plan waits
    await until(lambda: others[1].finish_reason is not None)
