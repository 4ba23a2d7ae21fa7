"""Runs `bdh-batch serve` in this process: the whole server, its supervisor, or a child of the supervisor.

Only a process that computes or serves HTTP imports torch and the rest of the server: a supervisor stays small.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bdh_batch.processes import supervisor
from bdh_batch.processes.folder import RuntimeFolder
from bdh_batch.settings import Settings

if TYPE_CHECKING:
    from bdh_batch.processes.engines import LoadEngine, StartEngine


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
    folder: RuntimeFolder
    liveness: int  # a socket that closes when the supervisor ends
    ready_pipe: int  # a pipe to which the child writes when it is ready
    sockets: Sequence[int]  # at which a front end serves HTTP

    @classmethod
    def of(cls, spec: str) -> ChildSpec:
        """Parses the text that the supervisor makes of it."""
        name, folder, liveness, ready_pipe, *sockets = spec.split(":")
        return cls(name, RuntimeFolder(Path(folder)), int(liveness), int(ready_pipe), [*map(int, sockets)])

    def ready(self) -> None:
        """Notifies the supervisor that this process is ready. To be called once."""
        os.write(self.ready_pipe, b"1")
        os.close(self.ready_pipe)


async def _run_child(
    settings: Settings, spec: ChildSpec, announce: Callable[[str, str], None], load: LoadEngine | None
) -> None:
    def ready() -> None:
        announce(spec.name, "")
        spec.ready()

    loop = asyncio.get_running_loop()
    loop.add_reader(spec.liveness, _orphaned)
    if spec.name.startswith("engine"):
        from bdh_batch.engine.loading import load_engine
        from bdh_batch.processes.engine_process import run_engine

        await run_engine(settings, spec.folder, spec.name, ready, load or load_engine)
    else:
        from bdh_batch.processes.front_end import run_front_end

        listeners = [socket.socket(fileno=number) for number in spec.sockets]
        await run_front_end(settings, spec.folder, spec.name, listeners, lambda *_: spec.ready())


async def run_gateway(settings: Settings, announce: Callable[[str, str], None]) -> None:
    """Serves upstreams, without an engine, until SIGTERM or SIGINT.

    Raises:
        ConfigError: it cannot start.
    """
    from bdh_batch.processes.gateway import Gateway
    from bdh_batch.processes.service import run_until_signal

    await run_until_signal(Gateway(settings, announce))


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
    from bdh_batch.engine.loading import load_engine, start_worker
    from bdh_batch.processes.engines import LocalEngine
    from bdh_batch.processes.service import Service, run_until_signal

    engine = partial(LocalEngine, load=load or load_engine, start=start or start_worker)
    await run_until_signal(Service(settings, engine, on_ready))
