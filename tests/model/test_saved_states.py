"""States that go through files: who goes on from one says what it would have said without a break, byte for byte."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Sequence as Many
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bdh_batch.backends.local import LocalBackend
from bdh_batch.checkpoint.checkpoint import fingerprint, load_model
from bdh_batch.engine.loading import state_layout
from bdh_batch.engine.runner import Runner
from bdh_batch.engine.state_files import Interrupted, read_state
from bdh_batch.engine.state_io import StateIO
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.engine.worker import Worker
from bdh_batch.errors import InvalidRequest
from bdh_batch.kernels.base import Kernels
from bdh_batch.kernels.cpu import CpuKernels
from bdh_batch.kernels.torch_reference import TorchKernels
from bdh_batch.messages import Delta, FinishReason, GenerationRequest, Origin, Prompt, SamplingParams, SavedState
from bdh_batch.scheduler.copies import CopyLimits
from bdh_batch.scheduler.invariants import check_invariants
from bdh_batch.scheduler.policy import Policy
from bdh_batch.scheduler.prefixes import pack
from bdh_batch.scheduler.scheduler import Scheduler
from bdh_batch.text.tokenizer import ByteTokenizer
from tests.model.test_state_files import full_disk as full_disk
from tests.scheduler.fakes import FakeObserver

CPU = torch.device("cpu")
TINY = Path(__file__).parents[1] / "data" / "conformance" / "tiny"
TEXT = bytes(97 + 7 * at % 26 for at in range(90))


@dataclass
class Engine:
    """An engine in this process, with the tiny model."""

    backend: LocalBackend
    worker: Worker
    scheduler: Scheduler
    runner: Runner

    @property
    def at_rest(self) -> bool:
        """Whether it has nothing to do, and no state is on its way."""
        transfers = self.scheduler.transfers
        return not self.scheduler.has_work and transfers._slots.free_count == transfers.count


def start(
    slots: int = 3,
    transfers: int = 4,
    cached: bool = True,
    kernels: type[Any] = CpuKernels,
    window: int = 0,
    dtype: torch.dtype = torch.float32,
    host_slots: int = 0,
    time_slice: int = 64,
    host_dtype: torch.dtype | None = None,
) -> Engine:
    model = load_model(TINY, torch.float32, CPU)
    made: Kernels = kernels(model.weights, window)
    pool = StatePool(model.config, slots, CPU, window, dtype, host_slots, transfers, host_dtype=host_dtype)
    states = StateIO(pool, state_layout(pool, fingerprint(model.weights), window))
    policy = Policy(
        host_slots=host_slots,
        transfer_slots=transfers,
        cache_prefixes=cached,
        max_running=slots + max(0, host_slots - 1),
        swaps=host_dtype is None,
        time_slice=time_slice,
        copies=CopyLimits(4, 5, 2),
    )
    scheduler, runner = Scheduler(slots, 32, policy), Runner(made, pool)
    worker = Worker(scheduler, runner, FakeObserver(), 500, states=states)
    vocabulary = model.config.vocab_size
    return Engine(LocalBackend(worker, ByteTokenizer(), vocabulary, None, 60.0), worker, scheduler, runner)


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    engine = start()
    yield engine
    engine.worker.close()


def request(prompt: Many[int], max_tokens: int = 20, seed: int = 3, **changes: Any) -> GenerationRequest:
    sampling = SamplingParams(temperature=0.9)
    of: dict[str, Any] = {"sampling": sampling, "seeds": (seed,), "ignore_eos": True, **changes}
    return GenerationRequest(Origin("r"), [Prompt(prompt)], max_tokens, **of)


async def deltas_of(engine: Engine, asked: GenerationRequest) -> tuple[list[Delta], Many[int]]:
    """Returns all that a request gained, of all its sequences, and how many tokens of each were not computed."""
    generation = await engine.backend.generate(asked)
    async with asyncio.timeout(300):
        gained = [delta async for deltas in generation for _, delta in deltas]
    cached = generation.cached_tokens
    generation.abort()
    return gained, cached


async def said(engine: Engine, asked: GenerationRequest) -> list[int]:
    gained, _ = await deltas_of(engine, asked)
    return [token for delta in gained for token in delta.tokens]


async def save(engine: Engine, asked: GenerationRequest, path: Path) -> tuple[list[int], SavedState]:
    gained, _ = await deltas_of(engine, replace(asked, save_to=str(path)))
    saved = gained[-1].saved
    assert saved is not None, gained[-1]
    assert sum(delta.ends for delta in gained) == 2
    return [token for delta in gained for token in delta.tokens], saved


async def rest(engine: Engine) -> None:
    async with asyncio.timeout(300):
        while not engine.at_rest:  # noqa: ASYNC110 - what is waited for happens in a thread
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("window", [0, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
async def test_what_goes_on_from_a_file_equals_what_was_never_interrupted(
    tmp_path: Path, window: int, dtype: torch.dtype
) -> None:
    first = start(window=window, dtype=dtype)
    whole = await said(first, request(TEXT, 60))
    begun, saved = await save(first, request(TEXT, 25), tmp_path / "state")
    first.worker.close()
    assert begun == whole[:25]
    assert saved == SavedState(str(tmp_path / "state"), len(TEXT) + 24)  # the last token has not entered it
    second = start(window=window, dtype=dtype)  # as after a restart
    known = [*TEXT, *begun]
    gained, cached = await deltas_of(second, request(known, 35, state=saved))
    assert [token for delta in gained for token in delta.tokens] == whole[25:]
    assert cached == [saved.tokens]
    # From the middle of what was said, and with another continuation.
    other = [*known, *b"and another turn"]
    alone = await said(second, request(other, 20))
    gained, cached = await deltas_of(second, request(other, 20, state=saved))
    assert [token for delta in gained for token in delta.tokens] == alone
    second.worker.close()


async def test_twenty_turns_compute_only_what_is_new(tmp_path: Path) -> None:
    engine = start(cached=False)
    turns = [bytes([97 + turn]) * (3 + turn) for turn in range(20)]
    known: list[int] = []
    saved: SavedState | None = None
    for number, turn in enumerate(turns):
        known += turn
        asked = request([*known], 8, state=saved)
        gained, cached = await deltas_of(engine, replace(asked, save_to=str(tmp_path / f"{number}")))
        assert cached == [0 if saved is None else saved.tokens]
        tokens = [token for delta in gained for token in delta.tokens]
        assert tokens == await said(engine, request([*known], 8))
        known += tokens
        saved = gained[-1].saved
    await rest(engine)
    engine.worker.close()


async def test_a_prompt_alone_can_be_saved(engine: Engine, tmp_path: Path) -> None:
    _, saved = await save(engine, request(TEXT, 0), tmp_path / "state")
    assert saved.tokens == len(TEXT)
    with pytest.raises(InvalidRequest, match="90 tokens: the prompt, of 90, has to begin with them and go on"):
        await engine.backend.generate(request(TEXT, state=saved))
    assert await said(engine, request([*TEXT, 5], state=saved)) == await said(engine, request([*TEXT, 5]))


@pytest.mark.parametrize("cached", [True, False])
async def test_a_hundred_forks_each_say_what_they_say_alone(tmp_path: Path, cached: bool) -> None:
    engine = start(slots=4, cached=cached, host_slots=3, time_slice=4)
    _, saved = await save(engine, request(TEXT, 0), tmp_path / "state")
    asked = [request([*TEXT, 97 + fork % 26, 97 + fork // 26], 6, seed=fork) for fork in range(100)]
    alone = [await said(engine, each) for each in asked]
    engine.worker.close()
    engine = start(slots=4, cached=cached, host_slots=3, time_slice=4)
    together = await asyncio.gather(*(deltas_of(engine, replace(each, state=saved)) for each in asked))
    assert [[token for delta in gained for token in delta.tokens] for gained, _ in together] == alone
    assert all(count >= saved.tokens for _, (count,) in together)
    await rest(engine)
    check_invariants(engine.scheduler)
    engine.worker.close()


async def test_n_choices_each_begin_in_the_state_and_the_first_is_saved(tmp_path: Path) -> None:
    engine = start(cached=False)
    _, saved = await save(engine, request(TEXT, 0), tmp_path / "state")
    many = request([*TEXT, 5], 10, n=4, seeds=(1, 2, 3, 4))
    (gained, cached), plain = await deltas_of(engine, replace(many, state=saved, save_to=str(tmp_path / "next"))), many
    assert list(cached) == [saved.tokens] * 4
    assert sum(delta.ends for delta in gained) == 5
    tokens = sorted(token for delta in gained for token in delta.tokens)
    assert tokens == sorted(await said(engine, plain))
    engine.worker.close()


async def test_two_prompts_begin_in_one_state(engine: Engine, tmp_path: Path) -> None:
    _, saved = await save(engine, request(TEXT, 0), tmp_path / "state")
    prompts = [Prompt([*TEXT, 5, 6]), Prompt([*TEXT, 7])]
    both = replace(request([]), prompts=prompts, seeds=(1, 2))
    _, cached = await deltas_of(engine, replace(both, state=saved))
    assert all(count >= saved.tokens for count in cached)


async def test_a_bad_state_is_the_requests_fault_or_computed_where_it_may_be(tmp_path: Path) -> None:
    engine = start(cached=False)
    _, saved = await save(engine, request(TEXT, 0), tmp_path / "state")
    content = bytearray((tmp_path / "state").read_bytes())
    content[-1] ^= 1
    (tmp_path / "damaged").write_bytes(content)
    asked = request([*TEXT, 5])
    alone = await said(engine, asked)
    for state, reason in (
        (replace(saved, path=str(tmp_path / "damaged")), "checksum"),
        (replace(saved, path=str(tmp_path / "nothing")), "No such file"),
        (replace(saved, path=str(tmp_path)), "directory"),
        (replace(saved, tokens=50), "tokens"),
    ):
        gained, _ = await deltas_of(engine, replace(asked, state=state))
        assert gained[-1].finish_reason is FinishReason.ERROR
        error = gained[-1].error
        assert isinstance(error, InvalidRequest)
        assert (error.param, reason in error.message) == ("state", True), error.message
        assert str(tmp_path) not in error.message
        gained, cached = await deltas_of(engine, replace(asked, state=state, state_optional=True))
        assert [token for delta in gained for token in delta.tokens] == alone
        assert cached == [0]
    await rest(engine)
    engine.worker.close()


async def test_the_state_of_another_model_or_dtype_is_refused(tmp_path: Path) -> None:
    engine = start()
    _, saved = await save(engine, request(TEXT, 0), tmp_path / "state")
    engine.worker.close()
    asked = request([*TEXT, 5], state=saved)
    for changes, reason in (({"dtype": torch.bfloat16}, "dtype"), ({"window": 32}, "window")):
        other = start(**changes)
        gained, _ = await deltas_of(other, asked)
        assert reason in str(gained[-1].error)
        other.worker.close()


@pytest.mark.usefixtures("full_disk")
async def test_a_write_that_fails_is_told_and_harms_no_response(engine: Engine, tmp_path: Path) -> None:
    gained, _ = await deltas_of(engine, request(TEXT, save_to=str(tmp_path / "state")))
    assert gained[-1].save_error == "The state could not be written (File too large)."
    assert len([token for delta in gained for token in delta.tokens]) == 20
    assert all(delta.error is None for delta in gained)
    assert os.listdir(tmp_path) == []
    gained, _ = await deltas_of(engine, request(TEXT, save_to=str(tmp_path / "no" / "folder")))
    assert gained[-1].save_error == "The state could not be written (No such file or directory)."
    await rest(engine)


async def test_a_request_that_cannot_use_a_state_says_so(engine: Engine, tmp_path: Path) -> None:
    state = SavedState(str(tmp_path / "state"), 5)
    for changes in ({"prompt_logprobs": 1}, {"sampling": None}):
        with pytest.raises(InvalidRequest, match="about the tokens of the prompt"):
            await engine.backend.generate(request(TEXT, state=state, **changes))
    for tokens in (-1, 0, len(TEXT), len(TEXT) + 1):
        with pytest.raises(InvalidRequest, match="has to begin with them"):
            await engine.backend.generate(request(TEXT, state=replace(state, tokens=tokens)))
    assert await said(engine, request(TEXT, state=state, state_optional=True, prompt_logprobs=1))


async def test_an_engine_without_slots_for_files_says_so(tmp_path: Path) -> None:
    model = load_model(TINY, torch.float32, CPU)
    runner = Runner(TorchKernels(model.weights), StatePool(model.config, 2, CPU))
    worker = Worker(Scheduler(2, 32), runner, FakeObserver(), 10)
    backend = LocalBackend(worker, ByteTokenizer(), 256, None, 60.0)
    engine = Engine(backend, worker, Scheduler(2, 32), runner)
    asked = request(TEXT, state=SavedState("state", 5))
    with pytest.raises(InvalidRequest, match="cannot begin in saved states"):
        await backend.generate(asked)
    assert len(await said(engine, replace(asked, state_optional=True))) == 20
    gained, _ = await deltas_of(engine, request(TEXT, save_to=str(tmp_path / "state")))
    assert gained[-1].save_error == "Too many states are being written."
    worker.close()


async def test_an_engine_that_ends_says_what_was_not_saved(tmp_path: Path) -> None:
    engine = start()
    generation = await engine.backend.generate(request(TEXT, 100_000, save_to=str(tmp_path / "state")))
    async with asyncio.timeout(300):
        engine.worker.close()
        gained = [delta async for deltas in generation for _, delta in deltas]
    assert gained[-1].ends == 2
    assert gained[-1].save_error
    generation.abort()


async def test_a_request_waits_for_no_state_that_is_read_in_advance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start()
    begun, saved = await save(first, request(TEXT, 25), tmp_path / "state")
    first.worker.close()
    engine = start(slots=8, transfers=2)
    asked, goes_on = threading.Event(), threading.Event()
    stopped = list[bool]()

    def slow_once(*given: Any) -> None:
        if not stopped:
            asked.set()
            assert goes_on.wait(300)
            stopped.append(True)
            raise Interrupted
        read_state(*given)

    monkeypatch.setattr("bdh_batch.engine.state_io.read_state", slow_once)
    known = [*TEXT, *begun]
    warming = asyncio.create_task(engine.backend.warm(saved, pack(known[: saved.tokens]), "", ""))
    await asyncio.to_thread(asked.wait)
    assert await said(engine, request(b"another one", 20))
    goes_on.set()
    async with asyncio.timeout(300):
        assert await warming == "cached"  # in the end, by another read
    _, cached = await deltas_of(engine, request(known, 5, state=SavedState("not there", saved.tokens)))
    assert cached == [saved.tokens]
    await rest(engine)
    engine.worker.close()
