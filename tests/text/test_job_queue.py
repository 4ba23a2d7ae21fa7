"""The queue of the sandbox: fair to tenants, bounded, and left by those who do not wait any more."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings, strategies as st

from bdh_batch.errors import QueueFull
from bdh_batch.text.job_queue import JobQueue, QueueLimits


async def settle() -> None:
    """Until all that can go on has done so."""
    for _ in range(5):
        await asyncio.sleep(0)


def take(queue: JobQueue, tenants: Sequence[str], size: int = 1) -> list[asyncio.Task[None]]:
    return [asyncio.ensure_future(queue.take(tenant, size)) for tenant in tenants]


def came(tasks: Sequence[asyncio.Task[None]]) -> list[bool]:
    return [task.done() and not task.cancelled() and task.exception() is None for task in tasks]


async def test_one_tenant_never_has_all_jobs() -> None:
    queue = JobQueue(QueueLimits(at_once=2))
    slow = take(queue, ["a"] * 3)
    await settle()
    assert came(slow) == [True, False, False]
    (quick,) = take(queue, ["b"])
    await settle()
    assert quick.done()
    queue.give_back("a")
    await settle()
    assert came(slow) == [True, True, False]
    queue.give_back("b")
    queue.give_back("a")
    await settle()
    assert came(slow) == [True] * 3
    queue.give_back("a")
    assert (queue.waiting, queue.running) == (0, 0)


async def test_jobs_start_tenant_by_tenant_and_in_order_inside_each() -> None:
    queue = JobQueue(QueueLimits(at_once=1))
    order: list[str] = []

    async def one(tenant: str, name: str) -> None:
        await queue.take(tenant, 1)
        order.append(name)
        queue.give_back(tenant)

    await queue.take("z", 1)
    tasks = [asyncio.ensure_future(one(name[0], name)) for name in ("a1", "a2", "a3", "b1", "c1", "b2")]
    await settle()
    queue.give_back("z")
    await asyncio.gather(*tasks)
    assert order == ["a1", "b1", "c1", "a2", "b2", "a3"]


@pytest.mark.parametrize("limits", [QueueLimits(1, most_waiting=4), QueueLimits(1, most_bytes=40)])
async def test_a_full_queue_is_full_for_those_who_fill_it(limits: QueueLimits) -> None:
    queue = JobQueue(limits)
    await queue.take("a", 10)
    waiting = take(queue, ["a"] * 4, 10)
    await settle()
    with pytest.raises(QueueFull, match="sandbox"):
        await queue.take("a", 10)
    (other,) = take(queue, ["b"], 10)
    await settle()
    assert [task.done() for task in waiting] == [False, False, False, True]
    assert isinstance(waiting[3].exception(), QueueFull)
    queue.give_back("a")
    await settle()
    assert (came(waiting[:1]), other.done()) == ([True], False)
    queue.give_back("a")
    await settle()
    assert other.done()
    for task in waiting:
        task.cancel()


async def test_who_waits_for_too_long_gets_an_error_and_is_gone() -> None:
    queue = JobQueue(QueueLimits(1, seconds=0.01))
    await queue.take("a", 1)
    with pytest.raises(QueueFull, match=r"0\.01 s \(sandbox\.queue_seconds\)"):
        await queue.take("b", 1)
    assert queue.waiting == 0
    queue.give_back("a")
    await queue.take("b", 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["take", "cancel", "give_back"])), max_size=60))
async def test_starts_are_neither_lost_nor_given_twice(acts: list[tuple[str, str]]) -> None:
    queue = JobQueue(QueueLimits(at_once=3, most_waiting=8))
    tasks: dict[str, list[asyncio.Task[None]]] = {tenant: [] for tenant in "abc"}
    held: Counter[str] = Counter()
    for tenant, act in acts:
        if act == "take":
            tasks[tenant] += take(queue, [tenant])
        elif act == "cancel" and tasks[tenant]:
            tasks[tenant][-1].cancel()  # it may start at the same moment
        elif act == "give_back" and held[tenant]:
            held[tenant] -= 1
            queue.give_back(tenant)
        if len(tasks[tenant]) % 2:
            await settle()
        for each in "abc":
            held[each] += sum(came(tasks[each]))
            tasks[each] = [task for task in tasks[each] if not task.done()]
    await settle()
    for each in "abc":
        held[each] += sum(came(tasks[each]))
        tasks[each] = [task for task in tasks[each] if not task.done()]
    assert queue.running == held.total() <= 3
    assert queue.waiting == sum(map(len, tasks.values()))
    assert max(held.values(), default=0) <= 2
    if queue.running < 3:
        assert not any(tasks[each] for each in "abc" if held[each] < 2)
    for waiting in tasks.values():
        for task in waiting:
            task.cancel()
    await settle()
    assert queue.waiting == 0
