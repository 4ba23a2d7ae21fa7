"""Lists of any length are under way in bounded number, and the first failure ends the rest."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import given, strategies as st

from bdh_batch.errors import QueueFull, TooLate
from bdh_batch.llm.window import Job, Window


@given(st.integers(1, 8), st.lists(st.tuples(st.integers(1, 12), st.integers(0, 3)), max_size=30))
def test_no_more_is_under_way_than_there_is_room_for(most: int, jobs: list[tuple[int, int]]) -> None:
    window = Window(most)
    taken = ended = 0
    running: list[int] = []

    async def work(index: int) -> int:
        nonlocal ended
        sequences, turns = jobs[index]
        running.append(sequences)
        assert sum(running) <= most or len(running) == 1
        for _ in range(turns):
            await asyncio.sleep(0)
        running.remove(sequences)
        ended += 1
        return index

    def offered() -> Iterator[Job[int]]:
        nonlocal taken
        for index, (sequences, _) in enumerate(jobs):
            taken += 1
            assert taken - ended <= most + 1  # those that run, and the next one
            yield Job(sequences, lambda index=index: work(index))  # type: ignore[misc]

    done: list[int] = []
    assert asyncio.run(window.all(offered(), done.append)) == [*range(len(jobs))]
    assert sorted(done) == [*range(len(jobs))]
    assert window.used == 0


def test_the_first_failure_ends_the_others() -> None:
    cancelled: list[int] = []
    offered: list[int] = []
    window = Window(4)

    async def work(index: int) -> int:
        try:
            if index == 2:
                raise ValueError("the third")
            return await asyncio.Event().wait() + 0
        except asyncio.CancelledError:
            cancelled.append(index)
            raise

    def jobs() -> Iterator[Job[int]]:
        for index in range(100):
            offered.append(index)
            yield Job(1, lambda index=index: work(index))  # type: ignore[misc]

    with pytest.raises(ValueError, match="the third"):
        asyncio.run(window.all(jobs(), lambda _: None))
    assert len(offered) < 10
    assert {0, 1} <= {*cancelled}
    assert window.used == 0


def test_what_finds_the_queue_full_is_tried_again_when_something_has_ended() -> None:
    window, tries = Window(4), 0
    tried = asyncio.Event()

    async def refused() -> str:
        nonlocal tries
        tries += 1
        tried.set()
        if tries < 3:
            raise QueueFull("full", 60)
        return "done"

    async def other() -> str:
        await tried.wait()
        return "other"

    jobs = [Job(1, refused), Job(1, other), Job(1, other)]
    assert asyncio.run(window.all(jobs, lambda _: None)) == ["done", "other", "other"]
    assert tries == 3


@pytest.mark.parametrize("error", [QueueFull("full", 60), TooLate("late", 60)])
def test_what_would_wait_for_nothing_is_refused(error: QueueFull) -> None:
    async def refused() -> str:
        raise error

    with pytest.raises(type(error)):
        asyncio.run(Window(4).all([Job(1, refused)], lambda _: None))
