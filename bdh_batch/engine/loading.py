"""Makes an engine of settings and a model's files: weights, kernels, memory for states, a scheduler.

Knows nothing of HTTP, or of text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch

from bdh_batch.checkpoint.checkpoint import Model, fingerprint, load_model
from bdh_batch.checkpoint.config import BDHConfig, Given, bytes_per_sequence
from bdh_batch.engine.narrow_states import narrow_bytes
from bdh_batch.engine.neurons import most_watched
from bdh_batch.engine.pages import HUGE
from bdh_batch.engine.runner import Runner
from bdh_batch.engine.state_io import StateIO
from bdh_batch.engine.state_pool import StatePool, slots_within
from bdh_batch.engine.torch_threads import keep_to_one_thread
from bdh_batch.engine.trace import Trace
from bdh_batch.engine.worker import Observer, StepRunner, Worker
from bdh_batch.errors import ConfigError, NotEnoughMemory, OutOfMemory
from bdh_batch.kernels.cpu import CpuKernels
from bdh_batch.kernels.select import select_kernels
from bdh_batch.kernels.vector import most_threads
from bdh_batch.messages import StateLayout
from bdh_batch.scheduler import working_set
from bdh_batch.scheduler.batch import Step
from bdh_batch.scheduler.copies import WHOLE, CopyLimits
from bdh_batch.scheduler.policy import Policy
from bdh_batch.scheduler.scheduler import Scheduler
from bdh_batch.settings import Engine, Model as ModelOptions, PrefixCache, Settings
from bdh_batch.system.device_memory import free_memory
from bdh_batch.system.machine import usable_cores

log = logging.getLogger(__name__)

MODEST = 4 * 2**30  # bytes for states in main memory, where the settings are silent
FEW = 4  # states; where fewer fit, the memory for them is too small
HOST_MEMORY = 2**30  # bytes for states there, where the settings are silent
FILE_MEMORY = 2**29  # bytes for states from and to files, likewise
LEAST_TRANSFERS, MOST_TRANSFERS = 2, 64  # of them at a time, whatever their memory: one each way, at least
COPIED = 3 * 2**26  # bytes of states that are copied in one step of a CPU: more would take too long
PART = 2**22  # bytes of a state that are copied at least
READY = 2  # free states that keep their memory: a turn takes two, and its file's another two
ROUNDED = {torch.int8: 10, torch.bfloat16: 2}  # times as long as a copy takes a CPU one that rounds, about


@dataclass(frozen=True)
class LoadedEngine:
    """A loaded engine, whose worker the event loop has to start."""

    model: Model
    runner: StepRunner
    slots: int
    host_slots: int
    grows: bool = False  # whether a slot takes memory only when it is first used
    fingerprint: str = ""  # of the weights
    states: StateIO | None = None  # reads and writes states
    copies: CopyLimits = WHOLE
    kernels: str = ""  # which compute, why, and with what arithmetic
    prepare: Callable[[bool], bool] = lambda idle: False  # see `Worker`
    begin: Callable[[], None] = lambda: None  # likewise


def load_engine(settings: Settings, path: Path) -> LoadedEngine:
    """Reads the model, takes the memory for its states, and computes once. Slow: call it off the event loop.

    Raises:
        ConfigError, CheckpointError
    """
    set_threads(settings.engine.threads)
    device = choose_device(settings.model.device)
    dtype: torch.dtype = getattr(torch, settings.model.dtype)
    model = load_model(path, dtype, device, given_by(settings.model))
    window = attention_window(settings.model.attention_window, model.config)
    state_dtype: torch.dtype = getattr(torch, settings.engine.state_dtype)
    kernels, reason = select_kernels(
        settings.engine.kernels, model.weights, window, state_dtype, model.config.latent_steps
    )
    each = bytes_per_sequence(model.config, window, state_dtype)
    budget = state_budget(settings.engine, device, each)
    most = settings.scheduler.max_running + (settings.prefix_cache.entries if settings.prefix_cache.enabled else 0)
    slots = slots_within(budget, each, most)
    log.info(
        "model %s: %d layers, width %d, %d neurons, vocabulary %d; %s on %s",
        *(path, model.config.n_layer, model.config.n_embd, model.config.neurons, model.config.vocab_size),
        *(settings.model.dtype, device),
    )
    log.info("kernels: %s; attention window: %s", reason, f"{window} tokens" if window else "none")
    host_dtype = narrow_dtype(settings.prefix_cache, state_dtype)
    host_each = each if host_dtype is None else narrow_bytes(StatePool.shape_of(model.config, window), host_dtype)
    host_slots = min(host_budget(settings.prefix_cache, device, slots * each) // host_each, most)
    transfer_slots = transfer_budget(settings.engine.file_memory, each)
    pool = take_states(model.config, slots, device, window, state_dtype, host_slots, transfer_slots, host_dtype)
    slots, host_slots = len(pool.states), pool.host_slots
    log.info(
        "state: %d sequences of %.1f MiB in %s, %.2f GiB of a budget of %.2f GiB; %d more in the host's memory",
        *(slots, each / 2**20, settings.engine.state_dtype, slots * each / 2**30, budget / 2**30, host_slots),
    )
    if slots < FEW:
        log.warning(
            "only %d sequences fit the memory for states, %.2f GiB: engine.state_memory sets it, "
            "engine.state_dtype=bfloat16 halves what each takes",
            *(slots, budget / 2**30),
        )
    runner = Runner(kernels, pool, model.weights.latent_embed, model.neuron_order)
    log.info("warming up: kernels that are not in the cache are compiled now")
    warm(runner, settings.scheduler.prefill_tokens)
    if device.type == "cpu" and pool.states.nbytes >= HUGE:
        where = "are in huge pages" if pool.huge_bytes else "are not in huge pages, as the system gives none: slower"
        log.info("states %s", where)
    weights, grows = fingerprint(model.weights), device.type == "cpu"
    states = StateIO(pool, state_layout(pool, weights, window))
    copies = copy_limits(each, host_dtype) if grows else WHOLE
    begin = keep_to_one_thread if isinstance(kernels, CpuKernels) else lambda: None
    return LoadedEngine(
        model, runner, slots, host_slots, grows, weights, states, copies, reason, pool.back_ahead, begin
    )


def warm(runner: Runner, chunk: int) -> None:
    """Computes a prefill chunk of so many tokens, and decode steps. On a GPU these become graphs, whose memory is in no
    budget.

    Raises:
        NotEnoughMemory: the states leave too little.
    """
    try:
        runner.warm(chunk)
    except (MemoryError, torch.OutOfMemoryError, OutOfMemory) as error:
        reason = str(error).partition("\n")[0]
        raise NotEnoughMemory(
            f"engine.state_memory: the states leave too little memory for steps ({reason}); set it lower, or "
            "scheduler.prefill_tokens"
        ) from error


def given_by(model: ModelOptions) -> Given:
    """What the settings say about a model that its file may leave open."""
    return Given(**{field.name: getattr(model, field.name) for field in fields(Given)})


def set_threads(asked: int | None) -> None:
    """As many as are asked for; else one for each core that a control group's quota gives time for.

    Raises:
        ConfigError: Numba cannot have more than it began with, one for each core.
    """
    cores = usable_cores()
    threads = min(torch.get_num_threads(), cores) if asked is None else asked
    if threads > (most := most_threads()):
        raise ConfigError(f"engine.threads: {threads} asked for, this machine has cores for {most}")
    if threads > cores:
        log.warning("engine.threads: %d asked for, but a quota gives time for %d: they will wait", threads, cores)
    log.info("threads: %d of %d usable cores", threads, cores)
    torch.set_num_threads(threads)


def narrow_dtype(cache: PrefixCache, state_dtype: torch.dtype) -> torch.dtype | None:
    """The dtype of states on the host, where it is narrower than that in which they are computed."""
    asked: torch.dtype = state_dtype if cache.dtype is None else getattr(torch, cache.dtype)
    return asked if asked.itemsize < state_dtype.itemsize else None


def transfer_budget(asked: int | None, each: int) -> int:
    """How many states of `each` bytes may be on their way from and to files at a time."""
    budget = min(FILE_MEMORY, free_memory(torch.device("cpu")) // 8) if asked is None else asked
    return max(LEAST_TRANSFERS, min(MOST_TRANSFERS, budget // each))


def copy_limits(each: int, host_dtype: torch.dtype | None) -> CopyLimits:
    """How much of states of `each` bytes a CPU copies in one step; on the host they may be narrower.

    A state is copied in parts, and what needs more time than a step has for copies goes on in the next ones."""
    parts = max(1, each // PART)
    return CopyLimits(parts, max(1, parts * COPIED // each), 1 if host_dtype is None else ROUNDED[host_dtype])


def state_layout(pool: StatePool, weights: str, window: int) -> StateLayout:
    """The layout of the states in `pool`, for a model of that fingerprint."""
    dtype: Literal["F32", "BF16"] = "F32" if pool.states.dtype == torch.float32 else "BF16"
    hidden = 0 if pool.vectors is None else pool.states.shape[-1]
    return StateLayout(weights, dtype, tuple(pool.states.shape[1:]), window, hidden)


def take_states(
    config: BDHConfig,
    slots: int,
    device: torch.device,
    window: int,
    dtype: torch.dtype,
    host_slots: int,
    transfer_slots: int = 0,
    host_dtype: torch.dtype | None = None,
) -> StatePool:
    """Memory for so many states, or for fewer, with a warning, where so much cannot be allocated: first fewer on
    the host, but where it is the device that has no more.

    Raises:
        ConfigError: not even one fits.
    """
    while slots:
        try:
            return StatePool(config, slots, device, window, dtype, host_slots, transfer_slots, host_dtype=host_dtype)
        except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:  # CPU allocations fail as RuntimeError
            reason = str(error).partition("\n")[0]
            text = "the memory for %d states, and %d on the host, cannot be allocated (%s)"
            log.warning(text, slots, host_slots, reason)
            if isinstance(error, torch.OutOfMemoryError) or not (host_slots or transfer_slots > LEAST_TRANSFERS):
                slots //= 2
            elif host_slots:
                host_slots //= 2
            else:
                transfer_slots = max(LEAST_TRANSFERS, transfer_slots // 2)
    raise NotEnoughMemory("engine.state_memory: there is not enough memory for one sequence's state")


def host_budget(cache: PrefixCache, device: torch.device, taken: int) -> int:
    """Bytes of host memory for swapped sequences and cached prefixes; `taken` are for those on the device. Where that
    is the CPU, they would be copied from memory to memory: there are none unless they are asked for."""
    on_cpu = device.type == "cpu"
    free = max(0, free_memory(torch.device("cpu")) - (taken if on_cpu else 0))
    if cache.host_memory is None:
        return 0 if on_cpu and cache.dtype is None else min(HOST_MEMORY, free // 4)
    if cache.host_memory > free:
        raise ConfigError(f"prefix_cache.host_memory: {cache.host_memory:,} bytes asked for, {free:,} are free")
    return cache.host_memory


def scheduler_for(settings: Settings, engine: LoadedEngine) -> Scheduler:
    chosen, cache, config = settings.scheduler, settings.prefix_cache, engine.model.config
    running, free_slots = chosen.max_running, None
    if engine.grows:
        if "max_running" not in chosen.model_fields_set:
            running = min(running, working_set.running_slots(engine.slots))
        free_slots = working_set.free_slots(engine.slots, running)
        log.info(
            "at most %d sequences run at once; %d states have memory for the asking, more where requests show the need",
            *(min(running, engine.slots), free_slots),
        )
    policy = Policy(
        host_slots=engine.host_slots,
        swaps=narrow_dtype(cache, getattr(torch, settings.engine.state_dtype)) is None,
        transfer_slots=0 if engine.states is None else engine.states.slots,
        copies=engine.copies,
        max_running=running,
        time_slice=chosen.quantum_steps,
        target_step=chosen.target_step_ms / 1000,
        cache_prefixes=cache.enabled,
        share_all=cache.shared,
        min_shared=cache.min_tokens,
        weights=chosen.weights,
        free_slots=free_slots,
        idle_release=settings.engine.idle_release_seconds if engine.grows else 0.0,
        idle_kept=READY,
        patience=chosen.priority_patience_seconds,
        most_watched=most_watched(config.n_layer, config.n_head, config.neurons_per_head),
        queue_unit=max(1, chosen.max_queued_tokens // chosen.max_queued_requests),
    )
    return Scheduler(engine.slots, chosen.prefill_tokens, policy)


def start_worker(
    settings: Settings, engine: LoadedEngine, observer: Observer, before: Callable[[Step], None] = lambda step: None
) -> Worker:
    chosen = settings.scheduler
    return Worker(
        scheduler_for(settings, engine),
        engine.runner,
        observer,
        chosen.max_queued_requests,
        chosen.max_queued_tokens,
        settings.health.failed_steps,
        open_trace(chosen.trace_file),
        before,
        engine.states,
        engine.prepare,
        engine.begin,
    )


def open_trace(file: Path | None) -> Trace | None:
    try:
        return None if file is None else Trace(file)
    except OSError as error:
        raise ConfigError(f"scheduler.trace_file: {file} cannot be written ({error})") from error


def attention_window(asked: int | None, config: BDHConfig) -> int:
    """Tokens that a token can look back on, 0 for all: as asked, else as the model's folder suggests."""
    return config.suggested_window if asked is None else asked


def choose_device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("model.device: cuda was asked for, but torch finds no CUDA device; use cpu or auto")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def state_budget(engine: Engine, device: torch.device, each: int) -> int:
    """Bytes for states of `each` bytes: as asked, else a share of what is free, which without a GPU is modest."""
    free = free_memory(device)
    if engine.state_memory is not None:
        if engine.state_memory > free:
            raise NotEnoughMemory(f"engine.state_memory: {engine.state_memory:,} bytes asked for, {free:,} are free")
        return engine.state_memory
    if engine.state_memory_share is not None:
        budget, how = int(free * engine.state_memory_share), f"{engine.state_memory_share:.0%} of what is free"
    elif device.type == "cuda":
        budget, how = free // 2, "half of what is free"
    else:
        budget, how = min(free // 4, MODEST), f"a quarter of what is free, at most {MODEST // 2**30} GiB"
        if budget < (least := min(FEW * each, free // 2)):
            budget, how = least, f"what {FEW} states take, at most half of what is free"
    log.info("memory for states: %.2f GiB (%s); engine.state_memory sets it", budget / 2**30, how)
    return budget
