"""States across the seam: requests begin in them and have theirs saved, whichever engine computes them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bdh_batch.backends.remote import RemoteBackend
from bdh_batch.errors import GenerationFailed
from bdh_batch.messages import FinishReason, GenerationRequest, Origin, Prompt, SamplingParams, SavedState
from tests.backends.engines import FakeEngine, Whole, empty, engines, read, until

TEXT = list(b"a prompt of some length, which is longer than that")


def request(prompt: list[int], tokens: int, **changes: Any) -> GenerationRequest:
    fields: dict[str, Any] = {"sampling": SamplingParams(), "seeds": (7,) * changes.get("n", 1), **changes}
    return GenerationRequest(Origin("r-1"), [Prompt(prompt)], tokens, **fields)


async def said(backend: RemoteBackend, wanted: GenerationRequest) -> tuple[list[Whole], int]:
    """Returns what the sequences gained, and how many tokens of the first one's prompt were not computed."""
    generation = await backend.generate(wanted)
    wholes = await read(generation, empty(wanted))
    return wholes, generation.cached_tokens[0]


async def test_a_state_is_saved_by_one_engine_and_another_begins_there(tmp_path: Path) -> None:
    one, other = FakeEngine(tmp_path / "one.sock"), FakeEngine(tmp_path / "other.sock")
    path = tmp_path / "state"
    async with engines(one) as backend:
        (whole,), _ = await said(backend, request(TEXT, 40))
        (begun, beside), _ = await said(backend, request(TEXT, 15, n=2, save_to=str(path)))
        assert begun.saved == SavedState(str(path), len(TEXT) + 14)
        assert beside.saved is None
        await until(one.port.idle.is_set)
        assert not backend.replicas["one"].readers
    async with engines(other) as backend:
        known = [*TEXT, *begun.tokens]
        (rest, again), cached = await said(backend, request(known, 25, n=2, state=begun.saved))
        assert begun.tokens + rest.tokens == whole.tokens == begun.tokens + again.tokens
        assert cached == len(TEXT) + 14
        (refused,), _ = await said(backend, request(TEXT, 25, state=SavedState(str(tmp_path / "none"), 7)))
        assert (refused.finish_reason, "there is no file" in refused.error) == (FinishReason.ERROR, True)


@pytest.mark.parametrize(("kill_at", "gone"), [(0, False), (5, False), (5, True)])
async def test_a_stream_that_began_in_a_state_outlives_its_engine(kill_at: int, gone: bool, tmp_path: Path) -> None:
    one, other = FakeEngine(tmp_path / "one.sock"), FakeEngine(tmp_path / "other.sock")
    path = tmp_path / "state"
    async with engines(one, other, max_failovers=100) as backend:
        (undisturbed,), _ = await said(backend, request([*TEXT, 5], 40))
        (prompt,), _ = await said(backend, request(TEXT, 0, save_to=str(path)))
        assert prompt.saved == SavedState(str(path), len(TEXT))
        wanted = request([*TEXT, 5], 40, state=prompt.saved, save_to=str(tmp_path / "next"))
        wholes = empty(wanted)
        reading = asyncio.create_task(read(await backend.generate(wanted), wholes))
        computes = one if backend.replicas["one"].readers else other
        await until(lambda: len(wholes[0].tokens) >= kill_at)
        if gone:
            path.unlink()
        await computes.kill()
        await computes.start()
        (whole,) = await reading
        assert whole.facts() == undisturbed.facts()
        assert whole.saved == SavedState(str(tmp_path / "next"), len(TEXT) + 40)


async def test_an_engine_that_is_lost_while_it_writes_says_so_and_the_response_is_whole(tmp_path: Path) -> None:
    one, other = FakeEngine(tmp_path / "one.sock"), FakeEngine(tmp_path / "other.sock")
    async with engines(one, other, max_failovers=100) as backend:
        one.states.stuck = other.states.stuck = True
        wanted = request(TEXT, 10, n=2, save_to=str(tmp_path / "state"))
        wholes = empty(wanted)
        reading = asyncio.create_task(read(await backend.generate(wanted), wholes))
        await until(lambda: wholes[0].finish_reason is not None)
        assert not reading.done()
        await (one if backend.replicas["one"].readers else other).kill()
        first, second = await reading
        assert isinstance(first.saved, str)
        assert (first.error, second.error, len(second.tokens)) == ("", "", 10)
        assert backend.load() == 0


async def test_a_stream_that_fails_says_that_nothing_is_saved(tmp_path: Path) -> None:
    engine = FakeEngine(tmp_path / "one.sock")
    async with engines(engine) as backend:
        wanted = request(TEXT, 1000, save_to=str(tmp_path / "state"))
        wholes = empty(wanted)
        reading = asyncio.create_task(read(await backend.generate(wanted), wholes))
        await until(lambda: len(wholes[0].tokens) > 3)
        (stream,) = backend._streams()
        stream.fail(GenerationFailed("broken"))
        (whole,) = await reading
        assert (whole.error, whole.saved) == ("broken", "The response is not complete.")


async def test_the_tokens_decide_where_a_state_is_not_needed(tmp_path: Path) -> None:
    engine = FakeEngine(tmp_path / "one.sock")
    async with engines(engine) as backend:
        wanted = request(TEXT, 10)
        (plain,), _ = await said(backend, wanted)
        nowhere = replace(wanted, state=SavedState(str(tmp_path / "none"), 7), state_optional=True)
        (whole,), _ = await said(backend, nowhere)
        assert whole.facts() == plain.facts()
