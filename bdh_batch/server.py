"""Runs `bdh-batch serve` in this process: the whole server, its supervisor, or a child of the supervisor.

Only a process that computes or serves HTTP imports torch and the rest of the server: a supervisor stays small.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bdh_batch.errors import CheckpointError, ConfigError, NotEnoughMemory
from bdh_batch.processes import supervisor
from bdh_batch.processes.children import Report
from bdh_batch.processes.folder import RuntimeFolder
from bdh_batch.settings import Settings

if TYPE_CHECKING:
    from bdh_batch.processes.local_engine import LoadEngine, StartEngine


async def run(
    settings: Settings,
    arguments: Sequence[str],
    child: str | None,
    announce: Callable[[str, str], None],
    load: LoadEngine | None = None,
    program: Sequence[str] = ("bdh_batch",),
) -> None:
    """Serves as the settings say, until a signal.

    Args:
        arguments: of the command line.
        child: the `ChildSpec` of this process as text, where a supervisor has started it.
        announce: is called with the base URL and the model's name when requests are accepted; in an engine process,
            with its name when front ends can connect.
        load: makes an engine; None is `engine.loading.load_engine`.
        program: the module that children are started as, and what goes before the arguments.

    Raises:
        ConfigError, CheckpointError: it cannot start.
    """
    if child is not None:
        await _run_child(settings, ChildSpec.of(child), announce, load)
    elif supervisor.is_wanted(settings):
        await supervisor.Supervisor(settings, [*program, *arguments], announce).run()
    else:
        await serve(settings, announce, load)


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What a supervisor passes to a child process: its name, the runtime folder, and file descriptors."""

    name: str
    model: int  # the number of the one that an engine computes
    folder: RuntimeFolder  # an engine's is that of its model
    threads: int | None  # that an engine computes with; None is as the settings say
    cores: Sequence[int]  # that it computes on; none is all
    liveness: int  # a socket that closes when the supervisor ends
    report_pipe: int  # a pipe to which the child writes a `Report`
    accepts_early: bool  # whether a front end accepts connections before it has its models
    sockets: Sequence[int]  # at which a front end serves HTTP

    @classmethod
    def of(cls, spec: str) -> ChildSpec:
        """Parses the text that the supervisor makes of it."""
        name, model, folder, threads, cores, liveness, pipe, early, *sockets = spec.split(":")
        return cls(
            *(name, int(model), RuntimeFolder(Path(folder)), int(threads) if threads else None),
            [int(core) for core in cores.split(",") if core],
            *(int(liveness), int(pipe), early == "1", [*map(int, sockets)]),
        )

    def report(self, report: Report) -> None:
        """Notifies the supervisor. To be called once."""
        os.write(self.report_pipe, report.dump())
        os.close(self.report_pipe)


async def _run_child(
    settings: Settings, spec: ChildSpec, announce: Callable[[str, str], None], load: LoadEngine | None
) -> None:
    is_ready = False

    def ready(*_: str) -> None:
        nonlocal is_ready
        is_ready = True
        announce(spec.name, "")
        spec.report(Report(None))

    asyncio.get_running_loop().add_reader(spec.liveness, _orphaned)
    try:
        if spec.name.startswith("engine"):
            await _run_engine(settings, spec, ready, load)
        else:
            from bdh_batch.processes.front_end import run_front_end

            listeners = [socket.socket(fileno=number) for number in spec.sockets]
            await run_front_end(settings, spec.folder, spec.name, listeners, ready, spec.accepts_early)
    except (ConfigError, CheckpointError) as error:
        if not is_ready:
            spec.report(Report(str(error), isinstance(error, NotEnoughMemory)))
        raise


async def _run_engine(settings: Settings, spec: ChildSpec, ready: Callable[[], None], load: LoadEngine | None) -> None:
    if spec.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, spec.cores)  # before Numba and torch are imported, which count the cores then

    from bdh_batch.processes.model_settings import models_of

    model = models_of(settings)[spec.model]  # without torch: a name that no model has is refused at once

    from bdh_batch.engine.loading import load_engine
    from bdh_batch.processes.engine_process import run_engine

    if spec.threads is not None:
        engine = model.settings.engine.model_copy(update={"threads": spec.threads})
        model = replace(model, settings=model.settings.model_copy(update={"engine": engine}))
    await run_engine(model, spec.folder, spec.name, ready, load or load_engine)


async def run_gateway(settings: Settings, announce: Callable[[str, str], None]) -> None:
    """Serves upstreams, without an engine, until SIGTERM or SIGINT.

    Raises:
        ConfigError: it cannot start.
    """
    from bdh_batch.processes.service import Service, run_until_signal
    from bdh_batch.processes.upstreams import NoModels

    if not settings.upstreams:
        raise ConfigError("upstreams: a gateway needs some")
    if settings.models or settings.model.path is not None:
        raise ConfigError("models, model.path: a gateway has no model of its own; `bdh-batch serve` has upstreams, too")
    if settings.server.workers > 1:
        raise ConfigError("server.workers: a gateway is one process")
    await run_until_signal(Service(settings, lambda *_: NoModels(), settings.upstreams[0].id, announce))


def _orphaned() -> None:
    """Kills this process, as its supervisor has ended: nobody else would end or restart it."""
    os.kill(os.getpid(), signal.SIGKILL)


async def serve(
    settings: Settings,
    on_ready: Callable[[str, str], None],
    load: LoadEngine | None = None,
    start: StartEngine | None = None,
) -> None:
    """Runs a server with its engine in this process until SIGTERM or SIGINT.

    Args:
        load: makes the engine, off the event loop; None is `engine.loading.load_engine`.
        start: has it compute, on the event loop; None is `engine.loading.start_worker`.
    """
    from bdh_batch.processes.model_settings import models_of

    [model] = models_of(settings)  # without torch, as above

    from bdh_batch.processes.in_process import hosted
    from bdh_batch.processes.service import Service, run_until_signal

    await run_until_signal(Service(settings, hosted(model, load, start), model.name, on_ready))
